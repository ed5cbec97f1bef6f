"""Student copies: no solution in them, every check waits for an answer, and passes with the reference solution.

Notebook 00 is run with solutions in the place of its stubs. The others are run whole, stubs followed by solutions, by
nbmake; here it is read that the stubs and what only a solution defines play no part in that.
"""

import ast
import re
import shutil
import symtable

import nbformat
import pytest
from nbclient import NotebookClient

from cdpo_utils import record, student

NOTEBOOKS = sorted((record.repo_root() / "notebooks").glob("[0-9]*.ipynb"))


def tables(table):
    """A symbol table and all within it."""
    yield table
    for child in table.get_children():
        yield from tables(child)


def names(source):
    """Of a cell: the names that it defines, and those that it takes from cells before or from Python."""
    top = symtable.symtable(source, "cell", "exec")
    defined = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported()}
    used = {
        one.get_name()
        for table in tables(top)
        for one in table.get_symbols()
        if one.is_referenced() and (table is top or one.is_global())
    }
    return defined, used - defined


def test_what_is_missing_is_named():
    def blank(x, y=1): ...

    def commented(x):
        # nothing yet
        ...

    def written(x):
        return 2 * x

    student.answered("9.9", a=0, b=written, c=None)
    for value in (..., blank, commented):
        with pytest.raises(AssertionError, match="exercise 9.9: `b` is still to be written"):
            student.answered("9.9", a=1, b=value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_solution_is_left_and_every_check_asks_for_its_answer(path):
    notebook = nbformat.read(path, 4)
    found = student.exercises(notebook)
    assert [number for number, *_ in found] == [f"{int(path.stem[:2])}.{k}" for k in range(1, len(found) + 1)]
    solutions = [notebook.cells[solution].source for *_, solution, _ in found]
    for *_, solution, check in found:
        assert notebook.cells[solution].metadata["tags"] == ["solution"]
        assert notebook.cells[check].metadata["tags"] == ["check"]
    copy = student.without_solutions(nbformat.read(path, 4))
    assert len(copy.cells) == len(notebook.cells) - len(found)
    text = "\n".join(cell.source for cell in copy.cells)
    assert not any(solution in text for solution in solutions)
    cells = [cell for cell in copy.cells if {"exercise", "check"} & set(cell.metadata.get("tags", []))]
    asked = [(e, c) for e, c in zip(cells, cells[1:], strict=False) if "exercise" in e.metadata["tags"]]
    assert len(asked) == len(found)
    for (number, names, *_), (exercise, check) in zip(found, asked, strict=True):
        scope = {}
        exec(exercise.source, scope)
        with pytest.raises(AssertionError, match=f"exercise {number}: `{names[0]}` is still to be written"):
            exec(check.source, scope)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_are_of_all_three_kinds(path):
    notebook = nbformat.read(path, 4)
    asked = [notebook.cells[exercise - 1].source for _, _, exercise, _, _ in student.exercises(notebook)]
    kinds = re.findall(r"\b\d+\.\d+ \(?(predict|implement|explore)\b", "\n".join(asked), flags=re.I)
    assert len(kinds) == len(asked) and {kind.lower() for kind in kinds} == {"predict", "implement", "explore"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_check_that_fails_says_what_is_wrong(path):
    notebook = nbformat.read(path, 4)
    for number, _, _, _, check in student.exercises(notebook):
        nodes = list(ast.walk(ast.parse(notebook.cells[check].source)))
        asserts = [node for node in nodes if isinstance(node, ast.Assert)]
        compared = [node for node in nodes if isinstance(node, ast.Call) and "assert" in ast.unparse(node.func)]
        assert asserts or compared, number
        for node in asserts:
            assert node.msg, f"{number}: {ast.unparse(node)}"
        for node in compared:
            assert "msg" in {keyword.arg for keyword in node.keywords}, f"{number}: {ast.unparse(node)}"


def test_nobodys_work_is_overwritten(tmp_path, capsys):
    notebooks = tmp_path / "notebooks"
    shutil.copytree(student.repo_root() / "notebooks", notebooks, ignore=shutil.ignore_patterns("figures", "params"))
    before = {path.name: path.read_bytes() for path in notebooks.iterdir()}
    assert student.main(["--out", str(notebooks)]) == 1, "the series itself"
    assert {path.name: path.read_bytes() for path in notebooks.iterdir()} == before
    assert student.main(["--out", str(tmp_path / "copies")]) == 0
    first, second, *_ = sorted((tmp_path / "copies").iterdir())
    assert student.main(["--out", str(tmp_path / "copies")]) == 0, "as they were"
    second.write_bytes(b"worked in \xff")
    first.unlink()
    capsys.readouterr()
    assert student.main(["--out", str(tmp_path / "copies")]) == 1 and second.read_bytes() == b"worked in \xff"
    error = capsys.readouterr().err
    assert str(second) in error and error.count("\n") == 1 and not first.exists()


def test_a_misspelt_name_is_told():
    notebook = nbformat.read(NOTEBOOKS[7], 4)
    number, (name,), *_, check = student.exercises(notebook)[0]
    assert (number, name) == ("7.1", "breaks_budget")
    with pytest.raises(AssertionError, match="'dpo_helpfull' is neither of the two runs"):
        exec(notebook.cells[check].source, {name: "dpo_helpfull"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_solution_defines_what_is_asked_for_and_nothing_that_others_need(path):
    notebook = nbformat.read(path, 4)
    found = student.exercises(notebook)
    assert found
    solutions = {solution for *_, solution, _ in found}
    for number, asked, _, solution, check in found:
        defined, used = names(notebook.cells[solution].source)
        assert defined >= set(asked), f"{number}: the stub's {set(asked) - defined} stay as they are"
        assert not used & set(asked), f"{number}: the solution takes {used & set(asked)} from the stub"
        own = defined - set(asked)
        for k, cell in enumerate(notebook.cells[check:], start=check):
            if cell.cell_type == "code":
                defined, used = names(cell.source)
                assert not own & used, f"{number}: cell {k} needs {own & used}, which students need not have"
                own -= defined if k not in solutions else set()


@pytest.mark.slow
def test_a_copy_stops_only_at_its_checks_and_passes_with_the_solutions(tmp_path):
    (path,) = (path for path in student.write(tmp_path) if path.stem.startswith("00"))
    copy = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(record.repo_root() / "notebooks")}}
    done = NotebookClient(copy, kernel_name="python3", allow_errors=True, resources=resources).execute()
    failed = [cell for cell in done.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert len(failed) == 3 and all("answered(" in cell.source for cell in failed)
    assert all("is still to be written" in out.evalue for cell in failed for out in cell.outputs)
    given = nbformat.read(NOTEBOOKS[0], 4)
    solutions = [given.cells[solution].source for *_, solution, _ in student.exercises(given)]
    copy = nbformat.read(path, 4)
    for cell in copy.cells:
        if "exercise" in cell.metadata.get("tags", []):
            cell.source = solutions.pop(0)
    NotebookClient(copy, kernel_name="python3", resources=resources).execute()


def test_nbgrader_gets_solutions_between_its_marks_and_points_for_checks(tmp_path):
    paths = student.write(tmp_path, nbgrader=True)
    assert len(paths) == len(NOTEBOOKS)
    copy = nbformat.read(paths[0], 4)
    marks = [cell.metadata["nbgrader"] for cell in copy.cells if "nbgrader" in cell.metadata]
    assert [mark["grade_id"] for mark in marks][:2] == ["exercise-0-1", "check-0-1"]
    assert sum(mark.get("points", 0) for mark in marks) == 3 and len({mark["grade_id"] for mark in marks}) == len(marks)
    for cell in copy.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            assert "= ...\n" not in cell.source.split("### BEGIN SOLUTION")[1]
            compile(cell.source, "cell", "exec")
