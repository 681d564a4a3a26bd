"""The program that decodes images, in a separate process: nothing else decodes images that are not trusted.

Its parent sends it one open image at a time. A decoder cannot be interrupted from within, so the kernel kills the whole
process if an image takes too much processor time; memory and files are bounded in the same way. It needs no file system
and no environment, and as root it first becomes a user without rights.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import socket
from typing import IO

from PIL import Image, ImageOps, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  no imports later on

from imagewatch.gallery.decoder import BROKEN, LARGE, MADE, REPLY, REQUEST, SIDE, UNPRIVILEGED_ID, UNREAD
from imagewatch.system import memory

MOST_MEMORY = 640 << 20
"""Of the process, bytes of address space. With the largest image that may be decoded it has 430 MB."""
_STRIP = 2_000_000
"""Pixels of a large image that are converted at a time: each conversion copies four bytes per pixel."""
_GAP = 1.25
"""A quick method first makes the image this much larger than needed: a third less time, no visible difference."""


def main(user: int) -> None:
    """Make thumbnails until the parent has ended.

    Args:
        user: Number of the user to become if this is root: one whose processes the parent may kill.
    """
    channel = socket.socket(fileno=0)
    _confine(user)
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, REQUEST.size, 1)
        if len(request) < REQUEST.size or not descriptors:
            return
        most_pixels, seconds = REQUEST.unpack(request)
        with open(descriptors[0], "rb") as file:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal kills this process
            kind, content = _answer(file, most_pixels)
            signal.setitimer(signal.ITIMER_PROF, 0)
        channel.sendall(REPLY.pack(kind, len(content)) + content)


def _confine(user: int) -> None:
    """Drop all rights that a decoder does not need, in case an image takes control of it."""
    Image.preinit()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a namespace that has no such user
            os.setgroups([])
            os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
            os.setresuid(user, user, user)


def _answer(file: IO[bytes], most_pixels: int) -> tuple[int, bytes]:
    """Return a thumbnail, or the reason why there is none."""
    try:
        return MADE, shrunk(file, most_pixels)
    except MemoryError:
        return BROKEN, f"takes more than {MOST_MEMORY >> 20} MiB of memory to decode".encode()
    except Exception as error:  # noqa: BLE001  a decoder may raise anything on a hostile image
        if isinstance(error, OSError) and error.errno:
            return UNREAD, os.strerror(error.errno).encode()
        return BROKEN, f"cannot be decoded: {str(error)[:200]}".encode("utf-8", "replace")


def shrunk(file: IO[bytes], most_pixels: int) -> bytes:
    """Return a small WebP of an image.

    Args:
        file: The image, open for reading in binary.
        most_pixels: If it has more, it is not decoded.

    Raises:
        ValueError: It has more pixels.
        MemoryError: It needs more memory than this process may have.
        OSError: It cannot be read, or is broken.
        Exception: It is broken; a decoder may raise anything then.
    """
    file.seek(0)
    large = False
    try:
        # Its own __exit__ closes only the file, and an error would keep the pixels in memory.
        with contextlib.closing(Image.open(file, formats=("PNG", "JPEG", "WEBP"))) as image:
            large = image.width * image.height > LARGE
            if image.width * image.height > most_pixels:
                raise ValueError("its headers contradict each other")
            mode = "RGBA" if image.has_transparency_data else "RGB"
            times = _times(image)
            image.draft(None, (max(image.width // times, 1), max(image.height // times, 1)))  # a JPEG: decoded smaller
            small = _smaller(image, mode)
            small.thumbnail((SIDE, SIDE), reducing_gap=_GAP)
            small = ImageOps.exif_transpose(small)
            out = io.BytesIO()
            # No metadata: that of a camera may contain a place.
            small.save(out, "WEBP", quality=80, method=2, exif=b"", icc_profile=None, xmp=b"")
            return out.getvalue()
    finally:
        if large:
            memory.give_back()


def _times(image: Image.Image) -> int:
    """Return by what factor the quick method may reduce an image."""
    return max(int(max(image.size) / (SIDE * _GAP)), 1)


def _smaller(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode; a large one strip by strip and reduced, because transparency is a copy, too."""
    width, height = image.size
    if width * height <= LARGE:
        return image if image.mode == mode else image.convert(mode)
    times = _times(image)
    # An integer factor: each strip is reduced as it would be within the whole image.
    rows = max(_STRIP // (width * times), 1) * times
    small = Image.new(mode, (-(-width // times), -(-height // times)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert(mode)
        small.paste(strip.reduce(times), (0, top // times))
    small.info["exif"] = image.getexif().tobytes()  # its orientation
    return small
