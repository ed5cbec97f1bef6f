"""Sphinx's settings for the book, whose sources `cdpo_utils.book` lays out. Pages take nothing from the network."""

from docutils import nodes

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


def keep_tags(app, doctree):
    """Equations with a number of their own stay whole: Sphinx would wrap lines in `split`, which allows no `\\tag`."""
    for node in doctree.findall(nodes.math_block):
        if r"\tag" in (formula := node.astext()):
            node["nowrap"] = True
            node[:] = [nodes.Text(rf"\begin{{equation*}}{formula}\end{{equation*}}")]


def setup(app):
    app.connect("doctree-read", keep_tags)
