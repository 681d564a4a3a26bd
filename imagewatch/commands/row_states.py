"""What has become of the rows of a table that an earlier run, or another sender, has dropped.

A row is not dropped again while anything shows that its name was: the prompt in the inbox, a result file, the archive,
the record of dropped rows, or the daemon's status file. There is one exception: it failed, it certainly cost nothing,
and it was changed since.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from imagewatch.commands.table_rows import source_of
from imagewatch.config.locate import refusal
from imagewatch.config.schema import DELETE
from imagewatch.job.receipts import unvouched
from imagewatch.protocol import notice
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.commands.row_record import Entry
    from imagewatch.commands.table_rows import Row
    from imagewatch.config.schema import Folders

Known = Literal["new", "waiting", "completed", "failed", "recorded"]
"""``recorded``: recorded as dropped, or named in the daemon's status, and nothing shows what has become of it: in
flight, or its files were moved."""

_MOST_BYTES = 4 << 20
_MOST_TAGS = 2
"""Parts that a name may get between base name and ending if the plain name exists."""


@dataclass(frozen=True)
class Found:
    """A result file.

    Attributes:
        path: Its path.
        facts: Its keys; any user may have written them.
    """

    path: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class State:
    """What has become of a row.

    Attributes:
        known: In one word.
        is_changed: Whether what was dropped under this name asks for something else than the row.
        result: The newest result file, if there is one.
    """

    known: Known
    is_changed: bool = False
    result: Found | None = None


class RowStates:
    """Finds what has become of rows.

    Args:
        folders: Inbox, outbox, errors, archive.
        folder: The folder below each of them.
        dropped: The rows that are recorded as dropped.

    Raises:
        SpoolError: A folder with results exists and cannot be listed.
    """

    def __init__(self, folders: Folders, folder: str, dropped: dict[str, list[Entry]]) -> None:
        self._inbox = os.path.join(folders.inbox, folder)
        self._folder = folder
        self._dropped = dropped
        # Before the results are listed: what ends meanwhile has one.
        status = notice.read(folders.notice) if folders.notice else None
        self._in_flight = {one.name for one in status.in_flight.files} if status else set()
        self._receipts = by_stem(os.path.join(folders.outbox, folder), RECEIPT)
        self._errors = by_stem(os.path.join(folders.errors, folder), ERROR)
        self._archive = "" if folders.archive == DELETE else os.path.join(folders.archive, folder)

    def of(self, row: Row) -> State:
        """Return what has become of a row."""
        entries = self._dropped.get(row.stem, [])
        is_changed = bool(entries) and entries[-1].digest != row.digest
        source = source_of(self._folder, row.stem)
        if os.path.lexists(os.path.join(self._inbox, row.stem + SUFFIX)):
            return State("waiting", is_changed)
        if receipts := results(self._receipts.get(row.stem, []), source):
            is_other = not entries and receipts[-1].facts.get("prompt_sha256") != _hash(row.text)
            return State("completed", is_changed or is_other, receipts[-1])
        if self._archive and os.path.lexists(os.path.join(self._archive, row.stem + SUFFIX)):
            return State("completed", is_changed)
        if errors := results(self._errors.get(row.stem, []), source):
            is_free = sum(one.facts.get("charged") == "no" for one in errors) >= max(len(entries), 1)
            if is_changed and is_free and all(one.facts.get("charged") == "no" for one in errors):
                return State("new")
            is_other = not entries and errors[-1].facts.get("prompt_sha256", _hash(row.text)) != _hash(row.text)
            return State("failed", is_changed or is_other, errors[-1])
        # Asked last: for up to a second the status names also what has a result.
        is_known = bool(entries) or printable(source) in self._in_flight
        return State("recorded" if is_known else "new", is_changed)


def by_stem(folder: str, ending: str) -> dict[str, list[str]]:
    """Return the files with an ending in a folder, by each base name that they may belong to.

    If a name existed, a short id is between it and the ending.

    Raises:
        SpoolError: The folder exists and cannot be listed.
    """
    found: dict[str, list[str]] = {}
    try:
        with disk_errors(folder, "list the folder"):
            names = os.listdir(folder)
    except SpoolError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return {}
        error.hint = refusal(folder, os.R_OK | os.X_OK)
        raise
    for name in names:
        base = name.removesuffix(ending)
        if base == name:
            continue
        for _ in range(_MOST_TAGS + 1):
            found.setdefault(base, []).append(os.path.join(folder, name))
            base = base.rpartition(".")[0]
            if not base:
                break
    return found


def results(paths: Sequence[str], source: str) -> list[Found]:
    """Return the result files of a prompt, the newest last; those of others are left out."""
    found = []
    for path in paths:
        facts = read_result(path)
        if facts.get("source") == whole(source):
            found.append((_mtime(path), Found(path, facts)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def read_result(path: str, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the keys of a result file, or nothing if it cannot be read, is larger than a limit, or is none."""
    try:
        with open_file(path, most_bytes=most_bytes) as file:
            return unvouched(file.read(most_bytes).decode())
    except (OSError, ValueError, RecursionError):
        return {}


def _mtime(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
