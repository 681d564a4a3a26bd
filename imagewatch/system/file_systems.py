"""Which file system a folder is on, from the kernel's mount table.

A folder whose file system was unmounted is still there, and empty: writing into it would hide what was paid for as soon
as the file system is mounted again, and an empty inbox would mean that everything was canceled.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

POLL_SECONDS = 5.0
"""Longest interval between two scans of a folder without change events."""
SMB = frozenset({"cifs", "smb3", "smbfs"})
_TABLE = "/proc/self/mountinfo"
_ELSEWHERE = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "coda"),  # servers
    *("9p", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "drvfs", "fakeowner", "osxfs", "grpcfuse"),  # hosts
    *("beegfs", "ceph", "gfs2", "glusterfs", "gpfs", "lustre", "ocfs2", "orangefs"),  # clusters
    "fuse",
}
"""File systems that others can change without this kernel noticing."""
_PRIVATE = {
    *("fuse.cryfs", "fuse.encfs", "fuse.gocryptfs", "fuse.securefs"),
    *("fuse.exfat", "fuse.ntfs-3g", "fuse.fuse-overlayfs"),
}
"""FUSE file systems that can only be changed through their own mount."""
_LOCAL = {
    *("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "ubifs", "xfs", "zfs")
}
"""File systems of this machine: their times are of our own clock, and they refuse a lease only because of a writer. NFS
and CIFS refuse one whenever their server grants none."""
_TIMED = _LOCAL | {"nfs", "nfs4"}
"""File systems on which the ctime of a folder is known to change whenever a name in it does."""
_KERNELS_OWN = {
    *("proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "securityfs", "debugfs", "tracefs", "configfs"),
    *("pstore", "efivarfs", "bpf", "binfmt_misc", "fusectl", "selinuxfs", "nsfs", "rpc_pipefs"),
}
"""File systems whose files are the kernel's; no user can create one there."""
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of the mount table.

    Attributes:
        number: By which the kernel knows it.
        point: Where it is mounted.
        kind: Type of the file system, such as ``ext4``, ``nfs4``, ``fuse.sshfs``.
    """

    number: int
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
            found.append(Mount(int(fields[0]), os.fsdecode(point), kind.decode("ascii", "replace")))
    return found


def mount_of(folder: str, mounts: Iterable[Mount]) -> Mount | None:
    """Return the mount that a folder is on: the deepest above it, of several at one place the newest."""
    real = os.path.realpath(folder)
    above = [m for m in mounts if m.point in {"/", real} or real.startswith(m.point + "/")]
    deepest = max((len(mount.point) for mount in above), default=0)
    return next((mount for mount in reversed(above) if len(mount.point) == deepest), None)


def eventless(kind: str) -> bool:
    """Return whether changes on a file system of this kind may be made where our kernel does not see them.

    Args:
        kind: Its type, as in the mount table. An unknown one is taken for a local disk; FUSE is taken for a remote one.
    """
    return kind in _ELSEWHERE or (kind.startswith("fuse.") and kind not in _PRIVATE)


def keeps_times(kind: str) -> bool:
    """Return whether a folder with the same times is sure to have the same names in it."""
    return kind in _TIMED


def keeps_owners(kind: str) -> bool:
    """Return whether files are known to keep the owner and the mode that they are given."""
    return kind in _TIMED


def keeps_files(kind: str) -> bool:
    """Return whether any user can keep files on a file system of this kind."""
    return kind not in _KERNELS_OWN


def is_local(descriptor: int) -> bool:
    """Return whether an open file or folder is known to be on a file system of this machine."""
    number = _mount_number(descriptor)
    return any(mount.kind in _LOCAL for mount in table() if mount.number == number)


def place_of(descriptor: int) -> tuple[int, int]:
    """Return what is the same for two open folders only if a file can be renamed from one to the other.

    That is device and mount: two mounts of one device are two places, and so are two volumes in one mount.
    """
    return os.fstat(descriptor).st_dev, _mount_number(descriptor)


def _mount_number(descriptor: int) -> int:
    """Return by which number the kernel knows the mount of an open file; 0 where it gives none."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
    except (OSError, StopIteration):
        return 0


class Kinds:
    """Knows of which kind the file systems of folders are, without asking the kernel for each folder again.

    Args:
        path: The mount table.
    """

    def __init__(self, path: str = _TABLE) -> None:
        self._path = path
        self._table: list[Mount] = []
        self._known: dict[int, str] = {}

    def refresh(self) -> None:
        """Take notice of what was mounted and unmounted."""
        if (now := table(self._path)) != self._table:
            self._table = now
            self._known.clear()

    def of(self, folder: str) -> str:
        """Return the type of the file system a folder is on; an empty string if that is unknown."""
        try:
            device = os.stat(folder).st_dev
        except OSError:
            return ""
        if device not in self._known:
            mount = mount_of(folder, self._table)
            self._known[device] = mount.kind if mount else ""
        return self._known[device]


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
        """Make sure that the file system of each folder is still mounted.

        Raises:
            SpoolError: One is.
        """
        for folder, point in self._points.items():
            with disk_errors(folder, "check the folder"):
                device = os.stat(folder).st_dev
            if device == self._devices[folder]:
                continue
            now = self._point(folder, table())
            if len(now) < len(point):
                message = f"the file system of {printable(point)} is not mounted any more: {printable(folder)}"
                raise SpoolError(
                    message, path=folder, code=errno.ENODEV, hint="mount it again; the daemon resumes automatically"
                )
            # Mounted again, or something else was mounted here since: it was put here to be used.
            self._points[folder], self._devices[folder] = now, device
