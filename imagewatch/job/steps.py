"""What is done in each step of a job. ``rules`` decides which step comes next."""

from __future__ import annotations

import functools
from dataclasses import replace as replaced
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.job.outcome import End, Outcome
from imagewatch.job.redelivery import finished_twin
from imagewatch.job.rules import Step, retry_delay
from imagewatch.job.running import Attempt
from imagewatch.job.sending import Left
from imagewatch.journal.prices import Asked
from imagewatch.protocol.reasons import Others, Reaction, Reason
from imagewatch.protocol.request import build, contents
from imagewatch.protocol.values import Tail
from imagewatch.system.errors import BadRequest, Outdated, Problem, SpoolError
from imagewatch.system.text import printable, utc
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config
    from imagewatch.endpoint.api import Verdict
    from imagewatch.job.completion import Completion
    from imagewatch.job.running import RunningJob
    from imagewatch.job.sending import Fate, Sending
    from imagewatch.job.spool import Spool
    from imagewatch.journal.budget import Budget
    from imagewatch.journal.ledger import Ledger

_RETURN_SECONDS = 5.0
_log = structlog.get_logger()


class Steps:
    """Takes the steps of jobs. Safe to use from several threads, one job in each.

    Args:
        spool: The folders.
        ledger: The ledger.
        config: Limits, defaults, retries.
        budget: What may be spent.
        completion: Ends jobs.
        sending: Sends requests.
        not_reported: As of ``Worker``.
        on_paid: Likewise.
        clock: Likewise.
        jitter: Likewise.
    """

    def __init__(  # noqa: PLR0913  the parts of a worker
        self,
        spool: Spool,
        ledger: Ledger,
        config: Config,
        budget: Budget,
        completion: Completion,
        sending: Sending,
        *,
        not_reported: Callable[[str], None],
        on_paid: Callable[[str], None],
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._spool = spool
        self._ledger = ledger
        self._config = config
        self._budget = budget
        self._completion = completion
        self._sending = sending
        self._not_reported = not_reported
        self._on_paid = on_paid
        self._clock = clock
        self._jitter = jitter
        self._effects: dict[Step, Callable[[RunningJob], Outcome | None]] = {
            Step.RECLAIM: self._reclaim,
            Step.ARCHIVE: self._archive,
            Step.FORGET: self._forget,
            Step.PUBLISH: self._deliver,
            Step.REJECT: self._deliver,
            Step.DISCARD: self._discard,
            Step.SAVE: self._save,
            Step.UNKNOWN: self._unknown,
            Step.READ: self._read,
            Step.GIVE_BACK: self._give_back,
            Step.REFUSE: self._refuse,
            Step.GATHER: self._gather,
            Step.CHECK: self._check,
            Step.SEND: self._send,
        }

    def take(self, step: Step, job: RunningJob) -> Outcome | None:
        """Take a step; return the outcome if the job ends or waits."""
        return self._effects[step](job)

    def without_record(self, job_id: str) -> Outcome:
        """End a job without a record: its end was interrupted, or its state folder was lost.

        Raises:
            SpoolError: Its originals are still claimed.
        """
        orphans = self._spool.orphans(job_id)
        if orphans:
            folder = printable(self._spool.claim_folder(job_id))
            raise SpoolError(
                f"job {job_id}: {', '.join(orphans)}: claimed, but the job record is missing{self._known(job_id)}",
                path=folder,
                hint="restore the state folder from a backup; or, only if you accept a possible second charge, touch "
                f"the files in {folder} and move them back into the inbox",
            )
        self._spool.forget(job_id)
        self._budget.end_reservation(job_id)  # its row is older than the removal of its record
        return Outcome(job_id, End.NOTHING)

    def _known(self, job_id: str) -> str:
        """Return what the ledger holds of a job without a record, for its error."""
        row = self._ledger.job(job_id)
        if row is None or not row["sent_at"]:
            return ""
        sent = utc(row["sent_at"]).isoformat(timespec="seconds")
        return f"; in the ledger: {printable(row['source'])}, sent {sent}, charged: {row['charged']}"

    # Delivering and forgetting

    def _reclaim(self, job: RunningJob) -> None:
        self._spool.delivery.reclaim(job.claim)

    def _archive(self, job: RunningJob) -> None:
        decision = job.record.decision()
        assert decision is not None
        self._spool.delivery.keep(job.claim, decision)
        job.foresee(claimed=False, originals=False)

    def _forget(self, job: RunningJob) -> Outcome:
        decision = job.record.decision()
        outcome = Outcome(job.id, End.NOTHING, job.claim.source)
        if decision is not None:
            outcome = self._completion.outcome(job.claim, decision, self._clock() - job.began)
            # A response from before this call says nothing about now: it ends no hold.
            answered = outcome.answered and job.has_new_response
            outcome = replace(outcome, answered=answered, reason=job.reason)
        elif not job.state.recorded:  # removed meanwhile, and with it what it held about a payment
            return self.without_record(job.id)
        elif not self._spool.originals.give_back(job.claim):  # only the images: its prompt was taken away
            return self._await_name(job)
        is_kept = outcome.destination == "errors" and outcome.charged == "yes" and job.state.answered > 0
        self._let_go(job.id, keep=is_kept)
        return outcome

    def _deliver(self, job: RunningJob) -> None:
        decision = job.record.decision()
        assert decision is not None
        try:
            self._spool.delivery.deliver(job.claim, decision)
        except FileExistsError:
            job.record.decide(self._completion.renamed(job.claim, decision))
        else:
            if decision.destination == "outbox":
                job.foresee(over=True)

    def _discard(self, job: RunningJob) -> Outcome:
        self._spool.originals.discard(job.claim)
        self._let_go(job.id)
        return Outcome(job.id, End.REDELIVERED, job.claim.source)

    def _let_go(self, job_id: str, *, keep: bool = False) -> None:
        """Forget a job that is over or was given back; its row of a request that was not sent is removed."""
        self._ledger.withdraw(job_id)
        self._spool.forget(job_id, keep=keep)

    # Before the request

    def _gather(self, job: RunningJob) -> None:
        self._spool.originals.gather(job.claim)

    def _check(self, job: RunningJob) -> Outcome | None:
        claim = job.claim
        # One that has a row was valid before; it only continues.
        if not self._spool.originals.matches_scan(claim) and not self._ledger.job(claim.job):
            return self._give_back(job)
        folder, most = self._spool.claim_folder(claim.job), self._config.limits.max_input_bytes
        where = functools.partial(open_file, tops=self._spool.tops)
        skip = self._config.inbox.redelivery == "skip"
        if skip and (twin := finished_twin(self._ledger, claim, folder, most, where)):
            self._end_as_twin(job, twin, lambda: contents(folder, claim.originals, most, where))
            return None
        try:
            job.request = build(claim, folder, self._config, where)
            self._require_payable(job)
        except Outdated:
            return self._give_back(job)
        except BadRequest as error:
            self._completion.invalid(job, error.problems, contents(folder, claim.originals, most, where))
        else:
            job.foresee()
        return None

    def _end_as_twin(self, job: RunningJob, twin: str, read: Callable[[], dict[str, str]]) -> None:
        """End a job whose files are those of a finished job, its twin: without a result file, or with an error file.

        It gets an error file if the twin has no result file, or if imagewatch itself has set the mtime of the prompt: a
        person has probably put that one there.
        """
        claim, is_lost = job.claim, self._ledger.is_lost(twin)
        if not (is_lost or self._ledger.was_placed(claim.mtime_ns)):
            self._completion.redelivered(job, twin)
            return
        reason = f"this file was requested before, as job {twin}; nothing was sent"
        problem = Problem(printable(claim.prompt), reason, "save the prompt again to request another image")
        # If the twin has no result file, the hashes are stored: the next copy is a redelivery of this job, and skipped.
        # Otherwise none are stored: the next copy is again compared with the twin, and gets an error file, too.
        self._completion.invalid(job, [problem], read() if is_lost else {}, "repeated")

    def _require_payable(self, job: RunningJob) -> None:
        """Make sure that no cap is so low that this request could never be sent.

        One that was sent before was below every cap then; it goes back to the inbox, and is checked as a new one.

        Raises:
            BadRequest: One is.
        """
        assert job.request is not None
        if not job.state.sent and (problem := self._budget.never(Asked.of(job.request.fields))):
            raise BadRequest([problem])

    def _send(self, job: RunningJob) -> Outcome | None:
        if job.state.answered:
            self._completion.busy(job)
            if not job.is_resumed:
                return self._defer(job, job.verdict())
        if not job.may_send:
            return self._defer(job) if job.state.sent else self._give_back(job)
        assert job.request is not None
        reason = self._budget.reserve(job.id, Asked.of(job.request.fields))
        if reason is not None:
            return self._unaffordable(job, reason)
        job.is_resumed = False
        number, sent = job.state.sent + 1, self._sending.mark(job.request)
        # What cannot be recorded must not be paid; this touches the same pages as the row with the result will.
        self._completion.begin(job, Attempt(number, replace(sent, at=self._clock())))
        return self._after(job, self._sending.send(job.record, job.claim, job.request, sent, number))

    def _unaffordable(self, job: RunningJob, reason: Reason) -> Outcome:
        """End or defer a job that a limit forbids: for a short wait it stays claimed, else it goes back."""
        job.reason = reason
        if not reason.row.is_short:
            return self._give_back(job)
        return Outcome(job.id, End.DEFERRED, job.claim.source, delay=reason.seconds or 0.0, reason=reason)

    # After the request

    def _after(self, job: RunningJob, fate: Fate) -> Outcome | None:
        """Continue from what happened to a request, as far as the disk accepts it."""
        job.reason = fate.reason or job.reason
        if fate.is_saved:
            job.foresee(sent=fate.attempt, answered=fate.attempt)
        elif fate.left is Left.PART:
            _log.warning("not_sent", reason=fate.message, attempt=fate.attempt)
            self._sending.prove(job.record, fate)
        elif fate.left is Left.NOTHING:
            if fate.reason is None:
                _log.info("withdrawn", reason=fate.message)
            job.record.take_back(fate.attempt)
            self._ledger.withdraw(job.id)
            self._sending.forget(job.id)
            if job.state.answered and fate.reason is None:  # behind a hold it stays claimed: its attempts count
                return self._defer(job)
            return self._give_back(job)
        return None

    def _save(self, job: RunningJob) -> None:
        fate = self._sending.known(job.id, job.state.sent)
        reason = (fate.message if fate else "") or "imagewatch ended while the response arrived"
        job.record.save_partial(job.state.sent, Tail(complete=False, reason=reason, at=self._clock()))

    def _unknown(self, job: RunningJob) -> Outcome | None:
        fate = self._sending.known(job.id, job.state.sent)
        if fate and fate.left is not Left.WHOLE:  # the disk did not accept it at first
            return self._after(job, fate)
        known = job.unknown_reason or (fate.message if fate else "")
        message = known or "imagewatch ended after the request was sent and before the response was complete"
        self._completion.unknown(job, message, is_charged=fate is not None and fate.is_charged)
        return None

    def _read(self, job: RunningJob) -> None:
        self._on_paid(job.id)
        self._completion.read(job)
        if decision := job.record.decision():
            job.foresee(decided=decision.destination)

    def _refuse(self, job: RunningJob) -> None:
        verdict = job.verdict()
        if verdict.reason.row.others is Others.PAUSE and job.has_new_response:
            # Its attempts are spent, but the time that the API asked for counts for the others.
            job.reason = replaced(verdict.reason, seconds=self._delay(job, verdict))
        try:
            self._completion.refuse(job, verdict)
        except SpoolError:  # it will go back to the inbox, and no error file reports the refusal
            if verdict.reaction is Reaction.ACCOUNT:
                self._not_reported(verdict.reason.kind)
            raise

    def _defer(self, job: RunningJob, verdict: Verdict | None = None) -> Outcome:
        """Wait until the API may accept the same request, or without a verdict until the hold has ended."""
        if verdict is None:
            return Outcome(job.id, End.DEFERRED, job.claim.source)
        delay = self._delay(job, verdict)
        reason = replaced(verdict.reason, seconds=delay)
        return Outcome(job.id, End.DEFERRED, job.claim.source, delay=delay, reason=reason)

    def _delay(self, job: RunningJob, verdict: Verdict) -> float:
        retry = self._config.retry
        return retry_delay(
            job.state.answered,
            initial=retry.initial_seconds,
            longest=retry.max_seconds,
            retry_after=verdict.reason.seconds,
            jitter=self._jitter(),
        )

    def _give_back(self, job: RunningJob) -> Outcome:
        if job.state.answered:
            self._completion.busy(job)
        if not self._spool.originals.give_back(job.claim):
            return self._await_name(job)
        self._let_go(job.id)
        return Outcome(job.id, End.RETURNED, job.claim.source, reason=job.reason)

    def _await_name(self, job: RunningJob) -> Outcome:
        """Wait until a newer file of the same name has left the inbox."""
        return Outcome(
            job.id, End.DEFERRED, job.claim.source, delay=_RETURN_SECONDS, reason=job.reason, awaits_name=True
        )
