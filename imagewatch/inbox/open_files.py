"""What the kernel can tell about a folder's files: whose clock they show, and whether somebody still writes them.

A quiet file may be one whose sender has stalled. Linux grants a lease for reading only while nobody has the file
open for writing, and only to the file's owner; where it cannot be asked, the answer is no.
"""

from __future__ import annotations

import fcntl
import os
import signal
from typing import TYPE_CHECKING

from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

_LOCAL = frozenset(
    (b"bcachefs", b"btrfs", b"ext2", b"ext3", b"ext4", b"f2fs", b"jfs", b"overlay", b"tmpfs", b"xfs", b"zfs")
)
"""File systems whose times are of our own clock, and that refuse a lease for no other reason than a writer. NFS and
CIFS refuse it whenever their server gives them none."""


def is_local(folder: str) -> bool:
    """Tell whether a folder is known to lie on a file system of this machine."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _file_system(descriptor) in _LOCAL
    finally:
        os.close(descriptor)


def has_writer(path: str, opener: Callable[[str], io.FileIO] = open_file) -> bool:
    """Tell whether a plain file is known to be open for writing.

    Args:
        path: The file.
        opener: Opens it.
    """
    try:
        file = opener(path)
    except OSError:
        return False
    with file:
        return _has_writer(file.fileno())


def _has_writer(descriptor: int) -> bool:
    try:
        # Somebody who opens the file in this instant waits for us, and we are told by a signal; the usual one kills.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return _file_system(descriptor) in _LOCAL
    except (OSError, AttributeError):  # not ours, or not Linux
        return False
    return False


def _file_system(descriptor: int) -> bytes:
    """Return the type of the file system of an open file, or an empty name."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
            mount = next(line.split()[1] for line in file if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as file:
            return next(line.partition(b" - ")[2].split()[0] for line in file if line.split()[0] == mount)
    except (OSError, StopIteration):
        return b""
