"""Dependencies of imagewatch: the bounds, the lock files and the documentation of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.pages import page

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PYPROJECT["dependency-groups"]
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
TESTING = PYPROJECT["project"]["optional-dependencies"]["test"]
BUILDING = PYPROJECT["build-system"]["requires"]
DIRECT = {
    "service": DEPENDENCIES,
    "postgres": [*DEPENDENCIES, *PYPROJECT["project"]["optional-dependencies"]["postgres"]],
    "build": BUILDING,
    "docs": GROUPS["docs"],
    "release": [*BUILDING, *(one for one in GROUPS["release"] if isinstance(one, str))],
}
"""The lock files, and the requirements of ``pyproject.toml`` for each."""


def content(name: str) -> str:
    return (ROOT / f"requirements/{name}.txt").read_text()


def entries(name: str) -> dict[str, tuple[Version, int, str]]:
    """The entries of a lock file by name: version, number of hashes, and the packages that need it."""
    found = re.findall(
        r"^([a-z0-9.-]+)==(\S+)( ; [^\n]+?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)((?:    #[^\n]*\n)+)",
        content(name),
        re.MULTILINE,
    )
    return {one: (Version(version), hashes.count("sha256:"), via) for one, version, _, hashes, via in found}


@pytest.mark.parametrize("text", [*DEPENDENCIES, *TESTING, *DIRECT["release"], *DIRECT["docs"]])
def test_every_dependency_has_one_lower_and_one_upper_bound(text):
    operators = [one.operator for one in Requirement(text).specifier if one.operator != "!="]
    assert sorted(operators) == ["<", ">="]


def test_the_build_requirements_are_the_same_in_both_places():
    assert GROUPS["build"] == BUILDING


def test_the_lowest_versions_are_those_of_the_project_and_allowed_by_it():
    command = [sys.executable, ".ci/lowest.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = {Requirement(line).name: Requirement(line) for line in lines}
    assert [*pins] == [Requirement(one).name for one in (*DEPENDENCIES, *TESTING)]
    for one in map(Requirement, (*DEPENDENCIES, *TESTING)):
        (pin,) = pins[one.name].specifier
        assert pin.operator == "=="
        assert one.specifier.contains(pin.version), f"{one} does not allow its own lower bound"


@pytest.mark.parametrize("name", DIRECT)
def test_a_lock_file_contains_exactly_the_required_dependencies_within_their_bounds(name):
    locked = entries(name)
    asked = {canonicalize_name(Requirement(one).name): Requirement(one) for one in DIRECT[name]}
    assert {one for one, (_, _, via) in locked.items() if "imagewatch" in via} == {*asked}
    for one, requirement in asked.items():
        assert requirement.specifier.contains(locked[one][0]), f"{one}: run make lock"


@pytest.mark.parametrize("name", DIRECT)
def test_a_lock_file_pins_each_file_by_its_hash_and_names_no_host(name):
    pinned = re.findall(r"^[A-Za-z0-9].*$", content(name), re.MULTILINE)
    locked = entries(name)
    assert len(pinned) == len(locked) > 0
    assert all(hashes for _, hashes, _ in locked.values())
    for line in content(name).splitlines():
        assert not line.startswith("-")
        assert not re.search(r"://|/[a-z]|\\[a-z]|@|--(?!hash=)", line), line


def test_the_installation_for_a_shared_database_has_the_same_versions_as_the_other():
    service, shared = entries("service"), entries("postgres")
    assert {one: shared[one][0] for one in service} == {one: version for one, (version, _, _) in service.items()}
    assert "psycopg-binary" in {*shared} - {*service}


def test_the_documented_installation_checks_the_hash_of_all_that_it_fetches():
    text = page("howto/install-source")
    (block,) = re.findall(r"^<!-- in CI: install -->\n```sh\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    files = set()
    for line in re.findall("^python3 -m pip .+$", block, re.MULTILINE):
        if " -r " in line:
            assert " --require-hashes --only-binary :all: " in line
            files |= set(re.findall(r"-r (\S+)", line))
        else:
            assert " --no-deps " in line
            assert " --no-index " in line or " --no-build-isolation " in line
    assert files == {"requirements/build.txt", "requirements/service.txt"}


WITHOUT_PSYCOPG = """
import importlib, pathlib, sys
import pytest
sys.modules["psycopg"] = None
for path in sorted(pathlib.Path().glob("*/test_*.py")):
    if path.parent.name in {"journal", "shared"} or "psycopg" in path.read_text():
        try:
            importlib.import_module(".".join(path.with_suffix("").parts))
        except pytest.skip.Exception:
            pass
"""


def test_no_module_of_tests_needs_the_driver_of_postgresql_to_be_imported():
    """All other tests run where it is not installed."""
    command = [sys.executable, "-c", WITHOUT_PSYCOPG]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
