"""``.ci/optional.sh`` installs the packages that some tests need, as far as they can be had."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APT = """#!/bin/sh
echo "$*" >> "$HOME/calls"
[ "$1" = install ] || exit 0
for name; do
    case " $GONE " in *" $name "*) echo "E: Unable to locate package $name" >&2; exit 100;; esac
done
for name; do touch "$HOME/installed/$name"; done
"""
DPKG = """#!/bin/sh
for name; do :; done
[ -e "$HOME/installed/$name" ] && printf installed
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host whose apt-get and dpkg-query only note what they are to do."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in {"apt-get": APT, "dpkg-query": DPKG}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(host: Path, gone: str = "") -> str:
    environ = {"PATH": f"{host}/bin:{os.environ['PATH']}", "HOME": str(host), "GONE": gone}
    done = subprocess.run([ROOT / ".ci/optional.sh"], env=environ, capture_output=True, text=True, check=True)
    return done.stdout


def installed(host: Path) -> set[str]:
    return {path.name for path in (host / "installed").iterdir() if not path.name.startswith("-")} - {"install"}


def test_all_packages_are_installed_at_the_same_time(host: Path) -> None:
    assert run(host) == ""
    assert {"postgresql", "fish", "zsh"} <= installed(host)
    calls = (host / "calls").read_text()
    assert len(re.findall("^install ", calls, re.MULTILINE)) == 1
    assert run(host) == ""
    assert (host / "calls").read_text() == calls, "nothing is missing the second time"


def test_one_package_that_cannot_be_had_does_not_keep_the_others_from_being_installed(host: Path) -> None:
    assert run(host, gone="chromium syncthing") == "not installed: chromium syncthing\n"
    assert {"postgresql", "fish", "zsh"} <= installed(host)
    assert not {"chromium", "syncthing"} & installed(host)
