"""What commands ask of a running daemon: hold, release, retry, and to use another ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Job
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from imagewatch.daemon.arrivals import Arrivals
    from imagewatch.daemon.parts import Parts
    from imagewatch.daemon.recovery import Recovery
    from imagewatch.daemon.results import Results

_log = structlog.get_logger()


class Instructions:
    """Does what commands ask for.

    Args:
        parts: The daemon's parts.
        arrivals: When prompts came: a release lets those through that are there.
        results: What follows from the results of jobs.
        recovery: Takes up the jobs of another ledger.
    """

    def __init__(self, parts: Parts, arrivals: Arrivals, results: Results, recovery: Recovery) -> None:
        self._parts = parts
        self._arrivals = arrivals
        self._results = results
        self._recovery = recovery

    def follow(self) -> None:
        """Do what commands have asked for, and count how many prompts came at the same time."""
        parts = self._parts
        times = self._arrivals.times()
        try:
            self.accept_ledger()
            if parts.control.release_pending():
                parts.caps.soon()
        except SpoolError as error:
            parts.admission.failed(error)
        parts.admission.follow(times)
        parts.admission.count(times, self._arrivals.is_finished)
        try:
            for job in parts.control.retries():
                self._reopen(job)
        except SpoolError as error:
            parts.admission.failed(error)

    def accept_ledger(self) -> None:
        """Use the ledger that is there, or an empty one, if ``release --accept-new-ledger`` asked for it."""
        parts = self._parts
        if not parts.control.accepts_ledger():
            return
        parts.journal.accept()
        parts.admission.burst.forget()
        parts.admission.announcements.accepted()
        parts.control.accepted_ledger()
        parts.journal.requests.release()  # the hold was for the other ledger
        _log.warning("ledger_accepted", ledger=parts.journal.file.path or "shared database")
        self._recovery.take_up_others()

    def _reopen(self, job: str) -> None:
        """Read the saved response of a job again, as ``retry`` asked for."""
        parts = self._parts
        if parts.team.is_on:
            if parts.team.reopen(job):
                self._results.count_left()
                parts.status.change()
            return
        is_read = job in parts.jobs  # asked for twice, or before a crash
        if not is_read and parts.journal.reopen(job):
            reopened = Job(job, parts.spool.key(job))
            _log.info("response_reread", **reopened.names)
            parts.jobs.defer(reopened, 0.0)
            self._results.count_left()
            parts.status.change()
        elif not is_read:
            _log.warning("response_missing", job=job, reason="no response of this job is saved")
        parts.control.retried(job)
