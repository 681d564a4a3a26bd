"""How many requests the limit of open files allows."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

_OWN_FILES: Final = 32
"""What the daemon has open beside its jobs: 17 at rest; scans, the command of the key and the resolver need more."""
_FILES_EACH: Final = 6
"""For each request at the same time: its connection, response and claim, the files being read and written, and half as
many for another job whose response is only being delivered."""


def most_requests(wanted: int) -> tuple[int, int]:
    """Return how many requests there may be at the same time, so that none lacks a file when its response comes.

    The soft limit of open files is raised as far as they need and the hard limit allows.

    Args:
        wanted: How many there are to be.

    Returns:
        How many there may be, from 1 to ``wanted``, and the limit of open files.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OWN_FILES + wanted * _FILES_EACH
    if limit == resource.RLIM_INFINITY:
        return wanted, needed
    if limit < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            limit = most
    return max(min(wanted, (limit - _OWN_FILES) // _FILES_EACH), 1), limit
