"""Hidden states below the adapters: what is computed with them is what is computed without, in fewer layers."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from cdpo_utils import policies, real, trainers
from cdpo_utils.logprobs import response_logps
from cdpo_utils.trunk import Trunk

PAD, END = 0, 1
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
ANSWERS = [[14, 15, END], [16, END], [17, 18, 19, 20, END], [21, END]]


def config(**more):
    return LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=None, initializer_range=0.3, tie_word_embeddings=True, **more,
    )  # fmt: skip


def policy(trunk, limit=2**30):
    """A LoRA policy with a random adapter on its upper two layers, with a `Trunk` or without."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config())
    model = get_peft_model(base, real.lora(base, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    if trunk:
        Trunk(base, real.frozen_layers(base), limit)
    return model


def passes(model):
    """Two lists, "lowest" and "highest", which grow by a number of rows whenever that layer of `model` is run."""
    layers, seen = model.get_base_model().get_decoder().layers, {"lowest": [], "highest": []}
    layers[0].register_forward_hook(lambda module, args, out: seen["lowest"].append(len(args[0])))
    layers[-1].register_forward_hook(lambda module, args, out: seen["highest"].append(len(args[0])))
    return seen


def test_log_probabilities_are_the_same_and_each_text_is_run_below_once():
    plain, lifted = policy(False), policy(True)
    expected, seen = response_logps(plain, PROMPTS, ANSWERS), passes(lifted)
    for _ in range(2):
        assert response_logps(lifted, PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    with policies.as_reference(plain), policies.as_reference(lifted):
        reference = response_logps(plain, PROMPTS, ANSWERS)
        assert response_logps(lifted, PROMPTS, ANSWERS) == pytest.approx(reference, abs=1e-5)
    assert np.abs(expected - reference).max() > 0.1
    assert sum(seen["lowest"]) == 4 and sum(seen["highest"]) == 3 * 4


def trained(model, tokenizer, steps):
    rows = [
        dict(prompt_ids=p, chosen_ids=ANSWERS[i], rejected_ids=ANSWERS[(i + 1) % 4], pref_prob=1.0,
             ref_chosen_logps=-9.0, ref_rejected_logps=-8.0)
        for i, p in enumerate(PROMPTS)
    ]  # fmt: skip
    trainer = trainers.preference_trainer(
        model, tokenizer, trainers.Dataset.from_list(rows), 0.1, batch_size=2, lr=1e-2, seed=0
    )
    trainers.run_steps(trainer, steps, 0)
    return policies.snapshot(model)


def test_training_is_the_same_with_the_layers_below_left_out(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, END)
    plain, lifted = policy(False), policy(True)
    start, seen = policies.snapshot(lifted), passes(lifted)
    expected, found = trained(plain, tokenizer, 6), trained(lifted, tokenizer, 6)
    for name, value in expected.items():
        assert torch.allclose(value, found[name], atol=1e-5), name
        assert not torch.equal(found[name], start[name]), name
    assert sum(seen["lowest"]) == 8, "two answers to each of four prompts"
    assert len(seen["highest"]) > 6


@pytest.mark.parametrize("pad_id", [PAD, END], ids=["padding of its own", "padded by the end of turn"])
def test_a_scorer_around_the_same_weights_shares_what_is_known(pad_id):
    lifted = policy(True)
    base = lifted.get_base_model()
    scorers = []
    for attached in (False, True):
        base.config.pad_token_id = pad_id
        scorer = LlamaForSequenceClassification(config(num_labels=1))
        scorer.config.pad_token_id = pad_id
        weights = {name.replace("base_layer.", ""): w for name, w in base.get_decoder().state_dict().items()}
        scorer.model.load_state_dict({name: w for name, w in weights.items() if "lora_" not in name})
        torch.manual_seed(2)
        torch.nn.init.normal_(scorer.score.weight)
        if attached:
            base.trunk.attach(scorer)
        scorers.append(scorer)
    response_logps(lifted, PROMPTS, ANSWERS, pad_id)
    known, texts = len(base.trunk.known), [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    ids, mask = trainers.pad(texts, pad_id, "right", 8)
    plain, found = (
        scorer(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1) for scorer in scorers
    )
    assert torch.allclose(plain, found, atol=1e-5) and len(set(plain.tolist())) == 4
    assert len(base.trunk.known) == known == 4, "the same texts, whatever the padding"


def test_a_scorer_is_trained_the_same(tokenizer):
    rows, found = [[5, 6, 14, END], [8, 9, 16, 17, END], [5, 6, 16, END], [8, 9, 14, 15, 16, END]], []
    for trunk in (False, True):
        base = policy(trunk).get_base_model()
        torch.manual_seed(2)
        scorer = LlamaForSequenceClassification(config(num_labels=1))
        lower = {n: w for n, w in base.get_decoder().state_dict().items() if "base_layer" not in n and "lora_" not in n}
        scorer.model.load_state_dict(lower, strict=False)
        scorer = get_peft_model(scorer, real.lora(scorer, task_type="SEQ_CLS", modules_to_save=["score"]))
        if trunk:
            base.trunk.attach(scorer.get_base_model())
            seen = passes(scorer)
        texts = dict(chosen_ids=rows[:2] * 2, rejected_ids=rows[2:] * 2)
        args = trainers._arguments(trainers.RewardConfig, scorer, 2, 1e-2, 0, max_length=None)
        trainer = trainers._trainer(
            trainers.RewardTrainer, scorer, args=args, processing_class=tokenizer,
            train_dataset=trainers.Dataset.from_dict(texts), data_collator=trainers.PairCollator(PAD),
        )  # fmt: skip
        before = policies.snapshot(scorer)
        trainers.run_steps(trainer, 4, 0)
        found.append(policies.snapshot(scorer))
    assert found[0].keys() == found[1].keys() and any("score" in name for name in found[0])
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name
    assert any(not torch.equal(value, found[1][name]) for name, value in before.items())
    assert not seen["lowest"] and len(base.trunk.known) == 4


def test_what_is_kept_of_a_text_does_not_depend_on_the_others():
    first, second = policy(True).get_base_model().trunk, policy(True).get_base_model().trunk
    texts = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    first(*trainers.pad(texts, PAD, "right", 8))
    for text in reversed(texts):
        second(torch.tensor([text]))
    assert first.known.keys() == second.known.keys() == set(map(tuple, texts))
    assert all(torch.equal(hidden, second.known[text]) for text, hidden in first.known.items())


def test_an_answer_may_end_in_tokens_of_padding():
    """A sampled answer that the token limit has cut off may hold any token."""
    plain, lifted = policy(False), policy(True)
    answers = [[14, PAD, PAD], [15], [14, PAD, PAD, PAD], [16, END]]
    expected = response_logps(plain, PROMPTS, answers)
    assert response_logps(lifted, PROMPTS, answers) == pytest.approx(expected, abs=1e-5)


def test_a_pair_may_have_lost_an_answer_to_the_limit():
    ids, mask = torch.tensor([[9, 8, 7, PAD], [9, 8, 7, END]]), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    expected, found = (trainers._answer_logps(policy(trunk), ids, mask)[1] for trunk in (False, True))
    assert torch.allclose(expected, found, atol=1e-5) and expected[0] == 0 and expected[1] < -0.1


def test_a_batch_that_is_padded_on_the_left_runs_all_layers():
    plain, lifted = policy(False), policy(True)
    ids, mask = trainers.pad(PROMPTS, PAD, "left")
    logits = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (plain, lifted)]
    assert torch.equal(*logits) and not lifted.get_base_model().trunk.known


def test_other_architectures_are_refused():
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="architecture qwen2; expected llama"):
        Trunk(base, 1)


def test_what_does_not_fit_is_run_again():
    plain, lifted = policy(False), policy(True, limit=700)
    expected = response_logps(plain, PROMPTS, ANSWERS)
    trunk = lifted.get_base_model().trunk
    for _ in range(2):
        assert response_logps(lifted, PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
        assert trunk.held == sum(h.nbytes for h in trunk.known.values()) <= 700 and 0 < len(trunk.known) < 4


def test_sampling_and_calls_with_positions_of_their_own_run_all_layers():
    plain, lifted = policy(False), policy(True)
    seen = passes(lifted)
    ids = torch.tensor(PROMPTS[:1] * 3)
    drawn = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD) for model in (plain, lifted)]
    assert torch.equal(*drawn)
    positions = torch.tensor([[0, 1, 1]])
    logits = [model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (plain, lifted)]
    assert torch.allclose(*logits, atol=1e-6)
    assert seen["lowest"] == seen["highest"] and not lifted.get_base_model().trunk.known


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_layers_are_back_after_a_call_that_failed(error):
    plain, lifted = policy(False), policy(True)
    ids, decoder = torch.tensor(PROMPTS[:1]), lifted.get_base_model().get_decoder()

    def stop(*_):
        raise error

    def greedy(model):
        return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD)

    for module in (decoder.all_layers[0], decoder.norm):  # below, in a pass of its own, and above
        hook = module.register_forward_hook(stop)
        with pytest.raises(error):
            lifted(input_ids=ids, use_cache=False)
        hook.remove()
        assert torch.equal(greedy(plain), greedy(lifted)) and len(decoder.layers) == 4
    assert response_logps(lifted, PROMPTS, ANSWERS) == pytest.approx(response_logps(plain, PROMPTS, ANSWERS), abs=1e-5)
