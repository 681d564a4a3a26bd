"""The two HTTP clients: one for the endpoint, one for images, which never has the API key."""

from __future__ import annotations

import contextlib
import ssl
import threading
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from imagewatch import __version__
from imagewatch.endpoint.addresses import is_this_machine
from imagewatch.endpoint.call import READ_BYTES
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from imagewatch.config.schema import Endpoint
    from imagewatch.endpoint.call import Call
    from imagewatch.system.masking import Mask

USER_AGENT = f"imagewatch/{__version__}"
_HEADERS = {"user-agent": USER_AGENT, "connection": "close"}
ERRORS: Final = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError, OSError)
"""How a call may fail."""
COMPRESSED_MORE_BYTES = 1 << 20
"""A response can be so much larger compressed than decompressed, unless it is an attack."""
_WRITE_SECONDS = 60.0


class Clients:
    """Makes the two clients when they are first used. Safe to use from several threads.

    Args:
        endpoint: Address, time limits, trust.
        resolve: Finds the addresses of an image host; ``socket.getaddrinfo`` without.

    Attributes:
        is_local: Whether the endpoint is on this machine.
    """

    def __init__(self, endpoint: Endpoint, resolve: Callable[..., list[tuple[Any, ...]]] | None = None) -> None:
        self._endpoint = endpoint
        self._resolve = resolve
        self._lock = threading.Lock()
        self._clients: tuple[httpx.Client, httpx.Client] | None = None
        self._transport: httpx.BaseTransport | None = None
        self.is_local = is_this_machine(urlsplit(endpoint.base_url).hostname or "")
        if endpoint.ca_file or getproxies():
            self.prepare()  # an error in these settings is reported at the start

    @property
    def is_prepared(self) -> bool:
        """Whether the clients are made."""
        return self._clients is not None

    def prepare(self) -> tuple[httpx.Client, httpx.Client]:
        """Make the clients, if that was not done yet. It takes as long as half of a start.

        Returns:
            The client for the endpoint, and the one for images.

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
        networks = Network(self._resolve, checked=False), Network(self._resolve, checked=True)
        # A connection for each request: a kept one that the server closes meanwhile looks like a lost response. The
        # limit alone is not enough: between the end of a request and the check of the limit another one may take it.
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
                    trust_env=not self.is_local,
                    headers=_HEADERS,
                )
                for timeout in timeouts
            )
        for client, network in zip((post, get), networks, strict=True):
            install(client, network, networks[0])
        self._transport = post._transport_for_url(httpx.URL(endpoint.base_url))  # noqa: SLF001  its own, or that of a proxy
        return post, get

    @contextlib.contextmanager
    def post(
        self, url: httpx.URL, headers: dict[str, str], body: Iterable[bytes], trace: Callable[..., None]
    ) -> Iterator[httpx.Response]:
        """Send a request to the endpoint; its response is not read yet.

        By the transport of the client: the client itself would read the target of a redirect, and send cookies of
        earlier responses. Neither may be used here.

        Args:
            url: The address.
            headers: Those that concern this request.
            body: In pieces.
            trace: Called by httpcore for each step.
        """
        client = self.prepare()[0]
        assert self._transport is not None
        extensions = {"timeout": client.timeout.as_dict(), "trace": trace}
        request = httpx.Request("POST", url, headers=_HEADERS | headers, content=body, extensions=extensions)
        response = self._transport.handle_request(request)
        response.request = request
        try:
            yield response
        finally:
            response.close()

    def close(self) -> None:
        """Close both clients."""
        for client in self._clients or ():
            client.close()


def pieces(response: httpx.Response, call: Call, most: int) -> Iterator[bytes]:
    """Yield a body as it arrives, while its call has time and its pieces are not too small.

    Args:
        response: Not read yet.
        call: Its call.
        most: Bytes after which no more is read.
    """
    size = 0
    for piece in _raw(response):
        yield piece
        size += len(piece)
        if not call.is_worth_reading(size):
            raise httpx.RemoteProtocolError("its pieces are too small")
        if size > most:
            raise httpx.ReadError(f"it is larger than {most:,} bytes")


def _raw(response: httpx.Response) -> Iterator[bytes]:
    """Yield a body as ``iter_raw`` does; one of a known length is read from the connection itself.

    The parser of the HTTP library would copy each piece four times, which is a fifth of the CPU of a job.
    """
    from imagewatch.endpoint.connection import broken_as  # noqa: PLC0415  as in Clients._made

    body, length = response.iter_raw(), _length(response)
    if length is None:
        yield from body
        return
    size = len(first := next(body, b""))  # all that the parser has; as long as it is not done, the connection is open
    if not first:
        return
    yield first
    stream, seconds = response.extensions["network_stream"], response.request.extensions["timeout"]["read"]
    while size < length:
        with broken_as(httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError):
            piece = stream.read(READ_BYTES, seconds)
        if not piece:
            raise httpx.RemoteProtocolError(f"the connection was closed after {size:,} of {length:,} bytes")
        piece = piece[: length - size]
        size += len(piece)
        yield piece


def _length(response: httpx.Response) -> int | None:
    """Return the length of a body if its end does not have to be found by a parser."""
    headers = response.headers
    if "transfer-encoding" in headers or not response.is_success:
        return None
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def reason_of(error: Exception, secret: Mask | None = None) -> str:
    """Return the text of a network error; never header contents, which may be the key.

    Args:
        error: It may hold what the other side sent.
        secret: What it must not hold; masked before the text is cut, which might leave half.
    """
    if isinstance(error, httpx.LocalProtocolError):
        return "the request cannot be sent"
    text = known.text(str(error).rstrip(".") or type(error).__name__)
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
