"""How a folder of claimed files is recognized, whatever its name is."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from typing import TYPE_CHECKING

from imagewatch.system.untrusted import open_at

if TYPE_CHECKING:
    from imagewatch.system.folders import Descriptor

MARK = ".imagewatch-claims"
"""A file in it: the identity that the daemon gave it."""
JOB = re.compile("[0-9a-f]{16}")
"""Names of the folders in it: job ids."""
_MOST_MARK = 64
_MOST_LISTED = 4096


def mark_in(folder: Descriptor) -> str:
    """Return the mark of a folder of claimed files, or an empty string."""
    try:
        with open_at(MARK, folder.fileno(), most_bytes=_MOST_MARK) as file:
            return file.read(_MOST_MARK).decode("ascii", "replace")
    except OSError:
        return ""


def looks_like_claims(descriptor: int) -> bool:
    """Return whether a folder is, or was, one of claimed files, of whatever daemon and under whatever name.

    What is in it may have been paid for, so it is not scanned.
    """
    if _has(descriptor, MARK):
        return True
    if not _has(descriptor, "lock"):
        return False
    with contextlib.suppress(OSError), os.scandir(descriptor) as entries:  # not all of them: there may be a million
        return any(JOB.fullmatch(entry.name) for entry in itertools.islice(entries, _MOST_LISTED))
    return False


def _has(descriptor: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError:
        return False
    return True
