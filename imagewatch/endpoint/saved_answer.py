"""The file of a response: written while it arrives, read in pieces afterwards.

Its file is one line of JSON (``Head``), the body, a line feed and one line of JSON (``Tail``). The body is raw, or in
frames with its images in files of their own (``frames``); a paid response has its images decoded while it arrives.
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

from msgspec.structs import replace

from imagewatch.endpoint.frames import CHUNK_BYTES, Decoded, Frames, body, plain, texts
from imagewatch.protocol.values import Head, Tail, dump, load
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from imagewatch.endpoint.frames import Read
    from imagewatch.system.disk import Disk

T = TypeVar("T")
_TAIL_BYTES = 64 * 1024
_LINE_BYTES = 1024
_PATIENCE = 1.0
"""Between two tries of a write that the disk refuses while the response waits on the connection, seconds."""
_CUT = "the end of the response was not saved before the computer stopped"
_HINT = "check the disk and the system log; do not remove the response, it was paid for"


class Answer:
    """A saved response, read from the disk in pieces.

    Args:
        path: Its file.
        tops: The folders that were opened.
        image_path: Returns the path of the file of an image; needed if the body is in frames.

    Attributes:
        head: Status and headers.
        tail: Whether it is complete.
    """

    def __init__(self, path: str, tops: Tops | None = None, image_path: Callable[[int], str] | None = None) -> None:
        self.path = path
        self._tops = tops or Tops()
        self._image_path = image_path
        self._is_suspect = False
        try:
            with self._opened() as file:
                read = functools.partial(os.pread, file.fileno())
                self.head, self._start, self.tail, self._end = _ends(read, file.seek(0, os.SEEK_END))
        except (OSError, ValueError) as error:
            raise SpoolError(
                f"the saved response cannot be read: {error}: {path}", path=path, code=errno_of(error), hint=_HINT
            ) from error

    def _opened(self) -> io.FileIO:
        return io.FileIO(self._tops.open_file(self.path, os.O_RDONLY))

    def pieces(self, size: int = CHUNK_BYTES) -> Generator[bytes | Decoded]:
        """Yield the body in pieces of at most ``size`` bytes, and what is in files of its images."""
        with self._opened() as file:
            read, image = functools.partial(os.pread, file.fileno()), self._decoded
            yield from body(read, self._start, self._end, size, image if self.head.framed else None)

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the body in pieces of at most ``size`` bytes, at least 4."""
        yield from texts(self.pieces(size), size)

    def sample(self, size: int = _TAIL_BYTES) -> bytes:
        """Return the beginning of the body, enough for any error message."""
        found = b""
        for chunk in self.chunks(size):
            found += chunk
            if len(found) >= size:
                break
        return found[:size]

    def _decoded(self, number: int, size: int | None) -> Decoded:
        assert self._image_path is not None
        path, found = self._image_path(number), -1
        # It may be in a folder that other users write.
        with contextlib.suppress(FileNotFoundError, RefusedError), open_file(path, self._tops) as file:
            found = os.fstat(file.fileno()).st_size
        size = max(0, found) // 3 * 3 if size is None else size
        return Decoded(number, size, found, path, lambda: open_file(path, self._tops))

    def sync_images(self, disk: Disk) -> None:
        """Make the files of its images durable, and their names."""
        found = [piece.path for piece in self.pieces() if isinstance(piece, Decoded) and piece.found >= 0]
        for path in found:
            with closing(disk.append(path), path) as file:
                disk.sync(file, path)
        for folder in sorted({os.path.dirname(path) for path in found}):
            disk.sync_folder(folder)

    def make_durable(self, disk: Disk) -> None:
        """Make the file of the response durable, which ``Sink`` left to the reader; its images are."""
        if self._is_suspect:  # a failed sync may have lost its content, and a second one would not report that
            with self._opened() as file, disk.writing(self.path) as copy:
                while piece := file.read(CHUNK_BYTES):
                    copy.write(piece)
        self._is_suspect = True
        with closing(disk.append(self.path), self.path) as written:
            disk.sync(written, self.path)
        self._is_suspect = False
        disk.sync_folder(os.path.dirname(self.path))


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
        image_path: Returns the path of the file of an image. Without, images are not decoded.
        prepare: Called with the descriptor of the file of an image before anything is written to it.
        defers_sync: Whether a complete response whose images are all decoded is left without a sync: its reader makes
            the result durable, or the response (``Answer.make_durable``).

    Attributes:
        written: Bytes of the body so far.
        status: HTTP status of the response, 0 before it has arrived.
        until: Until when a failing disk is waited for, by the monotonic clock.
        error: The last error of the disk; empty if there was none.
    """

    def __init__(  # noqa: PLR0913  what a job gives and what a test replaces
        self,
        disk: Disk,
        path: str,
        restore: Callable[[], object] = lambda: None,
        on_disk_error: Callable[[SpoolError], object] = lambda _: None,
        wait: Callable[[float], object] = threading.Event().wait,  # noqa: B008
        now: Callable[[], float] = time.monotonic,
        *,
        image_path: Callable[[int], str] | None = None,
        prepare: Callable[[int], object] = lambda _: None,
        defers_sync: bool = False,
    ) -> None:
        self._disk = disk
        self._path = path
        self._part = path + ".part"
        self._restore = restore
        self._on_disk_error = on_disk_error
        self._wait = wait
        self._now = now
        self._image_path = image_path
        self._prepare = prepare
        self._defers_sync = defers_sync
        self._frames: Frames | None = None
        self._file: IO[bytes] | None = None
        self._is_suspect = self._is_named = False
        self._size = 0  # without the last line
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
        if self._image_path and 200 <= head.status < 300:  # noqa: PLR2004
            head = replace(head, framed=True)
            self._frames = Frames(self._disk, self._put, self._image_path, self._prepare)
        self._put(dump(head) + b"\n")

    def write(self, chunk: bytes) -> None:
        """Append a piece of the body."""
        if self._frames:
            self._frames.write(chunk)
        else:
            self._put(chunk)
        self.written += len(chunk)

    def finish(self, tail: Tail) -> None:
        """Make the response durable under its final name, images first. It is not read before."""
        if self._frames:
            self._frames.end()
        self._insist(functools.partial(self._settle, tail))
        self.close()

    def close(self) -> None:
        """Close the files; what was written stays, the response as ``answer.N.part``."""
        if self._frames:
            self._frames.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _put(self, content: bytes) -> None:
        assert self._file is not None
        rest = memoryview(content)
        while rest:
            rest = rest[self._insist(functools.partial(os.write, self._file.fileno(), rest)) :]
        self._size += len(content)

    def _settle(self, tail: Tail) -> None:
        """Give the complete response its name; if that fails half way, it may be done again.

        A file with a last line has all its images on the disk, whatever ends the process or the computer.
        """
        assert self._file is not None
        if self._is_named and self._has_name(self._path) and self._has_images():
            self._disk.sync_folder(os.path.dirname(self._path))  # only that had failed
            return
        self._is_named = False
        if self._is_suspect or not (self._has_name(self._part) and self._has_images()):
            self._write_again()
        self._is_suspect = True
        if self._frames:
            self._frames.sync()
        self._is_suspect = False  # what fails now is done again, without a copy of all
        os.ftruncate(self._file.fileno(), self._size)
        self._file.seek(self._size)
        self._file.write(b"\n" + dump(tail))
        self._disk.unreserve(self._file)
        is_synced = not (self._defers_sync and tail.complete and self._frames and self._frames.is_decoded)
        if is_synced:
            self._is_suspect = True
            self._disk.sync(self._file, self._part)
            self._is_suspect = False
        self._disk.replace(self._part, self._path)
        self._is_named = True
        if is_synced:
            self._disk.sync_folder(os.path.dirname(self._path))

    def _has_name(self, path: str) -> bool:
        assert self._file is not None
        return self._disk.tops.has_name(self._file.fileno(), path)

    def _has_images(self) -> bool:
        return not self._frames or self._frames.is_there()

    def _write_again(self) -> None:
        """Write what the open files hold to a new one: one lost its name, or a failed sync may have lost its content.

        Without frames: where an image was, no other may be possible.
        """
        assert self._file is not None
        self._restore()
        read = functools.partial(os.pread, self._file.fileno())
        copy = self._disk.replace_leftover(self._part)
        try:
            for piece in self._unframed(read) if self._frames else plain(read, 0, self._size, CHUNK_BYTES):
                copy.write(piece)
            self._size = copy.tell()
        except BaseException:
            copy.close()
            raise
        self._file.close()
        self._file = copy
        if self._frames:
            self._frames.remove()
            self._frames = None

    def _unframed(self, read: Read) -> Iterator[bytes]:
        assert self._frames is not None
        head, start = _beginning(read)
        yield dump(replace(head, framed=False)) + b"\n"
        yield from texts(body(read, start, self._size, CHUNK_BYTES, self._frames.decoded))

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


def save_part(disk: Disk, path: str, tail: Tail, image_path: Callable[[int], str]) -> None:
    """Save the part of a response that arrived; if only its name was missing, it is complete.

    Args:
        disk: The local disk.
        path: The final name of the response.
        tail: Its last line, if it has none.
        image_path: Returns the path of the file of an image.
    """
    part = path + ".part"
    with closing(disk.append(part), part) as file, disk_errors(part, "save the response"):
        if not _has_tail(file):
            file.write(b"\n" + dump(tail))
        disk.unreserve(file)
        Answer(part, disk.tops, image_path).sync_images(disk)
        disk.sync(file, part)
    disk.replace(part, path)
    disk.sync_folder(os.path.dirname(path))


def _ends(read: Read, size: int) -> tuple[Head, int, Tail, int]:
    """Return the first line of a file, the offset of the body, the last line, and where the body ends.

    Args:
        read: Returns so many bytes from an offset.
        size: Of the file.

    Raises:
        ValueError: One of them is missing, or is not what it should be.
    """
    head, start = _beginning(read)
    try:
        last = _line(lambda most: read(most, max(start - 1, size - most)).rpartition(b"\n")[::-1])
        return head, start, load(last, Tail), size - len(last) - 1
    except (ValueError, RecursionError):  # a piece of the body
        if not head.framed:
            raise
        return head, start, Tail(complete=False, reason=_CUT), size  # it was not synced before the computer stopped


def _beginning(read: Read) -> tuple[Head, int]:
    """Return the first line of a file, and the offset of the body."""
    first = _line(lambda most: read(most, 0).partition(b"\n"))
    return load(first, Head), len(first) + 1


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


def _has_tail(file: IO[bytes]) -> bool:
    """Return whether a response was written to its end; the file's position is its end then."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    last = file.read().rpartition(b"\n")[2]
    try:
        load(last, Tail)
    except (ValueError, RecursionError):  # a piece of the body
        return False
    return True
