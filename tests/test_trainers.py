"""Tripwires around TRL: our trainer is the stock trainer where they should agree, and differs where it should."""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardTrainer
from trl.trainer import dpo_trainer, reward_trainer

from cdpo_utils import logprobs, losses, policies, real, trainers
from cdpo_utils.algorithms import Schedule
from cdpo_utils.logprobs import response_logps

BETA, STEPS, BATCH = 0.3, 4, 8


class Watch(TrainerCallback):
    """Loss and learning rate of every optimiser step."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.rates.append(logs["learning_rate"])


def watched(trainer):
    """The trainer, logging every step, and its watch."""
    watch = Watch()
    trainer.args.logging_steps = 1
    trainer.add_callback(watch)
    return trainer, watch


@pytest.fixture
def texts(world):
    """32 pairs: prompts, chosen and rejected of different lengths."""
    rng = np.random.default_rng(0)
    a, b = rng.permuted(np.tile(np.arange(24), (32, 1)), axis=1)[:, :2].T
    prompts = [world.prompts[i] for i in rng.integers(0, 12, 32)]
    return prompts, [world.answers[i] for i in a], [world.answers[i] for i in b]


def rows_of(reference, tokenizer, texts, p, **columns):
    """`pair_dataset` with the reference's log-probabilities and P(chosen preferred) = p."""
    prompts, chosen, rejected = texts
    encoded = policies.encode_prompts(tokenizer, prompts)
    for side, answers in (("chosen", chosen), ("rejected", rejected)):
        columns[f"ref_{side}_logps"] = response_logps(reference, encoded, policies.encode_answers(tokenizer, answers))
    p = np.broadcast_to(np.asarray(p, float), len(prompts))
    return trainers.pair_dataset(tokenizer, prompts, chosen, rejected, pref_prob=p, **columns)


@pytest.fixture
def ours(tokenizer, reference, texts):
    """Make and watch a PreferenceTrainer on a fresh policy that differs from its reference."""

    def make(p=1.0, texts=texts, **options):
        options = dict(beta=BETA, batch_size=BATCH, lr=1e-2, seed=0) | options
        policy = policies.small_llama(tokenizer, seed=5, width=32)
        rows = rows_of(reference, tokenizer, texts, p)
        return watched(trainers.preference_trainer(policy, tokenizer, rows, **options))

    return make


@pytest.fixture
def stock(tokenizer, reference, texts):
    """TRL's DPOTrainer from texts: its own tokenisation, a live reference model."""

    def make(swap=False, texts=texts):
        prompts, chosen, rejected = texts
        rows = {
            "prompt": [[{"role": "user", "content": p}] for p in prompts],
            "chosen": [[{"role": "assistant", "content": a}] for a in (rejected if swap else chosen)],
            "rejected": [[{"role": "assistant", "content": a}] for a in (chosen if swap else rejected)],
        }
        policy = policies.small_llama(tokenizer, seed=5, width=32)
        args = trainers._arguments(DPOConfig, policy, BATCH, 1e-2, 0, beta=BETA)
        return watched(
            DPOTrainer(
                model=policy, ref_model=policies.clean_copy(reference), args=args, processing_class=tokenizer,
                train_dataset=Dataset.from_dict(rows),
            )
        )  # fmt: skip

    return make


def assert_same_weights(one, other, atol=2e-6):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=atol), name


# --- the stock trainer, step by step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "swap"), [(1.0, False), (0.0, True)], ids=["p=1 is DPO", "p=0 is DPO exchanged"])
def test_hard_labels_are_the_stock_trainer_step_by_step(ours, stock, p, swap):
    (mine, watch), (theirs, their_watch) = ours(p), stock(swap)
    start = mine.model.model.embed_tokens.weight.detach().clone()
    for trainer in (mine, theirs):
        trainers.run_steps(trainer, STEPS, seed=0)
    assert len(watch.losses) == STEPS and watch.losses == pytest.approx(their_watch.losses, abs=1e-5)
    assert watch.rates == their_watch.rates and np.ptp(watch.losses) > 0.01
    assert_same_weights(mine, theirs)
    assert not torch.allclose(mine.model.model.embed_tokens.weight, start, atol=1e-3), "it moved"


def test_the_first_loss_is_the_mean_of_the_losses_of_the_pairs(ours, reference, tokenizer, texts):
    """From logits, not from TRL: summed log-probabilities, prompt excluded, end included."""
    p = np.linspace(0.1, 0.9, 32)
    trainer, watch = ours(p, batch_size=32)
    prompts, chosen, rejected = texts
    encoded = policies.encode_prompts(tokenizer, prompts)
    policy = policies.small_llama(tokenizer, seed=5, width=32)
    logps = [
        torch.tensor(response_logps(model, encoded, policies.encode_answers(tokenizer, answers)))
        for model in (policy, reference)
        for answers in (chosen, rejected)
    ]
    trainers.run_steps(trainer, 1, seed=0)
    assert watch.losses == pytest.approx([losses.soft_dpo_loss(*logps, BETA, torch.tensor(p)).mean().item()], abs=1e-5)


def test_policy_equal_to_reference_starts_at_log_2(tokenizer, reference, texts):
    rows = rows_of(reference, tokenizer, texts, np.linspace(0, 1, 32))
    policy = policies.clean_copy(reference)
    trainer, watch = watched(trainers.preference_trainer(policy, tokenizer, rows, 1.0, 32, 1e-3, 0))
    trainers.run_steps(trainer, 1, seed=0)
    assert watch.losses == pytest.approx([np.log(2)], abs=1e-5)


def test_changing_beta_between_rounds_acts(ours):
    seen = []
    for beta in (BETA, 3 * BETA):
        trainer, watch = ours()
        trainer.beta = beta
        trainers.run_steps(trainer, 2, seed=0)
        seen.append(watch.losses)
    other, watch = ours(beta=3 * BETA)
    trainers.run_steps(other, 2, seed=0)
    assert seen[1] == pytest.approx(watch.losses) and abs(seen[0][0] - seen[1][0]) > 1e-3


def test_the_preference_column_reaches_the_loss(ours):
    """It is dropped unless it is a signature column; a soft label is then silently a hard one."""
    first = {}
    for p in (1.0, 0.5, 0.0):
        trainer, watch = ours(p, batch_size=32)
        trainers.run_steps(trainer, 1, seed=0)
        first[p] = watch.losses[0]
    assert first[0.5] == pytest.approx((first[1.0] + first[0.0]) / 2, abs=1e-6) and first[0.0] != first[1.0]
    assert set(trainers.PAIR_COLUMNS) <= set(trainer._signature_columns)


def test_the_preference_column_may_be_replaced_between_rounds(ours):
    trainer, watch = ours(1.0, batch_size=32, lr=0.0)
    trainers.run_steps(trainer, 1, seed=0)
    trainer.train_dataset = trainer.train_dataset.remove_columns("pref_prob").add_column("pref_prob", np.zeros(32))
    trainers.run_steps(trainer, 1, seed=0)
    trainer, other = ours(0.0, batch_size=32)
    trainers.run_steps(trainer, 1, seed=0)
    assert watch.losses[1] == pytest.approx(other.losses[0], abs=1e-6) != watch.losses[0]


def test_two_small_batches_accumulated_are_one_of_twice_the_size(tokenizer, reference, texts):
    made = []
    for size, accumulate in ((16, 1), (8, 2)):
        rows = rows_of(reference, tokenizer, texts, 0.7)
        policy = policies.small_llama(tokenizer, seed=5, width=32)
        args = trainers._arguments(DPOConfig, policy, size, 1e-2, 0, beta=BETA, precompute_ref_log_probs=True,
                                   gradient_accumulation_steps=accumulate)  # fmt: skip
        collator = trainers.PairCollator(tokenizer.pad_token_id, ("pref_prob", *trainers.REF_COLUMNS))
        trainer, watch = watched(
            trainers.PreferenceTrainer(
                model=policy, args=args, processing_class=tokenizer, train_dataset=rows, data_collator=collator
            )
        )  # fmt: skip
        trainers.run_steps(trainer, 2, seed=0)
        made.append((trainer, watch.losses))
    assert made[0][1] == pytest.approx(made[1][1], abs=1e-5)
    assert_same_weights(made[0][0], made[1][0])


def test_both_ways_to_the_logps_agree_in_value_and_gradient(ours, monkeypatch):
    """The head over stored logits (small vocabularies) and TRL's fused one, which recomputes them."""
    trainer, _ = ours()
    model, batch = trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    arguments = batch["input_ids"], batch["completion_mask"]
    seen = []
    for vocabulary, kept in ((1, True), (10**6, False)):
        monkeypatch.setattr(model.config, "vocab_size", vocabulary)
        out, logps = trainers._answer_logps(model, *arguments)
        assert (getattr(out, "logits", None) is not None) == kept
        model.zero_grad()
        (logps * torch.arange(16.0)).sum().backward()
        seen.append((logps.detach(), model.model.embed_tokens.weight.grad.clone()))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-4) and torch.allclose(seen[0][1], seen[1][1], atol=1e-3)
    assert seen[0][1].abs().max() > 0.1


def test_a_frozen_head_gives_the_same_log_probabilities_and_gradients(ours, monkeypatch):
    """`marked_logps`, for frozen heads over large vocabularies, against stored logits; chunks of 7 tokens."""
    trainer, _ = ours()
    model, batch = trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    model.get_output_embeddings().weight.requires_grad_(False)
    watched = model.model.layers[0].self_attn.q_proj.weight
    monkeypatch.setattr(logprobs, "HEAD_ROWS", 7)
    seen = []
    for width in (10**6, 1):  # the vocabulary is the smaller of the two, then the larger
        monkeypatch.setattr(model.config, "hidden_size", width)
        out, logps = trainers._answer_logps(model, batch["input_ids"], batch["completion_mask"])
        assert (out.logits.shape[1] == 0) == (width == 1), "nobody reads them"
        model.zero_grad()
        (logps * torch.arange(16.0)).sum().backward()
        seen.append((logps.detach(), watched.grad.clone()))
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-4) and torch.allclose(seen[0][1], seen[1][1], atol=1e-4)
    assert seen[0][1].abs().max() > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [1, 2])
def test_answers_behind_one_prompt_do_not_see_each_other(tokenizer, layers, attention):
    """Prompts of one to five tokens, answers of one to four: each log-probability is that of its own sequence."""
    model = policies.small_llama(tokenizer, seed=5, width=64, layers=layers)
    model.set_attn_implementation(attention)
    prompts, chosen = [[9], [9, 8, 7], [5, 6, 7, 8, 9]], [[6, 1], [7, 8, 9, 1], [1]]
    rejected = [[6, 7, 1], [1], [9, 9, 1]]
    rows = [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    batch = trainers.PairCollator(tokenizer.pad_token_id)(rows)
    _, logps = trainers._answer_logps(model, batch["input_ids"], batch["completion_mask"])
    alone = [response_logps(model, [p], [a])[0] for p, a in zip(prompts * 2, chosen + rejected, strict=True)]
    assert logps.tolist() == pytest.approx(alone, abs=1e-5) and len(set(logps.tolist())) == 6
    longest = max(len(p) + len(c) + 1 + len(r) for p, c, r in zip(prompts, chosen, rejected, strict=True))
    assert trainers._behind_one_prompt(batch["input_ids"], batch["completion_mask"], torch.float32)[0].shape == (
        3, -(-longest // 8) * 8,
    )  # fmt: skip


def test_answers_cut_to_nothing_count_nothing(tokenizer):
    model = policies.small_llama(tokenizer, seed=5, width=64)
    ids, mask = torch.tensor([[9, 8, 7, 0], [9, 8, 7, 1]]), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    _, logps = trainers._answer_logps(model, ids, mask)
    assert logps.tolist() == pytest.approx([0, response_logps(model, [[9, 8, 7]], [[1]])[0]], abs=1e-5)
    assert trainers._answer_logps(model, ids, 0 * mask)[1].tolist() == [0, 0]


def test_padding_changes_nothing(ours, texts, tokenizer):
    trainer, _ = ours()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert (inputs["attention_mask"] == 0).any(), "answers differ in length"
    batch, width = inputs["input_ids"].shape
    wider = dict(inputs)
    for name, value in (("input_ids", 9), ("attention_mask", 0), ("completion_mask", 0)):
        wider[name] = torch.cat([inputs[name], torch.full((batch, 5), value)], 1)
    with torch.no_grad():
        values = [trainer._compute_loss(trainer.model, each, False).item() for each in (inputs, wider)]
        single = [
            trainer._compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i]]), False).item()
            for i in range(4)
        ]
    assert values[0] == pytest.approx(values[1], abs=1e-6) and values[0] == pytest.approx(np.mean(single), abs=1e-6)


def test_level_is_added_to_the_loss(tokenizer, reference, texts):
    columns = {f"sampler_{side}_logps": np.full(32, -3.0) for side in ("chosen", "rejected")}
    rows = rows_of(reference, tokenizer, texts, 1.0, **columns)
    values = []
    for level in (0.0, 0.5):
        policy = policies.small_llama(tokenizer, seed=5, width=32)
        trainer, watch = watched(trainers.preference_trainer(policy, tokenizer, rows, BETA, 32, 1e-2, 0, level))
        trainers.run_steps(trainer, 1, seed=0)
        values.append(watch.losses[0])
    prompts, *answers = texts
    policy = policies.small_llama(tokenizer, seed=5, width=32)
    logps = [
        response_logps(policy, policies.encode_prompts(tokenizer, prompts), policies.encode_answers(tokenizer, a))
        for a in answers
    ]
    level = losses.level_loss(torch.tensor(np.concatenate(logps)), torch.full((64,), -3.0))
    assert values[1] - values[0] == pytest.approx(0.5 * BETA**2 * level.item(), rel=1e-4) and level > 0.1


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_rounds_have_the_learning_rates_of_their_schedule(ours):
    trainer, watch = ours()
    schedule = Schedule(steps=4, round_steps=4, lr=6e-3)
    assert [schedule.train_round(trainer, k) for k in range(3)] == [4, 4, 4]
    first, second, third = np.split(np.array(watch.rates), 3)
    assert first.max() > 0 and second == pytest.approx(first / 2) and third == pytest.approx(first / 3)
    again, other = ours()
    trainers.run_steps(again, 4, seed=0, lr=6e-3)
    assert other.rates == pytest.approx(first), "the first round's rate is the schedule's, not the trainer's own"


def test_a_second_round_goes_on_with_the_weights_and_restarts_the_schedule(ours):
    trainer, watch = ours()
    assert trainers.run_steps(trainer, 6, seed=0) == 6
    after_first = policies.snapshot(trainer.model)
    assert trainer.optimizer.state_dict()["state"][0]["step"].item() == 6
    trainers.run_steps(trainer, 6, seed=0)
    assert len(watch.rates) == 12 and watch.rates[:6] == watch.rates[6:]
    assert max(watch.rates) == pytest.approx(1e-2) and watch.rates[5] < 2e-3
    assert np.mean(watch.losses[6:]) < np.mean(watch.losses[:6]) - 0.02, "it goes on where it was"
    assert trainer.optimizer.state_dict()["state"][0]["step"].item() == 12, "and so does the optimiser"
    assert any(not torch.equal(p, after_first[name]) for name, p in trainer.model.named_parameters())


def test_batches_by_length_pad_less_and_leave_nobody_out(tokenizer, reference, texts):
    seen = {}
    for by_length in (False, True):
        rows = rows_of(reference, tokenizer, texts, 1.0)
        trainer = trainers.preference_trainer(reference, tokenizer, rows, BETA, 2, 0.0, 0, by_length=by_length)
        collate, batches = trainer.data_collator, []
        trainer.data_collator = lambda rows, collate=collate, batches=batches: batches.append(rows) or collate(rows)
        trainers.run_steps(trainer, 32, seed=0)  # two epochs of 32 pairs
        seen[by_length] = batches[:32]
    keys = [
        sorted(str(row["chosen_ids"] + row["rejected_ids"]) for b in seen[True][k : k + 16] for row in b)
        for k in (0, 16)
    ]
    everybody = sorted(str(a + b) for a, b in zip(rows["chosen_ids"][:], rows["rejected_ids"][:], strict=True))
    assert keys[0] == keys[1] == everybody, "each pair once an epoch"
    assert seen[True][:16] != seen[True][16:], "drawn anew"

    def padded(batches):
        lengths = [[sum(len(row[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected")) for row in b] for b in batches]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)

    assert padded(seen[True]) < padded(seen[False])


def test_the_seed_of_a_round_decides_the_order_of_rows(ours):
    seen = []
    for seed in (0, 0, 1):
        trainer, watch = ours(lr=0.0)
        trainers.run_steps(trainer, STEPS, seed=seed)
        seen.append(watch.losses)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2], "lr = 0: only the order can differ"


def test_a_loss_that_is_not_a_number_stops_the_run_names_the_pair_and_keeps_the_weights(
    tokenizer, reference, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    rows = rows_of(reference, tokenizer, texts, [1.0] * 31 + [np.nan])
    trainer = trainers.preference_trainer(policies.clean_copy(reference), tokenizer, rows, 1.0, 32, 0.0, 0)
    trainer.train_dataset = rows_of(reference, tokenizer, texts, 1.0)
    trainers.run_steps(trainer, 1, seed=0)  # lr = 0: the moments move, the weights do not
    trainer.train_dataset = rows
    moments = trainer.optimizer.state[trainer.model.lm_head.weight]
    before = {kind: value.clone() for kind, value in moments.items()}
    with pytest.raises(
        FloatingPointError, match="loss is nan at optimiser step 0: 1 of 32 pairs, the first "
    ) as stopped:
        trainers.run_steps(trainer, 1, seed=0)
    line = str(stopped.value)
    kept = load_file(next(tmp_path.rglob("optimizer.safetensors")))
    head = next(name for name, p in trainer.model.named_parameters() if p is trainer.model.lm_head.weight)
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"} and before["exp_avg"].abs().max() > 0
    assert all(torch.equal(kept[f"{head}.{kind}"], value) for kind, value in before.items())
    assert f"{texts[0][31]} <|assistant|> {texts[1][31]}" in line and "'pref_prob': nan" in line and "\n" not in line
    kept = load_file(next(tmp_path.rglob("weights.safetensors")))
    before = dict(reference.named_parameters())
    assert kept and all(torch.equal(value, before[name]) for name, value in kept.items())


def test_a_full_disk_does_not_hide_which_pair_stopped_the_run(tokenizer, reference, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))

    def write_bytes(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    rows = rows_of(reference, tokenizer, texts, [1.0] * 31 + [np.nan])
    trainer = trainers.preference_trainer(policies.clean_copy(reference), tokenizer, rows, 1.0, 32, 1e-3, 0)
    with pytest.raises(
        FloatingPointError, match="loss is nan at optimiser step 0: 1 of 32 pairs, the first "
    ) as stopped:
        trainers.run_steps(trainer, 1, seed=0)
    assert str(stopped.value).endswith("weights.safetensors: No space left on device")


def test_what_the_trainer_does_not_implement_is_refused(tokenizer, reference, texts):
    rows = rows_of(reference, tokenizer, texts, 1.0)
    args = trainers._arguments(DPOConfig, reference, 8, 1e-3, 0, loss_type="ipo", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="loss_type"):
        trainers.PreferenceTrainer(model=reference, args=args, processing_class=tokenizer, train_dataset=rows)


def test_what_we_override_exists():
    """Private names of TRL 1.16: were one to go, our override would never be called."""
    for name in ("_compute_loss", "_prepare_dataset", "_precompute_ref_logps", "_set_signature_columns_if_needed",
                 "_get_train_sampler"):  # fmt: skip
        assert callable(getattr(DPOTrainer, name, None)), name
    for name in ("compute_loss", "_set_signature_columns_if_needed", "_get_train_sampler"):
        assert callable(getattr(RewardTrainer, name, None)), name


@pytest.mark.parametrize("max_length", [None, 7])
def test_the_batch_is_the_one_of_trl(tokenizer, texts, max_length):
    columns = {name: np.linspace(-3, 0, 32) for name in trainers.REF_COLUMNS}
    rows = list(trainers.pair_dataset(tokenizer, *texts, **columns))
    mine = trainers.PairCollator(tokenizer.pad_token_id, trainers.REF_COLUMNS, max_length)(rows)
    theirs = dpo_trainer.DataCollatorForPreference(tokenizer.pad_token_id, max_length, pad_to_multiple_of=8)(rows)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert mine["input_ids"].shape[1] == 8 * np.ceil((max_length or int(mine["attention_mask"].sum(1).max())) / 8)


def test_the_batch_of_scorers_is_the_one_of_trl(tokenizer, texts):
    _, chosen, rejected = (policies.encode_answers(tokenizer, t) for t in texts)
    rows = [{"chosen_ids": a, "rejected_ids": b, "margin": 0.5} for a, b in zip(chosen, rejected, strict=True)]
    mine = trainers.PairCollator(tokenizer.pad_token_id, ("margin",))(rows)
    theirs = reward_trainer.DataCollatorForPreference(tokenizer.pad_token_id, pad_to_multiple_of=8)(rows)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_each_text_is_tokenised_once(tokenizer, world):
    calls = []

    def encode(tokenizer, texts):
        calls.append(list(texts))
        return policies.encode_answers(tokenizer, texts)

    found = trainers._encode_once(encode, tokenizer, [world.answers[0], world.answers[1], world.answers[0]])
    assert calls == [world.answers[:2]] and found[0] == found[2] != found[1]
    rows = trainers.pair_dataset(tokenizer, world.prompts[:2], world.answers[:2], world.answers[2:4], extra=[1.0, 2.0])
    assert rows.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "extra"]
    assert rows["rejected_ids"][1] == policies.encode_answers(tokenizer, world.answers[3:4])[0]


def test_a_lora_policy_keeps_one_adapter_and_its_base_stays(lora_lab, tokenizer, texts):
    model = lora_lab.model
    rows = rows_of(model, tokenizer, texts, 1.0)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = policies.snapshot(model)
    trainer = trainers.preference_trainer(model, tokenizer, rows, 1.0, 8, 1e-2, 0)
    assert list(model.peft_config) == ["default"], "TRL's frozen copy is gone"
    trainers.run_steps(trainer, 2, seed=0)
    assert set(policies.snapshot(model)) == set(before), "the adapter trains, and nothing else"
    assert any(not torch.equal(p, before[n]) for n, p in policies.snapshot(model).items())
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_a_large_model_makes_its_activations_again_and_trains_the_same(tokenizer, texts, monkeypatch):
    found, passes = [], []
    for large in (float("inf"), 0):
        monkeypatch.setattr(trainers, "LARGE", large)
        base = policies.small_llama(tokenizer, seed=5, width=32, layers=4)
        torch.manual_seed(0)
        policy, layers = get_peft_model(base, real.lora(base, task_type="CAUSAL_LM")), base.model.layers
        calls = [0] * len(layers)
        for k, layer in enumerate(layers):

            def count(*_, k=k, calls=calls):
                calls[k] += 1

            layer.input_layernorm.register_forward_hook(count)
        rows = rows_of(policy, tokenizer, texts, 0.7)
        trainer = trainers.preference_trainer(policy, tokenizer, rows, BETA, BATCH, 1e-2, 0)
        calls[:] = [0] * len(layers)
        trainers.run_steps(trainer, 2, seed=0)
        found.append(policies.snapshot(policy))
        passes.append(calls)
    assert passes == [[2, 2, 2, 2], [2, 2, 4, 4]], "nothing below the adapters is made again"
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_training_is_where_the_model_is(reference, monkeypatch):
    """Other processes' GPUs apart: on a machine with a GPU, or a Mac, the bench's model stays on the processor."""
    assert trainers._arguments(DPOConfig, reference, 8, 1e-3, 0).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = trainers._arguments(DPOConfig, reference, 8, 1e-3, 0)
    assert args.device.type == "cpu" and args.use_cpu and not args.bf16 and not args.dataloader_pin_memory


def test_one_process_trains_on_one_gpu_whatever_there_is(monkeypatch):
    """transformers would take two batches of 8 at once on two GPUs, which nobody has asked for."""
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    args = trainers._arguments(DPOConfig, SimpleNamespace(device=torch.device("cuda")), 8, 1e-3, 0)
    assert args.device.type == "cuda" and args.n_gpu == 1 and args.train_batch_size == 8 and not args.bf16


# --- supervised fine-tuning and scores --------------------------------------------------------------------------------


def test_fine_tuning_lowers_the_loss_of_answers_alone(world, tokenizer):
    model = policies.small_llama(tokenizer, seed=5, width=32)
    prompts, answers = [world.prompts[i % 4] for i in range(16)], [world.answers[i % 4] for i in range(16)]
    rows = policies.encode_prompts(tokenizer, prompts), policies.encode_answers(tokenizer, answers)
    before, tokens = response_logps(model, *rows), sum(map(len, rows[1]))
    history = trainers.train_sft(model, tokenizer, prompts, answers, 1, 16, 0.0, 0)
    assert history[-1]["train_loss"] == pytest.approx(-before.sum() / tokens, abs=1e-4), "a mean over answer tokens"
    trainers.train_sft(model, tokenizer, prompts, answers, 15, 16, 2e-2, 0)
    assert response_logps(model, *rows).mean() > before.mean() + 3


def test_cost_trainer_has_the_loss_of_the_losses_module(world, tokenizer):
    model = policies.small_scorer(tokenizer, seed=5, width=16)
    prompts, costlier, cheaper = world.prompts[:8], world.answers[:8], world.answers[8:16]
    signs = [1, 1, 1, 1, -1, -1, -1, -1], [1, -1, 1, -1, -1, -1, 1, -1]
    scores = [torch.tensor(policies.score(model, tokenizer, prompts, answers)) for answers in (costlier, cheaper)]
    expected = losses.cost_model_loss(*scores, *(torch.tensor(s, dtype=torch.float64) for s in signs)).mean()
    preference = losses.bradley_terry_loss(*scores).mean()
    history = trainers.train_scores(model, tokenizer, prompts, costlier, cheaper, 1, 8, 0.0, 0, signs=signs)
    assert history[-1]["train_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected - preference) > 0.1, "the signs are in it"
    history = trainers.train_scores(model, tokenizer, prompts, costlier, cheaper, 1, 8, 0.0, 0)
    assert history[-1]["train_loss"] == pytest.approx(preference.item(), abs=1e-5)


def test_scores_learn_order_and_sign(world, tokenizer):
    model = policies.small_scorer(tokenizer, seed=5, width=16)
    prompts, costlier, cheaper = [world.prompts[0]] * 8, world.answers[:8], world.answers[8:16]
    signs = [1] * 8, [-1] * 8
    trainers.train_scores(model, tokenizer, prompts, costlier, cheaper, 25, 8, 2e-2, 0, signs=signs)
    assert np.all(policies.score(model, tokenizer, prompts, costlier) > 0)
    assert np.all(policies.score(model, tokenizer, prompts, cheaper) < 0)


@pytest.mark.parametrize("signs", [None, ([1] * 8, [-1] * 8)])
def test_a_scorer_whose_loss_is_not_finite_stops_and_names_a_text(world, tokenizer, signs):
    model = policies.small_scorer(tokenizer, seed=5, width=16)
    word = policies.encode_answers(tokenizer, [world.answers[9]])[0][-2]
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("nan")
    prompts, *pair = world.prompts[:8], world.answers[:8], world.answers[8:16]
    with pytest.raises(FloatingPointError, match="the loss is nan at optimiser step 0: .* scores are not") as error:
        trainers.train_scores(model, tokenizer, prompts, *pair, 2, 8, 1e-3, 0, signs=signs)
    assert tokenizer.decode([word]) in str(error.value).rpartition(" at ")[2]


def test_rows_too_long_for_a_score_are_cut_and_not_dropped(world, tokenizer):
    model, longest = policies.small_scorer(tokenizer, seed=5, width=16), 9
    prompts, *pair = world.prompts[:8], world.answers[:8], world.answers[8:16]
    scores = []
    for answers in pair:
        ids = zip(policies.encode_prompts(tokenizer, prompts), policies.encode_answers(tokenizer, answers), strict=True)
        rows = [torch.tensor([(p + a)[:longest]]) for p, a in ids]
        scores.append(torch.stack([model(input_ids=row).logits.detach().squeeze() for row in rows]))
    expected = losses.bradley_terry_loss(*scores).mean().item()
    history = trainers.train_scores(model, tokenizer, prompts, *pair, 1, 8, 0.0, 0, max_length=longest)
    assert history[-1]["train_loss"] == pytest.approx(expected, abs=1e-5)
    whole = [torch.tensor(policies.score(model, tokenizer, prompts, answers)) for answers in pair]
    assert abs(losses.bradley_terry_loss(*whole).mean() - expected) > 1e-3, "and cut they were"
