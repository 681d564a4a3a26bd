"""Locks that end with their process: one daemon for each inbox and each state folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from typing import IO, TYPE_CHECKING

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import AlreadyRunning, SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.system.folders import Tops

_LOCK_TRIES = 4
_LOCK_SECONDS = 0.1


def lock(
    path: str,
    tops: Tops,
    wait: Callable[[float], object] = threading.Event().wait,  # noqa: B008
    *,
    is_shared: bool = False,
) -> IO[bytes]:
    """Take a lock that ends with the process.

    Args:
        path: The lock file; created if it is missing.
        tops: The folders that were opened.
        wait: Waits some seconds: ``locked`` takes the lock for a moment itself.
        is_shared: Whether others may have it, too, if they take it as a shared one.

    Returns:
        The open file; the lock lasts as long as it does.

    Raises:
        AlreadyRunning: Another process has it.
    """
    file = _opened(path, tops)
    for left in reversed(range(_LOCK_TRIES)):
        try:
            with _translated_lock(path):
                fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except AlreadyRunning:
            if not left:
                file.close()
                raise
            wait(_LOCK_SECONDS)
        except SpoolError:
            file.close()
            raise
    return file


def _opened(path: str, tops: Tops) -> IO[bytes]:
    with disk_errors(path, "open the lock"):
        try:
            # Linux refuses to open another user's file with O_CREAT in a folder with the sticky bit.
            descriptor = tops.open_file(path, os.O_RDWR)
        except FileNotFoundError:
            descriptor = tops.open_file(path, os.O_RDWR | os.O_CREAT)
        return os.fdopen(descriptor, "r+b")


@contextlib.contextmanager
def _translated_lock(path: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        message = f"another imagewatch process uses this folder: {printable(path)}"
        raise AlreadyRunning(
            message, path=path, hint="stop it first, or configure other folders for this one"
        ) from None
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP}:
            with disk_errors(path, "lock"):
                raise
        message = f"this file system does not support locks: {printable(path)}"
        hint = "put the state folder and the inbox on a local disk"
        raise SpoolError(message, path=path, code=error.errno or 0, hint=hint) from error


@contextlib.contextmanager
def locked_if_possible(path: str, tops: Tops) -> Iterator[bool]:
    """Lock a file that is there during the block, if its file system has locks and we may write it.

    Args:
        path: The file; a link is not followed.
        tops: The folders that were opened.

    Returns:
        Whether the file still had its name when it was locked: the process that had locked it before may have removed
        it.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    try:
        file = tops.open_file(path, os.O_RDWR)  # NFS locks only what may be written
    except OSError:
        yield tops.exists(path)
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # SMB reports the second
            raise BlockingIOError from error
        except OSError:  # there are no locks
            yield tops.exists(path)
            return
        yield tops.has_name(file, path)
    finally:
        os.close(file)


def locked(path: str) -> bool:
    """Return whether a process has a lock, without taking it for longer than an instant."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        with disk_errors(path, "test the lock"):
            raise
    return False
