"""The documentation matches the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import DOCS, page, pages

ROOT = Path(__file__).parents[2]
FOR_USERS = [path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if path.parent != DOCS / "contributing"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shown(path: Path) -> str:
    """What a reader sees: without the comments."""
    return re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", pages(), ids=relative)
def test_every_link_of_a_page_has_a_target(path: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", path.read_text()):
        there = path.parent / target if target else path
        assert there.is_file(), f"{target} does not exist, or is a folder"
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_each_page_is_in_the_list_of_its_folder():
    for path in pages():
        index = path.parent / "index.md" if path.name != "index.md" else path.parents[1] / "index.md"
        if index.is_relative_to(DOCS) and path != DOCS / "index.md":
            target = path.relative_to(index.parent)
            assert f"]({target})" in index.read_text(), f"{relative(index)} has no link to {target}"


@pytest.mark.parametrize("path", FOR_USERS, ids=relative)
def test_a_page_for_users_names_no_test(path: Path):
    assert not re.search(r"\btest_\w+|::|# (?:tested|in CI)", shown(path))


def test_each_guarantee_names_single_tests_that_exist():
    rows = re.findall(r"^\| (?!promise|---)(.+) \|$", page("explanation/guarantees"), re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row.rpartition("<!--")[2])
        assert named, row
        for path, name in named:
            assert f"def {name}(" in (ROOT / "tests" / path).read_text(), f"{path}: {name}"


@pytest.mark.parametrize("name", ["security", "watching"])
def test_every_test_that_a_page_names_exists(name):
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", page(f"explanation/{name}")))
    paths = list((ROOT / "tests").rglob("test_*.py"))
    files = {path.stem for path in paths}
    functions = {name for path in paths for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 15
    assert named <= files | functions
