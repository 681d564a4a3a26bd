"""What is wrong with the shared database, as errors with a next action."""

from __future__ import annotations

import errno
import re

import psycopg

from imagewatch.system.errors import DatabaseError, UncertainError
from imagewatch.system.text import printable

_CHECK = "check the server and the network (imagewatch db check); the daemon resumes automatically"
_RECOVER = (
    "put the newer database back; or stop all daemons of the account, and write the missing rows again on each "
    "host: imagewatch db recover, then imagewatch db recover --yes"
)
_CAUSES: dict[type[psycopg.Error], tuple[str, str]] = {
    psycopg.errors.UndefinedTable: ("has no tables of imagewatch", "create them: imagewatch db init"),
    psycopg.errors.InvalidSchemaName: ("has no tables of imagewatch", "create them: imagewatch db init"),
    psycopg.errors.DuplicatePreparedStatement: (
        "is behind a pooler that shares its connections between transactions",
        "connect to PostgreSQL itself, or set pool_mode = session for this database",
    ),
    psycopg.errors.UndefinedFunction: ("has tables of another version", "imagewatch db check"),
    psycopg.errors.UndefinedColumn: ("has tables of another version", "imagewatch db check"),
    psycopg.errors.InsufficientPrivilege: (
        "does not let its user do that",
        "run imagewatch db init as the same database user, or grant it the rights on the schemas of imagewatch",
    ),
    psycopg.errors.ReadOnlySqlTransaction: ("is read-only", "connect to the primary server"),
    psycopg.errors.DiskFull: ("has a full disk", "free some space on its server"),
    psycopg.errors.LockNotAvailable: (
        "is locked by another program",
        "end that program; pg_stat_activity lists it",
    ),
    psycopg.errors.QueryCanceled: ("took too long, or an administrator canceled the query", _CHECK),
}
_ACCESS = "check the password: the credential database_password, ~/.pgpass or the service file"
_USER = "check pg_hba.conf and the name of the user"
_AT_CONNECT = (
    (
        re.compile("no password supplied"),
        "needs a password, and this process has none",
        "put it into ~/.pgpass, or run the command with the credential database_password (docs/howto/several-hosts.md)",
    ),
    (re.compile("password authentication failed"), "refuses the password", _ACCESS),
    (re.compile("no pg_hba.conf entry"), "refuses the user", _USER),
    (re.compile("role .* does not exist"), "refuses the user", _USER),
    (re.compile("database .* does not exist"), "does not exist", "create it, then run: imagewatch db init"),
    (
        re.compile("too many clients|too many connections|remaining connection slots"),
        "has too many connections",
        "raise max_connections of the server; the daemon resumes automatically",
    ),
)
"""What a server answers to a connection: libpq passes on only its text. In another language it is out of reach."""
_READ_ONLY = re.compile("session is (?:read-only|not read-write)")
"""Message of libpq about a server with target_session_attrs = read-write."""
AGAIN = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
"""The transaction was undone and may succeed now."""


def translated(error: psycopg.Error) -> DatabaseError:
    """Return an error of psycopg as one of ours, with the next action."""
    for kind, (why, hint) in _CAUSES.items():
        if isinstance(error, kind):
            return DatabaseError(f"the shared database {why}: {_text(error)}", code=errno.EIO, hint=hint)
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        for pattern, why, hint in _AT_CONNECT:
            if pattern.search(str(error)):
                return DatabaseError(f"the shared database {why}: {_text(error)}", code=errno.EIO, hint=hint)
    if isinstance(error, psycopg.OperationalError) and _READ_ONLY.search(str(error)):
        hint = "connect to the primary server, or make this one the primary; the daemon resumes automatically"
        return DatabaseError(f"the shared database is a standby: {_text(error)}", code=errno.EIO, hint=hint)
    if isinstance(error, psycopg.OperationalError):
        return DatabaseError(f"the shared database cannot be reached: {_text(error)}", code=errno.EIO, hint=_CHECK)
    return DatabaseError(f"the shared database reports an error: {_text(error)}", code=errno.EIO, hint=_CHECK)


def uncertain(why: str) -> UncertainError:
    """Return the error for a change of which it is not known whether it was written."""
    message = f"it is not known whether the shared database has written a change: {why}"
    return UncertainError(message, code=errno.EIO, hint=f"{_CHECK}; after a command: run it again")


def not_answering(seconds: float) -> DatabaseError:
    """Return the error for a database that has not answered for so many seconds."""
    message = f"the shared database has not answered for {seconds:.0f} seconds"
    return DatabaseError(message, code=errno.EIO, hint=_CHECK)


def no_thread(error: RuntimeError) -> DatabaseError:
    """Return the error for a daemon that cannot start the thread that writes."""
    hint = "allow the daemon more threads (TasksMax= of the unit, or ulimit -u); the daemon resumes automatically"
    return DatabaseError(f"the shared database cannot be written: {error}", code=errno.EIO, hint=hint)


def replaced() -> DatabaseError:
    """Return the error for a daemon whose name another one has taken."""
    message = "another daemon was started with the same shared.instance and account; this one sends nothing any more"
    hint = "stop one of them, and give it a state folder and a shared.instance of its own"
    return DatabaseError(message, code=errno.EIO, hint=hint)


def lacking() -> DatabaseError:
    """Return the error for a database that lacks attempts of this daemon."""
    message = (
        "the shared database lacks the newest requests of this daemon: it was restored from a backup, or a standby "
        "without them has taken over"
    )
    hint = f"{_RECOVER}; or accept what is there: imagewatch release --accept-new-ledger, then restart the daemon"
    return DatabaseError(message, code=errno.ESTALE, hint=hint)


def earlier() -> DatabaseError:
    """Return the error for a database that has all attempts of this daemon, and lacks its latest start."""
    message = (
        "the shared database lacks the latest start of this daemon: it was restored from a backup, or a standby "
        "without it has taken over"
    )
    return DatabaseError(message, code=errno.ESTALE, hint=f"{_RECOVER}, and start them again")


def text_of(error: psycopg.Error) -> str:
    """Return the message of an error in one line."""
    return _text(error)


def _text(error: psycopg.Error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable("; ".join(lines[:3])) or type(error).__name__
