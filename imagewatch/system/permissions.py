"""Mode and group of the files that imagewatch publishes, and of copies of what was dropped.

``commands/drop`` sets the mode of what ``submit`` drops, ``disk_calls`` that of folders.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import stat

from imagewatch.system.errors import ConfigError, Problem

_ALL_BITS = 0o777
_USUAL_UMASK = 0o022


class Permissions:
    """Mode and group of what is published.

    Args:
        file_mode: Permission bits of files; None leaves them to the umask.
        folder_mode: Permission bits of folders; None leaves them to the umask.
        group: Name of the group; None leaves it to the system.
        is_strict: Whether a group that does not exist, or that this user may not set, is an error.

    Raises:
        ConfigError: There is no such group.
    """

    def __init__(
        self, file_mode: int | None, folder_mode: int | None, group: str | None, *, is_strict: bool = True
    ) -> None:
        self._file_mode = file_mode
        self.folder_mode = folder_mode
        self._is_strict = is_strict
        self._group_id = None if group is None else self._looked_up(group)

    def _looked_up(self, group: str) -> int | None:
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            if not self._is_strict:
                return None
            problem = Problem("outbox.group", f'there is no group "{group}"', "create it, or remove the key")
            raise ConfigError([problem]) from None

    @functools.cached_property
    def _mode(self) -> int:
        return 0o666 & ~_umask() if self._file_mode is None else self._file_mode

    def apply(self, descriptor: int) -> None:
        """Give an open file its mode and group.

        Raises:
            OSError: One of them cannot be set.
        """
        os.fchmod(descriptor, self._mode)
        if self._group_id is not None:
            # A user outside the group cannot set it: fewer people can read the file then, not more.
            with contextlib.nullcontext() if self._is_strict else contextlib.suppress(PermissionError):
                os.fchown(descriptor, -1, self._group_id)


def readable_mode(folder: os.stat_result) -> int:
    """Return the mode of a file that those may read who may list a folder, and that only its owner may write."""
    return stat.S_IRUSR | stat.S_IWUSR | (folder.st_mode & (stat.S_IRGRP | stat.S_IROTH))


def set_mode_and_group(descriptor: int, mode: int, group: int) -> None:
    """Give an open file a mode and a group, as far as this user may and the file system has them.

    If the group cannot be set, the file's group may only do what all users may.

    Args:
        descriptor: The file.
        mode: Permission bits.
        group: Number of the group.
    """
    try:
        if os.fstat(descriptor).st_gid != group:
            os.fchown(descriptor, -1, group)
    except OSError:
        mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    with contextlib.suppress(PermissionError):  # a file system without modes
        os.fchmod(descriptor, mode)


def copy_permissions(source: int, copy: int) -> None:
    """Give a copy the group and the mode of its source, and never a wider mode.

    If the group cannot be set, the copy's group may only do what all users may.

    Args:
        source: Descriptor of the file that was copied.
        copy: Descriptor of the copy.
    """
    status = os.fstat(source)
    set_mode_and_group(copy, stat.S_IMODE(status.st_mode) & _ALL_BITS, status.st_gid)


def _umask() -> int:
    """Return the process's umask; read from /proc, because ``os.umask`` would change it for other threads."""
    try:
        with open("/proc/self/status", "rb") as file:
            return next(int(line.split()[1], 8) for line in file if line.startswith(b"Umask:"))
    except (OSError, StopIteration):
        return _USUAL_UMASK
