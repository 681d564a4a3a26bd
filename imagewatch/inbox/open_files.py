"""Whether a program has a file open for writing.

A file may be unchanged because its sender has stalled. Linux grants a lease for reading only while no process has it
open for writing, and only to the file's owner; where it cannot be asked, the answer is no.
"""

from __future__ import annotations

import fcntl
import signal
from typing import TYPE_CHECKING

from imagewatch.system.file_systems import is_local
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    import io
    from collections.abc import Callable


def has_writer(path: str, opener: Callable[[str], io.FileIO] = open_file) -> bool:
    """Return whether a plain file is known to be open for writing.

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
        # A process that opens the file in this instant waits for us, and we get a signal; the usual one kills.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return is_local(descriptor)
    except (OSError, AttributeError):  # not ours, or not Linux
        return False
    return False
