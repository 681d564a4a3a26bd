"""The body of a saved response in frames: images are in files of their own, all else is in the frames.

==========================  =========================================================================
``raw LENGTH``, line feed   so many bytes of the body follow
``image K``, line feed      here image K begins: the body goes on with the base64 of its file
``end K SIZE``, line feed   here it ends: with the base64 of the first SIZE bytes of its file
==========================  =========================================================================

Frames are only appended, each before the bytes of an image that follow it. So whatever is lost of the end, the rest is
the beginning of the body.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import pybase64

from imagewatch.endpoint.divider import Divider, Part
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from imagewatch.system.disk import Disk

    Read = Callable[[int, int], bytes]

_HEADER_BYTES = 64
CHUNK_BYTES = 512 * 1024


def image_name(number: int) -> str:
    """Return the name of an image among the files of its job; it stays as long as the response."""
    return f"answer.image.{number}"


@dataclass(frozen=True)
class Decoded:
    """A piece of a body that is in the file of an image: its base64.

    Attributes:
        number: Of the image.
        size: Bytes of its file that belong to it.
        found: Bytes that its file has, -1 if it was removed or is no plain file of ours.
        path: Its file.
        opened: Opens its file.
    """

    number: int
    size: int
    found: int
    path: str
    opened: Callable[[], io.FileIO]

    @property
    def problem(self) -> str:
        """Why its file is not what came, or an empty string."""
        if self.found < 0:
            return "its file was removed or replaced"
        if self.found != self.size:
            return f"its file has {self.found:,} bytes instead of {self.size:,}"
        return ""

    def text(self, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield its base64 in pieces of about ``size`` bytes; of a file that is too short, what is there."""
        if self.found < 0:
            return
        done = 0
        with self.opened() as file:
            while done < self.size:
                content = os.pread(file.fileno(), min(max(3, size // 4 * 3), self.size - done), done)
                done += len(content)
                if done < self.size:
                    content = content[: len(content) // 3 * 3]
                if not content:
                    return
                yield pybase64.b64encode(content)


def texts(pieces: Iterable[bytes | Decoded], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the bytes of a body, also of the images in it."""
    for piece in pieces:
        if isinstance(piece, Decoded):
            yield from piece.text(size)
        else:
            yield piece


def plain(read: Read, start: int, end: int, size: int) -> Iterator[bytes]:
    """Yield a part of a file in pieces.

    Args:
        read: Returns so many bytes from an offset.
        start: Where it begins.
        end: Where it ends.
        size: Most bytes of a piece.
    """
    while start < end and (piece := read(min(size, end - start), start)):
        start += len(piece)
        yield piece


def body(
    read: Read, start: int, end: int, size: int, decoded: Callable[[int, int | None], Decoded] | None
) -> Iterator[bytes | Decoded]:
    """Yield the body in a file in pieces; of frames, up to the first that is not whole, and what there is of that one.

    Args:
        read: Returns so many bytes from an offset.
        start: Where it begins.
        end: Where it ends.
        size: Most bytes of a piece.
        decoded: Returns an image by its number and the size of it, None if it did not come to its end. Without, the
            body is not in frames.
    """
    if decoded is None:
        yield from plain(read, start, end, size)
        return
    begun: int | None = None
    while (header := _header(read, start, end)) is not None:
        start += len(b" ".join(header)) + 1
        match header:
            case [b"raw", length]:
                yield from plain(read, start, min(start + int(length), end), size)
                start += int(length)
            case [b"image", number]:
                begun = int(number)
            case [b"end", number, length]:
                yield decoded(int(number), int(length))
                begun = None
            case _:
                break
    if begun is not None:
        yield decoded(begun, None)


def _header(read: Read, start: int, end: int) -> list[bytes] | None:
    line, feed, _ = read(min(_HEADER_BYTES, max(0, end - start)), start).partition(b"\n")
    kind, *numbers = line.split(b" ")
    return [kind, *numbers] if feed and all(number.isdigit() for number in numbers) else None


@dataclass
class _Image:
    """The file of an image while the response arrives.

    Attributes:
        number: Of the image.
        path: Its file.
        file: The same, open.
        size: Bytes that belong to the image. After a failed write the file may have one or two more.
    """

    number: int
    path: str
    file: IO[bytes]
    size: int = 0

    def write(self, content: bytes) -> int:
        """Append what the disk accepts, and return how much of it belongs to the image: a multiple of three, or all."""
        rest = memoryview(content)
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self.file.fileno(), rest) :]
        done = len(content) - len(rest)
        if rest:
            done -= done % 3
        self.size += done
        return done


class Frames:
    """Writes a body in frames while it arrives.

    An image whose file cannot be made or written is saved in frames from there on: its room in the file of the response
    is reserved, and only that file is waited for.

    Args:
        disk: The local disk.
        put: Appends to the file of the response.
        path: Returns the path of the file of an image.
        prepare: Called with the descriptor of the file of an image before anything is written to it.
    """

    def __init__(
        self,
        disk: Disk,
        put: Callable[[bytes], object],
        path: Callable[[int], str],
        prepare: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._disk = disk
        self._put = put
        self._path = path
        self._prepare = prepare
        self._divider = Divider()
        self._images: dict[int, _Image] = {}
        self._open: _Image | None = None
        self._waiting: list[bytes] = []  # whole frames
        self._joined: list[bytes] = []  # the content of the next, so that many small pieces make few frames

    @property
    def is_decoded(self) -> bool:
        """Whether all images of the body, at least one, are in files of their own."""
        return self._divider.is_decoded

    def write(self, chunk: bytes) -> None:
        """Append a piece of the body."""
        for piece in self._divider.feed(chunk):
            if isinstance(piece, Part):
                self._store(piece)
            else:
                self._raw(piece)
        self._flush()

    def end(self) -> None:
        """Append what was held back."""
        self._raw(self._divider.end())
        self._flush()

    def _raw(self, content: bytes) -> None:
        if self._open:
            self._waiting.append(b"end %d %d\n" % (self._open.number, self._open.size))
            self._open = None
        self._joined.append(content)

    def _join(self) -> None:
        if size := sum(map(len, self._joined)):
            self._waiting += [b"raw %d\n" % size, *self._joined]
        self._joined = []

    def _flush(self) -> None:
        self._join()
        if self._waiting:
            self._put(b"".join(self._waiting))
            self._waiting = []

    def _store(self, part: Part) -> None:
        if part.number not in self._images and (image := self._made(part.number)):
            self._open = self._images[part.number] = image
            self._join()
            self._waiting.append(b"image %d\n" % part.number)
        self._flush()
        done = self._open.write(part.content) if self._open else 0
        if done < len(part.content):
            self._divider.leave()
            self._raw(bytes(part.text[done // 3 * 4 :]))

    def _made(self, number: int) -> _Image | None:
        path = self._path(number)
        try:
            file = self._disk.replace_leftover(path)
        except SpoolError:
            return None
        self._prepare(file.fileno())
        return _Image(number, path, file)

    def is_there(self) -> bool:
        """Return whether each image has its name, which another program may have removed."""
        return all(self._disk.tops.has_name(image.file.fileno(), image.path) for image in self._images.values())

    def sync(self) -> None:
        """Make the images durable, and their names."""
        for image in self._images.values():
            self._disk.sync(image.file, image.path)
        for folder in sorted({os.path.dirname(image.path) for image in self._images.values()}):
            self._disk.sync_folder(folder)

    def decoded(self, number: int, size: int | None) -> Decoded:
        """Return an image as it was written, whatever became of its name."""
        image = self._images[number]
        size = image.size if size is None else size
        return Decoded(number, size, size, image.path, lambda: io.FileIO(os.dup(image.file.fileno())))

    def remove(self) -> None:
        """Remove the images: the response was written without frames."""
        for image in self._images.values():
            if self._disk.tops.has_name(image.file.fileno(), image.path):
                with contextlib.suppress(SpoolError):
                    self._disk.unlink(image.path)
        self.close()

    def close(self) -> None:
        """Close the files of the images."""
        for image in self._images.values():
            with contextlib.suppress(OSError):
                image.file.close()
