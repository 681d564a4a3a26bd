"""Our folders as open descriptors, so that no other folder can be put in the place of one while it is used.

Other people may write the inbox, and sometimes the outbox: they may rename a folder there and put a link under its
name. A path that is resolved again would follow it. So each *top* (inbox, outbox, errors, archive, state, claims) is
opened once. What is below a top is reached from its descriptor, part by part; a link or a file in the place of a
folder is an error. Paths stay the names by which the rest of the code refers to files.

A path below no top is used as it is: it was given by the administrator or by who runs a command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To reach what is in a folder, which may be one that we may enter and not list."""


class NotAFolderError(OSError):
    """A link or a file is where a folder should be.

    Attributes:
        strerror: What it is, as text.
    """


class Descriptor:
    """An open folder. It is closed when nothing refers to it any more, so never while another thread uses it."""

    __slots__ = ("_identity", "_number")

    def __init__(self, number: int) -> None:
        self._number = number
        self._identity: tuple[int, int] | None = None

    def fileno(self) -> int:
        """Return the file descriptor; it is valid for as long as the caller refers to this object."""
        return self._number

    def status(self) -> os.stat_result:
        """Return its ``fstat``."""
        return os.fstat(self._number)

    def is_same(self, status: os.stat_result) -> bool:
        """Return whether this is the folder that a path was found to point to."""
        return self.is_same_as((status.st_dev, status.st_ino))

    def is_same_as(self, identity: tuple[int, int]) -> bool:
        """Return whether this is the folder of a device and an inode."""
        if self._identity is None:
            mine = self.status()
            self._identity = mine.st_dev, mine.st_ino
        return identity == self._identity

    def entries(self) -> os._ScandirIterator[str]:
        """Return what is in it, by a descriptor of its own; to be used in a ``with`` statement."""
        return os.scandir(self._number)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._number)


class Place:
    """Where a name is looked up: in an open folder.

    Attributes:
        name: The name, or a path below the folder if only we can write there; the whole path without a folder.
    """

    __slots__ = ("_folder", "name")

    def __init__(self, folder: Descriptor | None, name: str) -> None:
        self._folder = folder
        self.name = name

    @property
    def dir_fd(self) -> int | None:
        """The folder's descriptor, valid as long as this place is; None if ``name`` is a whole path."""
        return None if self._folder is None else self._folder.fileno()

    def lstat(self) -> os.stat_result:
        """Return what is there; a link is not followed."""
        return os.stat(self.name, dir_fd=self.dir_fd, follow_symlinks=False)

    def exists(self) -> bool:
        """Return whether anything has this name, also if it is a broken link."""
        try:
            self.lstat()
        except OSError:
            return False
        return True


class _Top:
    """A folder that was opened once.

    Attributes:
        path: By which name it is known.
        is_private: Whether only we can change what is in it, so that its parts need not be checked one by one.
    """

    __slots__ = ("_descriptor", "is_private", "path", "prefix")

    def __init__(self, path: str, descriptor: Descriptor | None, *, is_private: bool = False) -> None:
        self.path = path
        self.prefix = path.rstrip("/") + "/"
        self._descriptor = descriptor
        self.is_private = is_private

    @property
    def descriptor(self) -> Descriptor:
        """The open folder.

        Raises:
            NotAFolderError: It is closed.
        """
        if self._descriptor is None:
            raise NotAFolderError(errno.EPERM, "another folder has the name of the daemon's folder", self.path)
        return self._descriptor


class Tops:
    """The folders that were opened, and the way to what is below them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._tops: list[_Top] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    @classmethod
    def of(cls, *paths: str) -> Tops:
        """Return those of some folders that are there and can be opened."""
        made = cls()
        for path in paths:
            with contextlib.suppress(OSError):
                made.open(path)
        return made

    # Opening

    def open(self, path: str, *, is_private: bool = False) -> None:
        """Open a folder that is there, and know it by its path from now on.

        Its path is the administrator's: links in it are followed.

        Args:
            path: Absolute path.
            is_private: Whether no one else can change what is in it.

        Raises:
            OSError: It cannot be opened.
        """
        real = os.path.realpath(path)
        try:
            number = os.open(real, _READ)
        except PermissionError:  # one may be allowed to put files there, and not to list it
            number = os.open(real, _PASS)
        self.know(path, Descriptor(number), is_private=is_private)

    def know(self, path: str, descriptor: Descriptor | None, *, is_private: bool = False) -> None:
        """Know an open folder by a path from now on, in the place of one that was known by it.

        Args:
            path: The path.
            descriptor: The folder; without one the path is closed: nothing there is used.
            is_private: Whether no one else can change what is in it.
        """
        with self._lock:
            others = [top for top in self._tops if top.path != path]
            others.append(_Top(path, descriptor, is_private=is_private))
            # One assignment: another thread sees the old list or the new one. The longest path comes first.
            self._tops = sorted(others, key=lambda top: -len(top.path))

    def drop(self, path: str) -> None:
        """Know no folder by a path any more: it is reached like anything else below the top above it."""
        with self._lock:
            self._tops = [top for top in self._tops if top.path != path]

    def opened(self, path: str) -> Descriptor | None:
        """Return the folder that is known by a path, or None."""
        top = self._exact(path)
        with contextlib.suppress(NotAFolderError):
            return top.descriptor if top else None
        return None

    def is_below(self, path: str) -> bool:
        """Return whether a path is that of an open folder, or below one."""
        return self._exact(path) is not None or self._covering(path) is not None

    def is_replaced(self, path: str) -> bool:
        """Return whether another folder has the path of a top now, or none has; a folder that was not opened is none.

        Raises:
            OSError: The path cannot be read.
        """
        descriptor = self.opened(path)
        return descriptor is None or not descriptor.is_same(os.stat(path))

    @contextlib.contextmanager
    def held(self, path: str, inode: int = 0) -> Iterator[None]:
        """Reach a folder by the same descriptor during a block, in this thread, whatever happens to its name.

        Args:
            path: A folder; one that is not there, or a top, is not held.
            inode: Its number if it must be this one; 0 for any.

        Raises:
            NotAFolderError: It, or one above it, is a link or a file.
            FileNotFoundError: ``inode`` is given and another folder, or none, has the name.
        """
        if self._covering(path) is None:  # it is a top itself
            yield
            return
        try:
            descriptor = self._open_to_hold(path)
        except FileNotFoundError:
            if inode:
                raise
            yield
            return
        if inode and descriptor.status().st_ino != inode:
            raise FileNotFoundError(errno.ENOENT, "another folder has this name now", path)
        mine = self._held()
        mine.insert(0, _Top(path, descriptor))
        try:
            yield
        finally:
            del mine[0]

    def _open_to_hold(self, path: str) -> Descriptor:
        try:
            return self.listable(path)
        except PermissionError:  # one may be allowed to use what is in it, and not to list it
            return self.folder(path)

    def _held(self) -> list[_Top]:
        if not hasattr(self._local, "tops"):
            self._local.tops = []
        return self._local.tops  # type: ignore[no-any-return]

    # Finding

    def _covering(self, path: str) -> _Top | None:
        for tops in (self._held(), self._tops):
            for top in tops:
                if path.startswith(top.prefix):
                    return top
        return None

    def _exact(self, path: str) -> _Top | None:
        for tops in (self._held(), self._tops):
            for top in tops:
                if path == top.path:
                    return top
        return None

    def at(self, path: str) -> Place:
        """Return where the last name of a path is looked up.

        Raises:
            NotAFolderError: A link or a file is in the place of a folder in it.
            OSError: A folder in it is not there, or cannot be entered.
        """
        top = self._covering(path)
        if top is None:
            return Place(None, path)
        inner = path[len(top.prefix) :]
        if top.is_private or "/" not in inner:
            return Place(top.descriptor, inner)
        *parts, name = inner.split("/")
        return Place(_walked(top, parts), name)

    def folder(self, path: str) -> Descriptor:
        """Return an open folder, to reach what is in it.

        Raises:
            NotAFolderError: A link or a file is in its place, or in that of one above it.
            OSError: It is not there, or cannot be opened.
        """
        if (top := self._exact(path)) is not None:
            return top.descriptor
        return _entered(self.at(path), _PASS, path)

    def listable(self, path: str) -> Descriptor:
        """Open a folder again, to list it: two that list it by one descriptor would share the names between them.

        Raises:
            NotAFolderError: A link or a file is in its place, or in that of one above it.
            OSError: It is not there, or cannot be opened.
        """
        top = self._exact(path)
        return _entered(Place(top.descriptor, ".") if top else self.at(path), _READ, path)

    def entered(self, path: str) -> Descriptor:
        """Open the folder that has a path now, to list it, also if another one was known by this path.

        Raises:
            NotAFolderError: A link or a file is in its place.
            OSError: It is not there, or cannot be opened.
        """
        return _entered(self.at(path), _READ, path)

    def look_again(self, path: str) -> None:
        """Let the kernel ask the server which folders are above a path, after one of them was ``ESTALE``.

        A client of NFS remembers names for a minute, also that of a folder that was removed on another host. To open a
        folder for listing makes it ask.
        """
        top = self._covering(path)
        parts = path[len(top.prefix) :].split("/") if top else []
        with contextlib.suppress(OSError):
            for count in range(len(parts)):
                self.listable("/".join([top.path.rstrip("/"), *parts[:count]]))  # type: ignore[union-attr]

    def lstat(self, path: str) -> os.stat_result:
        """Return what has a path; a link is not followed.

        Raises:
            OSError: Nothing, or it cannot be reached.
        """
        return self.at(path).lstat()

    def exists(self, path: str) -> bool:
        """Return whether anything has a path."""
        try:
            return self.at(path).exists()
        except OSError:
            return False

    def is_folder(self, path: str) -> bool:
        """Return whether a folder has a path, and no link."""
        try:
            return self.opened(path) is not None or stat.S_ISDIR(self.lstat(path).st_mode)
        except OSError:
            return False

    def is_link(self, path: str) -> bool:
        """Return whether a path is that of a symbolic link."""
        try:
            return _is_link(self.at(path))
        except OSError:
            return False

    def open_file(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open a file; a link is not followed.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            OSError: As ``os.open``.
        """
        place = self.at(path)
        return os.open(place.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=place.dir_fd)

    def has_name(self, file: int, path: str) -> bool:
        """Return whether an open file has its name: it, or its folder, may have been removed or replaced.

        Args:
            file: Its descriptor.
            path: Its name.
        """
        try:
            return os.path.samestat(os.fstat(file), self.lstat(path))
        except OSError:
            return False

    def names(self, path: str, *, folders: bool | None = None) -> list[str]:
        """Return the names in a folder.

        Args:
            path: The folder.
            folders: True for those of folders only, False for all others, None for all; a link is no folder.

        Raises:
            OSError: It cannot be listed.
        """
        folder = self.listable(path)
        if folders is None:
            return os.listdir(folder.fileno())
        with folder.entries() as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) == folders]


def has_file(folder: str, name: str, file: IO[bytes]) -> bool:
    """Return whether the folder that has a path now, be it another one than before, has an open file by a name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(os.path.join(folder, name)))
    except OSError:
        return False


def is_private(status: os.stat_result, folder: os.stat_result) -> bool:
    """Return whether a file is a hard link that may show what the user who created the link could not read.

    A hard link does not show who created it: it has the owner, the group and the mode of the file.

    Args:
        status: The file's.
        folder: The folder's. If only its group may write it, what this group may read is no secret there.
    """
    if status.st_nlink < 2 or status.st_mode & stat.S_IROTH:  # noqa: PLR2004  another name
        return False
    is_for_group = status.st_mode & stat.S_IRGRP and status.st_gid == folder.st_gid
    return not is_for_group or bool(folder.st_mode & stat.S_IWOTH)


def _walked(top: _Top, parts: list[str]) -> Descriptor:
    """Return the folder that is reached from a top by some names."""
    folder, path = top.descriptor, top.path
    for part in parts:
        if part in {"", ".", ".."}:
            raise NotAFolderError(
                errno.EINVAL, "is not a path below the daemon's folders", os.path.join(top.path, *parts)
            )
        path = os.path.join(path, part)
        folder = _entered(Place(folder, part), _PASS, path)
    return folder


def _entered(place: Place, flags: int, path: str) -> Descriptor:
    try:
        return Descriptor(os.open(place.name, flags, dir_fd=place.dir_fd))
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise OSError(error.errno, error.strerror, path) from None  # the whole path, not the last name
        what = "a symbolic link" if _is_link(place) else "a file"
        raise NotAFolderError(errno.ENOTDIR, f"{what} is where a folder should be", path) from None


def _is_link(place: Place) -> bool:
    try:
        return stat.S_ISLNK(place.lstat().st_mode)
    except OSError:
        return False
