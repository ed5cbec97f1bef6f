"""Run the notebook series: `python -m cdpo_utils.run --help`.

Each run gets a folder of its own, runs/<time>/, with the executed notebooks, their records, summary.json and an HTML
report; runs/latest leads to the newest complete one. A run that was killed goes on with --resume runs/<time>: notebooks
that were done are not run again; in the one that was interrupted dual loops go on after their last whole round, and
plain DPO trainings that had ended are not repeated.
Exit status: 0 done, 1 a notebook failed or the disk was full, 2 not understood or not to be written, and nothing run,
130 interrupted.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from cdpo_utils import data, files, guard, progress, ranges, record, report

KINDS = {"bool": bool, "int": int, "float": float, "str": str}
RULE = ("pattern", "words", "classifier", "label")  # of `own.cost_of`
LONGEST_FOLDER = 75  # of sockets: their whole names may have 104 characters, of which some 20 are the kernel's
# what reading a file of JSON raises that is not what was written there
UNREADABLE_JSON = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class NotUnderstood(Exception):
    """A request that cannot be carried out as typed; nothing has been run."""


class NotebookFailed(Exception):
    """A notebook stopped; the message says where and why."""


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.run", description="Run the notebooks in order.")
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="NN",
                        help="these notebooks only: 02,05 or 02 05")  # fmt: skip
    parser.add_argument("--setting", default="bench", help="bench (the notebooks' own defaults), or a setting of "
                        "notebooks/params/<setting>.yaml, such as smollm2")  # fmt: skip
    parser.add_argument("--params", metavar="FILE", type=Path, help="YAML of name: value, for every notebook with it")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs",
                        help="one parameter, for every notebook that has it; goes before --params")  # fmt: skip
    parser.add_argument("--seed", type=int, help="the same as -p seed N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to keep runs in (default: runs)")
    parser.add_argument("--no-report", action="store_true", help="no HTML pages")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with this run's folder, as it was begun")
    return parser.parse_args(argv)


def begin(args, notebooks):
    """A new run as its arguments say, or the one to be resumed: (folder, {notebook: parameters}).

    The plan is kept in the folder, with a digest of the code and the notebooks that it is for.
    """
    code = code_digest(notebooks)
    if args.resume:
        if args.only or args.pairs or args.params or args.seed is not None or args.setting != "bench" or args.out:
            raise NotUnderstood("--resume goes on as the run was begun; expected no parameters beside it")
        folder = args.resume.absolute()
        try:
            plan_ = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            parameters = {guard.inside(notebooks, name): dict(values) for name, values in plan_["parameters"].items()}
            begun_with = plan_["code"]
        except UNREADABLE_JSON as error:
            raise no_run(args.resume, error) from None
        if begun_with != code:
            raise NotUnderstood(f"--resume {args.resume}: begun with other code or notebooks; start a new run")
        return folder, parameters
    only = [item for group in args.only for item in group.split(",") if item]
    if args.only and not only:
        raise NotUnderstood(f"--only {' '.join(args.only)}: no notebook; expected some, such as 02,05")
    typed = [name for name, _ in args.pairs] + ["seed"] * (args.seed is not None)
    if twice := [name for name in dict.fromkeys(typed) if typed.count(name) > 1]:
        raise NotUnderstood(f"parameter {twice[0]} is given twice; expected one value")
    chosen = select(notebooks, only, args.setting)
    given = read_yaml(args.params) if args.params else {}
    given |= {} if args.seed is None else {"seed": args.seed}
    parameters = plan(chosen, absolute(given | dict(args.pairs)))
    require_ready(parameters)
    folder = new_folder((args.out or record.repo_root() / "runs").absolute())
    begun = {"code": code, "parameters": {path.name: v for path, v in parameters.items()}}
    files.write_whole(folder / "plan.json", json.dumps(begun, indent=1))
    return folder, parameters


def require_ready(parameters):
    """NotUnderstood where a rule of one's own, a pretrained model, its files, scorers or judge are not what a notebook
    needs."""
    values = {name: value for given in parameters.values() for name, value in given.items()}
    for path, given in parameters.items():
        if given.keys() & set(RULE):
            require_rule(path, given)
    if not values.get("model"):
        return
    if values.get("judge", "").startswith("http") and not values.get("judge_name"):
        raise NotUnderstood("judge at a URL without judge_name; expected the name of a model there")
    from cdpo_utils import real  # torch and transformers take seconds: not for the bench

    asked = {name: values[name] for name in inspect.signature(real.ready).parameters.keys() & values.keys()}
    tokens = 2 * values.get("steps", 0) * values.get("batch_size", 0) * values.get("max_length", 0)
    try:
        print(real.ready(**asked, tokens=tokens)[-1], flush=True)
    except data.DataError as error:
        raise NotUnderstood(str(error)) from None


def require_rule(path, given):
    """NotUnderstood for parameters of notebook 08 that no cost can be made of."""
    from cdpo_utils import own

    known = papermill.inspect_notebook(path)
    try:
        own.cost_of(**{name: given.get(name, ast.literal_eval(known[name]["default"])) for name in RULE})
    except ValueError as error:
        raise NotUnderstood(str(error)) from None


def code_digest(notebooks):
    """Of the package and of a folder of notebooks."""
    code = hashlib.sha256(record.source_hash().encode())
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        code.update(path.read_bytes())
    return code.hexdigest()


def no_run(folder, error):
    """NotUnderstood, which says what is wrong with a folder that was to be gone on with."""
    reason = f"{type(error).__name__}: {guard.one_line(error)}"
    return NotUnderstood(f"--resume {folder}: {reason}; expected the folder of a run")


def done_before(folder, parameters):
    """{name: seconds} of the notebooks of a run that are done, whose folder this process holds."""
    try:
        done = folder / "done.json"
        seconds = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
        seconds = {path.stem: float(seconds[path.stem]) for path in parameters if path.stem in seconds}
    except UNREADABLE_JSON as error:
        raise no_run(folder, error) from None
    return {stem: taken for stem, taken in seconds.items() if whole(folder, stem)}


@contextlib.contextmanager
def alone(path):
    """Hold a file for this process; NotUnderstood where another one has it, or it cannot be written."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.alone(path))
        except BlockingIOError:
            raise NotUnderstood(f"{path.parent}: another process is running it") from None
        except OSError as error:
            raise NotUnderstood(guard.disk(error)) from None
        yield


def whole(folder, stem):
    """Whether what a notebook has left in a run's folder can be read."""
    kept = folder / "records" / f"{stem}.json"
    try:
        nbformat.read(folder / f"{stem}.ipynb", as_version=4)
        return not kept.exists() or isinstance(json.loads(kept.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def select(folder, only, setting):
    """[(notebook, parameter file of the setting or None)] in reading order."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    names = {name: path for path in paths for name in (path.stem, path.name, path.stem[:2])}
    for item in only:
        if item not in names:
            raise NotUnderstood(f"--only {item}: no such notebook; there are {', '.join(p.stem for p in paths)}")
    chosen = [path for path in paths if not only or path in [names[item] for item in only]]
    if not chosen:
        raise NotUnderstood(f"no notebooks in {folder}")
    if setting == "bench":
        return [(path, None) for path in chosen]
    files = {found.stem: found for found in folder.glob("params/*.yaml")}
    if setting not in files:
        raise NotUnderstood(f"--setting {setting}: no such setting; settings: {', '.join(sorted({*files, 'bench'}))}")
    file = files[setting]
    values, known = read_yaml(file), {path: papermill.inspect_notebook(path) for path in paths}
    refuse_unknown(values, {name for names in known.values() for name in names}, f"notebook, in {file},")
    needed = {"model"} & values.keys() or values.keys()  # a setting of a model is nothing for notebooks without one
    fitting = [path for path in chosen if needed & known[path].keys()]
    if not fitting:
        raise NotUnderstood(f"--setting {setting}: none of these notebooks has parameters for it")
    for path in chosen:
        if path not in fitting:
            print(f"skipped {path.stem}: not available in the setting {setting}")
    return [(path, file) for path in fitting]


def read_yaml(file):
    """A file of `name: value` lines."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, NUL in its name
        raise NotUnderstood(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise NotUnderstood(f"{file}: expected lines of `name: value`")
    return values


def absolute(values):
    """Files and folders of models are named as seen from where the command was typed; the kernels run elsewhere. Names
    at the hub, and the short ones of `real.HUB`, stay."""
    texts = {name: v for name, v in values.items() if isinstance(v, str) and v}
    here = {name: v for name, v in texts.items() if str(name).endswith("_file") and not data.is_hub_name(v)}
    for name in ("model", "judge", "published_reward", "published_cost", "classifier"):
        if (value := texts.get(name)) and os.path.isdir(os.path.expanduser(value)):
            from cdpo_utils import real  # torch and transformers take seconds

            if value not in (*real.HUB, "base"):
                here[name] = value
    return values | {name: os.path.abspath(os.path.expanduser(value)) for name, value in here.items()}


def coerce(value, default, annotation):
    """`value`, typed or from YAML, as the type of a notebook's parameter; ValueError says what was expected.

    YAML 1.1 reads 1e-5 as text, and papermill would pass it on as such.
    """
    annotation = annotation.replace(" ", "")
    inner = annotation.removeprefix("Optional[")
    if value in (None, "null", "None") and (default is None or inner != annotation):
        return None
    if isinstance(default, list | tuple) or inner.startswith(("list", "tuple")):
        return _coerce_list(value, default, inner)
    kind = KINDS.get(inner.rstrip("]"), str if default is None else type(default))
    if kind in (int, float):
        return _coerce_number(value, kind)
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is not {'true or false' if kind is bool else f'a {kind.__name__}'}")
    return value


def _coerce_number(value, kind):
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | kind):
            raise ValueError
        number = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not {'an integer' if kind is int else 'a number'}") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def _coerce_list(value, default, annotation):
    with contextlib.suppress(yaml.YAMLError):
        value = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is not a list, such as [1, 2]")
    item_type = annotation.partition("[")[2].split(",")[0].rstrip("]")
    if not item_type and not default:
        return list(value)
    return [coerce(item, default[0] if default else None, item_type) for item in value]


def plan(chosen, given):
    """{notebook: parameters to inject}, every name and value checked before anything runs."""
    known = {path: papermill.inspect_notebook(path) for path, _ in chosen}
    refuse_unknown(given, {name for names in known.values() for name in names}, "selected notebook")
    parameters = {}
    for path, file in chosen:
        own = read_yaml(file) if file else {}
        parameters[path] = {}
        for name, value in (own | given).items():
            if name in known[path]:
                if isinstance(value, str | list) and guard.without_secrets(value) != value:
                    raise NotUnderstood(f"parameter {name}: holds a password or key, which would be kept in runs/; "
                                        "expected none (a judge's key comes from the environment)")  # fmt: skip
                spec = known[path][name]
                try:
                    default = ast.literal_eval(spec["default"])
                    parameters[path][name] = coerce(value, default, spec["inferred_type_name"])
                    ranges.require(name, parameters[path][name])
                except ValueError as error:
                    raise NotUnderstood(f"parameter {name} of {path.stem}: {error}") from error
    return parameters


def refuse_unknown(names, known, where):
    # papermill only warns, and the run goes on with the default
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=3, cutoff=0)
            raise NotUnderstood(f"unknown parameter {name}: no {where} has it; the nearest are {', '.join(near)}")


def new_folder(out):
    """A folder that did not exist before, named by the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{n}" for n in range(2, 100))]:
        with contextlib.suppress(FileExistsError):
            (out / (stamp + suffix)).mkdir(parents=True)
            return out / (stamp + suffix)
    raise NotUnderstood(f"no free name for a new folder in {out}")


@contextlib.contextmanager
def environment(**values):
    """Environment variables for the kernels, put back afterwards."""
    before = os.environ.copy()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(path, parameters, folder, label):
    """Run one notebook into `folder` and return the seconds it took."""
    start = time.perf_counter()
    output = folder / path.name
    try:
        with told(folder, label):
            papermill.execute_notebook(
                path,
                output,
                parameters=parameters,
                kernel_name="python3",
                cwd=record.repo_root(),
                start_timeout=300,  # a loaded machine
                extra_arguments=["--log-level=CRITICAL"],  # else each kernel warns that it listens on a local port
                progress_bar=False,
                config=Config({"KernelManager": connection()}),
            )
    except PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        where = f"{path.name}, {place(path, error.source)}: {first}"
        raise NotebookFailed(f"{where}\n{error.ename}: {error.evalue}\nsee {output}") from error
    except DeadKernelError as error:
        # its last word, and with it In [n], may be lost; papermill's own clock is not
        cells = nbformat.read(output, as_version=4).cells
        where = [place(path, cell.source) for cell in cells if cell.metadata.papermill.start_time]
        reason = "the kernel died (out of memory?)"
        raise NotebookFailed(f"{path.name}, {where[-1]}: {reason}\nsee {output}") from error
    except OSError as error:  # of a full disk, in the middle of writing
        raise error if error.filename else files.named(error, output) from None
    finally:
        guard.scrub(output)
    return time.perf_counter() - start


def connection():
    """How a new kernel is spoken to: by sockets in the folder of temporary files, since of two runs that begin at once
    both may be given the same port; by ports where the system has no such sockets, or their names would be too long."""
    if os.name != "posix" or len(tempfile.gettempdir()) > LONGEST_FOLDER:
        return {"transport": "tcp"}
    return {"transport": "ipc", "ip": f"{tempfile.gettempdir()}/cdpo-{uuid.uuid4().hex[:12]}"}


class Scrubbed(papermill.iorw.LocalHandler):
    """Papermill saves a notebook after each cell: without secrets each time, for a process may be killed in between."""

    def write(self, buf, path):
        super().write(guard.without_secrets(buf), path)


@contextlib.contextmanager
def told(folder, label):
    """Meanwhile, on one line of a terminal: how long it has been, and where the dual loops of the run are."""
    stop, start = threading.Event(), time.perf_counter()

    def tell():
        while not stop.wait(progress.EVERY):
            seconds = report.minutes(time.perf_counter() - start)
            loops = guard.visible(progress.lines(folder / "progress"))
            print(progress.terminal_line(f"{label}  {seconds}  {loops}"), end="", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    if sys.stderr.isatty():
        teller.start()
    try:
        yield
    finally:
        stop.set()
        if teller.is_alive():
            teller.join()
            print(progress.terminal_line(""), end="", file=sys.stderr, flush=True)


def place(path, source):
    """Where a cell stands in the notebook as it is in notebooks/: papermill counts the cells it added itself."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    return f"cell {sources.index(source) + 1} of {len(sources)}" if source in sources else "injected parameters"


def read_records(folder):
    """The records of a run, in the order of its notebooks."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("records/*.json"))]


def summarise(folder, records):
    """Collect the records of a run into summary.json, and return it."""
    summary = {
        "schema": 1,
        "versions": records[-1]["versions"] if records else record.versions(),
        "parameters": {r["notebook"]: r["parameters"] for r in records},
        "methods": [row for r in records for row in r["methods"]],
        # of estimates by sampled answers, lengths and refusals among them: none on the bench, which is exact
        "intervals": [
            {"notebook": r["notebook"], **line} for r in records for line in (r["extra"] or {}).get("intervals", [])
        ],
        # rows of notebook 07 with fields of their own (knob, optimiser steps, labels, answers); paths are in its record
        "equal_terms": [
            {name: value for name, value in row.items() if name != "path"}
            for r in records
            for row in (r["extra"] or {}).get("equal", [])
        ],
    }
    text = json.dumps(summary, indent=1, allow_nan=False)
    files.write_whole(folder / "summary.json", text + "\n")
    return summary


def point_latest(folder):
    """runs/latest leads to `folder`; where links are not to be had, latest.txt holds its name."""
    link = folder.parent / f"latest.{os.getpid()}"
    try:
        link.symlink_to(folder.name, target_is_directory=True)
        os.replace(link, folder.parent / "latest")
    except OSError:
        link.unlink(missing_ok=True)
        files.write_whole(folder.parent / "latest.txt", folder.name + "\n")


def complain(error):
    """Print an error, whose lines may hold what a notebook read in a file."""
    print(guard.visible(guard.without_secrets(str(error)), keep="\n"), file=sys.stderr)


def main(argv=None, notebooks=None):
    """The command line; `notebooks` is the folder they are in. Returns the exit status."""
    args = parse(argv)
    try:
        folder, parameters = begin(args, notebooks or record.repo_root() / "notebooks")
    except OSError as error:  # a disk that is full or read-only: nothing has run
        complain(guard.disk(error))
        return 2
    except NotUnderstood as error:
        complain(error)
        return 2
    try:
        with alone(folder / "plan.json"):
            return _run(args, folder, parameters, done_before(folder, parameters))
    except NotUnderstood as error:
        complain(error)
        return 2
    except OSError as error:
        complain(f"{guard.disk(error)}; --resume {folder} goes on")
        return 1


def _run(args, folder, parameters, seconds):
    """Execute what is not done yet, then gather the records; the exit status."""
    # two warnings of libraries about each other, which would put this machine's paths into the executed notebooks
    ignored = "ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated"
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": ignored}
    if sys.stderr.isatty():
        quiet[progress.FOLDER] = str(folder / "progress")
    papermill.iorw.papermill_io.register(str(folder), Scrubbed())
    with environment(CDPO_RUN_DIR=str(folder), **quiet):
        for i, path in enumerate(parameters, start=1):
            label = f"[{i}/{len(parameters)}] {path.stem}"
            if path.stem in seconds:
                print(f"{label}  done before", flush=True)
                continue
            shutil.rmtree(folder / "progress", ignore_errors=True)  # lines of processes that were killed
            try:
                seconds[path.stem] = execute(path, parameters[path], folder, label)
            except NotebookFailed as error:
                complain(error)
                return 1
            except KeyboardInterrupt:
                print(f"interrupted in {path.name}; --resume {folder} goes on", file=sys.stderr)
                return 130
            files.write_whole(folder / "done.json", json.dumps(seconds, indent=1))
            print(f"{label}  {report.minutes(seconds[path.stem])}", flush=True)

    shutil.rmtree(folder / "progress", ignore_errors=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: a notebook may train what an earlier one has
    records = read_records(folder)
    summary = summarise(folder, records)
    rows = report.with_intervals(summary["methods"], summary["intervals"])
    page = (
        None
        if args.no_report
        else report.write_html(folder, seconds, rows, summary["versions"], summary["equal_terms"])
    )
    point_latest(folder)
    print(f"\n{report.text_table(rows)}\n\n{page or folder / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
