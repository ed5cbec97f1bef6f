"""Every method of the comparison on a small world: what it spends, and that its knob is chosen and used."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from cdpo_utils import comparison, suite, trainers

SETTINGS = dict(n_pairs=600, n_objects=3, n_tools=3, beta=1.0, budget=0.0, steps=24, budget_from="absolute")


@pytest.fixture
def looked_at(monkeypatch):
    """Pairs, or halves of two sampled answers, that trainers of policies have looked at."""
    seen, real = [], trainers.run_steps

    def counted(trainer, steps, *args):
        batch = trainer.args.per_device_train_batch_size
        if isinstance(trainer, trainers.PreferenceTrainer):
            seen.append(batch * steps)
        elif isinstance(trainer, trainers.RLOOTrainer):
            seen.append(batch * steps // 2)
        return real(trainer, steps, *args)

    monkeypatch.setattr(trainers, "run_steps", counted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("method", comparison.KNOBS)
def test_each_method_spends_no_more_than_the_others(method, looked_at):
    value = comparison.KNOBS[method][1][1]
    row = comparison.run_one(method, value, 0, SETTINGS)
    assert sum(looked_at) == (0 if method == "best_of_n" else 24 * 64)
    assert row["knob"] == value and np.isfinite([row["gap"], row["reward"], row["cost"], row["spread"]]).all()
    without = ("dpo_helpful", "dpo_harmless", "best_of_n", "safe_dpo", "bfpo")
    assert (row["lam"] is None) == (method in without)
    assert bool(row["path"]) == (method in ("safe_rlhf", "c_dpo", "dual_descent", "pd_dpo"))
    if row["path"]:
        share, lam, cost = np.transpose(row["path"])
        assert (np.diff(share) > 0).all() and share[-1] == 1 and lam[-1] == row["lam"] and np.isfinite(cost).all()
    scorers = 2 * 600 if method in comparison.SCORED else 0
    assert row["labels"] - scorers == pytest.approx(24 * 64 * comparison.HARD.get(method, 0))
    assert (row["answers"] > 0) == (method in comparison.SCORED)
    json.dumps(row, allow_nan=False)


WORDS = {method: setting for method, setting in comparison.PAPERS.items() if isinstance(setting, str)}


@pytest.mark.slow
@pytest.mark.parametrize("method", WORDS)
def test_what_papers_ran_spends_as_much_and_is_what_the_words_say(method, looked_at, monkeypatch):
    asked, strengths, real = [], [], comparison.algorithms.preference_probability

    def preference_probability(scores, lam, labels, rng):
        asked.append((labels, float(lam[0])))
        return real(scores, lam, labels, rng)

    def sacpo(lab, policy, pairs, lam, *args, real=comparison.baselines.sacpo):
        strengths.append(lam)
        return real(lab, policy, pairs, lam, *args)

    monkeypatch.setattr(comparison.algorithms, "preference_probability", preference_probability)
    monkeypatch.setattr(comparison.baselines, "sacpo", sacpo)
    row = comparison.run_one(method, WORDS[method], 0, SETTINGS)
    assert sum(looked_at) == 24 * 64 and row["knob"] == WORDS[method] and np.isfinite([row["gap"], row["cost"]]).all()
    drawn = {"dual_descent": 4, "pd_dpo": 0}.get(method, 1)  # times that labels are drawn
    assert [labels for labels, _ in asked] == ["sampled"] * drawn
    fixed = {"pd_dpo": 5.0, "c_dpo": 0.4}.get(method)
    if fixed:
        assert [lam for _, lam in asked] + strengths == [fixed] == [row["lam"]] and not row["path"]
        assert row["labels"] == {"c_dpo": 2 * 600, "pd_dpo": 24 * 64}[method]  # of scorers, of the policy's pairs
    json.dumps(row, allow_nan=False)


def test_the_validation_world_is_refused_as_a_test(capsys):
    assert comparison.main(["--seeds", "0", "100"]) == 2
    assert "seed 100 is the validation world" in capsys.readouterr().err


def test_the_knob_with_the_smallest_gap_on_the_validation_world_is_used(monkeypatch):
    asked = []

    def run_one(method, knob, seed, settings):
        asked.append((method, knob, seed, settings["steps"]))
        return {"method": method, "knob": knob, "seed": seed, "gap": abs(knob - 0.6)}

    monkeypatch.setattr(comparison, "fill", lambda seed, settings: None)
    monkeypatch.setattr(
        comparison.workers, "side_by_side", lambda _, calls, kept=None: [run_one(*call) for call in calls]
    )
    monkeypatch.setattr(comparison, "frontier", lambda seed, settings: [{"seed": seed}])
    worlds = comparison.compare(["modpo", "safe_dpo"], [0, 1], SETTINGS, [8, 24])
    found = next(worlds)
    assert {row["seed"] for row in found["rows"]} == {0} and len(asked) == 12, "a world at a time"
    assert list(worlds) == [found], "which grows"
    tuning, rows, papers, frontiers = (found[name] for name in ("tuning", "rows", "papers", "frontiers"))
    tried = [("modpo", v, 100, 24) for v in (0.3, 0.6, 1.2)] + [("safe_dpo", v, 100, 24) for v in (0.0, 1.0, 4.0)]
    assert asked[:6] == tried, "knobs are chosen at the most steps"
    for seed, calls in ((0, asked[6:12]), (1, asked[12:])):
        chosen = [(m, v, seed, n) for n in (8, 24) for m, v in (("modpo", 0.6), ("safe_dpo", 1.0))]
        assert calls == [*chosen, ("modpo", 1.0, seed, 24), ("safe_dpo", 10.0, seed, 24)]
    assert len(tuning) == 6 and len(rows) == 8 and len(papers) == 4 and frontiers == [{"seed": 0}, {"seed": 1}]


def test_what_a_paper_recommends_is_not_run_again_where_it_was_chosen(monkeypatch):
    asked = []

    def run_one(method, knob, seed, settings):
        asked.append((method, knob, seed))
        return {"method": method, "knob": knob, "gap": abs(knob - 0.6), "number": len(asked)}

    monkeypatch.setattr(comparison, "PAPERS", {"modpo": 0.6, "sacpo": 4.0})
    monkeypatch.setattr(comparison, "fill", lambda seed, settings: None)
    monkeypatch.setattr(comparison, "frontier", lambda seed, settings: [])
    monkeypatch.setattr(
        comparison.workers, "side_by_side", lambda _, calls, kept=None: [run_one(*call) for call in calls]
    )
    [found] = comparison.compare(["modpo", "sacpo", "bfpo"], [0], SETTINGS, [8])
    rows, papers = found["rows"], found["papers"]
    assert asked[9:] == [("modpo", 0.6, 0), ("sacpo", 0.6, 0), ("bfpo", 0.5, 0), ("sacpo", 4.0, 0)]
    assert papers == [rows[0], papers[1]] and (papers[1]["method"], papers[1]["knob"]) == ("sacpo", 4.0)


@pytest.mark.slow
def test_the_command_tunes_and_writes_its_rows(tmp_path):
    sizes = ["--n-pairs", "600", "--n-objects", "3", "--n-tools", "3", "--steps", "4", "8"]
    command = [sys.executable, "-m", "cdpo_utils.comparison", "--methods", "safe_rlhf", "dual_descent", *sizes]
    killed = subprocess.Popen([*command, "--out", tmp_path], stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "trained").glob("*.json"))) < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    left = {path: path.read_bytes() for path in (tmp_path / "trained").glob("*.json")}
    done = subprocess.run([*command, "--out", tmp_path, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith(f"goes on: {len(left)} done before\n") and len(left) < 12
    assert not (tmp_path / "trained").exists()
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert all(json.loads(result)["result"] in found["tuning"] for result in left.values()), "seconds and all"
    assert len(found["tuning"]) == 6 and [row["method"] for row in found["rows"]] == ["safe_rlhf", "dual_descent"] * 2
    assert [row["steps"] for row in found["rows"]] == [4, 4, 8, 8]
    assert [row["knob"] for row in found["papers"]] == [0.01, "4 rounds, drawn labels"]
    assert "4 rounds, drawn labels" in done.stdout
    assert "| Safe RLHF's gradient (RLOO) | dual_lr " in done.stdout and "| dual descent | rate " in done.stdout
    assert sorted(path.name for path in tmp_path.glob("comparison*")) == ["comparison.json"]
    assert done.stdout.count("multiplier swings by") == 6 + 4, "of each value tried, and of each row"
    for name in ("gaps", "plane", "compute", "multipliers"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) > 3


def test_filling_trains_what_the_cache_lacks_and_nothing_else(monkeypatch):
    trained = []

    class Made:
        def scorers(self):
            trained.append("scorers")

    monkeypatch.setattr(comparison.suite, "opened", lambda settings: trained.append(settings["seed"]) or (Made(), {}))
    monkeypatch.setattr(comparison.workers, "side_by_side", lambda *args: pytest.fail("a process for nothing"))
    comparison.fill(7, SETTINGS)
    assert trained == [7, "scorers"]


def test_the_frontier_passes_through_the_optimum(monkeypatch):
    monkeypatch.setitem(comparison.labs.SFT, "steps", 60)  # in the place of 600: it is exact for any reference
    curve = pd.DataFrame(comparison.frontier(0, SETTINGS, points=400))
    near = curve.iloc[curve.violation.abs().argmin()]
    assert abs(near.violation) < 0.02 and abs(near.reward_lost) < 0.05
    assert (np.diff(curve.violation) <= 1e-9).all() and (np.diff(curve.reward_lost) >= -1e-9).all()


def test_the_table_over_seeds_by_hand():
    row = dict(method="sacpo", knob=0.6, steps=8, gap_test=1.0, labels=5, answers=0, spread=2.0)
    rows = [row | dict(gap=g, violation=v) for g, v in ((1.0, 2.0), (3.0, -4.0))]
    line = comparison.table(rows).iloc[0]
    assert line["gap"] == 2.0 and line["gap ±"] == pytest.approx(12.706, abs=1e-3), "t of one degree of freedom"
    shown = comparison.markdown(rows).splitlines()
    assert shown[2] == "| SACPO | lam 0.6 | 2.0 ± 12.7 % | 1.0 ± 0.0 % | −0.50 ± 19.06 | 2.00 | 5 | 0 |"
    assert "| +0.00 |" in comparison.markdown([rows[0] | {"violation": -0.001}]), "no minus of nothing"
    assert comparison.markdown(rows[:1]).endswith("| SACPO | lam 0.6 | 1.0 % | 1.0 % | +1.00 | 1.00 | 5 | 0 |")
    assert line["violation"] == -0.5 and line["worst |violation|"] == 2.0 and line["knob"] == "lam 0.6"


def test_every_method_at_every_budget_with_the_knobs_of_budget_zero(monkeypatch, tmp_path, capsys):
    asked, filled = [], []

    def run_one(method, knob, seed, settings):
        asked.append((method, knob, seed, settings["budget"], settings["steps"]))
        size = {"sacpo": 0.5, "c_dpo": 0.25}[method] * (settings["budget"] - 0.5)
        return dict(method=method, knob=knob, seed=seed, budget=settings["budget"], violation=2 * size, spread=2.0,
                    gap=10 * abs(size))  # fmt: skip

    monkeypatch.setattr(comparison, "fill", lambda seed, settings: filled.append((seed, settings["budget"])))
    monkeypatch.setattr(
        comparison.workers, "side_by_side", lambda _, calls, kept=None: [run_one(*call) for call in calls]
    )
    command = ["--methods", "sacpo", "c_dpo", "--budgets", "-1", "1", "--seeds", "0", "3", "--steps", "8"]
    assert comparison.main([*command, "--out", str(tmp_path)]) == 0
    assert filled == [(0, -1.0), (3, -1.0), (0, 1.0), (3, 1.0)], "a budget that no policy meets is refused at once"
    knobs = {name: comparison.TUNED[name] for name in ("sacpo", "c_dpo")}
    assert sorted(asked) == sorted((m, k, s, d, 8) for m, k in knobs.items() for s in (0, 3) for d in (-1.0, 1.0))
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["sacpo", "c_dpo"] * 4, "in the order asked for"
    table = comparison.by_budget(rows)
    assert list(table.columns) == [("violation", 1.0), ("violation", -1.0), ("gap", 1.0), ("gap", -1.0)]
    assert list(table.index) == ["c_dpo", "sacpo"] and list(table.loc["sacpo"]) == [0.25, -0.75, 2.5, 7.5]
    assert "budgets.json" in capsys.readouterr().out


def test_swing_is_of_the_second_half():
    assert comparison.swing([[0.25, 9.0, 0], [0.5, 9.0, 0], [0.75, 1.0, 0], [1.0, 3.0, 0]]) == 1.0


def test_every_method_has_a_name():
    assert comparison.NAMES.keys() == comparison.KNOBS.keys() and len(set(comparison.NAMES.values())) == 15


def test_every_knob_has_three_values_and_the_tuned_one_is_among_them():
    assert all(len(values) == 3 for _, values in comparison.KNOBS.values())
    assert set(suite.NOTEBOOKS) <= comparison.KNOBS.keys() == comparison.TUNED.keys()
    assert all(value in comparison.KNOBS[method][1] for method, value in comparison.TUNED.items())
