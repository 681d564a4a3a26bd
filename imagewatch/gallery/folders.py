"""One folder of results with all below it, during one scan, and the images that are found in it.

Others may write there while it is read: they may put a link to a private file there, or a hard link, or exchange a
folder for a link. So nothing below the folder is reached by its path alone; see ``system.folders``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from msgspec.structs import replace

from imagewatch.protocol.image_kinds import IMAGE_SUFFIXES
from imagewatch.protocol.prompt import text_for_people
from imagewatch.system.folders import Tops
from imagewatch.system.text import whole
from imagewatch.system.untrusted import open_at, open_file, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.gallery.values import Job, JobImage, Status
    from imagewatch.system.folders import Descriptor

_DEEPEST = 100
"""Nesting depth of folders; those further down are not shown."""
_MOST_NOTES = 50
MOST_BYTES = 256 << 10
"""Of a result file, or of a prompt whose result file does not have its text."""


@dataclass(frozen=True)
class Source:
    """An image as it was found.

    Attributes:
        top: The folder of results that it is in.
        path: Its path.
        identity: See ``identity``.
    """

    top: str
    path: str
    identity: tuple[int, ...]

    def open(self) -> IO[bytes]:
        """Open the image for reading.

        Raises:
            OSError: It was removed, may not be read, or is a link.
            ValueError: It is not what was found.
        """
        tops = Tops()  # not those of the scan: a folder that stays open cannot be unmounted
        tops.open(self.top)
        file = open_file(self.path, tops)
        if identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise ValueError("was changed meanwhile")
        return file


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what distinguishes a file from any other, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@dataclass
class Scan:
    """What one scan of the folders found.

    Attributes:
        jobs: The newest first.
        sources: For each thumbnail that is wanted, by its name, its image.
        notes: What could not be read, in words.
        status: What the daemon reports; None if there is nothing to report.
        folders: Modification time of each folder that was read, and of the status file; taken before, in nanoseconds.
    """

    jobs: list[Job] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    status: Status | None = None
    folders: dict[str, int] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a note; of very many the first ones are enough."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)

    def keep_time(self, path: str) -> None:
        """Keep the modification time that a file or folder has now; ``is_outdated`` compares it."""
        self.folders[path] = _changed(path)

    def is_outdated(self) -> bool:
        """Return whether files were added to one of the folders, or removed, or the status changed, since then."""
        return any(_changed(folder) != then for folder, then in self.folders.items())


class Tree:
    """One of the folders with all below it, during one scan. A path that is no folder has nothing below it.

    Args:
        scan: Notes, images and folders are added to it.
        page: Folder of the page; addresses are relative to it.
        name: What the folder is called in messages.
        top: Its path; empty if originals are not kept.
    """

    def __init__(self, scan: Scan, page: str, name: str, top: str) -> None:
        self._scan = scan
        self._name = name
        self._top = top
        self._href = os.path.relpath(top, page) if top else ""
        self._tops = Tops()
        self._names: dict[str, dict[str, str]] = {}
        self._entered: tuple[str, Descriptor] | None = None
        self._problem: OSError | None = None
        try:
            if not top:
                raise FileNotFoundError
            self._tops.open(top)
        except OSError as error:
            self._problem = error

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder, and the names of its files; not those that are hidden or links."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            path = self._path(folder)
            self._scan.keep_time(path)
            try:
                with self._enter(folder).entries() as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                continue  # not created yet, or removed meanwhile
            except OSError as error:
                self._scan.note(f"{whole(path)}: cannot be read: {error.strerror}")
                continue
            listed = [entry for entry in listed if not entry.name.startswith(".")]
            inner = [entry.name for entry in listed if entry.is_dir(follow_symlinks=False)]
            if inner and folder.count("/") + 2 > _DEEPEST:
                self._scan.note(f"{whole(path)}: is {_DEEPEST} folders deep; the folders in it are not shown")
                inner = []
            waiting += [os.path.join(folder, name) for name in reversed(inner)]
            yield folder, [entry.name for entry in listed]

    def href(self, folder: str, name: str) -> str:
        """Return the address of a file relative to the page."""
        return quote(os.fsencode(os.path.join(self._href, folder, name)))

    def status(self, folder: str, name: str) -> os.stat_result | None:
        """Return the status of a name in a folder, or None."""
        try:
            return os.stat(name, dir_fd=self._enter(folder).fileno(), follow_symlinks=False)
        except (OSError, ValueError):
            return None

    def content(self, folder: str, name: str) -> bytes:
        """Return a small file.

        Raises:
            OSError: It does not exist, may not be read, is no regular file, or is a hard link to a private file.
            ValueError: It is too large.
        """
        with open_at(name, self._enter(folder).fileno()) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError("is larger than 256 KiB")
        return content

    def prompt(self, folder: str, name: str) -> str:
        """Return the text of a prompt file without its options; nothing if it cannot be read."""
        try:
            return text_for_people(self.content(folder, name))
        except (OSError, ValueError):
            return ""

    def image(self, folder: str, expected: JobImage, names: list[str]) -> JobImage:
        """Find an image of a job.

        Args:
            folder: Where.
            expected: What the result file says of it.
            names: The names that it may have; the first that exists with the expected size counts.

        Returns:
            The image with its address and thumbnail, or with the reason why there is none.
        """
        missing = f"is missing from the {self._name}" if self._top else "was not kept"
        found = replace(expected, problem=missing)
        for name in names:
            real = self._listed(folder).get(name, "")
            status = self.status(folder, real) if real else None
            if not status or status.st_size != expected.bytes:
                continue
            # A browser may run what has another ending.
            is_usual = os.path.splitext(real)[1].lower().removeprefix(".") in IMAGE_SUFFIXES
            found.problem = (
                refusal(status, self._enter(folder).status())
                if is_usual
                else "does not have the name of a PNG, JPEG or WebP file"
            )
            if not found.problem:
                found.href = self.href(folder, real)
                found.problem = expected.problem
                found.thumb = _thumbnail(found.href, status)
                self._scan.sources[found.thumb] = Source(self._top, self._path(folder, real), identity(status))
                break
        return found

    def _path(self, folder: str, name: str = "") -> str:
        return os.path.join(self._top, *filter(None, (folder, name)))

    def _enter(self, folder: str) -> Descriptor:
        """Return a folder, which stays open until another one is entered.

        Raises:
            OSError: It does not exist, may not be read, or a part of its path is a link.
        """
        if self._problem is not None:
            raise self._problem
        if self._entered is None or self._entered[0] != folder:
            self._entered = None
            self._entered = folder, self._tops.listable(self._path(folder) if folder else self._top)
        return self._entered[1]

    def _listed(self, folder: str) -> dict[str, str]:
        """Return the names in a folder, as result files write them and as they are."""
        if folder not in self._names:
            path = self._path(folder)
            self._scan.folders.setdefault(path, _changed(path))
            try:
                self._names[folder] = {whole(name): name for name in os.listdir(self._enter(folder).fileno())}
            except OSError:
                self._names[folder] = {}
        return self._names[folder]


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _thumbnail(href: str, status: os.stat_result) -> str:
    """Return the name of an image's thumbnail: another image in its place has another one."""
    key = f"{href} {status.st_mtime_ns} {status.st_size}"
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest() + ".webp"
