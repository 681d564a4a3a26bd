"""A plain socket that follows a script, for responses that no proper server gives; and what to send and expect."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from PIL import Image

from imagewatch.sandbox.image import EncodedImage

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    import pytest

    from support.daemon import Folders
    from support.station import Station

SOON = 20.0


class Exchange:
    """One connection, seen from the server."""

    def __init__(self, connection: socket.socket, stopping: threading.Event) -> None:
        self.connection = connection
        self._stopping = stopping
        self._held = b""

    def secure(self, context: ssl.SSLContext) -> None:
        """Continue in TLS."""
        self.connection = context.wrap_socket(self.connection, server_side=True)

    def head(self) -> bytes:
        """Read the head of a request."""
        while b"\r\n\r\n" not in self._held:
            if not (more := self.connection.recv(65536)):
                raise ConnectionAbortedError("the client left before its head was whole")
            self._held += more
        head, _, self._held = self._held.partition(b"\r\n\r\n")
        return head

    def body(self, head: bytes, most: int | None = None) -> bytes:
        """Read the body that a head announces, or the beginning of it."""
        lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        left = int(lengths[0].split(b":")[1]) if lengths else 0
        left = left if most is None else min(left, most)
        body = bytearray(self._held[:left])
        while len(body) < left and (more := self.connection.recv(min(1 << 20, left - len(body)))):
            body += more
        return bytes(body)

    def request(self) -> tuple[bytes, bytes]:
        """Read a whole request."""
        head = self.head()
        return head, self.body(head)

    def send(self, content: bytes) -> None:
        """Send bytes."""
        self.connection.sendall(content)

    def trickle(self, content: bytes, seconds: float) -> None:
        """Send one byte at a time for as long as the other side listens."""
        for index in range(len(content)):
            if self._stopping.wait(seconds):
                return
            self.send(content[index : index + 1])

    def drain(self) -> int:
        """Read until the other side has closed; return how many bytes came."""
        total = len(self._held)
        try:
            while more := self.connection.recv(1 << 20):
                total += len(more)
        except ConnectionError:
            pass
        return total

    def pause(self, seconds: float) -> None:
        """Do nothing for a while, or until the test is over."""
        self._stopping.wait(seconds)

    def linger(self) -> None:
        """Neither read nor write until the test is over."""
        self._stopping.wait(SOON)

    def reset(self) -> None:
        """End the connection rudely."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class Scripted:
    """A server with one script for each connection, in order; one connection more is a fault.

    Args:
        scripts: Called with the exchange; the connection is closed when they return.
        receive_bytes: Size of the receive buffer, so that a client cannot get rid of a body that is not read.
    """

    def __init__(self, *scripts: Callable[[Exchange], object], receive_bytes: int | None = None) -> None:
        self._scripts = list(scripts)
        self._threads: list[threading.Thread] = []
        self._open: set[Exchange] = set()
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._ended = 0
        self._listener = socket.socket()
        if receive_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.port = self._listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.connections = 0
        self.faults: list[str] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert self.faults == []

    def stop(self) -> None:
        """Refuse further connections and end those that are open."""
        self._stopping.set()
        for one in (self._listener, *[exchange.connection for exchange in list(self._open)]):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(
                    one, socket.SHUT_RDWR
                )  # TLS has one of its own, which its reader does not survive
        self._listener.close()
        for thread in self._threads:
            thread.join(SOON)
            assert not thread.is_alive()

    def wait_for(self, scripts: int) -> None:
        """Wait until so many scripts have come to their end."""
        with self._changed:
            is_so = self._changed.wait_for(lambda: self._ended >= scripts, SOON)
            assert is_so, f"waited for {scripts} scripts to end, but {self._ended} have"

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if not self._scripts:
                self.faults.append("another connection was not expected")
                connection.close()
                continue
            exchange = Exchange(connection, self._stopping)
            self._open.add(exchange)
            self._start(self._serve, self._scripts.pop(0), exchange)

    def _serve(self, script: Callable[[Exchange], object], exchange: Exchange) -> None:
        exchange.connection.settimeout(SOON)
        try:
            script(exchange)
        except (ConnectionError, OSError):
            pass  # the client hung up, which is for the test to judge
        except Exception as error:  # noqa: BLE001  reported by the test's own thread
            self.faults.append(repr(error))
        exchange.connection.close()
        self._open.discard(exchange)
        with self._changed:
            self._ended += 1
            self._changed.notify_all()


def over_tls(context: ssl.SSLContext, script: Callable[[Exchange], object]) -> Callable[[Exchange], None]:
    """Return a script that does the same as another one, in TLS."""

    def secured(exchange: Exchange) -> None:
        exchange.secure(context)
        script(exchange)

    return secured


def tunnel(context: ssl.SSLContext, script: Callable[[Exchange], object]) -> Callable[[Exchange], None]:
    """Return the script of a proxy behind which, in TLS, another script is followed."""

    def proxied(exchange: Exchange) -> None:
        assert exchange.head().startswith(b"CONNECT ")
        exchange.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        over_tls(context, script)(exchange)

    return proxied


def through_proxy(patch: pytest.MonkeyPatch, proxy: Scripted) -> None:
    """Have the environment name a proxy for https."""
    patch.setenv("HTTPS_PROXY", proxy.base_url)
    patch.delenv("NO_PROXY", raising=False)
    patch.delenv("no_proxy", raising=False)


def responding(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> Callable[[Exchange], None]:
    """Return a script that reads a request and gives a proper response."""

    def script(exchange: Exchange) -> None:
        exchange.request()
        exchange.send(response(body, *headers, status=status))

    return script


def response(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a response with its length."""
    lines = (b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def paid(*images: bytes | str, **more: object) -> bytes:
    """Return the body of a success: images as bytes, urls as text."""
    entries = [
        {"url": one} if isinstance(one, str) else {"b64_json": base64.b64encode(one).decode(), "mime_type": "image/png"}
        for one in images
    ]
    billing = {"credits_charged": 7}
    return json.dumps({"provider": "flux", "model": "m", "images": entries, "billing": billing, **more}).encode()


def small_image(
    kind: str = "PNG", color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (40, 30)
) -> bytes:
    """Return a small image."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def heavy(length: int) -> bytes:
    """Return a whole PNG of about that many bytes."""
    return b"".join(EncodedImage(small_image(), "image/png", padding=length).chunks())


# What is seen from outside


def over(station: Station) -> None:
    """Nothing of the job is left, and nothing makes it be sent again."""
    assert station.leftovers() == []
    assert station.names("inbox") == []
    assert station.recover() == []
    assert station.work() == []


def refused(station: Station, stem: str, originals: dict[str, str | bytes], *, beside: str = "") -> dict[str, Any]:
    """Check a prompt that went to the errors folder; return its error file."""
    over(station)
    assert station.names("outbox") == []
    assert station.names("archive") == []
    raw = [f"{stem}.answer.{beside}"] if beside else []
    assert station.names("errors") == sorted([*originals, f"{stem}.error.toml", *raw])
    for name, content in originals.items():
        assert (station.errors / name).read_bytes() == _bytes(content)
    result_file = station.error(stem)
    assert result_file["schema"] == 1
    assert result_file["source"] == f"{stem}.prompt.txt"
    assert result_file["message"]
    assert result_file["next"]
    assert "billing" not in result_file or result_file["charged"] == "yes"
    return result_file


def completed(station: Station, stem: str, originals: dict[str, str | bytes], *names: str) -> dict[str, Any]:
    """Check a prompt that became images of these names; return its receipt."""
    over(station)
    assert station.names("errors") == []
    assert station.names("outbox") == sorted([*names, f"{stem}.receipt.toml"])
    assert station.names("archive") == sorted(originals)
    for name, content in originals.items():
        assert (station.archive / name).read_bytes() == _bytes(content)
    result_file = station.receipt(stem)
    assert result_file["charged"] == "yes"
    assert [image["file"] for image in result_file["images"]] == list(names)
    return result_file


def returned(station: Station, originals: dict[str, str | bytes]) -> None:
    """Check a prompt that waits in the inbox as it was dropped, as if nothing had happened."""
    assert station.leftovers() == []
    assert station.names("inbox") == sorted(originals)
    for name, content in originals.items():
        assert (station.inbox / name).read_bytes() == _bytes(content)
    for folder in ("outbox", "errors", "archive"):
        assert station.names(folder) == []
    assert [row for row in station.ledger.rows() if row["charged"] != "no"] == []


def drop(station: Folders, originals: dict[str, str | bytes]) -> None:
    """Drop files, prompts last, under names of any length."""
    for name, content in sorted(originals.items(), key=lambda item: item[0].endswith(".prompt.txt")):
        temporary = station.inbox / ".dropped"
        temporary.write_bytes(_bytes(content))
        temporary.rename(station.inbox / name)


def no_secret(top: Path, key: str, printed: str) -> None:
    """The key is in no file and no log; what signs a url is in no result file and no log."""
    assert key not in printed
    assert "sig=" not in printed
    for path in top.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert key.encode() not in content, path
            if path.suffix == ".toml" or ".sqlite3" in path.name:
                assert b"sig=" not in content, path


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()
