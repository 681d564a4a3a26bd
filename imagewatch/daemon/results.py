"""What follows from the result of a job: for the job, for the other jobs, and for the queue."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Need
from imagewatch.job.outcome import End, Outcome
from imagewatch.protocol.reasons import DISK_SECONDS
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.daemon.jobs import Job
    from imagewatch.daemon.mailbox import Finished
    from imagewatch.daemon.parts import Parts

_MOST_LEFT = 3
"""If so many jobs need a person, nothing is sent any more: the next ones might also be charged without a result."""
_LEFT = "left"
"""In the place of a job id: all jobs that need a person put the queue on hold together."""
_LEFT_HINT = "the log has the reason and the next step for each; to continue without them, run: imagewatch release"
_log = structlog.get_logger()


class Results:
    """Takes the results of jobs.

    Args:
        parts: The daemon's parts.
        on_outcome: Called for each job that is over.

    Attributes:
        failed: How many jobs ended in ``errors``.
    """

    def __init__(self, parts: Parts, on_outcome: Callable[[Outcome], None]) -> None:
        self._parts = parts
        self._jobs = parts.jobs
        self._on_outcome = on_outcome
        self.failed = 0

    def take(self, message: Finished) -> None:
        """Handle the result of a worker."""
        job = self._jobs.take(message.job)
        self._parts.caps.soon()
        self._parts.status.change()
        self._parts.intake.over(job.key)
        self._parts.notifier.wake()
        try:
            outcome = message.future.result()
        except SpoolError as error:
            self._parts.admission.shared.over(job.id, is_answered=False)
            self._unreserve(job)
            self._failed(job, error)
            return
        except Exception:  # noqa: BLE001  a bug in one job must not stop the others
            _log.exception("internal_error", **job.names, next="report this as a bug")
            job.problem = "internal error; the log has the details"
            self._parts.admission.shared.over(job.id, is_answered=False)
            self._unreserve(job)
            self._leave(job)
            return
        self._continues(job)
        self._hold_or_release(outcome, message.began)
        self._place(job, outcome)

    def _unreserve(self, job: Job) -> None:
        """End what a job that failed has reserved, if it has not sent anything yet."""
        with contextlib.suppress(SpoolError):
            self._parts.journal.unreserve(job.id)

    # A job that failed at the local disk

    def _failed(self, job: Job, error: SpoolError) -> None:
        """Let a job wait that failed at the local disk.

        If a test file can be written, only this job is affected: a file is in its way, or a permission is missing. The
        queue continues, but nothing is claimed from the job's folder: the same may happen to other prompts of that
        folder after they were paid for. If no test file can be written, or the database failed, the queue is on hold.
        """
        job.problem = "; ".join(filter(None, (str(error), error.hint)))
        if error.code == 0:
            _log.error("stuck", **job.names, reason=str(error), next=error.hint)
            self._leave(job)
        elif self._parts.admission.works_for_others(job, error):
            if not job.fails:
                _log.error("stuck", **job.names, reason=str(error), next=error.hint, retried="automatically")
            self._jobs.retry_stuck(job, self._parts.now())
            self._close_folders()
        else:
            self._jobs.defer(job, self._parts.now() + DISK_SECONDS)

    def _continues(self, job: Job) -> None:
        """Note that a job is not stuck any more, if it was."""
        self._parts.admission.continues(job.id)
        if self._jobs.clear_failure(job):
            self._close_folders()
            self._parts.intake.scanner.soon(job.key)

    def _close_folders(self) -> None:
        """Let nothing be claimed out of the folders that have a stuck job."""
        self._parts.status.change()
        self._parts.intake.closed = self._jobs.closed_folders()

    # A job that needs a person

    def _leave(self, job: Job) -> None:
        self._continues(job)
        self._jobs.leave(job)
        with contextlib.suppress(SpoolError):  # then it stays reserved
            self._parts.journal.set_stuck(job.id)
        self.count_left()

    def count_left(self) -> None:
        """Put the queue on hold while many jobs need a person."""
        left = self._jobs.left
        if len(left) >= _MOST_LEFT:
            jobs = ", ".join(sorted(left)[:_MOST_LEFT])
            self._parts.admission.hold_for(
                _LEFT, SpoolError(f"{len(left)} jobs are stuck ({jobs}, …)", hint=_LEFT_HINT)
            )
        else:
            self._parts.admission.continues(_LEFT)

    def forget_removed(self) -> None:
        """Forget jobs of which a person has removed what was left: their names are free."""
        for job in self._jobs.left:
            if self._parts.spool.is_left(job):
                continue
            _log.info("unstuck", **self._jobs.forget(job).names, reason="none of its files are left")
            self.count_left()
            self._parts.intake.scanner.soon()
            self._parts.status.change()

    # A job that came to an outcome

    def _hold_or_release(self, outcome: Outcome, began: float) -> None:
        """Hold or release the queue as the outcome demands."""
        admission = self._parts.admission
        admission.shared.over(outcome.job, is_answered=outcome.answered and outcome.reason is None)
        if outcome.reason is not None and outcome.reason.kind == "broken":
            admission.upload_broke(outcome.job, outcome.reason, began)
        elif outcome.reason is not None:
            admission.refused(outcome.reason, began)
        elif outcome.answered:
            admission.answered(began)

    def _place(self, job: Job, outcome: Outcome) -> None:
        """Note where the job is now, and what that means for others of its name."""
        burst, intake, now = self._parts.admission.burst, self._parts.intake, self._parts.now()
        if outcome.end not in {End.DEFERRED, End.RETURNED}:
            self._jobs.free_name(job.key, now)
        if outcome.end is End.NOTHING and outcome.reason is not None and outcome.reason.error is not None:
            self._parts.is_recovered = False  # whether it was recorded is not known
            intake.scanner.soon(job.key)
        elif outcome.end is End.DEFERRED:
            self._jobs.defer(job, now + outcome.delay, _need(outcome))
        elif outcome.end is End.RETURNED:
            burst.returned(outcome.source)  # it is the same prompt
            intake.scanner.soon(job.key)
        elif outcome.end is End.REDELIVERED:
            burst.finished(outcome.source)  # the next prompt of this path is another one
            intake.scanner.soon(job.key)
        elif outcome.end is End.OVER:
            burst.finished(outcome.source)
            self.failed += outcome.destination == "errors"
            self._on_outcome(outcome)


def _need(outcome: Outcome) -> Need:
    """Return what a job needs that is deferred."""
    if outcome.awaits_name:
        return Need.NAME
    if outcome.reason is not None and outcome.reason.row.is_short:
        return Need.TURN
    return Need.REQUEST
