"""The order in which files appear in a folder, as the kernel reports it to other programs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MOVED_TO, _CREATE, _MODIFY, _CLOSE_WRITE = 0x80, 0x100, 0x2, 0x8


class Events:
    """The events of the kernel for a folder, in their order."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = MOVED_TO | _CREATE | _MODIFY | _CLOSE_WRITE
        assert libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) > 0

    def read(self) -> list[tuple[int, str]]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._descriptor, 1 << 20):
                while piece:
                    _, mask, _, length = struct.unpack_from("iIII", piece)
                    found.append((mask, piece[16 : 16 + length].rstrip(b"\0").decode()))
                    piece = piece[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)
