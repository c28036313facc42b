"""The documentation site: `make docs` builds it into build/docs, offline, with warnings as errors.

Pages are Markdown that reads well on its own. The API reference comes from docstrings (Google style).
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import cotuning_kernels

project = "cotuning_kernels"
version = release = cotuning_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"cotuning_kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 100
napoleon_use_rtype = False

# Every reference in a docstring must lead somewhere. Types in signatures may be of other packages, or private.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"(?!cotuning_kernels\.).*"),
    (r"py:class", r"cotuning_kernels\.(?!functional|distributed|relationship)[a-z_]+\..*|.*\._\w+"),
    (r"py:mod", r".*"),
    (r"py:exc", r".*"),
    (r"py:.*", r"torch\..*"),
]

# The same object under two names, its module's and the package's, is no mistake.
suppress_warnings = ["ref.python"]

LINK = re.compile(r"^- \[[^\]]*\]\(([^)#:]+)\.(?:md|rst)\)", re.MULTILINE)


def add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    """The first link of each item on an index page is an entry of the navigation, below its section's heading."""
    if page not in ("index", "api/index"):
        return
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE):
        if entries := LINK.findall(section):
            caption = "" if section.startswith("#") else f":caption: {section.splitlines()[0]}\n"
            source[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(entries) + "\n```\n"


def write_mathml(self: Any, node: nodes.Element) -> None:
    """MathML, which browsers show by themselves; MathJax would come from a network."""
    mathml = tex2mathml(node.astext())
    if isinstance(node, nodes.math_block):
        mathml = mathml.replace("<math", '<math display="block"', 1)
    self.body.append(mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.connect("source-read", add_navigation)
