"""What an earlier process left behind: its jobs are carried on."""

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
        self._is_complete = False

    def begin(self) -> None:
        """Take up every job that left something; for the start, before anything is sent."""
        self.complete()

    def complete(self) -> bool:
        """Take up what could not be taken up before, as the journal could not be read; return whether that is done."""
        if self._is_complete:
            return True
        try:
            for job in self._parts.spool.take_over():
                if job not in self._parts.jobs:
                    self._take_up(job)
        except SpoolError as error:
            self._parts.admission.failed(error)
            return False
        self._is_complete = True
        return True

    def _take_up(self, job: str) -> None:
        recovered = Job(job, self._parts.spool.key(job))
        _log.info("recovered", **recovered.names)
        self._parts.jobs.defer(recovered, 0.0)
