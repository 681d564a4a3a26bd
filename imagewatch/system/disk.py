"""The only module that writes, renames, links, removes and fsyncs.

Every change to a disk goes through one of the methods of ``Disk``, each of which makes one kind of system call,
relative to an open folder (``folders``); tests give the daemon a ``Disk`` that loses power between any two of them.
``OSError`` becomes ``SpoolError`` here and nowhere else.

The durable write is always the same sequence: a temporary file in the folder of its final name, write, length
check, fsync, close, rename, fsync of the folder. An fsync that failed is never tried again on the same file:
the kernel may have dropped the data and report success the second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import io
import os
import secrets
import shutil
import stat
import threading
from typing import IO, TYPE_CHECKING, Any

from imagewatch.system.errors import MORE_FILES, AlreadyRunning, SpoolError
from imagewatch.system.folders import Descriptor, NotAFolderError, Place, Tops, is_private
from imagewatch.system.permissions import copy_permissions
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_AT_FDCWD = -100
_MODE_OF_NOTES = 0o600
_RENAME_NOREPLACE = 1
_FALLOC_FL_KEEP_SIZE = 1
FULL = {errno.ENOSPC, errno.EDQUOT}
_COPY_BYTES = 1 << 20
_LOCK_TRIES = 4
_LOCK_SECONDS = 0.1


class ours:  # noqa: N801  it reads like a statement
    """Turn an ``OSError`` about our own folders into a ``SpoolError`` with the next action.

    A class and no generator: a job enters it two hundred times.

    Args:
        path: What the block is about.
        doing: What it does, after "cannot".
    """

    __slots__ = ("_doing", "_path")

    def __init__(self, path: str, doing: str) -> None:
        self._path = path
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            code = error.errno or 0
            if isinstance(error, NotAFolderError):
                message = f"{printable(str(error.filename))}: {error.strerror}"
                raise SpoolError(message, path=self._path, code=code, hint=_RESTORE) from error
            message = f"{printable(self._path)}: cannot {self._doing}: {os.strerror(code) if code else error}"
            raise SpoolError(message, path=self._path, code=code, hint=_hint(code)) from error


@contextlib.contextmanager
def closing(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """Close a file of ours at the end of a block.

    ``close`` writes what is buffered: after a failure it would fail once more, and hide what happened.
    """
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    with ours(path, "write"):
        file.close()


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


_RESTORE = "put back the folder that was there"


def _hint(code: int) -> str:
    if code in FULL:
        return "make room; the work goes on by itself"
    if code in {errno.EMFILE, errno.ENFILE}:
        return MORE_FILES
    if code in {errno.EACCES, errno.EPERM}:
        return "let the daemon's user write there"
    if code == errno.EROFS:
        return "mount it for writing; of a service, name it in BindPaths= of the unit"
    if code in {errno.ENOENT, errno.ENOTDIR}:
        return "restore the folder, or check that it is mounted"
    return "look at the disk and the system log"


class Disk:
    """Our disk. All paths are absolute; all methods raise ``SpoolError``.

    ``FileExistsError`` passes where "the name is taken" is an answer and not a failure.

    Attributes:
        tops: The folders that were opened: what lies below one is reached from there.
    """

    @functools.cached_property
    def tops(self) -> Tops:
        """The folders that were opened."""
        return Tops()

    def make_folder(self, path: str, mode: int = 0o700) -> None:
        """Create a folder; an existing one is fine. Outside our open folders also the folders above it are made."""
        with ours(path, "create the folder"):
            place = self.tops.at(path)
            try:
                os.mkdir(place.name, mode, dir_fd=place.dir_fd)
            except OSError:  # it is there, or the one above it is not
                if place.dir_fd is None:
                    os.makedirs(path, mode=mode, exist_ok=True)
                elif not self.tops.is_folder(path):
                    self.tops.folder(path)  # which says what is in its place
                    raise

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        """Create a file that must not exist, for writing and reading back; links are not followed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with ours(path, "create the file"):
            return _Whole(self.tops.open_file(path, flags, mode), "r+")

    def append(self, path: str) -> IO[bytes]:
        """Open a file of ours that is there already, to write on at its end; links are not followed."""
        with ours(path, "open the file"):
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
        function = _fallocate()
        # Not posix_fallocate: where the file system cannot, that writes zeros into the file, all of them.
        while function is not None and function(file.fileno(), _FALLOC_FL_KEEP_SIZE, 0, size):
            code = ctypes.get_errno()
            if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
                return
            if code != errno.EINTR:
                with ours(path, f"reserve {size:,} bytes"):
                    raise OSError(code, os.strerror(code), path)

    def unreserve(self, file: IO[bytes]) -> None:
        """Give back what was reserved of a file and is not used: all beyond its end."""
        with contextlib.suppress(OSError):  # it is given back when the file is removed, at the latest
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size)

    def symlink(self, text: str, path: str) -> None:
        """Make a symbolic link.

        Raises:
            FileExistsError: The name is taken.
        """
        try:
            place = self.tops.at(path)
            os.symlink(text, place.name, dir_fd=place.dir_fd)
        except FileExistsError:
            raise
        except OSError:
            with ours(path, "make the link"):
                raise

    def sync(self, file: IO[bytes], path: str) -> None:
        """Flush a file and its data to the disk itself."""
        with ours(path, "write to disk"):
            file.flush()
            os.fsync(file.fileno())

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        with ours(path, "write the folder to disk"):
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
        with ours(target, "rename"):
            here, there = self.tops.at(source), self.tops.at(target)
            os.replace(here.name, there.name, src_dir_fd=here.dir_fd, dst_dir_fd=there.dir_fd)

    def rename(self, source: str, target: str) -> None:
        """Rename within one file system, never over an existing name.

        Raises:
            FileExistsError: The name is taken.
            OSError: ``EXDEV`` or ``ENOENT``, which are answers to the caller's question.
        """
        here, there = self.tops.at(source), self.tops.at(target)
        file = _status(here)
        try:
            _rename_new(here, there)
        except OSError as error:
            # On NFS a request that was repeated finds what it did itself: then it says so, and it is done.
            if error.errno in {errno.EEXIST, errno.ENOENT} and _has_arrived(file, here, there):
                return
            if error.errno in {errno.EEXIST, errno.EXDEV, errno.ENOENT}:
                raise
            with ours(target, "rename"):
                raise

    def unlink(self, path: str) -> None:
        """Remove a file; one that is gone is fine."""
        with ours(path, "remove"), contextlib.suppress(FileNotFoundError):
            place = self.tops.at(path)
            os.unlink(place.name, dir_fd=place.dir_fd)

    def remove_folder(self, path: str) -> bool:
        """Remove an empty folder; tell whether it is gone. One with strangers' files in it stays."""
        with ours(path, "remove the folder"):
            try:
                place = self.tops.at(path)
                os.rmdir(place.name, dir_fd=place.dir_fd)
            except FileNotFoundError:
                return True
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                    return False
                raise
        return True

    def set_mode(self, path: str, mode: int) -> None:
        """Set the mode of a folder; never that of what a link leads to."""
        with ours(path, "set the mode"):
            folder = self._opened(path)
            os.fchmod(folder.fileno(), mode)

    def touch(self, path: str, mtime_ns: int = 0) -> bool:
        """Set a file's mtime, 0 for the present; tell whether we may. Links are not followed; none there is fine.

        A file with other names is left alone: they are its sender's, and so is the time they show.
        """
        with ours(path, "set its time"), contextlib.suppress(FileNotFoundError):
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

    # The rest is made of the methods above.

    def create_anew(self, path: str, mode: int = 0o600) -> IO[bytes]:
        """Create a file as ``create`` does, in the place of a leftover of an earlier crash."""
        try:
            return self.create(path, mode)
        except SpoolError as error:
            if error.code != errno.EEXIST:
                raise
        self.unlink(path)
        return self.create(path, mode)

    def make_inner(self, top: str, folder: str, mode: int | None = None) -> None:
        """Make a folder below one of ours, durably, if it is not there.

        Args:
            top: A folder that is there.
            folder: Path below it, with ``/``.
            mode: Permission bits of a folder that is made; None leaves them to the umask.
        """
        for part in folder.split("/") if folder else ():
            inner = os.path.join(top, part)
            if not self.tops.is_folder(inner):
                if mode is None or self.tops.exists(inner):
                    self.make_folder(inner, mode=0o777)
                else:
                    self.make_with_mode(inner, mode)
                self.sync_folder(top)
            top = inner

    def make_with_mode(self, path: str, mode: int) -> None:
        """Make a folder under a name that cannot be guessed, and give it its own name when it has its mode.

        Else the mode might be set on another folder that was put in its place.
        """
        hidden = os.path.join(os.path.dirname(path), f".iw-new.{secrets.token_hex(8)}")
        self.make_folder(hidden)
        try:
            self.set_mode(hidden, mode)
            with ours(path, "rename"):
                self.rename(hidden, path)
        finally:
            self.remove_folder(hidden)

    @contextlib.contextmanager
    def writing(self, path: str, temporary: str | None = None, mode: int = 0o600) -> Iterator[IO[bytes]]:
        """Write a file durably under a name that may exist already (only ever by ourselves).

        The name appears when the block ends without an exception, and then whole. The folder is not synced.

        Args:
            path: Final name.
            temporary: Name to write under; a leftover of an earlier crash is replaced.
            mode: Permission bits.
        """
        temporary = temporary or path + ".tmp"
        try:
            with closing(self.create_anew(temporary, mode), path) as file:
                with ours(path, "write"):
                    yield file
                self.sync(file, path)
        except BaseException:
            with contextlib.suppress(SpoolError):
                self.unlink(temporary)
            raise
        self.replace(temporary, path)

    def write(self, path: str, content: bytes) -> None:
        """Write a whole file durably, name and all."""
        with self.writing(path) as file:
            file.write(content)
        self.sync_folder(os.path.dirname(path))

    def jot(self, path: str, content: bytes) -> None:
        """Replace a small file that nobody needs after a crash. Whole for any reader, but not synced."""
        temporary = path + ".tmp"
        with ours(path, "write"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(self.tops.open_file(temporary, flags, _MODE_OF_NOTES), "wb") as file:
                file.write(content)
            here, there = self.tops.at(temporary), self.tops.at(path)
            os.replace(here.name, there.name, src_dir_fd=here.dir_fd, dst_dir_fd=there.dir_fd)

    def carry(
        self,
        source: str,
        target: str,
        temporary: str,
        finish: Callable[[int], None] | None = None,
        *,
        mtime_ns: int | None = None,
    ) -> None:
        """Move a file to a name that is free, also to another file system. The folders are not synced.

        Run again after a crash it finishes what was begun: a source that is gone with a target that is there
        is done; so is a source that is gone with the target taken away by its reader.

        Args:
            source: What to move.
            target: Its new name.
            temporary: A name of our own in the target's folder, for a copy.
            finish: Called with the descriptor before the name appears, to set mode and group.
            mtime_ns: The mtime that it gets, 0 for the present. A file of which we may not set it is copied.

        Raises:
            FileExistsError: The target is something else.
        """
        file = self._readable(source)
        if file is None:
            self._carry_special(source, target)
            return
        with file:
            with ours(target, "set mode or group"):
                if finish:
                    finish(file.fileno())
            is_secret = self._is_private(file, source)
            is_movable = mtime_ns is None or is_secret or self.touch(source, mtime_ns)
            self.sync(file, source)
            if not (is_movable and self._moved(file, source, target)):
                self._require_public(source, is_secret=is_secret)
                self._copy(file, target, temporary, finish, mtime_ns or 0)
                self.sync_folder(os.path.dirname(target))
                self.unlink(source)

    def _is_private(self, file: IO[bytes], path: str) -> bool:
        with ours(path, "look at the folder"):
            return is_private(os.fstat(file.fileno()), self.tops.folder(os.path.dirname(path)).status())

    def _require_public(self, path: str, *, is_secret: bool) -> None:
        """Refuse to copy a hard link to a private file: the copy has one name, and passes for a file like any other."""
        if is_secret:
            with ours(path, "copy a hard link to a private file"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def _moved(self, file: IO[bytes], source: str, target: str) -> bool:
        """Rename an open file; tell whether that can be done, which it cannot between two file systems."""
        try:
            self.rename(source, target)
        except FileExistsError:
            if not self._same(file, target):
                raise
            self.unlink(source)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            with ours(target, "move"):
                raise
        return True

    def _carry_special(self, source: str, target: str) -> None:
        """Move a link, a FIFO, what we may not read, or nothing at all.

        Across file systems a link is made anew, a FIFO is dropped, and what we may not read is a failure.
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
                with ours(target, "move"):
                    raise
            text = self._link(source)
            if text is not None and text != self._link(target):
                self.symlink(text, target)
            self.sync_folder(os.path.dirname(target))
        else:
            return
        self.unlink(source)

    def _copy(
        self, file: IO[bytes], target: str, temporary: str, finish: Callable[[int], None] | None, mtime_ns: int
    ) -> None:
        try:
            with closing(self.create_anew(temporary), target) as copy:
                with ours(target, "write"):
                    file.seek(0)
                    shutil.copyfileobj(file, copy, _COPY_BYTES)
                    if copy.tell() != os.fstat(file.fileno()).st_size:
                        raise OSError(errno.EIO, "the copy is shorter than its source")
                    (finish or functools.partial(copy_permissions, file.fileno()))(copy.fileno())
                    if mtime_ns:
                        copy.flush()
                        os.utime(copy.fileno(), ns=(mtime_ns, mtime_ns))
                self.sync(copy, target)
            try:
                self.rename(temporary, target)
            except FileExistsError:
                if not self._same(file, target):
                    raise
        finally:
            self.unlink(temporary)

    def same(self, path: str, other: str) -> bool:
        """Tell whether two files have the same mtime and bytes; the other one is then durable."""
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
        """Tell whether a path is a plain file of exactly these bytes. A pipe that was put there is not waited for."""
        try:
            with self._open(path) as file:
                return os.fstat(file.fileno()).st_size == len(content) and file.read() == content
        except OSError:
            return False

    # What lies there

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
            with ours(path, "read"):
                return self._open(path) if self._is_regular(path) else None
        except SpoolError as error:
            if error.code == errno.EACCES:
                return None
            raise

    def _same(self, file: IO[bytes], target: str) -> bool:
        """Tell whether a file and a path hold the same bytes."""
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

    def publish(self, target: str, temporary: str, content: bytes, finish: Callable[[int], None]) -> None:
        """Write a small file durably under a name that must be free; the same content there already is done.

        Args:
            target: Its name.
            temporary: A name of our own in the same folder.
            content: What is in it.
            finish: Called with the descriptor before the name appears, to set mode and group.

        Raises:
            FileExistsError: The target is something else.
        """
        try:
            with closing(self.create_anew(temporary), target) as file:
                with ours(target, "write"):
                    file.write(content)
                    finish(file.fileno())
                self.sync(file, target)
                self._name(file, temporary, target)
        except BaseException:
            with contextlib.suppress(SpoolError):
                self.unlink(temporary)
            raise
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
            with ours(target, "rename"):
                raise

    def probe(self, folder: str, name: str) -> None:
        """Prove that a file can be written, synced and removed in a folder."""
        path = os.path.join(folder, name)
        try:
            with closing(self.create_anew(path), folder) as file:
                with ours(folder, "write"):
                    file.write(b"imagewatch was here\n")
                self.sync(file, folder)
        finally:
            self.unlink(path)

    def lock(self, path: str, wait: Callable[[float], object] = threading.Event().wait) -> IO[bytes]:  # noqa: B008
        """Take an exclusive lock that ends with the process.

        Args:
            path: The lock file; made if it is not there.
            wait: Waits some seconds: ``locked`` has the lock for an instant, and is not somebody at work.

        Returns:
            The open file; the lock lasts as long as it does.

        Raises:
            AlreadyRunning: Somebody else has it.
        """
        with ours(path, "open the lock"):
            file = os.fdopen(self.tops.open_file(path, os.O_RDWR | os.O_CREAT), "r+b")
        for left in reversed(range(_LOCK_TRIES)):
            try:
                with _translated_lock(path):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except AlreadyRunning:
                if not left:
                    file.close()
                    raise
                wait(_LOCK_SECONDS)
            except SpoolError:
                file.close()
                raise
        return file


@contextlib.contextmanager
def _translated_lock(path: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        message = f"{printable(path)}: another imagewatch is at work here"
        raise AlreadyRunning(message, path=path, hint="stop it first, or give this one other folders") from None
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP}:
            with ours(path, "lock"):
                raise
        message = f"{printable(path)}: this file system has no locks"
        hint = "put the state folder and the inbox on a local disk"
        raise SpoolError(message, path=path, code=error.errno or 0, hint=hint) from error


def locked(path: str) -> bool:
    """Tell whether somebody has a lock, without taking it for longer than an instant."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        with ours(path, "look at the lock"):
            raise
    return False


@functools.cache
def _renameat2() -> Any | None:  # noqa: ANN401  a foreign function
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _status(place: Place) -> os.stat_result | None:
    try:
        return place.lstat()
    except OSError:
        return None


def _has_arrived(file: os.stat_result | None, source: Place, target: Place) -> bool:
    """Tell whether a file has its new name, though the call that renamed it failed; then it has no other."""
    found = _status(target)
    if file is None or found is None or not os.path.samestat(file, found):
        return False
    left = _status(source)
    if left is not None and os.path.samestat(left, found):
        os.unlink(source.name, dir_fd=source.dir_fd)
    return True


@functools.cache
def _fallocate() -> Any | None:  # noqa: ANN401  a foreign function
    """Return the C library's ``fallocate`` for lengths of 64 bits: by which name it has that depends on the library."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(None, use_errno=True)
        for name in ("fallocate64", "fallocate"):
            if function := getattr(library, name, None):
                function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
                return function
    return None


def _rename_new(source: Place, target: Place) -> None:
    """Rename without replacing, by the best means this file system has."""
    function = _renameat2()
    if function is not None:
        here, there = (_AT_FDCWD if place.dir_fd is None else place.dir_fd for place in (source, target))
        done = function(here, os.fsencode(source.name), there, os.fsencode(target.name), _RENAME_NOREPLACE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOSYS}:
            raise OSError(code, os.strerror(code), target.name)
    folders = {"src_dir_fd": source.dir_fd, "dst_dir_fd": target.dir_fd}
    try:
        os.link(source.name, target.name, **folders, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}:
            raise
        # Neither call exists here (FAT, some FUSE): the gap between the look and the rename stays.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target.name) from None
        os.rename(source.name, target.name, **folders)
    else:
        os.unlink(source.name, dir_fd=source.dir_fd)
