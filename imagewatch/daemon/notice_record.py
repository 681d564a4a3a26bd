"""Where status files in the folders were written, and with which content.

If the administrator chooses another folder for them, the old ones would say that the daemon is not running. Two daemons
may have used the same folder, so the next start removes only files that have exactly the content that was recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import TYPE_CHECKING

from imagewatch.protocol.notice import JSON, MOST_BYTES, TEXT
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "notice.json"
_MOST_FOLDERS = 10


class NoticeRecord:
    """The record, in the state folder.

    Args:
        state: The state folder.
        disk: The disk that has it open.
    """

    def __init__(self, state: str, disk: Disk) -> None:
        self._path = os.path.join(state, FILE)
        self._disk = disk
        self._folders: dict[str, dict[str, str]] = {}

    def begin(self, folder: str) -> None:
        """Remove the files of an earlier process from all folders but one.

        Args:
            folder: Where they are from now on; an empty string: nowhere.
        """
        before = self._read()
        current = os.path.realpath(folder) if folder else ""
        self._folders = {path: files for path, files in before.items() if path == current or not _remove(path, files)}
        if self._folders != before:
            self._write()

    def written(self, folder: str, contents: Mapping[str, bytes]) -> None:
        """Record what was written.

        Args:
            folder: The folder, without links in its path.
            contents: The content of each file.
        """
        self._folders.pop(folder, None)
        self._folders[folder] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        for path in list(self._folders)[:-_MOST_FOLDERS]:
            del self._folders[path]
        self._write()

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            with open_file(self._path, self._disk.tops, most_bytes=MOST_BYTES) as file:
                found = json.loads(file.read())
        except (OSError, ValueError):
            return {}
        is_valid = isinstance(found, dict) and all(isinstance(files, dict) for files in found.values())
        return found if is_valid else {}

    def _write(self) -> None:
        with contextlib.suppress(SpoolError):  # the files of this process stay then, as after a kill
            self._disk.jot(self._path, json.dumps(self._folders).encode())


def _remove(folder: str, files: Mapping[str, str]) -> bool:
    """Remove the files that have the recorded content; return whether nothing is left to be done there."""
    disk = Disk()
    try:
        if os.path.realpath(folder) != folder:
            return False  # a link is in its place now
        disk.tops.open(folder)
        for name in (TEXT, JSON):
            path = os.path.join(folder, name)
            if _is_own(disk, path, files.get(name)):
                disk.unlink(path)
    except (OSError, SpoolError):  # the folder may be on a share that is not mounted
        return False
    return True


def _is_own(disk: Disk, path: str, digest: str | None) -> bool:
    try:
        status = disk.tops.lstat(path)
        with open_file(path, disk.tops, most_bytes=MOST_BYTES) as file:
            content = file.readall()
    except OSError:  # it was removed, or is no plain file
        return False
    return status.st_uid == os.geteuid() and hashlib.sha256(content).hexdigest() == digest
