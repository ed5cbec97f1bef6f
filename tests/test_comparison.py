"""Every method of the comparison on a small world: what it spends, and that its knob is chosen and used."""

import json
import subprocess
import sys

import numpy as np
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
    assert (row["lam"] is None) == (method in ("dpo_helpful", "dpo_harmless", "best_of_n", "safe_dpo"))
    scorers = 2 * 600 if method in comparison.SCORED else 0
    assert row["labels"] - scorers == pytest.approx(24 * 64 * comparison.HARD.get(method, 0))
    assert (row["answers"] > 0) == (method in comparison.SCORED)
    json.dumps(row, allow_nan=False)


def test_the_validation_world_is_refused_as_a_test(capsys):
    assert comparison.main(["--seeds", "0", "100"]) == 2
    assert "seed 100 is the validation world" in capsys.readouterr().err


def test_the_knob_with_the_smallest_gap_on_the_validation_world_is_used(monkeypatch):
    asked = []

    def run_one(method, knob, seed, settings):
        asked.append((method, knob, seed))
        return {"method": method, "knob": knob, "gap": abs(knob - 0.6)}

    monkeypatch.setattr(comparison, "_fill", lambda seed, settings: None)
    monkeypatch.setattr(comparison.workers, "side_by_side", lambda function, calls: [run_one(*call) for call in calls])
    tuning, rows = comparison.compare(["modpo", "safe_dpo"], [0, 1], SETTINGS)
    assert asked[:6] == [("modpo", v, 100) for v in (0.3, 0.6, 1.2)] + [("safe_dpo", v, 100) for v in (0.0, 1.0, 4.0)]
    assert asked[6:] == [("modpo", 0.6, 0), ("safe_dpo", 1.0, 0), ("modpo", 0.6, 1), ("safe_dpo", 1.0, 1)]
    assert len(tuning) == 6 and len(rows) == 4


@pytest.mark.slow
def test_the_command_tunes_and_writes_its_rows(tmp_path):
    sizes = ["--n-pairs", "600", "--n-objects", "3", "--n-tools", "3", "--steps", "8"]
    command = [sys.executable, "-m", "cdpo_utils.comparison", "--methods", "best_of_n", "modpo", *sizes]
    done = subprocess.run([*command, "--out", tmp_path / "c.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    found = json.loads((tmp_path / "c.json").read_text())
    assert len(found["tuning"]) == 6 and [row["method"] for row in found["rows"]] == ["best_of_n", "modpo"]
    assert "best_of_n" in done.stdout and "modpo" in done.stdout


def test_every_knob_has_three_values_and_the_tuned_one_is_among_them():
    assert all(len(values) == 3 for _, values in comparison.KNOBS.values())
    assert set(suite.NOTEBOOKS) <= comparison.KNOBS.keys() == comparison.TUNED.keys()
    assert all(value in comparison.KNOBS[method][1] for method, value in comparison.TUNED.items())
