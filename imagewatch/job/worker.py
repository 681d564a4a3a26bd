"""One job, from wherever the disk says it is to its end.

``process`` asks the disk, asks ``lifecycle`` for the step, takes it, and asks again; a step that succeeds may answer
for the disk (tests ask both). Recovery is not a second path: it is ``process`` for every job that has left something.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.endpoint.api import Verdict, classify
from imagewatch.endpoint.pictures import Pictures
from imagewatch.job.completion import Case, Closing
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.redelivery import finished_twin
from imagewatch.job.rules import Evidence, Step, next_step, retry_delay
from imagewatch.job.sending import Left, Sending
from imagewatch.journal.budget import Budget
from imagewatch.journal.prices import Asked
from imagewatch.protocol.reasons import Others, Reaction, Reason
from imagewatch.protocol.request import Request, build, contents
from imagewatch.protocol.values import Claim, Tail
from imagewatch.system.disk_errors import ours
from imagewatch.system.errors import BadRequest, Outdated, Problem, SpoolError
from imagewatch.system.text import printable, utc
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.config.load import Config
    from imagewatch.endpoint.client import Client
    from imagewatch.job.record import Record
    from imagewatch.job.sending import Fate
    from imagewatch.job.spool import Spool
    from imagewatch.journal.ledger import Ledger

_MOST_STEPS = 60
_RETURN_SECONDS = 5.0
_log = structlog.get_logger()


@dataclass
class Run:
    """What this process knows of a job beside what the disk shows.

    Attributes:
        record: Its evidence.
        claim: What was claimed.
        seen: What the disk shows.
        foreseen: Whether the last step said what the disk shows now.
        evidence: What follows from that.
        request: The valid request, once checked.
        resumed: Whether the wait before another attempt is over.
        may_send: Whether a request may go out.
        stale: Number of the newest answer from before: what it says of the account may be long over.
        reason: What stopped it.
        doubt: Why the outcome of a request is not known.
        began: Wall-clock time at which it was taken up, seconds since the epoch.
    """

    record: Record
    claim: Claim
    seen: Evidence = field(default_factory=Evidence)
    foreseen: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    request: Request | None = None
    resumed: bool = False
    may_send: bool = True
    stale: int = 0
    reason: Reason | None = None
    doubt: str = ""
    began: float = 0.0

    def foresee(self, **changes: object) -> None:
        """Say what the disk shows now that a step has succeeded, so that nobody has to ask it."""
        self.seen, self.foreseen = replace(self.seen, **changes), True


class Worker:
    """Carries jobs to their end. Safe to use from several threads, one job in each.

    Args:
        spool: The folders.
        client: The endpoint.
        ledger: The ledger.
        config: Limits, defaults, retries.
        may_report: Called with the kind of an account-level refusal: may this job report it in ``errors``? The first
            one may, the others go back to the inbox.
        not_reported: Called with the kind when that job could not report it, as the disk failed: the next one may.
        on_paid: Called with the id of a job whose answer is on our disk: what is left of it needs no request.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        jitter: Random numbers from 0 to 1.
        wait: Waits some seconds between two tries to fetch a picture.
        budget: What may be spent; given by whoever keeps it across a change of the configuration.
        fates: What is known of requests beside what the disk shows; kept in the same way.
        leaving: In it the first bytes of a request leave; raises ``Withdrawn`` when it is entered if none may.
        on_trouble: Called when our disk refuses a part of an answer, which is then waited for.
    """

    def __init__(  # noqa: PLR0913  the parts, and what a test replaces
        self,
        spool: Spool,
        client: Client,
        ledger: Ledger,
        config: Config,
        *,
        may_report: Callable[[str], bool] = lambda _: True,
        not_reported: Callable[[str], None] = lambda _: None,
        on_paid: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: 0.5,
        wait: Callable[[float], object] | None = None,
        budget: Budget | None = None,
        fates: dict[str, Fate] | None = None,
        leaving: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        on_trouble: Callable[[SpoolError], object] = lambda _: None,
    ) -> None:
        self._spool = spool
        self._client = client
        self._ledger = ledger
        self._config = config
        self._budget = budget or Budget(ledger, config.limits, clock)
        self._may_report = may_report
        self._not_reported = not_reported
        self._on_paid = on_paid
        self._clock = clock
        self._jitter = jitter
        wait = wait or threading.Event().wait
        pictures = Pictures(spool.disk, client, config.endpoint.max_response_bytes, monotonic=monotonic, wait=wait)
        self._closing = Closing(spool, pictures, ledger, clock)
        self._sending = Sending(client, config, {} if fates is None else fates, leaving, on_trouble, clock)
        self._effects = self._table()

    def _table(self) -> dict[Step, Callable[[Run], Outcome | None]]:
        return {
            Step.RECLAIM: self._reclaim,
            Step.ARCHIVE: self._archive,
            Step.FORGET: self._forget,
            Step.PUBLISH: self._deliver,
            Step.REJECT: self._deliver,
            Step.DISCARD: self._discard,
            Step.BANK: self._bank,
            Step.DOUBT: self._doubt,
            Step.READ: self._read,
            Step.GIVE_BACK: self._give_back,
            Step.REFUSE: self._refuse,
            Step.GATHER: self._gather,
            Step.CHECK: self._check,
            Step.SEND: self._send,
        }

    def start(self, claim: Claim) -> Outcome:
        """Claim a prompt and carry it to its end."""
        claim = replace(claim, owner=self._spool.owner(claim))
        if not self._spool.claim(claim):
            self._spool.forget(claim.job)
            self._budget.settle(claim.job)
            return Outcome(claim.job, End.NOTHING, claim.source)
        run = Run(self._spool.record(claim.job), claim, began=self._clock())
        if not claim.images:  # of which some may have been gone
            run.foresee(recorded=True, claimed=True, originals=True)
        return self._carry(run)

    def process(self, job: str, *, resumed: bool = False, may_send: bool = True) -> Outcome:
        """Carry a job to its end, or to where it has to wait.

        Args:
            job: Its id.
            resumed: Whether the wait that an earlier call asked for is over.
            may_send: Whether a request may go out; if not, a job that needs one waits, or goes back to the inbox.

        Raises:
            SpoolError: Our own disk failed; what is there stays, and another call goes on from it.
        """
        record = self._spool.record(job)
        claim = record.claim()
        if claim is None and (fate := self._sending.known(job)) and fate.is_missing(0):
            claim = fate.claim  # its record was removed while its request was on its way
        if claim is None:
            return self._without_record(job)
        self._spool.settle(claim)
        stale = record.attempts()[1]
        run = Run(record, claim, resumed=resumed, may_send=may_send, stale=stale, began=self._clock())
        return self._carry(run)

    def _carry(self, run: Run) -> Outcome:
        said = structlog.contextvars.bound_contextvars(job=run.claim.job, source=run.claim.source)
        with said, self._spool.working_on(run.claim.job):
            outcome = self._steps(run)
        # Not when our disk failed: then the ledger may not have the row yet.
        self._budget.settle(run.claim.job)
        if outcome.end is not End.LATER:
            self._sending.settle(run.claim.job)
        return outcome

    def _steps(self, run: Run) -> Outcome:
        for _ in range(_MOST_STEPS):
            with _our_disk():
                self._look(run)
            step = next_step(run.evidence)
            _log.debug("step", step=step.name.lower())
            if step is Step.DONE:
                break
            try:
                with _our_disk():
                    outcome = self._effects[step](run)
            except (SpoolError, FileExistsError):
                raise
            except Exception as error:  # noqa: BLE001  a bug in one job must not stop the others
                _log.exception("internal_error", next="report this as a bug")
                self._park(run, error)
                outcome = None
            if outcome is not None:
                return outcome
        raise SpoolError(f"job {run.claim.job}: no progress", hint="look into its folder in the state folder")

    def _look(self, run: Run) -> None:
        """See what the disk shows; it is asked unless the last step has just said it."""
        fate = self._sending.known(run.claim.job)
        if not run.foreseen:
            run.seen = self._spool.evidence(run.claim, run.record)
            if fate and not run.seen.decided and fate.is_missing(run.seen.sent):
                self._sending.restore(run.record, fate)
                run.seen = self._spool.evidence(run.claim, run.record)
        if run.seen.decided:  # the ledger has the row: what cannot be delivered for long must not be counted twice
            self._sending.settle(run.claim.job)
            self._budget.settle(run.claim.job)
        run.foreseen = False
        run.evidence = self._evidence(run, run.seen)

    def _evidence(self, run: Run, seen: Evidence) -> Evidence:
        reaction = None
        if seen.answered and seen.answered == seen.sent and not seen.decided:
            verdict = self._verdict(run, seen.answered)
            reaction = verdict.reaction
            if reaction is Reaction.ACCOUNT and seen.answered <= run.stale:
                seen = replace(seen, reports=False)
            elif reaction is Reaction.ACCOUNT:
                seen = replace(seen, reports=run.reason is None and self._may_report(verdict.reason.kind))
                run.reason = verdict.reason
        return replace(
            seen,
            reaction=reaction,
            checked=run.request is not None,
            attempts_left=seen.sent < self._config.retry.attempts,
        )

    def _verdict(self, run: Run, attempt: int) -> Verdict:
        answer = run.record.answer(attempt)
        return classify(answer.head, answer.sample)

    def _without_record(self, job: str) -> Outcome:
        """Deal with what has no record: an interrupted end, or a claim whose state folder was lost."""
        orphans = self._spool.orphans(job)
        if orphans:
            folder = printable(self._spool.claim_folder(job))
            raise SpoolError(
                f"job {job}: {', '.join(orphans)}: claimed, but its record is gone{self._known(job)}",
                path=folder,
                hint="restore the state folder from a backup; or, only if you accept that it may be paid for a second "
                f"time, touch the files in {folder} and move them back into the inbox",
            )
        self._spool.forget(job)
        self._budget.settle(job)  # its row is older than the removal of its record
        return Outcome(job, End.NOTHING)

    def _known(self, job: str) -> str:
        """Return what the ledger knows of a job without a record, for its error."""
        row = self._ledger.job(job)
        if row is None or not row["sent_at"]:
            return ""
        sent = utc(row["sent_at"]).isoformat(timespec="seconds")
        return f"; the ledger says of {printable(row['source'])}: sent {sent}, charged: {row['charged']}"

    # The steps

    def _reclaim(self, run: Run) -> None:
        self._spool.reclaim(run.claim)

    def _archive(self, run: Run) -> None:
        decision = run.record.decision()
        assert decision is not None
        self._spool.keep(run.claim, decision)
        run.foresee(claimed=False, originals=False)

    def _forget(self, run: Run) -> Outcome:
        decision = run.record.decision()
        outcome = Outcome(run.claim.job, End.NOTHING, run.claim.source)
        if decision is not None:
            outcome = self._closing.outcome(run.claim, decision, self._clock() - run.began)
            # What was answered before this call says nothing of now: by it no hold is over.
            answered = outcome.answered and run.evidence.answered > run.stale
            outcome = replace(outcome, answered=answered, reason=run.reason)
        elif not run.evidence.recorded:  # somebody removed it meanwhile: what it said of a payment is gone
            return self._without_record(run.claim.job)
        elif not self._spool.give_back(run.claim):  # without its prompt, which was taken away; the images are theirs
            return self._displaced(run)
        is_kept = outcome.door == "errors" and outcome.charged == "yes" and run.evidence.answered > 0
        self._let_go(run.claim.job, keep=is_kept)
        return outcome

    def _deliver(self, run: Run) -> None:
        decision = run.record.decision()
        assert decision is not None
        try:
            self._spool.deliver(run.claim, decision)
        except FileExistsError:
            run.record.decide(self._closing.renamed(run.claim, decision))
        else:
            if decision.door == "outbox":
                run.foresee(over=True)

    def _discard(self, run: Run) -> Outcome:
        self._spool.discard(run.claim)
        self._let_go(run.claim.job)
        return Outcome(run.claim.job, End.REDELIVERED, run.claim.source)

    def _bank(self, run: Run) -> None:
        fate = self._sending.known(run.claim.job, run.evidence.sent)
        reason = (fate.message if fate else "") or "imagewatch ended while the answer came in"
        run.record.bank_partial(run.evidence.sent, Tail(complete=False, reason=reason, at=self._clock()))

    def _doubt(self, run: Run) -> Outcome | None:
        fate = self._sending.known(run.claim.job, run.evidence.sent)
        if fate and fate.left is not Left.WHOLE:  # the disk did not take it down at first
            return self._after(run, fate)
        known = run.doubt or (fate.message if fate else "")
        message = known or "imagewatch ended after the request was sent and before the answer was in"
        is_charged = fate is not None and fate.is_charged
        self._closing.doubt(Case.of(run.record, run.claim, run.evidence), message, is_charged=is_charged)
        return None

    def _read(self, run: Run) -> None:
        self._on_paid(run.claim.job)
        self._closing.read(Case.of(run.record, run.claim, run.evidence))
        if decision := run.record.decision():
            run.foresee(decided=decision.door)

    def _refuse(self, run: Run) -> None:
        verdict = self._verdict(run, run.evidence.answered)
        if (
            verdict.reason.row.others is Others.PAUSE and run.evidence.answered > run.stale
        ):  # its attempts are spent, but what was asked for holds for the others
            run.reason = replaced(verdict.reason, seconds=self._delay(run, verdict))
        try:
            self._closing.refuse(Case.of(run.record, run.claim, run.evidence), verdict)
        except SpoolError:  # it goes back to the inbox (a refusal from before says nothing of now), unseen by anybody
            if verdict.reaction is Reaction.ACCOUNT:
                self._not_reported(verdict.reason.kind)
            raise

    def _gather(self, run: Run) -> None:
        self._spool.gather(run.claim)

    def _check(self, run: Run) -> Outcome | None:
        claim, case = run.claim, Case(run.record, run.claim)
        # One of which there is a row was valid before; it is only carried on.
        if not self._spool.is_as_seen(claim) and not self._ledger.job(claim.job):
            return self._give_back(run)
        folder, most = self._spool.claim_folder(claim.job), self._config.limits.max_input_bytes
        where = functools.partial(open_file, tops=self._spool.tops)
        skip = self._config.inbox.redelivery == "skip"
        if skip and (twin := finished_twin(self._ledger, claim, folder, most, where)):
            self._close_twin(case, twin, lambda: contents(folder, claim.originals, most, where))
            return None
        try:
            run.request = build(claim, folder, self._config, where)
            self._require_payable(run)
        except Outdated:
            return self._give_back(run)
        except BadRequest as error:
            self._closing.invalid(case, error.problems, contents(folder, claim.originals, most, where))
        else:
            run.foresee()
        return None

    def _close_twin(self, case: Case, twin: str, read: Callable[[], dict[str, str]]) -> None:
        """End a job whose prompt is that of one that is over: a sync tool's without a trace, a person's with a word.

        Also the first one with a word of whose job there is no document yet.
        """
        claim, is_lost = case.claim, self._ledger.is_lost(twin)
        if not (is_lost or self._ledger.was_placed(claim.mtime_ns)):
            self._closing.redelivered(case, twin)
            return
        reason = f"this file was requested before, as job {twin}; nothing was sent"
        problem = Problem(printable(claim.prompt), reason, "save the prompt again to request another image")
        # A person's without contents: another one like it is one of the twin, too.
        self._closing.invalid(case, [problem], read() if is_lost else {}, "repeated")

    def _require_payable(self, run: Run) -> None:
        """Make sure that no cap is so low that this request could never be sent.

        One that was sent before was below every cap then; it goes back to the inbox, and is looked at as a new one.

        Raises:
            BadRequest: One is.
        """
        assert run.request is not None
        if not run.evidence.sent and (problem := self._budget.never(Asked.of(run.request.fields))):
            raise BadRequest([problem])

    def _send(self, run: Run) -> Outcome | None:
        if run.evidence.answered:
            verdict = self._verdict(run, run.evidence.answered)
            self._closing.busy(Case.of(run.record, run.claim, run.evidence), verdict)
            if not run.resumed:
                return self._later(run, verdict)
        if not run.may_send:
            return self._later(run, None) if run.evidence.sent else self._give_back(run)
        assert run.request is not None
        reason = self._budget.reserve(run.claim.job, Asked.of(run.request.fields))
        if reason is not None:
            return self._unaffordable(run, reason)
        run.resumed = False
        attempt, sent = run.evidence.sent + 1, self._sending.mark(run.request)
        # What cannot be recorded must not be paid; this touches the same pages as the row with the result will.
        self._closing.begin(Case(run.record, run.claim, attempt, replace(sent, at=self._clock())))
        return self._after(run, self._sending.send(run.record, run.claim, run.request, sent, attempt))

    def _after(self, run: Run, fate: Fate) -> Outcome | None:
        """Go on from what became of a request, as far as the disk takes it down."""
        run.reason = fate.reason or run.reason
        if fate.is_saved:
            run.foresee(sent=fate.attempt, answered=fate.attempt)
        elif fate.left is Left.PART:
            _log.warning("not_sent", reason=fate.message, attempt=fate.attempt)
            self._sending.prove(run.record, fate)
        elif fate.left is Left.NOTHING:
            if fate.reason is None:
                _log.info("withdrawn", reason=fate.message)
            run.record.take_back(fate.attempt)
            self._ledger.withdraw(run.claim.job)
            self._sending.settle(run.claim.job)
            if run.evidence.answered and fate.reason is None:  # behind a hold it stays claimed: its attempts count
                return self._later(run, None)
            return self._give_back(run)
        return None

    def _unaffordable(self, run: Run, reason: Reason) -> Outcome:
        """Deal with a request that a cap forbids: a short wait stays claimed, a long one goes back to the inbox."""
        run.reason = reason
        if not reason.row.is_short:
            return self._give_back(run)
        return Outcome(run.claim.job, End.LATER, run.claim.source, delay=reason.seconds or 0.0, reason=reason)

    def _later(self, run: Run, verdict: Verdict | None) -> Outcome:
        """Ask to be called again when the endpoint may take the same request, or when there is no hold any more."""
        if verdict is None:
            return Outcome(run.claim.job, End.LATER, run.claim.source)
        delay = self._delay(run, verdict)
        reason = replaced(verdict.reason, seconds=delay)
        return Outcome(run.claim.job, End.LATER, run.claim.source, delay=delay, reason=reason)

    def _delay(self, run: Run, verdict: Verdict) -> float:
        retry = self._config.retry
        return retry_delay(
            run.evidence.answered,
            initial=retry.initial_seconds,
            longest=retry.max_seconds,
            retry_after=verdict.reason.seconds,
            jitter=self._jitter(),
        )

    def _give_back(self, run: Run) -> Outcome:
        claim = run.claim
        if attempt := run.evidence.answered:
            self._closing.busy(Case.of(run.record, claim, run.evidence), self._verdict(run, attempt))
        if not self._spool.give_back(claim):
            return self._displaced(run)
        self._let_go(claim.job)
        return Outcome(claim.job, End.RETURNED, claim.source, reason=run.reason)

    def _let_go(self, job: str, *, keep: bool = False) -> None:
        """Forget a job that is over or was given back; what it was to send, and did not, was never sent."""
        self._ledger.withdraw(job)
        self._spool.forget(job, keep=keep)

    def _displaced(self, run: Run) -> Outcome:
        """Wait until a newer file of the same name has gone first."""
        claim = run.claim
        return Outcome(claim.job, End.LATER, claim.source, delay=_RETURN_SECONDS, reason=run.reason, displaced=True)

    def _park(self, run: Run, error: Exception) -> None:
        """End a job that met a bug, if nothing was paid for it; else leave its evidence for the next start."""
        if run.record.attempts()[0] > run.evidence.sent:
            # While it was sent: what that left on the disk says how the job goes on.
            run.doubt = f"imagewatch met a bug while the request was under way: {type(error).__name__}: {error}"
            return
        if run.evidence.sent or run.evidence.decided:
            raise SpoolError(
                f"job {run.claim.job}: stopped by a bug in imagewatch: {type(error).__name__}: {error}",
                hint="its evidence is kept in the state folder; it is tried again at the next start",
            ) from error
        problem = Problem("imagewatch", f"a bug: {type(error).__name__}: {error}", "please report it")
        self._closing.invalid(Case(run.record, run.claim), [problem], {})


@contextlib.contextmanager
def _our_disk() -> Iterator[None]:
    """Take what cannot be read for what it is: our disk's failure, and no bug; that a name is taken is an answer."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        with ours(str(error.filename), "read"):
            raise
