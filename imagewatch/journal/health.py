"""Whether the ledger of a daemon can be used, for other processes than the daemon: nothing is written."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat

from imagewatch.journal.files import (
    MARK,
    foreign,
    is_unnoted,
    missing,
    newer,
    older,
    path_in,
    read_mark,
    recorded,
    require_sound,
    translated,
    unknown,
    was_there,
)
from imagewatch.journal.schema import VERSION
from imagewatch.system.errors import SpoolError

_BUSY_SECONDS = 1.0


def ledger_problem(state: str) -> SpoolError | None:
    """Return what keeps the daemon from recording what it sends, or None.

    Args:
        state: The state folder.
    """
    path, mark = path_in(state), os.path.join(state, MARK)
    if not os.path.lexists(path):
        return missing(path) if was_there(state) else None
    if refused := _not_writable(state, path):
        return refused
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # succeeds in a read-only file, too
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            connection.execute(f"PRAGMA user_version = {version}")  # fails there
            connection.execute("ROLLBACK")
            if version > VERSION:
                return newer(path, version)
            require_sound(connection)
            is_noted, found, count = _id(connection)
    except sqlite3.Error as error:
        return translated(path, error)
    return _replaced(path, read_mark(mark), found, count, is_noted=is_noted)


def _replaced(path: str, mark: tuple[str, int], found: str, count: int, *, is_noted: bool) -> SpoolError | None:
    """Return an error if a ledger, by its id and how much it has recorded, is not the one that was there before."""
    known, least = mark
    if known and found != known:
        return foreign(path)
    if count < least:
        return older(path)
    return unknown(path) if is_noted and count and not known else None


def _not_writable(state: str, path: str) -> SpoolError | None:
    """Return an error if the daemon's user, to whom the state folder belongs, may not write the file.

    Root may write everything; so it is not tried.
    """
    with contextlib.suppress(OSError):
        daemon = os.stat(state).st_uid
        for name in (path, path + "-wal", path + "-shm"):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name)
                is_own = status.st_uid == daemon
                if not daemon or status.st_mode & (stat.S_IWUSR if is_own else stat.S_IWOTH):
                    continue
                why = "its mode is read-only" if is_own else f"it belongs to user number {status.st_uid}"
                hint = f"chmod u+w {name}" if is_own else f"chown {daemon} {name}"
                message = f"the ledger cannot be written: {why}: {name}"
                return SpoolError(message, path=name, code=errno.EACCES, hint=hint)
    return None


def _id(connection: sqlite3.Connection) -> tuple[bool, str, int]:
    """Return whether a ledger has an id that was noted beside it, the id, and how much was recorded."""
    with contextlib.suppress(sqlite3.OperationalError):  # of an older version
        found = connection.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()
        is_noted = found is not None and not is_unnoted(connection)
        return is_noted, str(found[0]) if found else "", recorded(connection)
    return False, "", 0
