"""The journal that a configuration names: the file in the state folder, or the shared database.

A state folder belongs to one of the two. The file ``shared`` in it names the daemon of a shared database whose jobs the
folder has; without that file it belongs to ``ledger.sqlite3``. A daemon that would use the other one is refused: it
would count no request of before, and would not continue its jobs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from typing import TYPE_CHECKING

import msgspec

from imagewatch.config.shared import conninfo, instance_of, require_psycopg
from imagewatch.journal.counted import Counted
from imagewatch.journal.files import path_in
from imagewatch.journal.health import ledger_problem
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import ConfigError, DatabaseError, Problem, SpoolError, UncertainError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.journal.postgres.database import PostgresDatabase
    from imagewatch.journal.postgres.place import Place
    from imagewatch.system.disk import Disk

SHARED = "shared"
"""Name of the file in the state folder that names the daemon of a shared database."""


_MOST_BYTES = 65_536


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose jobs a state folder has, in a shared database.

    Attributes:
        account: The account.
        instance: The daemon.
        place: Random, of this state folder.
        moving: Where ``imagewatch migrate`` moves the journal: ``postgresql`` or ``sqlite``; empty: that is over.
    """

    account: str
    instance: str
    place: str
    moving: str = ""


def member_of(state: str) -> Member | None:
    """Return whose jobs a state folder has in a shared database; None: in none.

    Raises:
        SpoolError: The file cannot be read.
    """
    path = os.path.join(state, SHARED)
    try:
        with disk_errors(path, "read"), open(path, "rb") as file:
            return msgspec.json.decode(file.read(_MOST_BYTES), type=Member)
    except SpoolError as error:
        if error.code in {errno.ENOENT, errno.ENOTDIR}:
            return None
        raise
    except (ValueError, msgspec.DecodeError):
        hint = "restore it from a backup of the state folder"
        raise SpoolError(f"the file is damaged: {path}", path=path, hint=hint) from None


def place_of(config: Config, environ: Mapping[str, str]) -> Place:
    """Return where the rows of a configuration's daemon are.

    Raises:
        ConfigError: The library for PostgreSQL is missing.
    """
    require_psycopg()
    from imagewatch.journal.postgres.place import Place  # noqa: PLC0415  an extra

    shared = config.shared
    known = None if shared.instance else member_of(config.folders.state)  # a container's host name changes
    instance = known.instance if known and known.account == shared.account else instance_of(config)
    return Place(
        shared.database,
        shared.account,
        inbox=shared.inbox or instance,
        instance=instance,
        parameters=conninfo(shared, environ),
        is_replicated=shared.durability == "replicated",
        is_common=bool(shared.inbox),
    )


def open_journal(
    config: Config, clock: Callable[[], float], *, guarded: bool = False, environ: Mapping[str, str] | None = None
) -> Journal:
    """Return the journal of a configuration; it is opened when it is used.

    Args:
        config: State folder, shared database, limits.
        clock: Wall clock, seconds since the epoch; a shared database has its own.
        guarded: Whether the file has to be the one that was used before. The daemon's has to.
        environ: The environment.

    Raises:
        ConfigError: The library for PostgreSQL is missing.
    """
    if not config.shared.database:
        file = SqliteDatabase(path_in(config.folders.state), guarded=guarded)
        return Journal(file, config.limits, clock, budgets=config.budgets)
    place = place_of(config, os.environ if environ is None else environ)
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415  an extra

    database = PostgresDatabase(place)
    return Journal(database, config.limits, database.clock, budgets=config.budgets)


def problem(config: Config) -> SpoolError | None:
    """Return what keeps a daemon from recording what it sends, or None; for other processes, nothing is written."""
    try:
        require_own_store(config)
        if not config.shared.database:
            return ledger_problem(config.folders.state)
        with contextlib.closing(open_journal(config, lambda: 0.0)) as journal:
            journal.require()
            member = member_of(config.folders.state)
            database: PostgresDatabase = journal.file  # type: ignore[assignment]
            recorded = Counted(config.folders.state).read()
            database.require_own(member.place if member else "", config.shared.lease_seconds, recorded=recorded)
    except SpoolError as error:
        return error
    return None


def require_own_store(config: Config) -> None:
    """Make sure that a state folder belongs to the journal that the configuration names.

    Raises:
        SpoolError: It belongs to another one.
    """
    state, shared = config.folders.state, config.shared
    member, path = member_of(state), path_in(state)
    if member is not None and member.moving:
        why = f"the journal is being moved, and that is not finished: {state}"
        hint = f"run it again, with [shared] configured: imagewatch migrate --to {member.moving}"
    elif member is not None and not shared.database:
        why = f"the jobs of this state folder are in a shared database (account {member.account}): {state}"
        hint = "configure [shared] again; or move them while the daemon is stopped: imagewatch migrate --to sqlite"
    elif member is not None:
        require_same_names(member, config)
        return
    elif shared.database and os.path.lexists(path):
        why = f"this state folder has a ledger of its own: {path}"
        hint = "move it into the shared database while the daemon is stopped: imagewatch migrate --to postgresql"
    else:
        return
    raise SpoolError(why, path=state, hint=hint)


def require_same_names(member: Member, config: Config) -> None:
    """Make sure that a state folder belongs to the account and the instance that the configuration names.

    Raises:
        SpoolError: It belongs to others.
    """
    state, shared = config.folders.state, config.shared
    if member.account != shared.account:
        why = f"the jobs of this state folder belong to the account {member.account}, not {shared.account}: {state}"
        hint = f'set shared.account = "{member.account}"; or use another state folder'
    elif shared.instance and shared.instance != member.instance:
        why = f"the jobs of this state folder belong to the instance {member.instance}, not {shared.instance}: {state}"
        hint = f'set shared.instance = "{member.instance}"; or use another state folder'
    else:
        return
    raise SpoolError(why, path=state, hint=hint)


def begin(config: Config, journal: Journal, disk: Disk, *, replaces: bool = False) -> None:
    """Record in a shared database that the daemon of a configuration starts; without one there is nothing to do.

    Args:
        config: State folder, shared database.
        journal: Its journal.
        disk: The local disk.
        replaces: Whether its state folder takes the place of a lost one.

    Raises:
        ConfigError: The server must not be used as it is, or has no tables.
        DatabaseError: It cannot be reached.
        AlreadyRunning: Another daemon has this name.
        SpoolError: The state folder belongs to another journal.
    """
    require_own_store(config)
    if not config.shared.database:
        return
    database: PostgresDatabase = journal.file  # type: ignore[assignment]
    journal.common.lease_seconds = config.shared.lease_seconds
    state = config.folders.state
    known = member_of(state)
    member = known or new_member(database.place)
    if known is None:
        write_member(state, member, disk)
    try:
        _register(config, database, member, replaces=replaces)
    except UncertainError:
        raise
    except (ConfigError, SpoolError):
        if known is None:  # nothing of it is in the database
            disk.unlink(os.path.join(state, SHARED))
        raise


def _register(config: Config, database: PostgresDatabase, member: Member, *, replaces: bool) -> None:
    counted, folder, lease = Counted(config.folders.state), config.folders.inbox, config.shared.lease_seconds
    if replaces:
        counted.write(0)
    with unusable_as_config():
        database.require_direct()
        database.register(
            socket.gethostname(),
            folder,
            member.place,
            lease,
            replaces=replaces,
            recorded=counted.read(),
            note=counted.write,
        )


def new_member(place: Place, moving: str = "") -> Member:
    """Return what a state folder notes that gets a place in a shared database."""
    return Member(account=place.account, instance=place.instance, place=secrets.token_hex(16), moving=moving)


def write_member(state: str, member: Member, disk: Disk) -> None:
    """Note whose jobs a state folder has in a shared database; that survives a power cut."""
    disk.write(os.path.join(state, SHARED), msgspec.json.encode(member))
    disk.sync_folder(state)


@contextlib.contextmanager
def unusable_as_config() -> Iterator[None]:
    """Report a server that must not be used as it is as an error of the configuration."""
    try:
        yield
    except DatabaseError as error:
        if error.code == errno.EPROTO:
            raise ConfigError([Problem("shared.database", str(error), error.hint)]) from error
        raise


def watch(
    journal: Journal,
    page: Callable[[], tuple[str, int]],
    tick: Callable[[], object],
    on_change: Callable[[], object],
    on_offer: Callable[[], object],
) -> None:
    """Let other daemons of the account see that this one runs, if it has a shared database.

    Args:
        journal: The journal that ``begin`` has used.
        page: Returns what others may know of its state, as JSON, and how many requests it sends at the same time;
            called in another thread.
        tick: Called regularly in that thread.
        on_change: Called in another thread when something of the account may have changed.
        on_offer: Called in another thread when a prompt of the inbox is offered.
    """
    if journal.file.is_shared:
        database: PostgresDatabase = journal.file  # type: ignore[assignment]
        database.watch(page, tick, on_change, on_offer)


def end(journal: Journal) -> None:
    """Note that a daemon ends, if it has a shared database."""
    if journal.file.is_shared:
        database: PostgresDatabase = journal.file  # type: ignore[assignment]
        database.unregister()
