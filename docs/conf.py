"""Sphinx settings of the report site. Nothing is executed here: the notebooks come with their outputs."""

import os
import re
import sys
from pathlib import Path

import pypandoc
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import m2helpers
from m2helpers.report.live import write_live
from m2helpers.report.slides import argument, write_slides

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.pages import rework

# nbsphinx calls pandoc by its name; the one that pypandoc_binary carries is enough.
os.environ["PATH"] = str(Path(pypandoc.get_pandoc_path()).parent) + os.pathsep + os.environ["PATH"]

project = "m2helpers"
author = "the m2helpers authors"
copyright = "2026, the m2helpers authors"
release = version = m2helpers.__version__

extensions = [
    "myst_parser",
    "nbsphinx",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
default_role = "py:obj"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

nbsphinx_execute = "never"
nbsphinx_requirejs_path = ""  # no page asks another site for anything: the report reads the same offline
nbsphinx_widgets_path = ""

bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # types here are prose ("array (n, v)"), not names to be linked
napoleon_use_rtype = False

html_theme = "furo"
html_title = "A language model that forecasts"
html_static_path = ["_static"]
html_css_files = ["custom.css", "live/live.css"]
html_js_files = [("reading.js", {"defer": "defer"})]
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .prompt"


def _mathml(node: nodes.Element, *, block: bool) -> str:
    """A formula as MathML, which browsers draw themselves: no script, no other site."""
    tex = node.astext().strip().strip("$")
    tex = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", tex)  # unknown to the converter; MathML's brackets grow by themselves
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", tex, error, location=node)
        return f"<code>{tex}</code>"


def _visit_inline(translator, node) -> None:
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _visit_block(translator, node) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def _link_to_pages(app, docname, source) -> None:
    """Notebooks stand in notebooks/ beside docs/, and here inside it: links to pages lose a step, diagrams stay there."""
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../").replace("](diagrams/", "](../../notebooks/diagrams/")


def _rework_notebook(app, document) -> None:
    if app.env.docname.startswith(("notebooks/", "solutions/")):
        rework(document)


def _write_slides(app, exception) -> None:
    """The slides stand beside the pages; their figures are those of the notebooks that the site shows."""
    if exception is None and app.builder.format == "html":
        source, out = Path(app.srcdir), Path(app.outdir)
        write_slides(argument(), source / "notebooks", source.parent / "notebooks" / "diagrams", out / "slides.html")


def _keep_colons(app, what, name, obj, options, lines) -> None:
    """In an attribute's first line napoleon takes what stands before a colon for a type: give it a comment."""
    if what == "attribute":
        lines[:0] = ["..", ""]


def _level_captions(app, pagename, templatename, context, doctree) -> None:
    """The captions of the contents are headings to a screen reader: of this level."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def _write_live(app, error) -> None:
    """The live page's weights and series are made from the records, and are in no commit."""
    if error is None and app.builder.format == "html":
        write_live(Path(app.outdir, "_static", "live"))


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", _write_live)
    app.connect("html-page-context", _level_captions, priority=900)  # after the theme's
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon's 500
    app.connect("source-read", _link_to_pages)
    app.connect("doctree-read", _rework_notebook)
    app.connect("build-finished", _write_slides)
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
