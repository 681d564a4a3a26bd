"""What a common inbox needs of its file system, tried out at the start.

Several daemons, on several hosts, rely on the same calls there: a witness is created by one of them only, a rename
never replaces a file, and a daemon whose claim folder was removed can put nothing into it any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import msgspec

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import AlreadyRunning, ConfigError, Problem, SpoolError
from imagewatch.system.file_systems import SMB
from imagewatch.system.locks import lock
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from typing import IO

    from imagewatch.system.disk import Disk

PROBE = ".iw-probe."
"""Beginning of the name of a test file; a start removes those of processes that were killed."""
PROBE_INNER = "file"
"""Name of a test file in a folder for tests."""
NEXT_STEP = (
    "put the inbox on a file system that can do that (NFS 4, a cluster file system, a local disk); or let each host "
    "have an inbox of its own: remove shared.inbox"
)
_MOST_BYTES = 4096
_LOCK_TRY = """
import fcntl, sys
with open(sys.argv[1], "rb+") as file:
    for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            print("1", end="")
        except BlockingIOError:
            print("0", end="")
"""
"""Tries an exclusive and a shared lock in another process; prints 1 for each that it got."""
_LOCK_SECONDS = 20


class Whose(msgspec.Struct, frozen=True):
    """Whose inbox it is: in the file of the lock."""

    account: str
    inbox: str


def require_tried(folder: str, kind: str) -> None:
    """Make sure that a common inbox is not on a file system on which it was not tried.

    Args:
        folder: The inbox.
        kind: Type of its file system.

    Raises:
        ConfigError: It is.
    """
    if kind in SMB:
        why = f"a common inbox was not tried on SMB, and may lose files there: {printable(folder)} is on {kind}"
        raise ConfigError([Problem("shared.inbox", why, NEXT_STEP)])


class LateFolder:
    """A folder as a daemon has it that lost a job: open, also after another daemon has removed it.

    Args:
        disk: The disk.
        path: The folder, which is there.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path
        self._folder = disk.tops.folder(path)

    def takes(self, file: str) -> bool:
        """Return whether a file can be put into the folder, under its name or as it was opened."""
        with contextlib.suppress(SpoolError, OSError):
            self._disk.rename(file, os.path.join(self._path, PROBE_INNER))
            return True
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(PROBE_INNER, flags, 0o600, dir_fd=self._folder.fileno()))
            return True
        return False


class FolderProbes:
    """Tries out what a common inbox needs in a folder.

    Args:
        disk: The disk.
        folder: The folder of claimed files, opened.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = folder
        self._base = os.path.join(folder, PROBE + secrets.token_hex(8))

    def run(self) -> None:
        """Try everything.

        Raises:
            SpoolError: Something does not work; the message has what, and where.
        """
        one, other, inner = f"{self._base}.1", f"{self._base}.2", f"{self._base}.d"
        try:
            self._try_new_file(one)
            self._try_rename(one, other)
            self._try_fence(one, inner)
            self._try_locks(other)
            self._disk.sync_folder(self._folder)
        finally:
            for path in (os.path.join(inner, PROBE_INNER), one, other):
                self._disk.unlink(path)
            self._disk.remove_folder(inner)

    def _fail(self, what: str) -> NoReturn:
        message = f"the file system of a common inbox must {what}, and does not: {printable(self._folder)}"
        raise SpoolError(message, path=self._folder, code=errno.EOPNOTSUPP, hint=NEXT_STEP)

    def _try_new_file(self, path: str) -> None:
        with self._disk.create(path) as file:
            with disk_errors(path, "write"):
                file.write(b"imagewatch was here\n")
            self._disk.sync(file, path)
        try:
            self._disk.create(path).close()
        except SpoolError as error:
            if error.code != errno.EEXIST:
                raise
        else:
            self._fail("create a file only if there is none (O_CREAT with O_EXCL)")

    def _try_rename(self, one: str, other: str) -> None:
        self._disk.create(other).close()
        try:
            self._disk.rename(one, other)
        except FileExistsError:
            pass
        else:
            self._fail("refuse to rename a file over another one")
        self._disk.unlink(other)
        before = self._inode(one)
        with disk_errors(one, "rename"):
            self._disk.rename(one, other)
        if self._inode(other) != before or self._disk.tops.exists(one):
            self._fail("keep the inode of a file that is renamed")
        self._disk.create(one).close()

    def _try_fence(self, one: str, inner: str) -> None:
        """Remove a folder that is open, and put a file into it, as a daemon does that lost a job."""
        self._disk.make_folder(inner)
        with disk_errors(inner, "open the folder"):
            late = LateFolder(self._disk, inner)
        self._disk.remove_folder(inner)
        if late.takes(one):
            self._fail("refuse to put a file into a folder that was removed")

    def _try_locks(self, path: str) -> None:
        """Lock a file, and try it in another process: on a network file system one process may not notice."""
        for is_shared, wanted in ((False, "00"), (True, "01")):
            with lock(path, self._disk.tops, is_shared=is_shared):
                if self._locks_of_another(path) != wanted:
                    self._fail("let a lock of one process be noticed by another one (flock)")

    def _locks_of_another(self, path: str) -> str:
        place = self._disk.tops.at(path)
        folder = place.dir_fd
        name = path if folder is None else f"/proc/self/fd/{folder}/{place.name}"
        files = () if folder is None else (folder,)
        command = [sys.executable, "-I", "-S", "-c", _LOCK_TRY, name]
        with disk_errors(path, "test the lock"):
            try:
                done = subprocess.run(  # noqa: S603  our own text
                    command, pass_fds=files, capture_output=True, timeout=_LOCK_SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path) from None
        return done.stdout.decode("ascii", "replace")

    def _inode(self, path: str) -> int:
        with disk_errors(path, "check the file"):
            return self._disk.tops.lstat(path).st_ino


def claim_inbox(path: str, disk: Disk, whose: Whose, *, is_common: bool, is_alone: bool) -> IO[bytes]:
    """Lock an inbox, and make sure that it is not another one's: the file of the lock names its owner.

    Args:
        path: The file.
        disk: The disk.
        whose: Account and name of the inbox.
        is_common: Whether several daemons process it.
        is_alone: Whether no other daemon may use it now.

    Returns:
        The open file; the lock lasts as long as it does.

    Raises:
        AlreadyRunning: Another daemon uses it alone, or it belongs to another account or has another name.
        SpoolError: It cannot be locked.
    """
    if is_common:
        _introduce(path, disk, whose)
    held = lock(path, disk.tops, is_shared=not is_alone)
    try:
        _require_own(path, _whose(held), whose if is_common else None)
    except BaseException:
        held.close()
        raise
    return held


def _introduce(path: str, disk: Disk, whose: Whose) -> None:
    """Write down whose it is, if it has no owner yet: only possible while no daemon uses it."""
    with contextlib.suppress(SpoolError, OSError), open(disk.tops.open_file(path, os.O_RDONLY), "rb") as known:
        if _whose(known):
            return
    try:
        file = lock(path, disk.tops)
    except AlreadyRunning:
        return
    with file:
        if _whose(file) is None:
            with disk_errors(path, "write"):
                file.seek(0)
                file.truncate()
                file.write(msgspec.json.encode(whose))
            disk.sync(file, path)


def _whose(file: IO[bytes]) -> Whose | None:
    try:
        return msgspec.json.decode(os.pread(file.fileno(), _MOST_BYTES, 0), type=Whose)
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def _require_own(path: str, found: Whose | None, wanted: Whose | None) -> None:
    if found == wanted:
        return
    if found is None:
        message = f"another imagewatch process uses this folder alone: {printable(path)}"
        raise AlreadyRunning(message, path=path, hint="stop it, or set shared.inbox for it, too")
    name = f'the common inbox "{printable(found.inbox)}" of the account "{printable(found.account)}"'
    hint = "set shared.account and shared.inbox as the other daemons have them, or use another inbox"
    if wanted is None:
        hint = "set shared.inbox as the other daemons have it; or, if they will not use it any more, empty this file"
    raise AlreadyRunning(f"this inbox is {name}: {printable(path)}", path=path, hint=hint)
