"""Walks through a JPEG."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from imagewatch.protocol.image_reader import EXIF, STANDALONE, BrokenError, FormError, Header, Reader, orientation_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_SCANS = 100
"""More scans than this in a JPEG are a problem: a decoder visits all pixels once for each, and a scan may be 20 bytes.

Encoders write 1 scan (baseline), up to 4 (one for each component), 10 (progressive) or 18 (progressive, CMYK). Scan
scripts written by hand stay far below 100. With 10,000 scans, half a megabyte of 12 million pixels takes over a minute.
"""

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_DHT, _DQT, _APP1, _APP11 = 0xC4, 0xDB, 0xE1, 0xEB
# C4, C8 and CC are tables and extensions that sit among the numbers of the frame headers.
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
# No decoder can pass these over: whether a length follows is not known.
_UNKNOWN = frozenset({*range(0x02, 0xC0), *range(0xF0, 0xFE)}) - _FRAMES
_RARE_FRAMES = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "a lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "a hierarchical JPEG"),
    0xF7: "a JPEG-LS image",
}
_CREDENTIALS = re.compile(rb"JP.{2}\0\0\0\x01.{4}jumb(?:.{8})?.{4}jumdc2pa", re.DOTALL)
"""How the first segment of content credentials begins: APP11 may have other boxes (JUMBF), too.

What follows "JP" is the number of the box, that of the segment, and the box itself: its length, its type, a length of
eight bytes in a large box, and its description, whose type begins with the letters c2pa.
"""
_MOST_BOX_HEAD = 40  # bytes that this can have
_DEPTH = 8  # bits of a sample in all JPEGs that are in use
_COMPONENTS = frozenset({1, 3, 4})  # gray; YCbCr or RGB; CMYK or YCCK
_SAMPLING = frozenset({1, 2, 3, 4})


def walk_jpeg(reader: Reader, header: Header) -> None:
    """Walk the segments and scans of a JPEG up to EOI; phones append more, which is left alone."""
    reader.take(2)
    scans = 0
    while (code := _next_marker(reader, in_head=not scans)) != _EOI:
        if code in STANDALONE:
            continue
        if code == _SOI:
            # Two files run together, the first cut short.
            raise BrokenError("a second image begins before this one ends")
        if code in _UNKNOWN:
            raise BrokenError(f"marker {code:02X}, which no decoder knows")
        length = int.from_bytes(reader.take(2), "big")
        end = reader.position - 2 + length
        _read_segment(reader, header, code, length)
        scans += code == _SOS
        if scans > MAX_SCANS:
            raise FormError(f"more than {MAX_SCANS} scans, encoders write up to 18")
        reader.skip_to(end)
        if code == _SOS:
            reader.to_scan_end()
    if not scans:
        raise BrokenError("no pixels: no scan before EOI")


def _read_segment(reader: Reader, header: Header, code: int, length: int) -> None:
    """Read what is of interest in a segment; the rest of it is for the caller to skip."""
    if code in _FRAMES:
        _read_frame(reader, header, code, length)
    elif code == _SOS:
        _read_scan(reader, header, length)
    elif length < 2:  # noqa: PLR2004  the length counts its own two bytes
        raise BrokenError(f"segment {code:02X} has an impossible length")
    elif code == _DHT:
        _check_huffman(reader.take(length - 2))
    elif code == _DQT:
        header.tables.update(_quantization(reader.take(length - 2)))
    elif code == _APP1 and length > 2 + len(EXIF) and reader.take(len(EXIF)) == EXIF:
        header.orientation = orientation_of(reader.take(length - 2 - len(EXIF)))
    elif code == _APP11 and _CREDENTIALS.match(reader.take(min(length - 2, _MOST_BOX_HEAD))):
        header.has_credentials = True


def _check_huffman(tables: bytes) -> None:
    """Refuse Huffman tables that no decoder takes: by them a damaged head shows."""
    at = 0
    while at < len(tables):
        counts = tables[at + 1 : at + 17]
        symbols = tables[at + 17 : at + 17 + sum(counts)]
        if tables[at] & 0xEC or len(symbols) != sum(counts) or len(counts) != 16 or not _are_codes(counts):  # noqa: PLR2004
            raise BrokenError("a Huffman table that no decoder takes")
        if not tables[at] >> 4 and symbols and max(symbols) > 15:  # noqa: PLR2004  a class: sizes of differences
            raise BrokenError("a Huffman table that no decoder takes")
        at += 17 + len(symbols)


def _are_codes(counts: bytes) -> bool:
    """Return whether there can be so many codes of each length; one of ones alone is not allowed."""
    code = 0
    for length, count in enumerate(counts, 1):
        code += count
        if count and code >= 1 << length:
            return False
        code <<= 1
    return True


def _quantization(tables: bytes) -> Iterator[int]:
    """Yield the numbers of quantization tables; refuse what no decoder takes."""
    at = 0
    while at < len(tables):
        if tables[at] & 0xEC:  # precision of 8 or 16 bits, and a number
            break
        yield tables[at] & 3
        at += 1 + 64 * (1 + (tables[at] >> 4))
    if at != len(tables):
        raise BrokenError("a quantization table that no decoder takes")


def _next_marker(reader: Reader, *, in_head: bool) -> int:
    """Return the code of the next marker, over any fill bytes before it.

    Before the first scan cameras and Photoshop leave other bytes between segments, too. All decoders that descend from
    libjpeg pass them over, so every viewer opens such files. After it no decoder does, and they are a sign of damage.
    """
    reader.step()
    reader.to_marker(anywhere=in_head)
    return reader.take(2)[1]


def _read_frame(reader: Reader, header: Header, code: int, length: int) -> None:
    """Read the dimensions from a frame header."""
    if header.known:
        # Which one counts depends on the decoder, so the pixel count would be any user's guess.
        raise BrokenError("a second frame header")
    depth, height, width, components = struct.unpack(">BHHB", reader.take(6))
    if code in _RARE_FRAMES:
        raise FormError(_RARE_FRAMES[code])
    if not components or length != 8 + 3 * components:
        raise BrokenError("a frame header with an impossible length")
    header.set(width, height)
    if depth != _DEPTH:
        raise FormError(f"a {depth}-bit JPEG")
    if components not in _COMPONENTS:
        raise FormError(f"a JPEG with {components} color channels")
    for name, sampling, table in struct.iter_unpack("BBB", reader.take(3 * components)):
        header.components[name] = table
        if sampling >> 4 not in _SAMPLING or sampling & 15 not in _SAMPLING or table > 3:  # noqa: PLR2004
            raise BrokenError("a frame header with an impossible color channel")


def _read_scan(reader: Reader, header: Header, length: int) -> None:
    """Check the header of a scan."""
    if not header.known:
        raise BrokenError("a scan before any frame header")
    components = reader.take(1)[0]
    if components not in _SAMPLING or length != 6 + 2 * components:  # one to four of them, too
        raise BrokenError("a scan header with an impossible length")
    for name in reader.take(2 * components)[::2]:
        if name not in header.components:
            raise BrokenError("a scan of a color channel that is not there")
        if header.tables and header.components[name] not in header.tables:
            raise BrokenError("no quantization table for a color channel")
