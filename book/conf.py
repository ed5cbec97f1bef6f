"""Sphinx's settings for the book, whose sources `cdpo_utils.book` lays out. Pages take nothing from the network."""

import re

from docutils import nodes

from cdpo_utils import book

project = "Constrained alignment of language models"
author = copyright = "The cdpo-utils contributors"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
html_theme = "furo"  # light or dark as the reader's system is, with a switch
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_use_index = False  # there is nothing to list
html_extra_path = ["extra"]  # copied as they are: the explorer
html_show_sourcelink = html_copy_source = False

mathjax_path = "tex-svg-full.js"  # one file, glyphs included
mathjax3_config = {
    "options": {"enableMenu": False},  # the menu's extras would be fetched when asked for
    "tex": {"packages": {"[-]": ["noundefined"]}},  # an unknown macro is an error, which check.mjs finds
}
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 2

nb_execution_mode = "off"  # the notebooks come executed
nb_merge_streams = True
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"


def tagged(doctree):
    """Displayed equations that have numbers of their own: (node, numbers)."""
    for node in doctree.findall(nodes.math_block):
        if numbers := re.findall(r"\\tag\{(\d+)\}", node.astext()):
            yield node, numbers


def keep_tags(app, doctree):
    """Such equations stay whole: Sphinx would wrap lines in `split`, which allows no `\\tag`."""
    numbered = app.env.__dict__.setdefault("numbered", {})
    for node, numbers in tagged(doctree):
        numbered.setdefault(f"{app.env.docname}.ipynb", set()).update(numbers)
        node["nowrap"] = True
        node[:] = [nodes.Text(rf"\begin{{equation*}}{node.astext()}\end{{equation*}}")]


def name_equations(app, doctree, docname):
    """They are places to lead to. This late, because the theme's box around each would have the same name."""
    for node, numbers in tagged(doctree):
        node["ids"] = [f"eq-{number}" for number in numbers]


def link_comments(app, page, template, context, doctree):
    if doctree:
        context["body"] = book.comments_to_equations(context["body"], f"{page}.ipynb", app.env.numbered)


def setup(app):
    app.connect("doctree-read", keep_tags)
    app.connect("doctree-resolved", name_equations)
    app.connect("html-page-context", link_comments)
