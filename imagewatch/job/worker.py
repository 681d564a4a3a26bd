"""Carries jobs to their end, from whatever state the disk shows.

``process`` asks the disk, gets the step from ``rules``, takes it, and asks again. A step that succeeds may set what the
disk shows now (tests check that it is true). Recovery is the same function, called for every unfinished job.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.endpoint.pictures import Pictures
from imagewatch.job.completion import Completion
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.rules import State, Step, next_step
from imagewatch.job.running import RunningJob
from imagewatch.job.sending import Sending
from imagewatch.job.steps import Steps
from imagewatch.protocol.reasons import Reaction, Reason, failure
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import LostJobError, Problem, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.config.schema import Config
    from imagewatch.endpoint.client import Client
    from imagewatch.job.sending import Fate
    from imagewatch.job.spool import Spool
    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.values import Claim

_MOST_STEPS = 60
_log = structlog.get_logger()


class Worker:
    """Carries jobs to their end. Safe to use from several threads, one job in each.

    Args:
        spool: The folders.
        client: The endpoint.
        journal: What was recorded, and what may be spent.
        config: Limits, defaults, retries.
        may_report: Called with the kind of an account-level refusal: may this job report it in ``errors``? The first
            one may, the others go back to the inbox.
        not_reported: Called with the kind when that job could not report it, as the disk failed: the next one may.
        on_paid: Called with the id of a job whose response is on the disk: what is left of it needs no request.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        jitter: Random numbers from 0 to 1.
        wait: Waits some seconds between two tries to fetch an image.
        fates: What is known of requests beside what the disk shows; the caller keeps it across a change of the
            configuration.
        leaving: In it the first bytes of a request leave; raises ``Withdrawn`` when it is entered if none may.
        on_disk_error: Called when the disk refuses a part of a response, which then waits.
    """

    def __init__(  # noqa: PLR0913  the parts, and what a test replaces
        self,
        spool: Spool,
        client: Client,
        journal: Journal,
        config: Config,
        *,
        may_report: Callable[[str], bool] = lambda _: True,
        not_reported: Callable[[str], None] = lambda _: None,
        on_paid: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: 0.5,
        wait: Callable[[float], object] | None = None,
        fates: dict[str, Fate] | None = None,
        leaving: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        on_disk_error: Callable[[SpoolError], object] = lambda _: None,
    ) -> None:
        self._spool = spool
        self._journal = journal
        self._config = config
        self._may_report = may_report
        self._clock = clock
        wait = wait or threading.Event().wait
        pictures = Pictures(spool.disk, client, config.endpoint.max_response_bytes, monotonic=monotonic, wait=wait)
        self._completion = Completion(spool, pictures, clock)
        self._sending = Sending(client, config, {} if fates is None else fates, leaving, on_disk_error, clock)
        parts = spool, journal, config, self._completion, self._sending
        self._steps = Steps(*parts, not_reported=not_reported, on_paid=on_paid, clock=clock, jitter=jitter)

    def start(self, claim: Claim) -> Outcome:
        """Claim a prompt and carry it to its end."""
        claim = replace(claim, owner=self._spool.originals.owner(claim))
        record = self._spool.record(claim.job)
        self._spool.require_claims()
        # With images it is claimed first: its request is read while it is sent, and no other user may change it then.
        is_common = self._steps.common.is_on
        request = None if claim.images or is_common else self._steps.valid_request(claim)
        job = RunningJob(record, claim, request=request, is_fresh=request is not None, began=self._clock())
        if job.is_fresh:
            record.expect(claim)
            job.foresee()
            return self._carry(job)
        try:
            (record.take if is_common else record.begin)(claim)
        except SpoolError as error:  # its prompt is where it was
            return Outcome(claim.job, End.NOTHING, claim.source, reason=failure(error))
        if not self._spool.originals.claim(claim):
            if is_common and self._spool.handover.holds(claim.job):  # the database has lost that it was claimed
                return self.process(claim.job)
            self._spool.forget(record)
            return Outcome(claim.job, End.NOTHING, claim.source)
        if not claim.images:  # some of them may have been missing
            job.foresee(recorded=True, claimed=True, originals=True)
        return self._carry(job)

    def process(self, job_id: str, *, is_resumed: bool = False, may_send: bool = True) -> Outcome:
        """Carry a job to its end, or to where it has to wait.

        Args:
            job_id: Its id.
            is_resumed: Whether the wait that an earlier call asked for is over.
            may_send: Whether a request may be sent; if not, a job that needs one waits, or goes back to the inbox.

        Raises:
            SpoolError: The local disk failed; its files stay, and another call continues from them.
        """
        common = self._steps.common
        if not common.is_held(job_id):
            return common.hand_over(job_id)
        record = self._spool.record(job_id)
        if common.is_on:
            try:
                self._spool.handover.fence(job_id)
            except LostJobError:
                return common.hand_over(job_id)
            self._spool.handover.fetch(record)
        claim = record.claim()
        if claim is None and self._journal.is_over(job_id):
            return self._steps.without_record(job_id)
        if claim is None and (fate := self._sending.known(job_id)) and fate.is_missing(0):
            claim = fate.claim  # another journal is used since its request was sent
        if claim is None and (claim := self._journal.unspent(job_id)):
            record.begin(claim)  # another journal is used since it was claimed
        if claim is None:
            return self._steps.without_record(job_id)
        self._spool.make_durable(claim)
        common.restore_witnessed(record, claim)
        earlier = record.attempts()[1]
        job = RunningJob(record, claim, is_resumed=is_resumed, may_send=may_send, earlier=earlier, began=self._clock())
        return self._carry(job)

    def tidy(self, is_ending: Callable[[], bool] = lambda: False) -> None:
        """Find claim folders that no job of a common inbox has; see ``CommonSteps.tidy``.

        Raises:
            SpoolError: The disk failed.
        """
        self._steps.common.tidy(is_ending)

    def _carry(self, job: RunningJob) -> Outcome:
        names = structlog.contextvars.bound_contextvars(job=job.id, source=job.claim.source)
        with names, self._spool.working_on(job.id) as job.hold_claim:
            try:
                outcome = self._take_steps(job)
            except LostJobError:
                outcome = self._steps.common.lost(job)
            except (SpoolError, FileExistsError):
                if not self._steps.common.has_lost(job.id):
                    raise
                outcome = self._steps.common.lost(job)  # another daemon has moved its folder
            finally:
                self._spool.delivery.expect_no_more(job.id)
        if outcome.end is not End.DEFERRED:
            self._sending.forget(job.id)
        return outcome

    def _take_steps(self, job: RunningJob) -> Outcome:
        for _ in range(_MOST_STEPS):
            with _local_disk():
                self._read_state(job)
            step = next_step(job.state)
            _log.debug("step", step=step.name.lower())
            if step is Step.DONE:
                break
            try:
                with _local_disk():
                    outcome = self._steps.take(step, job)
            except (SpoolError, FileExistsError):
                raise
            except Exception as error:  # noqa: BLE001  a bug in one job must not stop the others
                _log.exception("internal_error", next="report this as a bug")
                self._end_by_bug(job, error)
                outcome = None
            if outcome is not None:
                return outcome
        raise SpoolError(f"job {job.id}: no progress", hint="please report it; it is tried again at the next start")

    def _read_state(self, job: RunningJob) -> None:
        """Find out what the disk shows; it is asked unless the last step has just set it."""
        fate = self._sending.known(job.id)
        if not job.is_foreseen:
            job.shown = self._spool.job_state(job.claim, job.record)
            if fate and (row := job.record.attempt(fate.attempt)) and row.nonce != fate.row.nonce:
                self._sending.forget(job.id)  # another process has sent the attempt of this number
                fate = None
            if fate and not job.shown.decided and fate.is_missing(job.shown.sent):
                job.record.restore(fate.claim, fate.row)
                job.shown = self._spool.job_state(job.claim, job.record)
        if job.shown.decided and not (fate and self._steps.common.is_news(fate)):
            self._sending.forget(job.id)
        job.is_foreseen = False
        job.state = self._state(job, job.shown)

    def _state(self, job: RunningJob, shown: State) -> State:
        """Return what the disk shows, with what this process knows."""
        reaction, has_attempts = None, job.record.made() < self._config.retry.attempts
        if shown.answered and shown.answered == shown.sent and not shown.decided:
            if job.lacks_response(shown.sent):  # what it said is not known, but it was free
                reaction = Reaction.RETRY if has_attempts else Reaction.WAIT
            else:
                verdict = job.verdict(shown.answered)
                reaction = verdict.reaction
                if reaction is Reaction.ACCOUNT:
                    shown = replace(shown, reports=self._reports(job, verdict.reason, shown.answered))
        return replace(
            shown,
            reaction=reaction,
            checked=job.request is not None,
            fresh=job.is_fresh,
            attempts_left=has_attempts,
        )

    def _reports(self, job: RunningJob, reason: Reason, answered: int) -> bool:
        """Return whether a job shows a refusal of the account or the URL in ``errors``; the others go back."""
        if answered <= job.earlier:
            return False
        is_first, job.reason = job.reason is None, reason
        if not is_first:
            return False
        if self._journal.account.concerns(reason.kind):  # one job of all daemons of the account shows it
            return self._journal.account.refused(reason, job.id)
        return self._may_report(reason.kind)

    def _end_by_bug(self, job: RunningJob, error: Exception) -> None:
        """End a job in which a bug occurred, if nothing was paid for it; else keep its record for the next start."""
        bug = f"{type(error).__name__}: {error}"
        if job.record.attempts()[0] > job.state.sent:
            # While it was sent: what is on the disk now decides how the job continues.
            job.unknown_reason = f"a bug in imagewatch occurred while the request was in flight: {bug}"
            job.is_fresh = False
            self._spool.originals.take_again(job.claim)
            return
        if job.state.sent or job.state.decided:
            raise SpoolError(
                f"job {job.id}: stopped by a bug in imagewatch: {bug}",
                hint="its record is kept in the state folder; it is retried at the next start",
            ) from error
        if job.is_fresh and not self._steps.claim(job):
            return
        problem = Problem("imagewatch", f"a bug: {bug}", "please report it")
        self._completion.invalid(job, [problem], {})


@contextlib.contextmanager
def _local_disk() -> Iterator[None]:
    """Report what cannot be read as a failure of the disk, and not as a bug; that a name exists is a result."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        with disk_errors(str(error.filename), "read"):
            raise
