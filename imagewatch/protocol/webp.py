"""Walks through a WebP."""

from __future__ import annotations

import re
import struct

from imagewatch.protocol.image_reader import EXIF, MOST_EXIF, PIECE, BrokenError, Header, Reader, orientation_of

_WEBP_FIRST = frozenset({b"VP8 ", b"VP8L", b"VP8X"})
_WEBP_IMAGES = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_CREDENTIALS = b"C2PA"
_PRINTABLE = re.compile(rb"[ -~]{4}")
_WEBP_HEADER = 16  # the longest chunk header that is read (ANMF); the others need 10 and 5 bytes


def walk_webp(reader: Reader, header: Header) -> None:
    """Walk the chunks of a WebP to the length in its RIFF header; the file may be longer."""
    end = 8 + int.from_bytes(reader.take(12)[4:8], "little")
    if end > reader.size:
        raise BrokenError(f"cut short: {reader.size:,} of {end:,} bytes")
    pixels = False
    while reader.position < end:
        reader.step()
        if end - reader.position < 8:  # noqa: PLR2004  name and length
            raise BrokenError("extra bytes after the last chunk")
        name, length = struct.unpack("<4sI", reader.take(8))
        after = reader.position + length
        if after > end:
            raise BrokenError("a chunk is longer than the length in the header")
        if not _PRINTABLE.fullmatch(name):
            raise BrokenError("a chunk has an invalid name")
        if not header.known and name not in _WEBP_FIRST:
            raise BrokenError("does not begin with a VP8, VP8L or VP8X chunk")
        _read_webp_chunk(reader, header, name, length)
        pixels = pixels or name in _WEBP_IMAGES
        # Chunks are padded to even lengths; some writers leave the last pad byte out.
        reader.skip_to(min(after + length % 2, end))
    if not pixels:
        raise BrokenError("no pixels: no VP8, VP8L or ANMF chunk")


def _read_webp_chunk(reader: Reader, header: Header, name: bytes, length: int) -> None:
    """Read what is of interest in a chunk; the rest of it is for the caller to skip."""
    end = reader.position + length
    head = reader.take(min(length, _WEBP_HEADER)) if name in _WEBP_FIRST or name in _WEBP_IMAGES else b""
    if name in _WEBP_FIRST or name in _WEBP_IMAGES:
        _read_webp_header(name, head, header)
    if name in _WEBP_IMAGES:
        _check_webp_end(reader, end, _zeros_by_encoders(name, head))
    elif name == b"EXIF" and length <= MOST_EXIF:
        header.orientation = orientation_of(reader.take(length).removeprefix(EXIF))
    elif name == _CREDENTIALS and length:
        header.has_credentials = True


def _zeros_by_encoders(name: bytes, head: bytes) -> int:
    """Return how many zeros an encoder may write at the end of pixels: a plain area is nothing but zeros.

    Measured with the usual encoder: lossy 16, and one for each 360 pixels; lossless, in its fastest setting, one for
    each 10. Its fastest lossy setting, which is never the default, may write more and is then refused.
    """
    _, _, width, height = _webp_fields(name, head)
    return 16 + width * height // (256 if name == b"VP8 " else 8)  # the frames of an animation may be either


def _check_webp_end(reader: Reader, end: int, allowed: int) -> None:
    """Refuse pixels that end in more zeros than an encoder writes.

    A transfer that reserves the room first leaves zeros in place of what did not come, and no checksum shows it.
    """
    if end - allowed <= reader.position:
        return
    reader.skip_to(end - allowed - 1)
    while reader.position < end:
        if any(reader.take(min(end - reader.position, PIECE))):
            return
    raise BrokenError(
        "cut short: only zeros at the end of its pixels (if it opens all the same, save it with another program)"
    )


def _read_webp_header(name: bytes, head: bytes, header: Header) -> None:
    """Take the dimensions from the first header, and hold the later ones to them.

    A small canvas must not vouch for a huge frame: the pixel count is bounded by the first header only.
    """
    x, y, width, height = _webp_fields(name, head)
    if not header.known:
        header.set(width, height)
    elif name == b"ANMF":
        if x + width > header.width or y + height > header.height:
            raise BrokenError("a frame reaches out of the canvas")
    elif (width, height) != (header.width, header.height):
        raise BrokenError("canvas and image differ in size")


def _webp_fields(name: bytes, head: bytes) -> tuple[int, int, int, int]:
    """Return left, top, width and height from the beginning of a chunk."""

    def three(at: int) -> int:
        return int.from_bytes(head[at : at + 3], "little")

    if name == b"ANMF" and len(head) >= 16:  # noqa: PLR2004  position, size, duration, flags
        return 2 * three(0), 2 * three(3), three(6) + 1, three(9) + 1
    if name == b"VP8X" and len(head) >= 10:  # noqa: PLR2004  flags, canvas
        return 0, 0, three(4) + 1, three(7) + 1
    if name == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:  # noqa: PLR2004  signature, 14 + 14 bits
        bits = int.from_bytes(head[1:5], "little")
        return 0, 0, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if name == b"VP8 " and len(head) >= 10 and head[3:6] == b"\x9d\x01\x2a":  # noqa: PLR2004  tag, start code
        width, height = struct.unpack_from("<HH", head, 6)
        return 0, 0, width & 0x3FFF, height & 0x3FFF  # the upper two bits are a scale for display
    raise BrokenError(f"the {name.decode('ascii').strip()} header cannot be read")
