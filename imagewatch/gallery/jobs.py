"""What receipts and error files say, as values for the page. Reads the folders and changes nothing in them.

Everything that is read here may have been written by others. A document is bounded and its types are checked; a name
in it counts only inside the document's own folder, and only if it is that of a picture.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import msgspec

from imagewatch.config.validate import shown
from imagewatch.gallery.folders import DEEPEST, Source, below, identity
from imagewatch.gallery.page import inert
from imagewatch.job.receipts import unvouched
from imagewatch.protocol.image_kinds import IMAGE_SUFFIXES
from imagewatch.protocol.names import NAME_MAX, SUFFIX, tagged
from imagewatch.system.text import whole
from imagewatch.system.untrusted import open_at, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Folders

_ENDINGS = {"outbox": ".receipt.toml", "errors": ".error.toml"}
_MOST_BYTES = 256 << 10
"""Of a document, or of a prompt that has no document with its text."""
_MOST_CHARACTERS = 4000
"""Of one text on the page, so that a few giants do not make it slow; the documents have all of it."""
_MOST_FILES = 50
_MOST_NOTES = 50
_MOST_READ = 128 << 20
"""Of all documents, the newest first, so that a flood of them does not keep the page from being written."""
_MOST_SHOWN = 16 << 20
"""Of all jobs on the page, bytes; a job has 500, as a rule."""
_LONGEST_ID = 64
_LONGEST_NAME = 6 * NAME_MAX
"""Of a file, characters: what was never text is written with six for each byte."""


class Picture(msgspec.Struct, omit_defaults=True):
    """One picture of a job, or one of its inputs.

    Attributes:
        name: File name, as the document has it.
        href: Address relative to the page; empty when the file is not there.
        thumb: Name of its thumbnail; empty when there is none.
        width: Pixels.
        height: Pixels.
        bytes: Size of the file.
        problem: Why there is nothing to see, or what is wrong with it.
    """

    name: str
    href: str = ""
    thumb: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    problem: str = ""


class Job(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One job, as the page shows it.

    Attributes:
        made: Whether it ended in the outbox.
        name: The prompt's name without ``.prompt.txt``.
        folder: Folder below the inbox, with ``/``.
        document: Address of the receipt or error file, relative to the page.
        unread: Whether the document is none; then it may be anything, and is not linked.
        at: When it was over, milliseconds since the epoch.
        seconds: From the request to the answer.
        job: Its id.
        charged: ``yes``, ``no``, ``unknown``, or empty when the document cannot be read.
        credits: What was charged, when it is known.
        asked: Number of pictures asked for.
        options: What was asked for beside prompt and provider, in words.
        status: Of the answer that was no success; ``code`` and ``needs`` (credits) as it named them.
        next: What to do now.
    """

    made: bool
    name: str
    folder: str = ""
    document: str
    unread: bool = False
    at: int
    seconds: float = 0
    job: str = ""
    charged: str = ""
    credits: float | None = None
    provider: str = ""
    model: str = ""
    prompt: str = ""
    asked: int = 0
    options: str = ""
    message: str = ""
    problems: list[str] = []
    status: int = 0
    code: str = ""
    needs: float | None = None
    next: str = ""
    pictures: list[Picture] = []
    inputs: list[Picture] = []


_Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]  # what JSON and browsers can hold


class _File(msgspec.Struct):
    """One entry of ``images`` or ``inputs``."""

    file: str
    width: _Whole = 0
    height: _Whole = 0
    bytes: _Whole = 0
    problem: str = ""


class _Document(msgspec.Struct):
    """The keys of a receipt or error file that the page shows."""

    source: str
    charged: Literal["yes", "no", "unknown"]
    job: str = ""
    credits_charged: float | None = None
    provider: str = ""
    model: str = ""
    prompt: str = ""
    asked: _Whole = 0
    message: str = ""
    problems: list[str] = []
    status: _Whole = 0
    code: str = ""
    credits_required: float | None = None
    next: str = ""
    request: dict[str, Any] = {}
    times: dict[str, datetime] = {}
    images: list[_File] = []
    inputs: list[_File] = []


@dataclass
class Look:
    """What one look at the folders found.

    Attributes:
        jobs: The newest first.
        sources: For each thumbnail that is wanted, by its name, its picture.
        notes: What could not be read, in words.
        folders: Modification time of each folder that was read, taken before; in nanoseconds.
    """

    jobs: list[Job] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a note; of very many the first ones are enough."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)

    def outdated(self) -> bool:
        """Tell whether something came or went in one of the folders since."""
        return any(_changed(folder) != then for folder, then in self.folders.items())


@dataclass(frozen=True)
class _Read:
    """A document as it was read, or what is wrong with it in words; and what tells it from others."""

    identity: tuple[int, ...]
    changed: int
    document: _Document | str


@dataclass(frozen=True)
class _Found:
    """A document that was not read yet."""

    door: str
    folder: str
    name: str
    changed: int
    bytes: int


class Reader:
    """Reads the folders, and each document once for as long as it stays the same.

    Args:
        folders: Where everything is.
        page: Folder of the page; addresses are relative to it.
    """

    def __init__(self, folders: Folders, page: str) -> None:
        archive = folders.archive if folders.archive != "delete" else ""
        self._tops = {"outbox": folders.outbox, "errors": folders.errors, "archive": archive}
        self._page = page
        self._known: dict[tuple[str, str, str], _Read] = {}

    def look(self) -> Look:
        """Return what is there now; what cannot be read is noted and passed over."""
        look = Look()
        with contextlib.ExitStack() as stack:
            shelves = {name: _Shelf(look, self._page, name, top) for name, top in self._tops.items()}
            for shelf in shelves.values():
                stack.callback(shelf.close)
            found = [one for door in _ENDINGS for one in _documents(shelves[door], door)]
            found.sort(key=lambda one: -one.changed)
            self._show(look, shelves, found)
        look.jobs.sort(key=lambda job: (-job.at, job.document))
        # Thumbnails are made in this order: first of what is seen first.
        wanted = (picture.thumb for job in look.jobs for picture in (*job.pictures, *job.inputs) if picture.thumb)
        look.sources = {thumb: look.sources[thumb] for thumb in wanted}
        return look

    def _show(self, look: Look, shelves: dict[str, _Shelf], found: list[_Found]) -> None:
        """Read documents into jobs, for as long as there is room."""
        known, read_bytes, shown_bytes = {}, 0, 0
        for number, one in enumerate(found):
            if read_bytes > _MOST_READ or shown_bytes > _MOST_SHOWN:
                look.note(f"{len(found) - number} older receipts and error files are not shown: they are too many")
                break
            if (read := self._read(shelves[one.door], one)) is None:
                continue
            known[one.door, one.folder, one.name] = read
            job = _job(shelves, one.door, one.folder, one.name, read)
            look.jobs.append(job)
            read_bytes += min(one.bytes, _MOST_BYTES)
            shown_bytes += len(inert(msgspec.json.encode(job)))
        self._known = known

    def _read(self, shelf: _Shelf, one: _Found) -> _Read | None:
        """Return a document or what is wrong with it; None when it is gone, or is no file."""
        status = shelf.status(one.folder, one.name)
        if status is None:
            return None
        known = self._known.get((one.door, one.folder, one.name))
        if known and known.identity == identity(status):
            return known
        return _Read(identity(status), status.st_mtime_ns, _parsed(shelf, one.folder, one.name))


class _Shelf:
    """One of the folders, and what lies in it during one look; a place that is no folder holds nothing."""

    def __init__(self, look: Look, page: str, name: str, top: str) -> None:
        self.look = look
        self._name = name
        self._top = top
        self._href = os.path.relpath(top, page) if top else ""
        self._names: dict[str, dict[str, str]] = {}
        self._inside: tuple[str, int] | None = None

    def close(self) -> None:
        """Close what is open."""
        inside, self._inside = self._inside, None
        if inside:
            os.close(inside[1])

    def enter(self, folder: str) -> int:
        """Return the descriptor of a folder, which is open until another one is entered.

        Raises:
            OSError: It is not there, may not be read, or a part of it is a link.
        """
        if self._inside is None or self._inside[0] != folder:
            self.close()
            if not self._top:
                raise FileNotFoundError
            self._inside = folder, below(self._top, folder)
        return self._inside[1]

    def href(self, folder: str, name: str) -> str:
        """Return the address of a file relative to the page."""
        return quote(os.fsencode(os.path.join(self._href, folder, name)))

    def status(self, folder: str, name: str) -> os.stat_result | None:
        """Return the status of what has a name in a folder; None when it is not there."""
        try:
            return os.stat(name, dir_fd=self.enter(folder), follow_symlinks=False)
        except (OSError, ValueError):
            return None

    def picture(self, folder: str, file: _File, names: list[str]) -> Picture:
        """Return a picture under the first of some names that is there, of the size it is said to have."""
        found = Picture(_cut(file.file), width=max(file.width, 0), height=max(file.height, 0), bytes=file.bytes)
        found.problem = f"not in the {self._name} any more" if self._top else "was not kept"
        for name in names:
            real = self._listed(folder).get(name, "")
            status = self.status(folder, real) if real else None
            if not status or status.st_size != file.bytes:
                continue
            # A browser may run what has another ending.
            usual = os.path.splitext(real)[1].lower().removeprefix(".") in IMAGE_SUFFIXES
            found.problem = (
                refusal(status, os.fstat(self.enter(folder))) if usual else "has not the name of a PNG, JPEG or WebP"
            )
            if not found.problem:
                found.href = self.href(folder, real)
                found.problem = _cut(file.problem)
                found.thumb = _thumb(found.href, status)
                self.look.sources[found.thumb] = Source(self._top, folder, real, identity(status))
                break
        return found

    def content(self, folder: str, name: str) -> bytes:
        """Return a small file.

        Raises:
            OSError: It is not there, may not be read, or is a link.
            ValueError: It is something else, the second name of a private file, or too large.
        """
        with open_at(name, self.enter(folder)) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("is larger than 256 KiB")
        return content

    def text(self, folder: str, name: str) -> str:
        """Return a text file; nothing when it is not there."""
        try:
            return self.content(folder, name).decode("utf-8-sig", "replace").strip()
        except (OSError, ValueError):
            return ""

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder, and the names of its files; not those that are hidden or links."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            path = os.path.join(self._top, folder)
            self.look.folders[path] = _changed(path)
            try:
                with os.scandir(self.enter(folder)) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                continue  # nothing was made yet, or it went in between
            except OSError as error:
                self.look.note(f"{whole(path)}: cannot be read: {error.strerror}")
                continue
            listed = [entry for entry in listed if not entry.name.startswith(".")]
            inner = [entry.name for entry in listed if entry.is_dir(follow_symlinks=False)]
            if inner and folder.count("/") + 2 > DEEPEST:
                self.look.note(f"{whole(path)}: is the {DEEPEST}th folder in a row; those in it are not shown")
                inner = []
            waiting += [os.path.join(folder, name) for name in reversed(inner)]
            yield folder, [entry.name for entry in listed]

    def _listed(self, folder: str) -> dict[str, str]:
        """Return the names in a folder, as documents write them and as they are."""
        if folder not in self._names:
            path = os.path.join(self._top, folder)
            self.look.folders.setdefault(path, _changed(path))
            try:
                self._names[folder] = {whole(name): name for name in os.listdir(self.enter(folder))}
            except OSError:
                self._names[folder] = {}
        return self._names[folder]


def _documents(shelf: _Shelf, door: str) -> Iterator[_Found]:
    for folder, names in shelf.walk():
        for name in names:
            status = shelf.status(folder, name) if name.endswith(_ENDINGS[door]) else None
            if status and stat.S_ISREG(status.st_mode):
                yield _Found(door, folder, name, status.st_mtime_ns, status.st_size)


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _parsed(shelf: _Shelf, folder: str, name: str) -> _Document | str:
    """Return a document, or what is wrong with it in words."""
    try:
        return msgspec.convert(unvouched(shelf.content(folder, name).decode()), _Document)
    except OSError as error:
        return error.strerror or "unknown error"
    except msgspec.ValidationError as error:
        return f"is none of imagewatch's: {error}"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except ValueError as error:  # not TOML, too large, no regular file
        return _cut(str(error))
    except RecursionError:
        return "is nested too deeply"


def _job(shelves: dict[str, _Shelf], door: str, folder: str, name: str, read: _Read) -> Job:
    """Return a job by its document, which lies in a folder behind a door."""
    shelf, document, base = shelves[door], read.document, name.removesuffix(_ENDINGS[door])
    made, href = door == "outbox", shelf.href(folder, name)
    if isinstance(document, str):
        told = f"{whole(name)} cannot be read: {document}"
        at = read.changed // 10**6
        return Job(made=made, name=whole(base), folder=whole(folder), document=href, unread=True, at=at, message=told)
    stem = os.path.basename(document.source).removesuffix(SUFFIX)
    # The originals of a job that failed lie beside the error file, those of one that was made in the archive.
    origin = shelves["archive" if made else "errors"]
    job = _told(document)
    job.made, job.name, job.folder, job.document = made, _cut(stem) or whole(base), whole(folder), href
    job.at = job.at or read.changed // 10**6
    job.prompt = job.prompt or _cut(shelf.text(folder, base + SUFFIX))
    job.pictures = [shelf.picture(folder, file, [file.file]) for file in document.images[:_MOST_FILES]]
    job.inputs = [
        origin.picture(folder, file, [*_kept(file.file, stem, job.job), file.file])
        for file in document.inputs[:_MOST_FILES]
    ]
    return job


def _told(document: _Document) -> Job:
    """Return what a document says, without its place and its pictures."""
    times = {name: _seconds(moment) for name, moment in document.times.items()}
    known = [value for name in ("published", "answered", "sent", "claimed") if (value := times.get(name))]
    asked = {name: value for name, value in document.request.items() if name not in {"provider", "model", "n"}}
    return Job(
        made=False,
        name="",
        document="",
        at=int(known[0] * 1000) if known else 0,
        seconds=round(max(times.get("answered", 0) - times.get("sent", 0), 0), 1) if "sent" in times else 0,
        job=_cut(document.job),
        charged=document.charged,
        credits=document.credits_charged,
        provider=_cut(document.provider or _plain(document.request.get("provider", ""))),
        model=_cut(document.model or _plain(document.request.get("model", ""))),
        prompt=_cut(document.prompt),
        asked=document.asked,
        options=_cut(", ".join(f"{name} {_plain(value)}" for name, value in asked.items())),
        message=_cut(document.message),
        problems=[_cut(problem) for problem in document.problems[:50]],
        status=document.status,
        code=_cut(document.code),
        needs=document.credits_required,
        next=_cut(document.next),
    )


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _kept(name: str, stem: str, job: str) -> list[str]:
    """Return the names that a file has when the plain one was taken, the longest first."""
    if not 0 < len(job) <= _LONGEST_ID or len(name) > _LONGEST_NAME:
        return []
    return [tagged(name, stem, tag) for tag in (job, job[:4])]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"


def _thumb(href: str, status: os.stat_result) -> str:
    """Return the name of a picture's thumbnail: another picture in its place has another one."""
    told = f"{href} {status.st_mtime_ns} {status.st_size}"
    return hashlib.blake2b(told.encode(), digest_size=12).hexdigest() + ".webp"
