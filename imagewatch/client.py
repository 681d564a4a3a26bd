"""The only module that talks to the network: one request to the endpoint, and pictures by url.

Two ``httpx`` clients: one for the endpoint, to which each request brings the key itself, and one for pictures,
which never sees the key. What is translated here, and why:

=============================================  ==========================================================
what happened                                  what the caller gets
=============================================  ==========================================================
nothing of the request left                    ``Unavailable``; ``on_send`` was not called
the connection broke before its last byte      ``Unavailable``; incomplete by its Content-Length
it left whole, the answer did not begin        ``InDoubt``
the answer began                               no exception: the sink holds what came and how it ended
=============================================  ==========================================================
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import math
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from imagewatch import __version__
from imagewatch.errors import ConfigError, JobError, Problem, Unavailable
from imagewatch.job import Head, Tail
from imagewatch.text import printable
from imagewatch.wire import BALANCE_PATH, PATH, Body, balance, doubt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.config import Endpoint
    from imagewatch.key import Key
    from imagewatch.record import Sink

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
_CONNECTED = ("connect_tcp.complete", "start_tls.complete")
"""How the events of httpcore end after which there is another socket: TLS takes a socket's descriptor away from it.
They begin with "connection.", with "proxy." for the TLS in a tunnel, with "socks." for a proxy of that kind."""
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MOST_REDIRECTS = 3
_BALANCE_SECONDS = 20.0
_MOST_BALANCE_BYTES = 64 * 1024
_SHORTEST_SECRET = 16


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
    """

    def __init__(
        self, endpoint: Endpoint, read_key: Callable[[], Key], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._endpoint = endpoint
        self._read_key = read_key
        self._clock = clock
        self.url = endpoint.base_url + PATH
        self.local = is_loopback(urlsplit(endpoint.base_url).hostname or "")
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
        import httpcore  # noqa: PLC0415  its own import takes as long as httpx's

        # It takes 64 KiB at a time, and each piece is two calls that give the interpreter away and queue for it again.
        httpcore.HTTP11Connection.READ_NUM_BYTES = 512 * 1024
        endpoint, context = self._endpoint, _trust(self._endpoint.ca_file)
        # A connection for each request: a kept one that the server closes meanwhile looks like a lost answer, and for
        # a picture no event would name it to the guard and to the deadline.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(
            endpoint.timeout_seconds, connect=endpoint.connect_timeout_seconds, write=_WRITE_SECONDS
        )
        fetch_timeout = httpx.Timeout(30.0, connect=endpoint.connect_timeout_seconds)
        with _proxies():
            post = httpx.Client(
                verify=context,
                limits=limits,
                timeout=timeout,
                trust_env=not self.local,
                headers={"user-agent": USER_AGENT},
                event_hooks={"response": [_forget_location]},
            )
            get = httpx.Client(
                verify=context,
                limits=limits,
                timeout=fetch_timeout,
                trust_env=not self.local,
                headers={"user-agent": USER_AGENT},
            )
        return post, get

    def close(self) -> None:
        """Close both clients."""
        for client in self._clients or ():
            client.close()

    def send(self, job: str, body: Body, on_send: Callable[[], None], sink: Sink) -> None:
        """Send one request and bank its answer.

        Args:
            job: Job id, sent as ``Idempotency-Key`` (the endpoint is not known to honour it).
            body: The request.
            on_send: Called when the connection stands, before the first byte of the request leaves; an
                exception from it stops the request.
            sink: Where the answer goes.

        Raises:
            ConfigError: There is no usable key.
            Unavailable: The request provably did not arrive whole.
            InDoubt: It left whole, and no answer came.
            SpoolError: Our disk failed.
        """
        key = self._read_key()
        attempt = _Attempt(on_send)
        headers = {
            "authorization": f"Bearer {key.reveal()}",
            "content-type": "application/json",
            "content-length": str(body.length),
            "accept": "application/json",
            "accept-encoding": "identity",
            "idempotency-key": job,
        }
        with _Deadline(self._endpoint.deadline_seconds) as deadline:
            attempt.deadline = deadline
            try:
                with self.prepare()[0].stream(
                    "POST", self.url, headers=headers, content=iter(body), extensions={"trace": attempt.trace}
                ) as response:
                    self._bank(response, sink, deadline, key)
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                raise self._translated(error, attempt, deadline, key) from None
            finally:
                sink.close()

    def _bank(self, response: httpx.Response, sink: Sink, deadline: _Deadline, key: Key) -> None:
        """Write the answer to the sink, whatever becomes of the connection."""
        headers = response.headers
        kept = {name: key.mask(headers[name])[:1000] for name in _KEPT_HEADERS if name in headers}
        sink.start(Head(status=response.status_code, headers=kept, at=self._clock()))
        limit, reason = self._endpoint.max_response_bytes, ""
        try:
            for chunk in _masked(response.iter_raw(), key, paid=response.is_success):
                room = limit - sink.written
                sink.write(chunk[:room])
                if len(chunk) > room:
                    reason = f"the answer is larger than max_response_bytes ({limit:,})"
                    break
        except httpx.HTTPError as error:
            cause = deadline.reason or _reason(error, key)
            reason = f"the answer was cut short after {sink.written:,} bytes: {cause}"
        if not reason and deadline.reason and _endless(response):
            reason = f"the answer was cut short after {sink.written:,} bytes: {deadline.reason}"
        sink.finish(Tail(complete=not reason, reason=reason, at=self._clock()))

    def _translated(self, error: Exception, attempt: _Attempt, deadline: _Deadline, key: Key) -> JobError:
        reason = deadline.reason or _reason(error, key)
        if not attempt.began:
            return Unavailable(f"{self._endpoint.base_url} cannot be reached: {reason}", hint=_HINT_REACH)
        if attempt.incomplete:
            return Unavailable(f"the connection broke while the request was sent: {reason}", hint=_HINT_REACH)
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
        with _Deadline(seconds, "") as deadline:
            trace = {"trace": functools.partial(_watch, deadline)}
            try:
                with self.prepare()[0].stream(
                    "GET", url, headers=headers, timeout=seconds, extensions=trace
                ) as response:
                    for chunk in response.iter_raw():
                        body += chunk
                        if len(body) > _MOST_BALANCE_BYTES:
                            break
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                raise Unavailable(deadline.reason or _reason(error, key)) from None
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
        most = self._endpoint.deadline_seconds
        with _Deadline(seconds, "") if seconds < most else _Deadline(most) as deadline:
            for _ in range(_MOST_REDIRECTS + 1):
                self._refuse_foreign(url)
                try:
                    following = self._fetch_once(url, write, limit, deadline)
                except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError) as error:
                    raise FetchError(f"{bare(url)}: {deadline.reason or _reason(error)}") from None
                if following is None:
                    return
                url = following
        raise FetchError(f"{bare(url)}: too many redirects", final=True)

    def _fetch_once(self, url: str, write: Callable[[bytes], object], limit: int, deadline: _Deadline) -> str | None:
        guard = _Guard(httpx.URL(url), self._may_connect, deadline)
        with self.prepare()[1].stream(
            "GET", url, headers={"accept-encoding": "identity"}, extensions={"trace": guard.trace}
        ) as response:
            if response.is_redirect and "location" in response.headers:
                return str(response.url.join(response.headers["location"]))
            if response.status_code != httpx.codes.OK:
                raise FetchError(f"{bare(url)}: HTTP {response.status_code}", refused=response.is_client_error)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise FetchError(f"{bare(url)}: compressed, which nobody asked for", final=True)
            total = 0
            for chunk in response.iter_raw():
                total += len(chunk)
                if total > limit:
                    raise FetchError(f"{bare(url)}: larger than {limit:,} bytes", final=True)
                write(chunk)
        if deadline.reason and _endless(response):
            raise FetchError(f"{bare(url)}: {deadline.reason}")
        return None

    def _may_connect(self, address: str) -> bool:
        """Tell whether pictures may come from an IP address."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        return _is_public(ip) or self._endpoint.allow_private_downloads or (self.local and ip.is_loopback)

    def _refuse_foreign(self, url: str) -> None:
        """Refuse addresses that an answer has no business to name."""
        try:
            parts = urlsplit(url)
            host, user = parts.hostname, "@" in parts.netloc
            _ = parts.port
        except ValueError:
            raise FetchError("the url cannot be read", final=True) from None
        allowed = {"https", "http"} if self.local else {"https"}
        if parts.scheme not in allowed or not host or user:
            raise FetchError(f"{bare(url)}: only a plain {' or '.join(sorted(allowed))} url is fetched", final=True)
        with contextlib.suppress(ValueError):  # a name: the guard looks at whom it leads to
            if not self._may_connect(host):
                raise FetchError(f"{bare(url)}: a private address is not fetched from", final=True)


class _Deadline:
    """Ends a connection when its total time is over; per-operation timeouts cannot, as each byte renews them.

    Args:
        seconds: The total time.
        key: The configuration's key that says so, or an empty string.
    """

    def __init__(self, seconds: float, key: str = "deadline_seconds") -> None:
        self._why = f"no end after {seconds:g} seconds" + (f" ({key})" if key else "")
        self._socket: socket.socket | None = None
        self.at = time.monotonic() + seconds
        self.reason = ""

    def __enter__(self) -> Self:
        _deadlines.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _deadlines.remove(self)

    def watch(self, connection: socket.socket) -> None:
        """Name the connection to end."""
        self._socket = connection
        if self.reason:
            self.end()

    def end(self) -> None:
        """End the connection, now or as soon as there is one."""
        self.reason = self._why
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown: that one takes the TLS state away from the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Deadlines:
    """Ends connections in time, all of them by one thread: to start one for each request delays the request."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[_Deadline] = set()
        self._until = math.inf
        self._thread: threading.Thread | None = None

    def add(self, deadline: _Deadline) -> None:
        """Look after a connection from now on."""
        with self._changed:
            self._running.add(deadline)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            elif deadline.at < self._until:
                self._changed.notify()

    def remove(self, deadline: _Deadline) -> None:
        """Leave a connection alone. The thread looks at its time in vain, but does not have to be woken for that."""
        with self._changed:
            self._running.discard(deadline)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for deadline in [one for one in self._running if one.at <= now]:
                    self._running.discard(deadline)
                    deadline.end()
                self._until = min((one.at for one in self._running), default=math.inf)
                self._changed.wait(None if self._until == math.inf else self._until - time.monotonic())


_deadlines = _Deadlines()


class _Attempt:
    """Watches one request leave, by the trace extension of httpcore.

    Doubt is the default: that the request is incomplete counts only when its sending was seen to fail.
    """

    def __init__(self, on_send: Callable[[], None]) -> None:
        self._on_send = on_send
        self.deadline: _Deadline | None = None
        self.began = False
        self.incomplete = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        _watch(self.deadline, event, info)
        if event == "http11.send_request_headers.started" and info["request"].method == b"POST":
            # Not for the CONNECT to a proxy, which is not the request.
            self._on_send()
            self.began = True
        elif self.began and event in {"http11.send_request_headers.failed", "http11.send_request_body.failed"}:
            self.incomplete = True


class _Guard:
    """Refuses a connection to a private address, by whom we are really connected to and before a byte leaves."""

    def __init__(self, url: httpx.URL, may_connect: Callable[[str], bool], deadline: _Deadline) -> None:
        self._host = url.raw_host.decode("ascii")  # as httpcore says it: of a name in another script, its Punycode
        self._may_connect = may_connect
        self._deadline = deadline
        self._proxied = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        _watch(self._deadline, event, info)
        if event.endswith("connect_tcp.started"):
            # Through a proxy the peer is the proxy, which the admin chose; it resolves the name for itself.
            self._proxied = str(info["host"]) != self._host
        if event.endswith("connect_tcp.complete"):
            try:
                self._look_at(info["return_value"].get_extra_info("server_addr")[0])
            except (FetchError, OSError):  # a peer that has hung up already has no address
                info["return_value"].close()  # nobody else knows it yet
                raise

    def _look_at(self, peer: str) -> None:
        if not self._proxied and not self._may_connect(peer):
            raise FetchError(f"{self._host} has the private address {peer}: not fetched", final=True)


def _watch(deadline: _Deadline | None, event: str, info: dict[str, Any]) -> None:
    """Name a connection to its deadline whenever it has got another socket."""
    if deadline is not None and event.endswith(_CONNECTED):
        deadline.watch(info["return_value"].get_extra_info("socket"))


def _forget_location(response: httpx.Response) -> None:
    """Drop the target of a redirect: httpx reads it even to stay, and an unreadable one would hide the answer."""
    response.headers.pop("location", None)


def _endless(response: httpx.Response) -> bool:
    """Tell whether only the end of the connection ends a body, so that a cut cannot be told from its end."""
    return "content-length" not in response.headers and "transfer-encoding" not in response.headers


def _masked(chunks: Iterator[bytes], key: Key, *, paid: bool) -> Iterator[bytes | memoryview]:
    """Yield an answer without the key, which some servers repeat in what they say."""
    longest = 3 * len(key.reveal())  # each character escaped
    if paid and longest < 3 * _SHORTEST_SECRET:
        yield from chunks  # it would also be found where it is not meant: inside a picture, which only this answer has
        return
    held = b""
    try:
        for chunk in chunks:
            held = key.mask_bytes(held + chunk)
            yield memoryview(held)[:-longest]
            held = held[-longest:]
    except httpx.HTTPError:
        yield held
        raise
    yield held


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, without asking the resolver."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tell whether an address is a public host's; one that leads to an IPv4 address is judged by that."""
    if isinstance(ip, ipaddress.IPv6Address):
        behind = ipaddress.IPv4Address(ip.packed[-4:]) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        if behind:
            return _is_public(behind)
        if ip not in _PUBLIC_V6:  # of which Python knows only some as private
            return False
    return ip.is_global and not ip.is_multicast


def bare(url: str) -> str:
    """Return a url without its query and user: what signs it is a secret."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an unreadable url"
    return printable(f"{parts.scheme}://{host}{port}{parts.path}", 300)


def _reason(error: Exception, key: Key | None = None) -> str:
    """Return an error of the network in words; never header contents, which may be the key.

    Args:
        error: It may hold what the other side sent.
        key: What it must not hold, if the other side was told; masked before the words are cut, which might leave half.
    """
    if isinstance(error, httpx.LocalProtocolError):
        return "the request cannot be put on the wire"
    text = str(error) or type(error).__name__
    return printable(key.mask(text) if key else text, 300)


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
