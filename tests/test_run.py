"""The runner, on throw-away notebooks of a few lines."""

import ast
import json
import random
import signal
import subprocess
import sys
import time

import nbformat
import papermill
import pytest
from nbformat import v4

from cdpo_utils import claims, comparison, online, ranges, record, run
from cdpo_utils.record import METHOD_FIELDS

PARAMETERS = """\
seed: int = 0  # every random draw
lr: float = 0.1  # step
fast: bool = False  # a flag
budgets: list[float] = [0.1, 0.2]  # one per constraint
data_file: str = ""  # pairs
"""
SHOW = "print('<script>x</script>')\nassert isinstance(lr, float)"
FIGURE = """\
import base64
picture = {"image/png": base64.b64encode(b"not really").decode()}
display(picture, metadata={"image/png": {"alt": "cost falls to the budget"}}, raw=True)
"""
RECORD = """\
from cdpo_utils.record import METHOD_FIELDS, save_record
row = dict.fromkeys(METHOD_FIELDS) | dict(method="reference", notebook="01_first", setting="<script>", seed=seed)
row |= dict(feedback="oracle", split="test", lam=[0.0, 1.5], cost=[0.25, 0.5], gap=100.0, reward=1.0)
parameters = dict(seed=seed, lr=lr, fast=fast, budgets=budgets, data_file=data_file)
equal = dict(method="sacpo", knob="lam 0.6", gap=1.5, gap_test=2.5, path=[[0.5, 1.0, 0.0]], labels=7, answers=0)
equal |= dict.fromkeys(("mass", "lam", "reward", "cost", "violation", "seconds"), 0.25)
tokens = dict(method="reference", estimate="tokens", mean=12.0, low=11.0, high=13.0)
save_record("01_first", parameters, [row], {"equal": [equal], "intervals": [tokens]})
"""


def write(path, *cells, parameters):
    """A notebook of a title, one parameters cell and these code cells."""
    tagged = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    cells = [
        v4.new_markdown_cell(f"# The <script>title</script> of {path.stem}"),
        tagged,
        *map(v4.new_code_cell, cells),
    ]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A folder of two notebooks, the second with parameters for another setting."""
    folder = tmp_path_factory.mktemp("series") / "notebooks"
    write(folder / "01_first.ipynb", SHOW, FIGURE, RECORD, parameters=PARAMETERS)
    write(folder / "02_second.ipynb", "assert steps == 3", parameters="steps: int = 3  # how many")
    (folder / "params").mkdir()
    (folder / "params" / "large.yaml").write_text("steps: 4\n")
    (folder / "params" / "wrong.yaml").write_text("step: 4\n")
    return folder


@pytest.fixture(scope="module")
def finished(series):
    """A complete run, some parameters from a file and some typed."""
    out = series.parent / "runs"
    file = series.parent / "values.yaml"
    file.write_text("lr: 1e-5\nseed: 1\n")  # YAML 1.1 reads this lr as text
    typed = ["-p", "fast", "true", "-p", "budgets", "[1e-3, 2]", "-p", "data_file", "pairs.jsonl"]
    assert run.main(["--out", str(out), "--params", str(file), "--seed", "7", *typed], series) == 0
    (folder,) = [path for path in out.iterdir() if not path.is_symlink()]
    return folder


def test_a_run_leaves_executed_notebooks_and_a_summary(finished):
    executed = nbformat.read(finished / "02_second.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary) == ["schema", "versions", "parameters", "methods", "intervals", "equal_terms"]
    assert summary["schema"] == 1 and summary["versions"]["papermill"]
    (row,) = summary["methods"]
    assert tuple(row) == METHOD_FIELDS and row["lam"] == [0.0, 1.5]
    (row,) = summary["equal_terms"]
    assert (row["method"], row["gap"], row["labels"]) == ("sacpo", 1.5, 7) and "path" not in row
    index = (finished / "index.html").read_text(encoding="utf-8")
    assert "<td>sacpo</td><td>lam 0.6</td>" in index and ">2.50<" in index
    (line,) = summary["intervals"]
    assert (line["notebook"], line["estimate"], line["high"]) == ("01_first", "tokens", 13.0)
    assert ">12.000 [11.000, 13.000]<" in index


def test_values_arrive_as_the_type_of_the_default(finished):
    values = json.loads((finished / "summary.json").read_text())["parameters"]["01_first"]
    here = run.Path("pairs.jsonl").absolute()  # the kernel runs elsewhere, so the path was completed
    assert values == {"seed": 7, "lr": 1e-5, "fast": True, "budgets": [0.001, 2.0], "data_file": str(here)}


def test_the_report_escapes_what_it_shows(finished):
    index = (finished / "index.html").read_text()
    page = (finished / "01_first.html").read_text()
    assert "<script" not in index and "&lt;script&gt;title" in index and 'href="02_second.html"' in index
    assert '<td class="number">100.00</td>' in index
    assert "&lt;script&gt;x" in page and "<script>x" not in page


def test_the_report_keeps_alternative_texts(finished):
    assert 'alt="cost falls to the budget"' in (finished / "01_first.html").read_text()


def test_a_second_run_never_overwrites_and_becomes_the_latest(finished, series, capsys, monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda form: finished.name)  # within the same second
    assert finished.parent.joinpath("latest").resolve() == finished.resolve()
    assert run.main(["--out", str(finished.parent), "--only", "02", "--no-report"], series) == 0
    second = finished.with_name(finished.name + "-2")
    assert finished.parent.joinpath("latest").resolve() == second.resolve()
    names = ["02_second.ipynb", "done.json", "plan.json", "summary.json"]
    assert sorted(path.name for path in second.iterdir()) == names
    assert "[1/1] 02_second" in capsys.readouterr().out


def test_the_first_failing_cell_stops_the_run(series, tmp_path, capsys):
    folder = tmp_path / "notebooks"
    write(folder / "01_bad.ipynb", "two = 2", "\nraise ValueError(two)\n# more", parameters="a: int = 1")
    write(folder / "02_never.ipynb", "1", parameters="a: int = 1")
    before = dict(run.os.environ)
    out = tmp_path / "runs"
    assert run.main(["--out", str(out), "-p", "a", "5"], folder) == 1
    error = capsys.readouterr().err
    assert "01_bad.ipynb, cell 4 of 4: raise ValueError(two)\nValueError: 2\n" in error
    (left,) = out.iterdir()  # its folder, and no `latest`
    assert sorted(path.name for path in left.iterdir()) == ["01_bad.ipynb", "plan.json"]
    assert dict(run.os.environ) == before


def test_a_dead_kernel_is_reported_as_such(tmp_path, capsys):
    folder = tmp_path / "notebooks"
    write(folder / "01_dead.ipynb", "import os\nos._exit(9)", "2", parameters="a: int = 1")
    assert run.main(["--out", str(tmp_path)], folder) == 1
    assert "01_dead.ipynb, cell 3 of 4: the kernel died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "sed", "3"], "unknown parameter sed: no selected notebook has it; the nearest are seed"),
        (["--only", "02", "--seed", "3"], "unknown parameter seed"),  # only 01 has one
        (["-p", "lr", "abc"], "parameter lr of 01_first: 'abc' is not a number"),
        (["-p", "budgets", "3"], "parameter budgets of 01_first: 3 is not a list"),
        (["--only", "02,07"], "--only 07: no such notebook"),
        (["--only", "02", "--only", "07"], "--only 07: no such notebook"),
        (["--only", ","], "--only ,: no notebook; expected some"),
        (["-p", "seed", "1", "-p", "seed", "2"], "parameter seed is given twice"),
        (["-p", "seed", "1", "--seed", "2"], "parameter seed is given twice"),
        (["-p", "lr", ".nan"], "parameter lr of 01_first: '.nan' is not a number"),
        (["--resume", "somewhere"], "expected no parameters beside it"),
        (["--setting", "huge"], "settings: bench, large, wrong"),
        (["--setting", "large", "--only", "01"], "none of these notebooks has parameters for it"),
        (["--setting", "wrong"], "unknown parameter step: no notebook, in"),
        (["--params", "missing.yaml"], "missing.yaml: "),
    ],
)
def test_what_is_not_understood_runs_nothing(series, tmp_path, capsys, arguments, says):
    assert run.main(["--out", str(tmp_path / "runs"), *arguments], series) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_setting_takes_the_notebooks_that_have_parameters_for_it(series, capsys):
    chosen = run.select(series, [], "large")
    assert [path.stem for path, _ in chosen] == ["02_second"]
    assert "skipped 01_first" in capsys.readouterr().out
    assert list(run.plan(chosen, {}).values()) == [{"steps": 4}]
    assert list(run.plan(chosen, {"steps": "5"}).values()) == [{"steps": 5}]  # what was typed goes first


@pytest.mark.parametrize(
    ("value", "default", "annotation", "expected"),
    [
        ("1e-5", 0.1, "float", 1e-5),
        (2, 0.1, "float", 2.0),
        ("3", 0, "int", 3),
        ("-1", 1, "None", -1),  # no annotation: as the default
        ("FALSE", True, "bool", False),
        ("007", "a", "str", "007"),
        ("None", "a", "Optional[str]", None),
        (None, None, "Optional[float]", None),
        ("2", None, "Optional[float]", 2.0),
        ("[]", [0.1], "list[float]", []),
        (["1e-3", 1], [], "list[float]", [0.001, 1.0]),
        ("[3, 4]", [1], "None", [3, 4]),
    ],
)
def test_coerce(value, default, annotation, expected):
    got = run.coerce(value, default, annotation)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "default", "annotation"),
    [
        ("abc", 0.1, "float"),
        ("nan", 0.1, "float"),
        (True, 0.1, "float"),
        (None, 0.1, "float"),
        (2.0, 1, "int"),
        ("2.5", 1, "int"),
        ("yes", True, "bool"),
        (1, True, "bool"),
        (2024, "a", "str"),
        (None, "a", "str"),
        ("[1, x]", [0.1], "list[float]"),
        ("[1", [0.1], "list[float]"),
    ],
)
def test_coerce_refuses(value, default, annotation):
    with pytest.raises(ValueError):
        run.coerce(value, default, annotation)


@pytest.mark.parametrize("command", [claims, comparison, online], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--seeds 0 -1", "--seeds -1; expected at least 0"),
        ("--steps 0", "--steps 0; expected at least 2"),
        ("--n-objects 11", "--n-objects 11; expected at most 10"),
        ("--seeds 2147483648", "--seeds 2147483648; expected at most 2147483647"),
    ],
)
def test_a_command_s_number_out_of_range_is_one_line(command, typed, message, tmp_path, capsys):
    assert command.main([*typed.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{message}\n" and not (tmp_path / "out").exists()


def test_numbers_are_finite_and_strengths_positive():
    assert ranges.refused({"budgets": [0.0, float("nan")]}) == "--budgets nan; expected a finite number"
    assert ranges.refused({"beta": float("inf"), "seeds": [0]}) == "--beta inf; expected a finite number"
    assert ranges.refused({"coverage": 0.0}) == "--coverage 0.0; expected more than 0"
    assert ranges.refused({"seeds": [0, 1, 0]}) == "--seeds 0 1 0; expected each once", "a mean would count it twice"
    assert ranges.refused({"seeds": [0, 1], "budget": -1.0, "out": "x", "methods": ["a"], "resume": False}) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "-1; expected at least 0"),
        ("seed", 2**31, "2147483648; expected at most 2147483647"),
        ("steps", 1, "1; expected at least 2"),
        ("samples", 1, "1; expected at least 2"),
        ("max_rounds", 0, "0; expected at least 1"),
        ("pattern", "(", "expected a regular expression"),
        ("words", "acid", "expected one of pattern, words and classifier"),  # the notebook has a pattern of its own
        ("beta", 0.0, "0.0; expected more than 0"),
        ("lam_init", -0.5, "-0.5; expected at least 0"),
        ("share_allowed", 0.0, "0.0; expected more than 0"),
    ],
)
def test_a_number_out_of_range_is_one_line_before_anything_runs(tmp_path, capsys, name, value, message):
    assert run.main(["-p", name, str(value), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert (f"parameter {name} of " in error or name in run.RULE) and message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_kernels_take_no_port_where_there_are_sockets_of_files(monkeypatch):
    monkeypatch.setattr(run.os, "name", "posix")
    monkeypatch.setattr(run.tempfile, "gettempdir", lambda: "/tmp")
    first, second = run.connection(), run.connection()
    assert first["transport"] == "ipc" and first["ip"] != second["ip"] and len(first["ip"]) < 100
    monkeypatch.setattr(run.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 100)
    assert run.connection() == {"transport": "tcp"}


def test_what_is_no_number_has_no_range():
    ranges.require("beta", None)
    ranges.require("steps", [0, -1])


def test_every_default_is_in_range():
    notebooks = run.select(record.repo_root() / "notebooks", [], "bench")
    for path, _ in notebooks:
        for name, spec in papermill.inspect_notebook(path).items():
            ranges.require(name, ast.literal_eval(spec["default"]))


@pytest.mark.slow
def test_real_notebooks_with_other_parameters(tmp_path, capsys, monkeypatch):
    """Another seed, world, beta and budget: the notebooks' own checks hold, and the summary says what was asked."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    asked = {"seed": 3, "n_objects": 6, "n_tools": 6, "beta": 0.7, "budget": 0.3, "n_pairs": 20_000}
    typed = [text for name, value in asked.items() for text in ("-p", name, str(value))]
    assert run.main(["--only", "00,02", "--out", str(tmp_path / "runs"), *typed]) == 0
    out = capsys.readouterr().out
    assert "dpo_harmless" in out and out.rstrip().endswith("index.html")
    summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
    assert summary["schema"] == 1 and summary["intervals"] == []
    found = summary["parameters"]["02_reference_and_dpo"]
    assert {name: found[name] for name in asked} == asked
    rows = {(row["method"], row["split"]): row for row in summary["methods"]}
    assert all(row["seed"] == 3 and row["budget"] == 0.3 for row in rows.values())
    optimum, reference = rows["optimum", "train"], rows["reference", "train"]
    assert abs(optimum["violation"]) < 1e-6 and optimum["gap"] < 1e-6 and reference["gap"] == pytest.approx(100)
    assert rows["dpo_helpful", "train"]["reward"] > optimum["reward"] > reference["reward"]


# --- going on with a run that was killed ------------------------------------------------------------------------------

COUNTS = """\
from pathlib import Path
with (Path(log) / "begun").open("a") as file:
    file.write("{name}\\n")
import time
time.sleep(0.5)
from cdpo_utils.record import METHOD_FIELDS, save_record
row = dict.fromkeys(METHOD_FIELDS) | dict(method="reference", notebook="{name}", setting="bench", seed=seed)
row |= dict(feedback="oracle", split="test", reward={reward})
save_record("{name}", dict(seed=seed), [row])
"""
KEEPS = """
from cdpo_utils.record import checkpoints_dir
(checkpoints_dir() / "{name}").mkdir(parents=True, exist_ok=True)
assert len(list(checkpoints_dir().iterdir())) == {place}, "what earlier notebooks have trained stays for later ones"
"""


HOLDS = """
while (Path(log) / "hold {name}").exists():
    time.sleep(0.02)
"""
# Everything is imported before a run is asked for: the moments at which it is killed shall be those of its notebooks.
READY = """\
import sys, pathlib
from cdpo_utils import run
print("ready", flush=True)
sys.exit(run.main([*input().split(), "--no-report"], pathlib.Path(sys.argv[1])))
"""


@pytest.fixture
def counted(tmp_path):
    """A folder of three notebooks, each of which writes its name into tmp_path/begun, and does not end as long as there
    is tmp_path/"hold <name>"."""
    folder = tmp_path / "notebooks"
    for k, name in enumerate(("01_a", "02_b", "03_c")):
        parameters = f"seed: int = 0  # s\nlog: str = {str(tmp_path)!r}  # where"
        source = COUNTS.format(name=name, reward=k / 3) + KEEPS.format(name=name, place=k + 1) + HOLDS.format(name=name)
        write(folder / f"{name}.ipynb", source, parameters=parameters)
    return folder


@pytest.fixture
def begin(counted):
    """A function that begins a run, in a process that is ready for it, and returns that process."""
    made = []

    def ready():
        command = [sys.executable, "-c", READY, str(counted)]
        made.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def begin(*arguments):
        process = made[-1]
        assert process.stdout.readline() == "ready\n"
        print(*arguments, file=process.stdin, flush=True)
        ready()  # for the next one, in the meantime
        return process

    ready()
    yield begin
    for process in made:
        process.kill()
        process.communicate()


def summary_but_for_time(folder):
    summary = json.loads((folder / "summary.json").read_text())
    for row in [*summary["methods"], *summary["equal_terms"]]:
        for name in ("seconds", "peak_mib"):
            row.pop(name)
    summary["versions"].pop("commit")  # of a clone that somebody works in
    return summary


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(counted, begin, tmp_path):
    """Killed 20 times, at moments measured by what a run takes that nobody kills: it may be a loaded machine."""
    runs, others, rng = tmp_path / "runs", tmp_path / "others", random.Random(0)
    process = begin("--out", runs)
    before = time.monotonic()
    assert process.wait(300) == 0
    seconds = time.monotonic() - before
    (whole,) = runs.glob("2*")
    (tmp_path / "begun").unlink()
    holds = [tmp_path / f"hold {path.stem}" for path in sorted(counted.iterdir())]
    for hold in holds:
        hold.touch()
    process = begin("--out", others)
    while not (plans := list(others.glob("2*/plan.json"))):
        time.sleep(0.01)
    folder = plans[0].parent
    for kill in range(20):
        time.sleep(rng.uniform(0, seconds / 2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"kill {kill + 1}: the run had ended"
        if kill in (6, 13, 19):
            holds.pop(0).unlink()
        process = begin("--resume", folder)
    assert process.wait(120) == 0
    begun = (tmp_path / "begun").read_text().split()
    assert min(map(begun.count, ("01_a", "02_b", "03_c"))) > 1, "each was killed"
    assert summary_but_for_time(whole) == (summary := summary_but_for_time(folder)) and len(summary["methods"]) == 3
    assert not (whole / "checkpoints").exists() and not (folder / "checkpoints").exists()
    before = (tmp_path / "begun").read_text()
    again = begin("--resume", folder)
    assert again.wait(120) == 0 and again.stdout.read().count("done before") == 3
    assert (tmp_path / "begun").read_text() == before, "what was done is not run again"


def test_what_cannot_be_resumed_is_one_line(series, tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"code": "another", "parameters": {}}')
    assert run.main(["--resume", str(tmp_path)], series) == 2
    assert "begun with other code" in capsys.readouterr().err
    assert run.main(["--resume", str(tmp_path), "--seed", "1"], series) == 2
    assert "no parameters beside it" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text('{"code": "anot')
    assert run.main(["--resume", str(tmp_path)], series) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
