"""The tables of the journal in SQLite, and how those of an earlier version are updated."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from imagewatch.journal.files import newer
from imagewatch.journal.row import LOST, Row, price_of

if TYPE_CHECKING:
    import sqlite3

VERSION = 5
_WITH_SUMS = 4
"""Since this format the tables are updated where they are."""
COLUMNS = Row.__struct_fields__
TABLES = """
CREATE TABLE IF NOT EXISTS meta (
    name  TEXT PRIMARY KEY,             -- id: of this journal; proved: written to see whether rows can be
                                        -- recorded: how often attempts were inserted or changed
                                        -- passed: until which ctime the burst guard lets prompts through
    value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (
    id        TEXT PRIMARY KEY,
    folder    BLOB NOT NULL,            -- of the prompt, below the inbox; a name need not be UTF-8
    stem      BLOB NOT NULL,
    claim     TEXT NOT NULL,            -- JSON: what was claimed
    state     TEXT NOT NULL CHECK (
        state IN ('open', 'returning', 'decided', 'published', 'kept', 'reopened', 'done')
    ),
    decision  TEXT NOT NULL DEFAULT '', -- JSON: how it ends; empty while that is open
    reserved  REAL NOT NULL DEFAULT 0,  -- credits, before an attempt is sent; then the attempt has it
    is_stuck  INTEGER NOT NULL DEFAULT 0, -- only a person can carry it on: what it reserved counts as spent
    opened_at REAL NOT NULL,            -- seconds since the epoch, UTC
    ended_at  REAL
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_name ON jobs (folder, stem) WHERE state IN ('open', 'decided', 'published');
CREATE INDEX IF NOT EXISTS jobs_that_are_open ON jobs (opened_at) WHERE state <> 'done';
CREATE TABLE IF NOT EXISTS attempts (
    job             TEXT NOT NULL,
    attempt         INTEGER NOT NULL,   -- 0: refused by our own checks, no call was made
    source          TEXT NOT NULL,      -- path of the prompt below the inbox
    source_size     INTEGER NOT NULL,   -- bytes
    source_mtime_ns INTEGER NOT NULL,
    contents        TEXT NOT NULL,      -- JSON: hash of each file as dropped, by name; empty where it is not needed
    prompt_sha256   TEXT NOT NULL,      -- of the text sent
    -- sent: its result is not known yet; unsent: its first byte never left
    outcome         TEXT NOT NULL CHECK (
        outcome IN ('sent', 'unsent', 'completed', 'refused', 'busy', 'unknown', 'invalid')
    ),
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
    nonce           TEXT NOT NULL DEFAULT '',  -- of the process that inserted the row: only that one may send it
    reserved        REAL NOT NULL DEFAULT 0,   -- credits, until the result is known
    request         TEXT NOT NULL DEFAULT '',  -- JSON: what was sent, until the job is over
    counted_at      REAL,  -- when it counts for the rate: sent_at, or when a clock that was set back was noticed
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS attempts_by_time ON attempts (counted_at);
CREATE INDEX IF NOT EXISTS attempts_by_claim ON attempts (claimed_at);
CREATE INDEX IF NOT EXISTS attempts_by_source ON attempts (source);
CREATE INDEX IF NOT EXISTS attempts_by_balance ON attempts (answered_at) WHERE new_credit_balance IS NOT NULL;
CREATE INDEX IF NOT EXISTS attempts_by_price ON attempts (asked_provider, sent_at, price_kind, credits, asked);
CREATE INDEX IF NOT EXISTS attempts_without_result ON attempts (job) WHERE outcome = 'sent';
CREATE TABLE IF NOT EXISTS redeliveries (
    job     TEXT PRIMARY KEY,           -- the finished job whose files were delivered again
    times   INTEGER NOT NULL,
    last_at REAL NOT NULL               -- seconds since the epoch, UTC
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holds (
    kind    TEXT PRIMARY KEY,           -- that a restart does not end: of the account, and a manual one
    message TEXT NOT NULL,
    since   REAL NOT NULL               -- seconds since the epoch, UTC
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    kind     TEXT NOT NULL CHECK (kind IN ('release', 'retry')),
    job      TEXT NOT NULL DEFAULT '',
    asked_at REAL NOT NULL              -- seconds since the epoch, UTC
);
CREATE TABLE IF NOT EXISTS sums (
    day        TEXT NOT NULL,           -- in which the requests were sent, UTC
    provider   TEXT NOT NULL,           -- whom they asked
    price_kind TEXT NOT NULL,
    credits    REAL NOT NULL,           -- that they are known to have been charged
    unknown    INTEGER NOT NULL,        -- images asked for by those whose charge or whose amount is not known
    PRIMARY KEY (day, provider, price_kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS folder_sums (
    folder     TEXT NOT NULL,           -- the first-level one of the prompts; those directly in the inbox have none
    day        TEXT NOT NULL,           -- this and the others: as in sums
    provider   TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    credits    REAL NOT NULL,
    unknown    INTEGER NOT NULL,
    PRIMARY KEY (folder, day, provider, price_kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prices (
    provider   TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    price      REAL NOT NULL,           -- credits for an image
    last_at    REAL NOT NULL,           -- when the last request was sent that cost so much
    PRIMARY KEY (provider, price_kind, price)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    number    INTEGER PRIMARY KEY,      -- they are delivered in this order
    id        TEXT NOT NULL,            -- the same however often it is delivered
    target    TEXT NOT NULL CHECK (target IN ('command', 'url')),
    name      TEXT NOT NULL CHECK (name IN ('completed', 'failed', 'unknown', 'held', 'released', 'cap')),
    job       TEXT NOT NULL DEFAULT '', -- whose end it reports
    at        REAL NOT NULL,            -- seconds since the epoch, UTC
    tries     INTEGER NOT NULL DEFAULT 0,
    next_at   REAL NOT NULL DEFAULT 0,  -- of the next try
    message   TEXT NOT NULL DEFAULT '', -- why the last try failed
    failed_at REAL,                     -- when it was given up
    content   TEXT NOT NULL,            -- of a job its result file, else JSON; empty once it was given up
    UNIQUE (id, target)
);
CREATE INDEX IF NOT EXISTS events_by_next_try ON events (target, next_at, at) WHERE failed_at IS NULL;
CREATE INDEX IF NOT EXISTS events_by_failure ON events (coalesce(failed_at, next_at), failed_at) WHERE message <> '';
CREATE TABLE IF NOT EXISTS announced (
    subject TEXT PRIMARY KEY,           -- a hold that an event has reported and that lasts; or a cap and its period
    at      REAL NOT NULL               -- of a hold since when, of a cap the end of its period
) WITHOUT ROWID;
"""
_DAY = "coalesce(date({0}.sent_at, 'unixepoch'), '9999-12-31')"
_COUNTS = (
    "{0}.sent_at IS NOT NULL AND {0}.charged IN ('yes', 'unknown') AND {0}.outcome IN ('completed', 'unknown', "
    "'refused')"
)
_CREDITS = "coalesce({0}.credits, 0.0)"
_UNKNOWN = "(CASE WHEN {0}.credits IS NULL THEN max({0}.asked, 1) ELSE 0 END)"
_FOLDER = "substr({0}.source, 1, instr({0}.source, '/') - 1)"
_IS_IN_FOLDER = "instr({0}.source, '/') > 0"
_ADD = f"""
    INSERT INTO sums SELECT {_DAY}, {{0}}.asked_provider, {{0}}.price_kind, {{1}} * {_CREDITS}, {{1}} * {_UNKNOWN}
        WHERE {_COUNTS}
    ON CONFLICT DO UPDATE SET credits = credits + excluded.credits, unknown = unknown + excluded.unknown;
    INSERT INTO prices SELECT {{0}}.asked_provider, {{0}}.price_kind, {{0}}.credits / max({{0}}.asked, 1), {{0}}.sent_at
        WHERE {{1}} > 0 AND {{0}}.credits > 0 AND {{0}}.sent_at IS NOT NULL
    ON CONFLICT DO UPDATE SET last_at = max(last_at, excluded.last_at);
"""  # noqa: S608  our own names
_ADD_IN_FOLDER = f"""
    INSERT INTO folder_sums SELECT {_FOLDER}, {_DAY}, {{0}}.asked_provider, {{0}}.price_kind,
        {{1}} * {_CREDITS}, {{1}} * {_UNKNOWN}
        WHERE {_COUNTS} AND {_IS_IN_FOLDER}
    ON CONFLICT DO UPDATE SET credits = credits + excluded.credits, unknown = unknown + excluded.unknown;
"""
_SUMMED = "source, sent_at, charged, outcome, credits, asked, asked_provider, price_kind"
"""What the sums follow from: the end of a job changes none of it."""
_COUNT = "INSERT INTO meta VALUES ('recorded', 1) ON CONFLICT DO UPDATE SET value = value + 1;"
# The sums follow from the rows: each change of a row changes them, whatever program makes it.
TRIGGERS = {
    "attempts_inserted": f"AFTER INSERT ON attempts BEGIN {_COUNT} {_ADD.format('new', 1)} END",
    "attempts_updated": f"AFTER UPDATE ON attempts BEGIN {_COUNT} END",
    "sums_updated": f"AFTER UPDATE OF {_SUMMED} ON attempts BEGIN {_ADD.format('old', -1)} {_ADD.format('new', 1)} END",
    "folder_sums_inserted": f"AFTER INSERT ON attempts WHEN {_COUNTS.format('new')} AND {_IS_IN_FOLDER.format('new')} "
    f"BEGIN {_ADD_IN_FOLDER.format('new', 1)} END",
    "folder_sums_updated": f"AFTER UPDATE OF {_SUMMED} ON attempts "
    f"WHEN {_IS_IN_FOLDER.format('old')} OR {_IS_IN_FOLDER.format('new')} "
    f"BEGIN {_ADD_IN_FOLDER.format('old', -1)} {_ADD_IN_FOLDER.format('new', 1)} END",
}
_SUM_FOLDERS = (
    f"INSERT INTO folder_sums SELECT {_FOLDER}, {_DAY}, {{0}}.asked_provider, {{0}}.price_kind, sum({_CREDITS}), "  # noqa: S608
    f"sum({_UNKNOWN}) FROM attempts AS {{0}} WHERE {_COUNTS} AND {_IS_IN_FOLDER} GROUP BY 1, 2, 3, 4"
).format("a")
"""Fills the sums of a ledger of format 4."""
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
    if found > VERSION:
        raise newer(connection.execute("PRAGMA database_list").fetchone()["file"], found)
    if found == VERSION:  # reading must write nothing
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _format(connection) < VERSION:  # else another process was faster
            _update(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _format(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _update(connection: sqlite3.Connection) -> None:
    """Make the tables that are missing; before the format with sums, make all again with the rows that were there."""
    has_sums = _format(connection) >= _WITH_SUMS
    columns = {row["name"] for row in connection.execute("SELECT name FROM pragma_table_info('attempts')")}
    columns = set() if has_sums else columns
    if columns:
        connection.execute("ALTER TABLE attempts RENAME TO earlier")
        for index in re.findall(r"INDEX IF NOT EXISTS (\w+)", TABLES):
            connection.execute(f"DROP INDEX IF EXISTS {index}")
    for statement in TABLES.split(";\n"):
        connection.execute(statement)
    for name, body in TRIGGERS.items():
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
        connection.execute(f"CREATE TRIGGER {name} {body}")
    if columns:
        common = [name for name in COLUMNS if name in columns]
        values = [_RENAMED.get(name, name) for name in common]
        connection.execute(f"INSERT INTO attempts ({', '.join(common)}) SELECT {', '.join(values)} FROM earlier")  # noqa: S608
        connection.execute("UPDATE attempts SET counted_at = sent_at")
        connection.execute("DROP TABLE earlier")
        _fill(connection)
    elif has_sums:
        connection.execute(_SUM_FOLDERS)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _fill(connection: sqlite3.Connection) -> None:
    """Fill in what the request of each row of format 1 asked for."""
    question = "SELECT job, attempt, provider, fields FROM attempts WHERE asked_provider = '' AND price_kind = ''"
    update = "UPDATE attempts SET asked_provider = ?, price_kind = ? WHERE job = ? AND attempt = ?"
    for row in connection.execute(question).fetchall():
        connection.execute(update, (*price_of(row["fields"], row["provider"]), row["job"], row["attempt"]))
