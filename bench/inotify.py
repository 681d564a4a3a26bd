"""Change events directly from the kernel, for the floor and for measuring when results appear."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSE_WRITE, MOVED_TO = 0x8, 0x80
_HEAD = struct.Struct("iIII")


@dataclass(frozen=True)
class Event:
    """One change.

    Attributes:
        watch: The folder's number.
        name: The changed name in it; empty for the folder itself.
        at: When it was read, ``CLOCK_MONOTONIC`` in nanoseconds.
    """

    watch: int
    name: str
    at: int


class Inotify:
    """A queue of change events."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC)
        self._held: list[Event] = []

    def close(self) -> None:
        """Close the queue."""
        os.close(self._descriptor)

    def add(self, folder: str, mask: int) -> int:
        """Watch a folder; return its number."""
        return self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask)

    def read(self, seconds: float | None = None) -> Iterator[Event]:
        """Yield events, without end or until none came for this number of seconds."""
        while True:
            while self._held:  # kept for the next caller if one stops early
                yield self._held.pop(0)
            if seconds is not None and not select.select([self._descriptor], [], [], seconds)[0]:
                return
            data, now, place = os.read(self._descriptor, 1 << 16), time.monotonic_ns(), 0
            while place < len(data):
                watch, _, _, length = _HEAD.unpack_from(data, place)
                place += _HEAD.size + length
                name = data[place - length : place].rstrip(b"\0")
                self._held.append(Event(watch, os.fsdecode(name), now))
