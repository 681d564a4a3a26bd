"""The file of a response: written while it arrives, read in pieces afterwards.

Its file is one line of JSON (``Head``), the raw body, a line feed and one line of JSON (``Tail``).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import threading
import time
from typing import IO, TYPE_CHECKING, TypeVar

from imagewatch.protocol.values import Head, Tail, dump, load
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.system.disk import Disk

T = TypeVar("T")
_TAIL_BYTES = 64 * 1024
_LINE_BYTES = 1024
_CHUNK_BYTES = 512 * 1024
_PATIENCE = 1.0
"""Between two tries of a write that the disk refuses while the response waits on the connection, seconds."""
_HINT = "check the disk and the system log; do not remove the response, it was paid for"


class Answer:
    """A saved response, read from the disk in pieces.

    Attributes:
        head: Status and headers.
        tail: Whether it is complete.
        length: Size of the body, bytes.
    """

    def __init__(self, path: str, tops: Tops | None = None) -> None:
        self.path = path
        self._tops = tops or Tops()
        try:
            with self._opened() as file:
                first = _line(lambda size: os.pread(file.fileno(), size, 0).partition(b"\n"))
                end = file.seek(0, os.SEEK_END)
                last = _line(lambda size: os.pread(file.fileno(), size, max(0, end - size)).rpartition(b"\n")[::-1])
            self.head, self.tail = load(first, Head), load(last, Tail)
        except (OSError, ValueError) as error:
            raise SpoolError(
                f"the saved response cannot be read: {error}: {path}", path=path, code=errno_of(error), hint=_HINT
            ) from error
        self._start = len(first) + 1
        self.length = end - len(last) - 1 - self._start

    def _opened(self) -> io.FileIO:
        return io.FileIO(self._tops.open_file(self.path, os.O_RDONLY))

    def chunks(self, size: int = _CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the body in pieces of at most ``size`` bytes."""
        left = self.length
        with self._opened() as file:
            file.seek(self._start)
            while left > 0 and (chunk := file.read(min(size, left))):
                left -= len(chunk)
                yield chunk

    def sample(self, size: int = _TAIL_BYTES) -> bytes:
        """Return the beginning of the body, enough for any error message."""
        return next(self.chunks(size), b"")


class Sink:
    """Where a response is written while it arrives.

    Its file is open, with room for the response, before the request leaves. What the disk refuses later is tried again
    for as long as the call lasts, by the open file and not by its name: meanwhile the endpoint waits, too.

    Args:
        disk: The local disk.
        path: The final name of the response.
        restore: Makes the record again, if its folder was removed or replaced meanwhile.
        on_disk_error: Called with what the disk refuses, once before that is waited for.
        wait: Waits some seconds.
        now: Monotonic clock, seconds.

    Attributes:
        written: Bytes of the body so far.
        status: HTTP status of the response, 0 before it has arrived.
        until: Until when a failing disk is waited for, by the monotonic clock.
        error: The last error of the disk; empty if there was none.
    """

    def __init__(
        self,
        disk: Disk,
        path: str,
        restore: Callable[[], object] = lambda: None,
        on_disk_error: Callable[[SpoolError], object] = lambda _: None,
        wait: Callable[[float], object] = threading.Event().wait,  # noqa: B008
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk = disk
        self._path = path
        self._part = path + ".part"
        self._restore = restore
        self._on_disk_error = on_disk_error
        self._wait = wait
        self._now = now
        self._file: IO[bytes] | None = None
        self._is_suspect = False
        self.written = self.status = 0
        self.until = -math.inf
        self.error = ""

    def open(self, room: int = 0) -> None:
        """Make the file and reserve room in it. Nothing is waited for: what fails here costs nothing.

        Args:
            room: Bytes.
        """
        self._file = self._disk.replace_leftover(self._part)
        if room:
            self._disk.reserve(self._file, room, self._part)

    def start(self, head: Head) -> None:
        """Write how the response begins."""
        if self._file is None:
            self.open()
        self.status = head.status
        self._put(dump(head) + b"\n")

    def write(self, chunk: bytes | memoryview) -> None:
        """Append a piece of the body."""
        self._put(chunk)
        self.written += len(chunk)

    def finish(self, tail: Tail) -> None:
        """Make the response durable under its final name. It is not read before."""
        self._put(b"\n" + dump(tail))
        self._insist(self._settle)
        self.close()

    def close(self) -> None:
        """Close the file; what was written stays as ``answer.N.part``."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _put(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        rest = memoryview(content)
        while rest:
            rest = rest[self._insist(functools.partial(os.write, self._file.fileno(), rest)) :]

    def _settle(self) -> None:
        """Give the complete response its name; if that fails half way, it may be done again."""
        if self._is_suspect or not self._has_name():
            self._write_again()
        assert self._file is not None
        self._disk.unreserve(self._file)
        self._is_suspect = True
        self._disk.sync(self._file, self._part)
        self._is_suspect = False
        self._disk.replace(self._part, self._path)
        self._disk.sync_folder(os.path.dirname(self._path))

    def _has_name(self) -> bool:
        """Return whether the open file has its name: the folder may have been removed, or replaced."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._disk.tops.lstat(self._part))
        except OSError:
            return False

    def _write_again(self) -> None:
        """Write what the open file holds to a new one: it lost its name, or a failed sync may have lost its content."""
        assert self._file is not None
        self._restore()
        copy = self._disk.replace_leftover(self._part)
        try:
            offset = 0
            while piece := os.pread(self._file.fileno(), _CHUNK_BYTES, offset):
                offset += copy.write(piece)
        except BaseException:
            copy.close()
            raise
        self._file.close()
        self._file = copy

    def _insist(self, act: Callable[[], T]) -> T:
        """Do what the disk may refuse, again and again while there is time."""
        is_reported = False
        while True:
            try:
                with disk_errors(self._path, "save the response"):
                    return act()
            except SpoolError as error:
                left = self.until - self._now()
                if not error.code or left <= 0:
                    raise
                self.error = str(error)
                if not is_reported:
                    self._on_disk_error(error)
                is_reported = True
                self._wait(min(_PATIENCE, left))


def _line(read: Callable[[int], tuple[bytes, bytes, bytes]]) -> bytes:
    """Return the first or the last line of a file.

    Args:
        read: Returns so many bytes of the file from that end: what is before the first line feed, that, and the rest.

    Raises:
        ValueError: There is no such line.
    """
    for size in (_LINE_BYTES, _TAIL_BYTES):
        line, feed, _ = read(size)
        if feed:
            return line
    raise ValueError("a line of it is missing")


def errno_of(error: Exception) -> int:
    """Return an errno if the disk failed, which may pass; 0 if what it holds is damaged, which does not."""
    return (isinstance(error, OSError) and error.errno) or 0


def has_tail(file: IO[bytes]) -> bool:
    """Return whether a response was written to its end; the file's position is its end then."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    last = file.read().rpartition(b"\n")[2]
    try:
        load(last, Tail)
    except (ValueError, RecursionError):  # a piece of the body
        return False
    return True
