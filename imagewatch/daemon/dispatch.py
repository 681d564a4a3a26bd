"""What workers are given next: the jobs that were claimed, and prompts of the inbox.

A worker's first act is the claim, so that whatever merely waits in memory is still in the inbox.

Whether a request may be sent is asked at three moments:

=====================  =================================================================================================
before the claim       ``_may_claim``: no hold, or one probe (``Admission.slots``); a free slot (``Jobs.may_send``);
                       room on the disk (``Admission.has_room``); no folder closed for a stuck job
                       (``Intake.may_claim``). Then ``_admits``: the cost fits below the caps (``Journal.open``
                       reserves it)
when it is recorded    ``Journal.spend``: requests in this minute, a manual hold, those of a shared account,
                       and the caps once more
at the first byte      ``Admission.leaving``: no hold has begun since, and the daemon is not ending
=====================  =================================================================================================
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from imagewatch.daemon.jobs import Job, Need
from imagewatch.daemon.mailbox import Finished
from imagewatch.protocol.reasons import DISK_SECONDS
from imagewatch.system import memory
from imagewatch.system.errors import NameTakenError, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.daemon.arrivals import Arrivals
    from imagewatch.daemon.parts import Parts
    from imagewatch.daemon.recovery import Recovery
    from imagewatch.inbox.candidate import Candidate
    from imagewatch.job.outcome import Outcome
    from imagewatch.protocol.values import Claim

_WORKERS = 96
"""As many as there may be jobs at work: half as many as the most slots may be delivering."""
_LEAST_CAP, _LONGEST_CAP = 0.1, 60.0
"""How long the caps are not checked again while prompts wait at one, seconds: the clock may be set."""
_OTHERS_CAP = 2.0
"""The same while one waits for what is in flight: the end of a request of another daemon is not reported."""


class Dispatch:
    """Gives jobs to workers.

    Args:
        parts: The daemon's parts.
        arrivals: When prompts came.
        recovery: What is left of earlier jobs.

    Attributes:
        pool: The workers.
    """

    def __init__(self, parts: Parts, arrivals: Arrivals, recovery: Recovery) -> None:
        self._parts = parts
        self._jobs, self._admission, self._intake = parts.jobs, parts.admission, parts.intake
        self._arrivals, self._recovery, self._team = arrivals, recovery, parts.team
        self.pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="worker")

    def run(self, *, is_draining: bool) -> None:
        """Give workers what may be done now, unless the daemon is about to end."""
        self._check_caps()
        if not is_draining:
            self._start_all()
        self._hold_at_caps()

    def _start_all(self) -> None:
        """Start what may be done now. The first-level folders take turns: what is claimed, then the oldest prompt."""
        self._admission.probe_stores()
        if self._parts.journal.file.is_shared and not self._parts.is_recovered and self._admission.stores_work():
            self._recovery.complete()
        claimed: dict[str, list[Job]] = {}
        for job in self._jobs.due(self._parts.now(), is_held=self._admission.first() is not None):
            claimed.setdefault(job.folder, []).append(job)
            self._intake.turns.join(job.folder, self._intake.owner(job.folder))
        own = {} if self._team.is_on else claimed  # what others may claim has no turns with what this one has claimed
        may_go = self._may_offer if self._team.is_on else self._may_send
        while may_go() and (name := self._intake.turns.first()) is not None:
            if not self._serve(name, own.get(name, [])):
                break
        self._write_offers()
        self._take_offered()
        for job in (job for jobs in claimed.values() for job in jobs):
            if self._may_send():  # nothing new may be claimed, for which these need not wait
                self._carry_on(job, may_send=True)
            elif job.need is not Need.REQUEST and self._may_deliver():
                self._carry_on(job, may_send=False)

    def next_due(self) -> float:
        """Return the monotonic time at which a deferred job or a prompt at a cap is due; infinite without one."""
        jobs = self._jobs.next_due(may_send=self._may_send(), may_deliver=self._may_deliver())
        return min(jobs, self._parts.caps.due)

    def _may_send(self) -> bool:
        return self._jobs.may_send(self._admission.slots())

    def _may_deliver(self) -> bool:
        return self._jobs.may_deliver(stores_work=self._admission.stores_work())

    def _serve(self, name: str, claimed: list[Job]) -> bool:
        """Give a worker what is next in a first-level folder; return whether another folder may have its turn."""
        if claimed:
            self._carry_on(claimed.pop(0), may_send=True)
        elif not self._intake.is_ready(name):
            self._intake.turns.leave(name)
            return True
        elif not self._may_claim():
            return False
        elif not self._claim_next(name):
            return False  # it would be given the same prompt again and again
        self._intake.served(name)
        if claimed:
            self._intake.turns.join(name, self._intake.owner(name))
        return True

    # A job that was claimed

    def _carry_on(self, job: Job, *, may_send: bool) -> None:
        carry = functools.partial(self._parts.worker.process, job.id, is_resumed=True, may_send=may_send)
        self._submit(job, carry)

    def _submit(self, job: Job, call: Callable[[], Outcome]) -> None:
        memory.reuse()  # not before: very many names at rest take less memory as it is
        began, mailbox = self._parts.now(), self._parts.mailbox
        future = self.pool.submit(call)
        self._jobs.start(job)  # not before: it fails if no more threads can be started
        future.add_done_callback(lambda done: mailbox.put(Finished(job.id, began, done)))

    # A prompt of the inbox

    def _may_claim(self) -> bool:
        """Return whether another prompt may be claimed."""
        self._arrivals.count_new()
        if not (self._intake.any() and self._intake.may_claim()):
            return False
        may_go = self._may_offer() if self._team.is_on else self._may_send() and self._admission.has_room()
        return may_go and self._recovery.complete()

    def _claim_next(self, name: str) -> bool:
        """Claim the oldest prompt of a first-level folder that may be claimed; return False if the journal failed."""
        job, at, is_usable = self._parts.spool.new_job(), self._parts.journal.clock(), True

        def admits(candidate: Candidate) -> bool | None:
            nonlocal is_usable
            is_admitted = self._admits(candidate, candidate.claim(job, at))
            is_usable = is_admitted is not None
            return is_admitted

        candidate = self._intake.next(name, self._team.taken(), admits)
        if candidate is None:
            return is_usable
        self._arrivals.claimed(candidate)
        if self._team.is_on:
            self._team.offer(candidate.claim(job, at))
        else:
            start = functools.partial(self._parts.worker.start, candidate.claim(job, at))
            self._submit(Job(job, candidate.key), start)
        return True

    # A common inbox

    def _may_offer(self) -> bool:
        """Return whether another prompt may be offered. A hold of this daemon alone does not concern the others."""
        return self._team.may_offer() and not self._admission.is_burst()

    def _write_offers(self) -> None:
        """Let any daemon of the inbox take the prompts that were chosen."""
        try:
            refused = self._team.write_offers()
        except SpoolError as error:
            self._admission.failed(error)
            refused = self._team.withdraw()
        for key in refused:
            self._intake.scanner.soon(key)

    def _take_offered(self) -> None:
        """Take prompts that the leader of the inbox has offered, as many as may be sent."""
        if not self._team.is_on:
            return
        try:
            self._team.refresh()
            if not (self._team.may_take() and self._may_send() and self._admission.has_room()):
                return
            if not self._recovery.complete():
                return
            taken = self._team.take(self._jobs.free(self._admission.slots()))
        except SpoolError as error:
            self._admission.failed(error)
            return
        for job, claim in taken:
            self._submit(job, functools.partial(self._parts.worker.start, claim))

    def _admits(self, candidate: Candidate, claim: Claim) -> bool | None:
        """Return whether the caps let a prompt be claimed; None if the journal cannot be used."""
        try:
            return self._parts.caps.admits(candidate, claim)
        except SpoolError as error:
            if not isinstance(error, NameTakenError):
                self._parts.is_recovered = False  # its job may be recorded nevertheless, and would keep its name
            self._admission.failed(error)
            return None

    # Prompts that wait at a cap

    def _check_caps(self) -> None:
        """Let prompts that waited at a cap have their turn again if they may fit now."""
        caps = self._parts.caps
        if self._parts.now() < caps.due:
            return
        caps.due = math.inf
        try:
            self._intake.reconsider(caps.check(self._intake.is_passed_over, self._intake.is_file))
        except SpoolError as error:  # the ledger cannot be read
            self._admission.failed(error)
            caps.due = self._parts.now() + DISK_SECONDS

    def _hold_at_caps(self) -> None:
        """Show at which caps prompts wait now that those that fit were claimed."""
        caps = self._parts.caps
        if not (self._intake.any() or self._intake.scanner.pending):
            caps.all_had_their_turn()
        held = caps.held()
        self._admission.set_caps(held)
        if self._parts.journal.file.is_shared and caps.any_waits_for_others():
            caps.due = min(caps.due, self._parts.now() + _OTHERS_CAP)
        if held:
            seconds = min(refusal.ends for refusal in held.values()) - self._parts.journal.clock()
            caps.due = min(caps.due, self._parts.now() + min(max(seconds, _LEAST_CAP), _LONGEST_CAP))
