"""A constraint of one's own: what counts, what is refused, and what the card says."""

import html
import re

import mistune
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from cdpo_utils import own
from cdpo_utils.algorithms import Feedback
from cdpo_utils.data import DataError


def test_a_pattern_counts_in_any_case_and_not_in_the_prompt():
    cost = own.pattern_cost("acid|bleach")
    assert cost(["acid"] * 3, ["Use ACID", "soap", "bleaching"]).tolist() == [1.0, 0.0, 1.0]


def test_words_are_whole_words_and_no_expressions():
    cost = own.words_cost(["acid", "c"])
    assert cost([""] * 3, ["acidic", "an acid!", "vitamin c"]).tolist() == [0.0, 1.0, 1.0]
    assert own.words_cost(["a.b"])([""] * 2, ["a.b", "axb"]).tolist() == [1.0, 0.0]
    assert own.words_cost(["c++"])([""] * 3, ["in C++, say", "c++", "c++11"]).tolist() == [1.0, 1.0, 0.0]


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


# --- one of three ways to say it -------------------------------------------------------------------------------------


def test_a_pattern_or_words_separated_by_commas():
    cost, measure, rule = own.cost_of("a.id")
    assert (measure, rule) == ("share with the pattern", "a.id") and cost(["", ""], ["acid", "soap"]).tolist() == [1, 0]
    cost, measure, rule = own.cost_of(words="acid, wire wool,")
    assert (measure, rule) == ("share with one of the words", "acid, wire wool,")
    assert cost([""] * 4, ["an acid", "acidic", "WIRE WOOL", "wire"]).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing given; expected one of pattern, words and classifier"),
        ({"pattern": "a", "words": "b"}, "pattern='a', words='b' given; expected one of"),
        ({"words": "b\n", "classifier": "c", "label": "d"}, r"words='b\\n', classifier='c' given; expected one of"),
        ({"pattern": "a", "label": "d"}, "pattern='a', label='d' given; expected a label with a classifier only"),
        ({"words": " , "}, "no words"),
    ],
)
def test_none_or_several_are_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        own.cost_of(**given)
    assert "\n" not in str(caught.value)


# --- a classifier ----------------------------------------------------------------------------------------------------

WORDS = "use soap acid steam then rinse long it".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_classifier(folder, labels=("fine", "rude", "other"), body=False, **more):
    """A tiny random BERT of 20 tokens at most, with dropout, and its tokenizer; body: without the head."""
    torch.manual_seed(0)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, initializer_range=0.5, hidden_dropout_prob=0.5,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, **more,
    )  # fmt: skip
    model = (BertModel if body else BertForSequenceClassification)(config)
    model.save_pretrained(folder)
    return str(folder), model.eval()


ANSWERS = ["use acid", "rinse", "use soap then rinse it then use steam", "use acid", "", "then rinse it " * 30]


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_classifiers_cost_is_the_probability_of_the_label(tmp_path, kind):
    """Of the answer alone, whatever it is batched with; an answer that is too long is cut."""
    name, model = save_classifier(tmp_path, problem_type=kind)
    cost = own.classifier_cost(name, "rude")
    found = cost(["use acid"] * 6, ANSWERS)
    ids = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    for answer, value in zip(ANSWERS, found, strict=True):
        row = [2, *(ids[word] for word in answer.split()[:16]), 3]
        logits = model(input_ids=torch.tensor([row])).logits[0].double()
        expected = logits.sigmoid() if kind.startswith("multi") else logits.softmax(0)
        assert value == pytest.approx(expected[1].item(), abs=1e-6)
    assert found.dtype == float and ((found >= 0) & (found <= 1)).all() and np.ptp(found) > 0.01
    assert np.array_equal(own.classifier_cost(name, 1)(["else"] * 6, ANSWERS), found), "by number; without dropout"
    if kind.startswith("single"):
        others = sum(own.classifier_cost(name, label)([""] * 6, ANSWERS) for label in ("fine", "2"))
        assert np.allclose(found + others, 1)


def test_a_classifier_reads_each_answer_once_without_gradients_and_is_one_constraint(tmp_path, monkeypatch):
    name, _ = save_classifier(tmp_path)
    cost, measure, rule = own.cost_of(classifier=name, label="rude")
    assert (measure, rule) == ("probability of the label", f"rude by {name}")
    forward, seen = BertForSequenceClassification.forward, []

    def watched(self, input_ids, **more):
        assert not torch.is_grad_enabled() and not self.training
        seen.append(len(input_ids))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(BertForSequenceClassification, "forward", watched)
    many = [f"use acid {'then rinse ' * (i % 7)}{w}" for i in range(20) for w in ("it", "soap")]
    feedback = own.with_cost(Feedback(None, None, "learned"), cost)
    first = feedback.costs([""] * 80, many * 2)
    assert first.shape == (80, 1) and np.array_equal(first[:40], first[40:])
    assert sum(seen) == len(set(many)) < 40 and max(seen) <= own.BATCH
    assert np.array_equal(feedback.costs([""] * 40, many), first[:40]) and sum(seen) == len(set(many))


@pytest.mark.parametrize(
    ("change", "label", "message"),
    [
        ({}, "rdue", "label 'rdue'; expected fine, rude, other, or a number below 3"),
        ({}, "3", "label '3'; expected fine"),
        ({}, "", "label ''; expected fine"),
        ({"labels": ["fine", "\x1b[2Jrude\n"]}, "rude", r"expected fine, \x1b[2Jrude\n, or a number below 2"),
        ({"labels": ["score"]}, "score", "no probabilities"),
        ({"problem_type": "regression"}, "rude", "no probabilities"),
        ({"body": True}, "rude", "no weights for classifier.bias, classifier.weight"),
    ],
)
def test_what_is_no_such_classifier_is_one_line(tmp_path, change, label, message):
    name, _ = save_classifier(tmp_path, **change)
    with pytest.raises(DataError) as caught:
        own.classifier_cost(name, label)
    assert message in str(caught.value) and str(caught.value).startswith(f"classifier {name}: ")
    assert str(caught.value).isprintable()


def test_a_missing_folder_missing_weights_and_code_are_one_line(tmp_path):
    with pytest.raises(DataError, match="nothing: no such folder"):
        own.classifier_cost(str(tmp_path / "nothing"), "rude")
    name, model = save_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    evil = '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'
    for text in ((tmp_path / "config.json").read_text(), evil):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=f"classifier {name}: ") as caught:
            own.classifier_cost(name, "rude")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# --- the card --------------------------------------------------------------------------------------------------------


def card(rule="acid", passed=True, **settings):
    measured = {"share, after": (0.04, 0.03, 0.051), "violation, after": (-0.01, -0.02, 0.001)}
    return own.model_card("T", "share", rule, 0.05, measured, {"upper": 0.0496, "passed": passed}, settings)


def test_the_card_says_what_was_promised_and_what_was_measured():
    text = card(beta=1.0, seed=0, model="")
    assert (
        "the **share** `acid` is at most 0.05 on average" in text
        and "| share, after | 0.040 | 0.030 to 0.051 |" in text
    )
    assert "| violation, after | -0.010 | -0.020 to 0.001 |" in text
    assert "at most 0.050 with 95 % confidence, **passed**" in text and "**not passed**" in card(passed=False)
    assert "* beta: 1.0" in text and "* seed: 0" in text and "model" not in text and "not for every answer" in text


@pytest.mark.parametrize(
    ("rule", "written"),
    [
        ("acid|<script>alert(1)</script>", "`acid|<script>alert(1)</script>`"),
        ("a`<b>`` x", "``` a`<b>`` x ```"),
        ("`", "`` ` ``"),
        ("a\n\n# b\r\n<img src=x>\x1b[2J\u202e", r"`a\n\n# b\r\n<img src=x>\x1b[2J\u202e`"),
        (r"\bacid\b", r"`\bacid\b`"),
    ],
)
def test_nothing_in_a_rule_is_read_as_markdown_or_html(rule, written):
    """Inline code ends at as many backticks as it began with (CommonMark 6.1), and no block begins in its line."""
    text = card(rule, model=rule)
    assert f"**share** {written} is at most" in text and f"\n* model: {written}\n" in text
    assert len(text.splitlines()) == len(card(model="x").splitlines())
    page = mistune.html(text)  # passes HTML on, as a hub may
    assert not re.search("<(script|b|img)", page) and page.count("<h1>") == 1
    assert [html.unescape(code) for code in re.findall("<code>(.*?)</code>", page)] == [written.strip("` ") or "`"] * 2
