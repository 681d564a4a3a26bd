"""Which rows of tables were dropped into a folder of the inbox: the hidden file ``.table-rows.jsonl`` in it.

While a prompt is in flight, a sender who has only the folders cannot see it anywhere, and later its result may have
been moved away. So each row is recorded before it is dropped. The record names the hidden file that is renamed to drop
the row: as long as that file exists, the row was not dropped. So after any end of a command, it is known for each row
whether it was dropped, and a second run drops exactly the others.

One run at a time may use the file: it is locked. Everyone who may write the folder may also write the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from imagewatch.config.locate import refusal as access_hint
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import AlreadyRunning, SpoolError
from imagewatch.system.locks import lock
from imagewatch.system.permissions import Permissions
from imagewatch.system.text import printable, utc
from imagewatch.system.untrusted import open_file, refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from imagewatch.commands.drop import Staged
    from imagewatch.commands.table_rows import Row
    from imagewatch.system.disk import Disk

FILE = ".table-rows.jsonl"
STAGED = ".row-"
"""How the hidden names of staged rows begin."""
_MOST_BYTES = 64 << 20
_IMAGE = re.compile(r"\.in[0-9]{1,2}\.(?:png|jpeg|webp)")
_BUSY = "wait until it has ended; a second run drops only the rows that are missing then"


@dataclass(frozen=True)
class Entry:
    """A row that was dropped, or was about to be.

    Attributes:
        name: Its base name.
        digest: Hash of all that it asks for.
        staged: The hidden names of its files, the prompt last.
        images: The final names of its images.
    """

    name: str
    digest: str
    staged: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The hidden name of its prompt."""
        return self.staged[-1]


def read(folder: str) -> dict[str, list[Entry]]:
    """Return the rows that were dropped into a folder, by name, without changing anything.

    Args:
        folder: A folder of the inbox; it need not exist.

    Raises:
        SpoolError: The record exists and cannot be read.
    """
    path = os.path.join(folder, FILE)
    try:
        with disk_errors(path, "read"), open_file(path, most_bytes=_MOST_BYTES) as file:
            content = file.read(_MOST_BYTES)
    except SpoolError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return {}
        raise
    found = _entries(content)
    return _by_name(one for one in found if not os.path.lexists(os.path.join(folder, one.prompt)))


class RowRecord:
    """The record of a folder, locked for the block. At its beginning, what a killed run has left is removed.

    Args:
        disk: The disk.
        folder: The folder, absolute.

    Raises:
        AlreadyRunning: Another run uses it.
        SpoolError: It cannot be used.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = folder
        self._path = os.path.join(folder, FILE)
        self._file = self._opened()
        self._entries: list[Entry] = []
        self._is_cut = True

    def __enter__(self) -> Self:
        with disk_errors(self._path, "read"):
            content = self._file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            message = f"the record of dropped rows is larger than {_MOST_BYTES >> 20} MiB: {printable(self._path)}"
            raise SpoolError(message, path=self._path, hint="use another folder of the inbox (--folder)")
        self._entries = _entries(content)
        if content and not content.endswith(b"\n"):
            self._append([b"\n"])  # after a line that a power cut has cut
        self._recover()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def dropped(self) -> dict[str, list[Entry]]:
        """Return the rows that were dropped, by name; a name may have been dropped more than once."""
        return _by_name(self._entries)

    def add(self, rows: Sequence[Row], staged: Sequence[Staged]) -> None:
        """Record rows durably before they are dropped.

        Args:
            rows: The rows.
            staged: The prompt of each, under its hidden name.
        """
        entries = [Entry(row.stem, row.digest, one.names, one.images) for row, one in zip(rows, staged, strict=True)]
        at = utc(time.time()).isoformat()
        before = len(self._entries)
        self._entries += entries  # now: if writing fails, some of their lines may be in the file
        try:
            self._append(
                _line({"name": e.name, "content": e.digest, "staged": e.staged, "images": e.images, "at": at})
                for e in entries
            )
        except SpoolError:
            if self._is_cut:
                del self._entries[before:]
            raise

    def withdraw(self, prompts: Iterable[str]) -> None:
        """Record durably that rows were not dropped; those that are not recorded are left out.

        Args:
            prompts: The hidden names of their prompts.
        """
        withdrawn = {one.prompt for one in self._entries} & set(prompts)
        self._append(_line({"withdrawn": name}) for name in sorted(withdrawn))
        self._entries = [one for one in self._entries if one.prompt not in withdrawn]

    def _opened(self) -> IO[bytes]:
        tops = self._disk.tops
        try:
            file = lock(self._path, tops)
        except AlreadyRunning:
            message = f"another imagewatch submit --table is dropping rows into {printable(self._folder)}"
            raise AlreadyRunning(message, path=self._path, hint=_BUSY) from None
        except SpoolError as error:
            if error.code in {errno.EACCES, errno.EPERM}:
                error.hint = access_hint(self._path, os.R_OK | os.W_OK)
            elif error.code in {errno.ENOLCK, errno.EOPNOTSUPP}:
                error.hint = "run the command on the machine that has the folder"
            raise
        with contextlib.ExitStack() as stack:
            stack.callback(file.close)
            with disk_errors(self._path, "open the record of dropped rows"):
                self._share(file, tops.folder(self._folder).status())
            stack.pop_all()
        return file

    def _share(self, file: IO[bytes], folder: os.stat_result) -> None:
        """Give access to the record, if it is one, to all who may write the folder.

        Raises:
            SpoolError: It is no file of its own.
        """
        status = os.fstat(file.fileno())
        if reason := refusal(status, folder):
            message = f"the record of dropped rows {reason}: {printable(self._path)}"
            raise SpoolError(message, path=self._path, hint="remove it; then check which rows were dropped")
        # Users who may write the folder must also read the record, even if they may not list the folder.
        mode = folder.st_mode & 0o666 | (folder.st_mode & 0o222) << 1 | 0o600
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != mode:
            with contextlib.suppress(PermissionError):  # a file system without modes
                Permissions(mode, None, None).apply(file.fileno())

    def _append(self, lines: Iterable[bytes]) -> None:
        content = b"".join(lines)
        if not content:
            return
        file = self._file.fileno()
        with disk_errors(self._path, "write"):
            end = os.lseek(file, 0, os.SEEK_END)
        try:
            with disk_errors(self._path, "write"):
                while content:
                    content = content[os.write(file, content) :]
            self._disk.sync(self._file, self._path)
        except SpoolError:
            self._is_cut = False
            with contextlib.suppress(OSError):  # a full disk: a part of a line would spoil the next one
                os.ftruncate(file, end)
                self._is_cut = True
            raise

    def _recover(self) -> None:
        """Remove the files of rows that a killed run has recorded and not dropped, and what it staged before that."""
        tops = self._disk.tops
        for one in [one for one in self._entries if tops.exists(self._in(one.prompt))]:
            for hidden, final in zip(one.staged[:-1], one.images, strict=True):
                if tops.exists(self._in(hidden)):
                    self._remove(hidden)
                elif self._have_one_owner(one.prompt, final):
                    self._remove(final)
            self.withdraw([one.prompt])
            self._remove(one.prompt)
        with contextlib.suppress(OSError):  # a folder that this user may not list
            for name in tops.names(self._folder):
                if name.startswith(STAGED):
                    self._remove(name)

    def _have_one_owner(self, prompt: str, image: str) -> bool:
        """Return whether an image is of the user who staged the prompt: others may have written the record."""
        tops = self._disk.tops
        try:
            return tops.lstat(self._in(prompt)).st_uid == tops.lstat(self._in(image)).st_uid
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        """Remove a file of a killed run; one of another user stays where the folder has the sticky bit."""
        with contextlib.suppress(SpoolError):
            self._disk.unlink(self._in(name))

    def _in(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _entries(content: bytes) -> list[Entry]:
    """Return what a record says. Others may have written it: a line that is none of ours is left out."""
    entries: dict[str, Entry] = {}
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            values = json.loads(line)
            if "withdrawn" in values:
                entries.pop(values["withdrawn"], None)
            elif one := _entry(values):
                entries[one.prompt] = one
    return list(entries.values())


def _entry(values: dict[str, Any]) -> Entry | None:
    staged, images = tuple(map(str, values["staged"])), tuple(map(str, values["images"]))
    name, digest = str(values["name"]), str(values["content"])
    is_ours = all(one.startswith(STAGED) and "/" not in one for one in staged)
    is_ours = is_ours and all(one.startswith(name) and _IMAGE.fullmatch(one[len(name) :]) for one in images)
    return Entry(name, digest, staged, images) if is_ours and len(staged) == len(images) + 1 else None


def _by_name(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for one in entries:
        found.setdefault(one.name, []).append(one)
    return found
