"""A server in a process of its own that puts each byte of a response into a TLS record of its own, very fast.

Its arguments: a file with a certificate, one with its key. It prints its port.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"


def serve(connection: socket.socket, context: ssl.SSLContext) -> None:
    """Read a request and answer it for ever."""
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = context.wrap_bio(received, to_send, server_side=True)

    def carry(act: Callable[[], object]) -> None:
        while True:
            try:
                act()
            except ssl.SSLWantReadError:
                connection.sendall(to_send.read())
                received.write(connection.recv(65536))
            else:
                break
        connection.sendall(to_send.read())

    carry(secured.do_handshake)
    carry(lambda: secured.read(65536))
    secured.write(HEAD)
    while True:
        for _ in range(5000):
            secured.write(b"x")
        connection.sendall(to_send.read())


def main() -> None:
    """Serve one connection after the other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[1:])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                serve(connection, context)


if __name__ == "__main__":
    main()
