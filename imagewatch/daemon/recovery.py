"""What an earlier process left behind: its jobs are carried on, and what they may have cost counts first."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Job
from imagewatch.journal.prices import Asked
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from imagewatch.daemon.parts import Parts

_log = structlog.get_logger()


class Recovery:
    """Finds what is left of earlier jobs.

    Args:
        parts: The daemon's parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._are_lost_closed = False

    def begin(self) -> None:
        """Take up every job that left something; for the start, before anything is sent."""
        for job in self._parts.spool.unfinished():
            recovered = Job(job, self._parts.spool.key(job))
            _log.info("recovered", **recovered.names)
            self._parts.jobs.defer(recovered, 0.0)
            self._reserve(job)
        self.close_lost()  # before anything is sent: what they may have cost counts

    def _reserve(self, job: str) -> None:
        """Reserve what a recovered job has sent, until its row in the ledger has the result."""
        record, budget = self._parts.spool.record(job), self._parts.budget
        with contextlib.suppress(SpoolError):
            if sent := record.sent(record.attempts()[0]):
                budget.resume(job, Asked.of(sent.fields), sent.at)
            return
        with contextlib.suppress(SpoolError):  # a damaged record: its job reports that when it is carried on
            if unanswered := self._parts.ledger.unanswered(job):
                budget.resume(job, *unanswered)

    def record_removed(self) -> None:
        """Note that a person has removed a job record: the rows of its requests are to be closed."""
        self._are_lost_closed = False

    def close_lost(self) -> bool:
        """Close the rows of requests of which nothing else is left; return whether that is done."""
        if self._are_lost_closed:
            return True
        try:
            known = set(filter(self._is_recorded, {*self._parts.spool.unfinished(), *self._parts.jobs}))
            if lost := self._parts.ledger.close_lost(known):
                _log.warning("results_lost", requests=lost, reason="the requests may have been charged")
        except SpoolError as error:
            self._parts.admission.failed(error)
            return False
        self._are_lost_closed = True
        return True

    def _is_recorded(self, job: str) -> bool:
        """Return whether the result of a job may still be found; without its record only a person can find more."""
        try:
            return job in self._parts.fates or self._parts.spool.record(job).claim() is not None
        except SpoolError:  # it may be readable again
            return True
