"""Student copies: no solution in them, every check waits for an answer, and passes with the reference solution."""

import nbformat
import pytest
from nbclient import NotebookClient

from cdpo_utils import record, student

NOTEBOOKS = sorted((record.repo_root() / "notebooks").glob("[0-9]*.ipynb"))


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
