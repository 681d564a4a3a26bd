"""A fast endpoint for measurements: it discards requests and returns prepared bytes.

It is not the sandbox, which checks and keeps each request: only the daemon's own cost is to be measured here.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import zlib
from dataclasses import dataclass, field
from typing import Self

KEY = "sk-let-" + "0123456789abcdef" * 4
"""As long as a real one, because responses are not searched for a short one."""


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: int) -> bytes:
    """Return a complete PNG of about ``size`` bytes: one pixel, and padding in a private chunk."""
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + _chunk(b"IEND", b"")
    padding = max(0, size - len(head) - len(body) - 12)
    return head + _chunk(b"paDd", b"\x5a" * padding) + body


@dataclass
class Endpoint:
    """The endpoint; ``with Endpoint(images, size) as endpoint`` serves on a free port of loopback.

    With ``keep`` the prompts are kept in the order in which they came; requests must be small then.
    A request without input images gets one small image, so that a daemon can be warmed up.
    """

    images: int
    size: int
    keep: bool = False
    requests: int = 0
    received: int = 0
    prompts: list[str] = field(default_factory=list)
    base_url: str = ""
    _response: bytes = b""
    _small: bytes = b""
    _listener: socket.socket = field(default_factory=socket.socket)

    def __enter__(self) -> Self:
        self._small, self._response = self.response(1, 2000), self.response(self.images, self.size)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(256)
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    @staticmethod
    def response(images: int, size: int) -> bytes:
        """Return a complete response with this number of images of this size."""
        entry = b'{"mime_type": "image/png", "b64_json": "' + base64.b64encode(png(size)) + b'"}'
        body = b'{"provider": "gemini", "model": "bench", "images": [%s], "billing": {"credits_charged": 1}}' % (
            b", ".join([entry] * images)
        )
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        return head % len(body) + body

    def forget(self) -> None:
        """Forget the requests so far."""
        self.requests = self.received = 0
        self.prompts.clear()

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            head, _, rest = data.partition(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
            )
            left, scratch = length - len(rest), bytearray(1 << 20)
            while left > 0 and (got := connection.recv_into(scratch, min(len(scratch), left))):
                left -= got
            self.received += length - left
            if self.keep:
                self.prompts.append(json.loads(rest + scratch[: length - len(rest)])["prompt"])
            self.requests += 1
            connection.sendall(self._response if length > 10_000 else self._small)
