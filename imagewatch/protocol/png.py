"""Walks through a PNG."""

from __future__ import annotations

import struct
import zlib

from imagewatch.protocol.image_kinds import PNG_MAGIC
from imagewatch.protocol.image_reader import MOST_EXIF, BrokenError, FormError, Header, Reader, orientation_of

_PNG_MAX_LENGTH = 2**31 - 1
_CREDENTIALS = b"caBX"
_PNG_PALETTE = 3
_PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, _PNG_PALETTE: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}
"""Bits of a sample, by color type."""


def walk_png(reader: Reader, header: Header) -> None:
    """Walk the chunks of a PNG up to IEND; what follows it is ignored."""
    reader.take(len(PNG_MAGIC))
    seen: set[bytes] = set()
    name = b""
    while name != b"IEND":
        reader.step()
        length, name = struct.unpack(">I4s", reader.take(8))
        if not name.isalpha():  # ASCII letters only, for bytes: safe to show from here on
            raise BrokenError("a chunk has an invalid name")
        shown = name.decode("ascii")
        if name == b"CgBI" and not seen:
            raise FormError("a PNG that was made for iOS only (CgBI)")
        if not header.known and name != b"IHDR":
            raise BrokenError(f"begins with chunk {shown}, not IHDR")
        _check_png_length(shown, length, again=header.known)
        head = reader.take(length) if name == b"IHDR" or (name == b"eXIf" and length <= MOST_EXIF) else b""
        crc = reader.crc(length - len(head), zlib.crc32(head, zlib.crc32(name)))
        if reader.take(4) != crc.to_bytes(4, "big"):
            raise BrokenError(f"chunk {shown} has a wrong checksum")
        if name == b"IHDR":
            needs_palette = _read_png_header(head, header)
        elif name == b"eXIf":
            header.orientation = orientation_of(head)
        elif name == b"IDAT" and needs_palette and b"PLTE" not in seen:
            raise BrokenError("no palette: no PLTE chunk before IDAT")
        header.has_credentials |= name == _CREDENTIALS and length > 0
        seen.add(name)
    if b"IDAT" not in seen:
        raise BrokenError("no pixels: no IDAT chunk")


def _read_png_header(content: bytes, header: Header) -> bool:
    """Take the dimensions; return whether the colors come from a palette."""
    width, height = struct.unpack_from(">II", content)
    depth, color, compression, filtering, interlacing = content[8:]
    if max(width, height) > _PNG_MAX_LENGTH:
        raise FormError(f"an impossible PNG header: {width}×{height} pixels")  # noqa: RUF001  read by people
    header.set(width, height)
    if depth not in _PNG_DEPTHS.get(color, ()):
        raise FormError(f"an impossible PNG header: color type {color} with bit depth {depth}")
    if compression or filtering or interlacing > 1:
        raise FormError(
            f"an impossible PNG header: compression {compression}, filter {filtering}, interlacing {interlacing}"
        )
    return color == _PNG_PALETTE


def _check_png_length(name: str, length: int, *, again: bool) -> None:
    """Refuse the lengths that the format rules out, and a second header."""
    if length > _PNG_MAX_LENGTH:
        raise BrokenError(f"chunk {name} has an impossible length")
    fixed = {"IHDR": 13, "IEND": 0}.get(name)
    if fixed is not None and length != fixed:
        raise BrokenError(f"chunk {name} is {length:,} bytes long, not {fixed}")
    if name == "IHDR" and again:
        raise BrokenError("a second IHDR chunk")
