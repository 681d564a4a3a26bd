"""``imagewatch gallery``: one page to look at what was made, what it cost, and what failed.

The page lies beside the outbox and never in it: what is in the folders of the protocol belongs to jobs, and other tools
move, sync and count it. Its thumbnails are in a folder beside it that has the page's name and ``_files`` at the end, as
browsers do when they save a page.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.durable import Disk, ours
from imagewatch.errors import SpoolError, UsageError
from imagewatch.gallery.jobs import Look, Reader, opened
from imagewatch.gallery.page import MARK, Page, page
from imagewatch.gallery.thumbnails import Thumbnails
from imagewatch.text import printable, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config import Config

_STAMP = re.compile(r"stamp-[0-9a-f]{16}\.svg")
_STAMP_CONTENT = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n'
_RESCAN = 30
"""Each so many looks at the folders' times one at everything."""
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

    Raises:
        UsageError: The page cannot be there.
    """

    def __init__(self, config: Config, output: str | None = None, *, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._outbox = config.outbox
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
        self._thumbnails = Thumbnails(self._disk, self._files, self._finish)
        self._look = Look()
        self._stamp = ""

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
        self._stamp = ""
        written = self.refresh(on_thumbnail)
        assert written
        return written

    def refresh(self, on_thumbnail: Callable[[int, int], None] = lambda *_: None) -> Written | None:
        """Write the page if it would not be the same as the last one; return None when it would.

        While the outbox is gone (a share that is away) the last page stays.
        """
        if self._look.jobs and not os.path.isdir(self._folders.outbox):
            return None
        look = self._reader.look()
        self._prepare()
        problems = self._thumbnails.make(look.sources, on_thumbnail)
        for picture in (picture for job in look.jobs for picture in (*job.pictures, *job.inputs)):
            if picture.thumb in problems:
                picture.problem, picture.thumb = picture.problem or problems[picture.thumb], ""
        files = os.path.basename(self._files)
        made = page(look.jobs, look.notes, title=self._title, files=files, written=time.time())
        self._look = look
        if made.stamp == self._stamp:
            return None
        self._put(made)
        self._thumbnails.prune(look.sources)
        count = sum(job.made for job in look.jobs)
        return Written(self.path, count, len(look.jobs) - count, look.notes)

    def outdated(self) -> bool:
        """Tell whether something came or went in the folders since the page was written."""
        return self._look.outdated()

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
            with open(opened(self.path), "rb") as file:  # a pipe would wait for its writer
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
        if new and self._outbox.folder_mode is not None:
            with ours(self._files, "set the mode"):
                os.chmod(self._files, self._outbox.folder_mode)

    def _put(self, made: Page) -> None:
        """Put a page out: its stamp first, then the page, and only then away with the older stamps.

        An open page looks for its own stamp; when it is gone, the newer page is there to be loaded.
        """
        for path, content in ((os.path.join(self._files, made.stamp), _STAMP_CONTENT), (self.path, made.content)):
            temporary = f"{self._files}/.{os.getpid()}.tmp"
            with self._disk.writing(path, temporary, mode=0o666) as file:
                file.write(content)
                self._finish(file.fileno())
        with ours(self._files, "list the folder"):
            names = os.listdir(self._files)
        for name in names:
            if _STAMP.fullmatch(name) and name != made.stamp:
                self._disk.unlink(os.path.join(self._files, name))
        self._stamp = made.stamp

    def _finish(self, descriptor: int) -> None:
        """Give a file the mode and group that published files have: it shows the same to the same people."""
        if self._outbox.file_mode is not None:
            os.fchmod(descriptor, self._outbox.file_mode)
        if self._outbox.group is not None:
            # Who is not in the group cannot give it away; fewer people can read the page then, not more.
            with contextlib.suppress(KeyError, PermissionError):
                os.fchown(descriptor, -1, grp.getgrnam(self._outbox.group).gr_gid)


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
