"""The page and its thumbnails: when they must be written, and everything that is written for them."""

from __future__ import annotations

import errno
import os
import re
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.gallery import rights
from imagewatch.gallery.decoder import Patience
from imagewatch.gallery.folders import Scan
from imagewatch.gallery.jobs import Reader
from imagewatch.gallery.page import MARK, Page, page
from imagewatch.gallery.status import status_of
from imagewatch.gallery.thumbnails import Thumbnails
from imagewatch.protocol import notice
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import MISSING, SpoolError, UsageError
from imagewatch.system.permissions import Permissions
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config

_STAMP = re.compile(r"stamp-[0-9a-f]{16}\.svg")
_STAMP_CONTENT = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n'
_RESCAN = 30
"""After so many checks of the folders' times, everything is read."""
_SECONDS = 60.0
"""For thumbnails; after that the page is written with those that are finished."""
_WRITTEN = re.compile(rb'"written":(\d+)')
_ELSEWHERE = "choose another place with --output"


@dataclass(frozen=True)
class Written:
    """A page that was written.

    Attributes:
        path: The page.
        completed: Completed jobs on it.
        failed: Failed jobs on it.
        notes: What could not be read, in words.
    """

    path: str
    completed: int
    failed: int
    notes: list[str]


class Gallery:
    """The page about the folders of a configuration.

    Args:
        config: The folders, and mode and group of published files.
        output: The page; without it ``gallery.html`` beside the outbox.
        disk: The local disk.
        patience: How long one thumbnail may take.
        seconds: For new thumbnails; after that the page is written with those that are finished.
        clock: Wall-clock time, seconds since the epoch.

    Raises:
        UsageError: The page cannot be written at this place.
    """

    def __init__(
        self,
        config: Config,
        output: str | None = None,
        *,
        disk: Disk | None = None,
        patience: Patience | None = None,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._disk = disk or Disk()
        outbox = config.outbox
        self._permissions = Permissions(outbox.file_mode, outbox.folder_mode, outbox.group, is_strict=False)
        self._folders = config.folders
        path = os.path.abspath(output or os.path.join(os.path.dirname(config.folders.outbox), "gallery.html"))
        above = os.path.realpath(os.path.dirname(path))
        self.path = os.path.join(above, os.path.basename(path))
        self._files = os.path.splitext(self.path)[0] + "_files"
        self._title = whole(os.path.basename(os.path.dirname(config.folders.outbox))) or "imagewatch"
        self._check(config)
        if output and not os.path.isdir(above):
            raise UsageError(f"no such folder: {printable(above)}", hint=f"create it first, or {_ELSEWHERE}")
        self._reader = Reader(config.folders, above)
        self._thumbnails = Thumbnails(self._disk, self._files, self._permissions.apply, patience or Patience())
        self._seconds = seconds
        self._clock = clock
        self._status_folder = config.folders.notice
        self._unfinished = False
        self._scan = Scan()
        self._stamp = ""

    def step_down(self) -> None:
        """If this is root, work with the rights of the owner of the page's folder from now on; see ``rights``."""
        rights.step_down(os.path.dirname(self.path), self._folders.outbox)

    def write(self, on_thumbnail: Callable[[int, int], None] = lambda *_: None) -> Written:
        """Write the page.

        Args:
            on_thumbnail: Called with how many of how many new thumbnails there are.

        Returns:
            What was written.

        Raises:
            SpoolError: It cannot be written, or the watched folder is missing.
        """
        root = os.path.dirname(self._folders.outbox)
        if not os.path.isdir(root):
            raise SpoolError(f"no such folder: {printable(root)}", path=root, hint=MISSING)
        self._stamp = ""  # compare with the page on disk, not with the last one of this process
        written = self._refreshed(on_thumbnail)
        while self._unfinished:
            written = self._refreshed(on_thumbnail)
        return written

    def refresh(self, on_thumbnail: Callable[[int, int], None] = lambda *_: None) -> Written | None:
        """Write the page if it has changed; return None if it has not.

        While the outbox is missing (a share that is not mounted) the last page stays.
        """
        if self._scan.jobs and not os.path.isdir(self._folders.outbox):
            return None
        before = self._stamp
        written = self._refreshed(on_thumbnail)
        return written if self._stamp != before else None

    def _refreshed(self, on_thumbnail: Callable[[int, int], None]) -> Written:
        """Update the page, with the thumbnails that can be made in time."""
        scan = self._reader.scan()
        self._read_status(scan)
        self._prepare()
        problems = self._thumbnails.make(scan.sources, self._seconds, on_thumbnail)
        self._unfinished = "" in problems.values()
        for image in (image for job in scan.jobs for image in (*job.images, *job.inputs)):
            if image.thumb in problems:
                problem = problems[image.thumb] or "its thumbnail is not created yet"
                image.problem, image.thumb = image.problem or problem, ""
        self._scan = scan
        self._update(scan)
        count = sum(job.completed for job in scan.jobs)
        return Written(self.path, count, len(scan.jobs) - count, scan.notes)

    def _read_status(self, scan: Scan) -> None:
        """Read what the daemon reports, if it has a folder for that."""
        if self._status_folder:
            scan.keep_time(os.path.join(self._status_folder, notice.JSON))
            scan.status = status_of(notice.read(self._status_folder), self._clock())

    def _update(self, scan: Scan) -> None:
        """Write the page unless it is the one on disk: other programs may copy each new file."""

        def page_of(written: float) -> Page:
            files = os.path.basename(self._files)
            return page(scan.jobs, scan.notes, title=self._title, files=files, written=written, status=scan.status)

        new = page_of(self._clock())
        if new.stamp == self._stamp:
            return
        there = b"" if self._stamp else self._there()
        written = _WRITTEN.search(there)
        if not (written and page_of(int(written[1]) / 1000).content == there and self._has(new.stamp)):
            self._put(new)
        self._stamp = new.stamp
        self._thumbnails.prune(scan.sources)

    def _there(self) -> bytes:
        """Return the page on disk; nothing if there is none."""
        try:
            with open_file(self.path) as file:
                return file.read()
        except (OSError, ValueError):
            return b""

    def _has(self, stamp: str) -> bool:
        return os.path.isfile(os.path.join(self._files, stamp))

    def outdated(self) -> bool:
        """Return whether files or the status changed since the page was written, or thumbnails are still missing."""
        return self._unfinished or self._scan.is_outdated()

    def _check(self, config: Config) -> None:
        """Refuse a place where the page could be taken for a job's file, or would replace another file."""
        folders = config.folders
        for name in ("inbox", "outbox", "errors", "archive", "state"):
            place = os.path.realpath(getattr(folders, name))
            for mine in (self.path, self._files):
                inside = os.path.commonpath((mine, place)) in {mine, place}
                if getattr(folders, name) != "delete" and inside:
                    message = f"the page may not be in the folder {name}: {printable(self.path)}"
                    raise UsageError(message, hint=_ELSEWHERE)
        try:
            with open_file(self.path) as file:  # not a pipe, which would wait for its writer
                ours_already = file.read(len(MARK)) == MARK
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            ours_already = False
        if not ours_already:
            message = f"the file already exists and is not a gallery: {printable(self.path)}"
            raise UsageError(message, hint=f"it was not changed; {_ELSEWHERE}")

    def _prepare(self) -> None:
        if os.path.islink(self._files):
            raise SpoolError(
                f"a link is where a folder should be: {printable(self._files)}", path=self._files, hint="remove it"
            )
        new = not os.path.isdir(self._files)
        try:
            self._disk.make_folder(self._files, mode=0o777)
        except SpoolError as error:
            if error.code in {errno.EACCES, errno.EPERM, errno.EROFS}:
                error.hint = _ELSEWHERE
            raise
        if not os.access(self._files, os.W_OK | os.X_OK, effective_ids=True):
            hint = f"remove the folder, which is created again: rm -r {shlex.quote(printable(self._files))}"
            message = f"permission denied: {printable(self._files)}"
            raise SpoolError(message, path=self._files, code=errno.EACCES, hint=hint)
        if new and self._permissions.folder_mode is not None:
            self._disk.set_mode(self._files, self._permissions.folder_mode)

    def _put(self, new: Page) -> None:
        """Write a page: its stamp first, then the page, and only then remove the older stamps.

        An open page checks for its own stamp; when that is missing, the newer page can be loaded.
        """
        for path, content in ((os.path.join(self._files, new.stamp), _STAMP_CONTENT), (self.path, new.content)):
            temporary = f"{self._files}/.{os.getpid()}.tmp"
            with self._disk.writing(path, temporary, mode=0o666) as file:
                file.write(content)
                self._permissions.apply(file.fileno())
        with disk_errors(self._files, "list the folder"):
            names = os.listdir(self._files)
        for name in names:
            if _STAMP.fullmatch(name) and name != new.stamp:
                self._disk.unlink(os.path.join(self._files, name))


def keep_fresh(
    gallery: Gallery, wait: Callable[[float], object], on_written: Callable[[Written], None], *, seconds: float = 2.0
) -> None:
    """Write the page again whenever files were added or removed, or the daemon's status changed; does not return.

    It checks only the times of the folders and of the status, which costs nothing. As some network shares do not update
    them, and a daemon that has died writes no status, it reads everything after every 30 checks.

    Args:
        gallery: The page.
        wait: Waits some seconds.
        on_written: Called with each new page.
        seconds: Between two checks.

    Raises:
        SpoolError: It cannot be written.
    """
    checks = 0
    while True:
        wait(seconds)
        checks += 1
        if (gallery.outdated() or checks % _RESCAN == 0) and (written := gallery.refresh()):
            on_written(written)
