"""pyproject.toml, constraints.txt, environment.yml and the Makefile say the same."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cdpo_utils
from cdpo_utils import licences

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in sum(EXTRAS.values(), PROJECT["dependencies"])]
PIN_LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
PINS = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in PIN_LINES}
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
TEXTS = ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"]
MAKEFILE = (ROOT / "Makefile").read_text()

COMMANDS = {"jupyterlab", "nbmake", "ruff", "nbstripout", "sphinx"}  # run, never imported
BY_SPHINX = {"myst-nb", "furo"}  # loaded there by name
BY_TRANSFORMERS = {"gguf"}  # imported there, when it is given a GGUF file
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pytest-xdist": "xdist",
    "huggingface-hub": "huggingface_hub",
    "tensorboardx": "tensorboardX",
}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement):
    assert requirement.specifier, "a range, however wide"
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_are_versions_and_nothing_else():
    for line in PIN_LINES:  # no hosts, hashes, files, or local builds such as +cpu
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line
    assert not [name for name in PINS if re.match("nvidia|triton|cuda", name)], "left to the build of torch"


def test_the_environment_only_bootstraps():
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = ENVIRONMENT["dependencies"]
    assert [line.partition("=")[0] for line in conda] == ["python", "pip"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(conda[0].partition("=")[2])
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


@pytest.mark.parametrize("file", [*TEXTS, ".github/workflows/test.yml", ".pre-commit-config.yaml"])
def test_no_index_is_prescribed(file):
    assert not re.search(r"https?://|file:|--hash|find-links", (ROOT / file).read_text())


@pytest.mark.parametrize(
    "target",
    ["run", "test", "figures", "student", "lab", "lint", "book", "canary", "licences", "setup", "clean", "help"],
)
def test_make_has_the_target(target):
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.M) and re.search(rf"\bmake {target}\b", MAKEFILE)


def test_make_installs_what_the_environment_does():
    assert 'install -c constraints.txt -e ".[dev]"' in MAKEFILE
    assert re.search(r"^\$\(STAMP\): pyproject.toml constraints.txt$", MAKEFILE, flags=re.M)


def test_one_version():
    assert PROJECT["dynamic"] == ["version"]  # taken from the package
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cdpo_utils.__version__
    assert f"## {cdpo_utils.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def imports(source):
    """Top-level names of the modules that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def imported(*folders):
    """All third-party modules imported by modules and notebooks in these folders."""
    found = set()
    for folder in folders:
        for path in (ROOT / folder).glob("**/*.py"):
            found.update(imports(path.read_text(encoding="utf-8")))
        for path in (ROOT / folder).glob("*.ipynb"):
            cells = nbformat.read(path, as_version=4).cells
            found.update(name for c in cells if c.cell_type == "code" for name in imports(c.source))
    ours = {"cdpo_utils", *(path.stem for path in ROOT.glob("*/*.py"))}
    return found - set(sys.stdlib_module_names) - ours


def modules(requirements):
    """The names under which requirements are imported."""
    names = {canonicalize_name(Requirement(text).name) for text in requirements}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_every_dependency_is_used():
    declared = modules(sum(EXTRAS.values(), PROJECT["dependencies"])) - COMMANDS - BY_SPHINX - BY_TRANSFORMERS
    assert declared - imported("cdpo_utils", "notebooks", "data", "tests") == set()


def test_every_import_is_a_dependency():
    kernel = {"IPython"}  # there in every notebook
    extras = sum((EXTRAS[name] for name in EXTRAS if name != "dev"), [])  # asked for by name where they are needed
    assert imported("cdpo_utils", "notebooks", "data") - modules(PROJECT["dependencies"] + extras) - kernel == set()


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_refuses_an_old_python_in_one_line(tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check makes of an interpreter before 3.11
    old.chmod(0o755)
    command = ["make", "-s", "setup", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("Python 3.11 or newer is needed")
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_takes_figures_of_a_run_of_all_notebooks_only(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    sources = ("pyproject.toml", "constraints.txt", "venv/.installed", "notebooks/00_a.ipynb", "notebooks/01_b.ipynb")
    made = ("runs/latest/01_b.ipynb", "runs/latest/records/figures/01_b.png", "build/figures/old.png")
    for name in sources + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = ["make", "-s", "figures", "VENV=venv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    line, _ = done.stderr.splitlines()  # and make's own
    assert done.returncode and line == "runs/latest: no executed 00_a.ipynb; make run executes the whole series"
    assert (tmp_path / "build" / "figures" / "old.png").exists()
    (tmp_path / "runs" / "latest" / "00_a.ipynb").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "build/figures\n"), done.stderr
    assert [path.name for path in (tmp_path / "build" / "figures").iterdir()] == ["01_b.png"]


def test_ci_runs_the_readme_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec make test" and "set -euo pipefail" in lines


def test_the_workflow_runs_the_readme_command_where_the_readme_says_it_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    test, book = workflow["jobs"]["test"], workflow["jobs"]["book"]
    systems = {(one["os"].partition("-")[0], one["python"]) for one in test["strategy"]["matrix"]["include"]}
    assert systems >= {("ubuntu", "3.11"), ("ubuntu", "3.13")} and "macos" in {system for system, _ in systems}
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(python) for _, python in systems)
    assert [step["run"] for step in test["steps"] if "run" in step] == ["make test"]
    assert [step["run"] for step in book["steps"] if "run" in step] == ["make run", "make book", "make book-check"]
    licences = workflow["jobs"]["licences"]  # and what pip-audit reports: for information
    *_, install, last = [step["run"] for step in licences["steps"] if "run" in step]
    extras = set(re.search(r"-c constraints.txt -e \"\.\[([\w,]+)\]\"", install)[1].split(","))
    brought = sum((EXTRAS[name] for name in extras | {"dev"}), PROJECT["dependencies"])
    assert modules(brought) == modules(map(str, REQUIREMENTS)) - {"vllm"}, "else a pin has no licence to show"
    assert last == "make licences" and licences["continue-on-error"]
    assert not any("continue-on-error" in part for part in (test, book, *test["steps"], *book["steps"]))
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_before_a_commit_are_tools_of_the_setup():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "nothing is fetched"
    commands = [hook["entry"].split()[0] for hook in repo["hooks"]]
    assert {Path(command).parent.as_posix() for command in commands} == {".venv/bin"}
    dev = {Requirement(text).name for text in EXTRAS["dev"]}
    assert {Path(command).name for command in commands} == {"nbstripout", "ruff"} <= dev
    assert all(hook["language"] == "system" for hook in repo["hooks"])


def test_the_hook_strips_outputs_and_leaves_a_stripped_notebook_alone(tmp_path):
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    program, *options = repo["hooks"][0]["entry"].split()
    command = [sys.executable, "-m", Path(program).name, *options]
    source = next((ROOT / "notebooks").glob("*.ipynb"))
    path = tmp_path / source.name
    notebook = nbformat.read(source, as_version=4)
    next(c for c in notebook.cells if c.cell_type == "code").outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(notebook, path)
    subprocess.run([*command, path], check=True)
    assert nbformat.read(path, as_version=4) == nbformat.read(source, as_version=4)
    assert subprocess.run([*command, "--verify", source]).returncode == 0


def test_licences_name_every_pin(capsys):
    assert licences.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [line.partition("==")[0] for line in PIN_LINES]
    found = {line.split()[0]: line[41:].strip() for line in lines}
    assert found["safetensors"] == "Apache Software License" and "BSD" in found["scipy"] and all(found.values())
    assert licences.licence("no-such-package") == "not installed"
