"""Tokenizer, models and sampling of the bench, and what a LoRA policy shares with its base."""

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

from cdpo_utils import evaluate, logprobs, policies, trainers
from cdpo_utils.logprobs import response_logps

# --- tokenizer --------------------------------------------------------------------------------------------------------


def chat(prompt, *answer):
    return [{"role": "user", "content": prompt}, *({"role": "assistant", "content": a} for a in answer)]


def test_one_token_per_word_and_back(world, tokenizer):
    for texts in (world.prompts, world.answers):
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert [len(row) for row in ids] == [len(text.split()) for text in texts]
        assert tokenizer.batch_decode(ids) == texts
    words = {word for text in world.prompts + world.answers for word in text.split()}
    assert len(tokenizer) == len(policies.SPECIAL) + len(words)
    assert tokenizer("nonsense")["input_ids"] == [tokenizer.unk_token_id]


def test_the_prompt_is_a_prefix_of_the_conversation(world, tokenizer):
    for prompt, answer in ((world.prompts[0], world.answers[5]), (world.prompts[9], world.answers[-1])):
        opening = tokenizer.apply_chat_template(chat(prompt), add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat(prompt, answer), tokenize=False)
        assert whole.startswith(opening) and whole.endswith(tokenizer.eos_token) and opening.endswith("<|assistant|> ")
        parts = policies.encode_prompts(tokenizer, [prompt])[0] + policies.encode_answers(tokenizer, [answer])[0]
        assert parts == tokenizer.apply_chat_template(chat(prompt, answer), return_dict=True)["input_ids"]
        assert parts == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert parts.count(tokenizer.eos_token_id) == 1


def test_a_model_and_its_seed(tokenizer):
    one, again, other = (policies.small_llama(tokenizer, seed, width=16) for seed in (1, 1, 2))
    weights = [m.state_dict()["model.embed_tokens.weight"] for m in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    scorer = policies.small_scorer(tokenizer, 1, width=16)
    assert scorer.config.num_labels == 1 and scorer.config.pad_token_id == tokenizer.pad_token_id


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [policies.LARGE, 1], ids=["generate's own draws", "one draw a row"])
def test_samples_have_the_enumerated_frequencies(world, tokenizer, reference, large, monkeypatch):
    monkeypatch.setattr(policies, "LARGE", large)
    n, prompts = 3000, world.prompts[:3]
    ids = policies.encode_prompts(tokenizer, prompts)
    texts, answers = policies.sample(reference, tokenizer, ids, n, seed=0, max_new_tokens=7)
    logps, mass = evaluate.policy_logps(reference, tokenizer, prompts, world.answers)
    assert mass > 0.95
    places = {text: j for j, text in enumerate(world.answers)}
    for row, prompt_logps in zip(texts, logps, strict=True):
        inside = [places[text] for text in row if text in places]
        assert abs(len(inside) / n - mass) < 0.03
        expected = len(inside) * np.exp(prompt_logps)
        counts = np.bincount(inside, minlength=24)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 23 + 5 * np.sqrt(2 * 23), "23 degrees of freedom, five standard deviations"


def test_what_a_sample_is(world, tokenizer, reference):
    ids = policies.encode_prompts(tokenizer, [*world.prompts[:2], "Clean the bench"])  # of two lengths
    texts, answers = policies.sample(reference, tokenizer, ids, 20, seed=3, max_new_tokens=7)
    assert [len(row) for row in texts] == [len(row) for row in answers] == [20, 20, 20]
    for text, answer in zip(sum(texts, []), sum(answers, []), strict=True):
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == text
        assert len(answer) == 7 or answer[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in answer[:-1] and tokenizer.pad_token_id not in answer
    ended = [answer[-1] == tokenizer.eos_token_id for answer in sum(answers[:2], [])]
    assert np.mean(ended) > 0.9
    assert np.isfinite(response_logps(reference, [ids[0]] * 20, answers[0])).all()


@pytest.mark.parametrize("large", [policies.LARGE, 1])
def test_the_seed_decides_and_batches_come_back_in_order(world, tokenizer, reference, large, monkeypatch):
    monkeypatch.setattr(policies, "LARGE", large)
    ids = policies.encode_prompts(tokenizer, world.prompts)
    draw = [policies.sample(reference, tokenizer, ids, 5, seed, 7) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] and draw[0] != draw[2]
    # with a temperature near zero every row is the likeliest answer of its own prompt, however it was batched
    ids += policies.encode_prompts(tokenizer, ["Clean the bench"])  # shorter: padded where it is not alone
    greedy = [policies.sample(reference, tokenizer, ids, 2, 0, 7, temperature=1e-4, batch_rows=b)[0] for b in (2, 100)]
    assert greedy[0] == greedy[1] and all(len(set(row)) == 1 for row in greedy[0])
    drawn, _ = policies.sample(reference, tokenizer, ids, 5, 0, 7, batch_rows=2)  # in parts of 2, 2 and 1
    assert [len(row) for row in drawn] == [5] * len(ids) and any(row[:2] != row[2:4] for row in drawn)
    assert len({row[0] for row in greedy[0]}) > 1


def test_one_draw_a_row_has_the_probabilities_of_its_scores():
    """Frequencies of 40,000 rows at temperature 2, with a token that is impossible first, in the middle and last."""
    torch.manual_seed(0)
    scores = torch.tensor([-torch.inf, 1.0, -torch.inf, 3.0, 0.0, -torch.inf]).expand(40_000, -1)
    chosen = policies.InverseTransform(temperature=2.0)(None, scores)
    assert ((chosen == 0).sum(1) == 1).all() and ((chosen == -torch.inf).sum(1) == 5).all()
    shares = (chosen == 0).double().mean(0)
    assert torch.allclose(shares, (scores[0].double() / 2).softmax(-1), atol=0.01), shares


def test_a_token_of_a_large_vocabulary_is_that_of_the_whole_cumulative_sum():
    """Blocks of 256 tokens, the last one cut and half of it forbidden, against one sum over all 700."""
    scores = torch.randn(2000, 700, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 512:600] = -torch.inf
    torch.manual_seed(1)
    chosen = policies.InverseTransform(temperature=1.5)(None, scores).argmax(-1)
    torch.manual_seed(1)
    cumulative = (scores.double() / 1.5).softmax(-1).cumsum(-1)
    drawn = torch.rand(2000, 1, dtype=torch.float64) * cumulative[:, -1:]
    assert (
        chosen == torch.searchsorted(cumulative, drawn, right=True)[:, 0]
    ).float().mean() > 0.999  # but for rounding
    assert len({int(token) // 256 for token in chosen}) == 3


def test_what_is_read_of_a_prompt_does_not_depend_on_its_padding(tokenizer, reference):
    long, short = [5, 9, 8, 7, 6], [7, 6]
    ids, mask = logprobs.pad([long, short], tokenizer.pad_token_id)
    with torch.no_grad():
        both = policies._read(reference, ids, mask, 2, 3)
        alone = policies._read(reference, *logprobs.pad([short], 0), 1, 3)
    for padded, single in zip(both.layers, alone.layers, strict=True):
        assert padded.keys.shape[0] == 4 and torch.equal(padded.keys[2], padded.keys[3])
        assert torch.allclose(padded.keys[2, :, 3:], single.keys[0], atol=1e-5)
        assert torch.allclose(padded.values[3, :, 3:], single.values[0], atol=1e-5)


@pytest.fixture
def convolving(tokenizer):
    """A model with a layer that does not attend."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return Lfm2ForCausalLM(config)


def test_models_whose_state_is_not_keys_and_values_alone_are_sampled_too(tokenizer, convolving):
    """A convolution keeps a state that transformers cannot repeat: there `generate` reads the prompts."""
    texts, answers = policies.sample(convolving, tokenizer, [[5, 6], [7]], 3, 0, 4)
    assert [len(row) for row in answers] == [3, 3] and all(1 <= len(ids) <= 4 for row in answers for ids in row)


def test_a_sliding_window_is_refused_where_the_longest_pair_exceeds_it(tokenizer):
    """The mask of a pair has no window in it, so only pairs within the window are right."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    short, long = (trainers.pair_dataset(tokenizer, ["a"] * 2, ["b", text], ["c"] * 2) for text in ("d", "d " * 9))
    trainers.preference_trainer(model, tokenizer, short, 1.0, 1, 1e-3, 0)
    with pytest.raises(ValueError, match="MistralForCausalLM: log-probabilities"):
        trainers.preference_trainer(model, tokenizer, long, 1.0, 1, 1e-3, 0)


def test_they_are_not_trained_since_a_mask_cannot_keep_the_answers_of_a_pair_apart(tokenizer, convolving):
    rows = trainers.pair_dataset(tokenizer, ["a"], ["b c"], ["c b"])
    with pytest.raises(ValueError, match="Lfm2ForCausalLM: log-probabilities of a pair's answers are .* each alone"):
        trainers.preference_trainer(convolving, tokenizer, rows, 1.0, 1, 1e-3, 0)


def test_a_prompt_of_one_token(tokenizer, reference):
    assert len(policies.sample(reference, tokenizer, [[5]], 3, 0, 4)[1][0]) == 3


@pytest.mark.parametrize("training", [True, False])
def test_sampling_puts_the_mode_back(world, tokenizer, reference, training):
    reference.train(training)
    policies.sample(reference, tokenizer, policies.encode_prompts(tokenizer, world.prompts[:1]), 1, 0, 3)
    assert reference.training == training


# --- weights ----------------------------------------------------------------------------------------------------------


def test_snapshot_and_restore(tokenizer, reference, fingerprint):
    before, weights = fingerprint(reference), policies.snapshot(reference)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(1)
    assert fingerprint(reference) != before
    policies.restore(reference, weights)
    assert fingerprint(reference) == before
    with pytest.raises(KeyError):
        policies.restore(policies.small_scorer(tokenizer, 0, width=32), {"lm_head.bias": torch.zeros(1)})


def test_a_clean_copy_is_independent_even_of_a_model_that_trl_has_trained(world, tokenizer, reference, fingerprint):
    prompts, answers = [world.prompts[0]] * 8, world.answers[:8]
    trainers.train_sft(reference, tokenizer, prompts, answers, 1, 4, 1e-3, 0)
    rows = policies.encode_prompts(tokenizer, prompts), policies.encode_answers(tokenizer, answers)
    copy = policies.clean_copy(reference)
    before = response_logps(reference, *rows), fingerprint(reference)
    assert np.array_equal(response_logps(copy, *rows), before[0]) and fingerprint(copy) == before[1]
    with torch.no_grad():
        for p in copy.parameters():
            p.mul_(0.5)
    assert np.array_equal(response_logps(reference, *rows), before[0]) and fingerprint(reference) == before[1]
    assert not np.allclose(response_logps(copy, *rows), before[0]), "its forward sees its own weights"
    assert copy.lm_head.weight is copy.model.embed_tokens.weight, "tied, as the original"
    assert copy.config is not reference.config, "a trainer that changes one leaves the other alone"


def test_sampling_keeps_keys_and_values_whatever_a_trainer_left_in_the_config(world, tokenizer, reference):
    """Without them each new token costs a pass over all earlier ones, four times the time on the bench."""
    prompts, answers = [world.prompts[0]] * 8, world.answers[:8]
    trainers.train_sft(reference, tokenizer, prompts, answers, 1, 4, 1e-3, 0)
    reference.generation_config.use_cache = reference.config.use_cache = False
    widths = []
    reference.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    policies.sample(reference, tokenizer, policies.encode_prompts(tokenizer, prompts[:1]), 4, 0, 6)
    assert len(widths) > 1 and set(widths[1:]) == {1}


def test_the_reference_inside_a_model(world, tokenizer, reference, lora_lab):
    rows = policies.encode_prompts(tokenizer, world.prompts[:4]), policies.encode_answers(tokenizer, world.answers[:4])
    model = lora_lab.model
    base = response_logps(model, *rows)  # a new adapter changes nothing: B = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.5)
    moved = response_logps(model, *rows)
    with policies.as_reference(model) as inside:
        assert np.allclose(response_logps(inside, *rows), base, atol=1e-6)
    assert not np.allclose(moved, base, atol=1e-2) and np.array_equal(response_logps(model, *rows), moved)
    assert all("lora" in name for name in policies.snapshot(model))
    policies.reset_adapter(model, seed=1)
    assert np.allclose(response_logps(model, *rows), base, atol=1e-6)
    with policies.as_reference(reference) as inside:
        assert inside is reference


def test_an_adapter_that_stays_in_the_reference_is_an_error(lora_lab):
    model = lora_lab.model
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    with model.disable_adapter(), pytest.raises(RuntimeError, match="disabled True.*expected the adapter default, on"):
        policies.require_adapters(model, on=True)
    layer.merge()
    with pytest.raises(RuntimeError, match="expected the adapter default, off"), policies.as_reference(model):
        pytest.fail("the base has the adapter in its weights")
    layer.unmerge()
    with pytest.raises(RuntimeError, match="lora_A|q_proj|v_proj|_proj"), policies.as_reference(model):
        layer.merge()
    layer.unmerge()
    with policies.as_reference(model):
        pass


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_one_row_at_a_time(world, tokenizer):
    model = policies.small_scorer(tokenizer, 0, width=16)
    prompts = [*world.prompts[:3], "Repair", world.prompts[0]]
    answers = [world.answers[0], world.answers[7], world.answers[3], world.answers[3], world.answers[0]]
    expected = []
    for p, a in zip(prompts, answers, strict=True):
        row = policies.encode_prompts(tokenizer, [p])[0] + policies.encode_answers(tokenizer, [a])[0]
        expected.append(model(input_ids=torch.tensor([row])).logits.item())
    for batch_tokens in (1, 30, 10**6):
        found = policies.score(model, tokenizer, prompts, answers, batch_tokens)
        assert found.dtype == np.float64 and np.allclose(found, expected, atol=1e-5)
    assert found[0] == found[4] and np.ptp(expected) > 0.1


def test_each_distinct_row_is_scored_once(world, tokenizer):
    model, rows = policies.small_scorer(tokenizer, 0, width=16), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = policies.score(model, tokenizer, world.prompts[:2] * 50, world.answers[:2] * 50)
    assert sum(rows) == 2 and len(found) == 100 and model.training
    known = {}
    policies.score(model, tokenizer, world.prompts[:1], world.answers[:1], known=known)
    again = policies.score(model, tokenizer, world.prompts[:2], world.answers[:2], known=known)
    assert sum(rows) == 4 and len(known) == 2 and np.allclose(again, found[:2], atol=1e-6), "one row is known already"
