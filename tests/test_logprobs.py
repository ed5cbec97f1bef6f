"""Log-probabilities of answers: three ways to the same number, over answer tokens only, summed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdpo_utils import logprobs, policies
from cdpo_utils.logprobs import cached_logps, enumerate_logps, response_logps


def one_by_one(model, prompt_ids, answer_ids):
    """The definition: per sequence, the sum of log softmax at each answer token given all tokens before it."""
    out = []
    for prompt, answer in zip(prompt_ids, answer_ids, strict=True):
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0].double(), -1)
        out.append(sum(logps[len(prompt) + k - 1, token].item() for k, token in enumerate(answer)))
    return np.array(out)


@pytest.fixture(params=[1, 2], ids=["1-layer", "2-layer"])
def model(request, tokenizer):
    return policies.small_llama(tokenizer, seed=request.param, width=16, layers=request.param)


@pytest.fixture(scope="module")
def prompts(world, tokenizer):
    """Prompts of two lengths."""
    return policies.encode_prompts(tokenizer, [*world.prompts[:2], "Clean the bench", "Repair", world.prompts[7]])


@pytest.fixture(scope="module")
def answers(world, tokenizer):
    return policies.encode_answers(tokenizer, world.answers)


def crossed(prompts, answers):
    return [p for p in prompts for _ in answers], [a for _ in prompts for a in answers]


def test_three_ways_agree(model, prompts, answers):
    rows = crossed(prompts, answers)
    expected = one_by_one(model, *rows).reshape(len(prompts), len(answers))
    assert np.allclose(response_logps(model, *rows).reshape(expected.shape), expected, atol=1e-5)
    assert np.allclose(enumerate_logps(model, prompts, answers), expected, atol=1e-5)
    assert expected.std() > 0.5 and expected.max() < -1, "sums over at least four tokens"


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_enumeration_does_not_depend_on_how_it_is_cut(tokenizer, prompts, answers, chunk, batch_tokens):
    model = policies.small_llama(tokenizer, seed=0, width=16, layers=2)
    whole = enumerate_logps(model, prompts, answers)
    cut = enumerate_logps(model, prompts, answers, chunk=chunk, batch_tokens=batch_tokens)
    assert cut.dtype == np.float64 and np.allclose(cut, whole, atol=1e-5)


def test_enumeration_of_answers_in_any_order_that_begin_alike_or_not_at_all(tokenizer, prompts):
    model = policies.small_llama(tokenizer, seed=0, width=16)
    end = tokenizer.eos_token_id
    answers = [[9, 8, 7, end], [9, end], [end], [9, 8, end], [6, end], [9, 8], [9, 8, 7, end]]
    expected = one_by_one(model, *crossed(prompts, answers)).reshape(len(prompts), -1)
    assert np.allclose(enumerate_logps(model, prompts, answers), expected, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
def test_padded_equals_unpadded(model, prompts, answers, batch_tokens):
    rows = crossed(prompts, answers[:6])
    alone = np.array([response_logps(model, [p], [a])[0] for p, a in zip(*rows, strict=True)])
    assert np.allclose(response_logps(model, *rows, batch_tokens=batch_tokens), alone, atol=1e-5)
    assert np.allclose(response_logps(model, *rows, pad_id=5), alone, atol=1e-5), (
        "what stands in the padding is no matter"
    )


class Uniform(torch.nn.Module):
    """Gives every token of a vocabulary of 8 the same probability."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=8, model_type="uniform")
    tokens = ()

    def forward(self, input_ids, **_):
        self.tokens += (input_ids.numel(),)
        logits = torch.zeros(*input_ids.shape, 8)
        return type("Output", (), {"logits": logits})


def test_sums_over_answer_tokens_and_not_means():
    prompts, answers = [[1, 2, 3], [1], [1, 2]], [[4, 1], [4, 5, 6, 1], [1]]
    assert np.allclose(response_logps(Uniform(), prompts, answers), -np.log(8) * np.array([2, 4, 1]))


def test_a_large_vocabulary_gets_smaller_batches(monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 8 * 17)
    model = Uniform()
    response_logps(model, [[1, 2]] * 7, [[3]] * 7)
    assert model.tokens == (16, 16, 16, 8), "two rows a batch, three tokens padded to eight"


def test_the_end_counts_and_the_prompt_does_not(tokenizer, prompts):
    """Chain rule: log p(a, end | x) = log p(a | x) + log p(end | x a)."""
    model = policies.small_llama(tokenizer, seed=0, width=16)
    answer, end = [9, 8, 7], [tokenizer.eos_token_id]
    whole = response_logps(model, [prompts[0]], [answer + end])[0]
    parts = response_logps(model, [prompts[0], prompts[0] + answer], [answer, end])
    assert whole == pytest.approx(parts.sum(), abs=1e-5) and parts[1] < -0.1
    assert not np.isclose(whole, response_logps(model, [prompts[3]], [answer + end])[0], atol=1e-3), "given the prompt"


def test_probabilities_of_all_continuations_sum_to_one(tokenizer, prompts):
    model = policies.small_llama(tokenizer, seed=0, width=16)
    size, end = len(tokenizer), tokenizer.eos_token_id
    others = [t for t in range(size) if t != end]
    answers = [[end]] + [[t, u] for t in others for u in range(size)]
    assert np.allclose(np.exp(enumerate_logps(model, prompts[:2], answers)).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_put_back(tokenizer, prompts, answers, training):
    model = policies.small_llama(tokenizer, seed=0, width=16)
    expected = response_logps(model, *crossed(prompts, answers[:3]))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    assert np.array_equal(response_logps(model, *crossed(prompts, answers[:3])), expected)
    assert np.allclose(enumerate_logps(model, prompts, answers[:3]).ravel(), expected, atol=1e-5)
    assert model.training == training and all(p.grad is None for p in model.parameters())


def test_cached_logps_runs_each_answer_once(monkeypatch, tokenizer, prompts, answers):
    model, cache, seen = policies.small_llama(tokenizer, seed=0, width=16), {}, []
    rows = [*prompts[:2], prompts[0]], [*answers[:2], answers[0]]
    expected = response_logps(model, *rows)

    def counting(model, prompt_ids, answer_ids):
        seen.append(len(prompt_ids))
        return response_logps(model, prompt_ids, answer_ids)

    monkeypatch.setattr(logprobs, "response_logps", counting)
    for _ in range(2):
        assert np.allclose(cached_logps(model, *rows, cache), expected, atol=1e-6)
    cached_logps(model, [prompts[0]], [answers[1]], cache)  # a new pair of old parts
    assert seen == [2, 1] and len(cache) == 3


def test_build_trie():
    token, parent, depth, paths = logprobs.build_trie([[5, 6, 1], [5, 7, 1], [5, 6, 1], [8]])
    # nodes: 0 = 5, 1 = 5 6, 2 = 5 6 1, 3 = 5 7, 4 = 5 7 1, 5 = 8; a path is padded with 6
    assert token.tolist() == [5, 6, 1, 7, 1, 8] and parent.tolist() == [-1, 0, 1, 0, 3, -1]
    assert depth.tolist() == [0, 1, 2, 1, 2, 0]
    assert paths.tolist() == [[0, 1, 2], [0, 3, 4], [0, 1, 2], [5, 6, 6]]


def test_pad():
    for side, expected in (("left", [[0, 0, 3], [1, 2, 4]]), ("right", [[3, 0, 0], [1, 2, 4]])):
        ids, mask = logprobs.pad([[3], [1, 2, 4]], 0, side)
        assert ids.tolist() == expected and mask.tolist() == (ids != 0).long().tolist()
    assert logprobs.pad([[3], [1, 2]], 9)[0].tolist() == [[9, 3], [1, 2]]


def test_batches_hold_every_row_once_and_stay_within_their_tokens():
    lengths = [3, 9, 4, 4, 20, 1]
    order = sorted(range(6), key=lengths.__getitem__)
    batches = list(logprobs.token_batches(order, lengths, 24))
    assert sum(batches, []) == order and [len(b) for b in batches] == [3, 1, 1, 1]
    padded = [logprobs.pad([[1] * lengths[i] for i in b], 0, "right", logprobs.MULTIPLE)[0] for b in batches]
    assert [tuple(ids.shape) for ids in padded] == [(3, 8), (1, 8), (1, 16), (1, 24)]


def test_bf16_logits_are_summed_in_float32(monkeypatch, reference, prompts, answers):
    forward = reference.forward
    monkeypatch.setattr(
        reference, "forward", lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits.bfloat16())
    )
    prompt, answer = prompts[0], answers[0] * 40
    with torch.no_grad():
        logits = forward(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.bfloat16().double(), -1).gather(1, torch.tensor(answer)[:, None]).sum().item()
    found = response_logps(reference, [prompt], [answer])[0]
    assert abs(found - expected) < 1e-5 * abs(expected) and abs(expected) > 256, "where bf16 counts in steps of 2"
