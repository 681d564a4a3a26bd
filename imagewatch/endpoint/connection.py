"""Connections for httpcore: only to checked addresses, and each operation within the time of its call.

Apart from ``client`` so that it is imported with ``httpcore``, which takes long.
"""

# ruff: noqa: SLF001  httpx has no public way to be given a network, httpcore none to make a stream of a socket

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpcore
from httpcore._backends.sync import SyncStream

from imagewatch.endpoint.addresses import NotPublicError, address_in
from imagewatch.endpoint.call import READ_BYTES, OverrunError, current
from imagewatch.system.errors import MORE_FILES, SpoolError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator

    from httpcore import SOCKET_OPTION

    from imagewatch.endpoint.call import Call

httpcore.HTTP11Connection.READ_NUM_BYTES = READ_BYTES  # not 64 KiB


class Network(httpcore.NetworkBackend):
    """Makes connections for the current call.

    Args:
        resolve: Finds the addresses of a name; ``socket.getaddrinfo`` without.
        checked: Whether the call checks each address. Not for a proxy, which the administrator chose.
    """

    def __init__(self, resolve: Callable[..., list[tuple[Any, ...]]] | None = None, *, checked: bool) -> None:
        self._resolve = resolve
        self._checked = checked

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002  we have no use for it
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> Stream:
        """Resolve a name once, check all its addresses, and connect to one of them.

        Raises:
            NotPublicError: One of them may not be connected to; none is.
        """
        call = current()
        with _said(httpcore.ConnectTimeout, httpcore.ConnectError):
            found = self._found(host, port, call)
        if self._checked and not all(call.may_connect(entry[4][0]) for entry in found):
            raise NotPublicError
        with _said(httpcore.ConnectTimeout, httpcore.ConnectError):
            connection = _connection(found, call, timeout)
            for option in (*(socket_options or ()), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)):
                connection.setsockopt(*option)
        call.connected()
        return Stream(SyncStream(connection), call)

    def _found(self, host: str, port: int, call: Call) -> list[tuple[Any, ...]]:
        """Return the addresses of a host, as ``socket.getaddrinfo`` does."""
        ask = functools.partial(self._resolve or socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        if not self._checked or address_in(host) is not None:
            return ask()
        # The name comes from a response: its name server may never respond, and only a thread can be left behind.
        answer: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(ask, answer), name="resolver", daemon=True).start()
        try:
            found = answer.get(timeout=call.left())
        except queue.Empty:
            raise TimeoutError("its name server does not respond") from None
        if isinstance(found, Exception):
            raise found
        return found


def _answer(ask: Callable[[], list[tuple[Any, ...]]], answer: queue.SimpleQueue[Any]) -> None:
    try:
        answer.put(ask())
    except Exception as error:  # noqa: BLE001  raised where it is waited for
        answer.put(error)


class Stream(httpcore.NetworkStream):
    """A connection of a call.

    Args:
        inner: The connection itself.
        call: Whose it is.
    """

    def __init__(self, inner: httpcore.NetworkStream, call: Call) -> None:
        self._inner = inner
        self._call = call

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what has come, or what comes next."""
        self._call.before_read()
        with _said(httpcore.ReadTimeout, httpcore.ReadError):
            most, seconds = self._call.next_bytes(max_bytes), self._call.left_to_read(timeout)
        self._call.used(seconds)
        try:
            content = self._inner.read(most, seconds)
        except httpcore.ReadTimeout as error:
            content = self._arrived(most, error)
        self._call.used()
        try:
            self._call.took(len(content))
        except OverrunError as error:
            raise httpcore.RemoteProtocolError(str(error)) from None
        return content

    def _arrived(self, most: int, error: httpcore.ReadTimeout) -> bytes:
        """Read what has arrived although the time is over: with TLS that is not looked at after a stop."""
        try:
            return self._inner.read(most, self._call.left_to_read(0.0))
        except (TimeoutError, httpcore.TimeoutException, httpcore.NetworkError):
            raise error from None

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of it."""
        # At the end of a request of known length there is nothing to write, which no deadline can prevent.
        if not buffer:
            return
        with _said(httpcore.WriteTimeout, httpcore.WriteError):
            seconds = self._call.left(timeout)
        with self._call.sending():
            self._inner.write(buffer, seconds)
        self._call.used()

    def close(self) -> None:
        """Close the inner stream, with TLS or without."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        """Continue in TLS; the certificate must be that of the name, not of the address."""
        with _said(httpcore.ConnectTimeout, httpcore.ConnectError):
            seconds = self._call.left(timeout)
        return Stream(self._inner.start_tls(ssl_context, server_hostname, seconds), self._call)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401  as inherited
        """Return the information of the inner connection."""
        return self._inner.get_extra_info(info)


def install(client: Any, network: Network, proxied: Network) -> None:  # noqa: ANN401  it is private parts that count
    """Have a client of httpx connect through networks of ours.

    Args:
        client: The client. It has no public way to set one, nor to list the proxies that it found.
        network: For the servers themselves.
        proxied: For proxies.
    """
    for transport, one in ((client._transport, network), *((proxy, proxied) for proxy in client._mounts.values())):
        if transport is None:  # not by a proxy
            continue
        if "_network_backend" not in vars(transport._pool):  # no connection is better than an unchecked one
            raise RuntimeError("this version of httpcore is not supported")
        transport._pool._network_backend = one


@contextlib.contextmanager
def broken_as(late: type[Exception], broken: type[Exception], overrun: type[Exception]) -> Iterator[None]:
    """Turn errors of httpcore into those of who reads a connection: timeout, network, protocol."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise late(str(error)) from error
    except httpcore.NetworkError as error:
        raise broken(str(error)) from error
    except httpcore.ProtocolError as error:
        raise overrun(str(error)) from error


def _connection(found: list[tuple[Any, ...]], call: Call, timeout: float | None) -> socket.socket:
    """Return a connection to the first address that takes one."""
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(family, kind, protocol))
            connection.settimeout(call.left(timeout))
            try:
                connection.connect(address)
            except OSError as error:
                problem = error
                continue
            stack.pop_all()
            return connection
    raise problem or OSError("the name has no address")


@contextlib.contextmanager
def _said(over: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Turn errors of the system into those of httpcore."""
    try:
        yield
    except TimeoutError as error:
        raise over(str(error)) from None
    except (OSError, UnicodeError) as error:  # a label of a name may be too long
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:  # that is not the network's
            message = f"cannot open a connection: {os.strerror(error.errno)}"
            raise SpoolError(message, code=error.errno, hint=MORE_FILES) from None
        raise broken(str(error)) from None
