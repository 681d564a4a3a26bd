"""The address of the repository is set in one place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
NEW = "https://forge.example.net/team/watch"


def test_the_readme_clones_the_repository_of_the_project():
    (cloned,) = set(re.findall(r"^git clone (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert cloned == URL


@pytest.fixture
def clone(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in (".ci/set_url.py", "pyproject.toml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "page.md").write_text(f"{URL} {URL}/issues {URL}.git {URL}-other\n")
    (tmp_path / "image").write_bytes(b"\xff\x00" + URL.encode())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    return tmp_path


def set_url(clone: Path, url: str) -> str:
    command = [sys.executable, ".ci/set_url.py", url]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout


def test_one_command_sets_it_in_every_file(clone):
    assert NEW in set_url(clone, NEW)
    urls = tomllib.loads((clone / "pyproject.toml").read_text())["project"]["urls"]
    assert all(url.startswith(NEW) for url in urls.values())
    assert (clone / "page.md").read_text() == f"{NEW} {NEW}/issues {NEW}.git {URL}-other\n"
    assert (clone / "image").read_bytes() == b"\xff\x00" + NEW.encode()
    assert f"git clone {NEW} " in (clone / "README.md").read_text()


@pytest.mark.parametrize("wrong", ["", "http://x/y", "https://x", "https://x/y'z", "https://x/y z"])
def test_what_is_no_address_changes_nothing(clone, wrong):
    assert "is not the address of a repository" in set_url(clone, wrong)
    assert tomllib.loads((clone / "pyproject.toml").read_text())["project"]["urls"]["Source"] == URL
