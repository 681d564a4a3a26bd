"""Responses as values: what is sent, and with which faults."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from imagewatch.sandbox.image import EncodedImage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Ending = Literal["whole", "drop", "reset", "drop-headers", "truncate"]


@dataclass(frozen=True)
class Reply:
    """A response, and the faults with which it is sent.

    Attributes:
        status: The HTTP status.
        parts: The body; images in it are written in base64.
        headers: More headers.
        wait: Seconds before the first byte.
        head_pace: Seconds before each byte of the head.
        body_pace: Seconds before each byte of the body.
        ending: Where sending it ends.
        sized: Whether it has a ``Content-Length``; otherwise closing the connection ends the body.
    """

    status: int
    parts: tuple[bytes | EncodedImage, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0
    head_pace: float = 0.0
    body_pace: float = 0.0
    ending: Ending = "whole"
    sized: bool = True

    @property
    def length(self) -> int:
        """Number of bytes of the body."""
        return sum(part.base64_length if isinstance(part, EncodedImage) else len(part) for part in self.parts)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces."""
        for part in self.parts:
            if isinstance(part, EncodedImage):
                yield from part.base64()
            else:
                yield part

    def compressed(self) -> Reply:
        """Return the same response in gzip."""
        packer = zlib.compressobj(level=1, wbits=31)
        packed = b"".join([*map(packer.compress, self.chunks()), packer.flush()])
        return replace(self, parts=(packed,), headers={**self.headers, "Content-Encoding": "gzip"})


def json_reply(status: int, value: object, **headers: str) -> Reply:
    """Return a response in JSON."""
    return Reply(status, (json.dumps(value).encode(),), {"Content-Type": "application/json", **headers})


def page(title: str) -> str:
    """Return a page such as a proxy before the endpoint sends."""
    return f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"


def canned(status: int, body: object, **headers: str) -> Reply:
    """Return a response with a page (text), JSON (anything else) or no body (``None``)."""
    if body is None:
        return Reply(status, (), headers)
    if isinstance(body, str):
        return Reply(status, (body.encode(),), {"Content-Type": "text/html; charset=UTF-8", **headers})
    return json_reply(status, body, **headers)
