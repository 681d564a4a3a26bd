"""Notes of names: which names a program has used in one folder of the inbox, and for what.

A prompt that was claimed is in no folder that its sender can read, and its result may have been moved. So each name is
noted before its prompt is dropped, in a hidden folder of the inbox that the daemon does not scan. A note is created
only if there is none of its name: of two processes that drop the same name at the same time, one drops it.

The note has the hidden name under which the prompt was written. A rename gives the prompt its own name, and a file can
be renamed only once. If the file still has its hidden name, the prompt was not dropped; a process that
renames it away makes sure that it never will be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from imagewatch.protocol.names import NOTES, SUFFIX
from imagewatch.protocol.prompt import MAX_BYTES, parse
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import BadRequest, SpoolError
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_HIDDEN = ".submit-"
"""How hidden names of prompts that were withdrawn begin; one that stays is removed after a day by the next sender."""
_STAGED = r"\.(?:named|submit)-[0-9a-f]{16}\.prompt\.txt"
"""Hidden name of a prompt until it is dropped; earlier versions noted those of ``submit``."""
_MOST_BYTES = 1 << 16
_MODE = 0o644
_IMAGE = re.compile(r"\.in[0-9]{1,2}\.(png|jpeg|webp)")


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What is noted of a name.

    Attributes:
        schema: Version of this format.
        request: Hash of what was asked for.
        prompt_sha256: Hash of the text.
        staged: Hidden name of the prompt until it is dropped.
        images: Names of its images in the inbox.
        at: When it was noted, seconds since the epoch.
        is_canceled: Whether the prompt was taken out of the inbox again.
    """

    schema: Literal[1] = 1
    request: str
    prompt_sha256: str
    staged: Annotated[str, msgspec.Meta(pattern=rf"\A{_STAGED}\Z")]
    images: tuple[str, ...] = ()
    at: float
    is_canceled: bool = False


class Notes:
    """The notes of one folder of the inbox.

    Args:
        inbox: The inbox.
        folder: The folder below it, or an empty string.
    """

    def __init__(self, inbox: str, folder: str) -> None:
        self._inbox = inbox
        self._target = os.path.join(inbox, folder) if folder else inbox
        self._top = os.path.join(self._target, NOTES)
        self._disk = Disk()

    def read(self, name: str) -> Note | None:
        """Return what is noted of a name, or None if it was not used.

        Raises:
            SpoolError: It cannot be read, so that it is not known whether the name was used.
        """
        path = self._path(name)
        with disk_errors(path, "read"):
            self._open()
            try:
                with open_file(path, self._disk.tops, most_bytes=_MOST_BYTES) as file:
                    raw = file.read(_MOST_BYTES)
            except FileNotFoundError:
                return None
        try:
            return msgspec.json.decode(raw, type=Note)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            hint = "use another name"
            raise SpoolError(f"not a note of a name: {printable(path)}", path=path, hint=hint) from None

    def create(self, name: str, note: Note) -> None:
        """Note a name, durably.

        Raises:
            FileExistsError: It is noted already.
            SpoolError: It cannot be written.
        """
        with disk_errors(self._top, "open the folder"):
            self._open()
        self._make_folder()
        self._disk.publish(self._path(name), self._temporary(), _encoded(note), lambda number: os.fchmod(number, _MODE))

    def is_staged(self, note: Note) -> float | None:
        """Return since when a prompt has its hidden name, by the clock of the disk; None if it was renamed."""
        try:
            return self._disk.tops.lstat(os.path.join(self._target, note.staged)).st_ctime
        except OSError:
            return None

    def withdraw(self, name: str, note: Note) -> bool:
        """Make sure that a prompt that was not dropped never will be, and that its name can be used again.

        Returns:
            Whether that is so; else it was dropped, or another process does the same.
        """
        with self._aside(note.staged) as is_mine:
            if is_mine:
                self._disk.unlink(self._path(name))
        return is_mine

    def cancel(self, name: str, note: Note) -> bool:
        """Take a prompt out of the inbox, if the daemon has not claimed it; its name stays used.

        A prompt of the same name with another text stays: another sender has dropped it later.

        Returns:
            Whether it was taken out.
        """
        with disk_errors(self._target, "open the folder"):
            self._open()
        for file in (name + SUFFIX, note.staged):
            if not self._is_noted(file, note):
                continue
            with self._aside(file) as is_mine:
                if is_mine:
                    with self._disk.writing(self._path(name), self._temporary(), _MODE) as out:
                        out.write(_encoded(msgspec.structs.replace(note, is_canceled=True)))
                    self._disk.sync_folder(self._top)
                    self._remove_images(name, note)
            if is_mine:
                return True
        return False

    def is_waiting(self, name: str) -> bool:
        """Return whether a prompt is in the inbox."""
        return self._disk.tops.exists(os.path.join(self._target, name + SUFFIX))

    def _is_noted(self, file: str, note: Note) -> bool:
        """Return whether a file is a prompt with the text that was noted."""
        try:
            with open_file(os.path.join(self._target, file), self._disk.tops, most_bytes=MAX_BYTES) as prompt:
                text = parse(prompt.read(MAX_BYTES)).text
        except (OSError, BadRequest):
            return False
        return hashlib.sha256(text.encode()).hexdigest() == note.prompt_sha256

    @contextlib.contextmanager
    def _aside(self, file: str) -> Iterator[bool]:
        """Rename a prompt to a name that only this process has, and remove it at the end; yield whether it was there.

        Raises:
            SpoolError: It cannot be renamed.
        """
        path = os.path.join(self._target, file)
        aside = os.path.join(self._target, f"{_HIDDEN}{secrets.token_hex(8)}{SUFFIX}")
        with disk_errors(path, "take the prompt out of the inbox"):
            self._open()
            is_mine = self._renamed(path, aside)
        try:
            yield is_mine
        except BaseException:
            if is_mine:  # it is where it was: nothing was noted of it
                self._disk.rename(aside, path)
            raise
        if is_mine:
            self._disk.unlink(aside)

    def _renamed(self, path: str, aside: str) -> bool:
        try:
            if not stat.S_ISREG(self._disk.tops.lstat(path).st_mode):
                return False
            self._disk.rename(path, aside)
        except FileNotFoundError:
            return False
        return True

    def _remove_images(self, name: str, note: Note) -> None:
        for image in note.images:
            if image.startswith(name) and _IMAGE.fullmatch(image[len(name) :]):  # others may have written the note
                with contextlib.suppress(SpoolError):
                    self._disk.unlink(os.path.join(self._target, image))

    def _open(self) -> None:
        """Open the inbox, unless it is open: what is below is reached without following links."""
        if not self._disk.tops.is_below(self._inbox):
            self._disk.tops.open(self._inbox)

    def _make_folder(self) -> None:
        tops = self._disk.tops
        if tops.is_folder(self._top):
            return
        # Other users note their names there, too. With the sticky bit of the inbox they remove only their own notes:
        # without its note, a name would be used again.
        mode = stat.S_IMODE(tops.folder(self._target).status().st_mode)
        self._disk.make_with_mode(self._top, mode)
        self._disk.sync_folder(self._target)

    def _path(self, name: str) -> str:
        return os.path.join(self._top, f"{name}.json")

    def _temporary(self) -> str:
        return os.path.join(self._top, f".{secrets.token_hex(8)}.tmp")


def _encoded(note: Note) -> bytes:
    return json.dumps(msgspec.to_builtins(note), indent=1).encode() + b"\n"
