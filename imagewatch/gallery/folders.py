"""Folders that strangers may write: reached part by part and never through a link, and only plain files opened in them.

A page that many people read must not show what only its writer may see: somebody may put a link to it there, or a hard
link, or may exchange a folder for a link while it is looked at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO

from imagewatch.system.untrusted import open_at

DEEPEST = 100
"""Folders in each other; those further down are not looked into."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def below(top: str, folder: str) -> int:
    """Open a folder below another one.

    Args:
        top: Path of the upper one, which may be a link.
        folder: Names with ``/`` between them, as they were listed; empty for the upper one itself.

    Returns:
        Its descriptor.

    Raises:
        OSError: It is not there, may not be read, or a part of it is a link.
    """
    descriptor = os.open(top, _FOLDER)
    for name in folder.split("/") if folder else ():
        try:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


@dataclass(frozen=True)
class Source:
    """A picture as it was found.

    Attributes:
        top: Path of the upper folder.
        folder: Folder below it; see ``below``.
        name: File name.
        identity: See ``identity``.
    """

    top: str
    folder: str
    name: str
    identity: tuple[int, ...]

    def open(self) -> IO[bytes]:
        """Open the picture for reading.

        Raises:
            OSError: It is gone, may not be read, or is a link.
            ValueError: It is not what was found.
        """
        folder = below(self.top, self.folder)
        try:
            file = open_at(self.name, folder)
        finally:
            os.close(folder)
        if identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise ValueError("was changed meanwhile")
        return file


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from any other, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
