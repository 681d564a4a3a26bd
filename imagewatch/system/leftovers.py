"""Temporary files of a daemon that was killed: removed at the next start, while nothing uses them.

The name of one has the id of its job in it. Those of unfinished jobs are certainly ours, and no worker
runs yet. Of a job without a record nothing is known: another daemon may publish into the same folder, so such a file
stays for a day.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from typing import TYPE_CHECKING

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from imagewatch.system.disk import Disk

_TEMPORARY = re.compile(r"\.iw-([0-9a-f]{16})\.(?:[0-9]+|d)(?:\.[0-9]+)?\.tmp")
STALE_SECONDS = 86_400.0
"""A temporary file of which nothing is known stays for so long."""


def remove(disk: Disk, destinations: Iterable[str], jobs: Mapping[str, str]) -> None:
    """Remove temporary files from the folders into which results are published.

    Args:
        disk: The local disk; the destinations are open.
        destinations: Absolute paths of outbox, errors and archive.
        jobs: The folder below the inbox of each job that is not finished, by the job's id.
    """
    inner = {"", *jobs.values()}
    for folder in {os.path.join(top, name) if name else top for top in destinations for name in inner}:
        with contextlib.suppress(OSError, SpoolError):  # such a folder need not be there
            for name in disk.tops.names(folder):
                if found := _TEMPORARY.fullmatch(name):
                    remove_old(disk, os.path.join(folder, name), is_known=found[1] in jobs)


def remove_old(disk: Disk, path: str, *, is_known: bool) -> None:
    """Remove a file of our own; what fails is left for another start.

    Args:
        disk: The local disk.
        path: The file.
        is_known: Whether it is certainly unused. Else it has to be a day old.
    """
    with contextlib.suppress(SpoolError), disk_errors(path, "check the file"):
        status = disk.tops.lstat(path)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if is_ours and (is_known or time.time() - status.st_ctime >= STALE_SECONDS):
            disk.unlink(path)
