"""The JSON body of a request."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pybase64

from imagewatch.system.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from imagewatch.protocol.request import Part

_READ_BYTES = 48 * 1024
"""Bytes of an image per piece of the request: a multiple of three, so that base64 needs no padding inside."""


class Body:
    """The request's JSON body, created piece by piece: never a whole image in memory.

    Attributes:
        length: Size in bytes, known before the first piece.
    """

    def __init__(self, prompt: str, fields: dict[str, Any], parts: Iterable[Part]) -> None:
        self._head = json.dumps({**fields, "prompt": prompt}, ensure_ascii=False).encode()
        self._parts = tuple(parts)
        self.length = sum(len(piece) if isinstance(piece, bytes) else _encoded(piece) for piece in self._plan())

    def _plan(self) -> Iterator[bytes | Part]:
        if not self._parts:
            yield self._head
            return
        yield self._head[:-1] + b', "input_images": ['
        for number, part in enumerate(self._parts):
            yield (b', "' if number else b'"') + f"data:{part.mime};base64,".encode()
            yield part
            yield b'"'
        yield b"]}"

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body.

        Raises:
            JobError: An image is not the one that was validated. The request is then incomplete by its
                Content-Length, so that the endpoint cannot have run it.
        """
        for piece in self._plan():
            if isinstance(piece, bytes):
                yield piece
            else:
                yield from _in_base64(piece)


def _encoded(part: Part) -> int:
    return (part.size + 2) // 3 * 4


def _in_base64(part: Part) -> Iterator[bytes]:
    digest, left = hashlib.sha256(), part.size
    with part.open() as file:
        while left > 0:
            chunk = file.read(min(_READ_BYTES, left))
            left -= len(chunk)
            digest.update(chunk)
            if not chunk or (left <= 0 and digest.hexdigest() != part.sha256):
                raise JobError("an input image was changed while it was sent", hint="drop the files again")
            yield pybase64.b64encode(chunk)
