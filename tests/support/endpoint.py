"""An endpoint in this process: the interface of ``Client`` over a table of responses; it counts what it charged."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.endpoint.download import FetchError
from imagewatch.protocol.values import Head, Tail
from imagewatch.system.errors import Broken, ChargeUnknown, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from imagewatch.endpoint.body import Body
    from imagewatch.endpoint.saved_answer import Sink

AT = 1_700_000_000.0
"""What every clock shows: the same files come of the same steps."""


def unique_png(seed: str) -> bytes:
    """Return a small whole PNG that no other seed has."""
    pixel = hashlib.sha256(seed.encode()).digest()[:3]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + pixel)),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@dataclass(frozen=True)
class Reply:
    """What the endpoint does with one request.

    Attributes:
        status: HTTP status; 0 when there is no response.
        body: Of the response; empty for the images of the request.
        headers: Of the response.
        paid: Whether it charges.
        by_url: Images are named, not sent.
        wrapped: The base64 of images is in lines, so that it is not canonical.
        end: How it ends: ``whole``, ``unreachable`` (nothing left), ``broken`` (the request left in part),
            ``cut off`` (so did a large one), ``dropped`` (it was sent completely, nothing came) or ``short`` (the
            response broke off).
    """

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    paid: bool = True
    by_url: bool = False
    wrapped: bool = False
    end: str = "whole"


@dataclass
class Books:
    """What is outside of our disks; it survives every cut.

    Attributes:
        requests: How often each prompt was received whole.
        begun: How often ``on_send`` reported that a request may be sent.
        paid: How often each prompt was charged.
        settled: Of each prompt, whether the response to its newest request, or its result, is durable.
        arrived: Prompts whose response is complete, and durable with the next synced commit.
    """

    requests: dict[str, int] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    paid: dict[str, int] = field(default_factory=dict)
    settled: dict[str, bool] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)

    def freeze(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple(tuple(sorted(vars(self)[name].items())) for name in ("requests", "begun", "paid", "settled"))

    def thaw(self, frozen: tuple[tuple[tuple[str, int], ...], ...]) -> None:
        for name, items in zip(("requests", "begun", "paid", "settled"), frozen, strict=True):
            vars(self)[name] = dict(items)
        self.arrived = set()


class PaidEndpoint:
    """Answers requests by a table, in the order of its real twin: connect, ``on_send``, body, payment, response.

    Args:
        replies: For each prompt, what is done with its first, second, … request; the last entry stays.
        books: What it writes its payments into.
        moment: Called where the power may go while a request is under way.
    """

    url = "https://endpoint.test/v1/images/generations"
    local = False

    def __init__(self, replies: dict[str, list[Reply]], books: Books, moment: Callable[[str], None]) -> None:
        self._replies = replies
        self._books = books
        self._moment = moment

    def close(self) -> None:
        """Nothing is open."""

    def send(self, job: str, body: Body, on_send: Callable[[], AbstractContextManager[object]], sink: Sink) -> None:
        assert len(job) == 16
        pieces = iter(body)
        first = next(pieces)
        prompt = re.search(rb'"prompt": "([^"]*)"', first)[1].decode()  # type: ignore[index]
        replies = self._replies[prompt]
        reply = replies[min(self._books.begun.get(prompt, 0), len(replies) - 1)]
        self._moment("connected")
        if reply.end == "unreachable":
            raise Unavailable("the endpoint cannot be reached")
        self._books.settled[prompt] = False
        with on_send():
            self._count("begun", prompt)
            self._moment("may leave")
        if reply.end in {"broken", "cut off"}:
            raise Broken("the connection broke while the request was sent", is_own=reply.end == "cut off")
        whole = b"".join((first, *pieces))
        assert len(whole) == body.length
        self._moment("left")
        self._count("requests", prompt)
        if reply.paid:
            self._count("paid", prompt)
        self._moment("received")
        if reply.end == "dropped":
            raise ChargeUnknown("the request was sent, but no response came")
        self._respond(reply, _images_of(prompt, json.loads(whole)), sink)
        if reply.status == 200 and reply.end == "whole":
            self._books.arrived.add(prompt)
        else:
            self._books.settled[prompt] = True

    def _respond(self, reply: Reply, images: list[bytes], sink: Sink) -> None:
        sink.start(Head(status=reply.status, headers=dict(reply.headers), at=AT))
        body = reply.body or _response_body(images, by_url=reply.by_url, wrapped=reply.wrapped)
        third = len(body) // 3 + 1
        for start in (0, third, 2 * third):
            self._moment("answering")
            sink.write(body[start : start + third])
            if start and reply.end == "short":
                sink.finish(Tail(complete=False, reason="the response was cut short", at=AT))
                return
        self._moment("answered")
        sink.finish(Tail(complete=True, at=AT))

    def fetch(self, url: str, write: Callable[[bytes], object], limit: int, seconds: float) -> None:
        assert seconds > 0
        content = base64.urlsafe_b64decode(url.rpartition("/")[2])
        if len(content) > limit:
            raise FetchError("too large", final=True)
        write(content[:40])
        self._moment("fetching")
        write(content[40:])

    def _count(self, name: str, prompt: str) -> None:
        counts = getattr(self._books, name)
        counts[prompt] = counts.get(prompt, 0) + 1


def _images_of(prompt: str, fields: dict[str, object]) -> list[bytes]:
    return served(prompt, int(fields.get("n", 1)))  # type: ignore[call-overload]


def served(prompt: str, count: int) -> list[bytes]:
    """Return the images that are served for a prompt."""
    return [unique_png(f"{prompt} {number}") for number in range(count)]


def _response_body(images: Iterable[bytes], *, by_url: bool, wrapped: bool) -> bytes:
    encode = base64.encodebytes if wrapped else base64.b64encode
    if by_url:
        entries = [{"url": f"https://images.test/{base64.urlsafe_b64encode(p).decode()}"} for p in images]
    else:
        entries = [{"b64_json": encode(p).decode(), "mime_type": "image/png"} for p in images]
    answer = {"images": entries, "provider": "flux", "model": "flux-pro", "billing": {"credits_charged": 5}}
    return json.dumps(answer).encode()
