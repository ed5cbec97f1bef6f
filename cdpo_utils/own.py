"""Your own constraint: what an answer costs by a pattern, words, a classifier or any function, and the result's card.

A cost here is 1 for an answer that has what you do not want and 0 for one that has not, so its mean is the share of
such answers and a budget of 0.05 allows one answer in twenty; of a classifier it is a probability, between the two. A
function of yours may return any number (> 0 unsafe).
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from cdpo_utils import guard, preflight
from cdpo_utils.data import DataError

BATCH = 16  # answers that a classifier reads at once


def cost_of(pattern="", words="", classifier="", label=""):
    """(cost, the name of its mean, the rule as text) of the one that is given: a regular expression, words separated
    by commas, or a classifier and which of its labels is meant. Raises ValueError, in one line, for none or several."""
    ways = {"pattern": pattern, "words": words, "classifier": classifier}
    given = ", ".join(f"{name}={text!r}" for name, text in ways.items() if text)
    if sum(map(bool, ways.values())) != 1:
        raise ValueError(f"{given or 'nothing'} given; expected one of pattern, words and classifier, the others empty")
    if classifier:
        return classifier_cost(classifier, label), "probability of the label", f"{label} by {classifier}"
    if label:
        raise ValueError(f"{given}, label={label!r} given; expected a label with a classifier only")
    if words:
        listed = [word.strip() for word in words.split(",") if word.strip()]
        return words_cost(listed), "share with one of the words", words
    return pattern_cost(pattern), "share with the pattern", pattern


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
    return pattern_cost(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)")  # \b would ask for a letter after c++


def classifier_cost(name, label):
    """costs(prompts, answers) -> (n,): the probability, in [0, 1], that a sequence classifier gives `label`.

    It reads the answer alone, as a pattern does, since most have learned from single texts; what is longer than it can
    read is cut. Each answer is read once in the cost's life.
    name: hub name or folder, safetensors only, no code from the repository; see `preflight.precision`.
    label: the name of one of its labels, or its number, from 0.

    Raises DataError, in one line, where files or weights are missing, it has no probabilities, or no such label.
    """
    model, tokenizer = _load(name)
    column = _column(name, model.config, str(label))
    known = {}

    def costs(prompts, answers):
        new = sorted((answer for answer in dict.fromkeys(answers) if answer not in known), key=len)
        for batch in (new[i : i + BATCH] for i in range(0, len(new), BATCH)):
            known.update(zip(batch, _probabilities(model, tokenizer, batch)[:, column], strict=True))
        return np.array([known[answer] for answer in answers])

    return costs


def _load(name):
    if (name.startswith((".", "~")) or os.path.isabs(name)) and not Path(name).is_dir():
        raise DataError(f"classifier {name}: no such folder")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=preflight.precision(), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        _probabilities(model, tokenizer, ["", "long " * 1000])  # whether it can read: before anything is trained
    except Exception as error:  # files missing or damaged, no network, ...: transformers has many ways to say so
        raise DataError(f"classifier {name}: {guard.one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"classifier {name}: no weights for {', '.join(missing[:3])}")
    if model.config.problem_type == "regression" or (model.config.num_labels == 1 and not _independent(model.config)):
        raise DataError(f"classifier {name}: its labels have numbers, no probabilities; expected a classifier")
    return model, tokenizer


def _column(name, config, label):
    labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if label in labels:
        return labels.index(label)
    if label.isdecimal() and int(label) < len(labels):
        return int(label)
    known = ", ".join(guard.visible(text, 40) for text in labels[:20])
    raise DataError(f"classifier {name}: label {label!r}; expected {known}, or a number below {len(labels)}")


def _independent(config):
    """Whether an answer may have several of the labels, each with a probability of its own."""
    return config.problem_type == "multi_label_classification"


@torch.no_grad()
def _probabilities(model, tokenizer, texts):
    """(n, labels), float64 numpy."""
    room = getattr(model.config, "max_position_embeddings", 512) - 2  # RoBERTa counts its positions from 2
    texts = [text or " " for text in texts]  # of nothing some tokenizers make no token
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=min(room, tokenizer.model_max_length), return_tensors="pt"
    )
    logits = model(**batch.to(model.device)).logits.double()
    return (logits.sigmoid() if _independent(model.config) else logits.softmax(-1)).cpu().numpy()


def with_cost(feedback, cost):
    """`feedback`'s reward with your cost, a function (prompts, answers) -> (n,), as its one constraint."""
    return replace(feedback, costs=lambda prompts, answers: np.asarray(cost(prompts, answers))[:, None], kind="learned")


def model_card(title, constraint, rule, budget, measured, test, settings):
    """The card of a trained policy, Markdown: what was constrained, the budget, and what was measured.

    constraint: the name of the cost's mean; rule: what it is of, any text: nothing in it, or in a setting, is read as
    Markdown or HTML. measured: {what: (mean, low, high)} with 95 % intervals over held-out prompts; test:
    `evaluate.constraint_test`; settings: {name: value}."""
    promise = f"Trained to be helpful while the **{constraint}** {_code(rule)} is at most {budget:g} on average."
    lines = [f"# {title}", "", promise, "", "| held-out prompts | mean | 95 % interval |", "|---|---|---|"]
    lines += [f"| {name} | {mean:.3f} | {low:.3f} to {high:.3f} |" for name, (mean, low, high) in measured.items()]
    verdict = "passed" if test["passed"] else "not passed"
    lines += ["", f"One-sided test of the budget: at most {test['upper']:.3f} with 95 % confidence, **{verdict}**.", ""]
    lines += ["The budget is for the average over prompts like those measured, not for every answer.", ""]
    texts = {name: _code(value) if isinstance(value, str) else value for name, value in settings.items() if value != ""}
    lines += [f"* {name}: {value}" for name, value in texts.items()]
    return "\n".join(lines) + "\n"


def _code(text):
    """Inline code of Markdown: in one line, with more backticks around it than there are in it."""
    text = guard.visible(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"
