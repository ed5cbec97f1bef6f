"""Judging scores on labels: intervals over prompts, accuracies by hand, what signs say about the zero."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cdpo_utils import scoring


def cost_pairs(signs):
    frame = pd.DataFrame(signs, columns=["costlier_sign", "cheaper_sign"])
    return frame.assign(prompt="p", costlier="a", cheaper="b")


def test_signs_of_a_selected_file_fix_no_zero():
    assert "nothing fixes the cost's zero" in scoring.zero_account(cost_pairs([(1, -1), (1, -1)]))
    mixed = scoring.zero_account(cost_pairs([(1, -1), (1, 1), (-1, -1), (1, -1)]))
    assert "50.0% of 4 cost pairs" in mixed and "the other pairs fix the cost's zero" in mixed


def test_an_interval_treats_the_pairs_of_a_prompt_as_one():
    """Ten copies of each value under its prompt say no more than one of each."""
    values = np.random.default_rng(0).normal(size=40)
    mean, low, high = scoring.interval(values, np.arange(40))
    assert (mean, low, high) == pytest.approx(scoring.interval(np.repeat(values, 10), np.repeat(np.arange(40), 10)))
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.15)
    _, *apart = scoring.interval(np.repeat(values, 10), np.arange(400))
    assert apart[1] - apart[0] < 0.5 * (high - low), "taken for independent, they would promise too much"


def test_accuracies_of_held_out_labels_by_hand():
    helpful = pd.DataFrame({"prompt": list("pqr"), "chosen": "a", "rejected": "b"})
    rewards = pd.DataFrame({"prompt": list("pqr"), "chosen": [1.0, 0.0, 2.0], "rejected": [0.0, 1.0, 2.0]})
    costs = pd.DataFrame({"prompt": ["p"], "costlier": [0.5], "cheaper": [0.2], "costlier_sign": 1, "cheaper_sign": -1})
    report = scoring.held_out_report(SimpleNamespace(exact=False), helpful, costs, rewards, costs)
    assert report.accuracy.tolist() == [0.5, 1.0, 0.5]  # right, wrong, a tie; right; 0.5 is unsafe, 0.2 is not safe
    assert report.labels.tolist() == [3, 1, 2] and report["best possible"].isna().all()


def test_an_unattainable_budget_is_one_line_with_the_least_cost():
    optimum = SimpleNamespace(feasible=False, cost=np.array([-1.25]))
    truth = SimpleNamespace(optimum=optimum, budget=np.array([-4.0]))
    with pytest.raises(ValueError, match="budget -4.000 cannot be met: smallest attainable cost on train is -1.250"):
        scoring.require_feasible({"train": truth})


def test_reliability_counts_the_share_in_each_bin():
    score = np.tile([2.0, -2.0], 50)
    event = np.tile([True, False, False, False], 25)  # half of the high scores, none of the low ones
    table = scoring.reliability(score, event, np.arange(100), bins=2)
    assert table["score"].tolist() == [-2.0, 2.0] and table["count"].tolist() == [50, 50]
    assert table.share.tolist() == [0.0, 0.5] and table.low[1] < 0.5 < table.high[1]
