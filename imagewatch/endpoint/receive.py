"""Writes a response to the disk while it arrives: without its content coding and without the API key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.endpoint.coding import Plain

if TYPE_CHECKING:
    from imagewatch.endpoint.saved_answer import Sink
    from imagewatch.system.masking import Mask


class FullError(Exception):
    """There is more than the limit."""


class Receiver:
    """Writes a response: without its content coding and without the key, which some servers repeat.

    Pieces are joined, so that many small ones cost little; none waits for one that has not arrived.

    Args:
        sink: Where to.
        limit: Most bytes.
        coding: Its ``Content-Encoding``, or an empty string.
        secret: The key.
        paid: Whether it may hold images. A short key may be a part of one and stays in them.
    """

    def __init__(self, sink: Sink, limit: int, coding: str, secret: Mask, *, paid: bool) -> None:
        self._sink = sink
        self._limit = limit
        self._plain = Plain(coding)
        self._secret = secret
        self._is_masked = secret.is_ordinary or not paid
        self._taken: list[bytes] = []
        self._held = b""

    def take(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._taken.append(piece)

    def flush(self) -> None:
        """Write what was taken, except what may be the beginning of the key.

        Raises:
            UndecodableError: The coding is damaged.
            FullError: There is no room for it.
        """
        taken, self._taken = b"".join(self._taken), []
        if taken:
            for piece in self._plain.feed(taken):
                self._put(piece)

    def end(self) -> None:
        """Write the rest."""
        self.flush()
        self._put(self._plain.end())
        rest, self._held = self._held, b""
        self._write(self._secret.ending(self._secret.content(rest)) if self._is_masked else rest)

    def _put(self, piece: bytes) -> None:
        if not self._is_masked:
            self._write(piece)
            return
        held = self._held + piece
        if self._secret.is_told_apart:
            held = self._secret.content(held)
            over = len(held) - self._secret.reach(held)
            self._write(held[:over])
            self._held = held[over:]
        elif len(held) > self._limit:  # only the end shows of which word it is a part
            raise FullError
        else:
            self._held = held

    def _write(self, content: bytes) -> None:
        room = self._limit - self._sink.written
        self._sink.write(content[:room])
        if len(content) > room:
            raise FullError
