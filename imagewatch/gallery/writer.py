"""The page with its thumbnails: when it is due, and everything that is written for it."""

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
from imagewatch.gallery.thumbnails import Thumbnails
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import ours
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.permissions import Permissions
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.load import Config

_STAMP = re.compile(r"stamp-[0-9a-f]{16}\.svg")
_STAMP_CONTENT = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n'
_RESCAN = 30
"""Each so many looks at the folders' times one at everything."""
_SECONDS = 60.0
"""For thumbnails, before the page is written with those that there are."""
_WRITTEN = re.compile(rb'"written":(\d+)')
_ELSEWHERE = "name another place by --output"


@dataclass(frozen=True)
class Written:
    """What became of writing the page.

    Attributes:
        path: The page.
        made: Jobs in it that made pictures.
        failed: Jobs in it that did not.
        notes: What could not be read, in words.
    """

    path: str
    made: int
    failed: int
    notes: list[str]


class Gallery:
    """The page over the folders of a configuration.

    Args:
        config: Where the folders are, and who may read what is published.
        output: The page; without it ``gallery.html`` beside the outbox.
        disk: Our disk.
        patience: How long a picture may take to become small.
        seconds: For new thumbnails, before the page is written with those that there are.

    Raises:
        UsageError: The page cannot be there.
    """

    def __init__(
        self,
        config: Config,
        output: str | None = None,
        *,
        disk: Disk | None = None,
        patience: Patience | None = None,
        seconds: float = _SECONDS,
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
            raise UsageError(f"{printable(above)}: there is no such folder", hint=f"make it first, or {_ELSEWHERE}")
        self._reader = Reader(config.folders, above)
        self._thumbnails = Thumbnails(self._disk, self._files, self._permissions.apply, patience or Patience())
        self._seconds = seconds
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
            What it holds.

        Raises:
            SpoolError: It cannot be written, or there is no place for an outbox.
        """
        root = os.path.dirname(self._folders.outbox)
        if not os.path.isdir(root):
            hint = "check the path, and that it is mounted; the daemon makes its folders when it first starts"
            raise SpoolError(f"{printable(root)}: there is no such folder", path=root, hint=hint)
        self._stamp = ""  # what is there is compared, not what was there
        written = self._refreshed(on_thumbnail)
        while self._unfinished:
            written = self._refreshed(on_thumbnail)
        return written

    def refresh(self, on_thumbnail: Callable[[int, int], None] = lambda *_: None) -> Written | None:
        """Write the page if it would not be the same as the last one; return None when it would.

        While the outbox is gone (a share that is away) the last page stays.
        """
        if self._scan.jobs and not os.path.isdir(self._folders.outbox):
            return None
        before = self._stamp
        written = self._refreshed(on_thumbnail)
        return written if self._stamp != before else None

    def _refreshed(self, on_thumbnail: Callable[[int, int], None]) -> Written:
        """Make the page what it should be, with the thumbnails that can be made in time."""
        scan = self._reader.scan()
        self._prepare()
        problems = self._thumbnails.make(scan.sources, self._seconds, on_thumbnail)
        self._unfinished = "" in problems.values()
        for picture in (picture for job in scan.jobs for picture in (*job.pictures, *job.inputs)):
            if picture.thumb in problems:
                problem = problems[picture.thumb] or "its thumbnail is not made yet"
                picture.problem, picture.thumb = picture.problem or problem, ""
        self._scan = scan
        self._update(scan)
        count = sum(job.made for job in scan.jobs)
        return Written(self.path, count, len(scan.jobs) - count, scan.notes)

    def _update(self, scan: Scan) -> None:
        """Write the page, unless it would be the one that is there: other programs may pass on each new one."""

        def page_of(written: float) -> Page:
            return page(scan.jobs, scan.notes, title=self._title, files=os.path.basename(self._files), written=written)

        made = page_of(time.time())
        if made.stamp == self._stamp:
            return
        there = b"" if self._stamp else self._there()
        written = _WRITTEN.search(there)
        if not (written and page_of(int(written[1]) / 1000).content == there and self._has(made.stamp)):
            self._put(made)
        self._stamp = made.stamp
        self._thumbnails.prune(scan.sources)

    def _there(self) -> bytes:
        """Return the page that is there; nothing when there is none."""
        try:
            with open_file(self.path) as file:
                return file.read()
        except (OSError, ValueError):
            return b""

    def _has(self, stamp: str) -> bool:
        return os.path.isfile(os.path.join(self._files, stamp))

    def outdated(self) -> bool:
        """Tell whether something came or went in the folders since the page was written, or is still to be made."""
        return self._unfinished or self._scan.is_outdated()

    def _check(self, config: Config) -> None:
        """Refuse a place where the page could be taken for a job's file, or would replace a stranger's."""
        folders = config.folders
        for name in ("inbox", "outbox", "errors", "archive", "state"):
            place = os.path.realpath(getattr(folders, name))
            for mine in (self.path, self._files):
                inside = os.path.commonpath((mine, place)) in {mine, place}
                if getattr(folders, name) != "delete" and inside:
                    told = f"{printable(self.path)}: is in the folder {name}, where only the files of jobs may be"
                    raise UsageError(told, hint=_ELSEWHERE)
        try:
            with open_file(self.path) as file:  # a pipe would wait for its writer
                ours_already = file.read(len(MARK)) == MARK
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            ours_already = False
        if not ours_already:
            told = f"{printable(self.path)}: is there already, and no gallery"
            raise UsageError(told, hint=f"it stays as it is; {_ELSEWHERE}")

    def _prepare(self) -> None:
        if os.path.islink(self._files):
            raise SpoolError(f"{printable(self._files)}: is a link", path=self._files, hint="remove it")
        new = not os.path.isdir(self._files)
        try:
            self._disk.make_folder(self._files, mode=0o777)
        except SpoolError as error:
            if error.code in {errno.EACCES, errno.EPERM, errno.EROFS}:
                error.hint = _ELSEWHERE
            raise
        if not os.access(self._files, os.W_OK | os.X_OK, effective_ids=True):
            hint = f"remove it, it is made again: rm -r {shlex.quote(printable(self._files))}"
            told = f"{printable(self._files)}: belongs to another user, and this one may not write there"
            raise SpoolError(told, path=self._files, code=errno.EACCES, hint=hint)
        if new and self._permissions.folder_mode is not None:
            self._disk.set_mode(self._files, self._permissions.folder_mode)

    def _put(self, made: Page) -> None:
        """Put a page out: its stamp first, then the page, and only then away with the older stamps.

        An open page looks for its own stamp; when it is gone, the newer page is there to be loaded.
        """
        for path, content in ((os.path.join(self._files, made.stamp), _STAMP_CONTENT), (self.path, made.content)):
            temporary = f"{self._files}/.{os.getpid()}.tmp"
            with self._disk.writing(path, temporary, mode=0o666) as file:
                file.write(content)
                self._permissions.apply(file.fileno())
        with ours(self._files, "list the folder"):
            names = os.listdir(self._files)
        for name in names:
            if _STAMP.fullmatch(name) and name != made.stamp:
                self._disk.unlink(os.path.join(self._files, name))


def keep_fresh(
    gallery: Gallery, wait: Callable[[float], object], on_written: Callable[[Written], None], *, seconds: float = 2.0
) -> None:
    """Write the page again whenever something came or went; does not return.

    Looks at the folders' own times only, which costs nothing; and, as some network shares are careless with them, at
    everything once in a while.

    Args:
        gallery: The page.
        wait: Waits some seconds.
        on_written: Called with each new page.
        seconds: Between two looks.

    Raises:
        SpoolError: It cannot be written.
    """
    looks = 0
    while True:
        wait(seconds)
        looks += 1
        if (gallery.outdated() or looks % _RESCAN == 0) and (written := gallery.refresh()):
            on_written(written)
