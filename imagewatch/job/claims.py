"""The folder of claimed files, ``inbox/.imagewatch``: only the daemon's, identified by its inode and not by its name.

Every user who may write to the inbox may rename this folder and put another one, or a link, in its place. So it is
opened once and then reached by its descriptor; its inode is kept in the state folder, for the next start. It must
belong to the daemon's user and have the mode 0700, as no other user can create such a folder. On a file system that
keeps no owners (FAT, some shares) this does not help; there each part of a path below it is checked, as in the rest of
the inbox.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from secrets import token_hex
from typing import TYPE_CHECKING

from imagewatch.inbox.claimed import MARK, looks_like_claims, mark_in
from imagewatch.job.common_folder import PROBE
from imagewatch.protocol.names import CLAIMS
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Descriptor, NotAFolderError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.system.disk import Disk
    from imagewatch.system.folders import Tops

_FILE = "claims.json"
_ITS_OWN = "is the daemon's folder of claimed files"
_MODE = 0o700
HINT = "remove or rename what has this name; the daemon resumes automatically"


class NotOursError(SpoolError):
    """What has the name of the folder of claimed files is not the daemon's."""


class Claims:
    """Finds the folder of claimed files, creates it, and notices when another one has its name.

    Args:
        inbox: The inbox, opened as a top of the disk.
        state: The state folder, likewise.
        disk: The local disk.

    Attributes:
        path: Its path.
    """

    def __init__(self, inbox: str, state: str, disk: Disk) -> None:
        self._inbox = inbox
        self._memory = os.path.join(state, _FILE)
        self._disk = disk
        self._has_no_modes = False
        self.path = os.path.join(inbox, CLAIMS)

    @property
    def _tops(self) -> Tops:
        return self._disk.tops

    def is_open(self) -> bool:
        """Return whether the true folder is open; another one may have its name."""
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
        """Open the folder if it is there, and rename it back if its name is free.

        If another folder has its name the true one stays open, so that running jobs can end.

        Raises:
            NotOursError: Something else has its name.
            SpoolError: The disk failed.
        """
        named = self._named()
        known = self._tops.opened(self.path)
        if known is not None and named is not None and known.is_same(named):
            self._close_to_others(known, named)
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
        self._remember(known)
        if named is not None and not known.is_same(named):
            raise self._displaced(known)
        if named is None:
            self._rename_back(known)

    def _named(self) -> os.stat_result | None:
        """Return what has its name now, or None."""
        with disk_errors(self.path, "check the folder"), contextlib.suppress(FileNotFoundError):
            return self._tops.lstat(self.path)
        return None

    def _close_to_others(self, folder: Descriptor, status: os.stat_result) -> bool:
        """Correct the mode of the true folder, which its owner or root has changed; return whether it is right."""
        if stat.S_IMODE(status.st_mode) & 0o777 == _MODE:
            return True
        if status.st_uid != os.geteuid() or self._has_no_modes:
            return False
        try:
            os.fchmod(folder.fileno(), _MODE)
        except OSError:
            self._has_no_modes = True
        else:
            self._has_no_modes = stat.S_IMODE(folder.status().st_mode) & 0o777 != _MODE
        return not self._has_no_modes

    def _is_in_inbox(self, known: Descriptor) -> bool:
        """Return whether the folder that is open is still in this inbox."""
        try:
            status = known.status()
            above = os.stat("..", dir_fd=known.fileno())
        except OSError:
            return False
        return status.st_nlink > 0 and self._tops.folder(self._inbox).is_same(above)

    def _found(self) -> Descriptor | None:
        """Return the folder that an earlier start knew, whatever its name in the inbox is; None if it is not there."""
        inode, mark = self._remembered()
        with disk_errors(self._inbox, "list the folder"), self._tops.listable(self._inbox).entries() as entries:
            names = [entry.name for entry in entries if inode and entry.is_dir(follow_symlinks=False)]
        for name in names:
            with contextlib.suppress(OSError):
                folder = self._tops.entered(os.path.join(self._inbox, name))
                # An inbox that was copied has other inodes.
                is_known = folder.status().st_ino == inode or (mark and mark == mark_in(folder))
                if is_known and not self._strange(folder):
                    return folder
        return None

    def _take(self) -> None:
        """Use the folder that has its name from now on."""
        try:
            with disk_errors(self.path, "open the folder"):
                folder = self._tops.entered(self.path)
        except SpoolError as error:
            if isinstance(error.__cause__, NotAFolderError):
                self._tops.know(self.path, None)
                raise self._not_ours("it is not a folder") from error
            if error.code == errno.EACCES:
                self._tops.know(self.path, None)
                raise self._not_ours("the daemon may not open it") from error
            raise
        if reason := self._strange(folder):
            self._tops.know(self.path, None)
            raise self._not_ours(reason)
        self._tops.know(self.path, folder)
        try:
            self._remember(folder)
        except SpoolError:
            self._tops.know(self.path, None)  # so that it is tried again
            raise

    def _remember(self, folder: Descriptor) -> None:
        """Mark a folder as the daemon's, and keep its inode and mark in the state folder."""
        inode, mark = folder.status().st_ino, mark_in(folder)
        if not mark:
            mark = self._new_mark(folder)
        if self._remembered() != (inode, mark):
            self._disk.write(self._memory, json.dumps({"inode": inode, "mark": mark}).encode())

    def _new_mark(self, folder: Descriptor) -> str:
        """Mark a folder; return its mark, which another daemon of a common inbox may have set just before."""
        mark, path = token_hex(16), os.path.join(self.path, MARK)
        self._disk.unlink(f"{path}.tmp")  # of an earlier version that was killed
        with contextlib.suppress(FileExistsError):
            # Under the name of a test file, which a start removes if this process is killed.
            self._disk.publish(path, os.path.join(self.path, PROBE + mark), mark.encode(), lambda _: None)
        return mark_in(folder) or mark

    def _remembered(self) -> tuple[int, str]:
        """Return the inode and the mark that are kept in the state folder; 0 and an empty string without."""
        try:
            with open(self._tops.open_file(self._memory, os.O_RDONLY), "rb") as file:
                kept = json.load(file)
                return int(kept["inode"]), str(kept.get("mark", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0, ""  # it is found by its owner and mode

    def _strange(self, folder: Descriptor) -> str:
        """Return why a folder is not the daemon's own, or an empty string."""
        status = folder.status()
        mine, mode = status.st_uid == os.geteuid(), stat.S_IMODE(status.st_mode) & 0o777
        inode, mark = self._remembered()
        is_known = status.st_ino == inode or bool(mark and mark == mark_in(folder))
        if mine and is_known and self._close_to_others(folder, status):
            return ""
        if (mine and mode == _MODE) or not self.keeps_owners():
            return ""
        reason = f"it has the mode {mode:04o}, not 0700" if mine else f"it belongs to another user ({status.st_uid})"
        return f"{_ITS_OWN}, but {reason}" if is_known or looks_like_claims(folder.fileno()) else reason

    def keeps_owners(self) -> bool:
        """Return whether the file system of the inbox keeps owners and modes, found out with a new file.

        Raises:
            SpoolError: No file can be created.
        """
        path = os.path.join(self._inbox, PROBE + token_hex(8))
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
        """Rename the folder back; its name is free."""
        name = self._name_of(known)
        with disk_errors(self.path, "rename"):
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
        message = f"{printable(self.path)} {what} ({reason}), so nothing is claimed"
        hint = HINT
        if reason.startswith(_ITS_OWN):
            message = f"{printable(self.path)} {reason}, so nothing is claimed"
            hint = "do not remove or rename it: give it back to the daemon's user (chown -R) and set its mode to 0700"
        return NotOursError(message, path=self.path, code=errno.EPERM, hint=hint)
