"""``docs/reference/log-events.md`` lists the log events that the code writes, with their fields and levels."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from support.pages import page

from imagewatch.job.receipts import _IDS

ROOT = Path(__file__).parents[2]
PAGE = page("reference/log-events")
ROWS = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| ?(.*?) ?\| .+ \|$", PAGE, re.MULTILINE)
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
OF_EACH_JOB = {"job", "source"}
NOT_WRITTEN = {"completed": {"status", "error", "reason"}, "unknown": {"reason"}}
"""Fields of events that share their fields with others, which these never have."""


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """The levels and fields of each event on the page."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for event, levels, fields in ROWS:
        names = set(re.findall(r"`([\w-]+)`", fields))
        if same := re.fullmatch(r"the same as `(\w+)`, except .*", fields):
            names = found[same[1]][1] - names
        found[event] = (set(levels.split(", ")), names)
    return found


def strings(node: ast.AST) -> list[str]:
    """The possible values of an expression if all are strings."""
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    assert isinstance(node, ast.Constant), f"line {node.lineno}: an event is a word of the list, not put together"
    return [str(node.value)]


def calls() -> list[tuple[str, set[str], set[str]]]:
    """Each call that logs: event, levels and fields."""
    found: list[tuple[str, set[str], set[str]]] = []
    for path in (ROOT / "imagewatch").rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not (levels := levels_of(node.func)):
                continue
            *_, function = (one for one in functions if node in ast.walk(one))  # the innermost
            fields = {"exception"} if ast.unparse(node.func).endswith(".exception") else set()
            for keyword in node.keywords:
                fields |= {keyword.arg} if keyword.arg else keys(keyword.value, function)
            found += [(event, levels, fields - NOT_WRITTEN.get(event, set())) for event in strings(node.args[0])]
    return found


def keys(node: Any, function: ast.FunctionDef) -> set[str]:
    """The keys that a mapping can have of which a function logs all entries."""
    match node:
        case ast.Dict():
            named = {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
            return named.union(*(keys(node.values[n], function) for n, key in enumerate(node.keys) if key is None))
        case ast.IfExp():
            return keys(node.body, function) | keys(node.orelse, function)
        case ast.DictComp():  # with some of the entries of another mapping
            return keys(node.generators[0].iter.func.value, function)  # type: ignore[attr-defined]
        case ast.Name():
            return set().union(*(assigned(node.id, one, function) for one in ast.walk(function)))
        case ast.Attribute(attr="names"):
            return OF_EACH_JOB
        case ast.Call() if ast.unparse(node) == "facts.get('ids', {})":
            return set(_IDS)
    pytest.fail(f"line {node.lineno}: not known which fields {ast.unparse(node)} has")


def assigned(name: str, node: ast.AST, function: ast.FunctionDef) -> set[str]:
    """The keys that a statement of a function puts into a mapping."""
    match node:
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=at), slice=ast.Constant(value=key))]) if at == name:
            return {str(key)}
        case ast.Assign(targets=[ast.Name(id=at)], value=value) if at == name:
            return keys(value, function)
        case ast.AnnAssign(target=ast.Name(id=at), value=value) | ast.AugAssign(target=ast.Name(id=at), value=value):
            return keys(value, function) if at == name else set()
    return set()


def levels_of(called: Any) -> set[str]:
    """The levels of a call of the logger; none if it is another call."""
    if isinstance(called, ast.IfExp):
        return levels_of(called.body) | levels_of(called.orelse)
    is_logger = isinstance(called, ast.Attribute) and re.search(r"\b_log$|get_logger\(\)$", ast.unparse(called.value))
    return {LEVELS[called.attr]} if is_logger else set()


def test_the_page_lists_every_event_of_the_code_once_and_no_other():
    events = [event for event, _, _ in ROWS]
    assert len(events) == len(set(events))
    assert set(events) == {event for event, _, _ in calls()}


def test_every_event_has_the_documented_levels():
    written: dict[str, set[str]] = {}
    for event, levels, _ in calls():
        written.setdefault(event, set()).update(levels)
    assert written == {event: levels for event, (levels, _) in documented().items()}


def test_every_event_has_the_documented_fields_and_no_other():
    written: dict[str, set[str]] = {}
    for event, _, fields in calls():
        written.setdefault(event, set()).update(fields - OF_EACH_JOB)
    assert written == {event: fields for event, (_, fields) in documented().items()}


def test_an_event_is_one_word():
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", event) for event, _, _ in calls())
