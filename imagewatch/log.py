"""Logging: one line per thing, pretty on a terminal, JSON otherwise; never a raw control character."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["auto", "console", "json"],
    out: TextIO | None = None,
) -> None:
    """Set up logging for this process.

    Args:
        level: What is worth a line.
        form: ``console`` for people, ``json`` for programs, ``auto`` by whether ``out`` is a terminal.
        out: Where to; standard error without.
    """
    out = out or sys.stderr
    console = form == "console" or (form == "auto" and out.isatty())
    # httpx logs whole urls, and what signs a url is a secret.
    for name in ("httpx", "httpcore", "watchdog"):
        logging.getLogger(name).setLevel(logging.ERROR)
    renderer: Any = (
        structlog.dev.ConsoleRenderer(
            colors=out.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=True)
    )
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            stamp,
            structlog.processors.format_exc_info,
            _escaped,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )


def _escaped(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape whatever a stranger may have written: file names, the API's words, prompts."""
    first = {key: event[key] for key in ("timestamp", "level", "event") if key in event}
    return {key: _lines(value) if key == "exception" else _safe(value) for key, value in {**first, **event}.items()}


def _lines(trace: str) -> str:
    """Escape a traceback and keep its lines."""
    return "\n".join(printable(line) for line in trace.split("\n"))


def _safe(value: object) -> object:
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else printable(value)
    if isinstance(value, list | tuple):
        return [_safe(item) for item in value]
    if isinstance(value, dict):
        return {str(_safe(str(key))): _safe(item) for key, item in value.items()}
    return value
