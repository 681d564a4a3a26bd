"""Text for terminals and logs: nothing another user wrote reaches a screen raw. Pure."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from collections.abc import Sequence

# Controls (C0, DEL, C1), line and paragraph separators, bidirectional overrides, surrogates (undecodable bytes of
# file names), the byte order mark, and tags: letters that people do not see and models read. Tab and newline are
# controls too: one value is one line.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: str, limit: int = 2000) -> str:
    """Return text that is safe on any terminal, in one line.

    Args:
        text: Anything: a file name, an API message, a prompt.
        limit: Longest result in characters; longer text is cut and marked.

    Returns:
        The text with unsafe characters as backslash escapes.
    """
    cut = text if len(text) <= limit else text[:limit] + "…"
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), cut)


def problem_lines(message: str, problems: Sequence[object]) -> list[str]:
    """Return what went wrong in lines: the message, and below it every problem where there are several.

    Args:
        message: As in an error file; of several problems it may name the first.
        problems: As in an error file.
    """
    if len(problems) <= 1:
        return [printable(message)]
    count = f"{len(problems)} problems"
    first = count if message.startswith(f"{count}: ") else printable(message)
    return [first, *(f"  {printable(str(one))}" for one in problems)]


def amount(value: float) -> str:
    """Return a number of credits without a needless fraction: ``12``, ``12.5``, ``1250000``."""
    return f"{value:.10g}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural except for 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def to_json(value: object, **options: Any) -> str:  # noqa: ANN401  those of json.dumps
    """Return a value as JSON that every program can read: a number that JSON does not have (``inf``, ``nan``) is null.

    Args:
        value: Anything ``json.dumps`` takes.
        options: Those of ``json.dumps``.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole(text: str) -> str:
    """Return text that any UTF-8 file can hold: bytes that were never text become backslash escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def local(seconds: float) -> str:
    """Return a wall-clock time in seconds since the epoch as people here read it."""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def utc(seconds: float) -> datetime:
    """Return a wall-clock time in seconds since the epoch as UTC, to the millisecond."""
    moment = datetime.fromtimestamp(seconds, tz=UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


@overload
def iso(seconds: float) -> str: ...
@overload
def iso(seconds: float | None) -> str | None: ...
def iso(seconds: float | None) -> str | None:
    """Return a wall-clock time in seconds since the epoch as text in UTC, in whole seconds; None without one."""
    return None if seconds is None else utc(seconds).isoformat(timespec="seconds").replace("+00:00", "Z")
