"""Sweeps of throw-away notebooks: what runs, what is skipped, what is gathered."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import one_node_slurm
import pandas as pd
import pytest
from nbformat import v4

from cdpo_utils import run, sweep

CELL = """\
import os
from pathlib import Path
from cdpo_utils.record import METHOD_FIELDS, save_record
with open(Path(marks) / "calls.txt", "a") as calls:
    calls.write(f"{seed} {budget}\\n")
assert budget < 9, "no such budget"
row = dict.fromkeys(METHOD_FIELDS) | dict(method="c_dpo", notebook="01_tiny", setting="bench", seed=seed, split="test")
row |= dict(feedback="learned", reward=float(seed), cost=budget, budget=budget, violation=0.0)
save_record("01_tiny", dict(seed=seed, budget=budget), [row])
"""


@pytest.fixture
def series(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    parameters = "seed: int = 0  # draws\nbudget: float = 0.0  # d\nmarks: str = ''  # folder"
    cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), v4.new_code_cell(CELL)]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "01_tiny.ipynb")
    return folder


@pytest.fixture
def go(series, tmp_path):
    """Write a grid and sweep it; returns (exit status, what the notebooks have been called with)."""

    def go(*options, seeds="[0, 1]", budgets="[0.5]", extra=""):
        grid = tmp_path / "grid.yaml"
        grid.write_text(
            f"only: [01]\nparameters: {{marks: {tmp_path}}}\ngrid: {{seed: {seeds}, budget: {budgets}}}\n{extra}"
        )
        status = sweep.main([str(grid), "--out", str(tmp_path / "out"), *options], series)
        calls = tmp_path / "calls.txt"
        return status, calls.read_text().splitlines() if calls.exists() else []

    return go


@pytest.mark.slow
def test_a_sweep_runs_each_point_once_and_goes_on_where_it_was(go, tmp_path, capsys):
    assert go("--dry-run") == (0, []) and capsys.readouterr().out.count("to run") == 2
    status, calls = go("--jobs", "2")
    assert status == 0 and sorted(calls) == ["0 0.5", "1 0.5"]
    rows = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert rows.seed.tolist() == [0, 1] and rows["grid.budget"].tolist() == [0.5, 0.5]
    assert (tmp_path / "out" / "plane.png").stat().st_size > 1000
    # one point more: what is done is skipped, and every point is in the table
    status, calls = go(seeds="[0, 1, 2]")
    assert status == 0 and calls[2:] == ["2 0.5"] and "3 runs, 2 done already" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table.n.item() == 3 and table.reward.item() == 1
    assert table["reward ±"].item() == pytest.approx(4.302653 / 3**0.5)  # sd 1, t with 2 degrees of freedom
    # a run whose results are gone is done again; one whose manifest line was cut off by a kill is noted, not repeated
    manifest = tmp_path / "out" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], lines[2][:20]]))
    gone = json.loads(lines[0])
    for summary in (tmp_path / "out" / gone["run"]).glob("[0-9]*/summary.json"):
        summary.unlink()
    status, calls = go(seeds="[0, 1, 2]")
    assert status == 0 and calls[3:] == [f"{gone['point']['seed']} 0.5"]
    entries = sweep.read_manifest(tmp_path / "out")
    assert len(entries) == 3 and all(entry["status"] == "done" for entry in entries.values())
    # results that were being written when the machine stopped are none
    for summary in (tmp_path / "out" / gone["run"]).glob("[0-9]*/summary.json"):
        summary.write_text(summary.read_text()[:-40])
    assert go(seeds="[0, 1, 2]")[1][4:] == [f"{gone['point']['seed']} 0.5"]


@pytest.mark.slow
def test_a_failed_run_is_tried_again_named_and_no_obstacle(go, tmp_path, capsys):
    status, calls = go(seeds="[0]", budgets="[9.0, 0.5]")
    assert status == 1 and calls == ["0 9.0", "0 9.0", "0 0.5"]
    assert "failed: {'seed': 0, 'budget': 9.0}: AssertionError: no such budget; see " in capsys.readouterr().err
    assert len(pd.read_parquet(tmp_path / "out" / "results.parquet")) == 1
    entries = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(e["status"], e["tries"]) for e in entries] == [("failed", 2), ("done", 1)]


def by_submitit(values, planned, series, folder):
    call = sweep.on_slurm(folder, None, cpus=1, cluster="local")
    return sweep.sweep(values, planned, folder, series, len(planned), 1, call)


@pytest.mark.slow
def test_jobs_of_submitit_run_fail_and_are_found_again(series, tmp_path, monkeypatch):
    """submitit's local executor in the place of Slurm: the same jobs, files and states, without a scheduler."""
    submitit = pytest.importorskip("submitit")
    values = {"only": [], "setting": "bench", "parameters": {"marks": str(tmp_path)}}
    planned = sweep.plan(values | {"grid": {"seed": [0, 1], "budget": [0.5]}}, series)
    (folder := tmp_path / "out").mkdir()
    assert by_submitit(values, planned, series, folder) == []
    calls = tmp_path / "calls.txt"
    assert sorted(calls.read_text().splitlines()) == ["0 0.5", "1 0.5"]
    assert set(sweep.read_manifest(folder)) == {digest for digest, _ in planned}
    assert by_submitit(values, planned, series, folder) == [] and len(calls.read_text().splitlines()) == 2
    failing = sweep.plan(values | {"grid": {"budget": [9.0]}}, series)
    (entry,) = by_submitit(values, failing, series, folder)
    assert entry["error"] == "AssertionError: no such budget" and entry["tries"] == 2
    # a sweep that is started again while its job is still going waits for it

    class Going(submitit.LocalJob):
        def done(self, force_check=False):
            return False

        def result(self):
            return f"the result of job {self.job_id}"

    monkeypatch.setattr(submitit, "LocalJob", Going)
    digest = planned[0][0]
    number = (folder / digest / "job.txt").read_text()
    call = sweep.on_slurm(folder, None, cpus=1, cluster="local")
    assert call(digest, pytest.fail, "submitted once more") == f"the result of job {number}"


@pytest.mark.slow
@pytest.mark.skipif(not one_node_slurm.installed(), reason="needs slurmctld, slurmd and slurm-client (Debian)")
def test_a_sweep_on_a_real_slurm_is_killed_goes_on_and_repeats_nothing(series, tmp_path):
    """Two runs and one that fails, as jobs of a cluster of one node; the sweep is killed while its jobs run."""
    pytest.importorskip("submitit")
    notebook = series / "01_tiny.ipynb"
    notebook.write_text(notebook.read_text().replace("import os\\n", "import os, time\\ntime.sleep(8)\\n", 1))
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(f"parameters: {{marks: {tmp_path}}}\ngrid: {{seed: [0, 1], budget: [0.5, 9.0]}}\n")
    code = sweep.IN_A_PROCESS.replace("run", "sweep")
    command = [sys.executable, "-c", code, series, grid, "--out", out, "--slurm", "test", "--cpus", "1"]
    with one_node_slurm.cluster(tmp_path / "slurm") as environment:
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.time() + 120
        while len(list(out.glob("*/job.txt"))) < 4 and time.time() < deadline:
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        numbers = {path: path.read_text() for path in out.glob("*/job.txt")}
        assert len(numbers) == 4 and first.wait() == -signal.SIGKILL
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert again.returncode == 1 and again.stderr.count("failed: ") == 2, again.stderr
        assert "AssertionError: no such budget" in again.stderr
        assert {path: path.read_text() for path in out.glob("*/job.txt")} == numbers, (
            "jobs that were going are waited for"
        )
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        assert sorted(calls) == ["0 0.5", "0 9.0", "0 9.0", "1 0.5", "1 9.0", "1 9.0"], "a failed run is tried twice"
        third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "4 runs, 2 done already" in third.stdout
    assert pd.read_parquet(out / "results.parquet").seed.tolist() == [0, 1]


def test_slurm_without_a_cluster_is_one_line(go, capsys, monkeypatch):
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    assert go("--slurm", "gpu") == (2, [])
    assert "no sbatch here; expected a login node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": "girds: 1"}, "unknown field girds; expected grid, only, parameters, setting"),
        ({"budgets": "[]"}, "budget is []; expected a list of values, not empty"),
        ({"budgets": "0.5"}, "budget is 0.5; expected a list of values, not empty"),
        ({"budgets": "[much]"}, "parameter budget of 01_tiny: 'much' is not a number"),
        ({"seeds": "[0], sede: [1]"}, "unknown parameter sede"),
    ],
)
def test_a_bad_grid_is_one_line_before_anything_runs(go, change, message, capsys):
    assert go(**change) == (2, [])
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_digest_knows_what_decides_a_number(series, tmp_path, monkeypatch):
    values = {"only": [], "setting": "bench", "parameters": {"budget": 0.5}, "grid": {"seed": [0, 1]}}
    (first, _), (second, _) = sweep.plan(values, series)
    assert first != second and sweep.plan(values, series)[0][0] == first
    assert sweep.plan(values | {"parameters": {"budget": 0.6}}, series)[0][0] != first
    monkeypatch.setattr(run.record, "_commit", lambda: "another commit, of a text say")
    assert sweep.plan(values, series)[0][0] == first, "what changed no source changed no number"
    path = series / "01_tiny.ipynb"
    path.write_text(path.read_text().replace("no such budget", "no such"))
    assert sweep.plan(values, series)[0][0] != first
    monkeypatch.setattr(run.record, "source_hash", lambda: "another package")
    assert sweep.plan(values, series)[0][0] not in (first, second)


def test_means_over_seeds_by_hand():
    rows = pd.DataFrame(
        {"method": "c_dpo", "feedback": "learned", "split": "test", "grid.seed": [0, 1, 0], "grid.beta": [1, 1, 2]}
        | {name: [1.0, 3.0, 5.0] for name in sweep.MEASURED}
    )
    table = sweep.over_seeds(rows)
    assert table.n.tolist() == [2, 1] and table.cost.tolist() == [2.0, 5.0]
    assert table["cost ±"][0] == pytest.approx(12.7062) and np.isnan(table["cost ±"][1])  # t, 1 degree; sd / sqrt 2 = 1
