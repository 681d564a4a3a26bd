"""One call to a server that is not trusted: how long it may take, and how much work it may make."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

READ_BYTES: Final = 512 * 1024
"""Most bytes of one read: each read is two system calls, and a thread may lose the interpreter at each of them."""
_HEAD_READ_BYTES: Final = 64 * 1024
_MOST_HEAD_BYTES: Final = 256 * 1024
"""For all heads of a response, the interim ones included. One head may have 100 KB (httpcore)."""
_MOST_FRAMING_BYTES: Final = 10_000_000
_FRAMING_SHARE: Final = 16
"""Framing beyond the above may be the sixteenth part of what it frames: chunks of some hundred bytes."""
_SMALL_BYTES: Final = 512
_MOST_SMALL: Final = 1000
_PAUSE: Final = 0.002
_STOPPED_SECONDS: Final = 1.0
_STOPPED_SHARE: Final = 0.1
"""If more time passed between two uses of the network, and less of it was spent working, this process was stopped, or a
disk did not respond."""
_LATE_SECONDS: Final = 10.0
"""For how long a response is read then: the other side could not send more than the system keeps for a connection."""
_MOST_LATE_BYTES: Final = 16 * 1024 * 1024
"""Most that is read after the deadline otherwise: what has arrived by then."""
_NEVER: Final = threading.Event()
_current: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


class OverrunError(Exception):
    """A server sends more than a response can need; the message has the cause."""


class Call:
    """A call under its deadline; used as a context, in which connections are made for it.

    Each single operation gets the rest of the time: a time limit per operation would start again with each byte.

    Args:
        seconds: The total time.
        key: The configuration's key of this deadline, or an empty string.
        may_connect: Whether an IP address may be connected to.

    Attributes:
        at: Monotonic time of the deadline, seconds.
        may_connect: As above.
        before_read: Called before the next bytes are waited for, however long that takes.
        first_write: In it the next bytes are sent; what it raises when it is entered keeps them from leaving.
    """

    def __init__(
        self, seconds: float, key: str = "deadline_seconds", *, may_connect: Callable[[str], bool] = lambda _: True
    ) -> None:
        self._why = f"not finished after {seconds:g} seconds" + (f" ({key})" if key else "")
        self.at = time.monotonic() + seconds
        self.may_connect = may_connect
        self.before_read: Callable[[], object] = lambda: None
        self.first_write: AbstractContextManager[object] | None = None
        self._is_connected = False
        self._is_head = True
        self._received = self._late = 0
        self._late_until: float | None = None
        self._was_stopped = False
        self.used()
        self._small = 0

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    @property
    def reason(self) -> str:
        """Why the call is over if its time is, else an empty string."""
        return self._why if time.monotonic() >= self.at - 0.001 else ""

    def left(self, most: float | None = None) -> float:
        """Return how long the next operation may take, seconds.

        Raises:
            TimeoutError: The time is over.
        """
        rest = self.at - time.monotonic()
        if rest <= 0:
            raise TimeoutError(self._why)
        return rest if most is None else min(most, rest)

    def left_to_read(self, most: float | None = None) -> float:
        """Return how long the next read may take, seconds; 0: only what has arrived is read.

        A response that was paid for may have come while this process was stopped, until after the deadline.

        Raises:
            TimeoutError: The time is over, also for what had arrived by then.
        """
        now = time.monotonic()
        if now < self.at:
            return self.at - now if most is None else min(most, self.at - now)
        if self._late_until is None:
            self._was_stopped = self._is_stopped(now)
            self._late_until = now + (_LATE_SECONDS if self._was_stopped else _STOPPED_SECONDS)
        if now >= self._late_until or (self._late >= _MOST_LATE_BYTES and not self._was_stopped):
            raise TimeoutError(self._why)
        return self._late_until - now if self._was_stopped else 0.0

    def _is_stopped(self, now: float) -> bool:
        passed = now - self._used_at
        worked = time.thread_time() - self._worked
        return passed > _STOPPED_SECONDS and worked < passed * _STOPPED_SHARE

    # Called by the connection

    def used(self, seconds: float = 0.0) -> None:
        """Note that the network was used, or is used for so many seconds at most."""
        self._used_at, self._worked = time.monotonic() + seconds, time.thread_time()

    def connected(self) -> None:
        """Begin to count: there is another connection."""
        self.used()
        self._is_connected, self._is_head, self._received, self._small = True, True, 0, 0

    def next_bytes(self, most: int) -> int:
        """Return how many bytes are to be read at once, after a rest if they have been coming one by one."""
        if self._small > _MOST_SMALL:  # what comes meanwhile is read in one go; all else would keep a core busy
            _NEVER.wait(_PAUSE)
        return min(most, _HEAD_READ_BYTES) if self._is_head else most

    def sending(self) -> AbstractContextManager[object]:
        """Return the context in which the next bytes are to be sent."""
        context, self.first_write = self.first_write, None
        return context or contextlib.nullcontext()

    def took(self, size: int) -> None:
        """Count what was read.

        Raises:
            OverrunError: The head of the response is too long.
        """
        self._received += size
        self._late += size if time.monotonic() >= self.at else 0
        self._small = self._small + 1 if size < _SMALL_BYTES else 0
        if self._is_head and self._received > _MOST_HEAD_BYTES:
            raise OverrunError("the headers of the response are too long")

    # Called by the HTTP library

    def trace(self, event: str, _: dict[str, Any]) -> None:
        """Take an event of httpcore: which part of the response comes next."""
        if event == "http11.receive_response_body.started":
            self._is_head = False
        if event == "http11.send_request_headers.started" and not self._is_connected:
            # Also with a later version of the library: addresses are checked only where we connect.
            raise RuntimeError("the HTTP library opened an unexpected connection")

    def is_worth_reading(self, size: int) -> bool:
        """Return whether a body is worth reading: with one byte in each chunk it is mostly framing.

        Args:
            size: Bytes of the body so far.
        """
        return self._received - size <= _MOST_FRAMING_BYTES + size // _FRAMING_SHARE


def current() -> Call:
    """Return the call for which a connection is being made."""
    return _current.get()
