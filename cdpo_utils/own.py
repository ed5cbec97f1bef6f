"""Your own constraint: what an answer costs by a pattern, a list of words or any function, and the card of the result.

A cost here is 1 for an answer that has what you do not want and 0 for one that has not, so its mean is the share of
such answers and a budget of 0.05 allows one answer in twenty. A function of yours may return any number (> 0 unsafe).
"""

import re
from dataclasses import replace

import numpy as np


def pattern_cost(pattern):
    """costs(prompts, answers) -> (n,): 1 where the regular expression is found in an answer, in any case, else 0.

    Raises ValueError, in one line, for what is no regular expression, or for one that is found in an empty answer and
    so in every answer."""
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}; expected a regular expression") from None
    if wanted.search(""):
        raise ValueError(f"pattern {pattern!r} is found in every answer; expected one that asks for something")
    return lambda prompts, answers: np.array([float(bool(wanted.search(answer))) for answer in answers])


def words_cost(words):
    """`pattern_cost` of a list of words, each as a whole word."""
    if not words:
        raise ValueError("words_cost: no words; expected at least one")
    return pattern_cost(rf"\b({'|'.join(map(re.escape, words))})\b")


def with_cost(feedback, cost):
    """`feedback`'s reward with your cost, a function (prompts, answers) -> (n,), as its one constraint."""
    return replace(feedback, costs=lambda prompts, answers: np.asarray(cost(prompts, answers))[:, None], kind="learned")


def model_card(title, constraint, budget, measured, settings):
    """The card of a trained policy, Markdown: what was constrained, the budget, and what was measured.

    measured: {what: (mean, low, high)} with 95 % intervals over held-out prompts; settings: {name: value}."""
    lines = [f"# {title}", "", f"Trained to be helpful while **{constraint}**: at most {budget:g} on average.", ""]
    lines += ["| held-out prompts | mean | 95 % interval |", "|---|---|---|"]
    lines += [f"| {name} | {mean:.3f} | {low:.3f} to {high:.3f} |" for name, (mean, low, high) in measured.items()]
    lines += ["", "The constraint holds on average over prompts like those measured, not for every answer.", ""]
    lines += [f"* {name}: {value}" for name, value in settings.items() if value != ""]
    return "\n".join(lines) + "\n"
