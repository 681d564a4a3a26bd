"""Copies the journal of one daemon between SQLite and a shared database, and compares both before it commits.

What goes to PostgreSQL: all rows of the file. An attempt that is there already was there before the daemon left the
account: this daemon's get the values of the file, those of others stay. What goes to SQLite: the daemon's jobs,
requests, events and holds, and of the account all attempts that have a result and the holds, so that caps count no less
than before. In the database the daemon's attempts stay, too: its account has paid for them.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psycopg

from imagewatch import __version__
from imagewatch.journal.account import MANUAL
from imagewatch.journal.postgres import sums
from imagewatch.journal.postgres.checks import pooler, require_usable, unusable
from imagewatch.journal.postgres.converting import Converter, columns_of
from imagewatch.journal.postgres.faults import text_of, translated, uncertain
from imagewatch.journal.postgres.session import Session
from imagewatch.journal.schema import COLUMNS
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import counted, printable

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator

    from imagewatch.journal.postgres.place import Place

JOBS: Final = ("id", "folder", "stem", "claim", "state", "decision", "reserved", "is_stuck", "opened_at", "ended_at")
LISTS: Final = {
    "requests": (("kind", "job", "asked_at"), "id"),
    "events": (("id", "target", "name", "job", "at", "tries", "next_at", "message", "failed_at", "content"), "number"),
}
"""Tables whose rows have an order, their columns but the number, and the number."""
KEYED: Final = {
    "holds": (("kind", "message", "since"), "DO NOTHING"),
    "announced": (("subject", "at"), "DO NOTHING"),
    "redeliveries": (
        ("job", "times", "last_at"),
        (
            "(job) DO UPDATE SET times = greatest(t.times, excluded.times), "
            "last_at = greatest(t.last_at, excluded.last_at)"
        ),
    ),
}
"""Tables with rows that may be there already, their columns, first the one that identifies a row, and what is done."""
LEFT: Final = "its daemon has left the account; whether it was charged is in its own ledger"
"""Message of an attempt without a result of a daemon that has left."""
_PAGE: Final = 5000
_ACCOUNT: Final = "account = current_setting('imagewatch.account')"
_OWN: Final = f"{_ACCOUNT} AND instance = current_setting('imagewatch.instance')"
_HERE: Final = f"{_OWN} AND inbox = current_setting('imagewatch.inbox')"
"""What a daemon has added to a common inbox before concerns the daemons of that."""
_NAMES: Final = ", ".join(COLUMNS)
_TAKEN_ALONG: Final = "(outcome <> 'sent' OR instance = current_setting('imagewatch.instance'))"
_ELSEWHERE: Final = """
    SELECT count(*) FROM imagewatch.jobs AS j WHERE account = current_setting('imagewatch.account')
    AND inbox <> current_setting('imagewatch.inbox') AND state NOT IN ('done', 'kept')
    AND (holder = current_setting('imagewatch.instance') OR EXISTS (
        SELECT 1 FROM imagewatch.attempts AS a
        WHERE a.job = j.id AND a.answer_on = current_setting('imagewatch.instance')
    ))"""
"""Jobs of another inbox that the daemon has, or of which it alone has the response."""
_SETTINGS: Final = {"lock_timeout": "30s", "idle_in_transaction_session_timeout": "10min"}


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied.

    Attributes:
        rows: How many rows, by table.
        known: How many of the attempts were there already.
        replaced: How many values were replaced by the nearest that the database can hold.
        credits: What the attempts are known to have been charged.
    """

    rows: dict[str, int]
    known: int
    replaced: int
    credits: float


@contextlib.contextmanager
def connected(place: Place) -> Iterator[Session]:
    """Connect to a database that can be used for the block.

    Raises:
        DatabaseError: It cannot be reached, or must not be used.
    """
    with (
        _translating(),
        contextlib.closing(Session(place, "migrate", _SETTINGS)) as session,
        contextlib.closing(Session(place, "check", is_prepared=False)) as other,
    ):
        require_usable(session, is_replicated=place.is_replicated)
        for why, hint in pooler(session, other):
            raise unusable(why, hint)
        session.raw.on_silence = lambda: None  # a large journal takes its time
        yield session


@contextlib.contextmanager
def locked(session: Session) -> Iterator[None]:
    """Run the block in a transaction while no other daemon of the account spends, and no other copying runs.

    Raises:
        UncertainError: It is not known whether it was committed.
        DatabaseError: It was undone.
    """
    with _translating(), session.transaction(commit=lambda: _commit(session)):
        session.execute(
            "INSERT INTO imagewatch.accounts (name) VALUES (current_setting('imagewatch.account')) "
            "ON CONFLICT DO NOTHING"
        )
        session.execute(
            "SELECT 1 FROM imagewatch.accounts WHERE name = current_setting('imagewatch.account') FOR UPDATE"
        )
        yield


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise translated(error) from error


def _commit(session: Session) -> None:
    session.warnings.clear()
    try:
        session.commit()
    except psycopg.Error as error:
        raise uncertain(text_of(error)) from error
    if session.warnings:  # a canceled wait for the standby is reported as a success with a warning
        raise uncertain(session.warnings[-1])


def place_in(session: Session) -> str | None:
    """Return the place of the state folder whose daemon has this name; None: there is no such daemon."""
    question = "SELECT place FROM imagewatch.instances WHERE account = current_setting('imagewatch.account') "
    row = session.execute(question + "AND name = current_setting('imagewatch.instance')").fetchone()
    return None if row is None else str(row["place"])


# To PostgreSQL


def to_postgresql(
    session: Session, file: sqlite3.Connection, place: Place, member: str, host: str, folder: str
) -> Copied:
    """Copy a file into the database; in the transaction of ``locked``.

    Args:
        session: The database.
        file: The file, locked.
        place: Names of the daemon.
        member: Random, of the state folder.
        host: Name of the host.
        folder: The inbox.

    Raises:
        SpoolError: The database has rows of this daemon already, or does not accept those of the file.
    """
    _require_free(session, place)
    convert = Converter()
    rows = {"attempts": _upload(session, file, convert, "attempts", COLUMNS, into="moving")}
    known = _merge(session, place)
    try:
        rows["jobs"] = _upload(session, file, convert, "jobs", JOBS)
    except psycopg.errors.UniqueViolation as error:
        why = f"the shared database has jobs of this ledger, of another daemon: {text_of(error)}"
        raise SpoolError(why, hint="use the state folder of that daemon; this one is a copy of it") from error
    for name, (columns, order) in LISTS.items():
        rows[name] = _upload(session, file, convert, name, columns, order=order)
    for name, (columns, conflict) in KEYED.items():
        rows[name] = _add(session, file, convert, name, columns, conflict)
    rows["passed"] = _passed(file, lambda value: session.execute(f"INSERT INTO imagewatch.{_META}", (value,)))
    _add_prices(session, file.execute(sums.PRICES).fetchall(), convert)
    session.execute(
        "INSERT INTO imagewatch.instances (name, inbox, host, folder, place, version, incarnation, started_at, "
        "seen_at, ended_at) SELECT ?1, ?1, ?2, ?3, ?4, ?5, 0, at, at, at FROM (SELECT ?6::float8 AS at) AS now",
        (place.instance, host, folder, member, __version__, time.time()),
    )
    sums.require_same_as_moved(session, file, convert)
    return Copied(rows=rows, known=known, replaced=convert.replaced, credits=sums.credits_of(file))


_META: Final = "meta (name, value) VALUES ('passed', ?)"


def _require_free(session: Session, place: Place) -> None:
    """Make sure that no other daemon has this name, and that none has left jobs with it."""
    question = (
        "SELECT count(*) FROM imagewatch.jobs WHERE account = current_setting('imagewatch.account') AND inbox = ?"
    )
    if place_in(session) is not None or _number(session, question, place.inbox):
        why = f"the shared database has a daemon with the name {printable(place.instance)} (account {place.account})"
        raise SpoolError(why, hint="set another shared.instance, then run this again")


def _upload(
    session: Session,
    file: sqlite3.Connection,
    convert: Converter,
    name: str,
    columns: tuple[str, ...],
    *,
    into: str = "",
    order: str = "",
) -> int:
    """Copy the rows of a table; return how many.

    Raises:
        SpoolError: As many did not arrive.
    """
    if into:
        session.execute(f"CREATE TEMP TABLE {into} (LIKE imagewatch.{name} INCLUDING DEFAULTS) ON COMMIT DROP")
    kinds, listed, target, count = columns_of(session, name), ", ".join(columns), into or f"imagewatch.{name}", 0
    found = file.execute(f"SELECT {listed} FROM {name}" + (f" ORDER BY {order}" if order else ""))  # noqa: S608
    statement = f"COPY {target} ({listed}) FROM STDIN"
    with session.raw.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for row in found:
            copy.write_row([convert(row[one], kinds[one], f"{name}.{one}") for one in columns])
            count += 1
    arrived = _number(session, f"SELECT count(*) FROM {target}" + ("" if into else f" WHERE {_HERE}"))  # noqa: S608
    if arrived != count:
        raise different(f"{count} rows of {name}", f"{arrived}")
    return count


def _merge(session: Session, place: Place) -> int:
    """Add the copied attempts to those of the account; return how many were there already."""
    if _number(
        session,
        "SELECT count(*) FROM moving AS m JOIN imagewatch.attempts AS a USING (job, attempt) "
        "WHERE a.account <> m.account OR a.nonce <> m.nonce",
    ):
        why = "the shared database has other attempts of the same jobs, of another account or of a copy of this folder"
        raise SpoolError(why, hint="use the account to which this state folder belonged; or an empty database")
    left = _number(
        session,
        f"SELECT count(*) FROM imagewatch.attempts AS a WHERE {_OWN} "  # noqa: S608  our own names
        "AND NOT EXISTS (SELECT 1 FROM moving AS m WHERE m.job = a.job AND m.attempt = a.attempt)",
    )
    if left:
        why = (
            f"the shared database has {left} attempts of the daemon {printable(place.instance)} that this ledger lacks"
        )
        raise SpoolError(why, hint="set another shared.instance, then run this again")
    known = _number(session, "SELECT count(*) FROM moving JOIN imagewatch.attempts USING (job, attempt)")
    changes = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in {"job", "attempt"})
    session.execute(
        f"INSERT INTO imagewatch.attempts AS a ({_NAMES}) SELECT {_NAMES} FROM moving "  # noqa: S608  our own names
        f"ON CONFLICT (job, attempt) DO UPDATE SET {changes} WHERE a.instance = excluded.instance"
    )
    return known


def _add(
    session: Session, file: sqlite3.Connection, convert: Converter, name: str, columns: tuple[str, ...], conflict: str
) -> int:
    """Copy the rows that are not there yet; return how many the file has.

    Raises:
        SpoolError: One did not arrive.
    """
    kinds, listed, marks, count = columns_of(session, name), ", ".join(columns), ", ".join("?" * len(columns)), 0
    insert = f"INSERT INTO imagewatch.{name} AS t ({listed}) VALUES ({marks}) ON CONFLICT {conflict}"  # noqa: S608
    for row in file.execute(f"SELECT {listed} FROM {name}").fetchall():  # noqa: S608  our own names
        values = [convert(row[one], kinds[one], f"{name}.{one}") for one in columns]
        session.execute(insert, values)
        if not session.execute(f"SELECT 1 FROM {name} WHERE {columns[0]} = ?", values[:1]).fetchone():  # noqa: S608
            raise different(f"a row of {name}", "none")
        count += 1
    return count


def _passed(source: Any, write: Callable[[str], object]) -> int:  # noqa: ANN401  either kind of connection
    found = source.execute("SELECT value FROM meta WHERE name = 'passed'").fetchone()
    if found is not None:
        write(str(found[0]))
    return int(found is not None)


def _add_prices(session: Session, rows: Iterable[Any], convert: Converter) -> None:
    """Copy the prices, too: a price that no attempt has any more still counts."""
    kinds = columns_of(session, "prices")
    for row in rows:
        values = [convert(row[one], kinds[one], f"prices.{one}") for one in sums.PRICE]
        session.execute(
            "INSERT INTO imagewatch.prices AS p (account, instance, provider, price_kind, price, last_at) VALUES "
            "(current_setting('imagewatch.account'), current_setting('imagewatch.instance'), ?, ?, ?, ?) "
            "ON CONFLICT (account, provider, price_kind, price, instance) "
            "DO UPDATE SET last_at = greatest(p.last_at, excluded.last_at)",
            values,
        )


# To SQLite


def require_no_other_inbox(session: Session) -> None:
    """Make sure that nothing in the state folder belongs to open jobs of a common inbox that the daemon was in.

    Raises:
        SpoolError: Something does.
    """
    if count := _number(session, _ELSEWHERE):
        why = f"this daemon still has {counted(count, 'job')} of a common inbox"
        hint = "set shared.inbox again and let the daemons finish; then remove it and run this again"
        raise SpoolError(why, hint=hint)


def to_sqlite(session: Session, file: sqlite3.Connection) -> Copied:
    """Copy the journal of the daemon into an empty file with tables; in the transaction of ``locked``.

    Raises:
        SpoolError: The file differs afterwards.
    """
    rows = {"attempts": _download_attempts(session, file)}
    rows["jobs"] = _download(session, file, "own_jobs", JOBS, into="jobs")
    for name, (columns, order) in LISTS.items():
        rows[name] = _download(session, file, name, columns, order=order)
    for name, (columns, _) in KEYED.items():
        rows[name] = _download(session, file, name, columns)
    # A hold of the account by a person continues as one of this daemon: it is not probed.
    file.execute("UPDATE OR IGNORE holds SET kind = 'manual' WHERE kind = ?", (MANUAL,))
    file.execute("DELETE FROM holds WHERE kind = ?", (MANUAL,))
    rows["passed"] = _passed(session, lambda value: file.execute(f"INSERT INTO {_META}", (value,)))
    found = session.execute(sums.ALL_PRICES).fetchall()
    file.executemany(
        "INSERT INTO prices (provider, price_kind, price, last_at) VALUES (?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET last_at = max(last_at, excluded.last_at)",
        [tuple(row) for row in found],
    )
    sums.require_same_in_file(session, file, _TAKEN_ALONG)
    return Copied(rows=rows, known=0, replaced=0, credits=sums.credits_of(file))


def _download_attempts(session: Session, file: sqlite3.Connection) -> int:
    """Copy the attempts of the account, without those that other daemons have in flight."""
    last: tuple[str, int] = ("", -1)
    count = 0
    question = (
        f"SELECT {_NAMES} FROM imagewatch.attempts WHERE {_ACCOUNT} AND {_TAKEN_ALONG} AND (job, attempt) > (?, ?) "  # noqa: S608
        f"ORDER BY job, attempt LIMIT {_PAGE}"
    )
    insert = f"INSERT INTO attempts ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608  our own names
    while found := session.execute(question, last).fetchall():
        file.executemany(insert, [tuple(row) for row in found])
        last = found[-1]["job"], found[-1]["attempt"]
        count += len(found)
    expected = _number(session, f"SELECT count(*) FROM imagewatch.attempts WHERE {_ACCOUNT} AND {_TAKEN_ALONG}")  # noqa: S608
    if file.execute("SELECT count(*) FROM attempts").fetchone()[0] != expected:
        raise different(f"{expected} attempts", f"{count}")
    return count


def _download(
    session: Session,
    file: sqlite3.Connection,
    name: str,
    columns: tuple[str, ...],
    *,
    into: str = "",
    order: str = "",
) -> int:
    listed, target = ", ".join(columns), into or name
    found = session.execute(f"SELECT {listed} FROM {name}" + (f" ORDER BY {order}" if order else "")).fetchall()  # noqa: S608
    marks = ", ".join("?" * len(columns))
    file.executemany(f"INSERT INTO {target} ({listed}) VALUES ({marks})", [tuple(row) for row in found])  # noqa: S608
    arrived = file.execute(f"SELECT count(*) FROM {target}").fetchone()[0]  # noqa: S608  our own names
    if arrived != len(found):
        raise different(f"{len(found)} rows of {target}", f"{arrived}")
    return arrived if isinstance(arrived, int) else 0


def leave(session: Session) -> None:
    """Remove the daemon from the account; its attempts stay. In the transaction of ``locked``, after ``to_sqlite``."""
    session.execute(
        f"UPDATE imagewatch.attempts SET outcome = 'unknown', message = ?, reserved = 0 WHERE {_OWN} "  # noqa: S608
        "AND outcome = 'sent'",
        (LEFT,),
    )
    for table, rows in (("events", _OWN), ("meta", _OWN), ("requests", _HERE), ("jobs", _HERE)):
        session.execute(f"DELETE FROM imagewatch.{table} WHERE {rows}")  # noqa: S608  our own names
    for table in ("holds", "announced"):
        session.execute(f"DELETE FROM imagewatch.{table} WHERE {_OWN} AND scope <> ''")  # noqa: S608
    own = f"{_ACCOUNT} AND name = current_setting('imagewatch.instance')"
    session.execute(f"DELETE FROM imagewatch.instances WHERE {own}")  # noqa: S608  our own names


def different(there: str, here: str) -> SpoolError:
    """Return the error for a copy that differs; it is not used."""
    hint = "nothing was changed; run imagewatch check, then run this again; if it remains, please report it"
    return SpoolError(f"the copy of the journal differs: {there}, of which {here} arrived", hint=hint)


def _number(session: Session, question: str, *values: object) -> int:
    row = session.execute(question, values).fetchone()
    assert row is not None
    return int(row[0])
