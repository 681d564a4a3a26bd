"""A connection between a client and a PostgreSQL that fails when a test says so."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
_CHUNK = 65536
_READY = b"Z\0\0\0\5"
"""The start of the message with which PostgreSQL ends what it answers to a command (ReadyForQuery)."""


def _reset(client: socket.socket) -> None:
    """Close a connection as if there were no server."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class _Way:
    """One direction of a connection: what has come from one side and is not yet at the other.

    Attributes:
        held: When each part may continue, and the part; an empty part is the end.
        is_open: More may come.
        is_ended: The other side has received the end, or takes no more.
    """

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.held: deque[tuple[float, bytes]] = deque()
        self.is_open, self.is_ended = True, False

    def receive(self, due: float) -> bytes:
        """Hold what has come until it is due; return it."""
        try:
            data = self.source.recv(_CHUNK)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        self.is_open = bool(data)
        self.held.append((due, data))
        return data

    def send(self, now: float) -> bytes:
        """Forward what is due, as much as the other side takes; return it."""
        sent = b""
        while self.held and self.held[0][0] <= now:
            due, data = self.held.popleft()
            try:
                count = self.sink.send(data) if data else self.end()
            except BlockingIOError:
                count = 0
            except OSError:
                self.held.clear()
                self.is_ended = True
                break
            sent += data[:count]
            if count < len(data):
                self.held.appendleft((due, data[count:]))
                break
        return sent

    def hurry(self) -> None:
        """What is held may continue now."""
        self.held = deque((0.0, data) for _, data in self.held)

    def end(self) -> int:
        """Give the other side the end of this direction."""
        self.is_ended = True
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)
        return 0


class _Connection:
    """A client, the server, and both directions between them.

    Attributes:
        passed: What the client has sent since the mode last changed.
        answered: What the server has answered since its answers are lost.
        is_lossy: Answers are lost, and after the first whole one the client.
        has_lost: An answer was lost.
        is_left: The client is disconnected; the server may still work.
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        for one in (client, server):
            one.settimeout(0)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client, self.server = client, server
        self.out, self.back = _Way(client, server), _Way(server, client)
        self.passed, self.answered = bytearray(), bytearray()
        self.is_lossy = self.has_lost = self.is_left = False

    def leave(self) -> None:
        """Disconnect the client. The server still works on what it has received, then finds the end."""
        if not self.is_left:
            self.is_left = True
            self.drop()
            self.client.close()
            self.out.held.clear()
            self.out.is_open = False
            self.out.end()

    def drop(self) -> None:
        """Lose what the server has answered."""
        self.answered += b"".join(data for _, data in self.back.held)
        self.has_lost = self.has_lost or bool(self.back.held)
        self.back.held.clear()

    @property
    def is_over(self) -> bool:
        """Whether neither side can receive more."""
        return self.out.is_ended and (self.back.is_ended or (self.is_left and not self.back.is_open))

    def close(self) -> None:
        """Close both sides."""
        self.client.close()
        self.server.close()


class Proxy:
    """Forwards connections to a server on 127.0.0.1, in a thread of its own, until a test asks for a fault.

    Each method returns when the fault is in force, for all connections, the present and the later ones. A fault
    replaces the one before. The server always works on what was forwarded to it, as it does if a network fails.
    If the proxy closes the connection, the server finds its end only after that.

    Attributes:
        port: Where clients connect on 127.0.0.1; it stays the same.
    """

    def __init__(self, server_port: int) -> None:
        self.port, self._server_port = free_port(), server_port
        self._connections: list[_Connection] = []
        self._ended: list[bytearray] = []
        """What clients have sent on connections that are over."""
        self._listener: socket.socket | None = None
        self._asked: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waking, self._wake = socket.socketpair()
        self._passing = threading.Condition()
        self._is_hanging = self._is_dropping = self._is_closed = False
        self._delay_seconds, self._marker = 0.0, b""
        self._listen()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def through(self, uri: str) -> str:
        """How to connect to a database of the server through this proxy."""
        parts = urlsplit(uri)
        user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        return parts._replace(netloc=f"{user}127.0.0.1:{self.port}").geturl()

    def cut(self) -> None:
        """Close all connections, and refuse new ones. What was not forwarded yet is lost."""
        self._change(self._cut)

    def hang(self) -> None:
        """Accept connections, and forward nothing in either direction; ``restore`` forwards what has come."""
        self._change(lambda: self._set(is_hanging=True))

    def swallow_replies(self) -> None:
        """Forward what clients send, and lose what the server answers."""
        self._change(lambda: self._set(is_dropping=True))

    def swallow_reply_of(self, marker: bytes) -> None:
        """Lose the answer to the next command that contains a marker, and then the connection; once.

        The command is forwarded. When the server has answered it, the client is disconnected without the answer. Other
        connections, and later ones, work.
        """
        self._change(lambda: self._set(marker=marker))

    def delay(self, seconds: float) -> None:
        """Forward everything, in each direction so much later."""
        self._change(lambda: self._set(delay_seconds=seconds))

    def restore(self) -> None:
        """Forward everything again. Connections of which an answer was lost are closed: they cannot continue."""
        self._change(self._set)

    def wait_for(self, marker: bytes, seconds: float = PATIENCE) -> None:
        """Wait until a client has sent a message with a marker since the last change of the mode.

        It has been forwarded; in ``hang``, it has arrived here and is held.

        Raises:
            AssertionError: None has.
        """
        with self._passing:
            if not self._passing.wait_for(lambda: self._has_passed(marker), seconds):
                passed = [bytes(one) for one in self._passed()]
                raise AssertionError(f"waited {seconds:g} s for a message with {marker!r}, but clients sent: {passed}")

    def close(self) -> None:
        """Close all connections and end the thread."""
        if not self._is_closed:
            self._change(self._close)
            self._thread.join(PATIENCE)
            self._waking.close()
            self._wake.close()

    # From here on: only in the thread, but for _change, _has_passed and _passed.

    def _change(self, change: Callable[[], None]) -> None:
        done = Future[None]()
        self._asked.append((change, done))
        self._wake.send(b"w")
        done.result(PATIENCE)

    def _set(
        self, *, is_hanging: bool = False, is_dropping: bool = False, delay_seconds: float = 0.0, marker: bytes = b""
    ) -> None:
        self._is_hanging, self._is_dropping = is_hanging, is_dropping
        self._delay_seconds, self._marker = delay_seconds, marker
        self._listen()
        with self._passing:
            self._ended.clear()
            for one in self._connections:
                one.passed.clear()
        for one in self._connections:
            one.out.hurry()
            one.back.hurry()
            if one.has_lost and not is_dropping:
                one.leave()

    def _cut(self) -> None:
        self._set()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for one in self._connections:
            one.leave()

    def _close(self) -> None:
        self._cut()
        for one in self._connections:
            one.close()
        self._is_closed = True

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self._listener.settimeout(0)

    def _has_passed(self, marker: bytes) -> bool:
        return any(marker in one for one in self._passed())

    def _passed(self) -> list[bytearray]:
        return [*self._ended, *(one.passed for one in self._connections)]

    def _serve(self) -> None:
        while not self._is_closed:
            ready = self._ready()
            if self._waking.fileno() in ready:
                self._waking.recv(_CHUNK)
            if self._listener is not None and self._listener.fileno() in ready:
                self._accept(self._listener)
            for one in self._connections:
                self._move(one, ready)
            for one in [one for one in self._connections if one.is_over]:
                one.close()
                with self._passing:
                    self._connections.remove(one)
                    self._ended.append(one.passed)
            while self._asked:
                change, done = self._asked.popleft()
                try:
                    change()
                except Exception as error:  # noqa: BLE001  for the caller
                    done.set_exception(error)
                else:
                    done.set_result(None)

    def _ready(self) -> set[int]:
        """Wait until something can be done; the sockets that are ready."""
        now, poll, events, due = time.monotonic(), select.poll(), dict[int, int](), list[float]()
        for way in (way for one in self._connections for way in (one.out, one.back)):
            if way.is_open:
                events[way.source.fileno()] = events.get(way.source.fileno(), 0) | select.POLLIN
            if way.held and not self._is_hanging:
                if way.held[0][0] <= now:
                    events[way.sink.fileno()] = events.get(way.sink.fileno(), 0) | select.POLLOUT
                else:
                    due.append(way.held[0][0])
        for one in filter(None, (self._waking, self._listener)):
            events[one.fileno()] = select.POLLIN
        for number, wanted in events.items():
            poll.register(number, wanted)
        return {number for number, _ in poll.poll((min(due) - now) * 1000 + 1 if due else None)}

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port), PATIENCE)
            except OSError:
                _reset(client)
                return
            with self._passing:
                self._connections.append(_Connection(client, server))

    def _move(self, one: _Connection, ready: set[int]) -> None:
        """Receive what has come, and forward or lose what the mode says."""
        due = time.monotonic() + self._delay_seconds
        if one.out.is_open and one.client.fileno() in ready:
            arrived = one.out.receive(due)
            if self._is_hanging:
                self._pass(one, arrived)
        if one.back.is_open and one.server.fileno() in ready:
            one.back.receive(due)
        if one.is_left or self._is_dropping or one.is_lossy:
            one.drop()
            if one.is_lossy and (_READY in one.answered or not one.back.is_open):
                one.leave()
        if not self._is_hanging:
            now = time.monotonic()
            self._pass(one, one.out.send(now))
            if not one.is_left:
                one.back.send(now)

    def _pass(self, one: _Connection, sent: bytes) -> None:
        """Note what a client has sent."""
        if sent:
            with self._passing:
                before = len(one.passed)
                one.passed += sent
                self._passing.notify_all()
            if self._marker and one.passed.find(self._marker, max(0, before - len(self._marker))) >= 0:
                self._marker, one.is_lossy = b"", True
