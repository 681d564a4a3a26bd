"""The one way to open a file that other people wrote, or may have put where it is.

Such a file may be a symbolic link to a secret, an endless pipe, a hard link to a private file, or a huge sparse file.
The scan, the request, ``submit``, ``retry``, redelivery and the gallery all open files here.
"""

from __future__ import annotations

import errno
import io
import os
import stat

from imagewatch.system.folders import Tops, is_private

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOWHERE = Tops()
_MOST_LINKS = 40


class RefusedError(OSError):
    """A file exists and is not opened.

    Attributes:
        strerror: Why; the text follows "it".
    """

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(errno.EPERM, reason, path)


def open_file(
    path: str, tops: Tops = _NOWHERE, *, most_bytes: int | None = None, allows_private: bool = False
) -> io.FileIO:
    """Open a regular file for reading, without waiting for anything.

    Args:
        path: The file.
        tops: The folders that were opened.
        most_bytes: A larger one is refused.
        allows_private: Whether a hard link to a private file is opened, too: to move it, and never to show it.

    Returns:
        The file, unbuffered.

    Raises:
        RefusedError: It is a link, no regular file, a hard link to a file that others may not read, or too large.
        OSError: It is not there, or cannot be read.
    """
    place = tops.at(path)  # which keeps its folder open until the file is
    return open_at(place.name, place.dir_fd, most_bytes=most_bytes, allows_private=allows_private, path=path)


def open_at(
    name: str, folder: int | None, *, most_bytes: int | None = None, allows_private: bool = False, path: str = ""
) -> io.FileIO:
    """Open a regular file for reading, as ``open_file`` does, in a folder that is open.

    Args:
        name: Its name; its path if there is no folder.
        folder: Descriptor of the folder.
        most_bytes: A larger one is refused.
        allows_private: As for ``open_file``.
        path: How it is called in an error; without, by its name.
    """
    path = path or name
    before = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if reason := _kind(before):  # to open a device may already do something
        raise RefusedError(reason, path)
    descriptor = os.open(name, _FLAGS, dir_fd=folder)
    status = os.fstat(descriptor)
    reason = _kind(status)
    if not allows_private:
        reason = refusal(status, os.stat(os.path.dirname(path) or ".") if folder is None else os.fstat(folder))
    if not os.path.samestat(before, status):
        reason = "was replaced while it was opened"
    elif most_bytes is not None and status.st_size > most_bytes:
        reason = f"is larger than {most_bytes:,} bytes"
    if reason:
        os.close(descriptor)
        raise RefusedError(reason, path)
    return io.FileIO(descriptor)


def refusal(status: os.stat_result, folder: os.stat_result) -> str:
    """Return why a file is not opened, as text that follows "it", or an empty string.

    Args:
        status: The file's, by ``lstat`` or ``fstat``.
        folder: The folder's.
    """
    if reason := _kind(status):
        return reason
    if is_private(status, folder):
        return "is a hard link to a private file"
    return ""


def _kind(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    return "" if stat.S_ISREG(status.st_mode) else "is not a plain file"


def resolve_own_link(path: str) -> str:
    """Return where a path points to if its last name is a link that this user or root has created.

    Args:
        path: A path that a person has named, or that belongs beside one.

    Raises:
        RefusedError: Another user has created the link: it may point to what only the caller can read.
    """
    for _ in range(_MOST_LINKS):
        try:
            status = os.lstat(path)
        except OSError:
            return path  # the error follows when it is opened
        if not stat.S_ISLNK(status.st_mode):
            return path
        if status.st_uid not in {0, os.geteuid()}:
            raise RefusedError("is a link that another user created", path)
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path
