"""Downloads images by URL, without the API key."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from imagewatch.endpoint.addresses import NotPublicError, address_in, is_public
from imagewatch.endpoint.call import Call
from imagewatch.endpoint.coding import Plain, UndecodableError, is_coding
from imagewatch.endpoint.http_clients import COMPRESSED_MORE_BYTES, ERRORS, Clients, pieces, reason_of
from imagewatch.protocol.image_kinds import SNIFF_BYTES, sniff
from imagewatch.system.errors import JobError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.config.schema import Endpoint

_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_MOST_REDIRECTS = 3


class FetchError(JobError):
    """An image could not be downloaded. A GET is free: it may be tried again unless ``final``.

    Attributes:
        final: Trying again cannot help.
        refused: The host refused it (4xx); it may only be too early, so a few more tries are made.
    """

    def __init__(self, message: str, *, final: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.final = final
        self.refused = refused


class Downloads:
    """Downloads images. Safe to use from several threads.

    Args:
        endpoint: Time limits, and whether private addresses are allowed.
        clients: The HTTP clients.
    """

    def __init__(self, endpoint: Endpoint, clients: Clients) -> None:
        self._endpoint = endpoint
        self._clients = clients

    def fetch(self, url: str, write: Callable[[bytes], object], limit: int, seconds: float) -> None:
        """Download an image.

        Args:
            url: From a response; not trusted.
            write: Takes the pieces. The disk fails with a ``SpoolError``: an ``OSError`` counts as the network's.
            limit: Most bytes.
            seconds: How long it may take, redirects and all; ``deadline_seconds`` at the most.

        Raises:
            FetchError: It could not be downloaded.
            SpoolError: The local disk failed.
        """
        most, key = self._endpoint.deadline_seconds, "deadline_seconds"
        with Call(min(seconds, most), key if seconds >= most else "", may_connect=self._may_connect) as call:
            for _ in range(_MOST_REDIRECTS + 1):
                target = self._checked(url)
                try:
                    following = self._fetch_once(target, write, limit, call)
                except NotPublicError:
                    raise _not_public(url) from None
                except ERRORS as error:
                    raise FetchError(f"{bare(url)}: {call.reason or reason_of(error)}") from None
                if following is None:
                    return
                url = following
        raise FetchError(f"{bare(url)}: too many redirects", final=True)

    def _fetch_once(self, url: httpx.URL, write: Callable[[bytes], object], limit: int, call: Call) -> str | None:
        named = bare(str(url))
        with self._clients.prepare()[1].stream(
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
        """Return whether images may come from an IP address."""
        ip = ipaddress.ip_address(address)
        return is_public(ip) or self._endpoint.allow_private_downloads or (self._clients.is_local and ip.is_loopback)

    def _checked(self, url: str) -> httpx.URL:
        """Return a URL that a response may name, as it will be used.

        The addresses of a name are checked when the connection is made; behind a proxy the proxy has to check them.
        """
        try:
            parts = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise FetchError("the URL is not valid", final=True) from None
        allowed = {"https", "http"} if self._clients.is_local else {"https"}
        if parts.scheme not in allowed or not parts.host or parts.userinfo:
            raise FetchError(
                f"{bare(url)}: only {' or '.join(sorted(allowed))} URLs without a user name are downloaded", final=True
            )
        host = parts.raw_host.decode("ascii")
        if not _HOST.fullmatch(host) or not 0 < (parts.port or 443) < 1 << 16:
            raise FetchError("the URL is not valid", final=True)  # URL readers differ on it
        address = address_in(host)
        if address is not None and not self._may_connect(str(address)):
            raise _not_public(url)
        return parts


def _image(response: httpx.Response, named: str, call: Call, limit: int) -> Iterator[bytes]:
    """Yield an image without its content coding. We ask for none, but some hosts store images in one.

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
    for chunk in pieces(response, call, limit + COMPRESSED_MORE_BYTES):
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
        raise FetchError(f"{named}: has the encoding {printable(coding, 40)!r}, which was not requested", final=True)
    yield body.end()


def _bounded(parts: Iterator[bytes], named: str, limit: int) -> Iterator[bytes]:
    """Yield pieces up to a limit.

    Raises:
        FetchError: There is more.
    """
    total = 0
    for piece in parts:
        total += len(piece)
        if total > limit:
            raise FetchError(f"{named}: larger than {limit:,} bytes", final=True)
        yield piece


def bare(url: str) -> str:
    """Return a URL without its query and user: its signature is a secret."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an invalid URL"
    return printable(f"{parts.scheme}://{host}{port}{parts.path}", 300)


def _not_public(url: str) -> FetchError:
    """Return the error for a refused address: nothing that the server which named it does not know."""
    return FetchError(f"{bare(url)}: the address is not public", final=True)
