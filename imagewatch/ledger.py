"""The ledger: one row per attempt, the only use of SQLite.

It answers what was made, refused and spent, and what was seen before. A row is written by job and attempt, so that
writing it again after a crash changes nothing. WAL with ``synchronous = FULL``: a row that was committed survives
a power cut.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from imagewatch.budget import Spending
from imagewatch.errors import SpoolError
from imagewatch.text import whole

if TYPE_CHECKING:
    from imagewatch.job import Charged

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    job             TEXT NOT NULL,
    attempt         INTEGER NOT NULL,   -- 0: refused by our own checks, no call was made
    source          TEXT NOT NULL,      -- path of the prompt below the inbox
    source_size     INTEGER NOT NULL,   -- bytes
    source_mtime_ns INTEGER NOT NULL,
    content_sha256  TEXT NOT NULL,      -- of the prompt file and its images, as dropped
    prompt_sha256   TEXT NOT NULL,      -- of the text sent
    outcome         TEXT NOT NULL CHECK (outcome IN ('made', 'refused', 'busy', 'unreached', 'unknown', 'invalid')),
    charged         TEXT NOT NULL CHECK (charged IN ('yes', 'no', 'unknown')),
    credits         REAL,               -- NULL: not said
    provider        TEXT NOT NULL,
    model           TEXT NOT NULL,
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
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS attempts_by_time ON attempts (sent_at);
CREATE INDEX IF NOT EXISTS attempts_by_source ON attempts (source);
"""


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
    content_sha256: str = ""
    prompt_sha256: str = ""
    credits: float | None = None
    provider: str = ""
    model: str = ""
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


_COLUMNS = Row.__struct_fields__
_UPSERT = (
    f"INSERT INTO attempts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "  # noqa: S608
    "ON CONFLICT (job, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in {"job", "attempt"})
)


class Ledger:
    """The ledger in its file. Safe to use from several threads.

    Args:
        path: The database; created if it is not there. On a local disk: SQLite's locks need one.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._translated():
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
            self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def write(self, row: Row) -> None:
        """Write a row durably; the same job and attempt again replaces it.

        Raises:
            SpoolError: The disk failed.
        """
        values = [whole(value) if isinstance(value, str) else value for value in msgspec.structs.astuple(row)]
        with self._lock, self._translated():
            self._database.execute(_UPSERT, values)

    def rows(self) -> list[dict[str, Any]]:
        """Return all attempts, oldest first."""
        return [dict(row) for row in self._all("SELECT * FROM attempts ORDER BY claimed_at, job, attempt")]

    def totals(self) -> dict[str, float]:
        """Return the sums of everything: ``made``, ``refused``, ``unknown`` jobs and ``credits``."""
        question = """
            SELECT count(DISTINCT CASE WHEN charged = 'yes' THEN job END) AS made,
                   count(DISTINCT CASE WHEN outcome IN ('refused', 'invalid') THEN job END) AS refused,
                   count(DISTINCT CASE WHEN charged = 'unknown' THEN job END) AS unknown,
                   coalesce(sum(credits), 0) AS credits
            FROM attempts"""
        return dict(self._all(question)[0])

    # What caps ask (``budget.Books``)

    def spending(self, since: float) -> Spending:
        """Return what was spent since a time, seconds since the epoch."""
        question = """
            SELECT provider, coalesce(sum(credits), 0) AS credits,
                   count(CASE WHEN credits IS NULL THEN 1 END) AS unpriced
            FROM attempts WHERE charged IN ('yes', 'unknown') AND sent_at >= ? GROUP BY provider"""
        rows = self._all(question, since)
        return Spending(
            sum(row["credits"] for row in rows), {row["provider"]: row["unpriced"] for row in rows if row["unpriced"]}
        )

    def highest_charge(self, provider: str) -> float | None:
        """Return the highest of a provider's last fifty known charges, credits; None without any."""
        question = """
            SELECT max(credits) AS highest FROM (
                SELECT credits FROM attempts WHERE provider = ? AND credits IS NOT NULL
                ORDER BY sent_at DESC LIMIT 50)"""
        found = self._all(question, provider)[0]["highest"]
        return None if found is None else float(found)

    def newest(self) -> float:
        """Return the time of the newest attempt, seconds since the epoch, or 0."""
        return float(self._all("SELECT coalesce(max(sent_at), 0) AS newest FROM attempts")[0]["newest"])

    def sent_since(self, since: float) -> list[float]:
        """Return the times of the attempts since a time, oldest first."""
        return [
            row["sent_at"] for row in self._all("SELECT sent_at FROM attempts WHERE sent_at >= ? ORDER BY 1", since)
        ]

    def _all(self, question: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._translated():
            return self._database.execute(question, values).fetchall()

    def _translated(self) -> _Translated:
        return _Translated(self._path)


class _Translated:
    """Turns SQLite's errors into ours."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            full = "full" in str(error)
            raise SpoolError(
                f"{self._path}: the ledger cannot be used: {error}",
                path=self._path,
                code=errno.ENOSPC if full else errno.EIO,
                hint="make room, or restore it from a backup; do not delete it, it is the record of what was paid",
            ) from error
