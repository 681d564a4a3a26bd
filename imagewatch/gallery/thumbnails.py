"""Thumbnails: small copies of pictures that nobody has vouched for, kept in a folder beside the page.

Pillow decodes them, so what it is given is bounded first: only three formats, whole by their structure, with no more
pixels than a large camera makes. Whatever it still raises becomes a reason on the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from imagewatch import memory
from imagewatch.durable import Disk, closing, ours
from imagewatch.gallery.jobs import opened
from imagewatch.images import Image as Found
from imagewatch.images import inspect
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from PIL.Image import Image as Picture

SIDE = 320
"""Longest side, pixels."""
_MOST_PIXELS = {"image/png": 50_000_000, "image/jpeg": 50_000_000, "image/webp": 20_000_000}
"""More are not decoded. The endpoint's largest pictures have 17 million.

Measured, so many take up to 225 MB as PNG, 300 MB as JPEG (progressive; in CMYK 390 MB) and 310 MB as WebP, whose
decoder keeps four copies.
"""
_LARGE = 4_000_000
"""Of pictures with more pixels only one is decoded at a time."""
_STRIP = 2_000_000
"""So many pixels of a large picture are converted at a time, as each conversion is a copy of four bytes for a pixel."""
_GAP = 1.25
"""How much larger a picture is first made by the quick way: a third less time, and no difference to be seen."""
_MOST_THREADS = 4
_HOUR = 3600
_NAME = re.compile(r"[0-9a-f]{24}\.webp")
_LEFT = re.compile(r"\.[0-9a-f]{24}\.webp\.[0-9]+\.tmp")


_one_at_a_time = threading.Lock()


class Unseen(Exception):  # noqa: N818  it reads as what it says
    """There is no thumbnail of this; the message says why."""


class Thumbnails:
    """A folder of thumbnails, which is a cache: all of it may be deleted at any time.

    Args:
        disk: Our disk.
        folder: Where they are.
        finish: Called with the descriptor of each new file, to set mode and group.
    """

    def __init__(self, disk: Disk, folder: str, finish: Callable[[int], None]) -> None:
        self._disk = disk
        self._folder = folder
        self._finish = finish
        self._failed: dict[str, str] = {}

    def make(self, sources: Mapping[str, str], on_made: Callable[[int, int], None]) -> dict[str, str]:
        """Make what is missing.

        Args:
            sources: For each name of a thumbnail the path of its picture.
            on_made: Called with how many of how many that were missing have been looked at.

        Returns:
            For each one that cannot be made, why.

        Raises:
            SpoolError: The folder cannot be written.
        """
        # Nothing here was synced: a power cut can leave a name without content.
        there = {name for name, status in self._listed() if status.st_size}
        missing = [name for name in sources if name not in there and name not in self._failed]
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS))
        try:
            for done, (name, problem) in enumerate(
                pool.map(lambda name: (name, self._try(name, sources[name])), missing)
            ):
                if problem:
                    self._failed[name] = problem
                on_made(done + 1, len(missing))
        finally:
            pool.shutdown(cancel_futures=True)
        self._failed = {name: problem for name, problem in self._failed.items() if name in sources}
        return self._failed

    def prune(self, keep: Collection[str]) -> None:
        """Remove the thumbnails that no page shows any more, and what a run that was killed left half written."""
        for name, status in self._listed():
            left = _LEFT.fullmatch(name) and status.st_mtime < time.time() - _HOUR  # a younger one may be at work
            if left or (_NAME.fullmatch(name) and name not in keep):
                self._disk.unlink(os.path.join(self._folder, name))

    def _listed(self) -> Iterator[tuple[str, os.stat_result]]:
        with ours(self._folder, "list the folder"):
            names = os.listdir(self._folder)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another gallery is at work here, too
                yield name, os.lstat(os.path.join(self._folder, name))

    def _try(self, name: str, path: str) -> str:
        try:
            content = thumbnail(path)
        except Unseen as error:
            return str(error)
        target = os.path.join(self._folder, name)
        temporary = os.path.join(self._folder, f".{name}.{os.getpid()}.tmp")
        self._disk.unlink(temporary)
        with closing(self._disk.create(temporary, 0o666), target) as file, ours(target, "write"):
            file.write(content)
            self._finish(file.fileno())
        self._disk.replace(temporary, target)
        return ""


def thumbnail(path: str) -> bytes:
    """Return a small WebP of a picture.

    Raises:
        Unseen: It cannot be read, is no whole picture, or is too large.
    """
    try:
        with open(opened(path), "rb") as file:
            found = _bounded(inspect(file))
            file.seek(0)
            with _alone() if found.width * found.height > _LARGE else contextlib.nullcontext():
                return _shrunk(file, _MOST_PIXELS[found.mime])
    except Unseen:
        raise
    except OSError as error:
        raise Unseen(f"cannot be read: {printable(error.strerror or str(error), 200)}") from None
    except Exception as error:  # noqa: BLE001  a decoder may raise anything at all on bytes like these
        raise Unseen(f"cannot be decoded: {printable(str(error), 200)}") from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other large picture is at work; give its memory back, which the C library keeps for each thread."""
    with _one_at_a_time:
        try:
            yield
        finally:
            memory.give_back()


def _bounded(found: Found | None) -> Found:
    """Return what a picture is; refuse what no decoder should be given."""
    if found is None:
        raise Unseen("not a PNG, JPEG or WebP")
    if found.width * found.height > _MOST_PIXELS[found.mime]:
        raise Unseen(f"too large for a thumbnail: {found.width} x {found.height}")
    if found.problem:
        raise Unseen(found.problem)
    return found


def _shrunk(file: IO[bytes], most_pixels: int) -> bytes:
    from PIL import Image, ImageOps  # noqa: PLC0415  only this command needs it

    # Closing, as its own end closes no more than the file, and an error would keep the pixels.
    with contextlib.closing(Image.open(file, formats=("PNG", "JPEG", "WEBP"))) as image:
        if image.width * image.height > most_pixels:
            raise Unseen("its headers contradict each other")
        mode = "RGBA" if image.has_transparency_data else "RGB"
        times = _times(image)
        image.draft(None, (max(image.width // times, 1), max(image.height // times, 1)))  # a JPEG is decoded smaller
        small = _smaller(image, mode)
        small.thumbnail((SIDE, SIDE), reducing_gap=_GAP)
        small = ImageOps.exif_transpose(small)
        out = io.BytesIO()
        # No metadata: a camera's may say where somebody lives.
        small.save(out, "WEBP", quality=80, method=2, exif=b"", icc_profile=None, xmp=b"")
        return out.getvalue()


def _times(image: Picture) -> int:
    """Return how many times smaller a picture may be made by the quick way."""
    return max(int(max(image.size) / (SIDE * _GAP)), 1)


def _smaller(image: Picture, mode: str) -> Picture:
    """Return a picture in a mode; a large one strip by strip, and smaller: also transparency is a copy."""
    from PIL import Image  # noqa: PLC0415

    width, height = image.size
    if width * height <= _LARGE:
        return image if image.mode == mode else image.convert(mode)
    times = _times(image)
    # Whole times: so each strip becomes what it would be as a part of the whole.
    rows = max(_STRIP // (width * times), 1) * times
    small = Image.new(mode, (-(-width // times), -(-height // times)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert(mode)
        small.paste(strip.reduce(times), (0, top // times))
    small.info["exif"] = image.getexif().tobytes()  # how it is to be turned
    return small
