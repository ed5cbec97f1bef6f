"""Hidden states below the adapters: what is computed with them is what is computed without, in fewer layers."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

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
        base.trunk = Trunk(base, real.frozen_layers(base), 64, limit)
        base.trunk.attach(base)
    return model


def passes(model):
    """A list that grows by the number of rows whenever the lowest, or the highest, layer of `model` is run."""
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


def test_all_layers_are_back_after_a_call_that_failed():
    lifted = policy(True)
    decoder = lifted.get_base_model().get_decoder()
    decoder.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lifted(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False)
    assert len(decoder.layers) == 4
