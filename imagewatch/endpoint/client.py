"""Our side of the network: one request to the endpoint, the balance, and downloads of images.

How a request can end:

=============================================  ==========================================================
what happened                                  what the caller gets
=============================================  ==========================================================
nothing of the request left                    ``Unavailable``
the connection broke before its last byte      ``Broken``; incomplete by its Content-Length
it was sent completely, no response began      ``ChargeUnknown``
the response began                             no exception: the sink has what arrived and how it ended
=============================================  ==========================================================
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import httpx

from imagewatch.endpoint.api import BALANCE_PATH, PATH, balance, charge_unknown
from imagewatch.endpoint.call import Call
from imagewatch.endpoint.coding import UndecodableError, is_coding
from imagewatch.endpoint.download import Downloads
from imagewatch.endpoint.http_clients import COMPRESSED_MORE_BYTES, ERRORS, Clients, pieces, reason_of
from imagewatch.endpoint.receive import FullError, Receiver
from imagewatch.protocol.reasons import KINDS
from imagewatch.protocol.values import Head, Tail
from imagewatch.system.errors import Broken, JobError, KeyRefused, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.config.key import Key
    from imagewatch.config.schema import Endpoint
    from imagewatch.endpoint.body import Body
    from imagewatch.endpoint.saved_answer import Sink
    from imagewatch.system.masking import Mask

_KEPT_HEADERS = (
    "content-type",
    "content-encoding",
    "retry-after",
    "cf-ray",
    "x-request-id",
    "x-vercel-id",
    "date",
)
_HINT_REACH = "check base_url, the network and the proxy; nothing was sent and nothing was charged"
_HINT_BROKEN = (
    "if this happens repeatedly, a proxy or gateway may not accept requests of this size; nothing was charged"
)
_SMALL_BYTES = 64 * 1024
"""A request up to this size breaks because of the network, not because of its size."""
_BALANCE_SECONDS = 20.0
_MOST_BALANCE_BYTES = 64 * 1024
_MOST_REFUSAL_BYTES = 1 << 20


class Client:
    """Our side of the network. Safe to use from several threads.

    Args:
        endpoint: Address, time limits, size limit, trust.
        read_key: Returns the key; called for each request, as keys expire.
        clock: Wall clock, seconds since the epoch, for what is recorded.
        resolve: Finds the addresses of an image host; ``socket.getaddrinfo`` without.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        read_key: Callable[[], Key],
        *,
        clock: Callable[[], float] = time.time,
        resolve: Callable[..., list[tuple[Any, ...]]] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._read_key = read_key
        self._clock = clock
        self._clients = Clients(endpoint, resolve)
        self.url = endpoint.base_url + PATH
        self._url = httpx.URL(self.url)
        self.prepare, self.close = self._clients.prepare, self._clients.close
        self.fetch = Downloads(endpoint, self._clients).fetch

    @property
    def is_prepared(self) -> bool:
        """Whether the HTTP clients are made."""
        return self._clients.is_prepared

    def send(self, job: str, body: Body, on_send: Callable[[], AbstractContextManager[object]], sink: Sink) -> None:
        """Send one request and save its response.

        Args:
            job: Job id, sent as ``Idempotency-Key`` (the endpoint is not known to use it).
            body: The request.
            on_send: Called when the connection is made, before the first byte of the request leaves. What it returns
                is entered right before that byte and left after it. An exception from either stops the request.
            sink: Where the response goes; the caller closes it.

        Raises:
            ConfigError: There is no usable key.
            Broken: A part of the request was sent, and provably not all of it.
            Unavailable: Nothing of it was sent.
            ChargeUnknown: It was sent completely, and no response came.
            SpoolError: The local disk failed; ``sink.status`` is the status that had arrived.
        """
        key = self._read_key()
        headers = {
            "authorization": f"Bearer {key.reveal()}",
            "content-type": "application/json",
            "content-length": str(body.length),
            "accept": "application/json",
            "accept-encoding": "identity",
            "idempotency-key": job,
        }
        with Call(self._endpoint.deadline_seconds) as call:
            attempt, sink.until = _Attempt(call, on_send, body.length), call.at
            try:
                with self._clients.post(self._url, headers, attempt.pieces(body), attempt.trace) as response:
                    self._save(response, sink, call, key.secret)
            except ERRORS as error:
                raise self._translated(error, attempt, call, key.secret) from None

    def _save(self, response: httpx.Response, sink: Sink, call: Call, secret: Mask) -> None:
        """Write the response to the sink, also if the connection breaks."""
        headers, coding = response.headers, response.headers.get("content-encoding", "")
        kept = {name: secret.text(headers[name])[:1000] for name in _KEPT_HEADERS if name in headers}
        if is_coding(coding):
            kept.pop("content-encoding")
        sink.start(Head(status=response.status_code, headers=kept, at=self._clock()))
        limit, paid = self._endpoint.max_response_bytes, response.is_success
        receiver = Receiver(sink, limit if paid else min(limit, _MOST_REFUSAL_BYTES), coding, secret, paid=paid)
        call.before_read, reason = receiver.flush, ""
        try:
            for piece in pieces(response, call, limit + COMPRESSED_MORE_BYTES):
                receiver.take(piece)
            receiver.end()
        except httpx.HTTPError as error:
            reason = call.reason or reason_of(error, secret)
        except UndecodableError as error:
            reason = str(error)
        except FullError:
            reason = f"it is larger than {f'max_response_bytes ({limit:,})' if paid else '1 MiB'}"
        if reason:
            with contextlib.suppress(FullError, UndecodableError):
                receiver.end()
            reason = f"the response was cut short after {sink.written:,} bytes: {reason}"
            reason += f"; meanwhile it could not be saved: {sink.error}" if sink.error else ""
        sink.finish(Tail(complete=not reason, reason=reason, at=self._clock()))

    def _translated(self, error: Exception, attempt: _Attempt, call: Call, secret: Mask) -> JobError:
        reason = call.reason or reason_of(error, secret)
        if not attempt.began:
            return Unavailable(f"{self._endpoint.base_url} cannot be reached: {reason}", hint=_HINT_REACH)
        if attempt.incomplete:
            message = f"the connection broke while the request was sent ({attempt.length:,} bytes): {reason}"
            return Broken(message, hint=_HINT_BROKEN, is_own=attempt.is_large)
        return charge_unknown(f"the request was sent, but no response came: {reason}")

    def balance(self) -> dict[str, float]:
        """Return the balance of the account, in credits. Optional: the route is not documented.

        Raises:
            ConfigError: There is no usable key.
            KeyRefused: The endpoint does not accept the key.
            Unavailable: The endpoint does not report it.
        """
        key = self._read_key()
        headers = {
            "authorization": f"Bearer {key.reveal()}",
            "accept": "application/json",
            "accept-encoding": "identity",
        }
        url, body = self._endpoint.base_url + BALANCE_PATH, b""
        seconds = min(_BALANCE_SECONDS, self._endpoint.timeout_seconds)
        with Call(seconds, "") as call:
            try:
                with self.prepare()[0].stream(
                    "GET", url, headers=headers, timeout=seconds, extensions={"trace": call.trace}
                ) as response:
                    for chunk in pieces(response, call, self._endpoint.max_response_bytes):
                        body += chunk
                        if len(body) > _MOST_BALANCE_BYTES:
                            break
            except ERRORS as error:
                raise Unavailable(call.reason or reason_of(error, key.secret)) from None
        found = balance(body) if response.is_success else {}
        if not found:
            kind = KeyRefused if response.status_code in KINDS["key"].statuses else Unavailable
            raise kind(f"HTTP {response.status_code}")
        return found


class _Attempt:
    """Watches one request leave, by the trace extension of httpcore.

    By default it counts as sent: it is incomplete only if its sending was seen to fail before its last byte was passed
    to the system. It may also fail after that: a time limit may pass between that byte and what the library does next.

    Args:
        call: Its call.
        on_send: As of ``Client.send``.
        length: Of its body, bytes.

    Attributes:
        began: Whether its first byte may have left.
        is_large: Whether its headers were sent, and its body is large: a network that is down fails earlier.
    """

    def __init__(self, call: Call, on_send: Callable[[], AbstractContextManager[object]], length: int) -> None:
        self._call = call
        self._on_send = on_send
        self.length = length
        self.began = self.is_large = self._has_failed = False
        self._passed = 0

    @property
    def incomplete(self) -> bool:
        """Whether its last byte provably did not leave."""
        return self._has_failed and self._passed < self.length

    def pieces(self, body: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the body, and count what was passed to the system: the next piece is asked for only after that."""
        for piece in body:
            yield piece
            self._passed += len(piece)

    def trace(self, event: str, info: dict[str, Any]) -> None:
        self._call.trace(event, info)
        if event == "http11.send_request_headers.started" and info["request"].method == b"POST":
            # Not for the CONNECT to a proxy, which is not the request.
            self._call.first_write = self._on_send()
            self.began = True
        elif self.began and event == "http11.send_request_headers.complete":
            self.is_large = self.length > _SMALL_BYTES
        elif self.began and event in {"http11.send_request_headers.failed", "http11.send_request_body.failed"}:
            self._has_failed = True
