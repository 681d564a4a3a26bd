"""The documentation matches the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imagewatch.commands.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_lists_every_command():
    assert set(re.findall(r"^\| `imagewatch (\w+)`", README, re.MULTILINE)) == set(COMMANDS)


def test_exit_codes_are_the_same_in_the_readme_and_the_help():
    epilog = dict(re.findall(r"^  (\d+) +(.+)$", str(cli.epilog), re.MULTILINE))
    assert len(epilog) > 5
    assert set(re.findall(r"^\| (\d+) \|", README, re.MULTILINE)) == set(epilog)


def test_every_link_in_the_documents_has_a_target():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_guarantee_names_single_tests_that_exist():
    page = (ROOT / "docs/guarantees.md").read_text()
    rows = re.findall(r"^\| (?!promise|---)(.+) \|$", page, re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row.rpartition(" | ")[2])
        assert named, row
        for path, name in named:
            assert f"def {name}(" in (ROOT / "tests" / path).read_text(), f"{path}: {name}"


@pytest.mark.parametrize("page", ["security", "watching"])
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / f"docs/{page}.md").read_text()))
    paths = list((ROOT / "tests").rglob("test_*.py"))
    files = {path.stem for path in paths}
    functions = {name for path in paths for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 15
    assert named <= files | functions
