"""``docs/contributing/architecture.md`` matches the code: packages, imports, files, the path of a prompt, the rules."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from support.pages import page

from imagewatch.commands.main import COMMANDS
from imagewatch.job.rules import RULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "imagewatch"
PAGE = page("contributing/architecture")
PACKAGES = re.findall(r"^\| `(\w+)/` \| ?(.*?) ?\| .+ \|$", PAGE, re.MULTILINE)
"""Each package with its imports, the highest first."""
DISK = {"system/disk_calls", "system/kernel"}
"""The modules that rename and remove files."""
PLACES = re.findall(r"`(\w+/\w+\.py)` · `([\w.]+)`", PAGE)


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """The dotted names of all imports of a file, including those for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return frozenset(found)


def used(package: str) -> set[str]:
    """The other packages that a package imports."""
    names = {name for path in (PACKAGE / package).rglob("*.py") for name in imported(path)}
    parts = {name.split(".")[1] for name in names if name.startswith("imagewatch.")}
    return {part for part in parts if (PACKAGE / part).is_dir()} - {package}


def test_the_table_has_every_package_once():
    names = [name for name, _ in PACKAGES]
    assert len(names) == len(set(names))
    assert set(names) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize(("package", "imports"), PACKAGES)
def test_a_package_imports_only_lower_packages_and_exactly_those_in_the_table(package, imports):
    assert used(package) == set(re.findall(r"`(\w+)`", imports))
    order = [name for name, _ in PACKAGES]
    assert all(order.index(other) > order.index(package) for other in used(package))


def test_no_module_imports_from_the_module_of_a_command():
    commands = {f"imagewatch.commands.{module}" for module, _ in COMMANDS.values()}
    users = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name in commands or name.rpartition(".")[0] in commands for name in imported(path))
    }
    assert users == set()


def test_the_three_packages_of_folders_network_and_money_do_not_know_each_other():
    for package in ("inbox", "endpoint", "journal"):
        assert not used(package) & {"inbox", "endpoint", "journal"}


@pytest.mark.parametrize("package", [name for name, _ in PACKAGES])
def test_a_package_lists_its_modules_in_reading_order(package):
    """Each module has a line of its own in the package's docstring."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text())) or ""
    listed = re.findall(r"^[ *`-]*(\w+)`* +\S", docstring, re.MULTILINE)
    modules = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    assert modules <= set(listed), modules - set(listed)


def test_only_main_and_the_version_are_outside_of_a_package():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_function_on_the_trip_of_a_prompt_exists():
    assert len(PLACES) >= 12
    for file, name in PLACES:
        found = set()
        for node in ast.parse((PACKAGE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        assert name in found, f"{file}: {name}"


def test_the_state_table_is_the_one_in_the_code():
    rows = re.findall(r"^\| (.+?) \| ([A-Z_]+) \| (.+?) \|$", PAGE, re.MULTILINE)
    assert rows == [(rule.seen, rule.step.name, rule.step.value) for rule in RULES]


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("httpx", {"endpoint/client", "endpoint/download", "endpoint/http_clients", "notify/post"}),
        ("httpcore", {"endpoint/connection"}),
        ("watchdog", {"inbox/events"}),
        ("mcp", {"commands/mcp_server"}),
        ("tomli_w", {"commands/drop", "job/receipts"}),
        ("fcntl", {"inbox/open_files", "system/locks"}),
    ],
)
def test_a_library_is_used_by_few_modules(library, owners):
    users = {path for path in PACKAGE.rglob("*.py") if library in {name.split(".")[0] for name in imported(path)}}
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in users} == owners


@pytest.mark.parametrize(
    ("library", "packages"),
    [
        ("click", {"commands"}),
        ("pybase64", {"endpoint"}),
        ("PIL", {"commands", "gallery", "sandbox"}),
        ("sqlite3", {"journal"}),
    ],
)
def test_a_library_is_used_by_few_packages(library, packages):
    users = {path for path in PACKAGE.rglob("*.py") if library in {name.split(".")[0] for name in imported(path)}}
    assert {path.relative_to(PACKAGE).parts[0] for path in users} == packages


def test_only_the_package_for_postgresql_imports_its_library_and_that_package_is_imported_when_it_is_used():
    package = "imagewatch.journal.postgres"
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "journal/postgres"):
            continue
        assert "psycopg" not in {name.split(".")[0] for name in imported(path)}, path.name
        at_start = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in at_start if package in ast.unparse(node)], f"{path.name}: psycopg is an extra"


SQL = re.compile(
    r"\A\s*(SELECT\s.*\sFROM\s|INSERT\s+INTO\s|UPDATE\s+\w+\s+SET\s|DELETE\s+FROM\s|CREATE\s+(TABLE|INDEX|VIEW)\s|PRAGMA\s)",
    re.DOTALL,
)
BASE_TABLE = re.compile(r"\bimagewatch\.(?=\w+)(?!view)|\{SCHEMA\}\.")


def texts(path: Path) -> set[str]:
    """Return the text constants of a module; those of an f-string as they are written."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant | ast.JoinedStr)]
    plain = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return plain | {ast.unparse(node).removeprefix("f")[1:-1] for node in nodes if isinstance(node, ast.JoinedStr)}


def test_only_the_package_of_the_journal_has_sql():
    found = {path for path in PACKAGE.rglob("*.py") if any(SQL.match(text) for text in texts(path))}
    assert {path.relative_to(PACKAGE).parts[0] for path in found} == {"journal"}


def test_no_query_outside_of_the_package_for_postgresql_names_a_table_beside_its_view():
    for path in (PACKAGE / "journal").glob("*.py"):
        named = {text for text in texts(path) if SQL.match(text) and BASE_TABLE.search(text)}
        assert not named, path.name


def test_only_system_disk_and_the_files_of_sqlite_change_names_on_a_disk():
    changing = {"replace", "rename", "renames", "unlink", "remove", "rmdir", "link", "symlink", "fsync", "makedirs"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).with_suffix("").as_posix() in {*DISK, "journal/sqlite", "commands/demo"}:
            continue
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "os"
        }
        assert not calls & changing, path.name


def test_no_function_is_longer_than_forty_lines_and_no_class_than_four_hundred():
    long = [
        f"{path.name}:{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and (node.end_lineno or 0) - node.lineno + 1 > (40 if isinstance(node, ast.FunctionDef) else 400)
    ]
    assert not long
