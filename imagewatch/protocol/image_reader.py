"""Reads a file of an image forward, and what the walks through PNG, JPEG and WebP share."""

from __future__ import annotations

import contextlib
import re
import zlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

Fault = Literal["", "damage", "size", "form"]
"""What sort of problem an image has: it is damaged, it has too many pixels, or few programs can read its form."""

MAX_PIXELS = 100_000_000
"""More than this, by the header, is a problem: a few bytes may not claim gigabytes of pixels."""

PIECE = 256 * 1024
_MAX_STEPS = 250_000  # chunks or segments; with the usual 8 KiB in each this is a PNG of 2 GB

EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
MOST_EXIF = 64 * 1024
"""Bytes of EXIF data that are read; a JPEG cannot have more in one piece."""

# As libjpeg does: whatever is no marker is passed over until there is one. FF before it are fill bytes.
_MARKER = re.compile(rb"\xff[^\x00\xff]")

_STUFFED, _TEM, _FILL = 0x00, 0x01, 0xFF
STANDALONE = frozenset({_TEM, *range(0xD0, 0xD8)})

# Inside a scan FF is data when 00 follows, and RSTn and TEM do not end it. With every byte mapped to
# its class, the end of a scan is one `find` whatever the data is; a loop over each FF would be slow
# exactly for the files that are made to be slow.
_GOES_ON, _ENDS = b"\x00", b"\x01"
_CLASSES = bytes(
    _FILL if code == _FILL else (_GOES_ON if code in {_STUFFED, *STANDALONE} else _ENDS)[0] for code in range(256)
)
_SCAN_END = bytes([_FILL]) + _ENDS


class BrokenError(Exception):
    """The walk found a fault; the message is the problem as shown to people."""

    fault: Fault = "damage"


class CutError(BrokenError):
    """The file ended where the walk needed more."""


class SizeError(BrokenError):
    """There are too many pixels."""

    fault = "size"


class FormError(BrokenError):
    """The file may be as it was made, but few programs can read it, or none."""

    fault = "form"


class Header:
    """What the headers contain, as soon as they are read, also if the walk fails later."""

    def __init__(self) -> None:
        self.width = 0
        self.height = 0
        self.known = False
        self.orientation = 1
        self.has_credentials = False  # content credentials (C2PA); whether they are valid is not checked
        self.components: dict[int, int] = {}  # of a JPEG: the number of the quantization table of each color channel
        self.tables: set[int] = set()  # of a JPEG: the quantization tables that were there

    def set(self, width: int, height: int) -> None:
        """Take the dimensions, or refuse them and end the walk.

        Raises:
            BrokenError: There are no pixels.
            SizeError: There are too many.
        """
        self.width, self.height, self.known = width, height, True
        shown = f"{width}×{height} pixels"  # noqa: RUF001  read by people
        if not width or not height:
            raise BrokenError(f"{shown} is not an image")
        if width * height > MAX_PIXELS:
            raise SizeError(f"{shown} is more than {MAX_PIXELS:,}")


class Reader:
    """Reads a file forward through one buffer, each byte at most once.

    Callers ask for a few bytes at a time; long stretches go through `crc`,
    `skip_to` and `to_scan_end`, which never hold more than a buffer.
    """

    def __init__(self, file: IO[bytes], update: Callable[[bytes], object] | None) -> None:
        self.size = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self._update = update
        self._steps = 0
        self._piece = b""
        self._classes = b""  # of the whole piece, made once: many short scans must not map it again
        self._start = 0  # where in the file the piece begins
        self._at = 0  # the next byte in the piece

    @property
    def position(self) -> int:
        """The place in the file of the next byte."""
        return self._start + self._at

    def _more(self) -> None:
        """Read on and keep what is not consumed yet."""
        rest = self._piece[self._at :]
        self._start += self._at
        self._at = 0
        self._piece = rest
        self._classes = b""
        fresh = self._file.read(PIECE)
        if not fresh:
            raise CutError
        if self._update is not None:
            self._update(fresh)
        self._piece = rest + fresh if rest else fresh

    def head(self, count: int) -> bytes:
        """Return the first bytes without consuming them; fewer when the file is shorter."""
        try:
            while len(self._piece) < count:
                self._more()
        except CutError:
            pass
        return self._piece[:count]

    def step(self) -> None:
        """Count one chunk or segment.

        Raises:
            FormError: There are more than any real image has.
        """
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise FormError(f"made of more than {_MAX_STEPS:,} parts")

    def take(self, count: int) -> bytes:
        """Return and consume exactly this many bytes."""
        while len(self._piece) - self._at < count:
            self._more()
        self._at += count
        return self._piece[self._at - count : self._at]

    def skip_to(self, position: int) -> None:
        """Go forward to a place in the file; only its end is checked, nothing is read that is not needed."""
        if position > self.size:
            raise CutError
        while self._update is not None and position > self._start + len(self._piece):
            self._at = len(self._piece)
            self._more()
        if position <= self._start + len(self._piece):
            self._at = position - self._start
            return
        self._file.seek(position)
        self._piece = self._classes = b""
        self._start, self._at = position, 0

    def crc(self, count: int, value: int) -> int:
        """Consume this many bytes and return the CRC-32 that continues ``value`` over them."""
        if self.position + count > self.size:
            raise CutError  # raised here: no need to read gigabytes up to the missing end
        while count:
            if self._at == len(self._piece):
                self._more()
            with memoryview(self._piece) as whole, whole[self._at : self._at + count] as part:
                value = zlib.crc32(part, value)
                self._at += len(part)
                count -= len(part)
        return value

    def rest(self) -> None:
        """Read the rest of the file for a caller who hashes all of it."""
        with contextlib.suppress(CutError):  # it has become shorter
            while self._update is not None and self._start + len(self._piece) < self.size:
                self._at = len(self._piece)
                self._more()

    def to_marker(self, *, anywhere: bool) -> None:
        """Go to the FF of the next marker of a JPEG.

        Args:
            anywhere: Pass over whatever is none; else only over fill bytes.

        Raises:
            BrokenError: There is something else.
        """
        start = self.position
        while not (found := _MARKER.search(self._piece, self._at)):
            if not anywhere and self._piece[self._at :].strip(b"\xff"):
                break
            # An FF at the very end is checked together with the byte that follows it.
            self._at = max(self._at, len(self._piece) - self._piece.endswith(b"\xff"))
            self._more()
        if not anywhere and (not found or self._piece[self._at : found.start()].strip(b"\xff")):
            raise BrokenError(f"no marker at byte {start:,}, where a segment should begin")
        self._at = found.start() if found else self._at

    def to_scan_end(self) -> None:
        """Go to the FF of the marker that ends the entropy-coded data."""
        while True:
            if not self._classes:
                self._classes = self._piece.translate(_CLASSES)
            found = self._classes.find(_SCAN_END, self._at)
            if found >= 0:
                self._at = found
                return
            # An FF at the very end is checked together with the byte that follows it.
            self._at = max(self._at, len(self._piece) - self._piece.endswith(b"\xff"))
            self._more()


def orientation_of(exif: bytes) -> int:
    """Return the orientation from EXIF data, 1 to 8; 1 where there is none or it cannot be read."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(at: int, count: int) -> int:
        found = exif[at : at + count]
        return int.from_bytes(found, order) if len(found) == count else 0

    first = number(4, 4)
    for entry in range(min(number(first, 2), 1000)):
        at = first + 2 + 12 * entry
        if number(at, 2) == _ORIENTATION:
            found = number(at + 8, 2)
            return found if found in range(1, 9) else 1
    return 1
