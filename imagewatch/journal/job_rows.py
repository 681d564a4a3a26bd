"""The rows of jobs: where each is, and what is known of it until it is over."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING

from imagewatch.journal.row import LOST, OVER_SECONDS, AttemptRow, JobRow
from imagewatch.protocol.names import CLAIMS
from imagewatch.protocol.values import Claim, Sent, load, load_decision
from imagewatch.system.errors import DamagedJobError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.journal.common import Common
    from imagewatch.journal.database import Connection, Database
    from imagewatch.journal.database import Row as Found
    from imagewatch.journal.ledger import Ledger
    from imagewatch.journal.row import Row

_UNKNOWN_SECONDS = 365 * 86_400.0
"""The same for one in a common inbox whose charge is unknown, and for one of another daemon: that may come back."""
_FORGET_REQUESTS = (
    "UPDATE attempts SET request = '' WHERE request <> '' AND job IN (SELECT id FROM jobs WHERE state = 'done' "
    "AND ended_at < ?)"
)
_ATTEMPTS = "SELECT attempt, outcome, nonce, request FROM attempts WHERE job = ? AND attempt > 0 ORDER BY attempt"
_SET_STATE = "UPDATE jobs SET state = ? WHERE id = ?"
_KEEP = "UPDATE jobs SET state = 'kept' WHERE id = ?"
_STUCK = "UPDATE jobs SET is_stuck = 1 WHERE id = ?"
_LOSE = "UPDATE attempts SET outcome = 'unknown', message = ?, reserved = 0 WHERE job = ? AND outcome = 'sent'"
_END = "UPDATE jobs SET state = 'done', reserved = 0, is_stuck = 0, ended_at = ? WHERE id = ?"
_FINISH = (
    "UPDATE jobs SET state = 'done', claim = '', decision = '', reserved = 0, is_stuck = 0, ended_at = ? WHERE id = ?"
)


class JobRows(abc.ABC):
    """What the journal has of jobs. ``Journal`` adds what is spent and decided.

    Attributes:
        ledger: What was requested, completed and spent.
        common: Who has which job, if other daemons process the same inbox.
    """

    ledger: Ledger
    common: Common
    _file: Database
    _clock: Callable[[], float]
    _unspent: dict[str, Claim]
    _uncertain: dict[str, Row]

    @abc.abstractmethod
    def unsent(self, job: str, attempt: int, nonce: str) -> None:
        """Note that the first byte of an attempt did not leave; it never will."""

    def job(self, job: str) -> JobRow | None:
        """Return what is known of a job; None if there is none, or it is over.

        Raises:
            SpoolError: The journal cannot be used.
            DamagedJobError: What it holds of the job cannot be read.
        """
        if (uncertain := self._uncertain.get(job)) is not None:
            self.unsent(job, uncertain.attempt, uncertain.nonce)
        with self._file.using() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ? AND state <> 'done'", (job,)).fetchone()
            if row is None:
                return None
            attempts = connection.execute(_ATTEMPTS, (job,)).fetchall()
        try:
            return _job(row, attempts)
        except ValueError as error:
            raise DamagedJobError(
                f"job {job}: the ledger's record of it is damaged, and it may have been charged: {error}",
                hint="restore the ledger from a backup; or, only if you accept a possible second charge, touch the "
                f"files in {CLAIMS}/{job} in the inbox and move them back into the inbox",
            ) from error

    def abandon(self, job: str) -> None:
        """End a job whose record is damaged and whose originals a person has taken away."""

        def act(connection: Connection) -> None:
            connection.execute(_LOSE, (LOST, job))
            connection.execute(_FINISH, (self._clock(), job))

        self._file.change(act)

    def unfinished(self) -> list[str]:
        """Return the ids of all jobs that are not over, the oldest first."""
        question = f"SELECT id FROM {self._file.own_jobs} WHERE state NOT IN ('done', 'kept') ORDER BY opened_at, id"  # noqa: S608
        return [row["id"] for row in self.ledger.ask(question)]

    def forget_old(self) -> None:
        """Forget jobs that are over for long: those of this daemon, and much later also those of others."""
        own = f"decision = '' AND {self._file.is_ours}"
        old = f"DELETE FROM jobs WHERE state = 'done' AND ended_at < ? AND ({own} OR ended_at < ?)"  # noqa: S608
        latest, latest_unknown = self._clock() - OVER_SECONDS, self._clock() - _UNKNOWN_SECONDS

        def act(connection: Connection) -> None:
            if self._file.is_shared:
                connection.execute(_FORGET_REQUESTS, (latest_unknown,))
            connection.execute(old, (latest, latest_unknown))

        self._file.change(act, synced=False)

    def is_over(self, job: str) -> bool:
        """Return whether a job is known and over."""
        return bool(self.ledger.ask("SELECT 1 FROM jobs WHERE id = ? AND state = 'done'", job))

    def set_state(self, job: str, state: str) -> None:
        """Note where a job is. It need not be synced: the folders show it, too."""
        self._file.change(lambda connection: connection.execute(self._own(_SET_STATE), (state, job)), synced=False)

    def _own(self, change: str) -> str:
        """Return a change of a job that is made only while this daemon has it."""
        return f"{change} AND {self._file.is_ours}"

    def set_stuck(self, job: str) -> None:
        """Note that only a person can continue a job: what it has reserved counts as spent."""
        self._file.change(lambda connection: connection.execute(_STUCK, (job,)), synced=False)

    def unreserve(self, job: str) -> None:
        """End what was reserved for a job that has not sent anything: others need not wait for it."""
        self._file.change(
            lambda connection: connection.execute("UPDATE jobs SET reserved = 0 WHERE id = ?", (job,)), synced=False
        )

    def finish(self, job: str, *, synced: bool = False, is_unknown: bool = False) -> None:
        """Note that nothing is left of a job.

        Args:
            job: Its id.
            synced: Whether that survives a power cut; else it has to be found out again.
            is_unknown: Whether another daemon may still find out how it ended: what it needs for that is kept.
        """

        def act(connection: Connection) -> None:
            ended = connection.execute(self._own(_END if is_unknown else _FINISH), (self._clock(), job)).rowcount
            if (ended or not self.common.is_on) and not is_unknown:
                connection.execute("UPDATE attempts SET request = '', reserved = 0 WHERE job = ?", (job,))

        self._file.change(act, synced=synced)
        self._unspent.pop(job, None)

    def keep(self, job: str) -> None:
        """Keep a job that was paid for and gave no image, for ``imagewatch retry``."""
        self._file.change(lambda connection: connection.execute(self._own(_KEEP), (job,)), synced=True)

    def kept(self, job: str) -> JobRow | None:
        """Return a job that was kept, or is being read again; None if there is no such job."""
        found = self.job(job)
        return found if found is not None and found.state in {"kept", "reopened"} else None

    def reopen(self, job: str) -> bool:
        """Let the response of a job be read again that was kept; return whether it was, now or by an earlier try."""
        change = "UPDATE jobs SET state = 'reopened' WHERE id = ? AND state IN ('kept', 'reopened')"
        return self._file.change(lambda connection: bool(connection.execute(change, (job,)).rowcount))

    def reclaimed(self, job: str) -> None:
        """Note that the originals of a reopened job are in its claim again."""
        change = "UPDATE jobs SET state = 'returning', decision = '' WHERE id = ? AND state = 'reopened'"
        self._file.change(lambda connection: connection.execute(change, (job,)))


def _job(row: Found, attempts: list[Found]) -> JobRow:
    decision = load_decision(row["decision"].encode()) if row["decision"] else None
    is_reopened = row["state"] == "reopened"
    return JobRow(
        claim=load(row["claim"].encode(), Claim),
        state=row["state"],
        decision=None if is_reopened else decision,
        withdrawn=decision if is_reopened else None,
        attempts=tuple(_attempt(one) for one in attempts if one["outcome"] != "unsent"),
        highest=max((one["attempt"] for one in attempts), default=0),
    )


def _attempt(row: Found) -> AttemptRow:
    sent = None
    with contextlib.suppress(ValueError):  # damaged
        sent = load(row["request"].encode(), Sent) if row["request"] else None
    return AttemptRow(number=row["attempt"], outcome=row["outcome"], nonce=row["nonce"], sent=sent)
