"""``docs/log-events.md`` lists the log events that the code writes, with their fields and levels."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/log-events.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| ?(.*?) ?\| .+ \|$", PAGE, re.MULTILINE)
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
OF_EACH_JOB = {"job", "source"}


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """The levels and fields of each event on the page."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for event, levels, fields in ROWS:
        same = re.fullmatch(r"the same as `(\w+)`", fields)
        found[event] = (set(levels.split(", ")), found[same[1]][1] if same else set(re.findall(r"`(\w+)`", fields)))
    return found


def strings(node: ast.AST) -> list[str]:
    """The possible values of an expression if all are strings."""
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    assert isinstance(node, ast.Constant), f"line {node.lineno}: an event is a word of the list, not put together"
    return [str(node.value)]


def calls() -> list[tuple[str, set[str], set[str], bool]]:
    """Each call that logs: event, levels, named fields, and whether it has other fields."""
    found: list[tuple[str, set[str], set[str], bool]] = []
    for path in (ROOT / "imagewatch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not (levels := levels_of(node.func)):
                continue
            named = {keyword.arg for keyword in node.keywords if keyword.arg}
            found += [(event, levels, named, len(named) < len(node.keywords)) for event in strings(node.args[0])]
    return found


def levels_of(called: Any) -> set[str]:
    """The levels of a call of the logger; none if it is another call."""
    if isinstance(called, ast.IfExp):
        return levels_of(called.body) | levels_of(called.orelse)
    is_logger = isinstance(called, ast.Attribute) and re.search(r"\b_log$|get_logger\(\)$", ast.unparse(called.value))
    return {LEVELS[called.attr]} if is_logger else set()


def test_the_page_lists_every_event_of_the_code_once_and_no_other():
    events = [event for event, _, _ in ROWS]
    assert len(events) == len(set(events))
    assert set(events) == {event for event, _, _, _ in calls()}


def test_every_event_has_the_documented_levels():
    written: dict[str, set[str]] = {}
    for event, levels, _, _ in calls():
        written.setdefault(event, set()).update(levels)
    assert written == {event: levels for event, (levels, _) in documented().items()}


def test_every_named_field_of_an_event_is_documented():
    pages = documented()
    for event, _, fields, _ in calls():
        assert fields <= pages[event][1] | OF_EACH_JOB, event


def test_an_event_is_one_word():
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", event) for event, _, _, _ in calls())
