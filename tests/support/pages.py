"""The documentation as tests read it: its pages, and the blocks that a test runs, wherever in ``docs/`` they are.

A comment of HTML before a block names it, so that readers do not see the name: ``<!-- tested: install -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_MARKED = re.compile(r"^<!-- tested: (\w+) -->\n```(\w+)\n(.+?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """The text of a page, such as ``howto/notify``."""
    return (DOCS / f"{name}.md").read_text()


def pages() -> list[Path]:
    """All pages, and those in the folder of the project."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def marked(*kinds: str) -> dict[str, str]:
    """The blocks with a name on all pages; of some kinds only, such as ``sh``."""
    found = [one for path in sorted(DOCS.rglob("*.md")) for one in _MARKED.findall(path.read_text())]
    names = [name for name, _, _ in found]
    assert len(names) == len(set(names)), "a name is used twice"
    return {name: text for name, kind, text in found if not kinds or kind in kinds}


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a line, without its head; comments of HTML are left out."""
    rows = text[text.index(heading) :].partition("\n|")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", re.sub("<!--.*?-->", "", row))[1:-1]] for row in rows]
