"""What an earlier process left behind: its jobs are continued."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon.jobs import Job
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
        self._has_taken_over = False

    def begin(self) -> None:
        """Take up every job that left something; for the start, before anything is sent."""
        self.complete()

    def take_up_others(self) -> None:
        """Take up the jobs that only the ledger knows which is used from now on.

        Raises:
            SpoolError: It cannot be used.
        """
        if self._parts.is_recovered:  # else all of them are still to be taken up
            self._take_up_all(self._parts.spool.unfinished())

    def complete(self) -> bool:
        """Take up what could not be taken up before, as the journal could not be read; return whether that is done."""
        if self._parts.is_recovered:
            return True
        spool = self._parts.spool
        try:
            # What is tidied up there may belong to a job that a worker has now.
            self._take_up_all(spool.unfinished() if self._has_taken_over else spool.take_over())
        except SpoolError as error:
            self._parts.admission.failed(error)
            return False
        self._parts.is_recovered = self._has_taken_over = True
        return True

    def _take_up_all(self, unfinished: list[str]) -> None:
        for job in unfinished:
            if not self._parts.jobs.knows(job):
                recovered = Job(job, self._parts.spool.key(job))
                _log.info("recovered", **recovered.names)
                self._parts.jobs.defer(recovered, 0.0)
