"""What other users may see of a response: without the API key."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from imagewatch.endpoint.coding import UnreadableError, bounded, is_packed
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CHUNK_BYTES = 512 * 1024
_LONGEST_SECRET = 64 * 1024
"""Bytes; how much is held back of what may be shown, as a key may be cut in two."""


def _unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what is not a compressed file, in which the key cannot be found."""
    for place, piece in enumerate(pieces):
        if place == 0 and is_packed(piece):
            raise UnreadableError("the response is a compressed file")
        yield piece


def shown(chunks: Iterable[bytes], *, encoding: str, limit: int) -> Iterator[bytes]:
    """Yield what other users may see of a paid response: without the key in any form, even if that damages an image.

    Args:
        chunks: The raw body.
        encoding: Its ``Content-Encoding``, or an empty string.
        limit: Most bytes a compressed body may grow to.
    """
    try:
        yield from _masked(_unpacked(bounded(chunks, encoding, limit)))
    except UnreadableError as error:
        yield f"\n[{error}; the whole response is kept in the state folder]\n".encode()


def _masked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield chunks without the key in any form."""
    held = b""
    try:
        for chunk in chunks:
            held = known.content(held + chunk)
            yield held[:-_LONGEST_SECRET]
            held = held[-_LONGEST_SECRET:]
    except UnreadableError:
        yield held
        raise
    yield held


def holds_key(file: IO[bytes]) -> bool:
    """Return whether there is a key in a file, in any form."""
    held = b""
    while chunk := file.read(_CHUNK_BYTES):
        held += chunk
        if known.content(held) != held:
            return True
        held = held[-_LONGEST_SECRET:]
    return False
