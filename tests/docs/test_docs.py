"""The documents are held to the code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from imagewatch.commands.main import COMMANDS, cli
from imagewatch.job.rules import RULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "imagewatch"
ARCHITECTURE = (ROOT / "docs/ARCHITECTURE.md").read_text()
README = (ROOT / "README.md").read_text()


def layers() -> dict[str, int]:
    return {name: int(layer) for layer, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", ARCHITECTURE, re.MULTILINE)}


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """The dotted names of all that a file imports, those for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return frozenset(found)


def test_the_layer_table_names_every_module_and_nothing_else():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert set(layers()) == modules - {"__init__"}


@pytest.mark.parametrize("module", sorted(layers()))
def test_a_module_imports_only_from_lower_layers(module):
    table = layers()
    files = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else (PACKAGE / module).glob("*.py")
    for path in files:
        own = {name.split(".")[1] for name in imported(path) if name.startswith("imagewatch.")}
        for other in own & set(table) - {module}:
            assert table[other] < table[module], f"{path.name} imports {other}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("httpx", {"client"}),
        ("httpcore", {"network"}),
        ("sqlite3", {"database", "health", "ledger"}),
        ("watchdog", {"watcher"}),
        ("tomli_w", {"documents", "sender"}),
        ("pybase64", {"wire", "reading"}),
        ("click", {"cli", "admin", "submit", "demo"}),
        ("PIL", {"demo", "gallery", "sandbox"}),
        ("fcntl", {"durable", "writers"}),
    ],
)
def test_a_library_has_one_door(library, owners):
    users = [path for path in PACKAGE.rglob("*.py") if library in {name.split(".")[0] for name in imported(path)}]
    assert {path.stem if path.parent == PACKAGE else path.parent.name for path in users} == owners


def test_only_durable_changes_a_disk():
    changing = {"replace", "rename", "renames", "unlink", "remove", "rmdir", "link", "symlink", "fsync", "makedirs"}
    for path in PACKAGE.glob("*.py"):
        if path.stem in {"durable", "demo", "database"}:
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


def test_the_state_table_is_the_one_in_the_code():
    rows = re.findall(r"^\| (.+?) \| ([A-Z_]+) \| (.+?) \|$", ARCHITECTURE, re.MULTILINE)
    assert rows == [(rule.seen, rule.step.name, rule.step.value) for rule in RULES]


def test_the_readme_lists_every_command():
    assert set(re.findall(r"^\| `imagewatch (\w+)`", README, re.MULTILINE)) == set(COMMANDS)


def test_exit_codes_read_the_same_everywhere():
    epilog = dict(re.findall(r"^  (\d+) +(.+)$", str(cli.epilog), re.MULTILINE))
    line = re.search(r"^Exit codes: (.+?)\. All", README, re.MULTILINE | re.DOTALL)
    assert line
    assert {item.split()[0] for item in line[1].replace("\n", " ").split(" · ")} == set(epilog)


def test_no_function_is_longer_than_forty_lines():
    long = [
        f"{path.name}:{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 40
    ]
    assert not long


def test_every_link_in_the_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("page", ["guarantees", "security", "watching"])
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / f"docs/{page}.md").read_text()))
    paths = list((ROOT / "tests").rglob("test_*.py"))
    files = {path.stem for path in paths}
    functions = {name for path in paths for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 15
    assert named <= files | functions
