"""Which file system a folder is on, from the kernel's mount table.

A folder whose file system was unmounted is still there, and empty: writing into it would hide what was paid for as soon
as the file system is back, and an empty inbox would look as if everything had been cancelled.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.durable import ours
from imagewatch.errors import SpoolError
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_TABLE = "/proc/self/mountinfo"
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of the mount table.

    Attributes:
        point: Where it is mounted.
        kind: Type of the file system, such as ``ext4``, ``nfs4``, ``fuse.sshfs``.
    """

    point: str
    kind: str


def table(path: str = _TABLE) -> list[Mount]:
    """Return all mounts, the newest last; empty where the kernel has no such table.

    Args:
        path: The table (format: ``proc_pid_mountinfo(5)``).
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(b" - ")
        fields, kind = before.split(b" "), after.split(b" ", 1)[0]
        if len(fields) > 4:  # noqa: PLR2004  the fifth field is the mount point
            point = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            found.append(Mount(os.fsdecode(point), kind.decode("ascii", "replace")))
    return found


def mount_of(folder: str, mounts: Iterable[Mount]) -> Mount | None:
    """Return the mount that a folder is on: the deepest above it, of several at one place the newest."""
    real = os.path.realpath(folder)
    above = [m for m in mounts if m.point in {"/", real} or real.startswith(m.point + "/")]
    deepest = max((len(mount.point) for mount in above), default=0)
    return next((mount for mount in reversed(above) if len(mount.point) == deepest), None)


class Mounts:
    """Remembers where folders are mounted.

    Args:
        folders: Folders that are there.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        mounts = table()
        self._points = {folder: self._point(folder, mounts) for folder in folders}
        self._devices = {folder: os.stat(folder).st_dev for folder in self._points}

    def _point(self, folder: str, mounts: list[Mount]) -> str:
        mount = mount_of(folder, mounts)
        return mount.point if mount else ""

    def require(self) -> None:
        """Make sure that no file system is gone from under a folder.

        Raises:
            SpoolError: One is.
        """
        for folder, point in self._points.items():
            with ours(folder, "look at the folder"):
                device = os.stat(folder).st_dev
            if device == self._devices[folder]:
                continue
            now = self._point(folder, table())
            if len(now) < len(point):
                message = f"{printable(folder)}: the file system of {printable(point)} is not mounted any more"
                raise SpoolError(
                    message, path=folder, code=errno.ENODEV, hint="mount it again; the work goes on by itself"
                )
            # Mounted anew, or something was mounted here since: that is what whoever did it wants to be used.
            self._points[folder], self._devices[folder] = now, device
