"""The book: what it is made from, and, where Sphinx, npm's packages and Chromium are there, every page in a browser."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from cdpo_utils import book

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [
    what
    for what, there in {
        "Sphinx (the group book)": importlib.util.find_spec("sphinx"),
        "npm install --prefix book": (ROOT / "book" / "node_modules" / "mathjax").is_dir(),
        "Node.js": shutil.which("node"),
        "Chromium": CHROMIUM,
    }.items()
    if not there
]
NASTY = "<script>alert(1)</script>\x1b[31m\u202e"
DRAWN = '<img src="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22/%3E" width="9"{alt}>'


NUMBERED = {name: {"1", "2"} for name in NAMES}


def page(*cells):
    return book.as_page(v4.new_notebook(cells=list(cells)), NAMES[2], NUMBERED).cells


def test_links_stand_under_the_title_at_the_tag():
    (cell,) = page(v4.new_markdown_cell("# 02 · Title\n\nText."))
    assert cell.source.startswith("# 02 · Title\n\nOpen in [Colab](") and cell.source.endswith("\n\nText.")
    urls = re.findall(r"\((https://[^)]*)\)", cell.source)
    assert len(urls) == 3
    for url in urls:
        assert book.repository() in url and f"v{book.__version__}" in url and url.endswith(NAMES[2])


@pytest.mark.parametrize(
    ("remote", "workflow", "expected"),
    [
        ("https://github.com/some-one/a.course.git", "", "some-one/a.course"),
        ("git@github.com:some-one/course", "", "some-one/course"),
        ("https://user:key@github.com/some-one/course/", "", "some-one/course"),
        ("https://example.org/some-one/course.git", "", book.PLACEHOLDER),
        ("https://notgithub.com.example.org/a/b", "", book.PLACEHOLDER),
        ("", "", book.PLACEHOLDER),
        ("https://github.com/some-one/course.git", "fork/course", "fork/course"),
    ],
)
def test_links_lead_to_the_repository_that_the_notebooks_came_from(tmp_path, monkeypatch, remote, workflow, expected):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if remote:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    monkeypatch.setattr(book.record, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("GITHUB_REPOSITORY", workflow)
    assert book.repository.__wrapped__() == expected


def test_a_tag_that_is_not_there_is_told(tmp_path, monkeypatch, capsys):
    def git(*arguments, **given):
        done = subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, **given)
        return done.stdout.strip()

    monkeypatch.setattr(book.record, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(book, "repository", lambda: "some-one/course")
    monkeypatch.setattr(book, "build", lambda run, out: out / "index.html")
    git("init", "-q")
    assert book.main([]) == 0
    (_, line) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"no tag {book.TAG} is here: links to Colab, Binder, Kaggle lead to nothing")
    git("tag", book.TAG, git("hash-object", "-w", "--stdin", input=b""))
    assert book.main([]) == 0 and capsys.readouterr().out == f"{tmp_path / 'build' / 'book' / 'index.html'}\n"


def test_the_prose_leads_to_other_notebooks_and_only_the_prose():
    said = "See notebook 05, `notebook 04`, [notebook 03](x.ipynb), notebook 02 (this one) and notebook 99."
    _, cell, code = page(v4.new_markdown_cell("# T"), v4.new_markdown_cell(said), v4.new_code_cell("# notebook 05"))
    assert cell.source == said.replace("notebook 05", f"[notebook 05]({NAMES[5]})")
    assert code.source == "# notebook 05"


def test_a_mention_of_an_equation_leads_to_it_where_there_is_one():
    said = "See Eq. (2), Eq. (7), notebook 05, Eq. (1), Eq. (1) of notebook 04, notebook 99, Eq. (1), Eq. 5 and `f`."
    fence = "```python\nf()  # Eq. (1), notebook 04\n```"
    _, cell = page(v4.new_markdown_cell("# T"), v4.new_markdown_cell(f"{said}\n\n{fence}"))
    five, four = (NAMES[k].replace("ipynb", "html") for k in (5, 4))
    for text, target in (("Eq. (2)", "#eq-2"), ("notebook 05, Eq. (1)", f"{five}#eq-1"),
                         ("Eq. (1) of notebook 04", f"{four}#eq-1")):  # fmt: skip
        said = said.replace(text, f'<a href="{target}">{text}</a>')
    assert cell.source == f"{said}\n\n{fence}"


def test_a_comment_leads_to_its_equation_and_a_text_does_not():
    html = '<span class="s2">"Eq. (1)"</span><span class="c1"># Eq. (1); Eq. (3)</span>Eq. (2)'
    expected = html.replace("# Eq. (1)", '# <a href="#eq-1">Eq. (1)</a>')
    assert book.comments_to_equations(html, NAMES[2], NUMBERED) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_equation_that_is_mentioned_is_there_once(path):
    notebook = nbformat.read(path, as_version=4)
    tags = re.findall(r"\\tag\{(\d+)\}", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"))
    assert len(tags) == len(set(tags)) and set(tags) == book.equations(notebook)
    numbered = {other.name: book.equations(nbformat.read(other, as_version=4)) for other in NOTEBOOKS}
    for cell in notebook.cells:
        said = len(re.findall(r"\bEq\. \(\d+\)", cell.source))
        assert book.to_equations(cell.source, path.name, numbered).count('<a href="') == said, cell.source


def test_solutions_are_folded():
    cells = page(
        v4.new_markdown_cell("# T"), v4.new_code_cell("1", metadata={"tags": ["solution"]}), v4.new_code_cell("2")
    )
    assert "hide-cell" in cells[1].metadata.tags and "hide-cell" not in cells[2].metadata.get("tags", [])


def test_an_incomplete_run_is_refused_by_name(tmp_path, capsys):
    for path in NOTEBOOKS[:-1]:
        shutil.copy(path, tmp_path)
    with pytest.raises(book.NotReady, match=f"no executed {NAMES[-1]}; `make run`"):
        book.gather(tmp_path, tmp_path / "source", ROOT / "book", ROOT / "notebooks")
    shutil.copy(NOTEBOOKS[-1], tmp_path)
    with pytest.raises(book.NotReady, match="npm install"):
        book.gather(tmp_path, tmp_path / "source", tmp_path, ROOT / "notebooks")


def test_a_book_takes_no_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(book.NotReady, match="holds something else than a book"):
        book.build(tmp_path / "run", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def ran(folder, alt=""):
    """A run of the notebooks as they are committed, one of them with a drawing and texts that mean harm; its folder."""
    run = folder / "run"
    run.mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        if path == NOTEBOOKS[0]:
            next(cell for cell in notebook.cells if cell.cell_type == "code").outputs = [
                v4.new_output("display_data", {"text/html": DRAWN.format(alt=alt)}),
                v4.new_output("stream", name="stdout", text=f"saved to {run / 'records' / 'x.json'}\n{NASTY}"),
                v4.new_output("execute_result", {"text/plain": NASTY}),
                v4.new_output("error", ename="ValueError", evalue=NASTY, traceback=[NASTY]),
            ]
        nbformat.write(notebook, run / path.name)
    return run


def test_what_cells_printed_has_no_control_characters(tmp_path):
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("node_modules"))
    mathjax = tmp_path / "book" / "node_modules" / "mathjax" / "es5"
    mathjax.mkdir(parents=True)
    (mathjax / "tex-svg-full.js").write_text("")
    source = tmp_path / "source"
    source.mkdir()
    book.gather(ran(tmp_path), source, tmp_path / "book", ROOT / "notebooks")
    written = (source / NAMES[0]).read_text(encoding="utf-8")
    assert "\\u001b" not in written and "\u202e" not in written
    (outputs,) = (cell.outputs for cell in nbformat.read(source / NAMES[0], as_version=4).cells if cell.get("outputs"))
    shown = "<script>alert(1)</script>\\x1b[31m\\u202e"  # Sphinx escapes the rest
    assert outputs[1].text.endswith(shown) and outputs[2].data["text/plain"] == shown
    assert outputs[3].evalue == shown and outputs[3].traceback == [shown]


@pytest.fixture
def built(tmp_path):
    """Builds the book of `ran` and returns its folder."""

    def built(alt):
        run, out = ran(tmp_path, alt), tmp_path / "book"
        stand_in = '<!DOCTYPE html><html lang="en"><title>Explorer</title><h1>Explorer</h1>'
        assert book.build(run, out, lambda path: path.write_text(stand_in)) == out / "index.html"
        return out

    return built


def check(folder):
    command = ["node", str(ROOT / "book" / "check.mjs"), str(folder), CHROMIUM]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")
def test_every_page_in_a_browser(built):
    folder = built(alt=' alt="a drawing"')
    first = (folder / NAMES[0].replace("ipynb", "html")).read_text()
    assert "saved to runs/run/records/x.json" in first, "no path of the machine that ran it"
    assert "<script>alert" not in first, "what a cell printed is shown, never run"
    assert first.count("&lt;script&gt;alert") == 2  # in a traceback each word has a colour of its own
    assert not re.search("[\x1b\u202e]", first) and "\\u202e" in first
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    pages, links, images, formulas, contrasts, computed = map(int, re.findall(r"\d+", done.stdout)[:6])
    assert pages >= len(NAMES) + 4 and links > 150 and images == 1 and formulas > 200 and contrasts > 10 * computed > 0
    mentioned = [page.read_text().count("#eq-") for page in folder.glob("0*.html")]
    assert min(mentioned) > 0, "each notebook mentions one of its equations"


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")
def test_the_check_sees_faults(built, tmp_path):
    built(alt="")
    few = tmp_path / "few"  # a check of all pages takes a minute
    shutil.copytree(tmp_path / "book", few, ignore=shutil.ignore_patterns("0[1-7]_*.html"))
    first = few / NAMES[0].replace("ipynb", "html")
    broken = r"<p>$x$</p><div class='math'>\[\nosuchmacro{1}\]</div><script src='https://example.org/x.js'></script>"
    pale = "<p style='color: #eee; background: #fff'>pale</p><a href='#nowhere'>to nothing</a>"
    pale += (
        "<b style='color: #eee; background: #fff'>x</b><a href='#eq-99'>Eq. (99)</a>"  # axe decides on no single letter
    )
    pale += "<p style='width: 800px'>wide</p>"
    first.write_text(
        first.read_text().replace("</article>", f"{broken}{pale}<script>throw Error('thrown')</script></article>")
    )
    done = check(few)
    assert done.returncode == 1
    for fault in (
        "image without alternative text", "raw TeX: $x$", "not understood", "asks the network", "script: thrown",
        "color-contrast, light: 1.16 at <p", "color-contrast, dark: 1.16 at <b", "beyond a screen of 390 px",
        f"no such place: {first.name}#nowhere", "#eq-99", "link to nothing",
    ):  # fmt: skip
        assert fault in done.stdout, (fault, done.stdout)
