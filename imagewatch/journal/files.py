"""The files of a ledger in the state folder: whether there was one, its id, saved copies; and the errors about them."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import sqlite3

import msgspec

from imagewatch.protocol.names import ANSWERS
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

FILE = "ledger.sqlite3"
MARK = "identity"
"""Name of the file with the id of the ledger, in the state folder, and how much it had recorded."""
SAVED = ".saved"
"""Added to the name of the file: where a ledger is saved that was deleted or replaced while it was open."""
MOVED = ".moved"
"""Added to the name of the file, with a number: a ledger that was moved into a shared database; it is not used."""
ARRIVED = ".new"
"""Added to the name of the file: a ledger that was copied out of a shared database, complete and not used yet."""
RESTORE = "restore it from a backup; or accept an empty one: imagewatch release --accept-new-ledger"
MARK_BYTES = 32 + 1 + 20 + 1
"""Of that file: id, blank, count, line feed; so the count can be written in its place."""
_ID = re.compile(r"[0-9a-f]{32}")


class _Sums(msgspec.Struct):
    """What a status repeats of a ledger."""

    month: dict[str, float | None] = {}
    redelivered: int = 0


def path_in(state: str) -> str:
    """Return the path of the journal in a state folder."""
    return os.path.join(state, FILE)


def was_there(state: str) -> bool:
    """Return whether a state folder had a ledger: it has the id of one, a saved one, a job, or a status of one."""
    if os.path.lexists(os.path.join(state, MARK)) or newest_saved(path_in(state)):
        return True
    for folder in (ANSWERS, "jobs", "paid"):
        with contextlib.suppress(OSError), os.scandir(os.path.join(state, folder)) as entries:
            if any(entries):
                return True
    with (
        contextlib.suppress(OSError, ValueError, msgspec.DecodeError),
        open(os.path.join(state, "status.json"), "rb") as file,
    ):
        sums = msgspec.json.decode(file.read(), type=_Sums)
        return bool(sums.redelivered or any(value for name, value in sums.month.items() if name != "cap"))
    return False


def read_mark(path: str) -> tuple[str, int]:
    """Return the id in such a file, or an empty string if none can be read, and how much that ledger recorded."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        name, _, recorded = file.read(64).strip().decode("latin-1").partition(" ")  # a codec that need not be loaded
        if _ID.fullmatch(name):
            return name, int(recorded or 0)
    return "", 0


def recorded(connection: sqlite3.Connection) -> int:
    """Return how often attempts and results were recorded in a ledger. It never becomes less."""
    found = connection.execute("SELECT value FROM meta WHERE name = 'recorded'").fetchone()
    return int(found[0]) if found else 0


def is_unnoted(connection: sqlite3.Connection) -> bool:
    """Return whether the id of a ledger could not be noted beside it yet, though it is the daemon's."""
    return connection.execute("SELECT 1 FROM meta WHERE name = 'unnoted'").fetchone() is not None


def newest_saved(path: str) -> str:
    """Return where a ledger was saved last that was deleted or replaced while open, or an empty string."""
    beside = sorted(pathlib.Path(path).parent.glob(f"{FILE}{SAVED}-*[0-9]"), key=lambda one: one.stat().st_mtime)
    return str(beside[-1]) if beside else ""


def translated(path: str, error: sqlite3.Error) -> SpoolError:
    """Return an error of SQLite as one of ours, with the next action."""
    code, why, hint = errno.EIO, f"cannot be used: {error}", "check the disk and the system log"
    match code_of(error):
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM as reason:
            doing = "opened" if reason == sqlite3.SQLITE_CANTOPEN else "written"
            code, why = errno.EACCES, f"cannot be {doing}: {error}"
            hint = (
                "give the state folder and its files to the daemon's user, and check that it is not mounted read-only"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            code, why, hint = (
                errno.EBUSY,
                "is locked by another program",
                "end that program; fuser -v lists it beside the daemon",
            )
        case sqlite3.SQLITE_FULL:
            code, why, hint = errno.ENOSPC, f"cannot be written: {error}", "free some space"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            why, hint = (
                f"cannot be used, it is damaged: {error}",
                f"do not delete it, it records what was paid; {RESTORE}",
            )
    return SpoolError(f"the ledger {why}: {path}", path=path, code=code, hint=hint)


def refused(path: str, error: OverflowError | sqlite3.IntegrityError) -> SpoolError:
    """Return the error for what cannot be stored, which is no matter of the disk: it would be the same again."""
    what = "a number is too large for the ledger" if isinstance(error, OverflowError) else str(error)
    return SpoolError(f"{what}: {path}", path=path, hint="please report it")


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error means that the content of the file is damaged."""
    return code_of(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's code of an error; 0 if it is Python's own, which has none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF


def missing(path: str) -> SpoolError:
    """Return the error for a ledger that is not there, though there was one."""
    saved = newest_saved(path)
    hint = f"rename {printable(saved)} to {FILE}, it is the deleted ledger; or {RESTORE}" if saved else RESTORE
    message = f"the ledger is missing, though there was one: {path}"
    return SpoolError(message, path=path, code=errno.ENOENT, hint=hint)


def incomplete(path: str) -> SpoolError:
    """Return the error for a ledger that took the place of the opened one and is not that one as it was last."""
    saved = newest_saved(path)
    restore = f"rename {printable(saved)} to {FILE}, it is the previous ledger" if saved else "put the newer one back"
    return SpoolError(
        f"the ledger was replaced by one that lacks the newest requests: {path}",
        path=path,
        code=errno.ESTALE,
        hint=f"{restore}; or accept this one: imagewatch release --accept-new-ledger",
    )


def older(path: str) -> SpoolError:
    """Return the error for an older copy of the daemon's ledger."""
    return SpoolError(
        f"this is an older copy of the ledger, which lacks the newest requests: {path}",
        path=path,
        code=errno.ESTALE,
        hint="put the newer one back; or accept this one: imagewatch release --accept-new-ledger",
    )


def unknown(path: str) -> SpoolError:
    """Return the error for a ledger with requests of which nothing shows whether they are the newest."""
    hint = "if it is the newest one, or a restored backup, accept it: imagewatch release --accept-new-ledger"
    return SpoolError(
        f"this ledger was put here, and may lack the newest requests: {path}",
        path=path,
        code=errno.ESTALE,
        hint=f"look through the inbox for prompts that may have been sent before; {hint}",
    )


def spoilt(path: str) -> SpoolError:
    """Return the error for a ledger into which another program has written while it was open."""
    saved = newest_saved(path)
    hint = f"rename {printable(saved)} to {FILE}, it is the previous ledger; or {RESTORE}" if saved else RESTORE
    message = f"another program has written into the ledger, and it is damaged or older now: {path}"
    return SpoolError(message, path=path, code=errno.EIO, hint=hint)


def foreign(path: str) -> SpoolError:
    """Return the error for a ledger that is another one than the daemon's."""
    return SpoolError(
        f"this is not the ledger that was here before: {path}",
        path=path,
        code=errno.ESTALE,
        hint="put the right one back; or accept this one: imagewatch release --accept-new-ledger",
    )


def newer(path: str, found: int) -> SpoolError:
    """Return the error for a ledger whose tables are those of a newer version."""
    message = f"the ledger was written by a newer imagewatch (format {found}): {path}"
    return SpoolError(message, path=path, code=errno.EPROTO, hint="run the newer version")


def require_sound(connection: sqlite3.Connection) -> None:
    """Make sure that tables and indexes are whole; reads all of the file.

    Raises:
        sqlite3.DatabaseError: They are not.
    """
    found = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
    if found != ["ok"]:
        error = sqlite3.DatabaseError(found[0].splitlines()[-1] if found else "integrity_check failed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
