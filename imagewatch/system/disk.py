"""The local disk: every change to it goes through a method of ``Disk``.

The durable write is always the same sequence: a temporary file in the folder of its final name, write, length
check, fsync, close, rename, fsync of the folder. An fsync that failed is never tried again on the same file:
the kernel may have dropped the data and report success the second time.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import IO, TYPE_CHECKING

from imagewatch.system.disk_calls import DiskCalls
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.disk_moves import Moves, nothing
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MODE_OF_NOTES = 0o600


class Disk(Moves):
    """Durable writes, made of the calls of ``DiskCalls``. Paths are absolute; all methods raise ``SpoolError``."""

    def make_inner(self, top: str, folder: str, mode: int | None = None) -> None:
        """Make a folder below one of ours, durably, if it is missing.

        Args:
            top: A folder that is there.
            folder: Path below it, with ``/``.
            mode: Permission bits of a folder that is created; None leaves them to the umask.
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

        Else the mode might be set on another folder that was put in its place. A folder that another process has made
        meanwhile stays as it is.
        """
        hidden = os.path.join(os.path.dirname(path), f".iw-new.{secrets.token_hex(8)}")
        self.make_folder(hidden)
        try:
            self.set_mode(hidden, mode)
            with disk_errors(path, "rename"):
                self.rename(hidden, path)
        except SpoolError:
            if not self.tops.is_folder(path):
                raise
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
            with closing(self.replace_leftover(temporary, mode), path) as file:
                with disk_errors(path, "write"):
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
        """Replace a small file that is not needed after a crash. Whole for any reader, but not synced."""
        temporary = path + ".tmp"
        with disk_errors(path, "write"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(self.tops.open_file(temporary, flags, _MODE_OF_NOTES), "wb") as file:
                file.write(content)
            DiskCalls.replace(self, temporary, path)  # which is no step of a job

    def show(self, path: str, temporary: str, content: bytes, finish: Callable[[int], None]) -> None:
        """Replace a small file in a folder that other users may write. Whole for any reader, but not synced.

        What has the name is replaced, also a link, which is not followed. A folder is not.

        Args:
            path: Its name.
            temporary: A name in the same folder that no other user can predict.
            content: What is in it.
            finish: Called with the descriptor before the name appears, to set mode and group.
        """
        try:
            with closing(self.create(temporary), path) as file, disk_errors(path, "write"):
                finish(file.fileno())
                file.write(content)
            DiskCalls.replace(self, temporary, path)  # which is no step of a job
        except BaseException:
            with contextlib.suppress(SpoolError):
                self.unlink(temporary)
            raise

    def publish(
        self,
        target: str,
        temporary: str,
        content: bytes,
        finish: Callable[[int], None],
        check: Callable[[], object] = nothing,
    ) -> None:
        """Write a small file durably under a name that must be free; the same content there already is done.

        Args:
            target: Its name.
            temporary: A name of our own in the same folder.
            content: What is in it.
            finish: Called with the descriptor before the name appears, to set mode and group.
            check: Called right before the name appears, when the file has its temporary name; it may raise.

        Raises:
            FileExistsError: The target is something else.
        """
        try:
            with closing(self.replace_leftover(temporary), target) as file:
                with disk_errors(target, "write"):
                    file.write(content)
                    finish(file.fileno())
                self.sync(file, target)
                check()
                self._name(file, temporary, target)
        except BaseException:
            with contextlib.suppress(SpoolError):
                self.unlink(temporary)
            raise
        self.sync_folder(os.path.dirname(target))

    def probe(self, folder: str, name: str) -> None:
        """Prove that a file can be written, synced and removed in a folder."""
        path = os.path.join(folder, name)
        try:
            with closing(self.replace_leftover(path), folder) as file:
                with disk_errors(folder, "write"):
                    file.write(b"imagewatch was here\n")
                self.sync(file, folder)
        finally:
            self.unlink(path)
