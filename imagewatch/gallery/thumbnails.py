"""Thumbnails: small copies of images that are not trusted, kept in a folder beside the page.

A decoder gets only images of three formats that are complete by their structure, and no larger than those of a large
camera. It works in a separate process, for a bounded time; a failure becomes a reason on the page. A lasting reason is
kept like a thumbnail, or the same images would take the same time again at each run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from PIL import __version__ as pillow

from imagewatch import __version__
from imagewatch.gallery.decoder import LARGE, Decoder, NoThumbnail, Patience
from imagewatch.protocol.images import Image as Found
from imagewatch.protocol.images import inspect
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from imagewatch.gallery.folders import Source
    from imagewatch.system.disk import Disk

_MOST_PIXELS = {"image/png": 50_000_000, "image/jpeg": 50_000_000, "image/webp": 20_000_000}
"""More are not decoded. The endpoint's largest images have 17 million.

Measured, so many take up to 225 MB as PNG, 300 MB as JPEG (progressive; in CMYK 390 MB) and 310 MB as WebP, whose
decoder keeps four copies.
"""
_MOST_BYTES = 200_000_000
"""Larger files are not decoded: 50 million pixels take no more, even without compression."""
_LARGE_BYTES = 4 * LARGE
_MOST_THREADS = 4
_HOUR = 3600
_NAME = re.compile(r"([0-9a-f]{24})\.(webp|txt)")
_LEFT = re.compile(r"\.([0-9a-f]{24}\.(webp|txt)\.)?[0-9]+\.tmp")

_one_at_a_time = threading.Lock()
"""Held while a large image is decoded: there is memory for one."""


class Thumbnails:
    """A folder of thumbnails, which is a cache: all of it may be deleted at any time.

    Args:
        disk: The disk.
        folder: Where they are.
        finish: Called with the descriptor of each new file, to set mode and group.
        patience: How long an image may take.
    """

    def __init__(self, disk: Disk, folder: str, finish: Callable[[int], None], patience: Patience) -> None:
        self._disk = disk
        self._folder = folder
        self._finish = finish
        self._patience = patience
        self._failed: dict[str, str] = {}
        # Newer versions may decode more.
        self._versions = f"imagewatch {__version__}, Pillow {pillow}\n"

    def make(
        self, sources: Mapping[str, Source], seconds: float, on_made: Callable[[int, int], None]
    ) -> dict[str, str]:
        """Make the missing thumbnails, as far as there is time.

        Args:
            sources: For each name of a thumbnail its image.
            seconds: After this time no further one is begun.
            on_made: Called with the number of missing ones that are finished, and with their total.

        Returns:
            The reason for each one that cannot be made; empty for one that was not begun.

        Raises:
            SpoolError: The folder cannot be written.
        """
        # Nothing here is synced: a power failure can leave an empty file.
        there = {name for name, status in self._listed() if status.st_size}
        missing = [name for name in sources if name not in there]
        self._failed = {name: self._failed.get(name) or self._recall(name, there) for name in missing}
        missing = [name for name in missing if not self._failed[name]]
        failed = {name: reason for name, reason in self._failed.items() if reason}
        for name, error in self._make(missing, sources, seconds, on_made):
            failed[name] = str(error)
            if error.lasting:
                self._failed[name] = str(error)
        return failed

    def _make(
        self, missing: list[str], sources: Mapping[str, Source], seconds: float, on_made: Callable[[int, int], None]
    ) -> Iterator[tuple[str, NoThumbnail]]:
        """Make thumbnails; yield why some were not made."""
        deadline = time.monotonic() + seconds
        count = min(os.cpu_count() or 1, _MOST_THREADS, max(len(missing), 1))
        free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()

        def attempt(name: str) -> NoThumbnail | None:
            if time.monotonic() > deadline and name != missing[0]:
                return NoThumbnail("", lasting=False)
            decoder = free.get()
            try:
                return self._try(name, sources[name], decoder)
            finally:
                free.put(decoder)

        with contextlib.ExitStack() as stack:
            for _ in range(count):
                free.put(stack.enter_context(contextlib.closing(Decoder(self._patience))))
            pool = ThreadPoolExecutor(count)
            stack.callback(pool.shutdown, cancel_futures=True)
            for done, (name, error) in enumerate(zip(missing, pool.map(attempt, missing), strict=True)):
                if error is not None:
                    yield name, error
                if error is None or str(error):
                    on_made(done + 1, len(missing))

    def prune(self, keep: Collection[str]) -> None:
        """Remove files that belong to no image on the page, and temporary files of a run that was killed."""
        for name, status in self._listed():
            left = _LEFT.fullmatch(name) and status.st_mtime < time.time() - _HOUR  # a younger one may be in use
            known = _NAME.fullmatch(name)
            if left or (known and f"{known[1]}.webp" not in keep):
                self._disk.unlink(os.path.join(self._folder, name))

    def _listed(self) -> Iterator[tuple[str, os.stat_result]]:
        with disk_errors(self._folder, "list the folder"):
            names = os.listdir(self._folder)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another gallery may work here, too
                yield name, os.lstat(os.path.join(self._folder, name))

    def _try(self, name: str, source: Source, decoder: Decoder) -> NoThumbnail | None:
        """Make a thumbnail; return why there is none, or None."""
        try:
            content = thumbnail(source, decoder)
        except NoThumbnail as error:
            if error.lasting:
                self._put(_reason_file(name), (self._versions + str(error)).encode("utf-8", "replace"))
            return error
        self._put(name, content)
        return None

    def _put(self, name: str, content: bytes) -> None:
        target = os.path.join(self._folder, name)
        temporary = os.path.join(self._folder, f".{name}.{os.getpid()}.tmp")
        self._disk.unlink(temporary)
        with closing(self._disk.create(temporary, 0o666), target) as file, disk_errors(target, "write"):
            file.write(content)
            self._finish(file.fileno())
        self._disk.replace(temporary, target)

    def _recall(self, name: str, there: Collection[str]) -> str:
        """Return why an earlier run could not make a thumbnail; nothing if that may have changed."""
        if _reason_file(name) not in there:
            return ""
        try:
            with open_file(os.path.join(self._folder, _reason_file(name))) as file:
                text = file.read(1000).decode("utf-8", "replace")
        except (OSError, ValueError):
            return ""
        return printable(text.removeprefix(self._versions), 300) if text.startswith(self._versions) else ""


def _reason_file(name: str) -> str:
    """Return the name of the file that says why there is no thumbnail."""
    return name.removesuffix(".webp") + ".txt"


def thumbnail(source: Source, decoder: Decoder) -> bytes:
    """Return a small WebP of an image.

    Raises:
        NoThumbnail: It cannot be read, is no complete image, is too large, or takes too long.
    """
    try:
        with source.open() as file:
            size = os.fstat(file.fileno()).st_size
            found = _bounded(file, size)
            large = found.width * found.height > LARGE or size > _LARGE_BYTES
            with _one_at_a_time if large else contextlib.nullcontext():
                return decoder.shrink(file, _MOST_PIXELS[found.mime])
    except OSError as error:
        raise NoThumbnail(f"cannot be read: {printable(error.strerror or str(error), 200)}", lasting=False) from None
    except ValueError as error:
        raise NoThumbnail(str(error), lasting=False) from None


def _bounded(file: IO[bytes], size: int) -> Found:
    """Inspect an image; refuse one that no decoder should get."""
    if size > _MOST_BYTES:
        raise NoThumbnail(f"too large for a thumbnail: {size / 1e6:,.0f} MB")
    found = inspect(file)
    if found is None:
        raise NoThumbnail("not a PNG, JPEG or WebP")
    if found.width * found.height > _MOST_PIXELS[found.mime]:
        raise NoThumbnail(f"too large for a thumbnail: {found.width} x {found.height}")
    if found.problem:
        raise NoThumbnail(found.problem)
    return found
