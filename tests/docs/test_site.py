"""The site is built strictly: what a reader would stumble over makes the build fail.

These tests need the tools of ``make site`` in ``.build/sphinx``; without them they are skipped. ``.ci/run`` builds the
site before it runs them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from support.pages import DOCS, ROOT

if TYPE_CHECKING:
    from pathlib import Path

SPHINX = ROOT / ".build/sphinx/bin/sphinx-build"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SPHINX.exists(), reason="needs the tools of the site: make site"),
]
Build = "Callable[..., subprocess.CompletedProcess[str]]"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a small site with the settings and the command of the real one."""
    (line,) = re.findall(r"^\t\$\(SITE\)/bin/sphinx-build (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in ("conf.py", "_static"):
        copy = shutil.copytree if (DOCS / name).is_dir() else shutil.copy
        (tmp_path / "docs").mkdir(exist_ok=True)
        copy(DOCS / name, tmp_path / "docs" / name)
    (tmp_path / "imagewatch").mkdir()
    shutil.copy(ROOT / "imagewatch/__init__.py", tmp_path / "imagewatch")

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        start = "# Start\n\n- [Other](other.md): a page with a [part](other.md#part)\n"
        for name, text in {"index": start, "other": "# Other\n\n## Part\n\nText.\n", **more}.items():
            (tmp_path / f"docs/{name}.md").write_text(text)
        command = [SPHINX, *line.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_site_without_a_mistake_is_built(build: Build, tmp_path: Path):
    done = build(
        other="# Other\n\n## Part\n\n<!-- tested: x -->\n```sh\ntrue\n```\n\n| a |\n|---|\n| b <!-- `test_b` --> |\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / ".build/site/docs/other.html").read_text()
    assert "test_b" not in page
    assert "tested" not in page
    assert "docs/index.html" in (tmp_path / ".build/site/index.html").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[gone](gone.md)", "gone"),
        ("[gone](other.md#gone)", "gone"),
        ("[gone](#gone)", "gone"),
        ("![gone](gone.png)", "gone.png"),
        ("### Too deep", "header level"),
    ],
)
def test_a_mistake_in_a_page_makes_the_build_fail_and_is_named(build: Build, text: str, problem: str):
    done = build(index=f"# Start\n\n- [Other](other.md)\n\n{text}\n")
    assert done.returncode != 0
    assert problem in done.stderr


def test_a_page_that_is_in_no_list_of_contents_makes_the_build_fail(build: Build):
    done = build(lost="# Lost\n\nText.\n")
    assert done.returncode != 0
    assert "lost.md" in done.stderr


class _Loaded(HTMLParser):
    """What a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
        self.addresses += [value or "" for name, value in attrs if names.get(tag) == name]


def test_a_page_loads_nothing_from_a_network(build: Build, tmp_path: Path):
    assert build().returncode == 0
    site = tmp_path / ".build/site"
    loaded = _Loaded()
    for path in site.rglob("*.html"):
        loaded.feed(path.read_text())
    assert len(loaded.addresses) > 10
    assert not [address for address in loaded.addresses if ":" in address or address.startswith("//")]
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", path.read_text()), path
