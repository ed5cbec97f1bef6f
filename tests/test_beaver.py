"""Published scorers, with tiny random Llamas saved in their layout; and what a machine can hold."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from cdpo_utils import beaver, policies, preflight, real
from cdpo_utils.data import DataError

WORDS = "BEGINNING OF CONVERSATION: USER: ASSISTANT: how do I clean it ? use soap acid then rinse".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def tokenizer_of_llama():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_scorer(folder, bias=True, pad="<pad>", drop=(), **more):
    """A Beaver scorer as on the hub: a Llama's weights, and `score_head`."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of_llama()
    tokenizer.pad_token = pad
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, pad_token_id=3, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    body, head = LlamaModel(config), torch.nn.Linear(16, 1, bias=bias)
    weights = {f"model.{k}": v for k, v in body.state_dict().items()}
    weights |= {f"score_head.{k}": v.detach().clone() for k, v in head.state_dict().items()}
    folder.mkdir()
    save_file({k: v for k, v in weights.items() if k not in drop}, folder / "model.safetensors", {"format": "pt"})
    said = {"architectures": ["LlamaForScore"], "score_dim": 1, "score_type": "reward", "do_normalize": False}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | said | {"score_bias": bias} | more))
    tokenizer.save_pretrained(folder)
    return body.eval(), head


@pytest.mark.parametrize("bias", [True, False])
def test_the_score_is_the_head_at_the_end_of_sequence(tmp_path, bias):
    body, head = save_scorer(tmp_path / "scorer", bias)
    scorer = beaver.load(str(tmp_path / "scorer"))
    prompts = ["how do I clean it ?"] * 3
    answers = [" use soap", " use acid then rinse then rinse", " rinse"]
    for prompt, answer, found in zip(prompts, answers, scorer(prompts, answers), strict=True):
        ids = scorer.tokenizer(f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer} </s>")["input_ids"]
        assert ids[0] == 1 and ids[-1] == 2
        with torch.no_grad():
            expected = head(body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert np.isclose(found, expected, atol=1e-5)


def test_a_text_is_run_once_and_keeps_its_end_when_cut(tmp_path, monkeypatch):
    save_scorer(tmp_path / "scorer")
    scorer, seen = beaver.load(str(tmp_path / "scorer")), []
    forward = type(scorer.model).forward
    monkeypatch.setattr(
        type(scorer.model), "forward", lambda self, *a, **k: seen.append(k["input_ids"]) or forward(self, *a, **k)
    )
    long = " use soap then acid" * 20
    first = scorer(["clean it", "clean it"], [long, " rinse"])
    assert np.array_equal(scorer(["clean it"], [long]), first[:1]) and len(seen) == 1
    lengths = (seen[0] != 3).sum(1)
    assert lengths.max() == 24 and all(row[n - 1] == 2 for row, n in zip(seen[0], lengths, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "expected a Beaver LlamaForScore"),
        ({"do_normalize": True}, "do_normalize is set"),
        ({"pad": "</s>"}, "no padding token of its own"),
        ({"drop": ["score_head.bias"]}, "no weights for score.bias"),
        ({"score_bias": False}, "config.json knows no score.bias"),
        ({"drop": ["model.norm.weight"]}, "no weights for model.norm.weight"),
    ],
)
def test_what_is_no_scorer_is_one_line(tmp_path, change, message):
    save_scorer(tmp_path / "scorer", **change)
    with pytest.raises(DataError) as caught:
        beaver.load(str(tmp_path / "scorer"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_scorer_is_one_line(tmp_path):
    with pytest.raises(DataError) as caught:
        beaver.load(str(tmp_path / "nothing"))
    assert "scorer" in str(caught.value) and "\n" not in str(caught.value)


def save_alpaca(folder):
    torch.manual_seed(1)
    tokenizer = tokenizer_of_llama()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_alpaca_gets_the_template_it_was_trained_on(tmp_path, monkeypatch):
    save_alpaca(tmp_path / "alpaca")
    with pytest.raises(DataError, match="has no chat template"):
        real.load_model(str(tmp_path / "alpaca"))
    monkeypatch.setitem(real.HUB, "alpaca", str(tmp_path / "alpaca"))
    _, tokenizer = real.load_model("alpaca")
    ids = policies.encode_prompts(tokenizer, ["how do I clean it ?"])[0]
    text = beaver.TEXT.format(prompt="how do I clean it ?", answer="")
    assert ids == tokenizer(text)["input_ids"]


def test_published_scorers_judge_in_the_place_of_our_own(tmp_path, monkeypatch):
    save_alpaca(tmp_path / "alpaca")
    save_scorer(tmp_path / "scorer")
    monkeypatch.setitem(real.HUB, "tiny", str(tmp_path / "alpaca"))
    monkeypatch.setitem(real.TEMPLATES, "tiny", beaver.CHAT_TEMPLATE)
    pairs = [  # the safety labels agree with what this scorer happens to say
        {"prompt": f"how do I clean {i} ?", "response_0": "use soap", "response_1": "use acid",
         "better_response_id": i % 2, "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
        for i in range(24)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    names = dict(published_reward=str(tmp_path / "scorer"), published_cost=str(tmp_path / "scorer"))
    file = str(tmp_path / "pairs.jsonl")
    made = real.open_real("tiny", 0, 16, file, n_prompts=3, max_new_tokens=4, max_length=32, **names)
    feedback = made.learned_feedback(*made.scorers())
    texts = (["how do I clean it ?"], ["use soap then rinse"])
    assert np.array_equal(feedback.costs(*texts), beaver.load(names["published_cost"])(*texts)[:, None])
    rows, _, _ = made.judge({"reference": None}, feedback, 0.0, "06_two_stage_primal_dual")
    drawn = made.lab.sample(made.lab.model, 2, made.seed, made.judge_prompts)
    assert np.isclose(rows[0]["cost"], feedback.on(drawn)[1].mean(1).mean())
    with pytest.raises(DataError, match="expected both or none"):
        real.open_real("tiny", 0, 16, file, published_cost="somewhere")
    turned = [
        pair | {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False} for pair in pairs
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, turned)), encoding="utf-8")
    made = real.open_real("tiny", 0, 16, file, n_prompts=3, max_new_tokens=4, max_length=32, **names)
    for _ in range(2):  # it is not taken the second time either
        with pytest.raises(DataError, match="published_cost .* the costlier answer the higher score in 0%"):
            made.scorer("cost")


class Lengths:
    """A scorer that likes long answers, `sign` = -1 short ones."""

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, prompts, answers):
        return self.sign * np.array([len(answer) for answer in answers], float)


@pytest.mark.parametrize(("kind", "better"), [("reward", "chosen"), ("cost", "costlier")])
def test_a_published_scorer_with_the_wrong_sign_is_refused(kind, better):
    pairs = pd.DataFrame(
        {"prompt": "x", better: ["long enough"] * 20, {"chosen": "rejected"}.get(better, "cheaper"): "no"}
    )
    real.require_sign(Lengths(1), kind, "somebody/scorer", pairs)
    with pytest.raises(DataError, match=f"published_{kind} somebody/scorer: of 20 pairs .* {better} .* 0%"):
        real.require_sign(Lengths(-1), kind, "somebody/scorer", pairs)
    real.require_sign(Lengths(-1), kind, "somebody/scorer", pairs.head(8))  # too few to tell


def test_a_large_model_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # 7 B by default; no weights at all
    with pytest.raises(DataError, match=r"6\.7 billion parameters need a GPU; none was found"):
        preflight.check("seven", str(tmp_path))


def test_weights_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    line = preflight.check("tiny", str(tmp_path))
    assert "million parameters" in line and "ms per trained token" in line
    monkeypatch.setattr(preflight, "memory", lambda: (1000, "a toaster"))
    with pytest.raises(DataError, match="its weights take .* a toaster can have 0.0"):
        preflight.check("tiny", str(tmp_path))


def test_scorers_need_memory_too_and_steps_take_time(tmp_path, monkeypatch):
    config = LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    alone = preflight.parameters(config) * preflight.precision().itemsize
    monkeypatch.setattr(preflight, "memory", lambda: (2.5 * alone, "a toaster"))
    preflight.check("tiny", str(tmp_path), [str(tmp_path)])
    with pytest.raises(DataError, match=f"its weights and those of {tmp_path} and {tmp_path} take"):
        preflight.check("tiny", str(tmp_path), [str(tmp_path)] * 2)
    monkeypatch.setattr(preflight, "flops", lambda: 3 * preflight.parameters(config))  # a token a second
    assert "at most 10 minutes of steps" in preflight.check("tiny", str(tmp_path), tokens=600)
    assert "at most 2.0 hours of steps" in preflight.check("tiny", str(tmp_path), tokens=7200)


def test_parameters_are_counted_without_weights():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    assert preflight.parameters(config) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
