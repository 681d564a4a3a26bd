"""The content coding of a response: removed piece by piece."""

from __future__ import annotations

import contextlib
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CODINGS = {"gzip", "x-gzip", "deflate"}
_GZIP, _ZLIB = b"\x1f\x8b", (b"\x78\x01", b"\x78\x9c", b"\x78\xda")
_PACKED = (b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04")
_PLAIN_BEGINNINGS = {b"{", b"[", b"<", b" ", b"\r", b"\n", b"\t"}
_INFLATED_BYTES = 256 * 1024


class UndecodableError(Exception):
    """The rest of a body cannot be decoded; the message has the cause."""


def is_coding(name: str) -> bool:
    """Return whether we can read a content coding; we ask for none."""
    return name.strip().lower() in _CODINGS


class Plain:
    """Removes the content coding of a body, piece by piece. A body that is not in its coding stays as it is.

    Args:
        coding: Its ``Content-Encoding``, or an empty string.
    """

    def __init__(self, coding: str) -> None:
        self._coding = coding.strip().lower()
        self._first: bytes | None = b""
        self._inflate: zlib._Decompress | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take a piece and yield what is in it.

        Raises:
            UndecodableError: It is damaged; what could be read was yielded.
        """
        if self._first is not None:
            self._first += chunk
            if len(self._first) < len(_GZIP):
                return
            chunk, self._first = self._first, None
            self._inflate = _inflater(chunk, self._coding)
        if self._inflate is None:
            yield chunk
            return
        while chunk and not self._inflate.eof:
            before = self._inflate.copy()
            try:
                piece = self._inflate.decompress(chunk, _INFLATED_BYTES)
            except zlib.error as error:
                self._inflate = None
                yield from _undamaged(before, chunk)
                raise UndecodableError(f"the compressed response is damaged: {error}") from None
            yield piece
            chunk = self._inflate.unconsumed_tail

    def end(self) -> bytes:
        """Return what is left at the end; nothing if not all that arrived was taken."""
        if self._inflate is None:
            return self._first or b""
        if self._inflate.unconsumed_tail:
            return b""  # it would be one piece, and may be a thousand times as long
        try:
            return self._inflate.flush()
        except zlib.error:  # it was cut off
            return b""


def is_packed(first: bytes) -> bool:
    """Return whether something begins like a compressed file, in which a key cannot be found."""
    return first.startswith((_GZIP, *_ZLIB, *_PACKED))


def plain(chunks: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """Yield a body without its content coding, as ``Plain`` does."""
    body = Plain(coding)
    for chunk in chunks:
        yield from body.feed(chunk)
    yield body.end()


def _undamaged(inflate: zlib._Decompress, chunk: bytes) -> Iterator[bytes]:
    """Yield what is in a piece before the damage."""
    with contextlib.suppress(zlib.error):
        for place in range(len(chunk)):
            yield inflate.decompress(chunk[place : place + 1])


def _inflater(first: bytes, coding: str) -> zlib._Decompress | None:
    """Return what decompresses a body that begins like this, or None if it is not compressed."""
    if coding not in {"", "identity", *_CODINGS}:
        return None
    if first.startswith(_GZIP):
        window = 31
    elif first.startswith(_ZLIB):
        window = 15
    elif coding == "deflate" and first[:1] not in _PLAIN_BEGINNINGS:
        window = -15  # some leave the frame out
    else:
        return None
    try:
        zlib.decompressobj(window).decompress(first, 1)
    except zlib.error:
        return None
    return zlib.decompressobj(window)


class UnreadableError(Exception):
    """The rest of a response cannot be read; the message has the cause."""


def bounded(chunks: Iterable[bytes], encoding: str, limit: int) -> Iterator[bytes]:
    """Yield the body without its content coding, at most ``limit`` bytes of it if it has one."""
    coding = encoding.strip().lower()
    if coding in {"", "identity"}:
        yield from chunks
        return
    if not is_coding(coding):
        begun = iter(chunks)
        first = next(begun, b"")
        if first.lstrip()[:1] not in {b"{", b"["}:
            raise UnreadableError(f"the response has the encoding {coding[:40]!r}, which was not requested")
        yield first  # its header is wrong
        yield from begun
        return
    total = 0
    try:
        for piece in plain(chunks, coding):
            total += len(piece)
            if total > limit:
                raise UnreadableError(f"the decompressed response is larger than {limit:,} bytes")
            yield piece
    except UndecodableError as error:
        raise UnreadableError(str(error)) from None
