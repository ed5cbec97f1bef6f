"""The loss that each method of others ends with, against its paper's formula written out, on a tiny model."""

import numpy as np
import pandas as pd
import pytest
import torch

from cdpo_utils import algorithms, baselines, bench, data, dual, exact, policies, trainers
from cdpo_utils.algorithms import Schedule
from cdpo_utils.bench import sigmoid
from cdpo_utils.logprobs import response_logps

BETA = 0.7
ALL = Schedule(steps=4, batch_size=16, lr=1e-2, level=0.0)  # looks at 64 rows


@pytest.fixture(scope="module")
def frame(world):
    """60 pairs in PKU-SafeRLHF's columns."""
    return bench.sample_preferences(world, 60, seed=0)


@pytest.fixture
def handed(monkeypatch):
    """handed(policy_logps): the mean loss that the last trainer would give a policy with these log-probabilities of
    chosen and rejected answers; the rows it holds. Nothing is trained."""
    seen = []
    monkeypatch.setattr(trainers, "run_steps", lambda trainer, *_: seen.append(trainer) or 0)

    def loss(chosen, rejected):
        trainer = seen[-1]
        column = {
            name: torch.tensor(values) for name, values in trainer.train_dataset.to_dict().items() if "log" in name
        }
        p = torch.tensor(trainer.train_dataset["pref_prob"][:])
        reference = (column[name].double() for name in trainers.REF_COLUMNS)
        policy = (torch.from_numpy(x) for x in (chosen, rejected))
        return trainer.pair_loss(*policy, *reference, trainer.beta, p).numpy(), trainer.train_dataset.to_dict()

    return loss


@pytest.fixture
def other(lab):
    """A policy that differs from the reference."""
    policy = policies.clean_copy(lab.model)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def logps(model, rows):
    """log-probabilities (chosen, rejected) of the rows of a trainer under a model, each answer on its own."""
    return [response_logps(model, rows["prompt_ids"], rows[f"{side}_ids"]) for side in ("chosen", "rejected")]


def draw(n=60):
    return np.random.default_rng(0).normal(-20, 3, (2, n))


def test_sacpo_refers_to_the_helpful_policy_with_beta_over_lam(lab, frame, other, handed):
    safety = data.preference_pairs(frame, "safety")
    assert baselines.sacpo(lab, other, safety, 2.0, BETA, ALL) is other
    chosen, rejected = draw()
    loss, rows = handed(chosen, rejected)
    assert rows["chosen_ids"] == policies.encode_answers(lab.tokenizer, safety.chosen)
    pi_r = logps(other, rows)
    by_hand = -np.log(sigmoid(BETA / 2.0 * ((chosen - pi_r[0]) - (rejected - pi_r[1]))))
    assert np.allclose(loss, by_hand, atol=1e-4)


def test_sacpo_in_the_limit_is_the_gibbs_policy_of_the_lagrangian():
    rng = np.random.default_rng(0)
    ref, r, c = exact.normalise(rng.normal(size=(3, 6))), rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    pi_r = exact.gibbs(ref, r, BETA)
    assert np.allclose(exact.gibbs(pi_r, -c, BETA / 2.0), exact.gibbs(ref, r - 2.0 * c, BETA))


def test_merging_is_linear_and_has_both_ends():
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
    assert torch.equal(baselines.merged(a, b, 0.25)["w"], torch.tensor([2.5, -1.0]))
    assert torch.equal(baselines.merged(a, b, 1.0)["w"], a["w"]) and torch.equal(
        baselines.merged(a, b, 0.0)["w"], b["w"]
    )


def test_adapters_are_refused_where_their_factors_would_be_averaged(lora_lab, oracle):
    adapter = policies.snapshot(lora_lab.new_policy())
    with pytest.raises(ValueError, match="factors of LoRA adapters"):
        baselines.merged(adapter, adapter, 0.5)
    with pytest.raises(ValueError, match="the policy is an adapter"):
        baselines.safe_rlhf(lora_lab, oracle, dual.LogMultiplier(0.0), 1.0, 1, 8, 0.0, 0)


def test_safe_dpo_swaps_drops_and_guards():
    rows = [(0, True, True), (0, True, False), (0, False, True), (0, False, False), (1, True, False), (1, False, True)]
    table = pd.DataFrame(rows, columns=["better_response_id", "is_response_0_safe", "is_response_1_safe"])
    table = table.assign(prompt=[f"p{i}" for i in range(6)], response_0="a", response_1="b")
    pairs = baselines.safe_dpo_pairs(table)
    assert pairs.to_dict("split")["data"] == [
        ["p0", "a", "b", 0.0],  # both safe: the helpful label
        ["p1", "a", "b", 1.0],  # a safe winner against an unsafe loser
        ["p2", "b", "a", 1.0],  # swapped
        ["p4", "a", "b", 1.0],  # b was better, but unsafe: swapped
        ["p5", "b", "a", 1.0],
    ]  # both unsafe: p3 is dropped


def test_safe_dpo_takes_the_margin_off(lab, frame, handed):
    pairs = baselines.safe_dpo_pairs(frame)
    assert 0 < pairs.guarded.sum() < len(pairs) < len(frame)
    baselines.safe_dpo(lab, frame, 3.0, BETA, ALL)
    chosen, rejected = draw(len(pairs))
    loss, rows = handed(chosen, rejected)
    ref = logps(lab.model, rows)
    margin = BETA * ((chosen - ref[0]) - (rejected - ref[1])) - 3.0 * pairs.guarded.to_numpy()
    assert np.allclose(loss, -np.log(sigmoid(margin)), atol=1e-4)


def test_bfpo_is_the_papers_regression(lab, frame, handed):
    baselines.bfpo(lab, frame, BETA, ALL)
    chosen, rejected = draw()
    loss, rows = handed(chosen, rejected)
    ref = logps(lab.model, rows)
    first = frame.better_response_id == 0
    winner = np.where(first, frame.is_response_0_safe, frame.is_response_1_safe)
    loser = np.where(first, frame.is_response_1_safe, frame.is_response_0_safe)
    target = np.select([winner & ~loser, winner & loser, ~winner & ~loser], [1.0, 0.5, -0.5], -1.0)
    by_hand = ((chosen - ref[0]) - (rejected - ref[1]) - target / BETA) ** 2
    assert np.allclose(loss, BETA**2 * by_hand, atol=1e-4) and set(target) == {1.0, 0.5, -0.5, -1.0}
    few = Schedule(steps=1, batch_size=16, lr=1e-2, level=0.0)  # a random part of the rows keeps its labels
    baselines.bfpo(lab, frame, BETA, few)
    part = handed(*draw(16))[1]
    whole = dict(zip(map(str, zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)), target, strict=True))
    taken = [whole[str(pair)] for pair in zip(part["chosen_ids"], part["rejected_ids"], strict=True)]
    assert np.allclose(2 * np.array(part["pref_prob"]) - 1, taken) and len(taken) == 16


def test_modpo_is_the_papers_loss_with_weights_that_sum_to_one(lab, frame, other, handed):
    helpful, lam = data.preference_pairs(frame, "helpful"), 1.5
    baselines.modpo(lab, other, helpful, lam, BETA, ALL)
    chosen, rejected = draw()
    loss, rows = handed(chosen, rejected)
    ref, safe = logps(lab.model, rows), logps(other, rows)
    weight = 1 / (1 + lam)  # of helpfulness; the rest is safety's
    beta = weight * BETA  # the paper's: its KL term stands beside w r + (1 - w) s, ours beside r + lam s
    ratio = (chosen - ref[0]) - (rejected - ref[1])
    safety = BETA * ((safe[0] - ref[0]) - (safe[1] - ref[1]))  # of a margin model trained with our beta
    by_hand = -np.log(sigmoid((beta * ratio - (1 - weight) * safety) / weight))
    assert np.allclose(loss, by_hand, atol=1e-4)


def test_implicit_scores_are_log_ratios(lab, other):
    samples = lab.sample_reference(3, seed=0)
    scores = baselines.implicit_scores(lab, other, samples, BETA)
    assert scores.shape == (len(lab.prompts), 3)
    for model, expected in ((other, scores), (lab.model, np.zeros_like(scores))):
        one = [response_logps(m, [samples.prompt_ids[1]], [samples.ids[1][2]])[0] for m in (model, lab.model)]
        assert np.isclose(expected[1, 2], BETA * (one[0] - one[1]), atol=1e-4)


def keys(samples):
    """(prompt ids, answer ids) of each answer, in order."""
    return [(tuple(p), tuple(ids)) for p, row in zip(samples.prompt_ids, samples.ids, strict=True) for ids in row]


def test_pecan_solves_its_dual_and_labels_by_it(lab, handed):
    rng = np.random.default_rng(0)
    samples = lab.sample_reference(8, seed=0)
    for i, row in enumerate(samples.ids):  # no answer twice, so that each has one score
        row[:] = [[5 + i % 7, 5 + j, lab.tokenizer.eos_token_id] for j in range(8)]
    shape = len(lab.prompts), 8
    reward, cost = rng.normal(size=shape), rng.normal(size=shape) + 5.0
    _, lam = baselines.pecan(lab, reward, cost, samples, 0.8, BETA, ALL)
    policy = exact.gibbs(np.full(shape, -np.log(8)), reward - lam * cost, BETA)
    assert lam > 0 and np.isclose(exact.expectation(policy, cost), cost.mean() - 0.8, atol=1e-6)
    _, shifted = baselines.pecan(lab, reward, cost - 100.0, samples, 0.8, BETA, ALL)
    assert np.isclose(lam, shifted), "such costs have no zero, and none is needed"
    pairs = len(lab.prompts) * 8 // 2 * 4  # every sample in four pairs
    _, rows = handed(*np.zeros((2, pairs)))
    score = dict(zip(keys(samples), (reward - lam * cost).ravel(), strict=True))
    sides = [[score[key] for key in zip(map(tuple, rows["prompt_ids"]), map(tuple, rows[f"{side}_ids"]), strict=True)]
             for side in ("chosen", "rejected")]  # fmt: skip
    assert np.allclose(rows["pref_prob"], sigmoid(np.subtract(*sides)))
    with pytest.raises(ValueError, match="no choice among the samples"):
        baselines.pecan(lab, reward, cost, samples, 50.0, BETA, ALL)


def test_a_rectified_cost_lets_no_answer_make_up_for_another(world, oracle):
    answers, prompts = world.answers, [world.prompts[0]] * len(world.answers)
    plain = oracle.costs(prompts, answers)
    costs = baselines.rectified(oracle, 0.5).costs(prompts, answers)
    assert np.allclose(costs, np.where(plain > 0.5, plain - 0.5, 0.0)) and (costs == 0).any() and (costs > 0).any()
    assert baselines.rectified(oracle, 0.5).reward is oracle.reward


def test_best_of_n_by_hand_and_by_drawing():
    ref = np.log([[0.5, 0.3, 0.2]])
    two = np.exp(exact.best_of_n(ref, np.array([[0.0, 2.0, 1.0]]), 2))
    assert np.allclose(two, [[0.25, 1 - 0.49, 0.49 - 0.25]])  # the first only if drawn twice; the second unless never
    assert np.allclose(np.exp(exact.best_of_n(ref, np.zeros((1, 3)), 1)), np.exp(ref)), "one draw is the reference"
    rng = np.random.default_rng(0)
    ref, score = exact.normalise(rng.normal(size=(2, 5))), rng.normal(size=(2, 5))
    exactly = np.exp(exact.best_of_n(ref, score, 4))
    drawn = [rng.choice(5, (200_000, 4), p=np.exp(ref[i])) for i in range(2)]
    best = [d[np.arange(len(d)), score[i][d].argmax(1)] for i, d in enumerate(drawn)]
    counted = [np.bincount(b, minlength=5) / len(b) for b in best]
    assert np.allclose(exactly, counted, atol=0.005) and np.allclose(exactly.sum(1), 1)


def test_within_budget_prefers_reward_among_the_safe_and_the_cheapest_else():
    reward, cost = np.array([3.0, 1.0, 9.0, 8.0]), np.array([0.0, -1.0, 2.0, 0.1])
    order = np.argsort(-baselines.within_budget(reward, cost, 0.0))
    assert order.tolist() == [0, 1, 3, 2]


def test_one_shot_with_the_true_scores_is_what_pecan_would_do_without_error(lab, oracle):
    """PeCAN differs from MoCAN by its scores alone: the same multiplier for the same scores and budget."""
    samples = lab.sample_reference(8, seed=0)
    reward, costs = (np.nan_to_num(x) for x in oracle.on(samples))
    budget = costs.mean() - 0.3
    lam = dual.one_shot(reward, costs, 1.0, budget).lam[0]
    _, found = baselines.pecan(
        lab, reward, costs[..., 0], samples, 0.3, 1.0, Schedule(steps=1, batch_size=8, level=0.0)
    )
    assert np.isclose(lam, found)


# --- Safe RLHF's policy gradient --------------------------------------------------------------------------------------


def test_the_log_multiplier_by_hand():
    multiplier = dual.LogMultiplier(budget=0.5, lam=2.0, dual_lr=0.02, window=2, delay=1, cap=3.0)
    assert multiplier.update(9.0) == 2.0, "the delay"
    assert np.isclose(multiplier.update(-8.0), 2.0), "the window's mean, 0.5, is the budget"
    expected = 2.0 * np.exp(0.02 * 2.0 * (-2.0 - 0.5))
    assert np.isclose(multiplier.update(4.0), expected), "ln lam moves by lr * lam * violation"
    assert np.isclose(multiplier.update(1e3), expected * np.exp(0.2)), "no step is longer than 0.2"
    assert multiplier.update(np.nan) == multiplier.lam and len(multiplier.history) == 4
    for _ in range(9):
        multiplier.update(1e3)
    assert multiplier.lam == 3.0, "the cap"
    for _ in range(30):
        multiplier.update(-1e3)
    assert multiplier.lam == 1 / 3.0, "it cannot vanish, from where no step would lead back"
    assert [batch["cost"] for batch in multiplier.history[:4]] == [9.0, -8.0, 4.0, 1e3]


def test_the_log_multiplier_does_not_explode_while_the_cost_still_falls():
    """A violation that lasts for 20 batches and then falls below zero: lam must come down with it."""
    multiplier = dual.LogMultiplier(budget=0.0, lam=1.0, dual_lr=0.3)
    for k in range(200):
        multiplier.update(0.8 - 0.05 * max(0, k - 20) if k < 60 else 0.0)
    assert 0.1 < multiplier.lam < 10


@pytest.mark.parametrize(("lam", "cost"), [(0.4, 2.0), (4.0, 0.05)])  # where the cost, and where 1 + lam, matters
def test_the_policy_gradient_finds_the_gibbs_policy_of_the_lagrangian(lab, lam, cost):
    """Answers with bleach have r = 1 and a cost, the others neither; the multiplier stays what it is."""

    def reward(prompts, answers):
        return np.array([float("bleach" in answer) for answer in answers])

    seen = []

    def costs(prompts, answers):
        seen.extend(prompts)
        assert set(prompts) <= set(lab.prompts)
        return cost * reward(prompts, answers)[:, None]

    def share(policy):
        return np.mean(["bleach" in text for row in lab.sample(policy, 64, 1).texts for text in row])

    multiplier = dual.LogMultiplier(budget=0.0, lam=lam, dual_lr=0.0)
    before = share(lab.model)
    policy = baselines.safe_rlhf(lab, algorithms.Feedback(reward, costs, "oracle"), multiplier, 0.5, 40, 64, 1e-2, 0)
    assert len(multiplier.history) == 40 and len(seen) == 40 * 64 and {b["lam"] for b in multiplier.history} == {lam}
    tilt = np.exp((1 - lam * cost) / 0.5)
    expected = before * tilt / (before * tilt + 1 - before)
    assert 0.1 < before < 0.6 and abs(share(policy) - expected) < 0.06, (before, share(policy), expected)


def test_the_policy_gradient_reads_prompts_as_dpo_does_and_starts_without_a_kl(lab, tokenizer):
    kept = []

    def score(prompts, answers):
        kept.extend(zip(prompts, answers, strict=True))
        return np.zeros(len(prompts))

    trainer = trainers.policy_gradient_trainer(
        lab.new_policy(), lab.model, tokenizer, lab.prompts, score, 1.0, 32, 4, 0.0, 0, lab.max_new_tokens
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in lab.prompts]
    assert trainer._tokenize_prompts(chats)[0] == policies.encode_prompts(tokenizer, lab.prompts)
    trainer.args.logging_steps = 1
    trainers.run_steps(trainer, 2, 0)
    assert len(kept) == 64 and {prompt for prompt, _ in kept} <= set(lab.prompts)
    kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert len(kls) == 2 and max(map(abs, kls)) < 1e-6, "the reference in the KL term is the lab's"
    trainer.train_dataset = trainer.train_dataset.select([0])  # of the 8 prompts that a batch takes
    with pytest.raises(RuntimeError, match="0 of 2 steps were taken"):
        trainers.run_steps(trainer, 2, 0)
