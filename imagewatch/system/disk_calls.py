"""The system calls that change a disk: each method makes one kind of call. See also ``kernel``.

Paths are absolute and are used relative to an open folder (``folders``). Tests give the daemon a disk that loses power
between any two of these calls.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
from typing import IO, TYPE_CHECKING, TypeVar

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.folders import Descriptor, Place, Tops
from imagewatch.system.kernel import rename_new, reserve
from imagewatch.system.shared import Shared

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class _Whole(io.FileIO):
    """A file without a buffer that takes all it is given.

    A buffer would ask the kernel nine times where it is; each question gives the interpreter away, and queues for it.
    """

    def write(self, content: bytes | memoryview) -> int:  # type: ignore[override]  # the bytes we have, and never None
        with memoryview(content) as rest:
            done = 0
            while done < len(rest):
                done += super().write(rest[done:])
            return done


class DiskCalls:
    """The system calls that change the local disk. All methods raise ``SpoolError``.

    ``FileExistsError`` passes where "the name exists" is an answer and not a failure.

    Attributes:
        tops: The folders that were opened: what is below one is reached from there.
    """

    @functools.cached_property
    def tops(self) -> Tops:
        """The folders that were opened."""
        return Tops()

    def make_folder(self, path: str, mode: int = 0o700) -> None:
        """Create a folder, unless it exists. Outside our open folders the folders above it are created, too."""
        with disk_errors(path, "create the folder"):
            place = self.tops.at(path)
            try:
                os.mkdir(place.name, mode, dir_fd=place.dir_fd)
            except OSError:  # it is there, or the one above it is not
                if place.dir_fd is None:
                    os.makedirs(path, mode=mode, exist_ok=True)
                elif not self.tops.is_folder(path):
                    self.tops.folder(path)  # whose error names what is in its place
                    raise

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        """Create a file that must not exist, for writing and reading back; links are not followed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with disk_errors(path, "create the file"):
            return _Whole(self._again_if_stale(lambda name: self.tops.open_file(name, flags, mode), path), "r+")

    def append(self, path: str) -> IO[bytes]:
        """Open an existing file to write on at its end; links are not followed."""
        with disk_errors(path, "open the file"):
            file = _Whole(self.tops.open_file(path, os.O_RDWR), "r+")
            file.seek(0, os.SEEK_END)
            return file

    def reserve(self, file: IO[bytes], size: int, path: str) -> None:
        """Reserve room for what is going to be written to a file, where its file system can; its length stays.

        Args:
            file: The file.
            size: Bytes from its beginning.
            path: Its name.
        """
        with disk_errors(path, f"reserve {size:,} bytes"):
            reserve(file.fileno(), size)

    def unreserve(self, file: IO[bytes]) -> None:
        """Give back what was reserved of a file and is not used: all beyond its end."""
        with contextlib.suppress(OSError):  # it is given back when the file is removed, at the latest
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size)

    def symlink(self, text: str, path: str) -> None:
        """Make a symbolic link.

        Raises:
            FileExistsError: The name exists.
        """
        try:
            place = self.tops.at(path)
            os.symlink(text, place.name, dir_fd=place.dir_fd)
        except FileExistsError:
            raise
        except OSError:
            with disk_errors(path, "make the link"):
                raise

    def sync(self, file: IO[bytes], path: str) -> None:
        """Flush a file and its data to the disk itself."""
        with disk_errors(path, "write to disk"):
            file.flush()
            os.fsync(file.fileno())

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable; threads that ask for it while it is being done share the next time."""
        self._syncs.share(path, functools.partial(self._sync_folder, path))

    @functools.cached_property
    def _syncs(self) -> Shared:
        return Shared()

    def _sync_folder(self, path: str) -> None:
        with disk_errors(path, "write the folder to disk"):
            folder = self.tops.opened(path)
            try:
                os.fsync(folder or self._opened(path))
            except OSError as error:
                if folder is None or error.errno != errno.EBADF:  # one that was only opened to reach what is in it
                    raise
                os.fsync(self._opened(path))

    def _opened(self, path: str) -> Descriptor:
        if self.tops.is_below(path):
            return self.tops.listable(path)
        return Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))  # a link of the administrator's

    def replace(self, source: str, target: str) -> None:
        """Rename within one file system; an existing target is replaced."""
        with disk_errors(target, "rename"):
            here, there = self.tops.at(source), self.tops.at(target)
            os.replace(here.name, there.name, src_dir_fd=here.dir_fd, dst_dir_fd=there.dir_fd)

    def rename(self, source: str, target: str) -> None:
        """Rename within one file system, never over an existing name.

        Raises:
            FileExistsError: The name exists.
            OSError: ``EXDEV`` or ``ENOENT``, which are answers to the caller's question.
        """
        try:
            self._rename(source, target)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self.tops.look_again(source)
            self.tops.look_again(target)
            self._rename(source, target, is_stale=False)

    def _rename(self, source: str, target: str, *, is_stale: bool = True) -> None:
        here, there = self.tops.at(source), self.tops.at(target)
        file = _status(here)
        try:
            rename_new(here, there)
        except OSError as error:
            # On NFS a repeated request finds its own result and reports an error; the rename is done.
            if error.errno in {errno.EEXIST, errno.ENOENT} and _has_arrived(file, here, there):
                return
            if error.errno in {errno.EEXIST, errno.EXDEV, errno.ENOENT} or (is_stale and error.errno == errno.ESTALE):
                raise
            with disk_errors(target, "rename"):
                raise

    def unlink(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with disk_errors(path, "remove"), contextlib.suppress(FileNotFoundError):
            self._again_if_stale(self._unlink, path)

    def _unlink(self, path: str) -> None:
        place = self.tops.at(path)
        os.unlink(place.name, dir_fd=place.dir_fd)

    def _again_if_stale(self, act: Callable[[str], T], path: str) -> T:
        """Do it once more if a folder above was removed on another host: a client of NFS remembers its name."""
        try:
            return act(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self.tops.look_again(path)
        return act(path)

    def remove_folder(self, path: str) -> bool:
        """Remove an empty folder; return whether it was removed. One with other users' files in it stays."""
        with disk_errors(path, "remove the folder"):
            try:
                self._again_if_stale(self._remove_folder, path)
            except FileNotFoundError:
                return True
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                    return False
                raise
        return True

    def _remove_folder(self, path: str) -> None:
        place = self.tops.at(path)
        os.rmdir(place.name, dir_fd=place.dir_fd)

    def set_mode(self, path: str, mode: int) -> None:
        """Set the mode of a folder; never that of the target of a link."""
        with disk_errors(path, "set the mode"):
            folder = self._opened(path)
            os.fchmod(folder.fileno(), mode)

    def touch(self, path: str, mtime_ns: int = 0) -> bool:
        """Set a file's mtime, 0 for the present; return whether we may. Links are not followed; none there is fine.

        A file with other names is left alone: they are its sender's, and so is the time they show.
        """
        with disk_errors(path, "set its time"), contextlib.suppress(FileNotFoundError):
            place = self.tops.at(path)
            status = place.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                return False
            try:
                times = {"ns": (mtime_ns, mtime_ns)} if mtime_ns else {}
                os.utime(place.name, dir_fd=place.dir_fd, follow_symlinks=False, **times)
            except PermissionError:
                return False
        return True


def _status(place: Place) -> os.stat_result | None:
    try:
        return place.lstat()
    except OSError:
        return None


def _has_arrived(file: os.stat_result | None, source: Place, target: Place) -> bool:
    """Return whether a file has its new name, though the call that renamed it failed; then it has only that one."""
    found = _status(target)
    if file is None or found is None or not os.path.samestat(file, found):
        return False
    left = _status(source)
    if left is not None and os.path.samestat(left, found):
        os.unlink(source.name, dir_fd=source.dir_fd)
    return True
