"""Sweeps over the notebooks' parameters: `python -m cdpo_utils.sweep GRID.yaml [--jobs N] [--slurm P] [--dry-run]`.

GRID.yaml:  only: [05]                       # notebooks, all where left out
            setting: bench                   # as for cdpo_utils.run
            parameters: {n_pairs: 60000}     # the same in every run
            grid: {seed: [0, 1, 2], budget: [0.0, -0.5]}     # every combination is a run

A run is a `cdpo_utils.run` of its own. Its folder is named by a digest of everything that decides its numbers:
parameters, notebooks, package and library versions. What is done is skipped, so a sweep that was killed goes on where
it was. A failed run is tried once more (a Slurm job that was killed is not). One line a run is added to manifest.jsonl.
With `--slurm` each run is a job of that partition, through submitit; a sweep that is started again waits for jobs it
has submitted. At the end, or with `--collect` alone, the results of all runs that belong to the grid become
results.parquet, table.csv and plane.png.

Exit status: 0 done, 1 a run failed or the disk was full, 2 not understood or not to be written, and nothing run, 130
interrupted.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from cdpo_utils import files, guard, record, run

FIELDS = {"only", "setting", "parameters", "grid"}
MEASURED = ["reward", "cost", "violation", "kl_ref", "gap"]
IN_A_PROCESS = (
    "import sys, pathlib; from cdpo_utils import run; sys.exit(run.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
)


def read_grid(file):
    """{only, setting, parameters, grid} of a grid file; raises run.NotUnderstood with one line."""
    values = {"only": [], "setting": "bench", "parameters": {}, "grid": {}} | run.read_yaml(file)
    for name in values:
        if name not in FIELDS:
            raise run.NotUnderstood(f"{file}: unknown field {name}; expected {', '.join(sorted(FIELDS))}")
    values["only"] = [str(item).zfill(2) for item in np.atleast_1d(values["only"])]  # YAML reads 05 as a number
    for name in ("parameters", "grid"):
        if not isinstance(values[name], dict):
            raise run.NotUnderstood(f"{file}, field {name}: expected lines of `name: value`")
    for name, items in values["grid"].items():
        if not isinstance(items, list) or not items:
            raise run.NotUnderstood(f"{file}, field grid: {name} is {items!r}; expected a list of values, not empty")
    return values


def plan(values, notebooks):
    """[(digest, point of the grid)], every name and value checked by the runner before anything runs."""
    chosen = run.select(notebooks, values["only"], values["setting"])
    names, lists = list(values["grid"]), values["grid"].values()
    points = [dict(zip(names, point, strict=True)) for point in itertools.product(*lists)]
    # the source says more than the commit, and a cluster's nodes differ
    left_out = ("commit", *record.MACHINE)
    versions = {name: value for name, value in record.versions().items() if name not in left_out}
    common = [record.source_hash(), versions, [path.read_text(encoding="utf-8") for path, _ in chosen]]
    planned = []
    for point in points:
        parameters = run.plan(chosen, run.absolute(values["parameters"] | point))
        named = {path.stem: given for path, given in parameters.items()}
        text = json.dumps([values["setting"], named, common], sort_keys=True)
        planned.append((hashlib.sha256(text.encode()).hexdigest()[:16], point))
    return planned


def read_manifest(folder):
    """{digest: last entry} of manifest.jsonl. A last line that was cut off by a kill is left out."""
    entries = {}
    path = folder / "manifest.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            entries[entry["run"]] = entry
        except (ValueError, LookupError, TypeError):
            continue
    return entries


def summary_of(folder, digest):
    """The newest summary.json of a run, or None. The runner writes it last, so where it is whole the run is done."""
    found = sorted((folder / digest).glob("[0-9]*/summary.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(path.read_text(encoding="utf-8"))


def sweep(values, planned, folder, notebooks, jobs, threads, call=None):
    """Run what is not done, `jobs` at a time of `threads` each; returns the entries of the runs that failed twice.

    call(digest, function, *arguments) runs `attempt` elsewhere, as `on_slurm` does.
    """
    call = call or (lambda _, function, *arguments: function(*arguments))
    noted = read_manifest(folder)
    for digest, point in planned:
        if noted.get(digest, {}).get("status") != "done" and summary_of(folder, digest):
            note(folder, {"run": digest, "point": point, "status": "done"})  # killed before it could be noted
    open_runs = [(digest, point) for digest, point in planned if summary_of(folder, digest) is None]
    print(f"{len(planned)} runs, {len(planned) - len(open_runs)} done already", flush=True)
    lock, failed, finished = threading.Lock(), [], itertools.count(1)

    def one(digest, point):
        found = call(digest, attempt, values, digest, point, folder, notebooks, threads)
        entry = {"run": digest, "point": point, **found}
        with lock:
            note(folder, entry)
            failed.extend([entry] if entry["status"] == "failed" else [])
            print(
                f"[{next(finished)}/{len(open_runs)}] {entry['status']}  {point}  {entry['seconds']:.0f} s", flush=True
            )

    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(lambda item: one(*item), open_runs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # all are done, or an interrupt must not wait for jobs
    return failed


def note(folder, entry):
    """Add a line to the manifest, on the disk before this returns. A line that a kill cut off is ended first."""
    path = folder / "manifest.jsonl"
    cut = path.exists() and not (b"\n" + path.read_bytes()).endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def on_slurm(folder, partition, cpus, hours=12, cluster="slurm"):
    """A `call` for `sweep`: each run a job of a Slurm partition. Job numbers are kept beside the runs, so that a sweep
    which is started again waits for a job that is still going in place of submitting its twin."""
    import submitit  # the extra `slurm`

    logs, kind = folder / "jobs", submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    executor = submitit.AutoExecutor(logs, cluster=cluster)
    executor.update_parameters(cpus_per_task=cpus, timeout_min=60 * hours, name="cdpo-sweep")
    if cluster == "slurm":
        executor.update_parameters(slurm_partition=partition)

    def call(digest, function, *arguments):
        number = folder / digest / "job.txt"
        job = kind(logs, number.read_text()) if number.exists() else None
        if job is None or job.done():
            job = executor.submit(function, *arguments)
            number.parent.mkdir(exist_ok=True)
            files.write_whole(number, job.job_id)
        try:
            return job.result()
        except Exception as error:  # killed, out of time, its node lost: one line in the manifest
            lines = guard.without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
            error = f"job {job.job_id}: {guard.visible(lines[-1])}"
            return {"status": "failed", "tries": 1, "seconds": 0.0, "error": error}

    return call


def attempt(values, digest, point, folder, notebooks, threads, tries=2):
    """One run in a process of its own, again where it fails: {status, tries, seconds, error}. Output is in log.txt."""
    place = folder / digest
    place.mkdir(exist_ok=True)
    given = place / "parameters.yaml"
    files.write_whole(given, json.dumps(run.absolute(values["parameters"] | point)))  # JSON is YAML
    command = [sys.executable, "-c", IN_A_PROCESS, str(notebooks), "--setting", values["setting"]]
    command += ["--params", str(given), "--out", str(place), "--no-report"]
    command += ["--only", *values["only"]] if values["only"] else []
    start = time.perf_counter()
    for k in range(1, tries + 1):
        with open(place / "log.txt", "w", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        guard.scrub(place / "log.txt")
        if done.returncode == 0:
            return {"status": "done", "tries": k, "seconds": time.perf_counter() - start, "error": None}
    lines = (place / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    error = next((line for line in reversed(lines) if not line.startswith("see ")), f"exit status {done.returncode}")
    seconds = time.perf_counter() - start
    return {"status": "failed", "tries": tries, "seconds": seconds, "error": guard.visible(error)}


def collect(planned, folder):
    """Rows of all done runs of the grid, tidy: `record.method_row`s with the point of the grid in columns `grid.*`."""
    rows = []
    for digest, point in planned:
        summary = summary_of(folder, digest) or {"methods": []}
        rows += [row | {"run": digest} | {f"grid.{name}": value for name, value in point.items()}
                 for row in summary["methods"]]  # fmt: skip
    return pd.DataFrame(rows)


def half_width(values, confidence=0.95):
    """Half the width of Student's t interval around the mean of `values` (n,), a Series; NaN for a single one."""
    n = len(values)
    return student.ppf((1 + confidence) / 2, n - 1) * values.std() / n**0.5 if n > 1 else np.nan


def over_seeds(rows, confidence=0.95):
    """Mean and half-width of Student's t interval over seeds, for each method and point of the grid; n is how many."""
    by = ["method", "feedback", "split", *sorted(c for c in rows if c.startswith("grid.") and c != "grid.seed")]
    table = []
    for key, group in rows.groupby(by, sort=False, dropna=False):
        line = dict(zip(by, key, strict=True)) | {"n": len(group)}
        for name in MEASURED:
            values = group[name].astype(float)
            line[name] = values.mean()
            line[f"{name} ±"] = half_width(values, confidence)
        table.append(line)
    return pd.DataFrame(table)


def main(argv=None, notebooks=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.sweep", description="Run the notebooks over a grid.")
    parser.add_argument("grid", type=Path, help="YAML: only, setting, parameters, grid")
    parser.add_argument("--out", type=Path, help="folder of the sweep (default: runs/sweeps/<name of the grid file>)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--slurm", metavar="PARTITION", help="one Slurm job a run, all at once, each with --cpus")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="cores of a Slurm job")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--collect", action="store_true", help="run nothing, gather what is done")
    args = parser.parse_args(argv)
    notebooks = notebooks or record.repo_root() / "notebooks"
    try:
        if min(args.jobs, args.cpus) < 1:
            raise run.NotUnderstood(f"--jobs {args.jobs}, --cpus {args.cpus}: expected 1 or more")
        if args.slurm and not find_spec("submitit"):
            raise run.NotUnderstood('--slurm needs submitit: pip install -e ".[slurm]"')
        if args.slurm and not shutil.which("sbatch"):
            raise run.NotUnderstood("--slurm: no sbatch here; expected a login node of a Slurm cluster")
        values = read_grid(args.grid)
        planned = plan(values, notebooks)
        if not args.out and args.grid.stem in (".", ".."):  # of the file names `..yaml` and `...yaml`
            raise run.NotUnderstood(f"{args.grid}: names no folder in runs/sweeps; expected another name, or --out DIR")
    except run.NotUnderstood as error:
        run.complain(error)
        return 2
    folder = (args.out or record.repo_root() / "runs" / "sweeps" / args.grid.stem).absolute()
    if args.dry_run:
        for digest, point in planned:
            print(f"{digest}  {'done' if summary_of(folder, digest) else 'to run'}  {point}")
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        run.complain(guard.disk(error))
        return 2
    try:
        with contextlib.nullcontext() if args.collect else run.alone(folder / "manifest.jsonl"):
            call = on_slurm(folder, args.slurm, args.cpus) if args.slurm else None
            jobs = len(planned) if args.slurm else args.jobs
            threads = args.cpus if args.slurm else max(1, (os.cpu_count() or 1) // jobs)
            failed = [] if args.collect else sweep(values, planned, folder, notebooks, jobs, threads, call)
            write_results(collect(planned, folder), folder)
    except run.NotUnderstood as error:
        run.complain(error)
        return 2
    except OSError as error:
        run.complain(f"{guard.disk(error)}; the same command goes on")
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on\nsee {folder}", file=sys.stderr, flush=True)
        if args.slurm:
            os._exit(130)  # threads that wait for jobs would keep the interpreter for hours
        return 130
    for entry in failed:
        print(f"failed: {entry['point']}: {entry['error']}; see {folder / entry['run'] / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def write_results(rows, folder):
    """results.parquet, table.csv and, where costs are single numbers, plane.png."""
    if rows.empty:
        print("nothing to collect: no run of this grid is done")
        return
    from cdpo_utils import plots  # matplotlib takes seconds: only when there is something to draw

    lists = rows.map(lambda value: isinstance(value, list)).any(axis=1)
    if lists.any():
        print(f"{lists.sum()} rows with several constraints are left out of the table and the figure")
    parquet = rows.map(lambda v: json.dumps(v) if isinstance(v, list) else v).to_parquet()
    files.write_whole(folder / "results.parquet", parquet)
    table = over_seeds(rows[~lists])
    guard.write_csv(table, folder / "table.csv")
    figure, ax = plots.plt.subplots(figsize=(7, 4.5))
    plots.sweep_plane(ax, table[table.split == table.split.iloc[-1]])
    plots.save(figure, folder / "plane")
    print(f"\n{table.round(3).to_string(index=False)}\n\n{folder / 'results.parquet'}")


if __name__ == "__main__":
    sys.exit(main())
