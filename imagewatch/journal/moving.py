"""Moves the journal of a stopped daemon between its state folder and a shared database.

At no moment two journals can be used. The order of the acts, each durable before the next one::

    to PostgreSQL                                   to SQLite
    1 the file ``shared``: moving to postgresql     1 the file ``shared``: moving to sqlite
    2 copy the ledger, compare, commit              2 copy into a new file, compare, sync, name it ``.new``
    3 rename the ledger: ``.moved-N``               3 remove the daemon from the database, commit
    4 the file ``shared``: not moving               4 ``.new`` becomes the ledger, ``identity`` names it
                                                    5 remove the file ``shared``

While ``shared`` names a move of the journal, no daemon and no command uses either of them. A killed move is run
again: whether its transaction was committed shows the row of the daemon in the database, which has the random place
of this state folder. Before that row is read, the account's row is locked, so that a COMMIT of which the outcome was
not known is over. Until the transaction is committed the move starts over, afterwards it is finished.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sqlite3
from typing import TYPE_CHECKING

import msgspec

from imagewatch.journal.counted import FILE as COUNTED
from imagewatch.journal.files import ARRIVED, MARK, MOVED, path_in, recorded, require_sound, translated
from imagewatch.journal.health import ledger_problem
from imagewatch.journal.opening import (
    SHARED,
    Member,
    member_of,
    new_member,
    place_of,
    require_same_names,
    unusable_as_config,
    write_member,
)
from imagewatch.journal.schema import VERSION, prepare
from imagewatch.journal.sqlite import keep_private
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError, UncertainError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.journal.postgres.copying import Copied
    from imagewatch.journal.postgres.place import Place
    from imagewatch.journal.postgres.session import Session
    from imagewatch.system.disk import Disk

POSTGRESQL, SQLITE = "postgresql", "sqlite"
_BUSY_SECONDS = 5.0


def to_postgresql(config: Config, disk: Disk, environ: Mapping[str, str]) -> tuple[Copied | None, str]:
    """Move the journal into the shared database; the caller has the locks of the daemon.

    Args:
        config: State folder, shared database.
        disk: The local disk.
        environ: The environment.

    Returns:
        What was copied; None if that was done before, by a move that was killed. And where the old ledger is kept;
        empty if that is not known any more.

    Raises:
        SpoolError: It cannot be moved; the message has the cause.
        ConfigError: The database must not be used as it is.
    """
    from imagewatch.journal.postgres import copying  # noqa: PLC0415  an extra

    state, place, path = config.folders.state, place_of(config, environ), path_in(config.folders.state)
    member = member_of(state)
    _require_begins(member, POSTGRESQL, config)
    if member is None:
        _require_ledger(state)
    with unusable_as_config(), copying.connected(place) as session:
        is_new, member = member is None, member or new_member(place, moving=POSTGRESQL)
        if is_new:
            write_member(state, member, disk)
        copied, kept = None, ""
        if not _is_there(session, member):
            copied, kept = _upload(session, config, member, place, disk, is_new=is_new)
        elif os.path.lexists(path):
            with _opened(path):
                kept = _put_aside(path, disk)
    _forget_count(state, disk)
    write_member(state, msgspec.structs.replace(member, moving=""), disk)
    return copied, kept


def to_sqlite(config: Config, disk: Disk, environ: Mapping[str, str]) -> Copied | None:
    """Move the journal out of the shared database; see ``to_postgresql``."""
    from imagewatch.journal.postgres import copying  # noqa: PLC0415  an extra

    state, place, path = config.folders.state, place_of(config, environ), path_in(config.folders.state)
    member = member_of(state)
    if member is None:
        hint = "remove [shared] from the configuration, then start the daemon"
        raise SpoolError(f"the journal of this state folder is not in a shared database: {state}", hint=hint)
    _require_begins(member, SQLITE, config)
    if not member.moving and os.path.lexists(path):
        why = f"there is a ledger, though the journal is in the shared database: {path}"
        raise SpoolError(why, path=path, hint="move that file away, then run this again")
    copied = None
    with unusable_as_config(), copying.connected(place) as session:
        is_there = _is_there(session, member)
        if not member.moving and not is_there:
            why = f"the shared database has no daemon with the name {member.instance} and this state folder: {state}"
            raise SpoolError(why, hint="check shared.database; or restore the database from its backup")
        if not member.moving:
            copying.require_no_other_inbox(session)
        write_member(state, msgspec.structs.replace(member, moving=SQLITE), disk)
        if is_there:
            with copying.locked(session):
                copied = _download(session, path, member, disk)
                copying.leave(session)
    _use(path, member, disk)
    _forget_count(state, disk)
    disk.unlink(os.path.join(state, SHARED))
    disk.sync_folder(state)
    return copied


def _require_begins(member: Member | None, to: str, config: Config) -> None:
    """Make sure that no other move is to be finished first, and that there is something to move."""
    state = config.folders.state
    if member is not None:
        require_same_names(member, config)
    if member is not None and member.moving and member.moving != to:
        why = f"another move of the journal is not finished: {state}"
        raise SpoolError(why, path=state, hint=f"finish it first: imagewatch migrate --to {member.moving}")
    if member is not None and to == POSTGRESQL and not member.moving:
        why = f"the journal of this state folder is in the shared database already (account {member.account}): {state}"
        raise SpoolError(why, path=state, hint="start the daemon")


def _require_ledger(state: str) -> None:
    """Make sure that there is a ledger that can be used.

    Raises:
        SpoolError: There is none, or it is damaged, or of another version.
    """
    path = path_in(state)
    if error := ledger_problem(state):
        raise error
    if not os.path.lexists(path):
        hint = "start the daemon with [shared]; there is nothing to move"
        raise SpoolError(f"there is no ledger: {path}", path=path, code=errno.ENOENT, hint=hint)


def _upload(
    session: Session, config: Config, member: Member, place: Place, disk: Disk, *, is_new: bool
) -> tuple[Copied, str]:
    """Copy the ledger into the database, and put it aside; where that cannot begin, all is as before."""
    from imagewatch.journal.postgres import copying  # noqa: PLC0415  an extra

    state, path, is_committed = config.folders.state, path_in(config.folders.state), False
    try:
        _require_ledger(state)
        with _opened(path) as file:
            with copying.locked(session):
                host, folder = socket.gethostname(), config.folders.inbox
                copied = copying.to_postgresql(session, file, place, member.place, host, folder)
            is_committed = True
            return copied, _put_aside(path, disk)
    except UncertainError:
        raise
    except SpoolError:
        if is_new and not is_committed:
            disk.unlink(os.path.join(state, SHARED))
        raise


def _is_there(session: Session, member: Member) -> bool:
    """Return whether the database has the daemon of this state folder."""
    from imagewatch.journal.postgres import copying  # noqa: PLC0415  an extra

    with copying.locked(session):
        return copying.place_in(session) == member.place


@contextlib.contextmanager
def _opened(path: str) -> Iterator[sqlite3.Connection]:
    """Open a ledger that no other program can read or write during the block; all of it is in one file then."""
    with _translated(path), contextlib.closing(_connected(path)) as file:
        prepare(file)
        file.execute("PRAGMA journal_mode = DELETE")
        file.execute("BEGIN EXCLUSIVE")
        require_sound(file)
        yield file
        file.execute("ROLLBACK")


def _connected(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    connection.row_factory = sqlite3.Row
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return connection


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise translated(path, error) from error


def _put_aside(path: str, disk: Disk) -> str:
    """Give a ledger that was moved another name, and return that."""
    kept = next(name for number in range(1, 10_000) if not os.path.lexists(name := f"{path}{MOVED}-{number}"))
    disk.rename(path, kept)
    disk.sync_folder(os.path.dirname(path))
    return kept


def _download(session: Session, path: str, member: Member, disk: Disk) -> Copied:
    """Copy the journal out of the database into a new file beside the ledger's name."""
    from imagewatch.journal.postgres import copying  # noqa: PLC0415  an extra

    part, folder = f"{path}.part", os.path.dirname(path)
    for name in (part, f"{part}-journal", path + ARRIVED):
        if os.path.lexists(name):
            disk.unlink(name)
    keep_private(part)
    with _translated(part), contextlib.closing(_connected(part)) as file:
        file.execute("PRAGMA synchronous = FULL")
        prepare(file)
        file.execute("BEGIN EXCLUSIVE")
        copied = copying.to_sqlite(session, file)
        file.execute("INSERT INTO meta VALUES ('id', ?)", (member.place,))
        file.execute("COMMIT")
        require_sound(file)
    with disk_errors(part, "write"), open(part, "rb") as written:
        disk.sync(written, part)
    disk.rename(part, path + ARRIVED)
    disk.sync_folder(folder)
    return copied


def _forget_count(state: str, disk: Disk) -> None:
    """Forget how many attempts this daemon had recorded in a database that it has left."""
    path = os.path.join(state, COUNTED)
    if os.path.lexists(path):
        disk.unlink(path)


def _use(path: str, member: Member, disk: Disk) -> None:
    """Make the copy the ledger of the state folder.

    Raises:
        SpoolError: It is missing.
    """
    folder = os.path.dirname(path)
    if os.path.lexists(path + ARRIVED) and not os.path.lexists(path):
        disk.rename(path + ARRIVED, path)
        disk.sync_folder(folder)
    with _translated(path), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
        found = file.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()
        version, count = file.execute("PRAGMA user_version").fetchone()[0], recorded(file)
    if found is None or found[0] != member.place or version != VERSION:
        why = f"the ledger is not the one that was copied from the shared database: {path}"
        raise SpoolError(why, path=path, code=errno.ESTALE, hint="move that file away, then run this again")
    disk.write(os.path.join(folder, MARK), f"{member.place} {count:020d}\n".encode())
    disk.sync_folder(folder)
