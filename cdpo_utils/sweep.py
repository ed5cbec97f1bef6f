"""Sweeps over the notebooks' parameters: `python -m cdpo_utils.sweep GRID.yaml [--jobs N] [--slurm P] [--dry-run]`.

GRID.yaml:  only: [05]                       # notebooks, all where left out
            setting: bench                   # as for cdpo_utils.run
            parameters: {n_pairs: 60000}     # the same in every run
            grid: {seed: [0, 1, 2], budget: [0.0, -0.5]}     # every combination is a run

A run is a `cdpo_utils.run` of its own. Its folder is named by a digest of everything that decides its numbers:
parameters, the content of the files and model folders that they name, notebooks, package and library versions. What is
done is skipped, what was begun goes on (`run --resume`) and what is still going is waited for, so a sweep that was
killed loses nothing and repeats nothing. A run that failed and a Slurm job that was killed are tried once more. One
line a run is added to manifest.jsonl. At the end, or with `--collect` alone, the results of all runs that belong to the
grid become results.parquet, table.csv and plane.png, or plane-train.png and plane-test.png where there are both.

With `--slurm` each run is a job of that partition, through submitit; a sweep that is started again waits for jobs it
has submitted. submitit's job files, jobs/*.pkl in the sweep's folder, are Python objects that could run code where they
are read: they are on your own disk, written by your own sweep and its jobs, and nobody else's are ever read.

Exit status: 0 done, 1 a run failed or the disk was full, 2 not understood or not to be written, and nothing run, 130
interrupted.
"""

import argparse
import contextlib
import functools
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
BESIDE = ["tokens", "refusal", "reward gain", "cost change"]  # about pretrained models, see `real.Real.judge`
# A sweep that is started after this process's parent was killed finds the file held, or this process does nothing.
IN_A_PROCESS = """\
import os, pathlib, sys
from cdpo_utils import files, run
notebooks, held, parent, *arguments = sys.argv[1:]
with files.alone(pathlib.Path(held)):
    sys.exit(run.main(arguments, pathlib.Path(notebooks)) if os.getppid() == int(parent) else 1)
"""


def read_grid(file):
    """{only, setting, parameters, grid} of a grid file; raises run.NotUnderstood with one line."""
    values = {"only": [], "setting": "bench", "parameters": {}, "grid": {}} | run.read_yaml(file)
    for name in values:
        if name not in FIELDS:
            raise run.NotUnderstood(f"{file}: unknown field {name}; expected {', '.join(sorted(FIELDS))}")
    only = values["only"] if isinstance(values["only"], list) else [values["only"]]
    if not all(isinstance(item, str | int) for item in only) or not isinstance(values["setting"], str):
        raise run.NotUnderstood(f"{file}: expected only: [02, 05] and setting: a name")
    values["only"] = [str(item).zfill(2) for item in only]  # YAML reads 05 as a number
    for name in ("parameters", "grid"):
        if not isinstance(values[name], dict):
            raise run.NotUnderstood(f"{file}, field {name}: expected lines of `name: value`")
    for name, items in values["grid"].items():
        if not isinstance(items, list) or not items:
            raise run.NotUnderstood(f"{file}, field grid: {name} is {items!r}; expected a list of values, not empty")
        if len(set(map(repr, items))) < len(items):  # its mean over seeds would count one run twice
            raise run.NotUnderstood(f"{file}, field grid: {name} has a value twice; expected each once")
        if name in values["parameters"]:
            raise run.NotUnderstood(f"{file}: {name} is in parameters and in grid; expected it in one of them")
    return values


def plan(values, notebooks):
    """[(digest, point of the grid)], every name and value checked by the runner before anything runs."""
    sha256.cache_clear()
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
        read = [content(name, value) for given in named.values() for name, value in given.items()]
        text = json.dumps([values["setting"], named, read, common], sort_keys=True)
        planned.append((hashlib.sha256(text.encode()).hexdigest()[:16], point))
    return planned


@functools.cache  # a file that all points share is read once for a plan
def sha256(path):
    """Of a file's content; run.NotUnderstood where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise run.NotUnderstood(guard.disk(error)) from None


def content(name, value):
    """What a parameter's value does not say: digests of the data file, or of the files of the model's folder, that it
    names as its notebook sees them. None for any other value, such as a name at the hub."""
    path = record.repo_root() / str(value)  # where kernels run
    if name.endswith("_file") and path.is_file():
        return sha256(path)
    if value and (name == "model" or name.startswith("published_")) and path.is_dir():
        return [(str(p.relative_to(path)), sha256(p)) for p in sorted(path.rglob("*")) if p.is_file()]


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


def finished(folder, digest):
    """(folder, summary.json) of the newest whole run of a digest, or None. The runner writes the summary last, so where
    it is whole the run is done."""
    found = sorted((folder / digest).glob("[0-9]*/summary.json"), key=written)
    for path in reversed(found):
        with contextlib.suppress(OSError, ValueError):  # cut off, or something else
            if "methods" in (summary := json.loads(path.read_text(encoding="utf-8"))):
                return path.parent, summary


def written(path):
    """When a file was."""
    return path.stat().st_mtime


def sweep(values, planned, folder, notebooks, jobs, threads, call=None):
    """Run what is not done, `jobs` at a time of `threads` each; returns the entries of the runs that failed twice.

    call(digest, function, *arguments) runs `attempt` elsewhere, as `on_slurm` does.
    """
    call = call or (lambda _, function, *arguments: function(*arguments))
    noted = read_manifest(folder)
    for digest, point in planned:
        if noted.get(digest, {}).get("status") != "done" and finished(folder, digest):
            guard.scrub(folder / digest / "log.txt")
            note(folder, {"run": digest, "point": point, "status": "done"})  # killed before it could be noted
    open_runs = [(digest, point) for digest, point in planned if finished(folder, digest) is None]
    print(f"{len(planned)} runs, {len(planned) - len(open_runs)} done already", flush=True)
    lock, failed, ended = threading.Lock(), [], itertools.count(1)

    def one(digest, point):
        found = call(digest, attempt, values, digest, point, folder, notebooks, threads)
        entry = {"run": digest, "point": point, **found}
        with lock:
            note(folder, entry)
            failed.extend([entry] if entry["status"] == "failed" else [])
            print(f"[{next(ended)}/{len(open_runs)}] {entry['status']}  {point}  {entry['seconds']:.0f} s", flush=True)

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


def on_slurm(folder, partition, cpus, gpus=0, mem=None, hours=12, cluster="slurm"):
    """A `call` for `sweep`: each run a job of a Slurm partition, with `mem` GB. A job that was killed is submitted once
    more. Job numbers are kept beside the runs, so that a sweep which is started again waits for a job that is still
    going in place of submitting its twin."""
    import submitit  # the extra `slurm`

    logs, kind = folder / "jobs", submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    executor = submitit.AutoExecutor(logs, cluster=cluster)
    executor.update_parameters(
        cpus_per_task=cpus, gpus_per_node=gpus or None, mem_gb=mem, timeout_min=60 * hours, name="cdpo-sweep"
    )
    if cluster == "slurm":
        executor.update_parameters(slurm_partition=partition)
    for result in logs.glob("*_result.pkl"):  # of jobs that may have ended while no sweep was there to wait for them
        scrub_logs(kind(logs, result.name.split("_")[0]))

    def submit(number, function, *arguments):
        job = executor.submit(function, *arguments)
        number.parent.mkdir(exist_ok=True)
        files.write_whole(number, job.job_id)
        return job

    def call(digest, function, *arguments, tries=2):
        number = folder / digest / "job.txt"
        job = kind(logs, number.read_text()) if number.exists() else None
        if job is not None and job.done():
            scrub_logs(job)
            job = None
        for k in range(tries):
            try:
                job = job or submit(number, function, *arguments)
                found = job.result()
                return found | {"tries": k + found["tries"]}
            except OSError:  # a disk that is full
                raise
            except Exception as error:  # killed, out of time, its node lost, refused: one line in the manifest
                lines = guard.without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
                failure = (f"job {job.job_id}: " if job else "") + guard.visible(lines[-1])
            finally:
                if job is not None:
                    scrub_logs(job)
            job = None
        return {"status": "failed", "tries": tries, "seconds": 0.0, "error": failure}

    return call


def scrub_logs(job):
    """Take the secrets out of what a job of submitit, which has ended, has printed."""
    guard.scrub(job.paths.stdout)
    guard.scrub(job.paths.stderr)


def attempt(values, digest, point, folder, notebooks, threads, tries=2):
    """One run in a process of its own, again where it fails: {status, tries, seconds, error}. Output is in log.txt.

    What was begun before goes on. Where the process of a sweep that was killed is still at it, that is waited for.
    """
    place = folder / digest
    place.mkdir(exist_ok=True)
    given = place / "parameters.yaml"
    files.write_whole(given, json.dumps(run.absolute(values["parameters"] | point)))  # JSON is YAML
    anew = ["--setting", values["setting"], "--params", given, "--out", place]
    anew += ["--only", *values["only"]] if values["only"] else []
    start = time.perf_counter()
    for k in range(1, tries + 1):
        begun = wait_for_begun(place)
        if finished(folder, digest):
            guard.scrub(place / "log.txt")
            return {"status": "done", "tries": k - 1, "seconds": time.perf_counter() - start, "error": None}
        status = process(place, notebooks, threads, ["--resume", begun]) if begun else 2
        if status == 2:  # nothing to go on with, or it is refused: of other code, or damaged
            status = process(place, notebooks, threads, anew)
        if status == 0:
            return {"status": "done", "tries": k, "seconds": time.perf_counter() - start, "error": None}
    lines = (place / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    error = next((line for line in reversed(lines) if not line.startswith("see ")), f"exit status {status}")
    seconds = time.perf_counter() - start
    return {"status": "failed", "tries": tries, "seconds": seconds, "error": guard.visible(error)}


def process(place, notebooks, threads, arguments):
    """Exit status of `cdpo_utils.run` with `arguments`, in a process that holds the file held. Output is in log.txt."""
    command = [sys.executable, "-c", IN_A_PROCESS, notebooks, place / "held", os.getpid(), *arguments, "--no-report"]
    with open(place / "log.txt", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
    guard.scrub(place / "log.txt")
    return done.returncode


def wait_for_begun(place):
    """The newest folder of a run that was begun here, or None, once no other process is at it."""
    wait_for(place / "held")
    plan_ = max(place.glob("[0-9]*/plan.json"), key=written, default=None)
    if plan_ is None:
        return None
    wait_for(plan_)  # somebody may have resumed it by hand
    return plan_.parent


def wait_for(path):
    """Return when no process holds the file, see `files.alone`."""
    for looked in itertools.count():
        with contextlib.suppress(BlockingIOError), files.alone(path):
            return
        if looked == 0:
            print(f"{path.parent}: another process is running it, which is waited for", flush=True)
        time.sleep(1)


def collect(planned, folder):
    """Rows of all done runs of the grid, tidy: `record.method_row`s, what BESIDE names (None on the bench), and the
    point of the grid in columns `grid.*`."""
    rows = []
    for digest, point in planned:
        if found := finished(folder, digest):
            means = estimates(run.read_records(found[0]))
            of_run = {"run": digest} | {f"grid.{name}": value for name, value in point.items()}
            rows += [row | dict.fromkeys(BESIDE) | means.get((row["notebook"], row["method"]), {}) | of_run
                     for row in found[1]["methods"]]  # fmt: skip
    return pd.DataFrame(rows)


def estimates(records):
    """{(notebook, method): {estimate: mean}} of those in BESIDE."""
    means = {}
    for entry in records:
        for item in (entry["extra"] or {}).get("intervals", []):
            if item["estimate"] in BESIDE:
                means.setdefault((entry["notebook"], item["method"]), {})[item["estimate"]] = item["mean"]
    return means


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
        for name in MEASURED + BESIDE:
            values = group[name].astype(float).dropna()
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
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of a Slurm job (default: none)")
    parser.add_argument("--mem", type=int, metavar="GB", help="memory of a Slurm job (default: the partition's)")
    parser.add_argument("--hours", type=int, default=12, metavar="N", help="time limit of a Slurm job (default: 12)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--collect", action="store_true", help="run nothing, gather what is done")
    args = parser.parse_args(argv)
    notebooks = notebooks or record.repo_root() / "notebooks"
    try:
        for name, least in {"jobs": 1, "cpus": 1, "gpus": 0, "mem": 1, "hours": 1}.items():
            if (value := vars(args)[name]) is not None and value < least:
                raise run.NotUnderstood(f"--{name} {value}: expected {least} or more")
        if not args.slurm and (args.gpus or args.mem):
            raise run.NotUnderstood("--gpus and --mem are of Slurm jobs; expected --slurm PARTITION beside them")
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
            print(f"{digest}  {'done' if finished(folder, digest) else 'to run'}  {point}")
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        run.complain(guard.disk(error))
        return 2
    try:
        with contextlib.nullcontext() if args.collect else run.alone(folder / "manifest.jsonl"):
            call = on_slurm(folder, args.slurm, args.cpus, args.gpus, args.mem, args.hours) if args.slurm else None
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
        os._exit(130)  # threads that wait for jobs or runs would keep the interpreter for hours, or try again
    for entry in failed:
        print(f"failed: {entry['point']}: {entry['error']}; see {folder / entry['run'] / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def write_results(rows, folder):
    """results.parquet and, where costs are single numbers, table.csv and a plane for each split."""
    if rows.empty:
        print("nothing to collect: no run of this grid is done")
        return
    from cdpo_utils import plots  # matplotlib takes seconds: only when there is something to draw

    lists = rows.map(lambda value: isinstance(value, list)).any(axis=1)
    if lists.any():
        print(f"{lists.sum()} rows with several constraints are left out of the table and the figure")
    parquet = rows.map(lambda v: json.dumps(v) if isinstance(v, list) else v).to_parquet()
    files.write_whole(folder / "results.parquet", parquet)
    if not lists.all():
        table = over_seeds(rows[~lists])
        guard.write_csv(table, folder / "table.csv")
        for split, part in table.groupby("split"):
            figure, ax = plots.plt.subplots(figsize=(7, 4.5))
            plots.sweep_plane(ax, part)
            plots.save(figure, folder / ("plane" if len(part) == len(table) else f"plane-{split}"))
        print(f"\n{table.dropna(axis=1, how='all').round(3).to_string(index=False)}")
    print(f"\n{folder / 'results.parquet'}")


if __name__ == "__main__":
    sys.exit(main())
