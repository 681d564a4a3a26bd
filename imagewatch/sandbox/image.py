"""The bytes of an image as they are sent, in base64 or not. Padding to any size takes no memory."""

from __future__ import annotations

import binascii
import functools
import hashlib
import struct
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ZEROS: Final = bytes(3 << 18)  # a multiple of 3, so that its base64 needs no padding
_IEND_BYTES: Final = 12
_IHDR_END: Final = 33
_C2PA: Final = bytes.fromhex("63327061 00110010 800000AA 00389B71")


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of one image, and the type that the response gives for them.

    Attributes:
        data: The file; with ``padding`` it must be a complete PNG.
        mime: The type that the response gives, e.g. ``image/png``.
        padding: Size of a private ancillary chunk put before the end of the PNG. It is created
            while it is sent, so that an image of 75 MB takes no memory.
    """

    data: bytes
    mime: str
    padding: int = 0

    @property
    def length(self) -> int:
        """Number of bytes of the whole file."""
        return len(self.data) + (self.padding + 12 if self.padding else 0)

    @property
    def base64_length(self) -> int:
        """Number of characters of the whole file in base64."""
        return (self.length + 2) // 3 * 4

    @property
    def sha256(self) -> str:
        """Checksum of the whole file, in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Yield the whole file in pieces."""
        if not self.padding:
            yield self.data
            return
        # By the rules of PNG, the letter cases in "paDd" mean: ancillary, private, safe to copy.
        yield self.data[:-_IEND_BYTES] + struct.pack(">I4s", self.padding, b"paDd")
        yield from _zeros(self.padding)
        yield struct.pack(">I", _padding_crc(self.padding)) + self.data[-_IEND_BYTES:]

    def base64(self) -> Iterator[bytes]:
        """Yield the whole file in base64, in pieces."""
        rest = b""
        for chunk in self.chunks():
            piece = rest + chunk
            whole = len(piece) // 3 * 3
            yield binascii.b2a_base64(piece[:whole], newline=False)
            rest = piece[whole:]
        yield binascii.b2a_base64(rest, newline=False)


def with_credentials(image: EncodedImage) -> EncodedImage:
    """Return a PNG with content credentials (C2PA): an empty box of them, which no program accepts as valid.

    Anything else is returned as it is: another tag may have put it in the place of the PNG.
    """
    if not image.data.startswith(b"\x89PNG"):
        return image
    described = struct.pack(">I4s", 30, b"jumd") + _C2PA + b"\x03c2pa\0"
    box = struct.pack(">I4s", 8 + len(described), b"jumb") + described
    chunk = b"caBX" + box
    chunk = struct.pack(">I", len(box)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return replace(image, data=image.data[:_IHDR_END] + chunk + image.data[_IHDR_END:])


def _zeros(length: int) -> Iterator[bytes]:
    """Yield that many zero bytes, in pieces."""
    for _ in range(length // len(_ZEROS)):
        yield _ZEROS
    yield _ZEROS[: length % len(_ZEROS)]


@functools.lru_cache(maxsize=16)
def _padding_crc(length: int) -> int:
    """Return the checksum of the padding chunk."""
    crc = zlib.crc32(b"paDd")
    for piece in _zeros(length):
        crc = zlib.crc32(piece, crc)
    return crc
