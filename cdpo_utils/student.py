"""Copies of the notebooks for a class.

    python -m cdpo_utils.student                  # build/student: without solutions; every check waits for an answer
    python -m cdpo_utils.student --for-nbgrader   # build/nbgrader/source/NAME/NAME.ipynb: nbgrader's source notebooks

An exercise is three cells, tagged exercise, solution and check, below a text that begins with its number.
"""

import argparse
import ast
import errno
import re
import sys
from pathlib import Path

import nbformat

from cdpo_utils import guard
from cdpo_utils.record import repo_root


def answered(number, **given):
    """Raise AssertionError, which names the exercise, for a value that is still `...` or a function without a body."""
    for name, value in given.items():
        code = getattr(value, "__code__", None)
        if value is ... or (code is not None and code.co_code == _empty.__code__.co_code):
            raise AssertionError(f"exercise {number}: `{name}` is still to be written, in the cell above")


def _empty(): ...


def exercises(notebook):
    """[(number, names that are asked for, index of the exercise, of its solution, of its check), ...]."""
    found = []
    for k, cell in enumerate(notebook.cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        number = re.findall(r"\b\d+\.\d+\b(?= Predict| Implement| Explore| \()", notebook.cells[k - 1].source)[-1]
        names = []
        for line in ast.parse(cell.source).body:
            names += [line.name] if isinstance(line, ast.FunctionDef) else [target.id for target in line.targets]
        found.append((number, names, k, k + 1, k + 2))
    return found


def without_solutions(notebook):
    """The notebook as a student gets it: no solutions, and each check asks first whether there is an answer."""
    drop = set()
    for number, names, _, solution, check in exercises(notebook):
        drop.add(solution)
        asked = ", ".join(f"{name}={name}" for name in names)
        ask = f'answered("{number}", {asked})\n'
        notebook.cells[check].source = (
            "from cdpo_utils.student import answered\n\n" + ask + notebook.cells[check].source
        )
    notebook.cells = [cell for k, cell in enumerate(notebook.cells) if k not in drop]
    return notebook


def for_nbgrader(notebook):
    """The notebook as nbgrader's source: solutions between its marks, below what students see; a point for a check."""
    drop = set()
    for number, _, exercise, solution, check in exercises(notebook):
        drop.add(solution)
        name = number.replace(".", "-")
        solved, checked = notebook.cells[exercise], notebook.cells[check]
        solved.source += f"\n### BEGIN SOLUTION\n{notebook.cells[solution].source}\n### END SOLUTION"
        for cell, graded in ((solved, False), (checked, True)):
            mark = {"grade": graded, "solution": not graded, "locked": graded, "task": False, "schema_version": 3}
            mark |= {"grade_id": f"{'check' if graded else 'exercise'}-{name}", "cell_type": "code"}
            cell.metadata["nbgrader"] = mark | ({"points": 1} if graded else {})
    notebook.cells = [cell for k, cell in enumerate(notebook.cells) if k not in drop]
    return notebook


def write(folder, nbgrader=False):
    """Write the copies of all notebooks below `folder`; returns their paths. Raises FileExistsError, and writes none,
    where a file is there with other content: a notebook of the series, or one that somebody has worked in."""
    copies = {}
    for source in sorted((repo_root() / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(source, 4)
        path = folder / "source" / source.stem / source.name if nbgrader else folder / source.name
        made = for_nbgrader(notebook) if nbgrader else without_solutions(notebook)
        copies[path] = nbformat.writes(made) + "\n"
    for path, text in copies.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise FileExistsError(errno.EEXIST, "is there and differs; expected another folder by --out", str(path))
    for path, text in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return list(copies)


@guard.told
def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.student", description=__doc__.splitlines()[0])
    parser.add_argument("--for-nbgrader", action="store_true", help="solutions and points in nbgrader's marks")
    parser.add_argument("--out", type=Path, help="folder (default: build/student or build/nbgrader)")
    given = parser.parse_args(argv)
    default = repo_root() / "build" / ("nbgrader" if given.for_nbgrader else "student")
    for path in write(given.out or default, given.for_nbgrader):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
