"""An event as the JSON that receivers get. Pure.

The result file is published TOML of our own, so it can be read by Python's reader. Everything is masked once more: a
prompt may have the API key in it, which the receipt of its sender keeps.
"""

from __future__ import annotations

import tomllib
from datetime import datetime
from typing import Any

from imagewatch.journal.events import Event, page_of
from imagewatch.system.masking import known
from imagewatch.system.text import amount, iso, printable, to_json

SCHEMA = 1
_LONGEST_TEXT = 1000
_PARTS = {"completed": "receipt", "failed": "error", "unknown": "error", "held": "hold", "released": "hold"}
"""The key of the content, by event; of a cap it is the event itself."""


def page(event: Event) -> dict[str, Any]:
    """Return what receivers get of an event."""
    part = _PARTS.get(event.name, event.name)
    content = _result(event.content) if part in {"receipt", "error"} else page_of(event)
    found = {
        "schema": SCHEMA,
        "event": event.name,
        "event_id": event.id,
        "at": iso(event.at),
        "title": f"imagewatch: {event.name}",
        "text": printable(_text(event.name, content), _LONGEST_TEXT),
        part: content,
    }
    masked: dict[str, Any] = known.values(found)
    return masked


def body(found: dict[str, Any]) -> bytes:
    """Return a page as JSON in UTF-8; half of a character becomes an escape."""
    return to_json(found, ensure_ascii=False).encode("utf-8", "backslashreplace")


def source(found: dict[str, Any]) -> str:
    """Return the path of the prompt that an event is about, or an empty string."""
    content = found.get("receipt") or found.get("error") or {}
    return str(content.get("source", ""))


def _result(text: str) -> dict[str, Any]:
    try:
        found = _plain(tomllib.loads(text))
    except (ValueError, RecursionError):  # the row is damaged
        return {"message": "the result file cannot be shown"}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:  # noqa: ANN401  any TOML in, any JSON out
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return value if isinstance(value, str | int | float | bool) else str(value)


def _text(name: str, content: dict[str, Any]) -> str:
    """Return an event in one line, for a phone."""
    if name == "completed":
        images = content.get("images")
        count = len(images) if isinstance(images, list) else 0
        cost = content.get("credits_charged")
        price = "unknown cost" if cost is None else f"{amount(float(cost))} credits"
        return f"{content.get('source', '')}: {count} image{'' if count == 1 else 's'}, {price}"
    if name in {"failed", "unknown"}:
        return _joined(f"{content.get('source', '')}: {content.get('message', '')}", content.get("next"))
    if name == "cap":
        spent, cap = (amount(float(content.get(key, 0))) for key in ("spent", "credits"))
        return f"{content.get('setting')}: {spent} of {cap} credits are spent; the period ends {content.get('ends')}"
    folder = content.get("folder")
    parts = (content.get("kind"), content.get("provider"), f"folder {folder}" if folder else "")
    kind = ", ".join(str(part) for part in parts if part)
    if name == "released":
        return f"no longer on hold ({kind})"
    return _joined(f"on hold ({kind}): {content.get('reason', '')}", content.get("next"))


def _joined(first: str, second: object) -> str:
    return f"{first}; next: {second}" if second else first
