"""Writes the status files in the folders: when, where, and with which mode.

Other people may write the folder that the files are in. So each file is written under a hidden name that no other user
can predict, and then renamed over what has its name: a link there is replaced and never followed. The files are
information only. If they cannot be written, the daemon logs it and continues.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.config.locate import others_above
from imagewatch.daemon.notice_content import Content
from imagewatch.daemon.notice_record import NoticeRecord
from imagewatch.protocol import notice
from imagewatch.protocol.notice_text import as_text
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.permissions import readable_mode, set_mode_and_group
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.daemon.parts import Parts
    from imagewatch.protocol.notice import Notice

_INTERVAL = 1.0
_BUSY_SECONDS, _IDLE_SECONDS = 300.0, 3600.0
"""When it is written again at the latest: while prompts wait, are in flight or are on hold, and otherwise."""
_TEMPORARY = ".iw-status."
_log = structlog.get_logger()


class FolderStatus:
    """Keeps the status files up to date.

    Args:
        parts: The daemon's parts.
        processor: Processor time of this thread, seconds.

    Attributes:
        problem: Why they could not be written the last time, or an empty string.
    """

    def __init__(self, parts: Parts, processor: Callable[[], float] = time.thread_time) -> None:
        self._parts = parts
        self._folder = parts.config.folders.notice
        # Not the daemon's own disk: its folders are below this one, and what is in them is reached from themselves.
        self._disk = Disk()
        self._content = Content(parts)
        self._record = NoticeRecord(parts.config.folders.state, parts.spool.disk)
        self._processor = processor
        self._last: Notice | None = None
        self._due, self._wall_due = 0.0, 0.0
        self._not_before = 0.0
        self._is_pending = False
        self._way = ""
        self.problem = ""

    def begin(self) -> None:
        """Remove the files that an earlier process has written in another folder."""
        self._record.begin(self._folder)

    @property
    def due(self) -> float | None:
        """Monotonic time at which they are to be written again, or None if they are not kept."""
        if not self._folder or (self._last is None and not self._is_pending):
            return None
        return self._not_before if self._is_pending else self._due

    def is_due(self) -> bool:
        """Return whether they are to be written again; a machine that slept is late by the wall clock."""
        due = self.due
        if due is None:
            return False
        return self._parts.now() >= due or (not self._is_pending and self._parts.clock() >= self._wall_due)

    def as_shown(self) -> dict[str, str | None] | None:
        """Return where they are and why they could not be written, for ``status.json``; None if they are not kept."""
        if not self._folder:
            return None
        return {"folder": printable(self._folder), "problem": printable(self.problem) or None}

    def update(self, state: str, in_flight: Mapping[str, str], stuck: Mapping[str, str]) -> None:
        """Write them if anything has changed or it is time to, but not too often.

        Args:
            state: The state of the daemon, as in ``status.json``.
            in_flight: Path of the prompt of each job at work, by job id.
            stuck: The same of each job that cannot finish for a reason of its own.
        """
        is_last = state in {"stopping", "stopped"}
        if not self._folder:
            return
        if self._parts.now() < self._not_before and not is_last:
            self._is_pending = True
            return
        self._is_pending = False
        is_due, began = self.is_due(), self._processor()
        content = self._content.make("stopped" if is_last else state, in_flight, stuck)
        if is_due or content != self._last:
            self._write(content)
        # As for ``status.json``: a hundredth of our time at most.
        self._not_before = self._parts.now() + max(_INTERVAL, 100 * (self._processor() - began))

    def _write(self, content: Notice) -> None:
        now, wall = self._parts.now(), self._parts.clock()
        is_busy = content.waiting.count or content.in_flight.count or content.holds
        seconds = _BUSY_SECONDS if is_busy else _IDLE_SECONDS
        self._due, self._wall_due = now + seconds, wall + seconds
        if content.state == "stopped":
            stopped_at = self._last.stopped_at if self._last and self._last.stopped_at else notice.at(wall)
            content = replace(content, stopped_at=stopped_at)
            page = replace(content, written_at=notice.at(wall))
        else:
            page = replace(content, written_at=notice.at(wall), next_writing_at=notice.at(wall + seconds))
        self._last = content
        problems, contents = [], {notice.JSON: notice.encode(page), notice.TEXT: as_text(page).encode()}
        for name, text in contents.items():
            try:
                self._replace(os.path.join(self._folder, name), text)
            except SpoolError as error:
                problems.append(error)
        if len(problems) < len(contents):
            self._record.written(self._way, contents)
        self._report(problems)

    def _report(self, problems: list[SpoolError]) -> None:
        before, self.problem = self.problem, "; ".join(map(str, problems))
        if self.problem:
            self._last = None  # tried again at the next change, or the next scan
        if self.problem and self.problem != before:
            _log.warning("status_failed", folder=self._folder, reason=self.problem, next=problems[0].hint)

    # On the disk

    def _replace(self, path: str, content: bytes) -> None:
        """Replace one of the files, whole for any reader.

        Raises:
            SpoolError: It cannot be written.
        """
        self._open()
        if self._disk.tops.is_folder(path):
            hint = "remove the folder that has the name of the status file"
            raise SpoolError(f"a folder is in the place of {path}", path=path, hint=hint)
        temporary = os.path.join(self._folder, _TEMPORARY + secrets.token_hex(8))
        try:
            self._disk.show(path, temporary, content, self._permit)
        except SpoolError as error:  # without the temporary name: a problem that lasts must have the same text
            message = str(error).replace(printable(temporary), printable(path))
            raise SpoolError(message, path=path, code=error.code, hint=error.hint) from error

    def _permit(self, descriptor: int) -> None:
        """Make it readable for those who can read what is published, or else for those who can list the inbox."""
        outbox = self._parts.config.outbox
        if outbox.file_mode is not None or outbox.group is not None:
            self._parts.spool.permissions.apply(descriptor)
            return
        tops = self._parts.spool.tops
        inbox = tops.folder(self._parts.spool.inbox).status()
        mode = readable_mode(inbox)
        with contextlib.suppress(OSError):
            others = tops.folder(self._parts.spool.outbox).status()
            mode |= readable_mode(others) if others.st_gid == inbox.st_gid else 0
        set_mode_and_group(descriptor, mode, inbox.st_gid)

    def _open(self) -> None:
        """Open the folder, and again if the administrator has replaced it.

        Raises:
            SpoolError: It is missing, or other users may have put a link in its place.
        """
        folder, tops = self._folder, self._disk.tops
        with disk_errors(folder, "open the folder"):
            if not self._way:
                self._disk.make_folder(folder, mode=0o777)
            elif not tops.is_replaced(folder):
                return
            real = os.path.realpath(folder)
            if self._way and real != self._way and others_above(folder):
                raise SpoolError(f"the folder points elsewhere now: {folder}", path=folder, hint="restart the daemon")
            if self._way:
                self._parts.spool.require_folders()  # a file system that was unmounted: nothing is written below it
            tops.open(folder)
            self._way = real
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed has left."""
        with contextlib.suppress(OSError, SpoolError):
            for name in self._disk.tops.names(self._folder, folders=False):
                if name.startswith(_TEMPORARY):
                    path = os.path.join(self._folder, name)
                    status = self._disk.tops.lstat(path)
                    if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
                        self._disk.unlink(path)
