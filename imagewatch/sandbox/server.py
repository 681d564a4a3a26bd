"""HTTP: framing, the routes, and writing a response correctly or not."""

from __future__ import annotations

import contextlib
import errno
import http
import os
import re
import secrets
import socket
import struct
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from imagewatch import __version__
from imagewatch.sandbox.contract import (
    BALANCE_ROUTE,
    DELIVERY,
    MAX_BODY_BYTES,
    REDIRECTED_ROUTE,
    REPORT_ROUTE,
    ROUTE,
)
from imagewatch.sandbox.replies import Reply, json_reply

if TYPE_CHECKING:
    from imagewatch.sandbox.service import Service


class Server(ThreadingHTTPServer):
    """One daemon thread per connection; keeps the open connections, so that it can cut them.

    The address is bound on construction. The service is set afterwards, as it needs the port.

    Attributes:
        service: Returns the responses; set before the first request is served.
    """

    service: Service

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self._open: set[socket.socket] = set()
        self._closed = threading.Condition()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind the address. Unlike the standard library, this resolves no host name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  as inherited
        """Start the thread of a connection."""
        with self._closed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401  as inherited
        """End a connection."""
        super().shutdown_request(request)
        with self._closed:
            self._open.discard(request)
            self._closed.notify_all()

    def wake(self) -> None:
        """Wake the accepting thread, so that it ends immediately and not at its next check."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def cut_all(self, timeout: float) -> None:
        """Cut all connections and wait for their threads."""
        with self._closed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._closed.wait_for(lambda: not self._open, timeout)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002  as inherited
        """Record an error for the report, unless only the client closed the connection."""
        error = sys.exception()
        gone = isinstance(error, OSError) and error.errno == errno.ENOTCONN  # the client closed the connection
        if not gone and not isinstance(error, ConnectionError | TimeoutError):
            self.service.books.fault(repr(error)[:500])


class _Handler(BaseHTTPRequestHandler):
    """HTTP on one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 600  # an abandoned connection must not keep its thread forever
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a GET."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the body is not read, so no request after it can be read
        target = self._target()
        service = self.server.service
        if target.path.startswith(DELIVERY):
            reply = service.fetch(self.headers, target)
        elif target.path == BALANCE_ROUTE:
            reply = service.show_balance(self.headers)
        elif target.path == REPORT_ROUTE:
            reply = service.show_report()
        elif target.path == REDIRECTED_ROUTE:
            reply = service.count_redirected()
        else:
            reply = _no_route(target)
        service.say(f"GET {target.path!a} {reply.status}")
        self._send(reply)

    def do_POST(self) -> None:
        """Answer a POST after reading its whole body."""
        target = self._target()
        body = self._body()
        if body is None:
            return
        if target.path == ROUTE:
            self._send(self.server.service.generate(self.headers, body))
        elif target.path == REDIRECTED_ROUTE:
            self._send(self.server.service.count_redirected())
        else:
            self._send(_no_route(target))

    def do_other(self) -> None:
        """Refuse any other method."""
        self.close_connection = True
        self._send(_no_route(self._target()))

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_other  # noqa: N815  inherited

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as inherited
        """Write nothing to stderr."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer a request that is not valid HTTP."""
        self.close_connection = True
        self._send(json_reply(code, {"message": message or "not a request"}))

    def _target(self) -> urllib.parse.SplitResult:
        """Return the parsed target; one that cannot be parsed gets a 404."""
        try:
            return urllib.parse.urlsplit(self.path)
        except ValueError:
            return urllib.parse.urlsplit("/invalid")

    def _body(self) -> bytearray | None:
        """Read the body, or refuse the request and return ``None``."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            refused = (411, "send Content-Length, not chunks")
        elif len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            refused = (400, "Content-Length must be one number")
        elif int(lengths[0]) > MAX_BODY_BYTES:
            refused = (413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        else:
            return self._whole(int(lengths[0]))
        self._refuse_unread(*refused)
        return None

    def _whole(self, length: int) -> bytearray:
        """Read a body of this length."""
        body = bytearray()
        while len(body) < length:
            piece = self.rfile.read(min(1 << 20, length - len(body)))
            if not piece:
                raise ConnectionAbortedError("the client closed the connection before its body was complete")
            body += piece
        return body

    def _refuse_unread(self, status: int, message: str) -> None:
        """Refuse a request whose body is not read.

        What the client still sends is read and dropped for a short time. Closing immediately would reset the
        connection, and the client would not get the response.
        """
        self.close_connection = True
        self._send(json_reply(status, {"message": message}))
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(2.0)
        for _ in range(64):
            if not self.rfile.read(1 << 20):
                break

    def _send(self, reply: Reply) -> None:
        """Write a response with its faults."""
        if reply.ending == "reset":
            # With linger 0, closing sends RST. The descriptor is closed here, because the server would call
            # shutdown first, which sends FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if reply.ending != "whole" or not reply.sized:
            self.close_connection = True
        if reply.ending in {"reset", "drop"}:
            return
        head = self._head(reply)
        if reply.ending == "drop-headers":
            self.wfile.write(head[: len(head) // 2])
            return
        self._write(head, reply.head_pace)
        left = reply.length // 2 if reply.ending == "truncate" else reply.length
        if self.command == "HEAD":
            return
        for chunk in reply.chunks():
            self._write(chunk[:left], reply.body_pace)
            left -= min(left, len(chunk))

    def _head(self, reply: Reply) -> bytes:
        """Return the status line and the headers."""
        try:
            phrase = http.HTTPStatus(reply.status).phrase
        except ValueError:
            phrase = "Origin Error"
        headers = {
            "Server": f"imagewatch-sandbox/{__version__}",
            "Date": self.date_time_string(),
            "x-request-id": f"req_{secrets.token_hex(12)}",
            **({"Content-Length": str(reply.length)} if reply.sized else {}),
            **({"Connection": "close"} if self.close_connection else {}),
            **reply.headers,
        }
        lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def _write(self, content: bytes, pace: float) -> None:
        """Write bytes, all at the same time or one by one."""
        if not pace:
            self.wfile.write(content)
            return
        for index in range(len(content)):
            self.server.service.pause(pace)
            self.wfile.write(content[index : index + 1])


def _no_route(target: urllib.parse.SplitResult) -> Reply:
    """Return the response for an unknown route, or for a method that the route does not have."""
    if target.path == ROUTE:
        return json_reply(405, {"message": "Method not allowed"}, Allow="POST")
    return json_reply(404, {"message": "Not found"})
