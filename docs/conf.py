"""The site: ``make site`` builds it from the pages of this folder, which are plain Markdown and need no generator.

The source folder is that of the project, so that links to the changelog and to examples are checked like all others.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from pygments.lexers.special import TextLexer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "imagewatch"
release = re.findall(r'^__version__ = "(.+)"$', (ROOT / "imagewatch/__init__.py").read_text(), re.MULTILINE)[0]
extensions = ["myst_parser"]
include_patterns = ["docs/**.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
root_doc = "docs/index"
nitpicky = True
myst_heading_anchors = 6
html_theme = "furo"
html_title = f"imagewatch {release}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["_static"]  # beside this file
html_css_files = ["site.css"]

_ENTRY = re.compile(r"^- \[[^\]]+\]\(([^):#]+)\.md\)", re.MULTILINE)
_FIRST = (
    '<!doctype html><meta charset="utf-8"><title>imagewatch</title><meta http-equiv="refresh" content="0; url={0}">'
)
_FIRST += '<a href="{0}">imagewatch</a>\n'


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:  # noqa: ARG001  the signature of the event
    """Make the lists of links in an ``index.md`` the contents at the side of each page."""
    if posixpath.basename(name) == "index":
        folder = posixpath.dirname(name)
        pages = [posixpath.normpath(posixpath.join(folder, page)) for page in _ENTRY.findall(source[0])]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *(f"/{page}" for page in pages), "```", ""])


def drop_comments(app: Sphinx, tree: nodes.document) -> None:  # noqa: ARG001  the signature of the event
    """Leave out the comments, which are for tests."""
    for node in list(tree.findall(nodes.raw)):
        if re.fullmatch(r"\s*(<!--.*?-->\s*)+", node.astext(), re.DOTALL):
            node.parent.remove(node)


def write_first_page(app: Sphinx, error: Exception | None) -> None:
    """Let the folder of the site open with the first page."""
    if error is None and app.builder.format == "html":
        Path(app.outdir, "index.html").write_text(_FIRST.format(f"{root_doc}.html"), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above."""
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", add_contents)
    app.connect("doctree-read", drop_comments)
    app.connect("build-finished", write_first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
