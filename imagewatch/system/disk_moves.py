"""Moves files, also to another file system, so that a move that a crash interrupted is finished by doing it again."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
from typing import IO, TYPE_CHECKING

from imagewatch.system.disk_calls import DiskCalls
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import is_private
from imagewatch.system.permissions import copy_permissions
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

_COPY_BYTES = 1 << 20


def nothing() -> None:
    """Check nothing."""


class Moves(DiskCalls):
    """Moves and comparisons of files."""

    def replace_leftover(self, path: str, mode: int = 0o600) -> IO[bytes]:
        """Create a file as ``create`` does, in the place of a leftover of an earlier crash."""
        try:
            return self.create(path, mode)
        except SpoolError as error:
            if error.code != errno.EEXIST:
                raise
        self.unlink(path)
        return self.create(path, mode)

    def carry(
        self,
        source: str,
        target: str,
        temporary: str,
        finish: Callable[[int], None] | None = None,
        *,
        mtime_ns: int | None = None,
        is_durable: bool = False,
        check: Callable[[], object] = nothing,
    ) -> None:
        """Move a file to a name that is free, also to another file system. The folders are not synced.

        After a crash the same call finishes what was begun. A missing source is done, also if a reader has the target.

        Args:
            source: What to move.
            target: Its new name.
            temporary: A name of our own in the target's folder, for a copy.
            finish: Called with the descriptor before the name appears, to set mode and group.
            mtime_ns: The mtime that it gets, 0 for the present. A file of which we may not set it is copied.
            is_durable: Whether its content is durable already, so that it is synced only if mode or group change.
            check: Called right before the name appears, when a copy has its temporary name; it may raise.

        Raises:
            FileExistsError: The target is something else.
        """
        if (file := self._readable(source)) is None:
            self._carry_special(source, target)
            return
        with file:
            is_synced = not self._finish(file, target, finish) and is_durable
            is_movable = mtime_ns is None or self._is_private(file, source) or self.touch(source, mtime_ns)
            if not is_synced:
                self.sync(file, source)
            check()
            if not (is_movable and self._moved(file, source, target)):
                self._require_public(file, source)
                self._copy(file, target, temporary, finish, mtime_ns or 0, check)
                self.unlink(source)

    @staticmethod
    def _finish(file: IO[bytes], target: str, finish: Callable[[int], None] | None) -> bool:
        """Set mode and group; return whether one of them changed."""
        before = os.fstat(file.fileno())
        with disk_errors(target, "set mode or group"):
            if finish:
                finish(file.fileno())
        after = os.fstat(file.fileno())
        return (after.st_mode, after.st_gid) != (before.st_mode, before.st_gid)

    def _is_private(self, file: IO[bytes], path: str) -> bool:
        with disk_errors(path, "check the folder"):
            return is_private(os.fstat(file.fileno()), self.tops.folder(os.path.dirname(path)).status())

    def _require_public(self, file: IO[bytes], path: str) -> None:
        """Refuse to copy a hard link to a private file: the copy has one name, and passes for a file like any other."""
        if self._is_private(file, path):
            with disk_errors(path, "copy a hard link to a private file"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def _moved(self, file: IO[bytes], source: str, target: str) -> bool:
        """Rename an open file; return whether that can be done, which it cannot between two file systems."""
        try:
            self.rename(source, target)
        except FileExistsError:
            if not self._same(file, target):
                raise
            self.unlink(source)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            with disk_errors(target, "move"):
                raise
        return True

    def _carry_special(self, source: str, target: str) -> None:
        """Move a link, a FIFO, what we may not read, or nothing at all.

        Across file systems a link is made again, a FIFO is dropped, and what we may not read is a failure.
        """
        try:
            self.rename(source, target)
        except FileNotFoundError:
            return
        except FileExistsError:
            if self._link(source) is None or self._link(source) != self._link(target):
                raise
        except OSError as error:
            if error.errno != errno.EXDEV or self._is_regular(source):
                with disk_errors(target, "move"):
                    raise
            text = self._link(source)
            if text is not None and text != self._link(target):
                self.symlink(text, target)
            self.sync_folder(os.path.dirname(target))
        else:
            return
        self.unlink(source)

    def _copy(
        self,
        file: IO[bytes],
        target: str,
        temporary: str,
        finish: Callable[[int], None] | None,
        mtime_ns: int,
        check: Callable[[], object],
    ) -> None:
        try:
            with closing(self.replace_leftover(temporary), target) as copy:
                with disk_errors(target, "write"):
                    file.seek(0)
                    shutil.copyfileobj(file, copy, _COPY_BYTES)
                    if copy.tell() != os.fstat(file.fileno()).st_size:
                        raise OSError(errno.EIO, "the copy is shorter than its source")
                    (finish or functools.partial(copy_permissions, file.fileno()))(copy.fileno())
                    if mtime_ns:
                        copy.flush()
                        os.utime(copy.fileno(), ns=(mtime_ns, mtime_ns))
                self.sync(copy, target)
            check()
            self._name(file, temporary, target)
        finally:
            self.unlink(temporary)
        self.sync_folder(os.path.dirname(target))

    def _name(self, file: IO[bytes], temporary: str, target: str) -> None:
        """Give a file its final name, unless the very same is there already."""
        try:
            self.rename(temporary, target)
        except FileExistsError:
            if not self._same(file, target):
                raise
            self.unlink(temporary)
        except OSError:
            with disk_errors(target, "rename"):
                raise

    def same(self, path: str, other: str) -> bool:
        """Return whether two files have the same mtime and bytes; the other one is then durable."""
        if not self.tops.exists(other):
            return False
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(file) for file in map(self._readable, (path, other)) if file is not None]
            if len(files) < 2:  # noqa: PLR2004  both
                return False
            mine, theirs = files
            times = {os.fstat(file.fileno()).st_mtime_ns for file in files}
            if len(times) > 1 or not self._same(mine, other):
                return False
            self.sync(theirs, other)
        return True

    def has_content(self, path: str, content: bytes) -> bool:
        """Return whether a path is a plain file of exactly these bytes. A pipe that was put there is not waited for."""
        try:
            with self._open(path) as file:
                return os.fstat(file.fileno()).st_size == len(content) and file.read() == content
        except OSError:
            return False

    def _open(self, path: str) -> IO[bytes]:
        return open_file(path, self.tops, allows_private=True)

    def _is_regular(self, path: str) -> bool:
        try:
            return stat.S_ISREG(self.tops.lstat(path).st_mode)
        except FileNotFoundError:
            return False

    def _readable(self, path: str) -> IO[bytes] | None:
        """Open a regular file; None for anything else, and for what was dropped that we may not read."""
        try:
            with disk_errors(path, "read"):
                return self._open(path) if self._is_regular(path) else None
        except SpoolError as error:
            if error.code == errno.EACCES:
                return None
            raise

    def _same(self, file: IO[bytes], target: str) -> bool:
        """Return whether a file and a path hold the same bytes."""
        try:
            other = self._open(target)
        except OSError:
            return False
        with other:
            mine, theirs = os.fstat(file.fileno()), os.fstat(other.fileno())
            if mine.st_size != theirs.st_size:
                return False
            file.seek(0)
            while chunk := file.read(_COPY_BYTES):
                if chunk != other.read(len(chunk)):
                    return False
        return True

    def _link(self, path: str) -> str | None:
        """Return the text of a symbolic link; None if there is none."""
        try:
            place = self.tops.at(path)
            return os.readlink(place.name, dir_fd=place.dir_fd)
        except OSError:
            return None
