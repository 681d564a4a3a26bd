"""What is done in each step of a job. ``rules`` decides which step comes next."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace as replaced
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.job.common_steps import CommonSteps
from imagewatch.job.earlier import unreadable
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.redelivery import finished_twin
from imagewatch.job.rows import row_of
from imagewatch.job.rules import Step, retry_delay
from imagewatch.job.running import Attempt
from imagewatch.job.sending import Left
from imagewatch.journal.budget import folder_of
from imagewatch.journal.prices import Asked
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.protocol.reasons import Others, Reaction, Reason
from imagewatch.protocol.request import NO_PRESET, build, contents
from imagewatch.protocol.values import Tail
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import BadRequest, NameTakenError, Outdated, Problem, SpoolError, Withdrawn
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config
    from imagewatch.endpoint.api import Verdict
    from imagewatch.job.completion import Completion
    from imagewatch.job.running import RunningJob
    from imagewatch.job.sending import Fate, Sending
    from imagewatch.job.spool import Spool
    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.request import Request
    from imagewatch.protocol.values import Claim

_RELOAD = "reload or restart the daemon if you have just added it"
_RETURN_SECONDS = 5.0
_UNKNOWN_SECONDS = 10.0
"""How often it is asked whether another daemon has written the row of a job again."""
_log = structlog.get_logger()


class Steps:
    """Takes the steps of jobs. Safe to use from several threads, one job in each.

    Args:
        spool: The folders.
        journal: What was recorded, and what may be spent.
        config: Limits, defaults, retries.
        completion: Ends jobs.
        sending: Sends requests.
        not_reported: As of ``Worker``.
        on_paid: Likewise.
        clock: Likewise.
        jitter: Likewise.

    Attributes:
        common: What is done besides if other daemons process the same inbox.
    """

    def __init__(  # noqa: PLR0913  the parts of a worker
        self,
        spool: Spool,
        journal: Journal,
        config: Config,
        completion: Completion,
        sending: Sending,
        *,
        not_reported: Callable[[str], None],
        on_paid: Callable[[str], None],
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._spool = spool
        self._journal = journal
        self._config = config
        self._completion = completion
        self._sending = sending
        self._not_reported = not_reported
        self._on_paid = on_paid
        self._clock = clock
        self._jitter = jitter
        self.common = CommonSteps(spool, journal, sending, config.endpoint.deadline_seconds, clock)
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
        try:
            return self._effects[step](job)
        except NameTakenError:
            if not job.state.returning:
                raise
            return self._await_name(job)

    def without_record(self, job_id: str) -> Outcome:
        """End a job that is over, or that the journal does not know: the journal was lost.

        Raises:
            SpoolError: Its originals are still claimed.
        """
        if not self.common.is_held(job_id):  # another daemon has ended it: it may not know the response that is here
            return self.common.hand_over(job_id)
        if error := unreadable(self._spool, job_id):
            raise error
        orphans = self._spool.orphans(job_id)
        if orphans and not self._journal.is_over(job_id):
            folder = printable(self._spool.claim_folder(job_id))
            raise SpoolError(
                f"job {job_id}: {', '.join(orphans)}: claimed, but the ledger does not know this job; it may have been "
                "charged",
                path=folder,
                hint="restore the ledger from a backup; or, only if you accept a possible second charge, touch the "
                f"files in {folder} and move them back into the inbox",
            )
        record = self._spool.record(job_id)
        if self.common.is_missing(record):
            self.common.report_unknown(job_id, "the job of a saved response is not in the shared database")
            return Outcome(job_id, End.DEFERRED, delay=_UNKNOWN_SECONDS, needs_nothing=True)
        self._spool.forget(record)
        return Outcome(job_id, End.NOTHING)

    # Delivering and forgetting

    def _reclaim(self, job: RunningJob) -> None:
        self._spool.delivery.open_folder(job.claim)
        if answered := job.record.attempts()[1]:  # a prompt without it there counts as not sent if rows are lost
            self.common.share(job.record, answered)
        self._spool.delivery.reclaim(job.claim, job.record)

    def _archive(self, job: RunningJob) -> None:
        decision = job.record.decision()
        assert decision is not None
        self.common.require_held(job.id)
        self._spool.delivery.keep(job.claim, decision)
        job.foresee(claimed=False, originals=False)

    def _forget(self, job: RunningJob) -> Outcome:
        decision = job.record.decision()
        outcome = Outcome(job.id, End.NOTHING, job.claim.source)
        if decision is not None and self.common.is_late(job.record, decision):
            self._spool.forget(job.record, is_unknown=True, is_late=True)
            return self.common.hand_over(job.id)
        if decision is not None:
            outcome = self._completion.outcome(job.claim, decision, self._clock() - job.began)
            # A response from before this call says nothing about now: it ends no hold.
            answered = outcome.answered and job.has_new_response
            outcome = replace(outcome, answered=answered, reason=job.reason)
        elif not job.state.recorded:  # another journal is used meanwhile
            return self.without_record(job.id)
        elif not self._spool.originals.give_back(job.claim):  # only the images: its prompt was taken away
            return self._await_name(job)
        is_kept = outcome.destination == "errors" and outcome.charged == "yes" and job.state.answered > 0
        # Another daemon may still have its response: it is unknown whether it was charged, or what for.
        is_unknown = self.common.is_on and outcome.destination == "errors" and outcome.charged != "no" and not is_kept
        self._spool.forget(job.record, keep=is_kept, is_unknown=is_unknown)
        return outcome

    def _deliver(self, job: RunningJob) -> None:
        decision = job.record.decision()
        assert decision is not None
        try:
            self._spool.delivery.deliver(job.claim, decision, lambda: self.common.require_held(job.id))
            job.record.mark_over()
        except FileExistsError:
            job.record.decide(self._completion.renamed(job.claim, decision))
        else:
            if decision.destination == "outbox":
                job.foresee(over=True)

    def _discard(self, job: RunningJob) -> Outcome:
        self._spool.originals.discard(job.claim)
        self._spool.forget(job.record)
        return Outcome(job.id, End.REDELIVERED, job.claim.source)

    # Before the request

    def valid_request(self, claim: Claim) -> Request | None:
        """Return the request of a prompt without images that is still in the inbox; None if it has to be claimed first.

        It has to be if it is not valid, if its files were requested before, or if a bug occurs: then it is over soon.
        """
        folder, most = self._spool.inbox_folder(claim), self._config.limits.max_input_bytes
        where = functools.partial(open_file, tops=self._spool.tops)
        with contextlib.suppress(Exception), self._spool.reached(folder):  # whatever it is, it is found again
            if self._config.inbox.redelivery == "skip" and finished_twin(
                self._journal.ledger, claim, folder, most, where
            ):
                return None
            request = build(claim, folder, self._config, where)
            return None if self._never_fits(claim, request) else request
        return None

    def claim(self, job: RunningJob) -> bool:
        """Claim a fresh job after all, as it cannot be sent now; return False if its prompt is not there any more."""
        job.record.begin(job.claim)
        job.is_fresh, job.is_foreseen = False, False
        return self._spool.originals.claim(job.claim)

    def _claim_spent(self, job: RunningJob) -> None:
        """Claim a fresh job whose attempt is recorded.

        Raises:
            Withdrawn: It is not the prompt any more that was read.
        """
        claim, request = job.claim, job.request
        assert request is not None
        job.is_fresh = False  # whatever happens now: it is not sent a second time
        if not self._spool.originals.claim(claim):
            raise Withdrawn("the prompt was removed before it was sent")
        job.hold_claim()
        folder, where = self._spool.claim_folder(claim.job), functools.partial(open_file, tops=self._spool.tops)
        with disk_errors(folder, "read"):  # else it would be an error of the network
            found = contents(folder, (claim.prompt,), MAX_BYTES, where)
            is_same = found == request.contents and self._spool.originals.matches_scan(claim)
        if not is_same:
            raise Withdrawn("the prompt was changed before it was sent")

    def _gather(self, job: RunningJob) -> None:
        self._spool.originals.gather(job.claim)

    def _check(self, job: RunningJob) -> Outcome | None:
        claim = job.claim
        # One that was sent was valid before; it only continues.
        if not job.state.sent and not self._spool.originals.matches_scan(claim):
            return self._give_back(job)
        folder, most = self._spool.claim_folder(claim.job), self._config.limits.max_input_bytes
        where = functools.partial(open_file, tops=self._spool.tops)
        skip = self._config.inbox.redelivery == "skip"
        if skip and (twin := finished_twin(self._journal.ledger, claim, folder, most, where)):
            self._end_as_twin(job, twin, lambda: contents(folder, claim.originals, most, where))
            return None
        try:
            job.request = build(claim, folder, self._config, where)
            self._require_payable(job)
        except Outdated:
            return self._give_back(job)
        except BadRequest as error:
            self._completion.invalid(job, _for_daemon(error.problems), contents(folder, claim.originals, most, where))
        else:
            job.foresee()
        return None

    def _end_as_twin(self, job: RunningJob, twin: str, read: Callable[[], dict[str, str]]) -> None:
        """End a job whose files are those of a finished job, its twin: without a result file, or with an error file.

        It gets an error file if the twin has no result file, or if imagewatch itself has set the mtime of the prompt: a
        person has probably put that one there.
        """
        claim, is_lost = job.claim, self._journal.ledger.is_lost(twin)
        if not (is_lost or self._journal.ledger.was_placed(claim.mtime_ns)):
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
        if not job.state.sent and (problem := self._never_fits(job.claim, job.request)):
            raise BadRequest([problem])

    def _never_fits(self, claim: Claim, request: Request) -> Problem | None:
        """Return the cap or budget that is so low that a request could never be sent, or None."""
        return self._journal.budget().never(Asked.of(request.fields), folder_of(claim.source))

    def _send(self, job: RunningJob) -> Outcome | None:
        if job.state.answered:
            self._completion.busy(job)
            if not job.is_resumed:
                return self._defer(job, None if job.lacks_response(job.state.sent) else job.verdict())
        if not job.may_send:
            return self._defer(job) if job.state.sent else self._give_back(job)
        assert job.request is not None
        number, nonce = job.record.next_attempt()
        sent = self._sending.mark(job.request)
        row = row_of(job, Attempt(number, sent, nonce=nonce), "sent", "unknown")
        # The journal is asked again when the row is written; this saves a connection.
        if reason := self._journal.refusal(row, Asked.of(job.request.fields), skip_repeated=False):
            return self._not_admitted(job, reason)
        job.is_resumed = False
        on_spent = functools.partial(self._claim_spent, job) if job.is_fresh else lambda: None
        if self.common.is_on:
            on_spent = functools.partial(self.common.testify, job, number, nonce)
        return self._after(job, self._sending.send(job.record, job.claim, job.request, sent, row, on_spent))

    def _not_admitted(self, job: RunningJob, reason: Reason) -> Outcome:
        """End or defer a job that may not be sent: for a short wait it stays claimed, else it goes back."""
        job.reason = reason
        if not reason.is_short or (job.is_fresh and not self.claim(job)):
            return self._give_back(job)
        if reason.kind == "reserved":  # jobs that have reserved more together than fits would wait for each other
            self._journal.unreserve(job.id)
        return Outcome(job.id, End.DEFERRED, job.claim.source, delay=reason.seconds or 0.0, reason=reason)

    # After the request

    def _after(self, job: RunningJob, fate: Fate) -> Outcome | None:
        """Continue from what happened to a request, as far as the disk accepts it."""
        job.reason = fate.reason or job.reason
        if fate.is_saved:
            self.common.share(job.record, fate.attempt)
            job.foresee(recorded=True, sent=fate.attempt, answered=fate.attempt, claimed=True, originals=True)
        elif fate.left is Left.PART:
            _log.warning("not_sent", reason=fate.message, attempt=fate.attempt)
            self._sending.prove(job.record, fate)
            self.common.share(job.record, fate.attempt)
        elif fate.left is Left.NOTHING:
            if fate.reason is None:
                _log.info("withdrawn", reason=fate.message)
            if fate.reason and fate.reason.error and not fate.reason.error.code:
                raise fate.reason.error  # the journal refuses this attempt in any case
            job.record.take_back(fate.attempt, fate.row.nonce)
            self._sending.forget(job.id)
            if fate.reason is not None and fate.reason.row.is_own:
                return self._not_admitted(job, fate.reason)
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
        if fate is None and (delay := self.common.wait_for(job.id, job.state.sent)):
            return Outcome(job.id, End.DEFERRED, job.claim.source, delay=delay, needs_nothing=True)
        if fate and fate.left is not Left.WHOLE:  # the disk did not accept it at first
            return self._after(job, fate)
        attempt = job.record.attempt(job.state.sent)
        was_charged = attempt is not None and attempt.outcome == "completed"  # and its response was removed
        known = job.unknown_reason or (fate.message if fate else "")
        message = known or "imagewatch ended after the request was sent and before the response was complete"
        self._completion.unknown(job, message, is_charged=was_charged or (fate is not None and fate.is_charged))
        return None

    def _read(self, job: RunningJob) -> None:
        self._on_paid(job.id)
        self._spool.delivery.expect(job.id)
        self._completion.read(job)
        if decision := job.record.decision():
            job.foresee(decided=decision.destination, returning=False)

    def _refuse(self, job: RunningJob) -> None:
        verdict = job.verdict()
        if verdict.reason.row.others is Others.PAUSE and job.has_new_response:
            # Its attempts are spent, but the time that the API asked for counts for the others.
            job.reason = replaced(verdict.reason, seconds=self._delay(job, verdict))
        try:
            self._completion.refuse(job, verdict)
        except SpoolError:  # it will go back to the inbox, and no error file reports the refusal
            if self._journal.account.concerns(verdict.reason.kind):
                self._journal.account.not_reported(verdict.reason.kind)
            elif verdict.reaction is Reaction.ACCOUNT:
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
            job.record.made(),
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
        self._spool.forget(job.record)
        return Outcome(job.id, End.RETURNED, job.claim.source, reason=job.reason)

    def _await_name(self, job: RunningJob) -> Outcome:
        """Wait until a newer file of the same name has left the inbox, or its job is over."""
        job.record.await_name()
        return Outcome(
            job.id, End.DEFERRED, job.claim.source, delay=_RETURN_SECONDS, reason=job.reason, awaits_name=True
        )


def _for_daemon(problems: list[Problem]) -> list[Problem]:
    """Return problems with a hint for what a command, which reads the configuration itself, would not find."""
    return [
        replaced(one, hint=f"{one.hint}; {_RELOAD}") if one.reason.startswith(NO_PRESET) else one for one in problems
    ]
