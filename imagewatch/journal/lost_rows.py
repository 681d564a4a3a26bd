"""Rows that a shared database has lost, written again from what the folders show.

A database that was restored from a backup, or a standby that took over without the newest commits, lacks rows of
attempts. What proves them is elsewhere: receipts and error files, the witnesses and responses in claim folders, the
responses in state folders. ``job.lost_jobs`` finds these; here is what the database has, and how the rest is written.

Each change can be made again without harm, and no row is ever deleted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import astuple, replace

from imagewatch.journal.ledger import storable
from imagewatch.journal.row import OVER_SECONDS, price_of
from imagewatch.journal.schema import COLUMNS
from imagewatch.protocol.values import dump
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from imagewatch.journal.database import Connection, Database
    from imagewatch.journal.row import JobState, Row
    from imagewatch.protocol.values import Claim, Decision

HOLDER = "imagewatch db recover"
"""Who has a job of a common inbox that was written again: no daemon, so that any takes it over."""
NO_RESULT = ("sent", "busy", "unsent")
"""Outcomes that are not the end of a job."""
_INBOX, _ME = "current_setting('imagewatch.inbox')", "current_setting('imagewatch.instance')"
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_JOBS = f"SELECT id, state, epoch, inbox = {_INBOX} AS is_ours FROM jobs"  # noqa: S608
_ATTEMPTS = f"""
    SELECT job, attempt, outcome, greatest(claimed_at, sent_at, answered_at) >= {_NOW} - ? AS is_recent
    FROM attempts ORDER BY attempt"""  # noqa: S608
_INSERT = (
    f"INSERT INTO attempts ({', '.join(COLUMNS)}, instance) "  # noqa: S608  our own names
    f"VALUES ({', '.join('?' * (len(COLUMNS) + 1))}) ON CONFLICT (job, attempt) DO NOTHING"
)
_RESULT = (
    "UPDATE attempts SET outcome = ?, charged = ?, credits = ?, provider = ?, model = ?, got = ?, status = ?, "
    "code = ?, message = ?, answered_at = ?, transaction_id = ?, new_credit_balance = ?, reserved = 0, request = '' "
    "WHERE job = ? AND attempt = ? AND outcome IN ('sent', 'unknown')"
)
_MOVE = "UPDATE attempts SET attempt = ? WHERE job = ? AND outcome = 'unknown'"
_JOB = (
    "INSERT INTO jobs (id, folder, stem, claim, state, decision, opened_at, ended_at, holder, epoch, lease_ends_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0) ON CONFLICT (id) DO NOTHING"
)
_FREE_LEASE = (
    "UPDATE jobs SET holder = ?, epoch = greatest(epoch, ?), lease_ends_at = 0 WHERE id = ? AND state <> 'done'"
)
_STATE = (
    "UPDATE jobs SET state = ?, decision = ?, claim = ?, reserved = 0 WHERE id = ? AND state NOT IN ('done', 'kept')"
)
_TAKEN = "SELECT id FROM inbox_jobs WHERE folder = ? AND stem = ? AND state IN ('open', 'decided', 'published')"
_SEEN = f"""
    SELECT name, host, {_NOW} - seen_at AS seconds FROM instances WHERE inbox = {_INBOX}
    AND ended_at IS NULL AND {_NOW} - seen_at < ? ORDER BY name LIMIT 1"""  # noqa: S608
_RECORDED = f"SELECT recorded FROM instances WHERE name = {_ME}"  # noqa: S608


@dataclass
class Known:
    """What the database has of a job.

    Attributes:
        state: State of its row; empty: there is none.
        epoch: How often it was taken.
        is_ours: Whether it is, or may be, a job of this inbox.
        outcomes: Of its attempts, by number.
        is_recent: Whether one of them is so recent that the row of the job was not deleted: it is lost.
    """

    state: str = ""
    epoch: int = 0
    is_ours: bool = True
    outcomes: dict[int, str] = field(default_factory=dict)
    is_recent: bool = False

    @property
    def highest(self) -> int:
        """Number of its newest attempt; 0 without."""
        return max(self.outcomes, default=0)

    @property
    def open_attempt(self) -> int:
        """Number of its attempt without a result; 0 without."""
        return max((number for number, outcome in self.outcomes.items() if outcome == "sent"), default=0)

    def is_over(self, attempts: Iterable[int]) -> bool:
        """Return whether each of some attempts has a known result, and the job was over for so long that it is deleted.

        Args:
            attempts: Those that the folders show.
        """
        ended = {number for number, outcome in self.outcomes.items() if outcome not in {"sent", "unknown"}}
        is_deleted = not self.state and not self.is_recent
        return is_deleted and bool(ended) and ended.issuperset([*self.outcomes, *attempts])

    @property
    def result(self) -> str:
        """The outcome that ended it, or an empty string."""
        return next((outcome for outcome in self.outcomes.values() if outcome not in NO_RESULT), "")


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What is to be written of one job.

    Attributes:
        claim: Its prompt.
        rows: Attempts to be inserted, with the daemon of each; empty: this one.
        result: The result of an attempt that is there.
        moved: Number of the attempt of the unknown charge, if that in the database is wrong; else 0.
        state: State of its row.
        decision: How it ends.
        epoch: Of its claim folder.
        has_row: Whether the row of the job is to be written.
    """

    claim: Claim
    rows: Sequence[tuple[Row, str]] = ()
    result: Row | None = None
    moved: int = 0
    state: JobState = "open"
    decision: Decision | None = None
    epoch: int = 0
    has_row: bool = True


class LostRows:
    """Writes rows again.

    Args:
        file: The shared database.
    """

    def __init__(self, file: Database) -> None:
        self._file = file

    def known(self) -> dict[str, Known]:
        """Return what the database has of each job of the account.

        Raises:
            SpoolError: It cannot be used.
        """
        with self._file.using() as connection:
            jobs = connection.execute(_JOBS).fetchall()
            attempts = connection.execute(_ATTEMPTS, (OVER_SECONDS,)).fetchall()
        found = {row["id"]: Known(row["state"], row["epoch"], row["is_ours"]) for row in jobs}
        for row in attempts:
            known = found.setdefault(row["job"], Known())
            known.outcomes[row["attempt"]] = row["outcome"]
            known.is_recent |= row["is_recent"]
        return found

    def running(self, alive_seconds: float) -> tuple[str, str, float] | None:
        """Return name and host of a daemon of the inbox that runs, and how many seconds ago it was seen; None: none.

        Args:
            alive_seconds: How long after it was seen last it counts as running.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_SEEN, (alive_seconds,)).fetchone()
        return None if row is None else (row["name"], row["host"], max(row["seconds"], 0.0))

    def recorded(self) -> int:
        """Return how many attempts of this daemon the database has.

        Raises:
            SpoolError: It cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_RECORDED).fetchone()
        return int(row["recorded"]) if row else 0

    def write(self, lost: Lost) -> str:
        """Write what is lost of one job; return why its row cannot be written now, or an empty string.

        Its attempts are written in any case.

        Raises:
            SpoolError: The database cannot be used.
        """
        return self._file.change(lambda connection: self._write(connection, lost), locked=True)

    def _write(self, connection: Connection, lost: Lost) -> str:
        for row, instance in lost.rows:
            connection.execute(_INSERT, (*storable(astuple(_counted(row))), instance or self._instance(connection)))
        if (one := lost.result) is not None:
            found = (one.outcome, one.charged, one.credits, one.provider, one.model, one.got, one.status, one.code)
            found += (one.message, one.answered_at, one.transaction_id, one.new_credit_balance)  # type: ignore[assignment]
            connection.execute(_RESULT, storable((*found, one.job, one.attempt)))
        if lost.moved:
            connection.execute(_MOVE, (lost.moved, lost.claim.job))
        return self._write_job(connection, lost) if lost.has_row else ""

    def _write_job(self, connection: Connection, lost: Lost) -> str:
        """Write the row of a job, unless a newer one has its name. Its attempts are there: what was paid counts."""
        claim, state = lost.claim, lost.state
        if state in {"open", "published"}:
            names = os.fsencode(claim.folder), os.fsencode(claim.stem)
            taken = connection.execute(_TAKEN, names).fetchone()
            if taken is not None and taken["id"] != claim.job:
                return f"a newer job of this name is not over ({taken['id']}); run the command again when it is"
        decision = dump(lost.decision).decode() if lost.decision else ""
        is_over, holder = state == "done", self._holder(connection)
        noted = "" if is_over and not decision else dump(claim).decode()
        values = claim.job, os.fsencode(claim.folder), os.fsencode(claim.stem), noted
        ended = connection.execute(f"SELECT {_NOW} AS now").fetchone()["now"] if is_over else None
        made = connection.execute(_JOB, (*values, state, decision, claim.at, ended, holder, lost.epoch)).rowcount
        if not made:
            if state != "open":
                connection.execute(_STATE, (state, decision, values[3], claim.job))
            connection.execute(_FREE_LEASE, (holder, lost.epoch, claim.job))
        return ""

    def _holder(self, connection: Connection) -> str:
        return HOLDER if self._file.is_common else self._instance(connection)

    @staticmethod
    def _instance(connection: Connection) -> str:
        return str(connection.execute(f"SELECT {_ME} AS name").fetchone()["name"])


def _counted(row: Row) -> Row:
    asked = dict(zip(("asked_provider", "price_kind"), price_of(row.fields, row.provider), strict=True))
    texts = {name: printable(getattr(row, name)) for name in ("provider", "model", "code", "message")}
    return replace(row, **asked, **texts, counted_at=row.sent_at)
