"""The tables of the ledger in SQLite, and how those of an earlier version are updated."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from imagewatch.journal.row import COLUMNS, LOST, price_of
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3

_VERSION = 3
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (
    name  TEXT PRIMARY KEY,             -- id: of this ledger; proved: written to see whether rows can be
    value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    job             TEXT NOT NULL,
    attempt         INTEGER NOT NULL,   -- 0: refused by our own checks, no call was made
    source          TEXT NOT NULL,      -- path of the prompt below the inbox
    source_size     INTEGER NOT NULL,   -- bytes
    source_mtime_ns INTEGER NOT NULL,
    contents        TEXT NOT NULL,      -- JSON: hash of each file as dropped, by name; empty where it is not needed
    prompt_sha256   TEXT NOT NULL,      -- of the text sent
    -- sent: its result is not known yet
    outcome         TEXT NOT NULL CHECK (outcome IN ('sent', 'completed', 'refused', 'busy', 'unknown', 'invalid')),
    charged         TEXT NOT NULL CHECK (charged IN ('yes', 'no', 'unknown')),
    credits         REAL,               -- NULL: not reported
    provider        TEXT NOT NULL,
    model           TEXT NOT NULL,
    fields          TEXT NOT NULL,      -- JSON: what was asked for, prompt and images aside
    asked           INTEGER NOT NULL,
    got             INTEGER NOT NULL,
    status          INTEGER NOT NULL,   -- HTTP, 0: no response
    code            TEXT NOT NULL,
    message         TEXT NOT NULL,
    request_id      TEXT NOT NULL,
    endpoint        TEXT NOT NULL,
    version         TEXT NOT NULL,
    claimed_at      REAL NOT NULL,      -- seconds since the epoch, UTC
    sent_at         REAL,
    answered_at     REAL,
    asked_provider  TEXT NOT NULL DEFAULT '',  -- of the request; the response may name another
    price_kind      TEXT NOT NULL DEFAULT '',  -- equal for requests whose images cost the same; empty: not known
    transaction_id  TEXT NOT NULL DEFAULT '',  -- of the response's billing
    new_credit_balance REAL,                   -- the same: balance of the account; NULL: not reported
    owner           TEXT NOT NULL DEFAULT '',  -- user to whom the prompt file belonged
    placed_mtime_ns INTEGER NOT NULL DEFAULT 0,  -- mtime that the prompt got in errors or archive; 0: none
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS attempts_by_time ON attempts (sent_at);
CREATE INDEX IF NOT EXISTS attempts_by_claim ON attempts (claimed_at);
CREATE INDEX IF NOT EXISTS attempts_by_source ON attempts (source);
CREATE TABLE IF NOT EXISTS redeliveries (
    job     TEXT PRIMARY KEY,           -- the finished job whose files were delivered again
    times   INTEGER NOT NULL,
    last_at REAL NOT NULL               -- seconds since the epoch, UTC
) WITHOUT ROWID;
"""
INDEXES = """
CREATE INDEX IF NOT EXISTS attempts_by_price ON attempts (asked_provider, sent_at, price_kind, credits, asked);
CREATE INDEX IF NOT EXISTS attempts_by_balance ON attempts (answered_at) WHERE new_credit_balance IS NOT NULL;
"""

_RENAMED = {
    "outcome": "CASE outcome WHEN 'made' THEN 'completed' ELSE outcome END",
    "message": "CASE message WHEN 'nothing but the ledger knows of this request; it may have been charged' "
    f"THEN '{LOST}' ELSE message END",
}
"""Values of a row of format 1 or 2 that have another name now."""


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables, or update those of an older format: all or nothing, also if the process is killed.

    Raises:
        SpoolError: They are those of a newer version.
    """
    found = _format(connection)
    if found > _VERSION:
        path = connection.execute("PRAGMA database_list").fetchone()["file"]
        raise SpoolError(
            f"the ledger was written by a newer imagewatch (format {found}): {path}",
            path=path,
            code=errno.EPROTO,
            hint="run the newer version",
        )
    if found == _VERSION:  # reading must write nothing
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _format(connection) < _VERSION:  # else another process was faster
            _update(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _format(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _update(connection: sqlite3.Connection) -> None:
    """Make the tables again, with the rows that were there."""
    columns = {row["name"] for row in connection.execute("SELECT name FROM pragma_table_info('attempts')")}
    if columns:
        connection.execute("ALTER TABLE attempts RENAME TO earlier")
        for index in re.findall(r"INDEX IF NOT EXISTS (\w+)", SCHEMA + INDEXES):
            connection.execute(f"DROP INDEX IF EXISTS {index}")
    for statement in (SCHEMA + INDEXES).split(";\n"):
        connection.execute(statement)
    if columns:
        common = [name for name in COLUMNS if name in columns]
        values = [_RENAMED.get(name, name) for name in common]
        connection.execute(f"INSERT INTO attempts ({', '.join(common)}) SELECT {', '.join(values)} FROM earlier")  # noqa: S608
        connection.execute("DROP TABLE earlier")
        _fill(connection)
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _fill(connection: sqlite3.Connection) -> None:
    """Fill in what the request of each row of format 1 asked for."""
    question = "SELECT job, attempt, provider, fields FROM attempts WHERE asked_provider = '' AND price_kind = ''"
    update = "UPDATE attempts SET asked_provider = ?, price_kind = ? WHERE job = ? AND attempt = ?"
    for row in connection.execute(question).fetchall():
        connection.execute(update, (*price_of(row["fields"], row["provider"]), row["job"], row["attempt"]))
