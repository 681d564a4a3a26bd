"""The ledger: what was requested, completed, refused and spent, one row for each attempt; only read here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagewatch.journal.row import LOST
from imagewatch.journal.schema import COLUMNS
from imagewatch.system.text import whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imagewatch.journal.database import Database, Row


_LONGEST_CLAIMED = 7 * 86_400.0
"""How long before it is sent a job may have been claimed, seconds; it lets an index be used."""
_CLOCKS = (1_000_000_000, 1_000_000, 100)
"""Nanoseconds that the times of files are multiples of, on some file systems and after some copies."""
_LEAST, _MOST = -(2**63), 2**63 - 1
"""The integers of SQLite. An mtime may be beyond them, in nanoseconds: any user can set it to the year 2400."""
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM attempts"  # noqa: S608  our own names
NO_TOTALS = {"completed": 0, "refused": 0, "unknown": 0, "credits": 0.0}
"""What ``Ledger.totals`` returns of an empty ledger."""


@dataclass(frozen=True)
class Balances:
    """What the account had before and after a request whose charge is not known; a hint for a person, no proof.

    Attributes:
        before: The last balance that was reported before it was sent, credits; None: there is none.
        before_at: When, seconds since the epoch.
        after: The first that was reported after that, credits; None: there is none yet.
        after_at: When.
        others: Other requests between the two that were charged or may have been; the one that reported the balance
            after is one of them.
        credits: What they are known to have been charged.
        unknown_cost: How many of them were or may have been charged without a known amount.
    """

    before: float | None = None
    before_at: float | None = None
    after: float | None = None
    after_at: float | None = None
    others: int = 0
    credits: float = 0.0
    unknown_cost: int = 0


class Ledger:
    """Asks the journal about requests. Safe to use from several threads.

    Args:
        file: The database.
    """

    def __init__(self, file: Database) -> None:
        self._file = file

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
              AND outcome IN ('completed', 'refused', 'unknown', 'invalid')
            ORDER BY claimed_at DESC"""
        return [(row["job"], row["contents"]) for row in self.ask(question, source, size, mtime_ns, job)]

    def is_lost(self, job: str) -> bool:
        """Return whether a job was ended by ``close_lost``: it has no result file."""
        return bool(self.ask("SELECT 1 FROM attempts WHERE job = ? AND message = ?", job, LOST))

    def was_placed(self, mtime_ns: int) -> bool:
        """Return whether a prompt got this mtime in ``errors`` or ``archive``, or one that a coarser clock shows so.

        Args:
            mtime_ns: Nanoseconds since the epoch.
        """
        width = next((width for width in _CLOCKS if mtime_ns % width == 0), 1)
        question = "SELECT 1 FROM attempts WHERE placed_mtime_ns >= ? AND placed_mtime_ns < ? LIMIT 1"
        return bool(mtime_ns > 0 and self.ask(question, mtime_ns, mtime_ns + width * (2 if width > 1 else 1)))

    def redelivered(self) -> int:
        """Return how often files of finished jobs came again."""
        return int(self.ask("SELECT coalesce(sum(times), 0) AS times FROM redeliveries")[0]["times"])

    def last_redelivered(self, most: int) -> list[tuple[str, float]]:
        """Return the prompts that were delivered again last, the newest first, and when.

        Args:
            most: How many at most.

        Returns:
            The path below the inbox, and seconds since the epoch.
        """
        question = """
            SELECT (SELECT source FROM attempts AS a WHERE a.job = r.job LIMIT 1) AS source, last_at
            FROM redeliveries AS r ORDER BY last_at DESC, job LIMIT ?"""
        return [(row["source"], row["last_at"]) for row in self.ask(question, most) if row["source"] is not None]

    def rows(self) -> list[dict[str, Any]]:
        """Return all attempts, oldest first."""
        return [dict(row) for row in self.ask(f"{_SELECT} WHERE outcome <> 'unsent' ORDER BY claimed_at, job, attempt")]

    def jobs(self, since: float = 0.0, newest: int | None = None) -> list[dict[str, Any]]:
        """Return one row for each job: its last attempt, with ``attempts`` made, ``credits`` of all of them.

        Args:
            since: Only what was sent, or refused by our own checks, at this time or later; seconds since the epoch.
            newest: Only so many of the newest.

        Returns:
            Oldest first. ``redelivered`` is how often its files came again. In a shared database, ``instance`` is the
            daemon that sent it.
        """
        whose = ["a.instance"] if self._file.is_shared else []
        question = f"""
            SELECT * FROM (
                SELECT {", ".join(whose + [f"a.{name}" for name in COLUMNS if name not in {"attempt", "credits"}])},
                       s.attempts, s.credits, coalesce(r.times, 0) AS redelivered
                FROM (
                    SELECT job, max(attempt) AS attempts, sum(credits) AS credits FROM attempts
                    WHERE claimed_at >= ? AND coalesce(sent_at, claimed_at) >= ? AND outcome <> 'unsent' GROUP BY job
                ) AS s
                JOIN attempts AS a ON a.job = s.job AND a.attempt = s.attempts
                LEFT JOIN redeliveries AS r ON r.job = a.job
                ORDER BY a.claimed_at DESC, a.job LIMIT ?
            ) AS found ORDER BY claimed_at, job"""  # noqa: S608  our own names
        limit = _MOST if newest is None else newest
        return [dict(row) for row in self.ask(question, since - _LONGEST_CLAIMED, since, limit)]

    def job(self, job: str) -> dict[str, Any] | None:
        """Return the last attempt of a job, or None."""
        rows = self.ask(f"{_SELECT} WHERE job = ? AND outcome <> 'unsent' ORDER BY attempt DESC LIMIT 1", job)
        return dict(rows[0]) if rows else None

    def balance(self) -> tuple[float, float] | None:
        """Return the last balance that a response reported, credits, and when, seconds since the epoch; or None."""
        question = """
            SELECT new_credit_balance AS credits, answered_at FROM attempts
            WHERE new_credit_balance IS NOT NULL AND answered_at IS NOT NULL ORDER BY answered_at DESC LIMIT 1"""
        rows = self.ask(question)
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
        before = self.ask(question.format("<=", "DESC"), sent_at, job)
        after = self.ask(question.format(">", "ASC"), sent_at, job)
        found = Balances(*(before[0] if before else (None, None)), *(after[0] if after else (None, None)))
        if found.before_at is None or found.after_at is None:
            return found
        question = """
            SELECT count(*), coalesce(sum(credits), 0.0), count(CASE WHEN credits IS NULL THEN 1 END) FROM attempts
            WHERE charged IN ('yes', 'unknown') AND job <> ?
              AND coalesce(answered_at, sent_at) > ? AND coalesce(answered_at, sent_at) <= ?"""
        (others,) = self.ask(question, job, found.before_at, found.after_at)
        return Balances(found.before, found.before_at, found.after, found.after_at, *others)

    def totals(self, since: float = 0.0) -> dict[str, float]:
        """Return sums: ``completed``, ``refused``, ``unknown`` jobs and ``credits``.

        Args:
            since: Only what was sent, or refused by our own checks, at this time or later; seconds since the epoch.
        """
        question = """
            SELECT count(DISTINCT CASE WHEN charged = 'yes' THEN job END) AS completed,
                   count(DISTINCT CASE WHEN outcome IN ('refused', 'invalid') THEN job END) AS refused,
                   count(DISTINCT CASE WHEN outcome = 'unknown' THEN job END) AS unknown,
                   coalesce(sum(credits), 0) AS credits
            FROM attempts WHERE claimed_at >= ? AND coalesce(sent_at, claimed_at) >= ?"""
        return dict(self.ask(question, since - _LONGEST_CLAIMED, since)[0])

    def ask(self, question: str, *values: object) -> list[Row]:
        """Return the rows that answer a question.

        Raises:
            SpoolError: The journal cannot be used.
        """
        with self._file.using() as connection:
            return connection.execute(question, storable(values)).fetchall()


def storable(values: Iterable[object]) -> list[object]:
    """Return values as SQLite can hold them, the same for what is written and what is asked for."""
    return [_nearest(value) for value in values]


def _nearest(value: object) -> object:
    if isinstance(value, str):
        return whole(value)
    return min(max(value, _LEAST), _MOST) if isinstance(value, int) else value
