"""The online method: what the bonus is, which way it pushes, what the rounds hand on, and that it arrives."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from datasets import Dataset

from cdpo_utils import bench, evaluate, exact, files, labs, losses, online, plots, policies, trainers
from cdpo_utils.algorithms import Schedule
from cdpo_utils.bench import sigmoid
from cdpo_utils.logprobs import response_logps

BETA = 0.7


@pytest.fixture
def made(world, lab):
    return SimpleNamespace(world=world, lab=lab, seed=0)


# --- the bonus --------------------------------------------------------------------------------------------------------


def test_the_uncertainty_of_answers_without_features_in_common_by_hand():
    found = online.uncertainty(np.array([[0.0, 3.0, 8.0]]), np.ones((1, 1)), np.eye(3))
    assert np.allclose(found, [[1.0, 1 / 2, 1 / 3]])  # 1 / sqrt(1 + count)
    assert np.allclose(online.uncertainty(np.array([[0.0, 3.0]]), np.ones((1, 1)), np.eye(2), ridge=4.0),
                       [[1 / 2, 1 / np.sqrt(7)]])  # fmt: skip


def test_the_uncertainty_is_the_norm_by_the_inverse_of_all_features(world):
    f, g = online.world_features(world)
    assert np.allclose(np.linalg.norm(f, axis=1), 1) and np.allclose(np.linalg.norm(g, axis=1), 1)
    counts = np.random.default_rng(0).poisson(0.2, world.reward.shape).astype(float)
    phi = np.einsum("xp,ai->xapi", f, g).reshape(*counts.shape, -1)
    sigma = np.einsum("xa,xai,xaj->ij", counts, phi, phi) + 0.3 * np.eye(phi.shape[-1])
    expected = np.sqrt(np.einsum("xai,ij,xaj->xa", phi, np.linalg.inv(sigma), phi))
    assert np.allclose(online.uncertainty(counts, f, g, ridge=0.3), expected)


def test_a_label_teaches_about_answers_with_the_same_words(world):
    """Most about the answer itself, next about one with a word in common, the less the fewer."""
    f, g = online.world_features(world)
    counts = np.zeros(world.reward.shape)
    before = online.uncertainty(counts, f, g)
    assert np.allclose(before, 1.0), "phi has length one"
    counts[0, 0] = 50
    learned = (before - online.uncertainty(counts, f, g))[0]
    common = np.array([len(set(world.answers[0].split()) & set(answer.split())) for answer in world.answers])
    assert learned[0] == learned.max() > 0.5
    means = [learned[common == n].mean() for n in sorted(set(common))]
    assert np.all(np.diff(means) > 0) and means[0] > 0, "Use is in every answer"
    assert np.all(online.uncertainty(counts, f, g)[5] > online.uncertainty(counts, f, g)[0])


def test_words_of_texts():
    found = online.word_features(["Use soap", "Use wax then wait", "soap soap"])  # soap, then, Use, wait, wax, sorted
    assert np.allclose(found, [[1 / 2**0.5, 1 / 2**0.5, 0, 0, 0], [1 / 2, 0, 1 / 2, 1 / 2, 1 / 2], [0, 1, 0, 0, 0]])


# --- which way it pushes ----------------------------------------------------------------------------------------------


def test_the_shifted_loss_by_hand():
    pairs = Dataset.from_dict({"ref_chosen_logps": [-4.0], "ref_rejected_logps": [-3.0]})
    shifted = online.with_bonus(pairs, (np.array([1.5]), np.array([0.5])), strength=0.5)
    chosen, rejected, p = torch.tensor([-2.0]), torch.tensor([-3.5]), torch.ones(1)
    ref = (torch.tensor(shifted[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected"))
    # margin 0.5 ((-2 + 4) - (-3.5 + 3)) = 1.25; less the difference of bonuses 1.0
    loss = losses.soft_dpo_loss(chosen, rejected, *ref, 0.5, p)
    assert np.isclose(loss.item(), np.log1p(np.exp(-0.25)))
    same = online.with_bonus(pairs, (np.array([2.0]), np.array([2.0])), strength=0.5)
    assert same["ref_chosen_logps"][:] == [-4.0], "equal bonuses change nothing"


def minimiser(before, strength, score, bonus):
    """Log-probabilities (A,) that minimise the loss `with_bonus` over all pairs of one prompt's answers, each labelled
    by Bradley-Terry on `score` in both orders, DPO's reference `before`. All but the bonus are tensors (A,)."""
    a, b = np.triu_indices(len(before), 1)
    table = Dataset.from_dict({f"ref_{side}_logps": before.numpy()[k] for side, k in (("chosen", a), ("rejected", b))})
    table = online.with_bonus(table, (bonus[a], bonus[b]), strength)
    ref = [torch.tensor(table[f"ref_{side}_logps"][:], dtype=torch.float64) for side in ("chosen", "rejected")]
    p = torch.sigmoid(score[a] - score[b])
    logits = before.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logps = torch.log_softmax(logits, 0)
        value = losses.soft_dpo_loss(logps[a], logps[b], *ref, strength, p).mean()
        value.backward()
        return value

    optimiser.step(loss)
    return torch.log_softmax(logits.detach(), 0)


def test_an_optimist_puts_more_mass_on_rare_answers_and_believes_their_cost_lower():
    """Both stages, on an exact instance: pi_ref exp((r + b) / beta), then pi_r exp(-lam (c - b) / beta)."""
    rng, lam = np.random.default_rng(0), 0.8
    ref, r, c = exact.normalise(rng.normal(size=(1, 5))), rng.normal(size=(1, 5)), rng.normal(size=(1, 5))
    bonus = np.array([[0.0, 0.0, 0.0, 0.0, 1.2]])  # the last answer is rare
    known = exact.gibbs(exact.gibbs(ref, r, BETA), -lam * c, BETA)
    pi_r = minimiser(torch.tensor(ref[0]), BETA, torch.tensor(r[0]), bonus[0])
    assert np.allclose(pi_r.numpy(), exact.gibbs(ref, r + bonus, BETA)[0], atol=1e-5)
    assert np.exp(pi_r[4]) > 1.5 * np.exp(exact.gibbs(ref, r, BETA)[0, 4])
    policy = minimiser(pi_r, BETA / lam, -torch.tensor(c[0]), bonus[0])
    assert np.allclose(policy.numpy(), exact.gibbs(ref, r + bonus - lam * (c - bonus), BETA)[0], atol=1e-4)
    second = exact.gibbs(exact.gibbs(ref, r, BETA), -lam * (c - bonus), BETA)
    assert second[0, 4] > known[0, 4], "stage 2 alone, too"
    assert policy[4] > second[0, 4]


# --- what the rounds hand on ------------------------------------------------------------------------------------------


def test_drawn_pairs_are_labelled_and_those_without_a_truth_are_dropped(made, lab, world):
    policy = policies.small_llama(lab.tokenizer, seed=5, width=32)
    policies.restore(policy, policies.snapshot(lab.model))
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.7)
    drawn, others = lab.sample_reference(40, seed=1), lab.sample_reference(40, seed=2)
    drawn.texts[0][0], others.texts[0][1] = "Use", "bleach"  # outside the grammar
    drawn.texts[0][2] = others.texts[0][2]  # the same answer
    answer_ids = policies.encode_answers(lab.tokenizer, world.answers)
    rows, dropped = online.draw_pairs(made, policy, answer_ids, drawn, others, seed=0)
    (x, a), (_, b) = (world.index(*samples.flat()) for samples in (drawn, others))
    kept = (a >= 0) & (b >= 0) & (a != b)
    assert dropped == (~kept).sum() >= 3 and np.array_equal(rows.x, x[kept])
    assert np.array_equal(rows.y_0, a[kept]) and np.array_equal(rows.y_1, b[kept])
    for k in (0, 1):
        ids = rows[f"ids_{k}"].tolist()
        assert ids == [answer_ids[j] for j in rows[f"y_{k}"]]
        mine, ref = (response_logps(model, rows.prompt_ids.tolist(), ids) for model in (policy, lab.model))
        assert np.allclose(rows[f"ref_{k}"], ref, atol=1e-4)
        assert np.allclose(rows[f"sampler_{k}"], np.log((np.exp(mine) + np.exp(ref)) / 2), atol=1e-4)
    for label, table, sign in (("better", world.reward, 1), ("safer", world.costs[..., 0], -1)):
        p = sigmoid(sign * (table[rows.x, rows.y_1] - table[rows.x, rows.y_0]))
        assert (
            abs((rows[label] - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum()) and np.corrcoef(rows[label], p)[0, 1] > 0.3
        )


def test_pairs_follow_their_label(made, lab):
    answer_ids = policies.encode_answers(lab.tokenizer, made.world.answers)
    rows, _ = online.draw_pairs(
        made, lab.model, answer_ids, lab.sample_reference(6, 1), lab.sample_reference(6, 2), seed=0
    )
    bonus = np.random.default_rng(0).random(made.world.reward.shape)
    ref = [np.arange(len(rows)) + 0.5 * k for k in (0, 1)]
    pairs = online.pairs_by(rows, "safer", ref, bonus, 0.4)
    for i, row in rows.iterrows():
        won, lost = (0, 1) if row.safer == 0 else (1, 0)
        shift = bonus[row.x, row[f"y_{won}"]] - bonus[row.x, row[f"y_{lost}"]]
        assert pairs["chosen_ids"][i] == row[f"ids_{won}"] and pairs["rejected_ids"][i] == row[f"ids_{lost}"]
        assert np.isclose(pairs["ref_chosen_logps"][i], ref[won][i] + shift / 0.4)
        assert pairs["ref_rejected_logps"][i] == ref[lost][i] and pairs["pref_prob"][i] == 1.0
        assert pairs["sampler_chosen_logps"][i] == row[f"sampler_{won}"]


def test_rounds_keep_their_pairs_their_trainers_and_the_account(made, lab, monkeypatch, fingerprint):
    seen, real, made_trainers = [], trainers.run_steps, []
    before = fingerprint(lab.model)

    def run_steps(trainer, *args):
        rows = trainer.train_dataset.to_dict()
        seen.append({"trainer": trainer, "beta": trainer.beta, **rows})
        return real(trainer, *args)

    monkeypatch.setattr(trainers, "run_steps", run_steps)
    function = trainers.preference_trainer
    monkeypatch.setattr(trainers, "preference_trainer", lambda *a: made_trainers.append(1) or function(*a))
    monkeypatch.setattr(trainers, "pair_dataset", None)  # no text is tokenised
    schedule = Schedule(steps=9, round_steps=2, batch_size=8, lr=1e-2)
    watched = []
    policy, descent = online.o_pd_dpo(
        made, -1.0, BETA, schedule, rounds=3, pairs=3, samples=6, labels=5, bonus=4.0, explore=2,
        watch=lambda policy, rounds: watched.append((policy, len(rounds))),
    )  # fmt: skip
    assert fingerprint(lab.model) == before != fingerprint(policy) and len(made_trainers) == 2
    assert watched == [(policy, 1), (policy, 2), (policy, 3)] and descent.steps == 3 * 2 * 2
    lam = [r["lam"][0] for r in descent.rounds]
    assert min(lam) > 0 and [s["beta"] for s in seen[::2]] == [BETA] * 3
    assert np.allclose([s["beta"] for s in seen[1::2]], BETA / np.array(lam))
    assert all(s["trainer"] is seen[i % 2]["trainer"] for i, s in enumerate(seen))
    for k, s in enumerate(seen[::2]):
        ref = response_logps(lab.model, s["prompt_ids"], s["chosen_ids"])
        assert np.allclose(s["ref_chosen_logps"], ref, atol=1e-3) == (k == 2), "the last round explores no more"
    n = np.cumsum([r["pairs"] for r in descent.rounds])
    assert [len(s["chosen_ids"]) for s in seen[::2]] == n.tolist() == [len(s["chosen_ids"]) for s in seen[1::2]]
    for r in descent.rounds:
        assert r["pairs"] + r["dropped"] == 9 * 3 and r["labels"] == 2 * r["pairs"] + 9 * 6 * 5
    first = {(tuple(p), frozenset(map(tuple, pair))) for p, *pair in zip(*(seen[0][name] for name in
             ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)}  # fmt: skip
    last = {(tuple(p), frozenset(map(tuple, pair))) for p, *pair in zip(*(seen[-1][name] for name in
            ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)}  # fmt: skip
    assert first <= last and len(first) > 5, "old pairs stay"


@pytest.mark.parametrize("killed_in", [2, 6])
def test_a_killed_loop_ends_with_the_same_bits(killed_in, made, monkeypatch, tmp_path, capsys):
    """The process ends in the training that is the n-th of six: two stages in each of three rounds."""
    real, left, watched = trainers.run_steps, [0], []

    def run_steps(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args)

    def loop(folder, trainings=0):
        made.lab.checkpoints, left[0] = folder, trainings
        made.lab.cache.clear()  # as in a new process
        watched.clear()
        policy, descent = online.o_pd_dpo(
            made, -1.0, BETA, Schedule(round_steps=2, batch_size=8, lr=1e-2), rounds=3, pairs=3, samples=6, labels=5,
            bonus=4.0, explore=2, watch=lambda policy, rounds: watched.append(policies.digest(policy.state_dict())),
        )  # fmt: skip
        return policies.digest(policy.state_dict()), descent.rounds, list(watched)

    monkeypatch.setattr(trainers, "run_steps", run_steps)
    whole = loop(None)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, killed_in)
    torch.manual_seed(killed_in)
    assert loop(tmp_path) == whole and len(set(whole[2])) == 3
    assert ("goes on after round" in capsys.readouterr().out) == (killed_in > 2)
    assert loop(tmp_path, 1) == whole, "ended: nothing is trained again"
    with pytest.raises(KeyboardInterrupt):  # another world's loop is another one
        made.world = replace(made.world, reward=made.world.reward + 1)
        loop(tmp_path, 1)


def test_without_a_bonus_stage_one_is_plain_dpo_and_at_no_multiplier_it_is_all(made, lab, monkeypatch):
    seen, real = [], trainers.run_steps

    def run_steps(trainer, *args):
        seen.append((trainer.beta, trainer.train_dataset.to_dict()))
        return real(trainer, *args)

    monkeypatch.setattr(trainers, "run_steps", run_steps)
    schedule = Schedule(round_steps=1, batch_size=8, lr=1e-2)
    for bonus in (0.0, 4.0):
        _, descent = online.o_pd_dpo(
            made, 50.0, BETA, schedule, rounds=2, pairs=3, samples=6, labels=5, bonus=bonus, explore=9, lam=0.0
        )
        assert [r["lam"] for r in descent.rounds] == [[0.0], [0.0]] and descent.steps == 2
    plain, shifted = seen[0][1], seen[2][1]
    assert [beta for beta, _ in seen] == [BETA] * 4
    expected = response_logps(lab.model, plain["prompt_ids"], plain["chosen_ids"])
    assert np.allclose(plain["ref_chosen_logps"], expected, atol=1e-4)
    assert plain["chosen_ids"] == shifted["chosen_ids"]
    assert not np.allclose(plain["ref_chosen_logps"], shifted["ref_chosen_logps"], atol=1e-2)


# --- they arrive ------------------------------------------------------------------------------------------------------


def test_a_trained_optimist_goes_where_little_is_known(made, lab, world, monkeypatch):
    """One round on the same pairs, the bonus taken off, left out, and added."""
    tables, found, real = [], [], online.uncertainty
    monkeypatch.setattr(online, "uncertainty", lambda *a: tables.append(real(*a)) or tables[-1])
    schedule = Schedule(round_steps=40, batch_size=32, lr=1e-2)
    for bonus in (-30.0, 0.0, 30.0):
        policy, _ = online.o_pd_dpo(made, 0.0, BETA, schedule, 1, pairs=4, samples=4, labels=5, bonus=bonus, explore=1)
        found.append(evaluate.policy_logps(policy, lab.tokenizer, lab.prompts, world.answers)[0])
    assert np.array_equal(*tables)
    unknown = tables[0][world.train]
    below, plain, above = (exact.expectation(logps, unknown) / unknown.std() for logps in found)
    assert above > plain + 0.2 and plain > below + 0.2, (below, plain, above)


def interrupt():
    raise KeyboardInterrupt


def test_the_command_prints_its_table_and_writes_both_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(labs.SFT, "steps", 20)
    monkeypatch.setitem(labs.SFT, "n", 2000)
    make = bench.make_world
    small = dict(n_tasks=2, n_situations=2, n_manners=2, n_protections=2, n_closings=2)
    monkeypatch.setattr(bench, "make_world", lambda seed, **sizes: make(seed, **(small | sizes)))
    arguments = ["--rounds", "2", "--steps", "2", "--n-objects", "3", "--n-tools", "4", "--coverage", "0.05"]
    arguments += ["--budget", "0.3", "--out", str(tmp_path / "a" / "online")]
    with monkeypatch.context() as patch:
        steps, left = trainers.run_steps, iter(range(5))  # in the first method, or behind it
        patch.setattr(trainers, "run_steps", lambda *args: steps(*args) if next(left) < 4 else interrupt())
        assert online.main(arguments) == 130 and capsys.readouterr().err.count("\n") == 1
    assert len(list((tmp_path / "a" / "online.checkpoints").iterdir())) == 1
    kept = next((tmp_path / "a" / "online.checkpoints").iterdir())
    assert online.main([*arguments, "--pairs", "9"]) == 2 and kept.exists()
    assert "pairs 9; expected at most samples, 8" in capsys.readouterr().err
    kept.with_name("another").mkdir()
    shutil.copytree(kept, tmp_path / "copy")
    with files.alone(tmp_path / "a" / "online.lock"):
        assert online.main(arguments) == 1 and kept.exists()
    assert "in use by another process" in capsys.readouterr().err
    assert online.main([*arguments, "--resume"]) == 0
    said = capsys.readouterr().out
    assert said.count("goes on after round") == 1 and "not used: another\n" in said
    found = json.loads((tmp_path / "a" / "online.json").read_text())
    shutil.copytree(tmp_path / "copy", kept)
    assert online.main(arguments) == 0 and "goes on" not in capsys.readouterr().out
    again = json.loads((tmp_path / "a" / "online.json").read_text())["rows"]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in found["rows"]]
    assert [row["method"] for row in found["rows"]] == list(online.METHODS) and found["settings"]["rounds"] == 2
    for row in found["rows"]:
        assert row["steps"] == 2 * 2 * 2 and len(row["rounds"]) == 2 and row["method"] in said
        assert row["labels"] == 2 * row["pairs"] + 2 * 9 * 8 * 16 and row["rare_exact"] > row["rare_reference"]
    assert {row["pairs"] + row["dropped"] for row in found["rows"]} == {2 * 8 * 9}
    fig, axes = plt.subplots(1, 2)
    plots.online_rounds(axes, found["rows"])
    drawn = [line.get_ydata() for line in axes[0].get_lines()]
    for row in found["rows"]:
        assert any(np.allclose(path, [round_["rare"] for round_ in row["rounds"]]) for path in drawn)
    assert np.allclose(drawn[-1], found["rows"][0]["rare_exact"])
    plt.close(fig)
    assert not (tmp_path / "a" / "online.checkpoints").exists()
    table = (tmp_path / "a" / "online.csv").read_text().splitlines()
    assert (tmp_path / "a" / "online_rounds.png").stat().st_size > 10_000
    assert len(table) == 4 and {"gap", "violation_spreads", "rare", "labels"} <= set(table[0].split(","))
    assert online.main([*arguments, "--budget", "-50"]) == 2 and "cannot be met" in capsys.readouterr().err
