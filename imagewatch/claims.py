"""The folder of claimed files, ``inbox/.imagewatch``: the daemon's alone, known by what it is and not by its name.

Whoever may write the inbox may rename this folder and put another one, or a link, under its name. So it is opened once
and then reached by its descriptor; its inode is kept in the state folder, for the next start. It must belong to the
daemon's user and have the mode 0700, as nobody else can make such a folder. A file system that keeps no owners (FAT,
some shares) cannot tell; there each part of a path below it is looked at, as anywhere in the inbox.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from typing import TYPE_CHECKING

from imagewatch.durable import Disk, ours
from imagewatch.errors import SpoolError
from imagewatch.folders import Descriptor, NotAFolderError
from imagewatch.names import CLAIMS
from imagewatch.text import printable
from imagewatch.writers import is_local

if TYPE_CHECKING:
    from imagewatch.folders import Tops

_FILE = "claims.json"
_MODE = 0o700
_HINT = "remove or rename what has this name; the daemon resumes automatically"


class NotOursError(SpoolError):
    """What has the name of the folder of claimed files is not the daemon's."""


class Claims:
    """Finds the folder of claimed files, makes it, and notices when another one has its name.

    Args:
        inbox: The inbox, opened as a top of the disk.
        state: The state folder, likewise.
        disk: Our disk.

    Attributes:
        path: Its path.
    """

    def __init__(self, inbox: str, state: str, disk: Disk) -> None:
        self._inbox = inbox
        self._memory = os.path.join(state, _FILE)
        self._disk = disk
        self.path = os.path.join(inbox, CLAIMS)
        self._judged: tuple[Descriptor, bool] | None = None

    @property
    def _tops(self) -> Tops:
        return self._disk.tops

    def is_open(self) -> bool:
        """Tell whether the true folder is open, whatever has its name."""
        return self._tops.opened(self.path) is not None

    def require(self) -> None:
        """Make sure that the folder of this name is ours and open; make it if there is none.

        Raises:
            NotOursError: Something else has its name.
            SpoolError: The disk failed.
        """
        self.check()
        if not self.is_open():
            self._disk.make_folder(self.path, _MODE)
            self._disk.sync_folder(self._inbox)
            self.check()

    def check(self) -> None:
        """Open the folder if it is there, and give it its name back if nothing has it.

        If another folder has its name the true one stays open, so that jobs that are under way can end.

        Raises:
            NotOursError: Something else has its name.
            SpoolError: The disk failed.
        """
        named = self._named()
        known = self._tops.opened(self.path)
        if known is not None and named is not None and known.is_same(named):
            return
        if known is None or not self._is_in_inbox(known):
            known = self._found()
        if known is None and named is None:
            self._tops.drop(self.path)
            return
        if known is None:
            self._take()
            return
        self._tops.know(self.path, known)
        if named is not None and not known.is_same(named):
            raise self._displaced(known)
        if named is None:
            self._rename_back(known)

    def _named(self) -> os.stat_result | None:
        """Return what has its name now, or None."""
        with ours(self.path, "look at the folder"), contextlib.suppress(FileNotFoundError):
            return self._tops.lstat(self.path)
        return None

    def _is_in_inbox(self, known: Descriptor) -> bool:
        """Tell whether the folder that is open still is in this inbox."""
        try:
            status = known.status()
            above = os.stat("..", dir_fd=known.fileno())
        except OSError:
            return False
        return status.st_nlink > 0 and self._tops.folder(self._inbox).is_same(above)

    def _found(self) -> Descriptor | None:
        """Return the folder that an earlier start knew, whatever its name in the inbox is; None if it is not there."""
        inode = self._remembered()
        if not inode:
            return None
        inbox = self._tops.listable(self._inbox)
        with ours(self._inbox, "list the folder"), inbox.entries() as entries:
            names = [entry.name for entry in entries if entry.inode() == inode and entry.is_dir(follow_symlinks=False)]
        for name in names:
            with contextlib.suppress(OSError):
                folder = self._tops.entered(os.path.join(self._inbox, name))
                status = folder.status()
                if status.st_ino == inode and not self._strange(folder):
                    return folder
        return None

    def _take(self) -> None:
        """Use the folder that has its name from now on."""
        try:
            with ours(self.path, "open the folder"):
                folder = self._tops.entered(self.path)
        except SpoolError as error:
            if isinstance(error.__cause__, NotAFolderError):
                self._tops.know(self.path, None)
                raise self._not_ours("it is no folder") from error
            raise
        if reason := self._strange(folder):
            self._tops.know(self.path, None)
            raise self._not_ours(reason)
        self._tops.know(self.path, folder)
        if self._remembered() != (inode := folder.status().st_ino):
            self._disk.write(self._memory, json.dumps({"inode": inode}).encode())

    def _remembered(self) -> int:
        """Return the inode that is kept in the state folder; 0 without one."""
        try:
            with open(self._tops.open_file(self._memory, os.O_RDONLY), "rb") as file:
                return int(json.load(file)["inode"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # it is found by its owner and mode

    def _strange(self, folder: Descriptor) -> str:
        """Return why a folder is not the daemon's own, or an empty string."""
        status = folder.status()
        mine, mode = status.st_uid == os.geteuid(), stat.S_IMODE(status.st_mode) & 0o777
        if mine and mode != _MODE and status.st_ino == self._remembered():
            with contextlib.suppress(OSError):  # only its owner or root can have changed the mode, as by chmod -R
                os.fchmod(folder.fileno(), _MODE)
                return ""
        if (mine and mode == _MODE) or not self.keeps_owners():
            return ""
        return f"it has the mode {mode:04o}, not 0700" if mine else f"it belongs to another user ({status.st_uid})"

    def is_private(self) -> bool:
        """Tell whether it is known that nobody else can change what is in it."""
        folder = self._tops.opened(self.path)
        if folder is None:
            return False
        if self._judged is None or self._judged[0] is not folder:
            status = folder.status()
            owned = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077 == 0
            self._judged = folder, owned and is_local(self._inbox)
        return self._judged[1]

    def keeps_owners(self) -> bool:
        """Tell whether the file system of the inbox keeps owners and modes, by a file that we make.

        Raises:
            SpoolError: No file can be made.
        """
        path = os.path.join(self._inbox, f".iw-probe.{secrets.token_hex(8)}")
        try:
            with self._disk.create(path, 0o600) as file:
                status = os.fstat(file.fileno())
        finally:
            self._disk.unlink(path)
        return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600  # noqa: PLR2004  as created

    def _name_of(self, known: Descriptor) -> str:
        """Return the name that the true folder has in the inbox now, or an empty string."""
        inode = known.status().st_ino
        with contextlib.suppress(OSError), self._tops.listable(self._inbox).entries() as entries:
            return next((entry.name for entry in entries if entry.inode() == inode), "")
        return ""

    def _rename_back(self, known: Descriptor) -> None:
        """Give the folder its name back, which nothing has."""
        name = self._name_of(known)
        with ours(self.path, "rename"):
            self._disk.rename(os.path.join(self._inbox, name), os.path.join(self._inbox, CLAIMS))
        self._disk.sync_folder(self._inbox)
        named = self._named()
        if named is None or not known.is_same(named):
            raise self._displaced(known)

    def _displaced(self, known: Descriptor) -> NotOursError:
        name = self._name_of(known)
        return self._not_ours(f"that is now {printable(os.path.join(self._inbox, name))}" if name else "that was moved")

    def _not_ours(self, reason: str) -> NotOursError:
        what = "is not the folder in which the daemon keeps claimed files"
        message = f"{printable(self.path)}: {what} ({reason}), so nothing is claimed"
        return NotOursError(message, path=self.path, code=errno.EPERM, hint=_HINT)
