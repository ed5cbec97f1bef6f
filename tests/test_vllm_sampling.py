"""vLLM in the place of `policies.sample`: what it is asked for, and, where it is installed, what it draws."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from cdpo_utils import algorithms, labs, policies, train, vllm_sampling
from cdpo_utils.data import DataError

TARGETS = r".*\.layers\.1\..*_proj"  # as `real.lora` names the upper layers


@pytest.fixture
def policy(tmp_path, tokenizer):
    """A LoRA policy on a base in a folder, whose adapter says something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    return changed(model, 1).eval()


@torch.no_grad()
def changed(model, seed):
    torch.manual_seed(seed)
    for p in policies.snapshot(model):
        model.get_parameter(p).normal_(0, 0.3)
    return model


class Engine:
    """vLLM's call signature and its memory: an adapter is read once for each number, and the tokens are likeliest ones,
    those of transformers' base and of PEFT's adapter in the folders that were named."""

    made = []

    def __init__(self, model, **settings):
        self.base, self.settings, self.adapters, self.calls = model, settings, {}, []
        Engine.made.append(self)

    def generate(self, prompts, sampling_params, *, lora_request=None, use_tqdm=True):
        self.calls.append((prompts, sampling_params, lora_request))
        model = LlamaForCausalLM.from_pretrained(self.base)
        if lora_request is not None:
            number = lora_request.lora_int_id
            if number not in self.adapters:
                self.adapters[number] = PeftModel.from_pretrained(model, lora_request.lora_path)
            model = self.adapters[number]
        return [
            types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=self.likeliest(model.eval(), p, s))] * s.n)
            for p, s in zip(prompts, sampling_params, strict=True)
        ]

    @torch.no_grad()
    def likeliest(self, model, prompt, asked):
        ids = list(prompt["prompt_token_ids"])
        start = len(ids)
        while len(ids) < start + asked.max_tokens and ids[-1] not in asked.stop_token_ids:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return tuple(ids[start:])


@pytest.fixture
def engine(monkeypatch):
    """`Engine` as the package vllm; the list of those that were made."""

    def module(name, **contents):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    def request(lora_name, lora_int_id, lora_path):
        return types.SimpleNamespace(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)

    module("vllm", LLM=Engine, SamplingParams=types.SimpleNamespace, TokensPrompt=dict)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=request)
    vllm_sampling._engine.cache_clear()
    monkeypatch.setattr(Engine, "made", [])
    yield Engine.made
    vllm_sampling._engine.cache_clear()


@pytest.fixture
def prompts(world, tokenizer):
    return policies.encode_prompts(tokenizer, world.prompts[:3])


def test_the_adapter_that_answers_is_the_one_of_now(engine, policy, tokenizer, prompts):
    """Changed weights never meet an engine that remembers others; unchanged ones need not be read again."""

    def both():
        ours = vllm_sampling.sample(policy, tokenizer, prompts, 2, 0, 7)
        return ours, policies.sample(policy, tokenizer, prompts, 2, 0, 7, temperature=1e-4)

    seen = []
    for seed in (1, 2, 1):
        changed(policy, seed)
        ours, greedy = both()
        assert ours == greedy
        seen.append(ours)
    assert seen[0] == seen[2] != seen[1]
    with policies.as_reference(policy):
        ours, greedy = both()
    assert ours == greedy and ours not in seen
    (one,) = engine
    assert [request and request.lora_int_id == one.calls[0][2].lora_int_id for *_, request in one.calls] == [
        True, False, True, None,
    ]  # fmt: skip


def test_plain_sampling_with_a_stream_for_each_prompt(engine, policy, tokenizer, prompts):
    for seed in (3, 3, 4):
        vllm_sampling.sample(policy, tokenizer, prompts, 5, seed, 7)
    (one,) = engine
    assert one.settings["max_lora_rank"] == 8 and one.settings["dtype"] == "float32"
    streams = [[asked.seed for asked in params] for _, params, _ in one.calls]
    assert streams[0] == streams[1] and not set(streams[0]) & set(streams[2])
    assert np.diff(sorted(streams[0])).min() > 5, "answer j of a prompt has seed + j"
    asked = vars(one.calls[0][1][0])
    plain = dict(n=5, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=7)
    assert {name: asked[name] for name in plain} == plain and asked["stop_token_ids"] == [tokenizer.eos_token_id]


def test_a_lab_draws_by_its_sampler(engine, policy, tokenizer, world):
    lab = algorithms.Lab(policy, tokenizer, world.prompts[:3], 7, sampler=vllm_sampling.sample, shards=2)
    assert (
        lab.sample(policy, 2, 0).ids
        == policies.sample(
            policy, tokenizer, policies.encode_prompts(tokenizer, lab.prompts), 2, 0, 7, temperature=1e-4
        )[1]
    )
    assert len(engine[0].calls) == 2


def test_without_a_folder_there_is_nothing_to_serve(engine, lora_lab, tokenizer, prompts):
    with pytest.raises(ValueError, match="the base of the policy was not loaded from a folder or the hub"):
        vllm_sampling.sample(lora_lab.model, tokenizer, prompts, 2, 0, 7)


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match="^vllm: the package is not installed"):
        labs.open_lab(0, 8, model="x", data_file="y", vllm=True)
    (tmp_path / "c.yaml").write_text("model: x\ndata_file: y\nmethod: one_shot\nfeedback: learned\nvllm: true", "utf-8")
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm: the package is not installed") and error.count("\n") == 1


@pytest.mark.slow
def test_vllm_draws_from_the_policy(policy, tokenizer, prompts):
    """Pearson's chi-square of first tokens against the policy's own probabilities, and the shares that end."""
    pytest.importorskip("vllm")
    n, more = 2000, 7
    for seed in (1, 2):
        changed(policy, seed)
        ids = vllm_sampling.sample(policy, tokenizer, prompts, n, 0, more)[1]
        for prompt, answers in zip(prompts, ids, strict=True):
            with torch.no_grad():
                p = policy(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
            drawn = np.bincount([answer[0] for answer in answers], minlength=len(p))
            freedom = len(p) - 1
            assert (((drawn - n * p) ** 2) / (n * p)).sum() < freedom + 5 * np.sqrt(2 * freedom)
        theirs = policies.sample(policy, tokenizer, prompts, n, 0, more)[1]
        share, expected = (
            np.mean([[a[-1] == tokenizer.eos_token_id for a in row] for row in x]) for x in (ids, theirs)
        )
        assert abs(share - expected) < 0.03
        assert not any(tokenizer.eos_token_id in answer[:-1] for row in ids for answer in row)
