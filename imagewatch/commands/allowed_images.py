"""Which images ``imagewatch mcp`` may send: a model may be deceived into naming any file of this machine.

Only files below a few folders are opened. Each is reached from its folder part by part: a link that leads out of the
folder is not followed, also if it is put there in this moment. Hidden files and folders are refused. That a file is a
whole image is checked by its content before it is sent, as for every sender.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imagewatch.system.errors import BadRequest, Problem, UsageError
from imagewatch.system.folders import Tops
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO


class AllowedImages:
    """The folders from which images may be sent.

    Args:
        folders: Their paths; a relative name of an image is one below the first of them.
        most_bytes: A larger file is not opened.

    Raises:
        UsageError: A folder does not exist or cannot be opened.
    """

    def __init__(self, folders: Sequence[str], most_bytes: int) -> None:
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._most_bytes = most_bytes
        self._tops = Tops()
        for folder in self._folders:
            try:
                self._tops.open(folder)
            except OSError as error:
                reason = f"cannot open the folder: {error.strerror}: {printable(folder)}"
                raise UsageError(reason, hint="name an existing folder with --allow") from None

    def find(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the paths of images, without links.

        Args:
            names: Paths as a client names them.

        Raises:
            BadRequest: Some of them may not be sent. The reason is the same whether the file exists or not.
        """
        paths = [self._path(name) for name in names]
        hint = f"copy the image into {self._folders[0]}, or ask the user to allow its folder"
        problems = [
            Problem(printable(name, 255), "is not in a folder from which images may be sent", hint)
            for name, path in zip(names, paths, strict=True)
            if path is None
        ]
        if problems:
            raise BadRequest(problems)
        return tuple(path for path in paths if path is not None)

    def open(self, path: str) -> FileIO:
        """Open an image.

        Args:
            path: As ``find`` has returned it.

        Raises:
            RefusedError: It is outside the folders, or is no plain file.
            OSError: It does not exist, or cannot be read.
        """
        if not self._is_allowed(path):  # it was replaced by a link since
            raise RefusedError("is not in a folder from which images may be sent", path)
        return open_file(path, self._tops, most_bytes=self._most_bytes)

    def _path(self, name: str) -> str | None:
        try:
            path = os.path.realpath(os.path.join(self._folders[0], name))
        except (OSError, ValueError):  # NUL in it, or not UTF-8
            return None
        return path if self._is_allowed(path) else None

    def _is_allowed(self, path: str) -> bool:
        for folder in self._folders:
            prefix = folder.rstrip("/") + "/"
            if path.startswith(prefix) and not any(part.startswith(".") for part in path[len(prefix) :].split("/")):
                return True
        return False
