"""Is this a whole PNG, JPEG or WebP, and how large: decided from the bytes, without decoding a pixel.

Both the images that people drop and those that the API returns come from outside, so no decoder opens them here. The
container is walked from end to end. That finds what happens to files in practice: a file cut short, a flipped byte, an
HTML page under the name ``cat.png``. The header bounds the number of pixels. What is inside the compressed data is not
checked. One buffer of 256 KiB serves any file, each byte is read once, and the number of steps in Python is bounded:
a hostile file costs no more than a normal file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.protocol.image_kinds import SNIFF_BYTES, Kind, sniff
from imagewatch.protocol.image_reader import BrokenError, Fault, Header, Reader
from imagewatch.protocol.jpeg import walk_jpeg
from imagewatch.protocol.png import walk_png
from imagewatch.protocol.webp import walk_webp

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

_CUT: dict[Kind, str] = {
    "png": "cut short: no IEND chunk",
    "jpeg": "cut short: no EOI marker",
    "webp": "cut short",
}
_MIMES: dict[Kind, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_EXTENSIONS: dict[Kind, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_WALKS: dict[Kind, Callable[[Reader, Header], None]] = {"png": walk_png, "jpeg": walk_jpeg, "webp": walk_webp}


@dataclass(frozen=True)
class Image:
    """What the bytes of an image show.

    Attributes:
        kind: By content, never by name.
        width: In pixels, from the header; 0 when the header could not be read.
        height: Likewise.
        problem: Empty when structurally whole, else what is wrong.
        fault: What sort of problem that is.
        orientation: How it is to be turned when it is shown, 1 to 8, by its EXIF data; 1 is not at all.
        has_credentials: Whether there are content credentials (C2PA) in the file. They are not checked.
    """

    kind: Kind
    width: int
    height: int
    problem: str
    fault: Fault = field(default="", compare=False)
    orientation: int = field(default=1, compare=False)
    has_credentials: bool = field(default=False, compare=False)

    @property
    def mime(self) -> str:
        """The media type, e.g. ``image/jpeg``."""
        return _MIMES[self.kind]

    @property
    def extension(self) -> str:
        """The usual file name suffix without the dot: ``png``, ``jpg`` or ``webp``."""
        return _EXTENSIONS[self.kind]


def inspect(file: IO[bytes], update: Callable[[bytes], object] | None = None) -> Image | None:
    """Check a file by its bytes.

    Args:
        file: Open for reading in binary and seekable; it is read from its start, and left
            at any position.
        update: Called with all its bytes in order, to hash them in the same pass; that of a ``hashlib`` object.

    Returns:
        What was found, with the first problem, or None when it is neither PNG nor JPEG nor WebP.

    Raises:
        OSError: Reading failed.
    """
    reader = Reader(file, update)
    kind = sniff(reader.head(SNIFF_BYTES))
    image = None if kind is None else _judged(reader, kind)
    reader.rest()
    return image


def _judged(reader: Reader, kind: Kind) -> Image:
    header = Header()
    problem = ""
    fault: Fault = ""
    try:
        _WALKS[kind](reader, header)
    except BrokenError as broken:
        problem, fault = str(broken) or _CUT[kind], broken.fault
    return Image(kind, header.width, header.height, problem, fault, header.orientation, header.has_credentials)
