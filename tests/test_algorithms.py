"""The methods: what they hand to the trainer, what they leave alone, and that they arrive."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cdpo_utils import algorithms, bench, data, dual, evaluate, exact, labs, logprobs, policies, trainers
from cdpo_utils.algorithms import Feedback, Schedule
from cdpo_utils.bench import sigmoid
from cdpo_utils.logprobs import response_logps

QUICK = Schedule(steps=2, round_steps=1, batch_size=16, lr=1e-2)


@pytest.fixture(scope="session")
def frame(world):
    """60 pairs in PKU-SafeRLHF's columns."""
    return bench.sample_preferences(world, 60, seed=0)


@pytest.fixture
def helpful(frame):
    return data.preference_pairs(frame, "helpful")


@pytest.fixture
def safety(frame):
    return data.preference_pairs(frame, "safety")


@pytest.fixture
def rounds(monkeypatch):
    """In place of training: what each round would have trained on."""
    seen = []

    def run_steps(trainer, steps, seed, lr=None):
        columns = trainer.train_dataset.to_dict()
        seen.append({"beta": trainer.beta, "steps": steps, "seed": seed, "trainer": trainer, **columns})
        return steps

    monkeypatch.setattr(trainers, "run_steps", run_steps)
    return seen


@pytest.fixture
def calls(monkeypatch):
    """Counts what should happen once: each (model, prompt, answer) scored, texts tokenised, trainers made."""
    seen = {"scored": [], "pair_dataset": 0, "preference_trainer": 0}
    real = logprobs.response_logps

    def scored(model, prompt_ids, answer_ids, **options):
        seen["scored"] += [(id(model), *map(tuple, row)) for row in zip(prompt_ids, answer_ids, strict=True)]
        return real(model, prompt_ids, answer_ids, **options)

    monkeypatch.setattr(logprobs, "response_logps", scored)
    for name in ("pair_dataset", "preference_trainer"):
        function = getattr(trainers, name)

        def counted(*args, name=name, function=function, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(trainers, name, counted)
    return seen


def constant(reward=0.0, *costs):
    """Feedback that says the same of every answer but for a little spread in the costs."""

    def costs_of(prompts, answers):
        wiggle = 0.1 * np.arange(len(answers)) % 0.7 - 0.3
        return np.stack([c + wiggle for c in costs], 1)

    return Feedback(lambda prompts, answers: np.full(len(prompts), reward), costs_of, "oracle")


# --- labels -----------------------------------------------------------------------------------------------------------


def test_preference_probability_by_hand():
    rng = np.random.default_rng(0)
    reward, costs = np.array([1.0, 1.0, 0.0]), np.array([[2.0, 0.0], [0.5, 1.0], [-1.0, 0.0]])
    # 1 - 0.5 * 2 - 3 * 0 = 0; 1 - 0.25 - 3 = -2.25; 0 + 0.5 = 0.5
    p = algorithms.preference_probability((reward, costs), [0.5, 3.0], "soft", rng)
    assert np.allclose(p, [0.5, 1 / (1 + np.exp(2.25)), 1 / (1 + np.exp(-0.5))])
    assert np.allclose(algorithms.preference_probability((reward, costs), [0.0, 0.0], "soft", rng), sigmoid(reward))
    cheaper = algorithms.preference_probability((reward, costs), [1e4, 0.0], "soft", rng)
    assert np.allclose(cheaper, [0, 0, 1]), "a large multiplier asks for the cheaper answer"
    with pytest.raises(ValueError, match="labels='hard'"):
        algorithms.preference_probability((reward, costs), [1.0, 1.0], "hard", rng)


def test_sampled_labels_have_the_soft_ones_as_their_mean():
    rng = np.random.default_rng(0)
    scores = np.repeat([0.8, -0.4, 0.0], 20_000), np.repeat([[1.0], [0.5], [-2.0]], 20_000, 0)
    soft, drawn = (algorithms.preference_probability(scores, 0.7, labels, rng) for labels in ("soft", "sampled"))
    assert set(drawn) == {0.0, 1.0}
    assert np.allclose(drawn.reshape(3, -1).mean(1), soft[::20_000], atol=0.015)


# --- what is handed to the trainer ------------------------------------------------------------------------------------


def test_dpo_takes_a_random_part_of_rows_that_it_would_not_reach(lab, helpful, rounds):
    algorithms.dpo(lab, helpful, 0.7, QUICK)  # two steps of 16
    chosen = policies.encode_answers(lab.tokenizer, helpful.chosen)
    assert len(rounds[0]["chosen_ids"]) == 32 and all(ids in chosen for ids in rounds[0]["chosen_ids"])
    assert rounds[0]["chosen_ids"] != chosen[:32], "not the first rows, which a file may have sorted"


def test_dpo_trains_on_hard_labels_from_the_reference(lab, helpful, rounds):
    policy, _ = algorithms.dpo(lab, helpful, 0.7, replace(QUICK, steps=4))
    (seen,) = rounds
    assert seen["beta"] == 0.7 and seen["steps"] == 4 and seen["pref_prob"] == [1.0] * 60
    for side in ("chosen", "rejected"):
        assert seen[f"{side}_ids"] == policies.encode_answers(lab.tokenizer, helpful[side])
        expected = response_logps(lab.model, seen["prompt_ids"], seen[f"{side}_ids"])
        for column in ("ref", "sampler"):
            assert np.allclose(seen[f"{column}_{side}_logps"], expected, atol=1e-5)
    assert policy is seen["trainer"].model is not lab.model


def test_few_pairs_are_shown_as_often_as_the_schedule_allows(lab, helpful, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(trainers, "run_steps", lambda trainer, steps, seed: asked.append(steps))
    for epochs, rows in ((float("inf"), 8), (3, 8), (3, 40), (0.5, 8)):
        algorithms.dpo(lab, helpful.head(rows), 1.0, replace(QUICK, steps=4, epochs=epochs, batch_size=10))
    assert asked == [4, 3, 4, 1]
    assert "DPO on 8 pairs, each shown 3 times: 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["soft", "sampled"])
def test_c_dpo_relabels_the_pairs_by_r_minus_lam_c(world, lab, helpful, oracle, rounds, labels):
    _, descent = algorithms.c_dpo(lab, helpful, oracle, 0.0, 1.0, QUICK, labels, samples=4, max_rounds=3, tolerance=0)
    lam = [r["lam"][0] for r in descent.rounds]
    assert lam[0] == 0 and lam[1] > 0.1 and len(rounds) == 3
    sides = [bench.truth(world, helpful.prompt, helpful[side]) for side in ("chosen", "rejected")]
    reward, cost = sides[0][0] - sides[1][0], (sides[0][1] - sides[1][1])[:, 0]
    for multiplier, seen in zip(lam, rounds, strict=True):
        expected = sigmoid(reward - multiplier * cost)
        if labels == "soft":
            assert np.allclose(seen["pref_prob"], expected)
        else:
            assert set(seen["pref_prob"]) == {0.0, 1.0}
            assert np.corrcoef(seen["pref_prob"], expected)[0, 1] > 0.3
        assert seen["beta"] == 1.0 and seen["ref_chosen_logps"] == rounds[0]["ref_chosen_logps"]
    assert [seen["steps"] for seen in rounds] == [2, 1, 1] and [r["steps"] for r in descent.rounds] == [2, 1, 1]
    assert len({seen["seed"] for seen in rounds}) == 3, "each round has an order of its own"


def test_dual_descent_pairs_the_samples_of_the_reference(world, lab, oracle, rounds):
    samples = lab.sample_reference(6, seed=0)
    algorithms.dual_descent(lab, samples, oracle, 0.0, 1.0, QUICK, samples=4, lam=0.8, max_rounds=1)
    (seen,) = rounds
    texts = {
        side: [t.strip() for t in lab.tokenizer.batch_decode(seen[f"{side}_ids"], skip_special_tokens=True)]
        for side in ("chosen", "rejected")
    }
    prompts = lab.tokenizer.batch_decode(seen["prompt_ids"], skip_special_tokens=True)
    sides = [bench.truth(world, [p.strip() for p in prompts], texts[side]) for side in texts]
    difference = sides[0][0] - sides[1][0] - 0.8 * (sides[0][1] - sides[1][1])[:, 0]
    assert np.allclose(seen["pref_prob"], sigmoid(difference)) and len(difference) >= 9 * 3 - 5
    drawn = {(p, t) for p, row in zip(samples.prompts, samples.texts, strict=True) for t in row}
    for side in texts:
        assert {(p.strip(), t) for p, t in zip(prompts, texts[side], strict=True)} <= drawn


def test_sampled_pairs_take_every_sample_equally_often_and_never_twice_in_a_pair(lab):
    samples = lab.sample_reference(6, seed=0)
    for i, row in enumerate(samples.ids):
        for j, ids in enumerate(row):
            ids[:] = [7 + i, 7 + j, lab.tokenizer.eos_token_id]  # so that each can be told apart
    place = {(i, j): 10.0 * i + j for i in range(9) for j in range(6)}
    rewards = np.array([[place[i, j] for j in range(6)] for i in range(9)])
    costs = np.stack([rewards**2, -rewards], -1)
    rewards[2, 3] = np.nan  # nobody could judge it
    feedback = Feedback(None, None, "oracle")
    feedback.on = lambda samples: (rewards, costs)
    pairs, (reward, cost) = algorithms.sampled_pairs(lab, samples, feedback, seed=0, pairings=4)
    a, b = (np.array(pairs[f"{side}_ids"])[:, :2] - 7 for side in ("chosen", "rejected"))
    assert np.array_equal(a[:, 0], b[:, 0]) and np.all(a[:, 1] != b[:, 1])
    counts = np.zeros((9, 6), int)
    for side in (a, b):
        np.add.at(counts, tuple(side.T), 1)
    assert counts[2, 3] == 0 and np.all(np.delete(counts, 2, 0) == 4) and counts[2].sum() == 2 * (4 * 3 - 4)
    assert np.allclose(reward, rewards[tuple(a.T)] - rewards[tuple(b.T)])
    assert cost.shape == (len(reward), 2) and np.allclose(cost, costs[tuple(a.T)] - costs[tuple(b.T)])


def test_an_answer_too_long_to_train_on_is_cut_for_policy_and_reference_alike(lab, oracle):
    """The trainer cuts at `max_length`: a reference that saw the whole answer would move the margin before any step."""
    samples = lab.sample_reference(4, seed=0)
    lab.max_length = max(map(len, samples.prompt_ids)) + 3
    pairs, _ = algorithms.sampled_pairs(lab, samples, oracle, seed=0)
    sides = [pairs[f"{side}_ids"][:] for side in ("chosen", "rejected")]
    assert {len(ids) for side in sides for ids in side} == {3}, "these answers are longer"
    trainer = algorithms._trainer(lab, lab.new_policy(), algorithms.set_column(pairs, "pref_prob", np.ones(len(pairs))),
                                  1.0, QUICK)  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trained_on = batch["completion_mask"].sum(1).tolist()
    assert trained_on == [3] * 16
    drawn = [(prompt, *row[:2]) for prompt, row in zip(samples.prompts, samples.texts, strict=True)]
    frame = pd.DataFrame(drawn, columns=["prompt", "chosen", "rejected"])
    _, framed = algorithms.some_pairs(lab, frame, QUICK)  # of plain DPO
    assert set(map(len, framed["chosen_ids"][:])) == {3}
    for side, ids in zip(("chosen", "rejected"), sides, strict=True):
        again = lab.logps(lab.model, pairs["prompt_ids"][:], ids, {})
        assert np.allclose(pairs[f"ref_{side}_logps"], again)


def test_dual_descent_starts_at_one_where_no_stored_answer_will_do():
    rewards, costs = np.zeros((2, 3)), np.array([[1.0, 2.0, 3.0], [1.0, 1.5, 2.0]])[..., None]
    assert algorithms.starting_lam((rewards, costs), 1.0, 0.9) == [1.0]
    start = algorithms.starting_lam((rewards, costs), 1.0, 1.2)
    assert start == dual.one_shot(rewards, costs, 1.0, 1.2).lam and start > 1.1


def test_one_shot_is_dual_descent_after_its_first_round(lab, oracle):
    samples, seen = lab.sample_reference(16, seed=0), []
    policy, _, solution = algorithms.one_shot(lab, samples, oracle, 0.2, 1.0, QUICK, samples=4)

    def watch(policy, rounds):
        seen.append((len(rounds), policies.snapshot(policy)))

    other, _ = algorithms.dual_descent(
        lab, samples, oracle, 0.2, 1.0, replace(QUICK, round_steps=4), samples=4, lam=solution.lam, max_rounds=2,
        watch=watch,
    )  # fmt: skip
    assert [n for n, _ in seen] == [1, 2]
    ended = []
    first = algorithms.first_round(lambda policy, descent: ended.append((policy, descent.lam, len(descent.rounds))))
    first("after one", [{"lam": [0.5]}])
    first("after two", [{"lam": [0.5]}, {"lam": [0.7]}])
    assert ended == [("after one", np.array([0.5]), 1)]
    assert all(torch.equal(value, seen[0][1][name]) for name, value in policies.snapshot(policy).items())
    assert all(torch.equal(value, seen[1][1][name]) for name, value in policies.snapshot(other).items())
    assert any(not torch.equal(value, seen[0][1][name]) for name, value in seen[1][1].items())


def test_one_shot_is_one_round_with_the_dual_of_the_samples(lab, oracle, rounds):
    samples = lab.sample_reference(16, seed=0)
    policy, descent, solution = algorithms.one_shot(lab, samples, oracle, 0.2, 1.0, QUICK, samples=4)
    known = dual.one_shot(*oracle.on(samples), 1.0, 0.2)
    assert np.array_equal(solution.lam, known.lam) and solution.lam > 0.05
    assert len(rounds) == 1 and descent.rounds[0]["lam"] == solution.lam.tolist() == descent.lam.tolist()
    policy, descent, solution = algorithms.one_shot(lab, samples, oracle, -50.0, 1.0, QUICK)
    assert policy is None and not solution.feasible and not descent.converged and "cannot be met" in descent.message


def test_pd_dpo_is_dpo_on_safety_pairs_with_reference_pi_r_and_strength_beta_over_lam(lab, safety, rounds):
    pi_r = policies.small_llama(lab.tokenizer, seed=3, width=32)
    policy, descent = algorithms.pd_dpo(
        lab, pi_r, safety, constant(0.0, 0.5), 0.0, 0.6, QUICK, samples=4, lam=2.0, max_rounds=3, labels=5
    )
    lam = [r["lam"][0] for r in descent.rounds]
    assert lam[0] == 2.0 and lam[2] > lam[1] > 2, "the budget is violated, so the multiplier grows"
    assert [seen["beta"] for seen in rounds] == pytest.approx([0.6 / value for value in lam])
    assert policy is pi_r is rounds[0]["trainer"].model, "one model in memory"
    for side in ("chosen", "rejected"):
        ids = policies.encode_answers(lab.tokenizer, safety[side])
        for column, model in (("ref", pi_r), ("sampler", lab.model)):
            expected = response_logps(model, rounds[0]["prompt_ids"], ids)
            assert np.allclose(rounds[2][f"{column}_{side}_logps"], expected, atol=1e-5)
    assert rounds[0]["pref_prob"] == [1.0] * 60 and descent.rounds[0]["labels"] == 5 * 9 * 4


def test_pd_dpo_without_a_multiplier_is_pi_r_itself(lab, safety, rounds, fingerprint):
    pi_r = policies.small_llama(lab.tokenizer, seed=3, width=32)
    before = fingerprint(pi_r)

    def moving(trainer, steps, seed, lr):
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.add_(1.0)
        return steps

    trainers.run_steps = moving  # the fixture's patch is undone with it
    feedback = constant(0.0, -5.0)
    policy, descent = algorithms.pd_dpo(lab, pi_r, safety, feedback, 0.0, 1.0, QUICK, samples=4, lam=1.0, max_rounds=4)
    assert [r["lam"][0] for r in descent.rounds] == [1.0, 0.0, 0.0] and descent.converged
    assert [r["steps"] for r in descent.rounds] == [2, 0, 0], "at lam = 0 nothing is trained"
    assert fingerprint(policy) == before


def one_constraint(lab, reward_policy, frame, feedback, budget, beta, schedule, samples, lam, **loop):
    """`pd_dpo` for one constraint, written without a chain."""
    pairs = algorithms.with_logps(lab, trainers.pair_dataset(lab.tokenizer, frame.prompt, frame.chosen, frame.rejected))
    pairs = algorithms.set_column(algorithms.referring_to(lab, reward_policy, pairs), "pref_prob", np.ones(len(pairs)))
    pi_r = policies.snapshot(reward_policy)
    trainer = trainers.preference_trainer(
        reward_policy, lab.tokenizer, pairs, beta, schedule.batch_size, schedule.lr, schedule.seed, schedule.level
    )

    def maximise(lam, k):
        if lam[0] <= 1e-6:
            policies.restore(reward_policy, pi_r)
            return 0
        trainer.beta = beta / lam[0]
        return schedule.train_round(trainer, k)

    def measure(k):
        return feedback.on(lab.sample(reward_policy, samples, schedule.seed + 1000 + k))[1], {}

    return reward_policy, dual.descend(maximise, measure, lam, budget, beta, **loop)


@pytest.mark.parametrize(("budget", "steps"), [(-2.0, [6, 3, 3, 3]), (0.0, [6, 0, 3, 3])])  # the second passes lam = 0
def test_one_constraint_is_the_same_with_and_without_a_chain(lab, safety, oracle, budget, steps):
    results = []
    for method in (algorithms.pd_dpo, one_constraint):
        pi_r = policies.small_llama(lab.tokenizer, seed=3, width=32)
        policies.restore(pi_r, policies.snapshot(lab.model))
        schedule = Schedule(steps=6, round_steps=3, batch_size=16, lr=1e-2)
        policy, descent = method(
            lab, pi_r, safety, oracle, budget, 1.0, schedule, samples=8, lam=0.4, max_rounds=4, tolerance=0.0
        )
        results.append((policies.snapshot(policy), descent))
    (weights, descent), (others, expected) = results
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert [(r["lam"], r["cost"], r["steps"]) for r in descent.rounds] == [
        (r["lam"], r["cost"], r["steps"]) for r in expected.rounds
    ]
    assert [r["steps"] for r in descent.rounds] == steps


def fitted(before, strength, p):
    """The minimiser of DPO's loss over all pairs of one prompt's answers with reference `before` (A,), by descent; p
    (A, A) is the probability that the first of two is preferred. Log-probabilities (A,)."""
    logits = before.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        ratio = torch.log_softmax(logits, 0) - before
        value = torch.nn.functional.binary_cross_entropy_with_logits(strength * (ratio[:, None] - ratio[None]), p)
        value.backward()
        return value

    optimiser.step(loss)
    return torch.log_softmax(logits.detach(), 0)


def test_tilting_by_one_cost_after_another_is_tilting_by_their_sum():
    """On an exact instance: each link's DPO, fitted with reference the link before and strength beta / lam_i, and after
    the last pi_ref exp((r - sum_i lam_i c_i) / beta)."""
    rng, beta, lam = np.random.default_rng(0), 0.7, (0.8, 0.3)
    ref, r, costs = exact.normalise(rng.normal(size=(1, 5))), rng.normal(size=(1, 5)), rng.normal(size=(1, 5, 2))
    policy = torch.tensor(exact.gibbs(ref, r, beta)[0])
    for i, multiplier in enumerate(lam):
        c = torch.tensor(costs[0, :, i])
        policy = fitted(policy, beta / multiplier, torch.sigmoid(c[None] - c[:, None]))
    both = exact.gibbs(ref, exact.lagrangian_score(r, costs, lam), beta)
    assert np.allclose(policy.numpy(), both[0], atol=1e-5)
    one = exact.gibbs(ref, exact.lagrangian_score(r, costs, (0.8, 0.0)), beta)
    assert not np.allclose(one, both, atol=1e-2), "the second link matters"


def test_each_link_of_the_chain_refers_to_the_end_of_the_link_before(world, lab, frame, safety, monkeypatch):
    oracle = labs.oracle_feedback(SimpleNamespace(world=world), (0, 1))
    labels = bench.label_cheaper(world, frame, 1, seed=0)
    shorter = data.preference_pairs(frame.assign(safer_response_id=labels), "safety")
    pi_r = lab.new_policy()
    seen, starts, real = [], policies.snapshot(pi_r), trainers.run_steps

    def run_steps(trainer, *args):
        rows = trainer.train_dataset
        row = {"beta": trainer.beta, "start": policies.snapshot(pi_r)}
        row |= {name: rows[name][:] for name in ("prompt_ids", "chosen_ids", "ref_chosen_logps")}
        steps = real(trainer, *args)
        seen.append(row | {"end": policies.snapshot(pi_r)})
        return steps

    monkeypatch.setattr(trainers, "run_steps", run_steps)
    policy, descent = algorithms.pd_dpo(
        lab, pi_r, [safety, shorter], oracle, [-1.0, -0.5], 0.6, QUICK, samples=4, lam=1.0, max_rounds=3, tolerance=0.0
    )
    lam = [value for r in descent.rounds for value in r["lam"]]
    assert policy is pi_r and len(seen) == 6 and min(lam) > 0 and [r["steps"] for r in descent.rounds] == [4, 2, 2]
    assert [row["beta"] for row in seen] == pytest.approx([0.6 / value for value in lam])

    def equal(a, b):
        return all(torch.equal(value, b[name]) for name, value in a.items())

    for j, row in enumerate(seen):
        first = j % 2 == 0
        assert row["chosen_ids"] == policies.encode_answers(lab.tokenizer, (safety if first else shorter).chosen)
        begins = seen[j - 2]["end"] if j >= 2 else starts if first else seen[j - 1]["end"]
        assert equal(row["start"], begins), "a link goes on from where it ended, at first from the link before"
        policies.restore(pi_r, starts if first else seen[j - 1]["end"])
        expected = response_logps(pi_r, row["prompt_ids"], row["chosen_ids"])
        assert np.allclose(row["ref_chosen_logps"], expected, atol=1e-5)
    assert not equal(seen[-1]["end"], seen[-2]["end"])


def test_a_link_without_a_multiplier_is_left_out(world, lab, safety, rounds):
    pi_r = policies.small_llama(lab.tokenizer, seed=3, width=32)
    algorithms.pd_dpo(
        lab, pi_r, [safety, safety], constant(0.0, 0.5, 0.5), [0.0, 0.0], 1.0, QUICK, samples=4, lam=[0.0, 2.0],
        max_rounds=1,
    )  # fmt: skip
    assert [seen["beta"] for seen in rounds] == [0.5]
    with pytest.raises(ValueError, match="pd_dpo: 1 tables of pairs and 2 budgets"):
        algorithms.pd_dpo(lab, pi_r, safety, constant(0.0, 0.5, 0.5), [0.0, 0.0], 1.0, QUICK)


# --- what is left alone, and done once --------------------------------------------------------------------------------


def test_dpo_leaves_the_reference_alone(lab, helpful, fingerprint):
    before = fingerprint(lab.model)
    policy, history = algorithms.dpo(lab, helpful, 1.0, QUICK)
    assert fingerprint(lab.model) == before != fingerprint(policy) and history


@pytest.mark.parametrize("method", ["c_dpo", "dual_descent", "pd_dpo"])
def test_a_loop_leaves_the_reference_alone_and_does_things_once(lab, helpful, oracle, calls, fingerprint, method):
    before = fingerprint(lab.model)
    loop = dict(samples=4, max_rounds=3, tolerance=0.0)
    if method == "c_dpo":
        policy, descent = algorithms.c_dpo(lab, helpful, oracle, 0.0, 1.0, QUICK, **loop)
    elif method == "dual_descent":
        samples = lab.sample_reference(8, seed=0)
        policy, descent = algorithms.dual_descent(lab, samples, oracle, 0.0, 1.0, QUICK, **loop)
    else:
        policy, descent = algorithms.pd_dpo(lab, lab.new_policy(), helpful, oracle, 0.0, 1.0, QUICK, **loop)
    assert fingerprint(lab.model) == before != fingerprint(policy)
    assert len(descent.rounds) == 3 and descent.steps == 2 + 1 + 1
    assert len(calls["scored"]) == len(set(calls["scored"])) > 20, "one run per (answer, reference), whatever the round"
    assert len({row[0] for row in calls["scored"]}) == (2 if method == "pd_dpo" else 1)
    assert calls["preference_trainer"] == 1, "one trainer through all rounds"
    assert calls["pair_dataset"] == (0 if method == "dual_descent" else 1), "texts are tokenised once"


def test_a_second_method_reuses_the_reference_log_probabilities(lab, helpful, rounds, calls):
    algorithms.dpo(lab, helpful, 1.0, QUICK)
    first = len(calls["scored"])
    algorithms.dpo(lab, helpful.rename(columns={"chosen": "rejected", "rejected": "chosen"}), 0.5, QUICK)
    assert len(calls["scored"]) == first > 0
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        assert rounds[0][f"ref_{side}_logps"] == rounds[1][f"ref_{other}_logps"]


def test_a_lora_lab_shares_one_base(lora_lab, helpful, reference):
    model = lora_lab.model
    rows = (
        policies.encode_prompts(lora_lab.tokenizer, helpful.prompt),
        policies.encode_answers(lora_lab.tokenizer, helpful.chosen),
    )
    with policies.as_reference(model) as base:
        expected = response_logps(base, *rows)
    policy, _ = algorithms.dpo(lora_lab, helpful, 1.0, Schedule(steps=3, batch_size=16, lr=5e-2))
    assert policy is model and not np.allclose(response_logps(policy, *rows), expected, atol=1e-2)
    lora_lab.cache.clear()
    assert np.allclose(lora_lab.reference_logps(*rows), expected, atol=1e-5), "the base, whatever the adapter says"
    kept = policies.snapshot(policy)
    again = lora_lab.new_policy()
    assert again is model and np.allclose(response_logps(again, *rows), expected, atol=1e-5)
    policies.restore(model, kept)
    assert not np.allclose(response_logps(model, *rows), expected, atol=1e-2)


def test_a_lora_policy_through_two_stages(lora_lab, helpful, safety, oracle):
    """Stage 2 starts from the adapter of stage 1, whose log-probabilities are its reference."""
    pi_r, _ = algorithms.dpo(lora_lab, helpful, 1.0, Schedule(steps=3, batch_size=16, lr=5e-2))
    kept = policies.snapshot(pi_r)
    policy, descent = algorithms.pd_dpo(
        lora_lab, pi_r, safety, oracle, 50.0, 1.0, QUICK, samples=4, lam=0.0, max_rounds=2
    )
    assert descent.converged and descent.steps == 0
    assert all(torch.equal(p, kept[name]) for name, p in policies.snapshot(policy).items())


# --- small parts ------------------------------------------------------------------------------------------------------


def test_feedback_on_samples(world, lab, oracle):
    samples = lab.sample_reference(3, seed=0)
    prompts, texts = samples.flat()
    assert prompts[:4] == [samples.prompts[0]] * 3 + [samples.prompts[1]] and texts[3] == samples.texts[1][0]
    rewards, costs = oracle.on(samples)
    assert rewards.shape == (9, 3) and costs.shape == (9, 3, 1)
    x, y = world.index([samples.prompts[4]], [samples.texts[4][2]])
    assert rewards[4, 2] == world.reward[x[0], y[0]] and costs[4, 2, 0] == world.costs[x[0], y[0], 0]


def test_votes_estimate_the_cost_and_pass_over_what_has_none():
    true = np.repeat([[-1.0], [0.0], [2.0], [np.nan]], 4000, 0)
    feedback = Feedback(None, lambda prompts, answers: true, "oracle")
    estimates = algorithms.votes(feedback, labels=40, seed=0).costs([], [])
    assert estimates.shape == true.shape and np.isnan(estimates[-4000:]).all()
    assert np.allclose(estimates[:-4000].reshape(3, -1).mean(1), [-1, 0, 2], atol=0.03)
    few = algorithms.votes(feedback, labels=1, seed=0).costs([], [])
    assert set(np.round(few[:-4000, 0], 6)) == {-round(np.log(3), 6), round(np.log(3), 6)}


def test_a_column_is_replaced_not_added_twice(tokenizer, world):
    rows = trainers.pair_dataset(tokenizer, world.prompts[:2], world.answers[:2], world.answers[2:4])
    for values in ([0.1, 0.2], [0.3, 0.4]):
        rows = algorithms.set_column(rows, "pref_prob", values)
    assert rows["pref_prob"][:] == [0.3, 0.4] and rows.column_names.count("pref_prob") == 1


def test_sampling_follows_its_seed(lab):
    one, again, other = (lab.sample_reference(3, seed) for seed in (1, 1, 2))
    assert one.texts == again.texts != other.texts and one.prompts == lab.prompts


# --- they arrive ------------------------------------------------------------------------------------------------------


SHORT = Schedule(steps=150, round_steps=60, batch_size=32, lr=5e-3, seed=0)


@pytest.mark.slow
def test_dual_descent_comes_close_to_the_exact_optimum(world, lab, oracle):
    beta, budget = 1.0, 0.2
    truth = evaluate.truth(world, lab.model, lab.tokenizer, "train", beta, budget)
    best, spread = truth.optimum, evaluate.spread(truth)[0]
    free = exact.gibbs(truth.ref_logps, truth.reward, beta)
    assert best.lam > 0.5 and exact.gap(free, truth.ref_logps, best) > 50, "there is something to find"
    samples = lab.sample_reference(128, seed=0)
    policy, descent = algorithms.dual_descent(
        lab, samples, oracle, budget, beta, SHORT, samples=64, max_rounds=5, tolerance=0.0
    )
    row = evaluate.evaluate(policy, lab.tokenizer, world, truth)
    assert row["gap"] < 8 and abs(row["violation"]) < 0.2 * spread and row["mass"] > 0.6
    assert descent.lam == pytest.approx(best.lam, rel=0.2) and descent.steps == SHORT.steps + 4 * SHORT.round_steps


@pytest.mark.slow
def test_two_stages_overshoot_the_budget_and_come_back(world, lab, oracle):
    budget, n = 0.0, 3000
    truth = evaluate.truth(world, lab.model, lab.tokenizer, "train", 1.0, budget)
    rng = np.random.default_rng(0)
    x, a, b = rng.choice(world.train, n), rng.integers(0, 24, n), rng.integers(1, 24, n)
    labelled = bench.label_pairs(world, x, a, (a + b) % 24, rng)
    helpful, safety = (data.preference_pairs(labelled, kind) for kind in ("helpful", "safety"))
    pi_r, _ = algorithms.dpo(lab, helpful, 1.0, SHORT)
    first = evaluate.evaluate(pi_r, lab.tokenizer, world, truth)
    policy, descent = algorithms.pd_dpo(
        lab, pi_r, safety, oracle, budget, 1.0, SHORT, samples=64, lam=1.0, max_rounds=4, tolerance=0.0
    )
    row = evaluate.evaluate(policy, lab.tokenizer, world, truth)
    assert first["violation"] > 1 and first["gap"] > 60
    assert abs(row["violation"]) < 0.5 and row["gap"] < 0.4 * first["gap"]
    assert 0.5 * truth.optimum.lam < descent.lam < 2 * truth.optimum.lam


@pytest.mark.slow
def test_a_chain_keeps_two_budgets(world, lab):
    n, rng = 3000, np.random.default_rng(0)
    free = evaluate.truth(world, lab.model, lab.tokenizer, "train", 1.0, [0.2, 1e9], (0, 1))
    budgets = [0.2, float(free.optimum.cost[1]) - 0.3]
    truth = evaluate.truth(world, lab.model, lab.tokenizer, "train", 1.0, budgets, (0, 1))
    x, a, b = rng.choice(world.train, n), rng.integers(0, 24, n), rng.integers(1, 24, n)
    labelled = bench.label_pairs(world, x, a, (a + b) % 24, rng)
    helpful, safety = (data.preference_pairs(labelled, kind) for kind in ("helpful", "safety"))
    shorter = labelled.assign(safer_response_id=bench.label_cheaper(world, labelled, 1, seed=0))
    pi_r, _ = algorithms.dpo(lab, helpful, 1.0, SHORT)
    first = evaluate.evaluate(pi_r, lab.tokenizer, world, truth)
    oracle = labs.oracle_feedback(SimpleNamespace(world=world), (0, 1))
    policy, descent = algorithms.pd_dpo(
        lab, pi_r, [safety, data.preference_pairs(shorter, "safety")], oracle, budgets, 1.0, SHORT, samples=64,
        max_rounds=5, tolerance=0.0,
    )  # fmt: skip
    row, spread = evaluate.evaluate(policy, lab.tokenizer, world, truth), evaluate.spread(truth)
    assert min(truth.optimum.lam) > 0.3, "both budgets bind"
    assert np.abs(np.array(row["violation"]) / spread).max() < 0.2 and row["gap"] < 0.4 * first["gap"]
    assert np.all(np.abs(descent.lam - truth.optimum.lam) < 0.35 * truth.optimum.lam), (descent.lam, truth.optimum.lam)
