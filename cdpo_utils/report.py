"""The results of a run for reading: a text table for the terminal, HTML pages for the browser.

python -m cdpo_utils.report runs/latest         # how long each notebook took, as a Markdown table (TEACHING.md), and
                                                # what each policy of a pretrained model reaches
python -m cdpo_utils.report runs/a runs/b ...   # the latter by several seeds, a run a seed, and its mean over them
python -m cdpo_utils.report a.json b.json ...   # a pretrained model's estimates by `cdpo_utils.train`, a seed a file
"""

import argparse
import functools
import html
import json
import math
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
from nbconvert import HTMLExporter

from cdpo_utils import record
from cdpo_utils.files import write_whole
from cdpo_utils.guard import UNSEEN, one_line, visible

# heading, what it shows of a method row
COLUMNS = (
    ("notebook", lambda row: row["notebook"].split("_")[0]),
    ("method", lambda row: row["method"]),
    ("feedback", lambda row: row["feedback"]),
    ("split", lambda row: row["split"]),
    ("lam", lambda row: number(row["lam"], 3)),
    ("reward", lambda row: estimate(row, "reward")),
    ("cost", lambda row: estimate(row, "cost")),
    ("violation", lambda row: estimate(row, "violation", sign="+")),
    ("kl_ref", lambda row: estimate(row, "kl_ref")),
    ("gap %", lambda row: number(row["gap"], 2)),
    ("mass", lambda row: number(row["mass"], 3)),
    ("seconds", lambda row: number(row["seconds"], 1)),
)
EQUAL = (  # the same of a row of the comparison on equal terms
    ("method", lambda row: row["method"]),
    ("knob", lambda row: row["knob"]),
    ("lam", lambda row: number(row["lam"], 3)),
    ("reward", lambda row: number(row["reward"], 3)),
    ("cost", lambda row: number(row["cost"], 3)),
    ("violation", lambda row: number(row["violation"], 3, "+")),
    ("gap %", lambda row: number(row["gap"], 2)),
    ("gap %, test", lambda row: number(row["gap_test"], 2)),
    ("mass", lambda row: number(row["mass"], 3)),
    ("labels", lambda row: str(row["labels"])),
    ("answers", lambda row: str(row["answers"])),
    ("seconds", lambda row: number(row["seconds"], 1)),
)
SAMPLED = ("tokens", "refusal")  # beside the reward, where answers were sampled: length and the share of refusals
REACHED = ("reward gain", "cost change", "violation", "kl_ref", *SAMPLED)  # see `real.Real.judge`
WORDS = 4  # the first columns are words and stand to the left, the others are numbers

# nbconvert's, without the scripts for widgets and diagrams, which no page has and which come from the network
TEMPLATE = """
{%- extends 'index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
"""
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #ccc; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def number(value, digits, sign=""):
    """A number, or one per constraint, with fixed digits; "-" where it is not available."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(number(item, digits, sign) for item in value)
    return f"{value:{sign}.{digits}f}"


def estimate(row, name, sign=""):
    """A number of a method row and, where it was sampled, its interval (see `with_intervals`)."""
    text = number(row.get(name), 3, sign)
    low, high = row.get("intervals", {}).get(name, (None, None))
    return text if low is None else f"{text} [{number(low, 3, sign)}, {number(high, 3, sign)}]"


def with_intervals(rows, intervals):
    """The method rows, each with what a summary's intervals say of it: {estimate: (low, high)}, and the means SAMPLED.

    intervals: dicts with notebook, method, estimate, mean, low and high."""
    found = {}
    for item in intervals:
        known = found.setdefault((item["notebook"], item["method"]), {"intervals": {}})
        known["intervals"][item["estimate"]] = item["low"], item["high"]
        if item["estimate"] in SAMPLED:
            known[item["estimate"]] = item["mean"]
    return [row | found.get((row["notebook"], row["method"]), {"intervals": {}}) for row in rows]


def columns(rows):
    """COLUMNS; before the seconds those of SAMPLED, where some row of `with_intervals` has them."""
    sampled = [(name, functools.partial(estimate, name=name)) for name in SAMPLED if any(name in row for row in rows)]
    return [*COLUMNS[:-1], *sampled, COLUMNS[-1]]


def text_table(rows):
    """The method rows as plain text in columns."""
    shown = columns(rows)
    lines = [[heading for heading, _ in shown]] + [[visible(show(row)) for _, show in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    place = [str.ljust] * WORDS + [str.rjust] * (len(shown) - WORDS)
    return "\n".join(
        "  ".join(put(text, width) for put, text, width in zip(place, line, widths, strict=True)).rstrip()
        for line in lines
    )


def html_table(headings, lines, words):
    """A table from texts, escaped here; the columns from `words` on are numbers."""

    def tr(tag, texts):
        opening = [f"<{tag}>" if i < words else f'<{tag} class="number">' for i in range(len(texts))]
        cells = (f"{start}{html.escape(visible(text))}</{tag}>" for start, text in zip(opening, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    return "\n".join(["<table>", tr("th", headings), *(tr("td", line) for line in lines), "</table>"])


def minutes(seconds):
    """Seconds as people say them: 34 s, 2 min 05 s."""
    seconds = math.ceil(seconds)
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"


def times(seconds, summary):
    """What the notebooks of a run took, {notebook: seconds}, on the machine of its summary: a Markdown table."""
    lines = [f"| `{stem}` | {minutes(taken)} |" for stem, taken in seconds.items()]
    total = f"| all | {minutes(sum(seconds.values()))} |"
    cores, processor = summary["versions"]["cores"], summary["versions"].get("cpu")  # older summaries have no name
    machine = f"{cores} cores" + (f", {processor}" if processor else "")
    return "\n".join([f"| notebook | {machine} |", "|---|---|", *lines, total])


def reached(summary):
    """What the policies of a pretrained model reach: {method: (notebook, lam, {estimate: its line of intervals})}.

    A method that several notebooks judge is taken as the first of them has it."""
    lams, found = {(row["notebook"], row["method"]): row["lam"] for row in summary["methods"]}, {}
    for line in summary["intervals"]:
        notebook, method = line["notebook"], line["method"]
        first, _, known = found.setdefault(method, (notebook, lams.get((notebook, method)), {}))
        if first == notebook:
            known[line["estimate"]] = line
    return found


def estimates(summary):
    """What `reached` says, a Markdown table of `mean [low, high]`, a line a method."""
    lines = [["method", "notebook", "λ", *REACHED]]
    for method, (notebook, lam, known) in reached(summary).items():
        lines.append([method, notebook.split("_")[0], number(lam, 3), *(interval(known[name]) for name in REACHED)])
    return markdown(lines)


def estimates_over_seeds(summaries):
    """`reached` by several seeds, a summary a seed: a Markdown table with a line a method and seed, and one of the
    means over seeds with Student's t interval. Raises ValueError where two have one seed, more than that differs,
    or nothing was sampled, as on the bench."""
    from cdpo_utils.sweep import half_width  # it needs the runner, which needs this module

    if not all(summary.get("intervals") for summary in summaries):
        raise ValueError("no intervals; expected runs of a pretrained model")
    found, others = {}, []
    common = set.intersection(*(set(summary["parameters"]) for summary in summaries))  # notebooks that all have run
    for summary in summaries:
        (seed,) = {given["seed"] for given in summary["parameters"].values()}
        if seed in found:
            raise ValueError(f"two runs have seed {seed}; expected a run a seed")
        found[seed] = reached(summary)
        seedless = {"seed", "content"}  # what is held out, a part of `content`, is the seed's choice, too
        given = {notebook: summary["parameters"][notebook] for notebook in common}
        others.append({n: {k: one[k] for k in one.keys() - seedless} for n, one in given.items()})
    found = dict(sorted(found.items()))
    if others != others[:1] * len(others) or len(methods := {tuple(one) for one in found.values()}) > 1:
        raise ValueError("the runs differ by more than their seed in parameters or methods")
    by_seed, over = [["method", "seed", "λ", *REACHED]], [["method", "λ", *REACHED]]
    for method in methods.pop():
        for seed, one in found.items():
            _, lam, known = one[method]
            by_seed.append([method, str(seed), number(lam, 3), *(interval(known[name]) for name in REACHED)])
        means = pd.DataFrame(
            {"λ": one[method][1]} | {name: one[method][2][name]["mean"] for name in REACHED} for one in found.values()
        ).astype(float)
        means = [(means[name].mean(), half_width(means[name])) for name in means]
        over.append([method, *("-" if math.isnan(mean) else f"{mean:.3f} ± {half:.3f}" for mean, half in means)])
    return f"{markdown(by_seed)}\n\n{markdown(over)}"


def markdown(lines):
    """A Markdown table of lists of texts, the first of which are the headings."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(line):
    """`mean [low, high]` of an estimate."""
    return f"{number(line['mean'], 3)} [{number(line['low'], 3)}, {number(line['high'], 3)}]"


def over_seeds(results):
    """One method's estimates by several seeds, a Markdown table of `mean [low, high]` with their mean over seeds.

    results: what `cdpo_utils.train` writes about a pretrained model, one dict a seed. The interval of a seed is over
    prompts; the last column has Student's t interval over seeds, which has all else in it that a seed decides; an
    estimate that some seed lacks, as of benign prompts, is left out. Raises ValueError where methods differ, two
    results have one seed, or there are no intervals.
    """
    from cdpo_utils.sweep import half_width  # it needs the runner, which needs this module

    results = sorted(results, key=lambda result: result["config"]["seed"])
    if len(methods := {result["config"]["method"] for result in results}) > 1:
        raise ValueError(f"methods {', '.join(sorted(methods))}; expected one method by several seeds")
    if not methods:
        raise ValueError("nothing given")
    method = methods.pop()
    if len({result["config"]["seed"] for result in results}) < len(results):
        raise ValueError("two results have one seed; expected a result a seed")
    if not all(result.get("intervals") for result in results):
        raise ValueError("no intervals; expected results about a pretrained model")
    seeds = [str(result["config"]["seed"]) for result in results]
    lines = [["estimate", *(f"seed {seed}" for seed in seeds), "mean ± 95 %"]]
    found = [{i["estimate"]: i for i in result["intervals"] if i["method"] == method} for result in results]
    lams = [[row["lam"] for row in result["methods"] if row["method"] == method] for result in results]
    if all(lam is not None for (lam,) in lams):
        found = [{"λ": {"mean": lam}} | one for (lam,), one in zip(lams, found, strict=True)]
    for name in (name for name in found[0] if all(name in one for one in found)):
        means = pd.Series([one[name]["mean"] for one in found])
        texts = [interval(one[name]) if "low" in one[name] else number(one[name]["mean"], 3) for one in found]
        half = f" ± {number(half_width(means), 3)}" if len(means) > 1 else ""
        lines.append([name, *texts, number(means.mean(), 3) + half])
    return markdown(lines)


def title(path):
    """The heading a notebook opens with, or its name."""
    first = nbformat.read(path, as_version=4).cells[0].source.partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("# ") else path.stem


def write_html(folder, seconds, rows, versions, equal_terms=()):
    """A page for each executed notebook and index.html, whose path is returned.

    seconds: {notebook: time}; rows: method rows; versions: {package: version}; equal_terms: rows of notebook 07.
    """
    # nbconvert's newer template drops the alternative texts of the figures; the classic one keeps them
    exporter = HTMLExporter(template_name="classic", raw_template=TEMPLATE)
    links = []
    for stem, taken in seconds.items():
        path = folder / f"{stem}.ipynb"
        page, _ = exporter.from_filename(str(path))
        write_whole(path.with_suffix(".html"), page.translate(UNSEEN))
        heading = html.escape(visible(title(path)))
        links.append(f'<li><a href="{quote(stem)}.html">{heading}</a> ({minutes(taken)})</li>')
    shown = columns(rows)
    methods = html_table([heading for heading, _ in shown], [[show(row) for _, show in shown] for row in rows], WORDS)
    equal = ""
    if equal_terms:
        ordered = sorted(equal_terms, key=lambda row: row["gap"])
        table = html_table([head for head, _ in EQUAL], [[show(row) for _, show in EQUAL] for row in ordered], 2)
        equal = f"<h2>On equal terms</h2>\n<p>Notebook 07: the same labels, scorers and optimiser steps.</p>\n{table}"
    packages = html_table(["", ""], [[name, str(value)] for name, value in versions.items()], 2)
    index = folder / "index.html"
    write_whole(
        index,
        f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Run {html.escape(folder.name)}</title><style>{STYLE}</style></head>
<body>
<h1>Run {html.escape(folder.name)}</h1>
<p>{len(seconds)} notebooks in {minutes(sum(seconds.values()))}. Formulas in the pages are drawn by MathJax, which the
browser takes from the network; everything else is in the files.</p>
<ol>
{chr(10).join(links)}
</ol>
<h2>Methods</h2>
<p>violation = cost - budget: positive breaks the constraint. gap: 0 % is the exact constrained optimum, 100 % the
reference. A "-" is a value that is not available there. [low, high] is a 95 % interval of a sampled estimate; tokens
and refusal are the mean length of sampled answers and the share of them that open like a refusal.</p>
{methods}
{equal}
<h2>Versions</h2>
<p>{html.escape(record.SAME_BITS)}</p>
{packages}
</body>
</html>
""",
    )
    return index


def main(paths):
    """The command line: tables of a run, or over seeds, as text. Raises OSError or ValueError for what is neither."""

    def read(path):
        return json.loads(path.read_text(encoding="utf-8"))

    if not paths or not all(path.is_dir() for path in paths):
        return over_seeds([read(path) for path in paths])
    summary, *others = summaries = [read(path / "summary.json") for path in paths]
    if others:
        return estimates_over_seeds(summaries)
    taken = times(read(paths[0] / "done.json"), summary)
    return f"{taken}\n\n{estimates(summary)}" if summary.get("intervals") else taken  # older summaries have none


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m cdpo_utils.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folders of runs, or files, as above")
    paths = parser.parse_args().paths
    try:
        print(main(paths))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        expected = "expected the folder of a run, or results of cdpo_utils.train about a pretrained model"
        sys.exit(f"{', '.join(map(str, paths))}: {type(error).__name__}: {one_line(error)}; {expected}")
