"""The ledger: one row per attempt, the only use of SQLite.

It answers what was made, refused and spent, and what was seen before. A row is written by job and attempt, so that
writing it again after a crash changes nothing. WAL with ``synchronous = FULL``: a row that was committed survives
a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from imagewatch.errors import SpoolError
from imagewatch.masking import known
from imagewatch.prices import for_an_image, kind_of
from imagewatch.text import whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imagewatch.job import Charged

_VERSION = 2
_MODE = 0o600
_LONGEST_CLAIMED = 7 * 86_400.0
"""How long before it is sent a job may have been claimed, seconds; it lets an index be used."""
_LEAST, _MOST = -(2**63), 2**63 - 1
"""The integers of SQLite. An mtime may lie beyond them, in nanoseconds: anybody can set it to the year 2400."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    job             TEXT NOT NULL,
    attempt         INTEGER NOT NULL,   -- 0: refused by our own checks, no call was made
    source          TEXT NOT NULL,      -- path of the prompt below the inbox
    source_size     INTEGER NOT NULL,   -- bytes
    source_mtime_ns INTEGER NOT NULL,
    contents        TEXT NOT NULL,      -- JSON: hash of each file as dropped, by name; empty where nobody needs it
    prompt_sha256   TEXT NOT NULL,      -- of the text sent
    outcome         TEXT NOT NULL CHECK (outcome IN ('made', 'refused', 'busy', 'unknown', 'invalid')),
    charged         TEXT NOT NULL CHECK (charged IN ('yes', 'no', 'unknown')),
    credits         REAL,               -- NULL: not said
    provider        TEXT NOT NULL,
    model           TEXT NOT NULL,
    fields          TEXT NOT NULL,      -- JSON: what was asked for, prompt and images aside
    asked           INTEGER NOT NULL,
    got             INTEGER NOT NULL,
    status          INTEGER NOT NULL,   -- HTTP, 0: no answer
    code            TEXT NOT NULL,
    message         TEXT NOT NULL,
    request_id      TEXT NOT NULL,
    endpoint        TEXT NOT NULL,
    version         TEXT NOT NULL,
    claimed_at      REAL NOT NULL,      -- seconds since the epoch, UTC
    sent_at         REAL,
    answered_at     REAL,
    asked_provider  TEXT NOT NULL DEFAULT '',  -- whom the request named; the answer may name another
    price_kind      TEXT NOT NULL DEFAULT '',  -- equal for requests whose images cost the same; empty: not known
    transaction_id  TEXT NOT NULL DEFAULT '',  -- of the answer's billing
    new_credit_balance REAL,                   -- the same: what the account had left; NULL: not said
    owner           TEXT NOT NULL DEFAULT '',  -- user to whom the prompt file belonged
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS attempts_by_time ON attempts (sent_at);
CREATE INDEX IF NOT EXISTS attempts_by_claim ON attempts (claimed_at);
CREATE INDEX IF NOT EXISTS attempts_by_source ON attempts (source);
CREATE TABLE IF NOT EXISTS redeliveries (
    job     TEXT PRIMARY KEY,           -- the finished job whose files came again
    times   INTEGER NOT NULL,
    last_at REAL NOT NULL               -- seconds since the epoch, UTC
) WITHOUT ROWID;
"""
_ADDED = (
    "asked_provider TEXT NOT NULL DEFAULT ''",
    "price_kind TEXT NOT NULL DEFAULT ''",
    "transaction_id TEXT NOT NULL DEFAULT ''",
    "new_credit_balance REAL",
    "owner TEXT NOT NULL DEFAULT ''",
)
"""Columns that a ledger of format 1 has not got."""
_INDEXES = """
CREATE INDEX IF NOT EXISTS attempts_by_price ON attempts (asked_provider, sent_at, price_kind, credits, asked);
CREATE INDEX IF NOT EXISTS attempts_by_balance ON attempts (answered_at) WHERE new_credit_balance IS NOT NULL;
"""
"""Of columns that a ledger of format 1 has not got."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt; the columns are explained in the schema above."""

    job: str
    attempt: int
    source: str
    outcome: str
    charged: Charged
    claimed_at: float
    source_size: int = 0
    source_mtime_ns: int = 0
    contents: str = ""
    prompt_sha256: str = ""
    credits: float | None = None
    provider: str = ""
    model: str = ""
    fields: str = ""
    asked: int = 0
    got: int = 0
    status: int = 0
    code: str = ""
    message: str = ""
    request_id: str = ""
    endpoint: str = ""
    version: str = ""
    sent_at: float | None = None
    answered_at: float | None = None
    asked_provider: str = ""
    price_kind: str = ""
    transaction_id: str = ""
    new_credit_balance: float | None = None
    owner: str = ""


@dataclass(frozen=True)
class Balances:
    """What the account had before and after a request whose charge is not known; evidence for a person, no proof.

    Attributes:
        before: The last balance that was reported before it was sent, credits; None: there is none.
        before_at: When, seconds since the epoch.
        after: The first that was reported after that, credits; None: there is none yet.
        after_at: When.
        others: Other requests between the two that were charged or may have been; the one that reported the balance
            after is one of them.
        credits: What they are known to have been charged.
        unpriced: How many of them were or may have been charged without a known amount.
    """

    before: float | None = None
    before_at: float | None = None
    after: float | None = None
    after_at: float | None = None
    others: int = 0
    credits: float = 0.0
    unpriced: int = 0


_COLUMNS = Row.__struct_fields__
_HEARD = ("provider", "model", "code", "message", "request_id", "transaction_id")
_UPSERT = (
    f"INSERT INTO attempts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "  # noqa: S608
    "ON CONFLICT (job, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in {"job", "attempt"})
)


def _keep_private(path: str) -> None:
    """Make the file of a ledger if there is none, readable by its owner only: SQLite gives its other files that mode.

    A file that is there is not opened here: to close it again would end the locks that this process has on it.
    """
    with contextlib.suppress(OSError):  # what keeps it from being used is told by SQLite
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    for name in (path, path + "-wal", path + "-shm"):
        with contextlib.suppress(OSError):  # one of another user is as it was made
            if os.stat(name, follow_symlinks=False).st_mode & 0o777 & ~_MODE:
                os.chmod(name, _MODE)


class Ledger:
    """The ledger in its file. Safe to use from several threads.

    Args:
        path: The database; created if it is not there. On a local disk: SQLite's locks need one.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._translated():
            _keep_private(path)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            found = self._database.execute("PRAGMA user_version").fetchone()[0]
            if found > _VERSION:
                raise SpoolError(
                    f"{path}: the ledger was written by a newer imagewatch (format {found})",
                    path=path,
                    hint="run the newer version",
                )
            self._database.executescript(_SCHEMA)
            if found < _VERSION:  # whoever only reads writes nothing
                self._upgrade()

    def _upgrade(self) -> None:
        """Bring a new ledger, or one of an older format, to this format: all of it or nothing, whatever dies."""
        self._database.execute("BEGIN IMMEDIATE")
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            if self._format() >= _VERSION:
                return  # another process was faster
            there = {row["name"] for row in self._database.execute("PRAGMA table_info(attempts)")}
            for column in _ADDED:
                if column.partition(" ")[0] not in there:
                    self._database.execute(f"ALTER TABLE attempts ADD COLUMN {column}")
            self._fill()
            for statement in filter(str.strip, _INDEXES.split(";")):
                self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute("COMMIT")

    def _end(self) -> None:
        """Take back a transaction that was not committed."""
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def _format(self) -> int:
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])

    def _fill(self) -> None:
        """Note of each row of format 1 what its request asked for."""
        question = "SELECT job, attempt, provider, fields FROM attempts WHERE asked_provider = '' AND price_kind = ''"
        rows = self._database.execute(question).fetchall()
        update = "UPDATE attempts SET asked_provider = ?, price_kind = ? WHERE job = ? AND attempt = ?"
        for row in rows:
            self._database.execute(update, (*_asked(row["fields"], row["provider"]), row["job"], row["attempt"]))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def write(self, row: Row) -> None:
        """Write a row durably; the same job and attempt again replaces it.

        Raises:
            SpoolError: The disk failed.
        """
        heard = {name: known.text(getattr(row, name)) for name in _HEARD}  # a server may repeat the key
        asked = dict(zip(("asked_provider", "price_kind"), _asked(row.fields, row.provider), strict=True))
        row = msgspec.structs.replace(row, **heard, **asked)
        with self._lock, self._translated():
            self._database.execute(_UPSERT, _storable(msgspec.structs.astuple(row)))

    def finished(self, job: str, source: str, size: int, mtime_ns: int) -> list[tuple[str, str]]:
        """Return the other jobs that are over and whose prompt was this file: job id and ``contents``, newest first.

        Args:
            job: The one that asks: after a crash it may have a row of its own already.
            source: Path of the prompt below the inbox.
            size: Of the prompt file, bytes.
            mtime_ns: Of the prompt file, nanoseconds since the epoch.
        """
        question = """
            SELECT job, contents FROM attempts
            WHERE source = ? AND source_size = ? AND source_mtime_ns = ? AND contents <> '' AND job <> ?
              AND outcome IN ('made', 'refused', 'unknown', 'invalid')
            ORDER BY claimed_at DESC"""
        return [(row["job"], row["contents"]) for row in self._all(question, source, size, mtime_ns, job)]

    def count_redelivery(self, job: str, at: float) -> None:
        """Note that the files of a finished job came again.

        Args:
            job: The finished job.
            at: When, seconds since the epoch.
        """
        with self._lock, self._translated():
            self._database.execute(
                "INSERT INTO redeliveries VALUES (?, 1, ?) "
                "ON CONFLICT (job) DO UPDATE SET times = times + 1, last_at = excluded.last_at",
                (job, at),
            )

    def redelivered(self) -> int:
        """Return how often files of finished jobs came again."""
        return int(self._all("SELECT coalesce(sum(times), 0) AS times FROM redeliveries")[0]["times"])

    def rows(self) -> list[dict[str, Any]]:
        """Return all attempts, oldest first."""
        return [dict(row) for row in self._all("SELECT * FROM attempts ORDER BY claimed_at, job, attempt")]

    def jobs(self, since: float = 0.0, newest: int | None = None) -> list[dict[str, Any]]:
        """Return one row for each job: its last attempt, with ``attempts`` made, ``credits`` of all of them.

        Args:
            since: Only what was sent, or refused by our own checks, at this time or later; seconds since the epoch.
            newest: Only so many of the newest.

        Returns:
            Oldest first. ``redelivered`` is how often its files came again.
        """
        question = f"""
            SELECT * FROM (
                SELECT {", ".join(f"a.{name}" for name in _COLUMNS if name not in {"attempt", "credits"})},
                       max(a.attempt) AS attempts, sum(a.credits) AS credits, coalesce(r.times, 0) AS redelivered
                FROM attempts AS a LEFT JOIN redeliveries AS r ON r.job = a.job
                WHERE a.claimed_at >= ? AND coalesce(a.sent_at, a.claimed_at) >= ?
                GROUP BY a.job ORDER BY a.claimed_at DESC, a.job LIMIT ?
            ) ORDER BY claimed_at, job"""  # noqa: S608  our own names; the bare columns are those of max(attempt)
        limit = -1 if newest is None else newest
        return [dict(row) for row in self._all(question, since - _LONGEST_CLAIMED, since, limit)]

    def job(self, job: str) -> dict[str, Any] | None:
        """Return the last attempt of a job, or None."""
        rows = self._all("SELECT * FROM attempts WHERE job = ? ORDER BY attempt DESC LIMIT 1", job)
        return dict(rows[0]) if rows else None

    def balance(self) -> tuple[float, float] | None:
        """Return the last balance that an answer reported, credits, and when, seconds since the epoch; or None."""
        question = """
            SELECT new_credit_balance AS credits, answered_at FROM attempts
            WHERE new_credit_balance IS NOT NULL AND answered_at IS NOT NULL ORDER BY answered_at DESC LIMIT 1"""
        rows = self._all(question)
        return (rows[0]["credits"], rows[0]["answered_at"]) if rows else None

    def balances(self, job: str, sent_at: float) -> Balances:
        """Return what the account had before and after a request.

        Args:
            job: The job of the request.
            sent_at: When it was sent, seconds since the epoch.
        """
        question = """
            SELECT new_credit_balance AS credits, answered_at AS at FROM attempts
            WHERE new_credit_balance IS NOT NULL AND answered_at {} ? AND job <> ? ORDER BY answered_at {} LIMIT 1"""
        before = self._all(question.format("<=", "DESC"), sent_at, job)
        after = self._all(question.format(">", "ASC"), sent_at, job)
        found = Balances(*(before[0] if before else (None, None)), *(after[0] if after else (None, None)))
        if found.before_at is None or found.after_at is None:
            return found
        question = """
            SELECT count(*), coalesce(sum(credits), 0.0), count(CASE WHEN credits IS NULL THEN 1 END) FROM attempts
            WHERE charged IN ('yes', 'unknown') AND job <> ?
              AND coalesce(answered_at, sent_at) > ? AND coalesce(answered_at, sent_at) <= ?"""
        (others,) = self._all(question, job, found.before_at, found.after_at)
        return Balances(found.before, found.before_at, found.after, found.after_at, *others)

    def totals(self, since: float = 0.0) -> dict[str, float]:
        """Return sums: ``made``, ``refused``, ``unknown`` jobs and ``credits``.

        Args:
            since: Only what was sent, or refused by our own checks, at this time or later; seconds since the epoch.
        """
        question = """
            SELECT count(DISTINCT CASE WHEN charged = 'yes' THEN job END) AS made,
                   count(DISTINCT CASE WHEN outcome IN ('refused', 'invalid') THEN job END) AS refused,
                   count(DISTINCT CASE WHEN charged = 'unknown' THEN job END) AS unknown,
                   coalesce(sum(credits), 0) AS credits
            FROM attempts WHERE claimed_at >= ? AND coalesce(sent_at, claimed_at) >= ?"""
        return dict(self._all(question, since - _LONGEST_CLAIMED, since)[0])

    # What caps ask (``budget.Books``)

    def spending(self, since: float) -> tuple[float, list[tuple[str, str, int]]]:
        """Return what was spent since a time, seconds since the epoch.

        Returns:
            Credits that are known to have been charged; and for requests that were or may have been charged an amount
            that is not known: whom they asked, the kind of their price, and how many images they asked for in all.
        """
        question = """
            SELECT asked_provider, price_kind, coalesce(sum(credits), 0) AS credits,
                   sum(CASE WHEN credits IS NULL THEN max(asked, 1) ELSE 0 END) AS unpriced
            FROM attempts WHERE charged IN ('yes', 'unknown') AND sent_at >= ? GROUP BY asked_provider, price_kind"""
        rows = self._all(question, since)
        unpriced = [(row["asked_provider"], row["price_kind"], row["unpriced"]) for row in rows if row["unpriced"]]
        return sum(row["credits"] for row in rows), unpriced

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:
        """Return what requests to a provider were charged for an image, credits, by the kind of their price.

        A charge of 0 says nothing of the next one, and is left out.

        Args:
            provider: Whom they asked.
            since: Only what was sent at this time or later, seconds since the epoch.
        """
        question = """
            SELECT price_kind, credits, asked FROM attempts
            WHERE asked_provider = ? AND sent_at >= ? AND credits > 0"""
        found: dict[str, list[float]] = {}
        for row in self._all(question, provider, since):
            found.setdefault(row["price_kind"], []).append(for_an_image(row["credits"], row["asked"]))
        return found

    def sent_since(self, since: float) -> list[float]:
        """Return the times of the attempts since a time, oldest first."""
        return [
            row["sent_at"] for row in self._all("SELECT sent_at FROM attempts WHERE sent_at >= ? ORDER BY 1", since)
        ]

    def _all(self, question: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._translated():
            return self._database.execute(question, _storable(values)).fetchall()

    def _translated(self) -> _Translated:
        return _Translated(self._path)


def _asked(fields: str, provider: str) -> tuple[str, str]:
    """Return whom a request asked, and the kind of its price.

    Args:
        fields: Its JSON body; empty where it is not known.
        provider: Who answered, in case the body does not say who was asked.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(fields)
        if isinstance(found, dict) and isinstance(found.get("provider"), str):
            return found["provider"], kind_of(found)
    return provider, ""


def _storable(values: Iterable[object]) -> list[object]:
    """Return values as SQLite can hold them, the same for what is written and what is asked for."""
    return [_nearest(value) for value in values]


def _nearest(value: object) -> object:
    if isinstance(value, str):
        return whole(value)
    return min(max(value, _LEAST), _MOST) if isinstance(value, int) else value


class _Translated:
    """Turns SQLite's errors into ours."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OverflowError):  # no matter of the disk: it would be the same whenever it is tried again
            raise SpoolError(
                f"{self._path}: a number is too large for the ledger", path=self._path, hint="please report it"
            ) from error
        if isinstance(error, sqlite3.Error):
            full = "full" in str(error)
            raise SpoolError(
                f"{self._path}: the ledger cannot be used: {error}",
                path=self._path,
                code=errno.ENOSPC if full else errno.EIO,
                hint="make room, or restore it from a backup; do not delete it, it is the record of what was paid",
            ) from error
