"""House rules that every notebook keeps. Pure reading: no kernel is started.

Each rule is a function that asserts; the last test breaks a well-behaved notebook once per rule and sees it refused.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import papermill as pm
import pytest
import yaml
from nbformat import v4

from cdpo_utils import run

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_CELL_LINES = 40

# A path from the root, a drive or a home: two slashes at least, so that a/b and </td> do not count.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~}\\)-])/[A-Za-z]\w+/|\b[A-Za-z]:\\\\?\w|(?<!\w)~/")
ENDS_THE_KERNEL = re.compile(r"\b(sys\.exit|os\._exit|exit|quit)\(")


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def markdown(nb):
    return "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(nb, tag):
    return [c for c in nb.cells if tag in tags(c)]


def calls(cell):
    """[(function as written, its node)] of a code cell."""
    nodes = (node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node) for node in nodes]


def comments(cell):
    return [t.string for t in tokenize.generate_tokens(io.StringIO(cell.source).readline) if t.type == tokenize.COMMENT]


def opens_with_a_title(nb):
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")


def is_stripped_but_keeps_its_kernel(nb):
    assert all(not c.outputs and c.execution_count is None for c in code(nb)), "strip it: nbstripout notebooks/*.ipynb"
    assert all("execution" not in c.metadata and "papermill" not in c.metadata for c in nb.cells)
    assert nb.metadata.kernelspec.name == "python3", "papermill needs a kernel, and this name is everywhere"
    assert "widgets" not in nb.metadata and "papermill" not in nb.metadata


def code_is_plain_python(nb):
    for cell in code(nb):
        ast.parse(cell.source)  # magics and ! lines do not parse
        assert not ENDS_THE_KERNEL.search(cell.source), "papermill takes an exit for success"
    assert not tagged(nb, "raises-exception"), "papermill fails it; show an error with try and except"


def parameters_are_plain_annotated_literals(nb):
    (cell,) = tagged(nb, "parameters")
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign), "write `name: type = value  # meaning`"
        found[node.target.id] = ast.literal_eval(node.value)  # a derived value would not follow an override
    assert len(comments(cell)) >= len(found), "every parameter has its meaning as a comment"


def cells_are_short(nb):
    assert max(len(c.source.splitlines()) for c in code(nb)) <= MAX_CELL_LINES


def equations_are_implemented(nb):
    """Each \\tag{n} has a comment `# Eq. (n)` in the code outside the parameters, and no comment names another."""

    def named(cells):
        return {n for c in cells for text in comments(c) for n in re.findall(r"\bEq\. \(([^)]+)\)", text)}

    written = set(re.findall(r"\\tag\{([^}]+)\}", markdown(nb)))
    assert written == named(c for c in code(nb) if "parameters" not in tags(c))
    assert named(tagged(nb, "parameters")) <= written


def paths_are_not_absolute(nb):
    for cell in nb.cells:
        assert not ABSOLUTE_PATH.search(cell.source), ABSOLUTE_PATH.search(cell.source)


def claims_are_checked(nb):
    assert tagged(nb, "check"), "at least one cell tagged check, with asserts"
    assert all("assert" in c.source for c in tagged(nb, "check"))


def exercises_are_triples(nb):
    kinds = [next((t for t in tags(c) if t in ("exercise", "solution", "check")), None) for c in nb.cells]
    for i, kind in enumerate(kinds):
        if kind == "exercise":
            assert kinds[i : i + 3] == ["exercise", "solution", "check"]
        if kind == "solution":
            assert i > 0 and kinds[i - 1] == "exercise"


def figures_have_alternative_text(nb):
    for cell in code(nb):
        functions = [function for function, _ in calls(cell)]
        assert not {"plt.show", "fig.show"} & set(functions), "use plots.show(fig, alt=...)"
        if any(function.startswith("plt.") for function in functions):  # else Jupyter shows the figure without a text
            assert "plots.show" in functions, "end the cell with plots.show(fig, alt=...)"
        for function, node in calls(cell):
            assert not (function == "display" and ast.unparse(node).startswith("display(fig"))
            if function == "plots.show":
                (alt,) = [k.value for k in node.keywords if k.arg == "alt"]
                assert not isinstance(alt, ast.Constant) or alt.value
    assert "![](" not in markdown(nb)


def ends_with_its_record(nb):
    assert {"save_record", "record.save_record"} & {function for function, _ in calls(code(nb)[-1])}


RULES = [
    opens_with_a_title,
    is_stripped_but_keeps_its_kernel,
    code_is_plain_python,
    parameters_are_plain_annotated_literals,
    cells_are_short,
    equations_are_implemented,
    paths_are_not_absolute,
    claims_are_checked,
    exercises_are_triples,
    figures_have_alternative_text,
    ends_with_its_record,
]


def parameters_reach_papermill(path):
    """What papermill reads from the cell's text is what Python reads; it overlooks `str | None` and a second `=`."""
    (cell,) = tagged(nbformat.read(path, as_version=4), "parameters")
    written = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    found = {name: ast.literal_eval(spec["default"]) for name, spec in pm.inspect_notebook(path).items()}
    assert found == written


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, rule):
    rule(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_reach_papermill(path):
    parameters_reach_papermill(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_give_the_reading_order(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), "NN_name.ipynb; the runner takes no other"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("params/*")), ids=lambda file: file.name)
def test_parameter_files_reach_every_notebook_with_a_model(file):
    setting, suffix = file.name.split(".")
    assert suffix == "yaml" and setting != "bench", "the notebook's own defaults are the bench"
    planned = run.plan(run.select(FOLDER, [], setting), {})
    names = yaml.safe_load(file.read_text()).keys()
    assert {path for path in NOTEBOOKS if "model: str" in path.read_text()} == planned.keys()
    assert {name for parameters in planned.values() for name in parameters} == names, "no name is there in vain"


def well_behaved():
    def cell(source, *names):
        return v4.new_code_cell(source, metadata={"tags": list(names)} if names else {})

    return v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}},
        cells=[
            v4.new_markdown_cell("# 04 · A title\n\nThe and/or of https://example.org/a/b/ in data/x/y.jsonl"),
            cell("budget: float = 0.3  # d in Eq. (1), allowed\nmodel: str = ''  # empty: the bench", "parameters"),
            v4.new_markdown_cell("$$ E[c] \\le d, \\frac{a}/b/c \\tag{1} $$\n\n![the set](figures/04.svg)"),
            cell("violation = 0.5 - budget  # Eq. (1); Eq. 7 of the paper"),
            cell("plots.show(fig, alt='cost against round')"),
            cell("assert violation > 0", "check"),
            cell("def f():\n    ...", "exercise"),
            cell("def f():\n    return 1", "solution"),
            cell("assert f() == 1", "check"),
            cell("save_record('04_a_title', {}, [])"),
        ],
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_well_behaved_notebook_passes(rule):
    rule(well_behaved())


def edit(index, source):
    def change(nb):
        nb.cells[index].source = source

    return change


def tag(index, *names):
    def change(nb):
        nb.cells[index].metadata["tags"] = list(names)

    return change


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (opens_with_a_title, edit(0, "## Smaller")),
        (is_stripped_but_keeps_its_kernel, lambda nb: nb.cells[3].update(execution_count=1)),
        (is_stripped_but_keeps_its_kernel, lambda nb: nb.cells[3].outputs.append(v4.new_output("stream", text="x"))),
        (is_stripped_but_keeps_its_kernel, lambda nb: nb.metadata.kernelspec.update(name="my-env")),
        (is_stripped_but_keeps_its_kernel, lambda nb: nb.metadata.update(widgets={})),
        (code_is_plain_python, edit(3, "!pip install x  # Eq. (1)")),
        (code_is_plain_python, edit(3, "%matplotlib inline")),
        (code_is_plain_python, edit(3, "import sys\nsys.exit(0)")),
        (code_is_plain_python, tag(3, "raises-exception")),
        (parameters_are_plain_annotated_literals, edit(1, "budget = 0.3  # d")),
        (parameters_are_plain_annotated_literals, edit(1, "budget: float = 0.3 * 2  # d")),
        (parameters_are_plain_annotated_literals, edit(1, "budget: float = 0.3")),
        (parameters_are_plain_annotated_literals, tag(3, "parameters")),
        (parameters_are_plain_annotated_literals, tag(1)),
        (cells_are_short, edit(3, "x = 1\n" * 41)),
        (equations_are_implemented, edit(3, "violation = 0.5 - budget")),
        (equations_are_implemented, edit(3, "violation = 0.5 - budget  # Eq. (1)\ny = 2  # Eq. (2)")),
        (equations_are_implemented, edit(2, "no equation")),
        (paths_are_not_absolute, edit(3, "open('/home/me/x')")),
        (paths_are_not_absolute, edit(3, "open('~/x')")),
        (paths_are_not_absolute, edit(3, r"open('C:\\data\\x')")),
        (paths_are_not_absolute, edit(2, "It lies in `/data/x.jsonl`.")),
        (claims_are_checked, lambda nb: [tag(5)(nb), tag(8)(nb)]),
        (claims_are_checked, edit(5, "print(violation > 0)")),
        (exercises_are_triples, tag(7)),
        (exercises_are_triples, tag(6)),
        (exercises_are_triples, tag(8)),
        (figures_have_alternative_text, edit(4, "plt.show()")),
        (figures_have_alternative_text, edit(4, "display(fig)")),
        (figures_have_alternative_text, edit(4, "plt.plot([1, 2])")),
        (figures_have_alternative_text, edit(4, "plots.show(fig)")),
        (figures_have_alternative_text, edit(4, "plots.show(fig, alt='')")),
        (figures_have_alternative_text, edit(2, "![](figures/04.svg)")),
        (ends_with_its_record, edit(9, "print('the end')")),
    ],
)
def test_a_spoiled_notebook_is_refused(rule, spoil):
    nb = well_behaved()
    spoil(nb)
    with pytest.raises((AssertionError, SyntaxError, ValueError)):
        rule(nb)


@pytest.mark.parametrize("line", ["a: str | None = None  # x", "b: float = 0.1  # b = 0.1", "c: str = 'x#y'  # z"])
def test_a_parameter_that_papermill_misreads_is_refused(tmp_path, line):
    nb = well_behaved()
    nbformat.write(nb, tmp_path / "04_a.ipynb")
    parameters_reach_papermill(tmp_path / "04_a.ipynb")
    nb.cells[1].source += "\n" + line
    nbformat.write(nb, tmp_path / "04_a.ipynb")
    with pytest.raises((AssertionError, SyntaxError, ValueError)):
        parameters_reach_papermill(tmp_path / "04_a.ipynb")
