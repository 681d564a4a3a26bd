"""Whether a server can be used: what it commits must be durable, and its tables must be ours."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING

import psycopg

from imagewatch.journal.postgres.schema import VERSION, version_of
from imagewatch.system.errors import DatabaseError

if TYPE_CHECKING:
    from imagewatch.journal.postgres.session import Session

_OLDEST = 140_000
"""The oldest version of PostgreSQL that is supported, as it numbers itself."""
_POOLER_SECONDS = 3.0
"""How long a transaction may take to begin while another one is open."""


def problems(session: Session, *, is_replicated: bool, with_tables: bool = True) -> list[tuple[str, str]]:
    """Return why a server must not be used, each with what to do.

    Args:
        session: A connection to it.
        is_replicated: Whether it must have a synchronous standby.
        with_tables: Whether its tables must be there.
    """
    row = session.execute(
        "SELECT current_setting('server_version_num')::int AS version, pg_is_in_recovery() AS is_standby, "
        "current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes, "
        "current_setting('synchronous_commit') AS commits, current_setting('synchronous_standby_names') AS standbys, "
        "current_setting('server_encoding') AS encoding"
    ).fetchone()
    assert row is not None
    found = []
    if row["version"] < _OLDEST:
        found.append(("is older than version 14", "use PostgreSQL 14 or newer"))
    if row["is_standby"]:
        found.append(("is a standby", "connect to the primary server"))
    found += [
        (f"has {name} off, so that a crash of its host may lose what was paid", f"set {name} = on")
        for name in ("fsync", "full_page_writes")
        if row[name] != "on"
    ]
    allowed = {"on", "remote_apply"} if is_replicated else {"on", "remote_apply", "remote_write", "local"}
    if row["commits"] not in allowed:
        why = f"has synchronous_commit = {row['commits']}, so that a crash may lose what was paid"
        found.append((why, "set synchronous_commit = on for this database user"))
    if is_replicated and not row["standbys"].strip():
        found.append(
            (
                "has no synchronous standby, so that a failover may lose what was paid",
                'set synchronous_standby_names; or for one server without failover: shared.durability = "single"',
            )
        )
    if row["encoding"] != "UTF8":
        found.append((f"has the encoding {row['encoding']}", "create it with the encoding UTF8"))
    return found + (_tables(session) if with_tables else [])


def _tables(session: Session) -> list[tuple[str, str]]:
    version = version_of(session)
    if not version:
        return [("has no tables of imagewatch", "create them: imagewatch db init")]
    if version < VERSION:
        return [(f"has tables of an older version ({version})", "imagewatch db upgrade, while all daemons are stopped")]
    if version > VERSION:
        return [(f"has tables of a newer version ({version})", "run the newer version of imagewatch")]
    return []


def require_usable(session: Session, *, is_replicated: bool) -> None:
    """Make sure that a server may be used.

    Raises:
        DatabaseError: It must not; the message has the cause.
    """
    for why, hint in problems(session, is_replicated=is_replicated):
        raise unusable(why, hint)


def unusable(why: str, hint: str) -> DatabaseError:
    """Return the error for a server that must not be used as it is."""
    return DatabaseError(f"the shared database {why}", code=errno.EPROTO, hint=hint)


def pooler(one: Session, other: Session) -> list[tuple[str, str]]:
    """Return a problem if a pooler gives each transaction another connection to the server, else nothing.

    Settings, locks and LISTEN belong to a connection, and would be lost. Two transactions overlap, and end in the order
    in which they began: such a pooler then has two free connections and gives the first session the other one.

    Args:
        one: A connection.
        other: Another one to the same server.
    """
    before = _begin(one)
    waits: list[int] = []
    thread = threading.Thread(target=_try_to_begin, args=(other, waits), daemon=True)
    thread.start()
    thread.join(_POOLER_SECONDS)
    is_pooled = thread.is_alive()  # it has one connection for both
    one.execute("COMMIT")
    thread.join(_POOLER_SECONDS)
    if waits:
        other.execute("COMMIT")
    if not is_pooled and _backend(one) == before:
        return []
    why = "is behind a pooler that shares its connections between transactions (such as PgBouncer)"
    return [(why, "connect to PostgreSQL itself, or set pool_mode = session for this database")]


def _begin(session: Session) -> int:
    session.execute("BEGIN")
    return _backend(session)


def _try_to_begin(session: Session, waits: list[int]) -> None:
    with contextlib.suppress(psycopg.Error):
        waits.append(_begin(session))


def _backend(session: Session) -> int:
    row = session.execute("SELECT pg_backend_pid() AS pid").fetchone()
    assert row is not None
    return int(row["pid"])
