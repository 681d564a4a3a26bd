"""Logging: one line for each event, for a terminal, for the journal or as JSON; never a raw control character."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

_JOURNAL = "/run/systemd/journal/socket"
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""What syslog and the journal call these levels."""
_LONGEST_NAME = 64


def configure(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["auto", "console", "json"],
    out: TextIO | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    journal: str = _JOURNAL,
) -> None:
    """Set up logging for this process.

    Args:
        level: What is worth a line.
        form: ``console`` for people, ``json`` for programs, ``auto`` by where ``out`` goes: people at a terminal,
            an entry with fields in systemd's journal, JSON anywhere else.
        out: Where to; standard error without.
        environ: Shows whether ``out`` goes to the journal of systemd, and whether colors are wanted (``NO_COLOR``).
        journal: The journal's socket.
    """
    out = out or sys.stderr
    # httpx logs whole urls, and what signs a url is a secret.
    for name in ("httpx", "httpcore", "watchdog"):
        logging.getLogger(name).setLevel(logging.ERROR)
    colors = out.isatty() and not environ.get("NO_COLOR")
    render, factory = _way(form, out, journal if _is_journal(out, environ) else None, colors=colors)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _masked,
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )


def _way(form: str, out: TextIO, journal: str | None, *, colors: bool) -> tuple[list[Any], Callable[..., Any]]:
    """Return how an event becomes text, and what writes it.

    Args:
        form: As above.
        out: As above.
        journal: The journal's socket, if ``out`` goes there.
        colors: Whether a console has them.
    """
    lines = _Lines(out)
    if journal is not None and form == "auto":
        return [_escaped, _entry], functools.partial(_Journal, journal, lines)
    console = form == "console" or (form == "auto" and out.isatty())
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console)
    text = _console(colors=colors) if console else structlog.processors.JSONRenderer(ensure_ascii=True)
    level = [] if journal is None else [_prioritized]
    return [stamp, _escaped, text, *level], lambda *_: lines


def _is_journal(out: TextIO, environ: Mapping[str, str]) -> bool:
    """Return whether a stream is the one that systemd connected to its journal: it may be redirected."""
    with contextlib.suppress(OSError, ValueError):  # not a stream of the system
        status = os.fstat(out.fileno())
        return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def _console(*, colors: bool) -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=colors, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
    )


def _prioritized(_: object, name: str, text: str) -> str:
    """Put the level before each line in the way of ``sd-daemon(3)``; without it the journal has one level for all."""
    return "\n".join(f"<{_PRIORITIES[name]}>{line}" for line in text.split("\n"))


def _entry(logger: object, name: str, event: MutableMapping[str, Any]) -> dict[str, str]:
    """Return an entry of the journal: what people read, and each value as a field of its own."""
    del event["level"]
    fields = {
        "PRIORITY": str(_PRIORITIES[name]),
        "SYSLOG_IDENTIFIER": "imagewatch",
        **{_field(key): value if isinstance(value, str) else json.dumps(value) for key, value in event.items()},
    }
    return {**fields, "MESSAGE": _console(colors=False)(logger, name, event)}


def _field(name: str) -> str:
    """Return a name that the journal takes: it drops an entry with any other."""
    return "IMAGEWATCH_" + re.sub("[^A-Z0-9_]", "_", name.upper())[: _LONGEST_NAME - len("IMAGEWATCH_")]


class _Lines:
    """Lines on a stream. What it does not take is lost: a log never stops a job."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        with contextlib.suppress(OSError, ValueError):  # not a stream of the system
            self._descriptor = out.fileno()

    def info(self, text: str) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is None:
                self._out.write(text + "\n")
                self._out.flush()
                return
            # Past the stream: what it could not write it would keep, and fail with once more at the very end.
            rest = memoryview(f"{text}\n".encode(self._out.encoding or "utf-8", "backslashreplace"))
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    debug = warning = error = info


class _Journal:
    """The journal, by its own protocol; a plain line when it does not take an entry.

    Format: ``https://systemd.io/JOURNAL_NATIVE_PROTOCOL``. Each value goes with its length, so that none can end
    its field and begin another.
    """

    def __init__(self, path: str, spare: _Lines, *_: object) -> None:
        self._path = path
        self._spare = spare

    def info(self, **entry: str) -> None:
        content = b""
        for name, value in entry.items():
            text = value.encode("utf-8", "backslashreplace")
            content += name.encode() + b"\n" + len(text).to_bytes(8, "little") + text + b"\n"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.sendto(content, self._path)
        except OSError:  # larger than a datagram may be, or nothing listens
            self._spare.info("\n".join(f"<{entry['PRIORITY']}>{line}" for line in entry["MESSAGE"].split("\n")))

    debug = warning = error = info


def _masked(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take the keys out of whatever is logged: a server may have repeated one."""
    masked: MutableMapping[str, Any] = known.values(event)
    return masked


def _escaped(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape whatever another user may have written: file names, the API's messages, prompts."""
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
