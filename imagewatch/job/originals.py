"""The files that were dropped: out of the inbox into a claim, and back."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import stat
from typing import TYPE_CHECKING

from imagewatch.protocol.names import CLAIM_NOTE
from imagewatch.protocol.values import dump
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import NotAFolderError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.job.folders import JobFolders
    from imagewatch.protocol.values import Claim


class Originals:
    """Moves the originals of jobs between the inbox and their claims.

    Args:
        folders: All folders.
    """

    def __init__(self, folders: JobFolders) -> None:
        self._folders = folders
        self._disk = folders.disk

    def owner(self, claim: Claim) -> str:
        """Return the user to whom a prompt in the inbox belongs: name, else number; empty if it is missing."""
        try:
            user = self._folders.tops.lstat(os.path.join(self._folders.inbox_folder(claim), claim.prompt)).st_uid
        except OSError:
            return ""
        return _name(user)

    def claim(self, claim: Claim) -> bool:
        """Move a prompt from the inbox into its claim: this rename is the lock. The journal knows it already.

        Returns:
            False if the prompt was missing: it was canceled, or another folder has the name of its folder now.
        """
        folder = self._folders.claim_folder(claim.job)
        self._disk.make_folder(folder)  # not synced, nor are the renames: see take_again
        if self._folders.journal.common.is_on:
            self._disk.jot(os.path.join(folder, CLAIM_NOTE), dump(claim))
        try:
            with self._folders.reached(self._folders.inbox_folder(claim), self._inode(claim)):
                claimed = self._claim_file(claim, claim.prompt)
                if claimed:
                    self.gather(claim)
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotAFolderError) and not self.claimed(claim.job):
                return False
            raise
        return claimed

    def _inode(self, claim: Claim) -> int:
        """Return the inode that the folder of a prompt must have; 0 where inodes change."""
        return claim.folder_inode if self._folders.keeps_times() else 0

    def gather(self, claim: Claim) -> None:
        """Move the other originals of a job into the claim."""
        with self._folders.reached(self._folders.inbox_folder(claim), self._inode(claim)):
            for name in claim.images:
                self._claim_file(claim, name)

    def take_again(self, claim: Claim) -> None:
        """Move originals of a job that was sent into its claim again, if a power cut has put them back into the inbox.

        The journal knows them: what is in the inbox with the same inode, or with the same size and times, is not
        another prompt.
        """
        folder = self._folders.inbox_folder(claim)
        there = self.claimed(claim.job)
        lost = [name for name in claim.names if name not in there and self._is_original(claim, name)]
        if not lost:
            return
        self._folders.ensure_claims()
        self._disk.make_folder(self._folders.claim_folder(claim.job))
        with self._folders.reached(folder):
            for name in lost:
                self._claim_file(claim, name)

    def _is_original(self, claim: Claim, name: str) -> bool:
        """Return whether what has the name of an original in the inbox is that original."""
        try:
            status = self._folders.tops.lstat(os.path.join(self._folders.inbox_folder(claim), name))
        except OSError:
            return False
        if stat.S_ISDIR(status.st_mode):
            return False
        if (known := claim.files.get(name)) is None:
            return True
        inode, size, mtime_ns = known
        is_same = self._folders.keeps_times() and status.st_ino == inode
        return is_same or (status.st_size, status.st_mtime_ns) == (size, mtime_ns)

    def leave(self, folder: str) -> None:
        """Make durable that claimed originals are not in this folder any more, before they leave the claim."""
        if self._folders.tops.is_folder(folder):
            self._disk.sync_folder(folder)

    def _claim_file(self, claim: Claim, name: str) -> bool:
        source = os.path.join(self._folders.inbox_folder(claim), name)
        target = self._folders.original(claim, name)
        if self._drop_twin(source, target):
            return True
        if not self.may_be_claimed(source):
            return False
        is_common = self._folders.journal.common.is_on
        if is_common and self._folders.tops.exists(target):
            return False
        try:
            with disk_errors(source, "move the file out of the inbox"):
                # In a common inbox one act: of two, a late second one would concern a newer file of this name.
                (self._disk.replace if is_common else self._disk.rename)(source, target)
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError | FileExistsError):
                return False
            raise
        if self._folders.tops.is_folder(target):  # it replaced the file in this moment
            with disk_errors(source, "put the folder back into the inbox"):
                self._disk.rename(target, source)
            return False
        return True

    def may_be_claimed(self, path: str) -> bool:
        """Return whether there is something to be claimed. A folder stays, even if a prompt names it."""
        try:
            return not stat.S_ISDIR(self._folders.tops.lstat(path).st_mode)
        except OSError:
            return False

    def matches_scan(self, claim: Claim) -> bool:
        """Return whether the claimed files are those that the scan accepted, unchanged.

        Where inodes and times change, the sizes are compared.
        """
        is_steady = self._folders.keeps_times()
        for name, (inode, size, mtime_ns) in claim.files.items():
            try:
                status = self._folders.tops.lstat(self._folders.original(claim, name))
            except FileNotFoundError:
                continue  # an image that is missing is a problem of the request
            if not stat.S_ISREG(status.st_mode):
                if size >= 0:
                    return False
            elif status.st_size != size or (is_steady and (status.st_ino, status.st_mtime_ns) != (inode, mtime_ns)):
                return False
        return True

    def drop_twins(self, claim: Claim) -> None:
        """Remove the inbox names of the files that are claimed already."""
        with contextlib.suppress(OSError), self._folders.tops.held(self._folders.inbox_folder(claim)):
            self._drop_twins_in(claim)

    def _drop_twins_in(self, claim: Claim) -> None:
        for name in claim.originals:
            self._drop_twin(os.path.join(self._folders.inbox_folder(claim), name), self._folders.original(claim, name))

    def _drop_twin(self, source: str, target: str) -> bool:
        """Remove an inbox name of a file that is claimed already (some file systems restore it)."""
        try:
            twin = os.path.samestat(
                self._folders.tops.lstat(target), self._folders.tops.lstat(source)
            )  # hardly ever is there a target
        except OSError:
            return False
        if twin:
            self._disk.unlink(source)
        return twin

    def claimed(self, job: str) -> set[str]:
        """Return the names of all files in the folder of a claim, its note aside."""
        path = self._folders.claim_folder(job)
        with disk_errors(path, "list the folder"), contextlib.suppress(FileNotFoundError):
            return {name for name in self._folders.tops.names(path, folders=False) if not _is_note(name)}
        return set()

    def _originals(self, claim: Claim) -> set[str]:
        """Return which of its originals are in the claim. Other files there are not touched."""
        return self.claimed(claim.job).intersection(claim.originals)

    def present(self, claim: Claim) -> list[str]:
        """Return the names of its originals that are in the claim, the prompt last."""
        return sorted(self._originals(claim), key=lambda name: (name == claim.prompt, name))

    def give_back(self, claim: Claim) -> bool:
        """Put the originals back into the inbox, the prompt last; their folder is made again if it is missing.

        Returns:
            False if a newer file has one of the names; the job then stays claimed.
        """
        folder = self._folders.inbox_folder(claim)
        names = self.present(claim)
        if not names:
            return True
        self._folders.require_mounts()  # or there is no inbox
        self._disk.make_inner(self._folders.inbox, claim.folder)
        with self._folders.reached(folder):
            return self._give_back(claim, folder, names)

    def _give_back(self, claim: Claim, folder: str, names: list[str]) -> bool:
        # A sync tool may have delivered some of them again meanwhile: then those stay.
        again = {
            name for name in names if self._disk.same(self._folders.original(claim, name), os.path.join(folder, name))
        }
        if any(self._folders.tops.exists(os.path.join(folder, name)) for name in names if name not in again):
            return False
        for name in names:
            if name in again:
                self._disk.unlink(self._folders.original(claim, name))
            elif not self._return(self._folders.original(claim, name), os.path.join(folder, name)):
                return False
        self._disk.sync_folder(folder)
        return True

    def _return(self, source: str, target: str) -> bool:
        try:
            with disk_errors(target, "give the file back to the inbox"):
                self._disk.rename(source, target)
        except SpoolError as error:
            if isinstance(error.__cause__, FileExistsError | FileNotFoundError):
                return False
            raise
        return True

    def discard(self, claim: Claim) -> None:
        """Remove the originals of a redelivery."""
        for name in self.present(claim):
            self._disk.unlink(self._folders.original(claim, name))


def _is_note(name: str) -> bool:
    return name.removesuffix(".tmp") == CLAIM_NOTE


@functools.lru_cache(maxsize=256)
def _name(user: int) -> str:
    """Return the name of a user, else the number. To look it up takes long with a directory service."""
    try:
        return printable(pwd.getpwuid(user).pw_name, 100)
    except (KeyError, OSError):  # of another machine, or the service does not respond
        return str(user)
