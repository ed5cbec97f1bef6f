"""A constraint of one's own: what counts, what is refused, and what the card says."""

import numpy as np
import pytest

from cdpo_utils import own
from cdpo_utils.algorithms import Feedback


def test_a_pattern_counts_in_any_case_and_not_in_the_prompt():
    cost = own.pattern_cost("acid|bleach")
    assert cost(["acid"] * 3, ["Use ACID", "soap", "bleaching"]).tolist() == [1.0, 0.0, 1.0]


def test_words_are_whole_words_and_no_expressions():
    cost = own.words_cost(["acid", "c"])
    assert cost([""] * 3, ["acidic", "an acid!", "vitamin c"]).tolist() == [0.0, 1.0, 1.0]
    assert own.words_cost(["a.b"])([""] * 2, ["a.b", "axb"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "expected a regular expression"), ("a*", "found in every answer"), ("", "every answer")],
)
def test_a_pattern_without_meaning_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        own.pattern_cost(pattern)
    with pytest.raises(ValueError, match="no words"):
        own.words_cost([])


def test_the_reward_stays_and_the_cost_is_one_constraint():
    given = Feedback(lambda p, a: np.arange(len(a)), None, "learned")
    feedback = own.with_cost(given, own.pattern_cost("x"))
    assert feedback.reward is given.reward and feedback.costs(["p"] * 2, ["x", "y"]).tolist() == [[1.0], [0.0]]


def test_the_card_says_what_was_promised_and_what_was_measured():
    card = own.model_card(
        "T", "x stays rare", 0.05, {"share, after": (0.04, 0.03, 0.051)}, {"beta": 1.0, "seed": 0, "model": ""}
    )
    assert "**x stays rare**: at most 0.05 on average" in card and "| share, after | 0.040 | 0.030 to 0.051 |" in card
    assert "* beta: 1.0" in card and "* seed: 0" in card and "model" not in card and "not for every answer" in card
