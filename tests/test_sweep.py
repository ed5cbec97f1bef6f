"""Sweeps of throw-away notebooks: what runs, what is skipped, what is gathered."""

import hashlib
import json
import os
import shutil
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

from cdpo_utils import record, run, sweep

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
ON_THE_COMMAND_LINE = "import sys, pathlib; from cdpo_utils import sweep; " + (
    "sys.exit(sweep.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
)


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
    # a run without its record and results is done again; one whose manifest line was cut off by a kill is only noted
    manifest = tmp_path / "out" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], lines[2][:20]]))
    gone = json.loads(lines[0])
    (place,) = (tmp_path / "out" / gone["run"]).glob("[0-9]*")
    (place / "summary.json").unlink()
    (place / "01_tiny.ipynb").unlink()
    status, calls = go(seeds="[0, 1, 2]")
    assert status == 0 and calls[3:] == [f"{gone['point']['seed']} 0.5"]
    entries = sweep.read_manifest(tmp_path / "out")
    assert len(entries) == 3 and all(entry["status"] == "done" for entry in entries.values())
    # results that were being written when the machine stopped are none: they are gathered again, and nothing is run
    (place / "summary.json").write_text((place / "summary.json").read_text()[:-40])
    assert go(seeds="[0, 1, 2]") == (0, calls) and json.loads((place / "summary.json").read_text())["methods"]
    # what cannot be gone on with, since its plan is damaged, is begun anew
    (place / "summary.json").unlink()
    (place / "plan.json").write_text("{")
    assert go(seeds="[0, 1, 2]")[1][4:] == [f"{gone['point']['seed']} 0.5"]
    assert len(list(place.parent.glob("[0-9]*/plan.json"))) == 2


def started(series, tmp_path, grid, cell, *options):
    """A sweep as a process group of its own whose first notebook has `cell` instead; (the process, its command)."""
    notebook = nbformat.read(series / "01_tiny.ipynb", as_version=4)
    notebook.cells[1].source = cell
    nbformat.write(notebook, series / "01_tiny.ipynb")
    (tmp_path / "grid.yaml").write_text(f"parameters: {{marks: {tmp_path}}}\ngrid: {grid}\n")
    command = [sys.executable, "-c", ON_THE_COMMAND_LINE, series, tmp_path / "grid.yaml", "--out", tmp_path / "out"]
    return subprocess.Popen([*command, *options], start_new_session=True), [*command, *options]


def wait_until(found, seconds=300):
    deadline = time.time() + seconds
    while not found():
        assert time.time() < deadline, "too late"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["out/*/parameters.yaml", "calls.txt"])  # its process begins; a notebook is run
def test_a_run_whose_sweep_was_killed_is_waited_for_and_not_run_twice(series, tmp_path, moment):
    cell = f"import time\n{CELL}time.sleep(5)\n"
    first, command = started(series, tmp_path, "{seed: [0, 1], budget: [0.5]}", cell)
    wait_until(lambda: list(tmp_path.glob(moment)))
    first.kill()  # and not its child
    assert first.wait() == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "calls.txt").read_text().splitlines() == ["0 0.5", "1 0.5"]
    if moment == "calls.txt":
        assert "another process is running it, which is waited for" in again.stdout
        assert [entry["tries"] for entry in sweep.read_manifest(tmp_path / "out").values()] == [0, 1]
    assert pd.read_parquet(tmp_path / "out" / "results.parquet").seed.tolist() == [0, 1]
    assert [entry["status"] for entry in sweep.read_manifest(tmp_path / "out").values()] == ["done"] * 2
    assert len(list((tmp_path / "out").glob("*/[0-9]*/plan.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("there", "status"), [(True, 0), (False, 1)])
def test_a_process_whose_sweep_is_gone_begins_nothing(series, tmp_path, there, status):
    parent = os.getpid() if there else os.getppid()
    command = [sys.executable, "-c", sweep.IN_A_PROCESS, series, tmp_path / "held", parent]
    command += ["--out", tmp_path / "out", "-p", "marks", tmp_path, "--no-report"]
    assert subprocess.run(list(map(str, command)), timeout=300).returncode == status
    assert (tmp_path / "out").exists() == (tmp_path / "calls.txt").exists() == (status == 0)


@pytest.mark.slow
def test_a_sweep_that_is_killed_with_its_run_goes_on_after_the_last_whole_notebook(series, tmp_path):
    shutil.copy(series / "01_tiny.ipynb", series / "02_more.ipynb")
    more = nbformat.read(series / "02_more.ipynb", as_version=4)
    more.cells[1].source = f"import time\n{CELL.replace('01_tiny', '02_more')}time.sleep(5)\n"
    more.cells[1].source = more.cells[1].source.replace("{seed} {budget}", "more {seed} {budget}")
    nbformat.write(more, series / "02_more.ipynb")
    first, command = started(series, tmp_path, "{seed: [0], budget: [0.5]}", CELL)
    calls = tmp_path / "calls.txt"
    wait_until(lambda: calls.exists() and "more" in calls.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert subprocess.run(command, timeout=600).returncode == 0
    assert calls.read_text().splitlines() == ["0 0.5", "more 0 0.5", "more 0 0.5"]
    rows = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert rows.run.nunique() == 1 and len(rows) == 2
    (entry,) = sweep.read_manifest(tmp_path / "out").values()
    assert entry["status"] == "done" and entry["tries"] == 1


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
            return {"of": self.job_id, "tries": 1}

    monkeypatch.setattr(submitit, "LocalJob", Going)
    digest = planned[0][0]
    number = (folder / digest / "job.txt").read_text()
    call = sweep.on_slurm(folder, None, cpus=1, cluster="local")
    assert call(digest, pytest.fail, "submitted once more") == {"of": number, "tries": 1}


def test_a_killed_job_is_submitted_once_more_and_no_log_keeps_a_secret(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 0)
    monkeypatch.setenv("JUDGE_API_KEY", "not-for-anybody")

    def killed_once(file):
        print("the key is", os.environ["JUDGE_API_KEY"], flush=True)
        if not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"status": "done", "tries": 1}

    call = sweep.on_slurm(tmp_path, None, cpus=1, cluster="local")
    assert call("a", killed_once, tmp_path / "seen") == {"status": "done", "tries": 2}
    logs = [path.read_text() for path in sorted((tmp_path / "jobs").glob("*_log.*"))]
    assert len(logs) == 4 and "".join(logs).count("the key is ***") == 2 and "not-for-anybody" not in "".join(logs)
    # a job that ended while no sweep was there
    log = tmp_path / "jobs" / f"{(tmp_path / 'a' / 'job.txt').read_text()}_0_log.out"
    log.write_text("not-for-anybody")
    sweep.on_slurm(tmp_path, None, cpus=1, cluster="local")
    assert log.read_text() == "***"


SBATCH = """\
#!/bin/sh
cp "$1" {folder}/script$(ls {folder} | grep -c script)
echo Submitted batch job 7
"""
SACCT = """\
#!/bin/sh
echo 'JobID|State|NodeList
7|NODE_FAIL|a'
"""


def test_what_a_slurm_job_asks_for_and_how_a_lost_node_ends(go, tmp_path, monkeypatch, capsys):
    """Programs that stand in for Slurm's: every job is submitted and its node lost."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    (place := tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("srun", "")):
        (place / name).write_text(text.format(folder=place))
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    asked = ("--slurm", "gpu", "--cpus", "3", "--gpus", "2", "--mem", "64", "--hours", "5")
    assert go(*asked, seeds="[0]") == (1, [])
    scripts = [path.read_text() for path in place.glob("script*")]
    assert len(scripts) == 2, "a lost job is submitted once more"
    for flag in ("partition=gpu", "cpus-per-task=3", "gpus-per-node=2", "mem=64GB", "time=300"):
        assert f"#SBATCH --{flag}\n" in scripts[0]
    assert "failed: {'seed': 0, 'budget': 0.5}: job 7: " in capsys.readouterr().err
    (entry,) = sweep.read_manifest(tmp_path / "out").values()
    assert entry["status"] == "failed" and entry["tries"] == 2
    assert go("--slurm", "gpu", seeds="[1]")[0] == 1
    text = (place / "script2").read_text()
    assert "gpus" not in text and "--mem" not in text and "--time=720\n" in text
    (place / "sbatch").write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    assert go("--slurm", "gpo", seeds="[2]")[0] == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: {'seed': 2"))
    assert "no such partition" in line and ": job" not in line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--slurm", "gpu", "--gpus", "-1"], "--gpus -1: expected 0 or more"),
        (["--slurm", "gpu", "--mem", "0"], "--mem 0: expected 1 or more"),
        (["--slurm", "gpu", "--hours", "0"], "--hours 0: expected 1 or more"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--gpus", "1"], "--gpus and --mem are of Slurm jobs; expected --slurm PARTITION beside them"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(go, options, line, capsys):
    assert go(*options) == (2, [])
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.slow
@pytest.mark.skipif(not one_node_slurm.installed(), reason="needs slurmctld, slurmd and slurm-client (Debian)")
def test_a_sweep_on_a_real_slurm_is_killed_goes_on_and_repeats_nothing(series, tmp_path):
    """Two runs and one that fails, as jobs of a cluster of one node; the sweep is killed while its jobs run."""
    pytest.importorskip("submitit")
    notebook = series / "01_tiny.ipynb"
    notebook.write_text(notebook.read_text().replace("import os\\n", "import os, time\\ntime.sleep(8)\\n", 1))
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(f"parameters: {{marks: {tmp_path}}}\ngrid: {{seed: [0, 1], budget: [0.5, 9.0]}}\n")
    command = [sys.executable, "-c", ON_THE_COMMAND_LINE, series, grid, "--out", out, "--slurm", "test", "--cpus", "1"]
    command += ["--mem", "1", "--hours", "2"]
    with one_node_slurm.cluster(tmp_path / "slurm") as environment:
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.time() + 120
        while len(list(out.glob("*/job.txt"))) < 4 and time.time() < deadline:
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        numbers = {path: path.read_text() for path in out.glob("*/job.txt")}
        asked = subprocess.check_output(["scontrol", "show", "jobs"], env=environment, text=True)
        assert asked.count("TimeLimit=02:00:00") == asked.count("TRES=cpu=1,mem=1G,") == 4, asked
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
        ({"seeds": "[0, 1, 0]"}, "seed has a value twice; expected each once"),
        ({"seeds": "[0], marks: [a]"}, "marks is in parameters and in grid; expected it in one of them"),
        ({"budgets": "[.nan]"}, "parameter budget of 01_tiny: nan is not finite"),
        ({"extra": "setting: [bench]"}, "expected only: [02, 05] and setting: a name"),
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


def test_the_digest_knows_the_content_of_data_and_of_models(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "repo_root", lambda: tmp_path)  # where a relative name leads to
    (folder := tmp_path / "notebooks").mkdir()
    parameters = "seed: int = 0\ndata_file: str = ''\nmodel: str = ''\npublished_cost: str = ''"
    cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    for name in ("01_a", "02_b"):
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")
    (rows := tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "policy" / "deep").mkdir(parents=True)
    (weights := tmp_path / "policy" / "deep" / "model.safetensors").write_bytes(b"weights")
    (scorer := tmp_path / "scorer").mkdir()
    given = {"data_file": str(rows), "model": "policy", "published_cost": str(scorer)}
    values = {"only": [], "setting": "bench", "parameters": given, "grid": {"seed": [0, 1]}}
    reads, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: reads.append(file.name) or digest(file, kind))
    seen = {sweep.plan(values, folder)[0][0]}
    assert sorted(reads) == sorted(map(str, (rows, weights))), "once for two notebooks and two points"
    assert sweep.plan(values, folder)[0][0] in seen
    for change in (
        lambda: rows.write_text('{"corrected": 1}\n'),
        lambda: weights.write_bytes(b"Weights"),
        lambda: weights.rename(weights.with_name("other.safetensors")),
        lambda: (scorer / "config.json").write_text("{}"),
    ):
        change()
        seen.add(sweep.plan(values, folder)[0][0])
    assert len(seen) == 5
    names = {"data_file": "owner/pairs", "model": "owner/model", "published_cost": ""}
    assert sweep.plan(values | {"parameters": names}, folder), "names at the hub are read by nobody here"


def test_estimates_of_a_pretrained_model_stand_beside_its_reward(tmp_path, monkeypatch):
    place = tmp_path / "a" / "20250101-000000"
    monkeypatch.setenv("CDPO_RUN_DIR", str(place))
    row = dict.fromkeys(record.METHOD_FIELDS) | dict(notebook="04_c_dpo", setting="smollm2", seed=0, split="test")
    row |= dict(feedback="learned", reward=1.0, cost=0.0, budget=0.0, violation=0.0)
    rows = [row | {"method": "reference"}, row | {"method": "c_dpo"}]
    tokens = [dict(method="c_dpo", estimate="tokens", mean=30.0, low=20.0, high=40.0),
              dict(method="c_dpo", estimate="safe", mean=0.5, low=0.4, high=0.6)]  # fmt: skip
    record.save_record("04_c_dpo", {}, rows, {"intervals": tokens})
    bench = [row | {"method": "c_dpo", "notebook": "05_dual_descent"}]
    record.save_record("05_dual_descent", {}, bench)
    run.summarise(place, run.read_records(place))
    rows = sweep.collect([("a", {"seed": 0}), ("not done", {"seed": 1})], tmp_path)
    assert rows.tokens.fillna(-1).tolist() == [-1, 30, -1] and rows.refusal.isna().all() and "safe" not in rows
    sweep.write_results(rows, tmp_path)
    assert pd.read_parquet(tmp_path / "results.parquet").tokens.fillna(-1).tolist() == [-1, 30, -1]
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    assert table.tokens["c_dpo"] == 30 and np.isnan(table.tokens["reference"]) and table["reward gain"].isna().all()


def test_there_is_a_plane_for_each_split(tmp_path):
    row = {"method": "c_dpo", "feedback": "learned", "grid.seed": 0} | dict.fromkeys(sweep.MEASURED + sweep.BESIDE, 1.0)
    sweep.write_results(pd.DataFrame([row | {"split": "train"}, row | {"split": "test"}]), tmp_path)
    assert {path.name for path in tmp_path.glob("plane*.png")} == {"plane-train.png", "plane-test.png"}


def test_means_over_seeds_by_hand():
    rows = pd.DataFrame(
        {"method": "c_dpo", "feedback": "learned", "split": "test", "grid.seed": [0, 1, 0], "grid.beta": [1, 1, 2]}
        | {name: [1.0, 3.0, 5.0] for name in sweep.MEASURED + sweep.BESIDE}
    )
    table = sweep.over_seeds(rows)
    assert table.n.tolist() == [2, 1] and table.cost.tolist() == [2.0, 5.0]
    assert table["cost ±"][0] == pytest.approx(12.7062) and np.isnan(table["cost ±"][1])  # t, 1 degree; sd / sqrt 2 = 1


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("caid", [f"'budget': -{b}.0" for b in range(3, 10)]),
        ("c_dpo", ["'lam_init': 0.4", "'lam_init': 1.0"]),
        ("pd_dpo", ["'lam_init': 5.0"]),
    ],
)
def test_the_grids_of_the_papers_are_understood(name, points, tmp_path, capsys):
    grid = record.repo_root() / "configs" / "papers" / f"{name}.yaml"
    assert sweep.main([str(grid), "--out", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split()[0] for line in lines}) == len(points), "runs of their own"
    assert [point in line for point, line in zip(points, lines, strict=True)] == [True] * len(points)
