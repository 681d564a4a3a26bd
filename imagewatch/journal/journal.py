"""The journal: the one record of what was claimed, sent, paid and decided.

**The right to send is spent.** Attempt N of a job may be sent only by the process whose transaction inserted the row
(job, N). ``spend`` does that: it checks the caps, the rate, a manual hold and whether the same files were requested
before, and returns when the row survives a power cut. Row N+1 needs row N to have a result that says it was free. A row
without a result is an unknown charge.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from msgspec.structs import astuple, replace

from imagewatch.journal.account import Account
from imagewatch.journal.books import SqlBooks
from imagewatch.journal.budget import NO_BUDGETS, Budget, folder_of
from imagewatch.journal.common import Common, lost
from imagewatch.journal.earlier import adopt, close_lost
from imagewatch.journal.events import Events
from imagewatch.journal.job_rows import JobRows
from imagewatch.journal.ledger import Ledger, storable
from imagewatch.journal.requests import Requests
from imagewatch.journal.row import FREE, Row, price_of
from imagewatch.journal.schema import COLUMNS
from imagewatch.protocol.reasons import Reason
from imagewatch.protocol.values import Claim, Decision, Sent, dump
from imagewatch.system.errors import NameTakenError, SpoolError, UncertainError
from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from imagewatch.config.schema import FolderBudget, Limits
    from imagewatch.journal.database import Connection, Database
    from imagewatch.journal.database import Row as Found
    from imagewatch.journal.prices import Asked

_RECEIVED = ("provider", "model", "code", "message", "request_id", "transaction_id")
_INSERT_ATTEMPT = f"INSERT INTO attempts ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608
_UPSERT = (
    f"{_INSERT_ATTEMPT}"
    "ON CONFLICT (job, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in {"job", "attempt", "counted_at"})
    + " WHERE attempts.nonce = excluded.nonce"
)

_UNSENT_ROW = (
    f"{_INSERT_ATTEMPT}"
    "ON CONFLICT (job, attempt) DO UPDATE SET outcome = 'unsent', charged = 'no', reserved = 0 "
    "WHERE attempts.nonce = excluded.nonce AND attempts.outcome = 'sent'"
)


class Journal(JobRows):
    """The journal. Safe to use from several threads.

    Args:
        file: The database.
        limits: Caps and rate.
        clock: Wall clock, seconds since the epoch.
        budgets: Caps and rate of single first-level folders.

    Attributes:
        file: The database.
        clock: Wall clock, seconds since the epoch: that of the shared database, or this host's.
        ledger: What was requested, completed and spent.
        requests: What commands ask for, and the holds that last.
        events: What is to be notified.
        account: Holds that concern all daemons of a shared account.
        common: Who has which job, if other daemons process the same inbox.
    """

    def __init__(
        self,
        file: Database,
        limits: Limits,
        clock: Callable[[], float],
        *,
        budgets: Mapping[str, FolderBudget] = NO_BUDGETS,
    ) -> None:
        self.file = self._file = file
        self._limits = limits
        self._budgets = budgets
        self.clock = self._clock = clock
        self._unspent: dict[str, Claim] = {}
        self._uncertain: dict[str, Row] = {}  # attempts of which it is not known whether they were written: not sent
        self.ledger = Ledger(self._file)
        self.requests = Requests(self._file, clock)
        self.events = Events(self._file, clock)
        self.account = Account(self._file)
        self.common = Common(self._file)

    def configure(self, limits: Limits, budgets: Mapping[str, FolderBudget] = NO_BUDGETS) -> None:
        """Take other caps and another rate, for all and for single first-level folders."""
        self._limits, self._budgets = limits, budgets

    def require(self, *, prove: bool = False) -> None:
        """Make sure that the journal exists and is the same as before.

        Args:
            prove: Whether to write something, too.

        Raises:
            SpoolError: It cannot be used; the message has the cause.
        """
        if prove:
            self._file.prove()
        else:
            with self._file.using():
                pass

    def accept(self) -> None:
        """Use what is there from now on; an empty journal if there is none, or a damaged one.

        Raises:
            SpoolError: It cannot be used either.
        """
        self._file.accept()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def budget(self, connection: Connection | None = None) -> Budget:
        """Return what may be spent now.

        Args:
            connection: The one of a transaction; without, each question is asked alone.
        """
        if connection is None:
            return Budget(SqlBooks(self.ledger.ask), self._limits, self._clock(), self._budgets)

        def ask(question: str, *values: object) -> list[Found]:
            return connection.execute(question, values).fetchall()

        return Budget(SqlBooks(ask), self._limits, self._clock(), self._budgets)

    # Jobs

    def open(self, claim: Claim, asked: Asked | None = None) -> Reason | None:
        """Note what is about to be claimed, and reserve what its request may cost.

        It need not be synced: without an attempt nothing is paid, and an attempt makes it durable, too.

        Args:
            claim: The prompt.
            asked: Its request; None without a cap.

        Returns:
            Why it may not be sent for now, or None. Then its name is taken until its job is over.

        Raises:
            SpoolError: The journal cannot be used, or a job with this name is not over.
        """

        def act(connection: Connection) -> Reason | None:
            budget, cost, folder = self.budget(connection), 0.0, folder_of(claim.source)
            if asked is not None:
                if budget.has_rate(folder):
                    self._correct_times(connection)
                refusal = budget.over_cap(asked, claim.job, folder) or budget.over_budget_rate(folder)
                if refusal is not None and refusal.row.is_own:
                    return refusal
                cost = budget.reservation(asked, folder) if refusal is None else 0.0  # its job will refuse it
            self._put(connection, claim, reserved=cost)
            if self.common.is_on:
                self.common.offer(connection, claim.job)
            return None

        return self._file.change(act, synced=False, locked=True)

    def claim(self, claim: Claim) -> None:
        """Note what is about to be claimed; it survives a power cut when this returns."""
        self._file.change(lambda connection: self._put(connection, claim))
        self._unspent[claim.job] = claim

    def _put(self, connection: Connection, claim: Claim, *, reserved: float = 0.0) -> None:
        """Note a claim; what is reserved for it already stays."""
        if not connection.execute(_CLAIM, (dump(claim).decode(), claim.job)).rowcount:
            self._insert(connection, claim, reserved=reserved)

    def _insert(
        self,
        connection: Connection,
        claim: Claim,
        *,
        reserved: float = 0.0,
        state: str = "open",
        decision: str = "",
        epoch: int = 0,
    ) -> None:
        """Insert the row of a job; without an epoch, its claim folder has the one that this process knows."""
        names = self._free_name(connection, claim)
        connection.execute(
            "INSERT INTO jobs (id, folder, stem, claim, state, decision, reserved, opened_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (claim.job, *names, dump(claim).decode(), state, decision, reserved, claim.at),
        )
        if self.common.is_on and (epoch := epoch or self.common.epoch(claim.job)):
            connection.execute(_SET_EPOCH, (epoch, claim.job))

    def _free_name(self, connection: Connection, claim: Claim) -> tuple[bytes, bytes]:
        """Return folder and stem of a job as they are stored.

        Raises:
            NameTakenError: Another job that is not over has them.
        """
        names = os.fsencode(claim.folder), os.fsencode(claim.stem)
        taken = connection.execute(_TAKEN.format(self._file.inbox_jobs), (*names, claim.job)).fetchone()
        if taken is not None:
            message = f"job {claim.job}: {printable(claim.prompt)} is still being processed, as job {taken['id']}"
            hint = "it is tried again when that job is over"
            raise NameTakenError(message, path=claim.source, code=errno.EEXIST, hint=hint)
        return names

    def unspent(self, job: str) -> Claim | None:
        """Return what this process has claimed for a job of which it has sent nothing yet, or None.

        Another journal, which does not know the job, may have taken the place of the one that did.
        """
        return self._unspent.get(job)

    def restore(self, claim: Claim, row: Row, epoch: int = 0) -> None:
        """Write a job and its attempt again, if this journal has taken the place of the one that had them.

        Args:
            claim: The job.
            row: Its attempt.
            epoch: Of its claim folder in a common inbox; 0: as this process knows it. It may be taken over then.
        """

        def act(connection: Connection) -> None:
            if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (claim.job,)).fetchone() is None:
                self._insert(connection, claim, epoch=epoch)
            question = "SELECT 1 FROM attempts WHERE job = ? AND attempt = ?"
            if connection.execute(question, (row.job, row.attempt)).fetchone() is None:
                self._write(connection, row)

        self._file.change(act)

    def adopt(self, claim: Claim, state: str, decision: Decision | None, sent: Mapping[int, Sent]) -> None:
        """Write the rows of a job of an earlier version; see ``earlier.adopt``."""
        jobs = self._file.inbox_jobs
        self._file.change(lambda one: adopt(one, jobs, self.budget(one), claim, state, decision, sent))

    def close_lost(self, known: Collection[str]) -> int:
        """Close the attempts of jobs of an earlier version that left nothing else; see ``earlier.close_lost``."""
        return 0 if self._file.is_shared else self._file.change(lambda connection: close_lost(connection, known))

    # Money

    def spend(self, row: Row, asked: Asked, *, skip_repeated: bool, claim: Claim | None = None) -> Reason | None:
        """Spend the right to send an attempt. Only who gets None may send it.

        Args:
            row: The attempt.
            asked: Its request.
            skip_repeated: Whether files that were requested before are not requested again.
            claim: Its prompt, if that is not noted yet.

        Returns:
            Why it may not be sent for now, or None: it is recorded, and survives a power cut.

        Raises:
            SpoolError: It cannot be recorded; or the attempt before may have been charged.
            UncertainError: It is not known whether it is recorded; then it is never sent.
        """

        def act(connection: Connection) -> Reason | None:
            self.common.require_held(connection, row.job)
            if self._is_spent(connection, row):
                return None
            if claim is not None:
                self._put(connection, claim)
            self._require_free(connection, row)
            refused = self._refusal(connection, row, asked, skip_repeated=skip_repeated)
            if refused := refused or self._held_account(connection, row.job, probes=True):
                return refused
            cost = self.budget(connection).reservation(asked, folder_of(row.source))
            self._write(connection, replace(row, outcome="sent", charged="unknown", reserved=cost))
            connection.execute("UPDATE jobs SET reserved = 0 WHERE id = ?", (row.job,))
            return None

        try:
            refusal = self._file.change(act, locked=True)
        except UncertainError:
            self._uncertain[row.job] = row
            raise
        if refusal is None:
            self._unspent.pop(row.job, None)
        return refusal

    def refusal(self, row: Row, asked: Asked, *, skip_repeated: bool) -> Reason | None:
        """Return why ``spend`` would refuse an attempt now, or None; before a connection is made for it."""

        def act(connection: Connection) -> Reason | None:
            reason = self._refusal(connection, row, asked, skip_repeated=skip_repeated)
            return reason or self._held_account(connection, row.job, probes=False)

        if self.budget().has_rate(folder_of(row.source)):  # to ask for the rate may correct the time of a request
            return self._file.change(act, synced=False)
        with self._file.using() as connection:
            return act(connection)

    def _held_account(self, connection: Connection, job: str, *, probes: bool) -> Reason | None:
        """Return why the holds of a shared account forbid a request, or None; asked last, as it may be a probe."""
        return self.account.refusal(connection, job, probes=probes) if self.account.is_on else None

    def correct_times(self) -> None:
        """Count what is dated later than now for the rate as if it had been sent now."""
        self._file.change(self._correct_times, synced=False)

    def _correct_times(self, connection: Connection) -> None:
        # What is dated later than now was sent before the clock was set back; its true time is unknown.
        connection.execute("UPDATE attempts SET counted_at = ?1 WHERE counted_at > ?1", (self._clock(),))

    def _is_spent(self, connection: Connection, row: Row) -> bool:
        """Return whether this very call has inserted the row already: the file may have been replaced meanwhile."""
        question = "SELECT nonce, outcome FROM attempts WHERE job = ? AND attempt = ?"
        found = connection.execute(question, (row.job, row.attempt)).fetchone()
        if found is None:
            return False
        if found["nonce"] == row.nonce and found["outcome"] == "sent":
            return True
        if self.common.is_on:  # what this process knows of the job is out of date
            raise lost(row.job)
        raise _spent(row, f"it has the result {found['outcome']}")

    def _require_free(self, connection: Connection, row: Row) -> None:
        """Make sure that the job is open, and that the attempt before was free."""
        job = connection.execute("SELECT state FROM jobs WHERE id = ?", (row.job,)).fetchone()
        if job is None or job["state"] != "open":
            raise _spent(row, f"its job is {job['state'] if job else 'not known'}")
        question = "SELECT attempt, outcome FROM attempts WHERE job = ? ORDER BY attempt DESC LIMIT 1"
        newest = connection.execute(question, (row.job,)).fetchone()
        number, outcome = (newest["attempt"], newest["outcome"]) if newest else (0, FREE[0])
        if number != row.attempt - 1 or outcome not in FREE:
            raise _spent(row, f"attempt {number} has the result {outcome}" if number else "it is not the first one")

    def _refusal(self, connection: Connection, row: Row, asked: Asked, *, skip_repeated: bool) -> Reason | None:
        manual = connection.execute("SELECT message FROM holds WHERE kind = 'manual'").fetchone()
        if manual is not None:
            return Reason("manual", manual["message"] or "put on hold manually")
        repeated = "SELECT job FROM attempts WHERE source = ? AND contents = ? AND source_mtime_ns = ? AND job <> ? "
        repeated += "AND outcome IN ('sent', 'completed', 'refused', 'unknown', 'invalid') LIMIT 1"
        values = storable((row.source, row.contents, row.source_mtime_ns, row.job))
        if skip_repeated and row.contents and (twin := connection.execute(repeated, values).fetchone()):
            return Reason("repeated", f"these files were requested before, as job {twin['job']}")
        budget, folder = self.budget(connection), folder_of(row.source)
        if budget.has_rate(folder):
            self._correct_times(connection)
        return budget.over_rate() or budget.over_budget_rate(folder) or budget.over_cap(asked, row.job, folder)

    def record(self, row: Row, *, synced: bool = True) -> None:
        """Write the result of an attempt.

        Args:
            row: The attempt.
            synced: Whether it survives a power cut when this returns.

        Raises:
            SpoolError: The disk failed; or another process has sent this attempt.
        """

        def act(connection: Connection) -> None:
            self._write(connection, row)
            if row.charged != "no":
                self.events.spent(connection, self.budget(connection))

        self._file.change(act, synced=synced)

    def unsent(self, job: str, attempt: int, nonce: str) -> None:
        """Note that the first byte of an attempt did not leave; it never will. Another process's row stays as it is."""
        uncertain = self._uncertain.get(job)

        def act(connection: Connection) -> None:
            if not connection.execute(_UNSENT, (job, attempt, nonce)).rowcount and uncertain is not None:
                # Its transaction may still be committed: with this row it cannot.
                row = replace(uncertain, outcome="unsent", charged="no", reserved=0.0, request="")
                connection.execute(_UNSENT_ROW, storable(astuple(row)))

        self._file.change(act)
        self._uncertain.pop(job, None)

    def decide(self, claim: Claim, decision: Decision, row: Row | None, *, repeated: str = "") -> None:
        """Write how a job ends, with the result of its last attempt, in one transaction that survives a power cut.

        If there is a receiver of notifications, their events are part of it.

        A later decision replaces an earlier one of which names exist already.

        Args:
            claim: The job.
            decision: How it ends.
            row: The last attempt, or the row of a job without one; None if it is written already.
            repeated: The finished job whose files were delivered again, if this is why.

        Raises:
            NameTakenError: It was over before, and a newer job of its name is not over.
            LostJobError: Another daemon has it.
            SpoolError: The journal cannot be used.
        """

        def act(connection: Connection) -> None:
            self.events.decided(connection, claim, decision)
            if row is not None:
                self._write(connection, row)
                self.events.spent(connection, self.budget(connection))
            if repeated:
                connection.execute(_REDELIVERED, (repeated, self._clock()))
            decide = self._own(_DECIDE.format(self._file.inbox_jobs))
            if not connection.execute(decide, (dump(decision).decode(), claim.job)).rowcount:
                self._free_name(connection, claim)
                if self.common.is_on and connection.execute(_IS_KNOWN, (claim.job,)).fetchone():
                    raise lost(claim.job)
                self._insert(connection, claim, state="decided", decision=dump(decision).decode())

        self._file.change(act)
        self._unspent.pop(claim.job, None)

    def _write(self, connection: Connection, row: Row) -> None:
        received = {name: known.text(getattr(row, name)) for name in _RECEIVED}  # a server may repeat the key
        asked = dict(zip(("asked_provider", "price_kind"), price_of(row.fields, row.provider), strict=True))
        row = replace(row, **received, **asked, counted_at=row.sent_at)
        if not connection.execute(_UPSERT, storable(astuple(row))).rowcount:
            raise _spent(row, "another process has sent it")


_CLAIM = "UPDATE jobs SET claim = ? WHERE id = ? AND state = 'open'"
_TAKEN = "SELECT id FROM {} WHERE folder = ? AND stem = ? AND state IN ('open', 'decided', 'published') AND id <> ?"
_UNSENT = (
    "UPDATE attempts SET outcome = 'unsent', charged = 'no', reserved = 0 "
    "WHERE job = ? AND attempt = ? AND nonce = ? AND outcome = 'sent'"
)
_SET_EPOCH = "UPDATE jobs SET epoch = ? WHERE id = ?"
_IS_KNOWN = "SELECT 1 FROM jobs WHERE id = ?"
# A job that was over before may share its name with a newer one: only then are the names compared.
_DECIDE = (
    "UPDATE jobs SET decision = ?, state = 'decided', reserved = 0, is_stuck = 0 WHERE id = ? "
    "AND NOT (state = 'returning' AND EXISTS (SELECT 1 FROM {} AS other WHERE folder = jobs.folder "
    "AND stem = jobs.stem AND state IN ('open', 'decided', 'published') AND id <> jobs.id))"
)
_REDELIVERED = (
    "INSERT INTO redeliveries (job, times, last_at) VALUES (?, 1, ?) "
    "ON CONFLICT (job) DO UPDATE SET times = redeliveries.times + 1, last_at = excluded.last_at"
)


def _spent(row: Row, why: str) -> SpoolError:
    return SpoolError(
        f"job {row.job}: attempt {row.attempt} must not be sent: {why}",
        hint="check the balance (imagewatch check --balance); its files stay where they are",
    )
