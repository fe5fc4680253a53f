"""Sphinx configuration of the manual: `sphinx-build -W --keep-going -b html docs docs/_build`."""

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

project = "llm-env"
author = "The llm-env authors"
copyright = "2026, the llm-env authors"
release = re.search(r'^version = "(.*)"$', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository outside of docs/, which forges resolve
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_use_rtype = False
html_theme = "furo"
html_title = "llm-env"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]


def _block_math(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _inline_math(self, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def setup(app) -> None:
    """Render formulas as MathML when the pages are built: they need no script and no network."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))


html_math_renderer = "mathml"
