"""The part of a daemon in an inbox that several daemons process: it leads or not, offers prompts, and takes jobs.

Without a common inbox it does nothing: the daemon leads, and its own jobs are all there are. Belongs to the main
thread, except for ``tick``.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Job
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from imagewatch.daemon.parts import Parts
    from imagewatch.inbox.candidate import JobKeys, Key
    from imagewatch.protocol.values import Claim

_REFRESH_SECONDS = 0.1
"""How often the leader asks what was taken while prompts wait to be offered, seconds."""
_REST_SECONDS = 1.0
"""The same while none does; and how often a daemon asks for offered jobs though it got no notification."""
_AHEAD = 2
"""So many jobs are offered for each request that the daemons may send at the same time."""
_MOST_TAKEN_OVER = 10
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
        self._read_at = -math.inf
        self._leads = False

    # In the thread that shows that the daemon runs

    def tick(self) -> None:
        """Prolong the leases of this daemon's jobs, and lead if no other one does; errors show elsewhere."""
        if self.is_on:
            with contextlib.suppress(SpoolError):
                self._common.renew()
                self._common.lead()

    # The leader

    def leads(self) -> bool:
        """Return whether this daemon scans the inbox."""
        leads = self._common.leads
        if leads != self._leads and self.is_on:
            self._leads = leads
            _log.info("leads" if leads else "leads_no_more")
            self._read_at = -math.inf
            if leads:
                self._parts.intake.scanner.soon()
        return leads

    def taken(self) -> JobKeys:
        """Return the stems of which a job is not over, whichever daemon has it."""
        own = self._parts.jobs.taken()
        return own.joined(self._names) if self.is_on else own

    def refresh(self) -> None:
        """Ask which jobs there are, if that is due.

        Raises:
            SpoolError: The database cannot be used.
        """
        if not (self.is_on and self.leads()) or self._parts.now() < self._read_at + self._interval():
            return
        names, self._offered = self._common.names()
        self._most = _AHEAD * max(self._common.slots(), 1)
        over, self._names = self._names - names, set(names)
        self._read_at = self._parts.now()
        for key in over:
            self._parts.intake.over(key)

    def _interval(self) -> float:
        return _REFRESH_SECONDS if self._parts.intake.any() else _REST_SECONDS

    def may_offer(self) -> bool:
        """Return whether another prompt may be offered."""
        return self.leads() and self._offered < self._most

    def offer(self, claim: Claim) -> None:
        """Let any daemon take a prompt.

        Raises:
            SpoolError: The database cannot be used.
        """
        self._parts.journal.offer(claim)
        self._names.add((claim.folder, claim.stem))
        self._offered += 1

    # Every daemon

    def take(self, most: int) -> list[tuple[Job, Claim]]:
        """Take jobs that are offered.

        Raises:
            SpoolError: The database cannot be used.
        """
        found = []
        for taken in self._common.take(most) if self.is_on and most > 0 else ():
            if taken.claim is None:
                self._parts.jobs.defer(Job(taken.job), 0.0)  # its worker reports that its record is damaged
            else:
                found.append((Job(taken.job, (taken.claim.folder, taken.claim.stem)), taken.claim))
        return found

    def take_over(self) -> None:
        """Take the jobs of daemons that do not run any more.

        Raises:
            SpoolError: The database, or the folder of claimed files, cannot be used.
        """
        if not self.is_on or not self._parts.is_recovered:
            return
        for taken in self._common.take_over(_MOST_TAKEN_OVER):
            key = (taken.claim.folder, taken.claim.stem) if taken.claim else None
            job = Job(taken.job, key)
            _log.warning("taken_over", **job.names, reason="its daemon does not run any more")
            self._parts.spool.handover.fence(taken.job)
            self._parts.jobs.defer(job, 0.0)

    def next_due(self) -> float:
        """Return the monotonic time at which there is something to ask; infinite without a common inbox."""
        if not self.is_on:
            return math.inf
        interval = self._interval() if self._leads else _REST_SECONDS
        return self._parts.now() + interval

    def end(self) -> None:
        """Let other daemons lead and carry on the jobs of this one."""
        if self.is_on:
            with contextlib.suppress(SpoolError):
                self._common.resign()
                self._common.let_go()
