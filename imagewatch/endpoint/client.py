"""The only module that talks to the network: one request to the endpoint, and pictures by url.

Two ``httpx`` clients: one for the endpoint, to which each request brings the key itself, and one for pictures,
which never sees the key. What is translated here, and why:

=============================================  ==========================================================
what happened                                  what the caller gets
=============================================  ==========================================================
nothing of the request left                    ``Unavailable``
the connection broke before its last byte      ``Broken``; incomplete by its Content-Length
it left whole, the answer did not begin        ``InDoubt``
the answer began                               no exception: the sink holds what came and how it ended
=============================================  ==========================================================
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from imagewatch import __version__
from imagewatch.endpoint.addresses import NotPublicError, address_in, is_public, is_this_machine
from imagewatch.endpoint.api import BALANCE_PATH, PATH, Plain, UndecodableError, balance, doubt, is_coding
from imagewatch.endpoint.call import Call
from imagewatch.protocol.image_kinds import SNIFF_BYTES, sniff
from imagewatch.protocol.values import Head, Tail
from imagewatch.system.errors import Broken, ConfigError, JobError, Problem, Unavailable
from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.config.key import Key
    from imagewatch.config.load import Endpoint
    from imagewatch.endpoint.body import Body
    from imagewatch.endpoint.saved_answer import Sink
    from imagewatch.system.masking import Mask

USER_AGENT = f"imagewatch/{__version__}"
_WRITE_SECONDS = 60.0
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
_HINT_BROKEN = "if it breaks again and again, something on the way takes no request of this size; nothing was charged"
_SMALL_BYTES = 64 * 1024
"""A request up to this size breaks because of the network, not because of its size."""
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_MOST_REDIRECTS = 3
_BALANCE_SECONDS = 20.0
_MOST_BALANCE_BYTES = 64 * 1024
_MOST_REFUSAL_BYTES = 1 << 20
_MOST_LATE_PIECES = 1000
"""How much is taken after the deadline of what is here already: it may be all that was missing."""
_COMPRESSED_MORE_BYTES = 1 << 20
"""So much larger than what is in it can a compressed answer be that is none of a joker."""


class FetchError(JobError):
    """A picture could not be fetched. A GET is free: it may be tried again unless ``final``.

    Attributes:
        final: Trying again cannot help.
        refused: The host said no (4xx); it may only be early, so a few more tries are fair.
    """

    def __init__(self, message: str, *, final: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.final = final
        self.refused = refused


class Client:
    """Our side of the network. Safe to use from several threads.

    Args:
        endpoint: Address, time limits, size limit, trust.
        read_key: Returns the key; called for each request, as keys expire.
        clock: Wall clock, seconds since the epoch, for what is written down.
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
        self._resolve = resolve
        self.url = endpoint.base_url + PATH
        self.local = is_this_machine(urlsplit(endpoint.base_url).hostname or "")
        self._lock = threading.Lock()
        self._clients: tuple[httpx.Client, httpx.Client] | None = None
        if endpoint.ca_file or getproxies():
            self.prepare()  # whoever set them wants to know at the start what is wrong with them

    @property
    def is_prepared(self) -> bool:
        """Whether what the first request needs is there."""
        return self._clients is not None

    def prepare(self) -> tuple[httpx.Client, httpx.Client]:
        """Make what the first request needs, if that was not done yet. It takes as long as half of a start.

        Returns:
            The client for the endpoint, and the one for pictures.

        Raises:
            ConfigError: ``ca_file`` or a proxy of the environment cannot be used.
        """
        with self._lock:
            if self._clients is None:
                self._clients = self._made()
            return self._clients

    def _made(self) -> tuple[httpx.Client, httpx.Client]:
        from imagewatch.endpoint.connection import Network, install  # noqa: PLC0415  httpcore takes as long to import as httpx

        endpoint, context = self._endpoint, _trust(self._endpoint.ca_file)
        networks = Network(self._resolve, judged=False), Network(self._resolve, judged=True)
        # A connection for each request: a kept one that the server closes meanwhile looks like a lost answer. The
        # limit alone is not enough: between the end of a request and the look at the limit another one may take it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeouts = (
            httpx.Timeout(endpoint.timeout_seconds, connect=endpoint.connect_timeout_seconds, write=_WRITE_SECONDS),
            httpx.Timeout(30.0, connect=endpoint.connect_timeout_seconds),
        )
        with _proxies():
            post, get = (
                httpx.Client(
                    verify=context,
                    limits=limits,
                    timeout=timeout,
                    trust_env=not self.local,
                    headers={"user-agent": USER_AGENT, "connection": "close"},
                )
                for timeout in timeouts
            )
        post.event_hooks = {"response": [_forget_location]}
        for client, network in zip((post, get), networks, strict=True):
            install(client, network, networks[0])
        return post, get

    def close(self) -> None:
        """Close both clients."""
        for client in self._clients or ():
            client.close()

    def send(self, job: str, body: Body, on_send: Callable[[], AbstractContextManager[object]], sink: Sink) -> None:
        """Send one request and bank its answer.

        Args:
            job: Job id, sent as ``Idempotency-Key`` (the endpoint is not known to honour it).
            body: The request.
            on_send: Called when the connection stands, before the first byte of the request leaves. What it returns
                is entered right before that byte and left after it. An exception from either stops the request.
            sink: Where the answer goes; the caller closes it.

        Raises:
            ConfigError: There is no usable key.
            Broken: A part of the request left, and provably not the whole.
            Unavailable: Nothing of it left.
            InDoubt: It left whole, and no answer came.
            SpoolError: Our disk failed; ``sink.status`` is what had come of the answer.
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
                with self.prepare()[0].stream(
                    "POST", self.url, headers=headers, content=iter(body), extensions={"trace": attempt.trace}
                ) as response:
                    self._bank(response, sink, call, key.secret)
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                raise self._translated(error, attempt, call, key.secret) from None

    def _bank(self, response: httpx.Response, sink: Sink, call: Call, secret: Mask) -> None:
        """Write the answer to the sink, whatever becomes of the connection."""
        headers, coding = response.headers, response.headers.get("content-encoding", "")
        kept = {name: secret.text(headers[name])[:1000] for name in _KEPT_HEADERS if name in headers}
        if is_coding(coding):
            kept.pop("content-encoding")
        sink.start(Head(status=response.status_code, headers=kept, at=self._clock()))
        limit, paid = self._endpoint.max_response_bytes, response.is_success
        bank = _Bank(sink, limit if paid else min(limit, _MOST_REFUSAL_BYTES), coding, secret, paid=paid)
        call.before_read, reason = bank.flush, ""
        try:
            for piece in _pieces(response, call, limit + _COMPRESSED_MORE_BYTES):
                bank.take(piece)
            bank.end()
        except httpx.HTTPError as error:
            reason = call.reason or _reason(error, secret)
        except UndecodableError as error:
            reason = str(error)
        except _FullError:
            reason = f"it is larger than {f'max_response_bytes ({limit:,})' if paid else '1 MiB'}"
        if reason:
            with contextlib.suppress(_FullError, UndecodableError):
                bank.end()
            reason = f"the answer was cut short after {sink.written:,} bytes: {reason}"
            reason += f"; meanwhile it could not be saved: {sink.trouble}" if sink.trouble else ""
        sink.finish(Tail(complete=not reason, reason=reason, at=self._clock()))

    def _translated(self, error: Exception, attempt: _Attempt, call: Call, secret: Mask) -> JobError:
        reason = call.reason or _reason(error, secret)
        if not attempt.began:
            return Unavailable(f"{self._endpoint.base_url} cannot be reached: {reason}", hint=_HINT_REACH)
        if attempt.incomplete:
            message = f"the connection broke while the request was sent ({attempt.length:,} bytes): {reason}"
            return Broken(message, hint=_HINT_BROKEN, is_own=attempt.is_large)
        return doubt(f"the request was sent, but no answer came: {reason}")

    def balance(self) -> dict[str, float]:
        """Ask what the account holds, in credits. Optional: the route is not documented.

        Raises:
            ConfigError: There is no usable key.
            Unavailable: It does not say.
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
                    for chunk in _pieces(response, call, self._endpoint.max_response_bytes):
                        body += chunk
                        if len(body) > _MOST_BALANCE_BYTES:
                            break
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                raise Unavailable(call.reason or _reason(error, key.secret)) from None
        found = balance(body) if response.is_success else {}
        if not found:
            raise Unavailable(f"HTTP {response.status_code}")
        return found

    def fetch(self, url: str, write: Callable[[bytes], object], limit: int, seconds: float) -> None:
        """Fetch a picture, without the key.

        Args:
            url: As answered; not trusted.
            write: Takes what comes. Our disk fails with a ``SpoolError``: an ``OSError`` is taken for the network's.
            limit: Most bytes.
            seconds: How long it may take, redirects and all; ``deadline_seconds`` at the most.

        Raises:
            FetchError: It could not be fetched.
            SpoolError: Our disk failed.
        """
        most, key = self._endpoint.deadline_seconds, "deadline_seconds"
        with Call(min(seconds, most), key if seconds >= most else "", may_connect=self._may_connect) as call:
            for _ in range(_MOST_REDIRECTS + 1):
                target = self._checked(url)
                try:
                    following = self._fetch_once(target, write, limit, call)
                except NotPublicError:
                    raise _not_public(url) from None
                except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                    raise FetchError(f"{bare(url)}: {call.reason or _reason(error)}") from None
                if following is None:
                    return
                url = following
        raise FetchError(f"{bare(url)}: too many redirects", final=True)

    def _fetch_once(self, url: httpx.URL, write: Callable[[bytes], object], limit: int, call: Call) -> str | None:
        named = bare(str(url))
        with self.prepare()[1].stream(
            "GET", url, headers={"accept-encoding": "identity"}, extensions={"trace": call.trace}
        ) as response:
            if response.is_redirect and "location" in response.headers:
                return str(response.url.join(response.headers["location"]))
            if response.status_code != httpx.codes.OK:
                raise FetchError(f"{named}: HTTP {response.status_code}", refused=response.is_client_error)
            try:
                for piece in _bounded(_image(response, named, call, limit), named, limit):
                    write(piece)
            except UndecodableError as error:
                raise FetchError(f"{named}: {error}") from None
        return None

    def _may_connect(self, address: str) -> bool:
        """Tell whether pictures may come from an IP address."""
        ip = ipaddress.ip_address(address)
        return is_public(ip) or self._endpoint.allow_private_downloads or (self.local and ip.is_loopback)

    def _checked(self, url: str) -> httpx.URL:
        """Return an address that an answer may name, as it is going to be used.

        Which host a name is, is judged when it is connected to; behind a proxy that is the proxy's own business.
        """
        try:
            parts = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise FetchError("the url cannot be read", final=True) from None
        allowed = {"https", "http"} if self.local else {"https"}
        if parts.scheme not in allowed or not parts.host or parts.userinfo:
            raise FetchError(f"{bare(url)}: only a plain {' or '.join(sorted(allowed))} url is fetched", final=True)
        host = parts.raw_host.decode("ascii")
        if not _HOST.fullmatch(host) or not 0 < (parts.port or 443) < 1 << 16:
            raise FetchError("the url cannot be read", final=True)  # not by everybody in the same way
        address = address_in(host)
        if address is not None and not self._may_connect(str(address)):
            raise _not_public(url)
        return parts


class _FullError(Exception):
    """There is more than is wanted."""


class _Bank:
    """Writes an answer down: without its content coding and without the key, which some servers repeat.

    Pieces are taken together, so that a byte in each costs little; none waits for one that is not here yet.

    Args:
        sink: Where to.
        limit: Most bytes.
        coding: Its ``Content-Encoding``, or an empty string.
        secret: The key.
        paid: Whether it may hold pictures. A key that is not long may be a part of one and stays in them.
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
        """Write down what was taken, but for what may be the beginning of the key.

        Raises:
            UndecodableError: The coding is damaged.
            _FullError: There is no room for it.
        """
        taken, self._taken = b"".join(self._taken), []
        if taken:
            for piece in self._plain.feed(taken):
                self._put(piece)

    def end(self) -> None:
        """Write down the rest."""
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
            self._write(memoryview(held)[:over])
            self._held = held[over:]
        elif len(held) > self._limit:  # of which word it is a part shows only at the end
            raise _FullError
        else:
            self._held = held

    def _write(self, content: bytes | memoryview) -> None:
        room = self._limit - self._sink.written
        self._sink.write(content[:room])
        if len(content) > room:
            raise _FullError


class _Attempt:
    """Watches one request leave, by the trace extension of httpcore.

    Doubt is the default: that the request is incomplete counts only when its sending was seen to fail.

    Args:
        call: Its call.
        on_send: As of ``Client.send``.
        length: Of its body, bytes.

    Attributes:
        began: Whether its first byte may have left.
        incomplete: Whether its last byte provably did not.
        is_large: Whether its head left, and its body is large: a network that is down shows earlier.
    """

    def __init__(self, call: Call, on_send: Callable[[], AbstractContextManager[object]], length: int) -> None:
        self._call = call
        self._on_send = on_send
        self.length = length
        self.began = self.incomplete = self.is_large = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        self._call.trace(event, info)
        if event == "http11.send_request_headers.started" and info["request"].method == b"POST":
            # Not for the CONNECT to a proxy, which is not the request.
            self._call.first_write = self._on_send()
            self.began = True
        elif self.began and event == "http11.send_request_headers.complete":
            self.is_large = self.length > _SMALL_BYTES
        elif self.began and event in {"http11.send_request_headers.failed", "http11.send_request_body.failed"}:
            self.incomplete = True


def _forget_location(response: httpx.Response) -> None:
    """Drop the target of a redirect: httpx reads it even to stay, and an unreadable one would hide the answer."""
    response.headers.pop("location", None)


def _pieces(response: httpx.Response, call: Call, most: int) -> Iterator[bytes]:
    """Yield a body as it comes, for as long as its call has time and it is worth the work.

    Args:
        response: Not read yet.
        call: Its call.
        most: Bytes after which nobody listens any more.
    """
    size = late = 0
    for piece in response.iter_raw():
        yield piece
        size += len(piece)
        late += bool(call.reason)
        if late > _MOST_LATE_PIECES:
            raise httpx.ReadTimeout(call.reason)
        if not call.bears(size):
            raise httpx.RemoteProtocolError("it comes in too small pieces")
        if size > most:
            raise httpx.ReadError(f"it is larger than {most:,} bytes")


def _image(response: httpx.Response, named: str, call: Call, limit: int) -> Iterator[bytes]:
    """Yield an image without its content coding. None is asked for, but some hosts have it stored in one.

    Args:
        response: Not read yet.
        named: Its address, for messages.
        call: Its call.
        limit: Most bytes of the image.

    Raises:
        FetchError: Its coding is one that we cannot read.
        UndecodableError: It is damaged.
    """
    coding = response.headers.get("content-encoding", "").strip().lower()
    is_known = coding in {"", "identity"} or is_coding(coding)
    body, head = Plain(coding), b""
    for chunk in _pieces(response, call, limit + _COMPRESSED_MORE_BYTES):
        if is_known:
            yield from body.feed(chunk)
            continue
        # Storage services have codings that are only a name ("aws-chunked", "utf-8"): the content decides.
        head += chunk
        if sniff(head) is not None:
            is_known = True
            yield from body.feed(head)
        elif len(head) >= SNIFF_BYTES:
            break
    if not is_known:
        raise FetchError(f"{named}: encoded as {printable(coding, 40)!r}, which nobody asked for", final=True)
    yield body.end()


def _bounded(pieces: Iterator[bytes], named: str, limit: int) -> Iterator[bytes]:
    """Yield pieces up to a limit.

    Raises:
        FetchError: There is more.
    """
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise FetchError(f"{named}: larger than {limit:,} bytes", final=True)
        yield piece


def bare(url: str) -> str:
    """Return a url without its query and user: what signs it is a secret."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an unreadable url"
    return printable(f"{parts.scheme}://{host}{port}{parts.path}", 300)


def _not_public(url: str) -> FetchError:
    """Return what is said of a refused address: nothing that whoever named it did not know."""
    return FetchError(f"{bare(url)}: the address is not public", final=True)


def _reason(error: Exception, secret: Mask | None = None) -> str:
    """Return an error of the network in words; never header contents, which may be the key.

    Args:
        error: It may hold what the other side sent.
        secret: What it must not hold; masked before the words are cut, which might leave half.
    """
    if isinstance(error, httpx.LocalProtocolError):
        return "the request cannot be put on the wire"
    text = known.text(str(error) or type(error).__name__)
    return printable(secret.text(text) if secret else text, 300)


def _trust(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        problem = Problem(
            "endpoint.ca_file",
            f"{ca_file} cannot be used: {error.strerror or error}",
            "name a file of PEM certificates",
        )
        raise ConfigError([problem]) from None


@contextlib.contextmanager
def _proxies() -> Iterator[None]:
    """Report a proxy setting of the environment that httpx cannot use."""
    try:
        yield
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        problem = Problem("environment", f"the proxy cannot be used: {error}", "correct HTTPS_PROXY or ALL_PROXY")
        raise ConfigError([problem]) from None
