"""The process that decodes images, as its parent sees it: started when needed, killed when it takes too long.

Its replies are trusted no more than the images: they are bounded, and must look like a thumbnail.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO

from imagewatch.protocol.image_kinds import sniff
from imagewatch.system.text import printable

SIDE = 320
"""Longest side of a thumbnail, pixels."""
LARGE = 4_000_000
"""An image of more pixels is converted in strips, and its memory is freed afterwards."""
REQUEST = struct.Struct("!Qd")
"""Sent with an open image: how many pixels it may have, and seconds of processor time."""
REPLY = struct.Struct("!BI")
"""Sent before a reply: its kind (``MADE``, ``BROKEN`` or ``UNREAD``) and its length, bytes."""
MADE, BROKEN, UNREAD = range(3)
UNPRIVILEGED_ID = 65534
"""Number of a user and group without rights; root's decoder changes to it."""

_PROGRAM = "import sys; _, user, *sys.path = sys.argv; from imagewatch.gallery.shrink import main; main(int(user))"
_MOST_BYTES = 1 << 20
"""Of a reply. A thumbnail without compression is 400 kB."""
_CRASHES = frozenset(
    {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP}
)
"""Signals of a decoder that crashed on an image; any other signal came from outside."""


@dataclass(frozen=True)
class Patience:
    """How long an image may take.

    Attributes:
        processor: Seconds of processor time. Measured, 50 million pixels of noise take up to 4.2 seconds, the largest
            images of the endpoint half a second.
        clock: Seconds by the clock: the machine may be busy, or the disk slow.
    """

    processor: float = 10.0
    clock: float = 60.0


class NoThumbnail(Exception):  # noqa: N818  an outcome, not an error
    """There is no thumbnail of an image; the message is the reason.

    Attributes:
        lasting: Whether the reason lasts as long as the file is not changed.
    """

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


class Decoder:
    """One such process. Not for several threads at the same time.

    Args:
        patience: How long an image may take.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def shrink(self, file: IO[bytes], most_pixels: int) -> bytes:
        """Return a small WebP of an image.

        Args:
            file: The image, open for reading.
            most_pixels: If it has more, it is not decoded.

        Raises:
            NoThumbnail: It cannot be read or decoded, or takes too much time or memory.
        """
        try:
            channel = self._started()
            channel.settimeout(self._patience.clock)
            request = REQUEST.pack(most_pixels, self._patience.processor)
            socket.send_fds(channel, [request], [file.fileno()])
            deadline = time.monotonic() + self._patience.clock
            kind, length = REPLY.unpack(_received(channel, REPLY.size, deadline))
            content = _received(channel, min(length, _MOST_BYTES), deadline)
        except TimeoutError:
            self.close()
            raise NoThumbnail(f"was not decoded within {self._patience.clock:g} s", lasting=False) from None
        except OSError as error:
            raise self._ended(error) from None
        if kind == MADE and sniff(content[:12]) == "webp" and len(content) == length:
            return content
        if kind == MADE:
            self.close()
            raise NoThumbnail("cannot be decoded: the decoder's reply is not an image")
        reason = printable(content.decode("utf-8", "replace"), 250)
        raise NoThumbnail(reason) if kind == BROKEN else NoThumbnail(f"cannot be read: {reason}", lasting=False)

    def close(self) -> None:
        """Kill the process."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # stuck in the kernel, as on a disk that does not respond
                process.wait(5)

    def _started(self) -> socket.socket:
        """Return the socket of the process; start the process if there is none.

        Raises:
            OSError: It cannot be started.
        """
        if self._channel is None:
            mine, its = socket.socketpair()
            with its:
                # It gets our module path. It gets little of the environment, which may have the key.
                user = os.geteuid() or UNPRIVILEGED_ID
                command = [sys.executable, "-P", "-c", _PROGRAM, str(user), *sys.path]
                root = (
                    0 if os.getuid() == 0 else None
                )  # also if this has stepped down: perhaps only root may read the program
                kept = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "LD_"))}
                try:
                    self._process = subprocess.Popen(  # noqa: S603  our own program
                        command,
                        stdin=its.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env=kept,
                        cwd="/",
                        user=root,
                        group=root,
                    )
                except OSError:
                    mine.close()
                    raise
            self._channel = mine
        return self._channel

    def _ended(self, error: OSError) -> NoThumbnail:
        """Return the reason if the process has ended, or could not be started."""
        process, code = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(5)
        self.close()
        if code is None:
            return NoThumbnail(f"cannot be decoded now: {error.strerror or 'the decoder has ended'}", lasting=False)
        if code == -signal.SIGPROF:
            return NoThumbnail(f"takes more than {self._patience.processor:g} s to decode")
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return NoThumbnail(f"cannot be decoded: the decoder ended with {how}", lasting=-code in _CRASHES)


def _received(channel: socket.socket, count: int, deadline: float) -> bytes:
    """Return exactly so many bytes.

    Raises:
        TimeoutError: They did not come in time.
        OSError: They will not come.
    """
    content = bytearray()
    while len(content) < count:
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = channel.recv(count - len(content))
        if not piece:
            raise ConnectionResetError
        content += piece
    return bytes(content)
