"""A dual loop that was killed goes on, and ends with the same bits; what is damaged or another's is not taken up."""

import contextlib
import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdpo_utils import algorithms, bench, cache, checkpoints, data, dual, labs, losses, policies, record, trainers
from cdpo_utils.algorithms import Schedule

SCHEDULE = Schedule(steps=4, round_steps=3, batch_size=16, lr=1e-2)
SHORT = replace(SCHEDULE, steps=1, round_steps=1)
LOOP = dict(samples=4, max_rounds=4, tolerance=0.0)


class Killed(BaseException):
    """What no `except Exception` on the way holds up."""


@contextlib.contextmanager
def killed_at(n):
    """The n-th optimiser step from now on is the last thing that happens."""
    left, real = [n], trainers.EachStep.on_step_end

    def step(self, *args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise Killed
        real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainers.EachStep, "on_step_end", step)
        yield


@pytest.fixture(scope="session")
def pairs(world):
    frame = bench.sample_preferences(world, 60, seed=0)
    return frame.assign(chosen=frame.response_0, rejected=frame.response_1), data.preference_pairs(frame, "safety")


@pytest.fixture(scope="session")
def learned(world, tokenizer):
    """Two scorers with random weights, which remember what they have said."""
    torch.manual_seed(0)
    reward, cost = (policies.small_scorer(tokenizer, seed, 32) for seed in (1, 2))
    return lambda: labs.trained_feedback(tokenizer, reward, cost)


def run(name, lab, pairs, oracle, learned, folder):
    """One of the loops: (weights, Descent, what was watched)."""
    lab.checkpoints, seen = folder, []

    def watch(policy, rounds):
        seen.append((len(rounds), policies.digest(policies.snapshot(policy))))

    if name == "c_dpo":
        policy, descent = algorithms.c_dpo(
            lab, pairs[0], learned(), -0.2, 1.0, SCHEDULE, labels="sampled", watch=watch, **LOOP
        )
    elif name == "dual_descent":
        drawn = lab.sample_reference(6, 0)
        policy, descent = algorithms.dual_descent(lab, drawn, oracle, -0.2, 1.0, SCHEDULE, watch=watch, **LOOP)
    else:
        voters, frames, budget = algorithms.votes(oracle, 8, 0), pairs[1], -0.2
        if name == "chain":
            voters = replace(voters, costs=lambda *texts: np.hstack([oracle.costs(*texts)] * 2))
            frames, budget = [pairs[1], pairs[1].iloc[::-1]], [-0.2, -0.1]
        policy, descent = algorithms.pd_dpo(
            lab, lab.new_policy(), frames, voters, budget, 1.0, SCHEDULE, labels=8, **LOOP
        )
    return policies.snapshot(policy), descent, seen


def same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1].rounds == other[1].rounds and one[1].lam.tolist() == other[1].lam.tolist()
    assert one[1].message == other[1].message and one[2] == other[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c_dpo", "dual_descent", "pd_dpo", "chain"])
def test_a_killed_loop_ends_with_the_same_bits(name, lab, pairs, oracle, learned, monkeypatch, tmp_path, capsys):
    whole = run(name, lab, pairs, oracle, learned, None)
    steps = whole[1].steps
    assert len(whole[1].rounds) == 4 and steps >= 10
    for k, n in enumerate((2, steps // 2, 3, 1)):  # four kills of one loop: in the first round, in the middle, ...
        with killed_at(n):
            run(name, lab, pairs, oracle, learned, tmp_path / "kept")
        torch.manual_seed(100 + k)  # a new process has other random states
    same(run(name, lab, pairs, oracle, learned, tmp_path / "kept"), whole)
    assert "goes on after round" in capsys.readouterr().out
    monkeypatch.setattr(trainers, "run_steps", None)  # ended: nothing is trained again
    same(run(name, lab, pairs, oracle, learned, tmp_path / "kept"), whole)


def test_a_plain_training_that_has_ended_is_not_repeated(lab, pairs, monkeypatch, tmp_path, capsys):
    frame, run_steps, trained = pairs[1], trainers.run_steps, []
    monkeypatch.setattr(trainers, "run_steps", lambda *args: trained.append(args) or run_steps(*args))

    def dpo(folder=tmp_path / "kept", beta=1.0, schedule=SCHEDULE):
        lab.checkpoints, before = folder, len(trained)
        torch.manual_seed(len(trained))
        policy, history = algorithms.dpo(lab, frame, beta, schedule)
        return policies.digest(policies.snapshot(policy)), history, torch.rand(3).tolist(), len(trained) - before

    def timeless(found):
        return [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in found[1]]

    whole, first = dpo(None), dpo()
    seconds = len(record.taken_up)
    again = dpo(schedule=replace(SCHEDULE, round_steps=9))
    assert (again[0], timeless(again), again[2]) == (whole[0], timeless(whole), whole[2]), "bits, history, random state"
    assert again[1] == first[1] and (first[3], again[3]) == (1, 0) and "trained before" in capsys.readouterr().out
    assert len(record.taken_up) == seconds + 1 and record.taken_up[-1][1] > 0
    others = [dpo(beta=2.0), dpo(schedule=replace(SCHEDULE, steps=5)), dpo(schedule=replace(SCHEDULE, lr=2e-2))]
    assert [other[3] for other in others] == [1, 1, 1] and len({whole[0], *(other[0] for other in others)}) == 4
    for folder in (tmp_path / "kept").iterdir():
        path = folder / "policy"
        path.write_bytes(path.read_bytes()[:-1])
    assert dpo()[::3] == (whole[0], 1), "what is damaged is trained again"


def test_a_loss_of_its_own_is_a_training_of_its_own(lab, pairs, tmp_path):
    _, rows = algorithms.some_pairs(lab, pairs[1], SCHEDULE)
    lab.checkpoints = tmp_path
    for loss in ({}, {"pair_loss": losses.ipo_loss}, {"pair_loss": losses.ipo_loss}):
        algorithms.train_once(lab, lab.new_policy(), rows, 1.0, SCHEDULE, **loss)
    assert len(list(tmp_path.iterdir())) == 2


def test_seconds_count_what_was_killed(lab, pairs, oracle, learned, tmp_path):
    """What the rounds that were kept have taken is part of what a loop takes that goes on from them."""
    with killed_at(9):
        run("dual_descent", lab, pairs, oracle, learned, tmp_path)
    (state,) = tmp_path.glob("*/state")
    kept, began = json.loads(cache.read_checked(state))["seconds"], record.clock()
    assert len(kept) >= 2 and kept == sorted(kept) and kept[0] > 0
    before = len(record.taken_up)
    run("dual_descent", lab, pairs, oracle, learned, tmp_path)
    (name, *others), spent = zip(*record.taken_up[before:], strict=True)
    assert {name, *others} == {state.parent.name} and kept[-1] - 1 < sum(spent) < kept[-1], "less what is watched anew"
    ended = json.loads(cache.read_checked(state))["seconds"]
    assert ended[: len(kept)] == kept and kept[-1] < ended[-1] < record.clock() - began


def test_what_was_scored_and_drawn_comes_back(lab, pairs, learned, tmp_path):
    """A score of float32 depends in its last digit on the batch it was computed in: it is not computed again."""
    lab.checkpoints, first, then = tmp_path, learned(), learned()
    algorithms.c_dpo(lab, pairs[0], first, -0.2, 1.0, SCHEDULE, **LOOP)
    random = torch.get_rng_state()
    torch.manual_seed(7)
    algorithms.c_dpo(lab, pairs[0], then, -0.2, 1.0, SCHEDULE, **LOOP)
    assert then.known == first.known and len(first.known[1]) > 60
    assert torch.equal(torch.get_rng_state(), random)


def test_a_lora_loop_goes_on(lora_lab, pairs, oracle, learned, tmp_path):
    whole = run("dual_descent", lora_lab, pairs, oracle, learned, None)
    with killed_at(9):
        run("dual_descent", lora_lab, pairs, oracle, learned, tmp_path)
    same(run("dual_descent", lora_lab, pairs, oracle, learned, tmp_path), whole)


@pytest.fixture
def ended(lab, pairs, oracle, learned, tmp_path):
    """A loop that has ended, and the folder that it was kept in."""
    whole = run("dual_descent", lab, pairs, oracle, learned, tmp_path / "kept")
    (folder,) = (tmp_path / "kept").iterdir()
    return whole, folder


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["state", "policy-1", "policy-4", "optimiser-4"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_what_is_damaged_is_not_taken_up(ended, broken, how, lab, pairs, oracle, learned, capsys):
    whole, folder = ended
    body = bytearray((folder / broken).read_bytes())
    if how == "gone":
        (folder / broken).unlink()
    else:
        body[-5] ^= 1
        (folder / broken).write_bytes(bytes(body) if how == "changed" else bytes(body[: len(body) // 2]))
    capsys.readouterr()
    same(run("dual_descent", lab, pairs, oracle, learned, folder.parent), whole)
    out = capsys.readouterr().out
    assert "goes on" not in out and ("begins anew" in out or (broken, how) == ("state", "gone"))


def test_a_kill_between_two_files_leaves_the_round_before(lab, pairs, oracle, learned, monkeypatch, tmp_path):
    whole = run("dual_descent", lab, pairs, oracle, learned, None)
    real, written = cache.write_checked, []

    def write(path, body):
        written.append(path.name)
        if written.count("policy-2") and path.name == "state":
            raise Killed
        real(path, body)

    monkeypatch.setattr(cache, "write_checked", write)
    with pytest.raises(Killed):
        run("dual_descent", lab, pairs, oracle, learned, tmp_path)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert json.loads(cache.read_checked(folder / "state"))["round"] == 1
    same(run("dual_descent", lab, pairs, oracle, learned, tmp_path), whole)


def test_another_loop_has_another_folder(lab, pairs, oracle, learned, tmp_path, monkeypatch):
    """Whatever decides the result decides the folder: rows, weights, numbers, votes, code."""
    rows = lambda frame: algorithms.some_pairs(lab, frame, SCHEDULE)[1]  # noqa: E731
    policy, settings, frame = lab.new_policy(), {"beta": 1.0, "lam": np.array([0.1])}, pairs[1]
    folders = {"base": checkpoints.folder_of(tmp_path, settings, policy, [rows(frame)])}
    folders["beta"] = checkpoints.folder_of(tmp_path, settings | {"beta": 0.5}, policy, [rows(frame)])
    last_digit = np.nextafter(np.array([0.1]), 1)
    folders["lam"] = checkpoints.folder_of(tmp_path, settings | {"lam": last_digit}, policy, [rows(frame)])
    folders["rows"] = checkpoints.folder_of(tmp_path, settings, policy, [rows(frame.iloc[::-1])])
    folders["two"] = checkpoints.folder_of(tmp_path, settings, policy, [rows(frame)] * 2)
    again = checkpoints.folder_of(tmp_path, dict(settings), lab.new_policy(), [rows(frame)])
    with torch.no_grad():
        next(policy.parameters()).view(-1)[0] += 1e-6
    folders["weights"] = checkpoints.folder_of(tmp_path, settings, policy, [rows(frame)])
    monkeypatch.setattr(record, "source_hash", lambda: "another")
    folders["code"] = checkpoints.folder_of(tmp_path, settings, lab.new_policy(), [rows(frame)])
    assert len(set(folders.values())) == len(folders) and again == folders["base"]


LOOPS = {
    "as it is": {},
    "beta": {"beta": 0.5},
    "budget": {"budget": 0.1},
    "lam": {"lam": 0.5},
    "lr": {"schedule": replace(SHORT, lr=2e-2)},
    "steps": {"schedule": replace(SHORT, steps=2)},
    "seed": {"schedule": replace(SHORT, seed=1)},
    "samples": {"samples": 3},
    "tolerance": {"tolerance": 0.1},
    "rounds": {"max_rounds": 2},
    "step size": {"dual_lr": 0.5},
    "costs": {"costs": lambda costs: lambda *texts: costs(*texts) + 0.1},
    "reward": {"reward": lambda reward: lambda *texts: 2 * reward(*texts)},
    "beside": {"beside": {"another": lambda prompts, answers: np.zeros((len(prompts), 1))}},
    "max_length": {"lab": {"max_length": 64}},
    "max_new_tokens": {"lab": {"max_new_tokens": 5}},
    "shards": {"lab": {"shards": 2}},
    "sample_rows": {"lab": {"sample_rows": 8}},
    "sampler": {"lab": {"sampler": policies.sample}},
    "prompts": {"lab": {"prompts": -1}},
    "labels": {"labels": "sampled"},
    "votes": {"labels": 4},
    "votes of others": {"votes": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["c_dpo", "pd_dpo"])
def test_whatever_a_loop_is_given_decides_its_folder(method, lab, pairs, oracle, tmp_path):
    """Each change of one argument makes a folder of its own; the same arguments find theirs again."""
    only = {"c_dpo": {"votes", "votes of others"}, "pd_dpo": {"labels", "beside"}}[method]
    cases = {name: changed for name, changed in LOOPS.items() if name not in only}

    def folders(changed):
        given = {"beta": 1.0, "schedule": SHORT, "samples": 2, "lam": 1.0, "max_rounds": 1, "tolerance": 0.0} | changed
        own, budget, seed = dict(given.pop("lab", {})), given.pop("budget", -0.2), given.pop("votes", 0)
        own["prompts"] = lab.prompts[: own.get("prompts")]
        here = replace(lab, model=policies.clean_copy(lab.model), cache={}, checkpoints=tmp_path / method, **own)
        scores = {name: given.pop(name)(getattr(oracle, name)) for name in ("reward", "costs") if name in given}
        feedback = replace(oracle, **scores, beside=given.pop("beside", {}))
        beta, schedule = given.pop("beta"), given.pop("schedule")
        if method == "c_dpo":
            algorithms.c_dpo(here, pairs[0], feedback, budget, beta, schedule, **given)
        else:
            if "votes" in changed or "labels" in changed:
                feedback = algorithms.votes(feedback, given.get("labels", 8), seed)
            algorithms.pd_dpo(here, here.new_policy(), pairs[1], feedback, budget, beta, schedule, **given)
        return set((tmp_path / method).iterdir())

    seen = set()
    for name, changed in cases.items():
        now = folders(changed)
        assert len(now) == len(seen) + 1, f"{name} decides the result, and shares the folder of another loop"
        seen = now
    assert folders({}) == seen


def test_only_one_optimiser_state_is_kept(ended):
    _, folder = ended
    names = {path.name for path in folder.iterdir()}
    assert names == {"state", "optimiser-4", *(f"policy-{k}" for k in (1, 2, 3, 4))}


def test_outside_of_a_run_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("CDPO_RUN_DIR", raising=False)
    assert record.checkpoints_dir() is None
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    assert record.checkpoints_dir() == tmp_path / "checkpoints"


def test_the_loop_itself_can_be_taken_up_at_its_end():
    class Store:
        def load(self, watch):
            return np.array([0.3]), [{"lam": [0.3], "violation": [0.0]}], (True, "kept")

    descent = dual.descend(None, None, 0.0, 0.0, 1.0, store=Store())
    assert descent.converged and descent.message == "kept" and descent.lam.tolist() == [0.3]


def test_moments_go_to_their_own_parameters(lab, pairs):
    _, rows = algorithms.some_pairs(lab, pairs[1], SCHEDULE)
    rows = algorithms.set_column(rows, "pref_prob", np.ones(len(rows)))
    one, other = (algorithms._trainer(lab, lab.new_policy(), rows, 1.0, SCHEDULE) for _ in range(2))
    assert trainers.moments(one) == {}
    trainers.restore_moments(other, {})
    assert other.optimizer is None
    trainers.run_steps(one, 3, 0)
    kept = trainers.moments(one)
    assert len(kept) == 3 * len(list(one.model.parameters()))
    trainers.restore_moments(other, kept)
    assert all(torch.equal(value, kept[name]) for name, value in trainers.moments(other).items())
    with pytest.raises(KeyError):
        trainers.restore_moments(other, {"no.such.weight.step": torch.tensor(1.0)})


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["policy-2", "optimiser-3", "state"])
def test_a_full_disk_leaves_the_round_before(refused, lab, pairs, oracle, learned, monkeypatch, tmp_path, capsys):
    whole, real, written = run("dual_descent", lab, pairs, oracle, learned, None), cache.write_checked, []

    def write(path, body):
        written.append(path.name)
        if path.name == refused and written.count(refused) == (2 if refused == "state" else 1):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, body)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_checked", write)
        with killed_at(whole[1].steps - 1):  # in the last round
            run("dual_descent", lab, pairs, oracle, learned, tmp_path)
    said = capsys.readouterr().err
    kept = {"policy-2": 1, "optimiser-3": 2, "state": 3}[refused]  # a later state makes good for the one refused
    assert " is not kept: " in said and "No space left on device" in said and said.count("\n") == 1
    same(run("dual_descent", lab, pairs, oracle, learned, tmp_path), whole)
    assert f"goes on after round {kept}" in capsys.readouterr().out
