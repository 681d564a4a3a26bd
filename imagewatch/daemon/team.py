"""What a daemon does in an inbox that several daemons process: as the leader it offers prompts; it takes jobs.

Without a common inbox it does nothing: the daemon is the leader, and there are only its own jobs. Belongs to the main
thread, except for ``tick``.
"""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Job
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.daemon.parts import Parts
    from imagewatch.inbox.candidate import JobKeys, Key
    from imagewatch.protocol.values import Claim

_REFRESH_SECONDS = 0.05
"""How often the leader reads what was taken while prompts wait to be offered, seconds."""
_REST_SECONDS = 1.0
"""The same while no prompt waits; and how often a daemon reads which jobs are offered without a notification."""
_AHEAD = 2
"""So many jobs are offered for each request that the daemons may send at the same time."""
_MOST_TAKEN_OVER = 10
_TIDY_SECONDS = 10.0
"""How long a daemon that ends waits for the claim folder that is being tidied up, seconds."""
_log = structlog.get_logger()


class Team:
    """What a daemon does with others in one inbox.

    Args:
        parts: The daemon's parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._common = parts.journal.common
        self.is_on = self._common.is_on
        self._names: set[Key] = set()
        self._offered, self._most = 0, 0
        self._read_at = self._took_at = self._tidied_at = self._counted_at = -math.inf
        self._leads = False
        self._tidying: threading.Thread | None = None
        self._is_ending = threading.Event()
        self._offers: dict[str, Claim] = {}
        self._may_be_more = True
        # Set in the main thread, and read in the one of ``tick``.
        self._passed_at, self._can_scan, self._is_draining = parts.now(), True, False

    # In the thread that shows that the daemon runs

    def tick(self) -> None:
        """Prolong the leases of this daemon's jobs, and become the leader if there is none; errors show elsewhere.

        A daemon that cannot scan does not stay the leader, nor does one whose main thread waits for a folder for long.
        """
        if not self.is_on:
            return
        # A daemon that ends only waits for its workers: its main thread asks for nothing.
        is_timely = self._is_draining or self._parts.now() - self._passed_at < self._common.lease_seconds
        is_able = self._can_scan and is_timely
        with contextlib.suppress(SpoolError):
            if is_able:  # else others may take over what it has
                self._common.renew()
            if is_able and not self._is_draining:
                self._common.lead()
            elif self._common.leads:
                self._common.resign()

    # The leader

    def leads(self) -> bool:
        """Return whether this daemon scans the inbox."""
        self._passed_at = self._parts.now()
        leads = self._common.leads
        if leads != self._leads and self.is_on:
            self._leads = leads
            _log.info("leader_started" if leads else "leader_ended")
            self._read_at = -math.inf
            if leads:
                self._parts.intake.scanner.soon()
        return leads

    def taken(self) -> JobKeys:
        """Return the stems of which a job is not over, whichever daemon has it."""
        own = self._parts.jobs.taken()
        return own.joined(self._names) if self.is_on else own

    def refresh(self) -> None:
        """Read which jobs there are, if that is due.

        Raises:
            SpoolError: The database cannot be used.
        """
        if not (self.is_on and self.leads()) or self._parts.now() < self._read_at + self._interval():
            return
        names, self._offered = self._common.names()
        self._count_slots()
        over, self._names = self._names - names, set(names)
        self._read_at = self._parts.now()
        if over:
            self._parts.caps.soon()  # what was reserved for them may be free
        for key in over:
            self._parts.intake.over(key)
            if self._parts.spool.is_in_inbox(key):  # given back, or never claimed by the daemon that had taken it
                self._parts.intake.scanner.soon(key)

    def tidy(self) -> None:
        """Find claim folders that no job has, if that is due; errors show elsewhere."""
        if self.is_on and self._leads and self._parts.now() >= self._tidied_at + self._common.lease_seconds:
            self._tidied_at = self._parts.now()
            if self._tidying is None or not self._tidying.is_alive():  # to read all result files may take long
                self._tidying = threading.Thread(target=self._tidy, name="tidy", daemon=True)
                self._tidying.start()

    def _tidy(self) -> None:
        with contextlib.suppress(SpoolError):
            self._parts.worker.tidy(self._is_ending.is_set)

    def _count_slots(self) -> None:
        """Read how many requests the daemons send at the same time, if that is due."""
        if self._parts.now() >= self._counted_at + _REST_SECONDS:
            self._most = _AHEAD * max(self._common.slots(), 1)
            self._counted_at = self._parts.now()

    def _interval(self) -> float:
        return _REFRESH_SECONDS if self._parts.intake.any() else _REST_SECONDS

    def may_offer(self) -> bool:
        """Return whether another prompt may be offered."""
        return self.leads() and self._offered < self._most

    def offer(self, claim: Claim) -> None:
        """Let any daemon take a prompt, with the next ``write_offers``."""
        self._offers[claim.job] = claim
        self._names.add((claim.folder, claim.stem))
        self._offered += 1

    def write_offers(self) -> list[Key]:
        """Write down which prompts are offered, all in one transaction.

        Returns:
            Those of which another job is not over.

        Raises:
            SpoolError: The database cannot be used.
        """
        if not self._offers:
            return []
        known = self._common.offer_all(list(self._offers.values()))
        refused = [(one.folder, one.stem) for job, one in self._offers.items() if job not in known]
        self._offers.clear()
        self._may_be_more = True
        return refused

    def withdraw(self) -> list[Key]:
        """Forget offers that could not be written; return their prompts."""
        keys = [(one.folder, one.stem) for one in self._offers.values()]
        self._offers.clear()
        self._names.difference_update(keys)
        return keys

    def cannot_scan(self) -> None:
        """Note that this daemon cannot use the inbox: another one may be able to."""
        self._can_scan = False

    def can_scan(self) -> None:
        """Note that this daemon can use the inbox."""
        self._can_scan = True

    def drain(self) -> None:
        """Let another daemon become the leader as soon as possible: this one ends when its jobs are over."""
        self._is_draining = True
        if self.is_on:  # not in this thread: the database may not answer
            threading.Thread(target=self.tick, name="resign", daemon=True).start()

    # Every daemon

    def offered(self) -> None:
        """Note that there may be something to take."""
        self._may_be_more = True

    def may_take(self) -> bool:
        """Return whether there may be something to take: a notification can be lost."""
        return self._may_be_more or self._parts.now() >= self._took_at + _REST_SECONDS

    def take(self, most: int) -> list[tuple[Job, Claim]]:
        """Take jobs that are offered.

        Raises:
            SpoolError: The database cannot be used.
        """
        if most <= 0:
            return []
        found, everything = [], self._common.take(most)
        self._took_at, self._may_be_more = self._parts.now(), len(everything) == most
        for taken in everything:
            if taken.claim is None:
                self._parts.jobs.defer(Job(taken.job), 0.0)  # its worker reports that its record is damaged
            else:
                found.append((Job(taken.job, (taken.claim.folder, taken.claim.stem)), taken.claim))
        return found

    def reopen(self, job: str) -> bool:
        """Let the response of a job that was kept be read again, as ``retry`` asked for; return whether this one does.

        The daemon that kept it does that; if it does not run, any other one that finds the response in the claim
        folder.

        Raises:
            SpoolError: The database, or the folder of claimed files, cannot be used.
        """
        parts, handover = self._parts, self._parts.spool.handover
        holder, _, state = self._common.where(job) or ("", 0, "done")
        is_own = False
        if state == "kept" and job in parts.jobs:
            return False  # its worker is about to end: the next time
        if state == "kept":
            is_running, is_removed = self._common.member(holder)
            is_mine = holder == self._common.instance
            if not is_mine and (is_running or not (is_removed or handover.has_response(job))):
                return False  # that one does it, now or when it runs
            if not is_mine and not handover.has_response(job):
                reason = f"only {printable(holder)} had it, which was removed from the account"
                _log.warning("response_missing", job=job, reason=reason)
            elif is_own := self._common.reopen_kept(job):
                reopened = Job(job, parts.spool.key(job))
                _log.info("response_reread", **reopened.names)
                parts.jobs.defer(reopened, 0.0)
        elif state == "done":
            _log.warning("response_missing", job=job, reason="no response of this job is saved")
        parts.control.retried(job)
        return is_own

    def take_over(self) -> None:
        """Take the jobs of daemons that do not run any more.

        Raises:
            SpoolError: The database, or the folder of claimed files, cannot be used.
        """
        if not self.is_on or not self._parts.is_recovered or not self._can_scan:
            return
        for taken in self._common.take_over(_MOST_TAKEN_OVER, self._parts.jobs.at_work):
            key = (taken.claim.folder, taken.claim.stem) if taken.claim else None
            job = Job(taken.job, key)
            _log.warning("taken_over", **job.names, reason="its daemon has ended, or did not report within the lease")
            self._parts.jobs.defer(job, 0.0)

    def next_due(self) -> float:
        """Return the monotonic time at which there is something to ask; infinite without a common inbox."""
        if not self.is_on:
            return math.inf
        interval = self._interval() if self._leads else _REST_SECONDS
        return self._parts.now() + interval

    def end(self) -> None:
        """Let other daemons become the leader and continue the jobs of this one."""
        self._is_ending.set()
        if self._tidying is not None:  # no longer than this: its folder may hang
            self._tidying.join(_TIDY_SECONDS)
        if self.is_on:
            with contextlib.suppress(SpoolError):
                self._common.resign()
                self._common.let_go()
