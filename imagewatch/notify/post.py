"""A receiver that has a URL: it gets an event by POST, signed if there is a secret.

The client has nothing in common with that of the API: no key, none of its headers, no redirect is followed, and the
body of the response is not read. The URL may hold a secret, so no message has it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

import httpx

from imagewatch import __version__
from imagewatch.config.values import is_loopback
from imagewatch.notify.secret import HEADER, SecretError, read_secret, secret_source, signature
from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import Notify

SECONDS: Final = 30.0
"""How long it may take in all."""
_STEP_SECONDS: Final = 10.0
"""How long it may take to connect, and until the next part of the response."""
_FAILED = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, ImportError)


class Post:
    """The URL.

    Args:
        notify: URL and secret.
        environ: The daemon's environment: proxies, the folder of credentials.
    """

    name: Final = "url"

    def __init__(self, notify: Notify, environ: Mapping[str, str]) -> None:
        assert notify.url is not None
        self._url = notify.url
        self._notify = notify
        self._environ = environ
        self._trusts_environ = not is_loopback((urlsplit(notify.url).hostname or "").lower())

    def stop(self) -> None:
        """Leave a request alone: it ends with the process."""

    def deliver(self, body: bytes, seconds: float = SECONDS) -> str:
        """Post an event once.

        Args:
            body: The event.
            seconds: How long it may take.

        Returns:
            Why the receiver does not have it, or an empty string.
        """
        headers = {"content-type": "application/json", "user-agent": f"imagewatch/{__version__}"}
        try:
            if source := secret_source(self._notify, self._environ):
                headers[HEADER] = signature(read_secret(source), body)
            status = self._status(body, headers, min(seconds, SECONDS))
        except SecretError as error:
            return str(error)
        except _FAILED as error:
            return f"the request failed: {self._cause(error)}"
        if 200 <= status < 300:  # noqa: PLR2004  success
            return ""
        more = "; redirects are not followed, set the new address" if 300 <= status < 400 else ""  # noqa: PLR2004
        return f"the receiver responded with status {status}{more}"

    def _status(self, body: bytes, headers: dict[str, str], seconds: float) -> int:
        timeout = httpx.Timeout(_STEP_SECONDS)
        with (
            _Limit(seconds) as limit,
            httpx.Client(verify=_trust(), timeout=timeout, trust_env=self._trusts_environ) as client,
            client.stream(
                "POST", self._url, content=body, headers=headers, extensions={"trace": limit.note}
            ) as response,
        ):
            return response.status_code

    def _cause(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        if isinstance(error, httpx.InvalidURL | httpx.LocalProtocolError) or self._url in text:
            text = type(error).__name__
        return printable(known.text(text), 300)


class _Limit:
    """Ends a request that takes too long: a receiver may send one byte every few seconds.

    Args:
        seconds: How long it may take.
    """

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_over = False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None

    def note(self, what: str, details: Mapping[str, Any]) -> None:
        """Note the connection as soon as it is made."""
        if what != "connection.connect_tcp.complete":
            return
        found = details["return_value"].get_extra_info("socket")
        with self._lock:
            self._socket = socket.socket(fileno=os.dup(found.fileno()))  # TLS takes the socket itself
            is_over = self._is_over
        if is_over:
            self._end()

    def _end(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._is_over = True
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes up whatever waits for it


@functools.cache
def _trust() -> ssl.SSLContext:
    """Return the certificates that are trusted; to read them takes longer than a request."""
    return ssl.create_default_context()
