"""The ledger: one row for each attempt.

It records what was completed, refused and spent, and which files were finished before. A row is written before the
request is sent: what cannot be recorded is not paid. It is written by job and attempt, so that writing it again changes
nothing. WAL with ``synchronous = FULL``: a row that was committed survives a power cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import astuple, replace

from imagewatch.journal.prices import Asked, for_an_image
from imagewatch.journal.row import COLUMNS, LOST, Row, price_of
from imagewatch.journal.schema import prepare
from imagewatch.journal.sqlite import Database
from imagewatch.system.masking import known
from imagewatch.system.text import whole

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable


_LONGEST_CLAIMED = 7 * 86_400.0
"""How long before it is sent a job may have been claimed, seconds; it lets an index be used."""
_CLOCKS = (1_000_000_000, 1_000_000, 100)
"""Nanoseconds that the times of files are multiples of, on some file systems and after some copies."""
_LEAST, _MOST = -(2**63), 2**63 - 1
"""The integers of SQLite. An mtime may be beyond them, in nanoseconds: any user can set it to the year 2400."""
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


_RECEIVED = ("provider", "model", "code", "message", "request_id", "transaction_id")
_UPSERT = (
    f"INSERT INTO attempts ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608
    "ON CONFLICT (job, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in {"job", "attempt"})
)


class Ledger:
    """The ledger in its file. Safe to use from several threads.

    Args:
        path: The database; created if it is not there. On a local disk: SQLite's locks need one.
        guarded: Whether the file has to be the one that was used before. It is then opened when it is first used.
        synchronous: SQLite's setting.
    """

    def __init__(self, path: str, *, guarded: bool = False, synchronous: str = "FULL") -> None:
        self._file = Database(path, prepare, guarded=guarded, synchronous=synchronous)
        if not guarded:
            with self._file.using():
                pass

    def require(self, *, prove: bool = False) -> None:
        """Make sure that the ledger exists and is the same as before.

        Args:
            prove: Whether to write something, too.

        Raises:
            SpoolError: It cannot be used; the message says why.
        """
        if prove:
            self._file.prove()
        else:
            with self._file.using():
                pass

    def accept(self) -> None:
        """Use what is there from now on; an empty ledger if there is none, or a damaged one.

        Raises:
            SpoolError: It cannot be used either.
        """
        self._file.accept()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def withdraw(self, job: str) -> None:
        """Remove the rows of attempts of a job that were to be sent, and were not.

        Raises:
            SpoolError: The disk failed.
        """
        if self._all("SELECT 1 FROM attempts WHERE job = ? AND outcome = 'sent'", job):  # mostly there is none
            delete = "DELETE FROM attempts WHERE job = ? AND outcome = 'sent'"
            self._file.change(lambda connection: connection.execute(delete, (job,)))

    def close_lost(self, known: Collection[str]) -> int:
        """Give attempts of which only their row is left their result: whether they were charged is unknown.

        Args:
            known: The jobs that are not over; they find out the result of theirs.

        Returns:
            How many there were.
        """
        found = self._all("SELECT job, attempt FROM attempts WHERE outcome = 'sent'")
        lost = [(LOST, row["job"], row["attempt"]) for row in found if row["job"] not in known]
        close = "UPDATE attempts SET outcome = 'unknown', message = ? WHERE job = ? AND attempt = ?"
        if lost:
            self._file.change(lambda connection: connection.executemany(close, lost))
        return len(lost)

    def write(self, row: Row) -> None:
        """Write a row durably; the same job and attempt again replaces it.

        Raises:
            SpoolError: The disk failed.
        """
        received = {name: known.text(getattr(row, name)) for name in _RECEIVED}  # a server may repeat the key
        asked = dict(zip(("asked_provider", "price_kind"), price_of(row.fields, row.provider), strict=True))
        row = replace(row, **received, **asked)
        self._file.change(lambda connection: connection.execute(_UPSERT, _storable(astuple(row))))

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
        return [(row["job"], row["contents"]) for row in self._all(question, source, size, mtime_ns, job)]

    def is_lost(self, job: str) -> bool:
        """Return whether a job was ended by ``close_lost``: it has no result file."""
        return bool(self._all("SELECT 1 FROM attempts WHERE job = ? AND message = ?", job, LOST))

    def was_placed(self, mtime_ns: int) -> bool:
        """Return whether a prompt got this mtime in ``errors`` or ``archive``, or one that a coarser clock shows so.

        Args:
            mtime_ns: Nanoseconds since the epoch.
        """
        width = next((width for width in _CLOCKS if mtime_ns % width == 0), 1)
        question = "SELECT 1 FROM attempts WHERE placed_mtime_ns >= ? AND placed_mtime_ns < ? LIMIT 1"
        return bool(mtime_ns > 0 and self._all(question, mtime_ns, mtime_ns + width * (2 if width > 1 else 1)))

    def count_redelivery(self, job: str, at: float) -> None:
        """Note that the files of a finished job came again.

        Args:
            job: The finished job.
            at: When, seconds since the epoch.
        """
        count = (
            "INSERT INTO redeliveries VALUES (?, 1, ?) "
            "ON CONFLICT (job) DO UPDATE SET times = times + 1, last_at = excluded.last_at"
        )
        self._file.change(lambda connection: connection.execute(count, (job, at)))

    def redelivered(self) -> int:
        """Return how often files of finished jobs came again."""
        return int(self._all("SELECT coalesce(sum(times), 0) AS times FROM redeliveries")[0]["times"])

    def unanswered(self, job: str) -> tuple[Asked, float] | None:
        """Return the request of a job that has no result yet and when it was sent, seconds since the epoch, or None."""
        row = self.job(job)
        if row is None or row["outcome"] != "sent":
            return None
        return Asked(row["asked_provider"], row["price_kind"], max(row["asked"], 1)), row["sent_at"] or 0.0

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
                SELECT {", ".join(f"a.{name}" for name in COLUMNS if name not in {"attempt", "credits"})},
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
        """Return the last balance that a response reported, credits, and when, seconds since the epoch; or None."""
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
        return dict(self._all(question, since - _LONGEST_CLAIMED, since)[0])

    # What caps ask (``budget.Books``)

    def spending(self, since: float) -> tuple[float, list[tuple[str, str, int]]]:
        """Return what was spent since a time, seconds since the epoch.

        Returns:
            Credits that are known to have been charged; and for requests that were or may have been charged an amount
            that is not known: provider, kind of price, and how many images they asked for in all.
        """
        question = """
            SELECT asked_provider, price_kind, coalesce(sum(credits), 0) AS credits,
                   sum(CASE WHEN credits IS NULL THEN max(asked, 1) ELSE 0 END) AS unknown_cost
            FROM attempts WHERE charged IN ('yes', 'unknown') AND outcome <> 'sent' AND sent_at >= ?
            GROUP BY asked_provider, price_kind"""
        rows = self._all(question, since)
        unknown = [
            (row["asked_provider"], row["price_kind"], row["unknown_cost"]) for row in rows if row["unknown_cost"]
        ]
        return sum(row["credits"] for row in rows), unknown

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:
        """Return what requests to a provider were charged for an image, credits, by the kind of their price.

        A charge of 0 does not predict the next one, and is left out.

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
        with self._file.using() as connection:
            return connection.execute(question, _storable(values)).fetchall()


def _storable(values: Iterable[object]) -> list[object]:
    """Return values as SQLite can hold them, the same for what is written and what is asked for."""
    return [_nearest(value) for value in values]


def _nearest(value: object) -> object:
    if isinstance(value, str):
        return whole(value)
    return min(max(value, _LEAST), _MOST) if isinstance(value, int) else value
