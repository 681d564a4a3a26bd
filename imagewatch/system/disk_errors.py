"""Errors of the local disk: ``OSError`` becomes ``SpoolError``.

Two modules have texts of their own: ``journal/files`` for the ledger, ``journal/journal`` for a damaged job record.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import IO, TYPE_CHECKING

from imagewatch.system.errors import MORE_FILES, SpoolError
from imagewatch.system.folders import NotAFolderError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT}
_RESTORE = "restore the folder that was there"


class disk_errors:  # noqa: N801  a context manager
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
                message = f"{error.strerror}: {printable(str(error.filename))}"
                raise SpoolError(message, path=self._path, code=code, hint=_RESTORE) from error
            message = f"cannot {self._doing}: {os.strerror(code) if code else error}: {printable(self._path)}"
            raise SpoolError(message, path=self._path, code=code, hint=_hint(code)) from error


@contextlib.contextmanager
def closing(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """Close a file at the end of a block.

    ``close`` writes what is buffered: after a failure it would fail once more, and hide what happened.
    """
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    with disk_errors(path, "write"):
        file.close()


def _hint(code: int) -> str:
    if code in FULL:
        return "free some space; the daemon resumes automatically"
    if code in {errno.EMFILE, errno.ENFILE}:
        return MORE_FILES
    if code in {errno.EACCES, errno.EPERM}:
        return "let the daemon's user write there"
    if code == errno.EROFS:
        return "mount it for writing; for a service, name it in BindPaths= of the unit"
    if code in {errno.ENOENT, errno.ENOTDIR}:
        return "restore the folder, or check that it is mounted"
    return "check the disk and the system log"
