"""The status files in the folders: what they are called, what is in them, and how a program reads them.

The daemon writes ``imagewatch-status.txt`` for people and ``imagewatch-status.json`` for programs, with the same
content. Other people may write the folder that they are in, so nothing in them is trusted: they may be missing, damaged
or written by someone else. No decision about money depends on them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from imagewatch.protocol.names import STATUS_JSON, STATUS_TEXT
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

TEXT: Final = STATUS_TEXT
JSON: Final = STATUS_JSON
SCHEMA: Final = 1
MOST_FILES: Final = 100
"""How many files of each kind are named; all are counted."""
MOST_BYTES: Final = 4_000_000
GRACE_SECONDS: Final = 60.0
"""How long after the announced time the next writing may come."""

_FIRST_YEAR, _LAST_YEAR = 1970, 9000
_Time = Annotated[datetime, Meta(tz=True)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]


class HoldNotice(msgspec.Struct, frozen=True, kw_only=True):
    """Why prompts are not sent.

    Attributes:
        kind: The kind of hold: ``credits``, ``key``, ``manual`` and so on.
        provider: The provider whose prompts wait; None for all.
        folder: The first-level folder whose prompts wait; None for all.
        message: Why.
        since: Since when; None if that is not known.
        next_try_at: When the daemon tries again automatically; None if only a person ends the hold.
        next: What to do.
    """

    kind: str
    message: str
    next: str
    provider: str | None = None
    folder: str | None = None
    since: _Time | None = None
    next_try_at: _Time | None = None


class WaitingFile(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that waits in the inbox.

    Attributes:
        name: Its path below the inbox.
        since: When its newest file was last changed; None if that is not known.
        why: ``ready``, or a key of ``waiting.why`` in ``status.json``.
        message: The same for people.
        next: What to do; empty if nothing needs to be done.
    """

    name: str
    why: str
    message: str
    next: str = ""
    since: _Time | None = None


class IgnoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the inbox that is ignored: its path below the inbox, why, and what to do (may be empty)."""

    name: str
    message: str
    next: str = ""


class StuckFile(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt of a job that cannot finish for a reason of its own: its path below the inbox, and what to do."""

    name: str
    message: str


class RedeliveredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A finished prompt that was delivered again and not sent: its path below the inbox, and when it came."""

    name: str
    at: _Time | None = None


class FileInFlight(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt whose job is at work: its path below the inbox."""

    name: str


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """The prompts that wait: how many, since when the oldest one waits, and some of them, the oldest first."""

    count: _Count = 0
    oldest_since: _Time | None = None
    files: tuple[WaitingFile, ...] = ()


class InFlight(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs at work: how many, and some of them."""

    count: _Count = 0
    files: tuple[FileInFlight, ...] = ()


class Ignored(msgspec.Struct, frozen=True, kw_only=True):
    """The files in the inbox that are ignored: how many, and some of them."""

    count: _Count = 0
    files: tuple[IgnoredFile, ...] = ()


class Redelivered(msgspec.Struct, frozen=True, kw_only=True):
    """The redeliveries that were skipped: how many, and the last ones, the newest first."""

    count: _Count = 0
    files: tuple[RedeliveredFile, ...] = ()


class Stuck(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs that cannot finish for a reason of their own: how many, and some of them."""

    count: _Count = 0
    files: tuple[StuckFile, ...] = ()


class FolderNotice(msgspec.Struct, frozen=True, kw_only=True):
    """A first-level folder that takes turns with the others (empty: the inbox itself), and how many prompts wait."""

    folder: str
    waiting: _Count = 0


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``imagewatch-status.json``.

    Attributes:
        schema: Version of this format.
        version: Version of the daemon.
        state: ``running``, ``on_hold`` (nothing is sent at the moment) or ``stopped``.
        written_at: When it was written.
        next_writing_at: When it will be written again at the latest; None when the daemon was stopped.
        stopped_at: When the daemon was stopped; None while it runs.
        holds: Why prompts are not sent; also those of a single provider or folder.
        waiting: The prompts that wait.
        in_flight: The jobs at work.
        ignored: The files that are ignored.
        redelivered: The redeliveries that were skipped.
        stuck: The jobs that cannot finish.
        folders: The first-level folders that take turns.
    """

    schema: Literal[1] = SCHEMA
    version: str
    state: Literal["running", "on_hold", "stopped"]
    written_at: _Time
    next_writing_at: _Time | None = None
    stopped_at: _Time | None = None
    holds: tuple[HoldNotice, ...] = ()
    waiting: Waiting = Waiting()
    in_flight: InFlight = InFlight()
    ignored: Ignored = Ignored()
    redelivered: Redelivered = Redelivered()
    stuck: Stuck = Stuck()
    folders: tuple[FolderNotice, ...] = ()

    def is_overdue(self, now: float) -> bool:
        """Return whether a daemon that did not report its end should have written again by now, and has not.

        Args:
            now: Wall-clock time, seconds since the epoch.
        """
        if self.state == "stopped":
            return False
        due = self.next_writing_at or self.written_at
        return now > due.timestamp() + GRACE_SECONDS

    def is_running(self, now: float) -> bool:
        """Return whether a daemon runs, as far as this says.

        Args:
            now: Wall-clock time, seconds since the epoch.
        """
        return self.state != "stopped" and not self.is_overdue(now)


def read(folder: str | os.PathLike[str]) -> Notice | None:
    """Return the status that is in a folder, or None if there is none that can be read.

    Its texts are safe to show on a terminal.

    Args:
        folder: ``folders.notice`` of the configuration, or the watched folder of a share.
    """
    path = os.path.join(os.fspath(folder), JSON)
    try:
        with open_file(path, most_bytes=MOST_BYTES) as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return decode(raw)


def decode(raw: bytes) -> Notice | None:
    """Return the content of ``imagewatch-status.json``, or None if it is not valid."""
    if len(raw) > MOST_BYTES:
        return None
    try:
        found = msgspec.json.decode(raw, type=Notice)
        return msgspec.convert(_safe(msgspec.to_builtins(found, builtin_types=(datetime,))), Notice)
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError):
        return None


def encode(notice: Notice) -> bytes:
    """Return a status as JSON that is also safe inside of an HTML page."""
    text = msgspec.json.format(msgspec.json.encode(notice), indent=1)
    for mark in b"<>&":
        text = text.replace(bytes([mark]), b"\\u%04x" % mark)
    return text + b"\n"


def at(seconds: float) -> datetime:
    """Return a wall-clock time, seconds since the epoch, as it is in a status: UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), tz=UTC)


def _safe(value: Any) -> Any:  # noqa: ANN401  what JSON can hold
    """Return a value whose texts have no characters that change how a screen shows them.

    Raises:
        ValueError: A time cannot be meant.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, datetime) and not _FIRST_YEAR <= value.year <= _LAST_YEAR:
        raise ValueError(value)  # not every calculation with it is possible
    if isinstance(value, list | tuple):
        return [_safe(one) for one in value]
    return {name: _safe(one) for name, one in value.items()} if isinstance(value, dict) else value
