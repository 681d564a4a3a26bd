"""The one way to open a file that other people wrote, or may have put where it is.

Such a file may be a link to a secret, a pipe that never ends, a second name of a private file, or a hole of a terabyte.
The scan, the request, ``submit``, ``retry``, redelivery and the gallery all open files here.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import TYPE_CHECKING

from imagewatch.folders import Tops

if TYPE_CHECKING:
    from imagewatch.folders import Place

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOWHERE = Tops()


class RefusedError(OSError):
    """A file is there and is not opened.

    Attributes:
        strerror: Why, in words that follow "it".
    """

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(errno.EPERM, reason, path)


def open_file(path: str, tops: Tops = _NOWHERE, *, most_bytes: int | None = None) -> io.FileIO:
    """Open a regular file for reading, without waiting for anything.

    Args:
        path: The file.
        tops: The folders that were opened.
        most_bytes: A larger one is refused.

    Returns:
        The file, unbuffered.

    Raises:
        RefusedError: It is a link, no regular file, a hard link to a file that others may not read, or too large.
        OSError: It is not there, or cannot be read.
    """
    place = tops.at(path)
    before = place.lstat()
    if stat.S_ISLNK(before.st_mode):
        raise RefusedError("is a link", path)
    if not stat.S_ISREG(before.st_mode):  # to open a device may already do something
        raise RefusedError("is not a plain file", path)
    file = io.FileIO(os.open(place.name, _FLAGS, dir_fd=place.dir_fd))
    try:
        _judge(os.fstat(file.fileno()), before, place, path, most_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _judge(status: os.stat_result, before: os.stat_result, place: Place, path: str, most_bytes: int | None) -> None:
    if not os.path.samestat(before, status) or not stat.S_ISREG(status.st_mode):
        raise RefusedError("was replaced while it was opened", path)
    if status.st_nlink > 1 and is_private(status, folder_of(place, path)):
        raise RefusedError("is a hard link to a file that not everybody may read who uses this folder", path)
    if most_bytes is not None and status.st_size > most_bytes:
        raise RefusedError(f"is larger than {most_bytes:,} bytes", path)


def is_private(status: os.stat_result, folder: os.stat_result) -> bool:
    """Tell whether a file is a hard link that may show what whoever made the link could not read.

    A hard link does not tell who made it: it has the owner, the group and the mode of the file it leads to.

    Args:
        status: The file's.
        folder: The folder's. If only its group may write it, what this group may read is no secret there.
    """
    if status.st_nlink < 2 or status.st_mode & stat.S_IROTH:  # noqa: PLR2004  another name
        return False
    is_for_group = status.st_mode & stat.S_IRGRP and status.st_gid == folder.st_gid
    return not is_for_group or bool(folder.st_mode & stat.S_IWOTH)


def folder_of(place: Place, path: str) -> os.stat_result:
    """Return what the folder is in which a file is."""
    return os.stat(os.path.dirname(path) or ".") if place.dir_fd is None else os.fstat(place.dir_fd)
