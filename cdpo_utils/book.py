"""The book: the executed notebooks of a run as one site with search, formulas, a dark mode, and the explorer.

    make book        (or python -m cdpo_utils.book, after `npm install --prefix book`)

Sphinx reads notebooks and Markdown through MyST. Not mystmd, whose theme comes from a server of its own and is in no
package. The site takes nothing from the network and can be read from disk.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from cdpo_utils import __version__, explorer, guard, record, report

PLACEHOLDER = "OWNER/cdpo-utils"  # in the place of a repository on GitHub, where none is known
TAG = f"v{__version__}"
LAUNCHERS = {  # Binder's file is part of a query, where a slash must not stand for itself
    "Colab": "https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name}",
    "Binder": "https://mybinder.org/v2/gh/{repository}/{tag}?urlpath=lab%2Ftree%2Fnotebooks%2F{name}",
    "Kaggle": "https://www.kaggle.com/kernels/welcome?src=https://github.com/{repository}/blob/{tag}/notebooks/{name}",
}
PAGES = {"symbols.md": "README.md", "teaching.md": "../TEACHING.md"}  # as seen from the notebooks


class NotReady(Exception):
    """Something that the book is made of is missing; the message says what, and what makes it."""


@functools.cache
def repository():
    """owner/name on GitHub from which the notebooks can be opened: $GITHUB_REPOSITORY, which a workflow there has, else
    that of the remote `origin`, else `PLACEHOLDER`."""
    git = ["git", "-C", str(record.repo_root()), "remote", "get-url", "origin"]
    try:
        remote = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        remote = ""
    found = re.search(r"\bgithub\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", remote)
    return os.environ.get("GITHUB_REPOSITORY") or (found[1] if found else PLACEHOLDER)


def tagged():
    """Whether the repository has the tag that the links name."""
    git = ["git", "-C", str(record.repo_root()), "rev-parse", "-q", "--verify", f"refs/tags/{TAG}"]
    try:
        return subprocess.run(git, capture_output=True).returncode == 0
    except OSError:  # no git
        return False


def launch_links(name):
    """Markdown that opens a notebook, such as 04_c_dpo.ipynb, elsewhere, at the tag of this version."""
    links = {where: url.format(repository=repository(), tag=TAG, name=name) for where, url in LAUNCHERS.items()}
    return "Open in " + " · ".join(f"[{where}]({url})" for where, url in links.items())


def cleaned(value):
    """A notebook, or a part of it, with control characters written out in all texts, as `report` does: Sphinx escapes
    HTML in what a cell printed, but lets these through or takes them for colours."""
    if isinstance(value, str):
        return value.translate(guard.UNSEEN)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return type(value)({name: cleaned(item) for name, item in value.items()})
    return value


def equations(notebook):
    """The numbers of a notebook's displayed equations, as their \\tag has them."""
    return {
        n for cell in notebook.cells if cell.cell_type == "markdown" for n in re.findall(r"\\tag\{(\d+)\}", cell.source)
    }


def to_equations(text, name, numbered):
    """`text` with each "Eq. (3)", "notebook 04, Eq. (3)" and "Eq. (3) of notebook 04" as an HTML link to that equation,
    where there is one. numbered: {file of a notebook: `equations`}; `name` is the file that the text is from."""

    def link(match):
        number = match[1] or match[3]
        where = next((other for other in numbered if other[:2] == number), None) if number else name
        if match[2] not in numbered.get(where, ()):
            return match[0]
        page = "" if where == name else where.replace(".ipynb", ".html")
        return f'<a href="{page}#eq-{match[2]}">{match[0]}</a>'

    return re.sub(r"(?:\b[Nn]otebook ([0-9]{2}), )?\bEq\. \((\d+)\)(?: of notebook ([0-9]{2}))?", link, text)


def comments_to_equations(page, name, numbered):
    """An HTML page with the same links in the comments of its code."""
    return re.sub(r'(?<=<span class="c1">)[^<]*', lambda match: to_equations(match[0], name, numbered), page)


def as_page(notebook, name, numbered):
    """An executed notebook as a page of the book, changed in place: launch links under its title; "notebook 04" and
    "Eq. (3)" in its prose links to that page and equation; solutions folded. For `numbered` see `to_equations`."""
    pages = {other[:2]: other for other in numbered if other != name}

    def link(match):
        return f"[{match[0]}]({pages[match[1]]})" if match[1] in pages else match[0]

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts = re.split(r"(^```.*?^```)", cell.source, flags=re.MULTILINE | re.DOTALL)  # every second one is code
            for k in range(0, len(parts), 2):
                prose = to_equations(parts[k], name, numbered)
                parts[k] = re.sub(r"(?<![\[`>])\b[Nn]otebook ([0-9]{2})\b(?![\]`]|</a>)", link, prose)
            cell.source = "".join(parts)
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.metadata.tags = [*tags, "hide-cell"]
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{launch_links(name)}\n{rest}"
    return notebook


def gather(run, folder, book, notebooks):
    """Lay out Sphinx's sources in `folder`, from the executed notebooks in `run`, the folder `book` and the folder
    `notebooks`, which says which notebooks there are. Raises NotReady where something is missing."""
    names = [path.name for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))]
    missing = [name for name in names if not (run / name).is_file()]
    if missing:
        raise NotReady(f"{run}: no executed {', '.join(missing)}; `make run` executes the whole series")
    mathjax = book / "node_modules" / "mathjax" / "es5" / "tex-svg-full.js"
    if not mathjax.is_file():
        raise NotReady(
            f"no MathJax in {book}: npm install --prefix {book} fetches it (Node.js is needed for that alone)"
        )
    where, executed = run.resolve(), {}
    for name in names:  # with no path of this machine
        text = (run / name).read_text(encoding="utf-8").replace(json.dumps(str(where))[1:-1], f"runs/{where.name}")
        executed[name] = cleaned(nbformat.reads(text, as_version=4))
    numbered = {name: equations(notebook) for name, notebook in executed.items()}
    for name, notebook in executed.items():
        nbformat.write(as_page(notebook, name, numbered), folder / name)
    (folder / "_static").mkdir()
    for file in mathjax, book / "book.css", book / "book.js":
        shutil.copy(file, folder / "_static")
    shutil.copy(book / "conf.py", folder)
    for page, file in PAGES.items():
        text = (notebooks / file).read_text(encoding="utf-8")
        for other, target in PAGES.items():
            text = text.replace(f"]({target})", f"]({other})").replace(f"](notebooks/{target})", f"]({other})")
        (folder / page).write_text(text, encoding="utf-8")
    titles = {name: guard.visible(report.title(run / name)) for name in names}
    words = {
        "notebooks": "\n".join(f"* [{title}]({name})" for name, title in titles.items()),
        "toctree": "\n".join(f"{title.partition(':')[0]} <{name}>" for name, title in titles.items()),
        "repository": repository(),
        "tag": TAG,
    }
    index = (book / "index.md").read_text(encoding="utf-8")
    for word, text in words.items():
        index = index.replace("{{" + word + "}}", text)
    (folder / "index.md").write_text(index, encoding="utf-8")


def build(run, out, write_explorer=explorer.write):
    """Build the site into `out` and return the path of its first page. Raises NotReady, also for a link to nothing."""
    if out.exists() and not (out / "searchindex.js").exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotReady(f"{out}: holds something else than a book; expected a new or empty folder, or an earlier book")
    if importlib.util.find_spec("sphinx") is None:
        raise NotReady('Sphinx is not installed: pip install -c constraints.txt -e ".[book]"')
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        (source / "extra").mkdir(parents=True)
        gather(run, source, record.repo_root() / "book", record.repo_root() / "notebooks")
        write_explorer(source / "extra" / "explorer.html")
        shutil.rmtree(out, ignore_errors=True)  # no page of an earlier book stays behind
        sphinx = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--builder", "html"]
        if subprocess.run([*sphinx, "--doctree-dir", Path(scratch) / "doctrees", source, out]).returncode:
            raise NotReady("Sphinx warned, see above: a link or a page is wrong")
    return out / "index.html"


@guard.told
def main(argv=None):
    """The command line. Returns the exit status: 0 built, 2 something is missing."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.book", description="Build the book.")
    root = record.repo_root()
    parser.add_argument("--run", type=Path, default=root / "runs" / "latest", metavar="DIR",
                        help="the run whose notebooks it holds (default: runs/latest)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=root / "build" / "book", metavar="DIR", help="default: build/book")
    args = parser.parse_args(argv)
    try:
        print(build(args.run, args.out))
    except NotReady as error:
        print(error, file=sys.stderr)
        return 2
    if repository() == PLACEHOLDER:
        print(f"no repository on GitHub is known: links to {', '.join(LAUNCHERS)} lead to {PLACEHOLDER}")
    if not tagged():
        print(f"no tag {TAG} is here: links to {', '.join(LAUNCHERS)} lead to nothing until the repository has it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
