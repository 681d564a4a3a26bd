"""What the steps of a job do besides if other daemons process the same inbox, too.

Three things can be in question then: who has the job, what an earlier holder has sent, and where its response is. The
answers are in the journal (``journal.common``) and in the claim folder (``handover``).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import structlog

from imagewatch.job.handover import Witness
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.result_files import result_files
from imagewatch.job.rows import restored_row
from imagewatch.job.sending import Left
from imagewatch.journal.common import lost
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.job.record import Record
    from imagewatch.job.running import RunningJob
    from imagewatch.job.sending import Fate, Sending
    from imagewatch.job.spool import Spool
    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.values import Claim, Decision

_GRACE_SECONDS = 60.0
"""How long after its deadline a request of another daemon may be without a result before its charge is unknown."""
_POLL_SECONDS = 2.0
"""How often a daemon checks whether another one has handed over a response, or has finished a job."""
_RECOVER = "stop all daemons of the account, then run: imagewatch db recover"
_REMOVE = "check that no file in it is needed, then remove the folder"
_log = structlog.get_logger()


class CommonSteps:
    """Does what a common inbox needs besides. Safe to use from several threads, one job in each.

    Args:
        spool: The folders.
        journal: What was recorded.
        sending: What this process has sent.
        deadline_seconds: The longest time that a request may take.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        spool: Spool,
        journal: Journal,
        sending: Sending,
        deadline_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._spool = spool
        self._handover = spool.handover
        self._journal = journal
        self._common = journal.common
        self._sending = sending
        self._longest = deadline_seconds + _GRACE_SECONDS
        self._clock = clock
        self._orphans: set[str] = set()
        self._published: set[str] | None = None
        self.is_on = self._common.is_on

    # Who has it

    def is_held(self, job: str) -> bool:
        """Return whether this daemon has a job, with the epoch that it knows, or the journal does not know the job.

        Raises:
            SpoolError: The journal cannot be used.
        """
        found = self._common.where(job) if self.is_on else None
        return found is None or found[:2] == (self._common.instance, self._common.epoch(job))

    def has_lost(self, job: str) -> bool:
        """Return whether another daemon has a job; False also while that cannot be found out."""
        with contextlib.suppress(SpoolError):
            return not self.is_held(job)
        return False

    def require_held(self, job: str) -> None:
        """Make sure, before something is published, that no other daemon has the job.

        Its result may have been published by the other one, and taken away by a reader. The database is asked: the
        clock of this host stands still while it is a virtual machine that is paused.

        Raises:
            LostJobError: Another one has it.
            SpoolError: That cannot be found out: the other one publishes it.
        """
        if self.is_on and not self.is_held(job):
            raise lost(job)

    def testify(self, job: RunningJob, attempt: int, nonce: str) -> None:
        """Leave a witness of an attempt whose row is committed, right before its first byte; see ``Handover``."""
        fate = self._sending.known(job.id, attempt)
        assert fate is not None
        me = self._common.instance
        witness = Witness(attempt=attempt, nonce=nonce, instance=me, sent=fate.sent, claim=job.claim)
        self._handover.testify(job.id, witness)

    def restore_witnessed(self, record: Record, claim: Claim) -> None:
        """Write the rows of attempts again of which there is a witness, and that the database has lost.

        Raises:
            SpoolError: The journal or the disk cannot be used.
        """
        if not self.is_on or record.row is None:
            return
        for witness in self._handover.witnesses(record.job):
            if witness.attempt <= record.row.highest:
                continue
            self._restore(witness, claim)
            record.read_again()

    def _restore(self, witness: Witness, claim: Claim, epoch: int = 0) -> None:
        row = restored_row(claim, witness.attempt, witness.nonce, witness.sent, self._clock())
        self._journal.restore(claim, row, epoch)
        reason = "the database has lost its row"
        _log.warning("attempt_restored", job=claim.job, attempt=row.attempt, reason=reason, next=_RECOVER)

    # Its response

    def share(self, record: Record, attempt: int) -> None:
        """Copy a saved response into the claim folder, so that another daemon can publish it.

        Raises:
            LostJobError: Another daemon has the job.
        """
        if not self.is_on:
            return
        try:
            self._handover.share(record)
        except SpoolError as error:
            if not self.is_held(record.job):
                raise lost(record.job) from error
            with contextlib.suppress(SpoolError):  # else the others wait for the deadline
                self._common.answer_is_here(record.job, attempt)
            _log.warning("response_not_shared", reason=str(error), next=error.hint)

    def is_missing(self, record: Record) -> bool:
        """Return whether the journal lacks a job of which there is a response here, and its result.

        Raises:
            SpoolError: The journal or the disk cannot be used.
        """
        if not self.is_on or not (responses := record.responses()) or self._journal.is_over(record.job):
            return False
        return not self._common.was_deleted(record.job, responses)

    def wait_for(self, job: str, attempt: int) -> float:
        """Return for how many seconds another daemon may still report the result of an attempt; 0: not any more.

        Raises:
            SpoolError: The journal cannot be used.
        """
        if not self.is_on or (sent := self._common.sent_by(job, attempt)) is None:
            return 0.0
        if sent.answer_on and sent.answer_on != self._common.instance and not sent.is_forgotten:
            return _POLL_SECONDS
        if self._clock() >= sent.sent_at + self._longest:
            return 0.0
        is_own = sent.instance == self._common.instance and not self._is_of_another(job, attempt)
        return 0.0 if is_own else _POLL_SECONDS

    def _is_of_another(self, job: str, attempt: int) -> bool:
        """Return whether another daemon has sent an attempt whose row this one has written again."""
        witnesses = [one for one in self._handover.witnesses(job) if one.attempt == attempt]
        return any(one.instance not in {"", self._common.instance} for one in witnesses)

    def is_news(self, fate: Fate) -> bool:
        """Return whether only this process knows that a request was not sent, though how its job ends is decided."""
        return self.is_on and not fate.is_saved and fate.left is not Left.WHOLE

    def is_late(self, record: Record, decision: Decision) -> bool:
        """Return whether a job is about to end without the result of its request, which this daemon has meanwhile.

        Another daemon has decided that the charge is unknown; see ``hand_over`` for what comes then.

        Raises:
            SpoolError: The journal or the disk cannot be used.
        """
        facts = decision.facts
        if not self.is_on or decision.destination != "errors" or facts["answered"] or facts["charged"] == "no":
            return False
        self._handover.fetch(record)
        sent, answered = record.attempts()
        return sent == answered or record.partial(sent) is not None or self._sending.known(record.job, sent) is not None

    # A job that another daemon has

    def lost(self, job: RunningJob) -> Outcome:
        """End what this process does with a job that another daemon has, and hand over what only this process has.

        Raises:
            SpoolError: The journal or the disk cannot be used.
        """
        _log.warning("job_lost", reason="another daemon has taken it over")
        place = self._common.place(job.id)
        if (epoch := self._common.epoch(job.id)) and place is not None and place.state == "done":
            self._handover.give_back_late(f"{job.id}.{epoch}", job.claim.folder)  # claimed when that was over already
        return self.hand_over(job.id)

    def _report_fate(self, job: str, record: Record) -> None:
        """Record what only this process knows of a request of a job that another daemon has.

        What cannot be recorded is kept, as this daemon may have the job again: what came of a whole request.
        """
        fate = self._sending.known(job)
        if fate is None or (fate.left is Left.WHOLE and not fate.is_saved):
            return
        if fate.left is Left.NOTHING:
            self._journal.unsent(job, fate.attempt, fate.row.nonce)  # also if it is not certain that it was written
            if self._common.unsent(job, fate.attempt, fate.row.nonce):
                _log.info("late_result", job=job)
            self._spool.disk.unlink(record.path(f"answer.{fate.attempt}.part"))
        elif fate.left is Left.PART and not fate.is_saved:
            self._sending.prove(record, fate)
        self._sending.forget(job)

    def _is_early(self, job: str) -> bool:
        """Return whether another daemon ends a job whose request this one has not sent, and has not ended it yet.

        It may declare an unknown charge, which can be withdrawn only when that is over.
        """
        fate = self._sending.known(job)
        if fate is None or fate.left is not Left.NOTHING or (found := self._common.where(job)) is None:
            return False
        return found[0] != self._common.instance and found[2] in {"decided", "published"}

    def _forget(self, job: str) -> Outcome:
        """Forget a job with which this process has nothing more to do."""
        self._common.forget(job)
        self._sending.forget(job)
        return Outcome(job, End.NOTHING)

    def report_unknown(self, job: str, why: str, step: str = _RECOVER) -> None:
        """Log once that only a person can continue a job; its files stay."""
        if job not in self._orphans:
            self._orphans.add(job)
            _log.error("stuck", job=job, reason=why, next=step)

    def tidy(self, is_ending: Callable[[], bool] = lambda: False) -> None:
        """Find claim folders that no job has: of daemons that were killed, or of jobs that the database has lost.

        What was claimed after its job was over goes back into the inbox. A job that the database has lost is written
        down again if it was sent, and is taken over then.

        Args:
            is_ending: Whether to stop before the next folder.

        Raises:
            SpoolError: The disk failed.
        """
        self._published = None
        for name, epoch in self._handover.claimed().items():
            if is_ending():
                return
            if not self._common.epoch(name.partition(".")[0]):
                with contextlib.suppress(SpoolError):  # the next time
                    self._tidy(name, epoch)

    def _ended(self) -> set[str]:
        """Return the jobs that have a result file; they are read once for each time of tidying up."""
        if self._published is None:
            self._published = {result.claim.job for result in result_files(self._spool)}
        return self._published

    def _tidy(self, name: str, epoch: int) -> None:
        job = name.partition(".")[0]
        place = self._common.place(job)
        if place is not None:
            if place.state == "done":
                self._handover.give_back_late(name, place.folder)
            return
        if name in self._orphans:
            return
        witnesses = self._handover.witnesses(job, name)
        claims = [(witness, witness.claim) for witness in witnesses if witness.claim]
        path = printable(os.path.join(self._spool.claims, name))
        if witnesses and self._common.was_deleted(job, [witness.attempt for witness in witnesses]):
            # The job was over for so long that the database has only its results.
            self._orphans.add(name)
            _log.error("stuck", job=job, reason=f"{path} is left of a job that is over", next=_REMOVE)
        elif not claims or job in self._ended():
            self._orphans.add(name)
            why = f"{path} is the claim folder of a job that is not in the shared database"
            _log.error("stuck", job=job, reason=why, next=_RECOVER)
        else:
            for witness, claim in claims:
                self._restore(witness, claim, epoch)

    def hand_over(self, job: str) -> Outcome:
        """Let another daemon have the responses of its job, and remove them here when it is over.

        Raises:
            SpoolError: The journal or the disk cannot be used.
        """
        record, waits = self._spool.record(job), Outcome(job, End.DEFERRED, delay=_POLL_SECONDS, needs_nothing=True)
        if self._is_early(job):
            return waits
        self._report_fate(job, record)
        found = self._common.where(job)
        holder, epoch, state = found or ("", 0, "")
        if holder == self._common.instance and state != "done":  # its lease had ended, and this daemon has it again
            self._common.set_epoch(job, epoch, is_held=False)
            self._common.renew()
            return Outcome(job, End.DEFERRED, needs_nothing=True)
        if found is None or not (record.names() or self._sending.known(job)):
            return self._forget(job)
        if state == "done" and (attempts := record.responses()) and self._common.reopen(job, attempts):
            _log.info("late_result", job=job)
            return Outcome(job, End.DEFERRED, needs_nothing=True)
        if state in {"done", "kept"}:
            if not (unrecorded := self._common.open_attempts(job, record.responses())):
                for name in record.names():
                    self._spool.disk.unlink(record.path(name))
            else:  # it may be paid for: the files stay
                why = f"there is a response to attempt {unrecorded[0]}, of which the shared database has no result"
                path = printable(record.path(f"answer.{unrecorded[0]}"))
                step = "it may be paid for: check the balance (imagewatch check --balance); to end this, move it away: "
                self.report_unknown(job, why, step + path)
            return self._forget(job)
        if holder and record.responses():
            self._common.set_epoch(job, epoch, is_held=False)
            with contextlib.suppress(SpoolError):  # it may be taken over once more, or end, in this moment
                self._handover.share(record)
                self._common.answer_is_there(job)
        return waits
