"""The daemon is in parts that are read in one sitting."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import imagewatch.daemon

MODULES = {path.stem: ast.parse(path.read_text()) for path in Path(imagewatch.daemon.__file__).parent.glob("*.py")}
MOST_LINES, MOST_ATTRIBUTES = 400, 20


def classes() -> dict[str, ast.ClassDef]:
    return {
        f"{module}.{node.name}": node
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def attributes(node: ast.ClassDef) -> set[str]:
    """The attributes that a class sets on its instances."""
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def test_no_class_has_more_than_400_lines():
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in classes().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_the_daemon_itself_has_at_most_20_attributes():
    found = attributes(classes()["loop.Daemon"])
    assert "_parts" in found
    assert len(found) <= MOST_ATTRIBUTES, sorted(found)


def test_the_package_lists_its_files_in_reading_order_and_leaves_none_out():
    listed = re.findall(r"^    (\w+)  ", ast.get_docstring(MODULES["__init__"]), re.MULTILINE)
    assert sorted(listed) == sorted(MODULES.keys() - {"__init__"})
