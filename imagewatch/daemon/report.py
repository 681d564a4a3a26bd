"""What the daemon reports while it runs: ``status.json``, the service manager, and the files that it ignores."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import structlog

from imagewatch import __version__
from imagewatch.daemon.by_folder import ByFolder
from imagewatch.daemon.folder_status import FolderStatus
from imagewatch.daemon.ignored import Ignored
from imagewatch.daemon.status import line
from imagewatch.inbox.candidate import ANYWHERE
from imagewatch.protocol.names import SUFFIX
from imagewatch.system import memory
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.daemon.parts import Parts
    from imagewatch.inbox.candidate import Key

_LONGEST_START = 5.0
"""After how many seconds the daemon is ready though not every folder was scanned yet."""
_log = structlog.get_logger()


class Report:
    """Reports what the daemon does.

    Args:
        parts: The daemon's parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ignored = Ignored(parts.now)
        self._in_folders = FolderStatus(parts)
        self._by_folder = ByFolder(parts.journal)
        self._is_ready = self._has_worked = False
        self._ready_at = 0.0

    def begin(self, state: str) -> None:
        """Note that the daemon runs from now on, in this state."""
        self._parts.status.state = state
        self._ready_at = self._parts.now() + _LONGEST_START
        self._in_folders.begin()

    def scanned(self, *, is_new: bool) -> None:
        """Report a scan.

        Args:
            is_new: Whether more is known of the inbox than before.
        """
        intake, status = self._parts.intake, self._parts.status
        is_known = self._is_ready or intake.scanner.is_complete or self._parts.now() >= self._ready_at
        is_known = is_known or not self._parts.team.leads()
        if is_new and is_known:
            self._ignored.log(intake.result.ignored)
        status.last_scan = self._parts.clock()
        status.mode = intake.mode
        status.change()
        self._parts.notify.send(WATCHDOG="1")
        if is_known and not self._is_ready:
            self._ready()

    def _ready(self) -> None:
        """Report that the daemon watches. Before it could scan the inbox it is not ready."""
        self._is_ready = True
        self.write()  # ``status`` has something to show from now on
        intake, inbox = self._parts.intake, self._parts.spool.inbox
        mode, where = intake.mode, self._parts.config.endpoint.base_url
        polled = {"polled": why} if (why := intake.why_polled()) else {}
        _log.info("started", inbox=inbox, mode=mode, **polled, endpoint=where, version=__version__)
        self._parts.notify.send(READY="1", STATUS=f"watching {inbox} ({mode})")

    def worked(self) -> None:
        """Note that a job has used memory, which is given back when no worker has a job."""
        self._has_worked = True

    def stopping(self, number: int) -> None:
        """Report that a signal ends the daemon."""
        self._parts.status.state = "stopping"
        self.write(STOPPING="1")
        _log.info("shutdown", signal=signal.Signals(number).name, in_flight=len(self._parts.jobs.at_work))

    def stopped(self) -> None:
        """Report the end."""
        self._parts.status.state = "stopped"
        self.write()

    @property
    def due(self) -> float | None:
        """Monotonic time at which a status file is to be written, or None."""
        return min((due for due in (self._parts.status.due, self._in_folders.due) if due is not None), default=None)

    def write_if_due(self) -> None:
        """Write the status files if something has changed, but not too often."""
        is_idle = self._has_worked and not self._parts.jobs.any_at_work
        if is_idle:
            self._parts.status.idle()
        due = self._parts.status.due
        if due is None or self._parts.now() < due:
            if self._in_folders.is_due():
                self._write_in_folders()
            return
        self.write()
        if is_idle:
            self._has_worked = False
            memory.give_back()

    def write(self, **fields: str) -> None:
        """Write the status file, and send the same in one line and some more fields to the service manager."""
        status, intake, caps = self._parts.status, self._parts.intake, self._parts.caps
        at_work, stuck = map(_sources, (self._parts.jobs.at_work, self._parts.jobs.stuck))
        status.polled, status.notice = intake.polled(), self._in_folders.as_shown()
        try:
            ready = max(intake.count() - len(caps), 0)
            more = self._by_folder.page(intake.counts(), self._parts.config.budgets)
            page = status.write(intake.result, ready, at_work, stuck, caps.reasons(), more)
        except SpoolError as error:
            _log.debug("status_failed", reason=str(error))
        else:
            fields["STATUS"] = line(page)
        if fields:
            self._parts.notify.send(**fields)
        self._write_in_folders()

    def _write_in_folders(self) -> None:
        """Write the status files in the folders, if they differ or are due; in a common inbox its leader does."""
        if not self._parts.team.leads():
            return
        at_work, stuck = map(_sources, (self._parts.jobs.at_work, self._parts.jobs.stuck))
        before = self._in_folders.problem
        self._in_folders.update(self._parts.status.state, at_work, stuck)
        if self._in_folders.problem != before:
            self._parts.status.change()


def _sources(jobs: Mapping[str, Key | None]) -> dict[str, str]:
    """Return the path of the prompt of each job, as far as it is known: ``*/`` is in the place of any folder."""
    return {
        job: "/".join("*" if part == ANYWHERE else part for part in key if part) + SUFFIX if key else ""
        for job, key in jobs.items()
    }
