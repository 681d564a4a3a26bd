"""What receipts and error files say, as values for the page. Reads the folders and changes nothing in them.

Everything that is read here may have been written by others. A document is bounded and its types are checked; a name
in it counts only inside the document's own folder; what is no regular file is not opened, links included: a page that
many people read must not show what only its writer may see.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import msgspec

from imagewatch.documents import unvouched
from imagewatch.fields import shown
from imagewatch.names import NAME_MAX, SUFFIX, tagged
from imagewatch.text import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config import Folders

_ENDINGS = {"outbox": ".receipt.toml", "errors": ".error.toml"}
_MOST_BYTES = 256 << 10
"""Of a document, or of a prompt that has no document with its text."""
_MOST_CHARACTERS = 4000
"""Of one text on the page, so that a few giants do not make it slow; the documents have all of it."""
_MOST_FILES = 50
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
        sources: For each thumbnail that is wanted, by its name, the path of the picture.
        notes: What could not be read, in words.
        folders: Modification time of each folder that was read, taken before; in nanoseconds.
    """

    jobs: list[Job] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)

    def outdated(self) -> bool:
        """Tell whether something came or went in one of the folders since."""
        return any(_changed(folder) != then for folder, then in self.folders.items())


@dataclass(frozen=True)
class _Read:
    """A document as it was read, or what is wrong with it in words; and the file's time and size."""

    identity: tuple[int, int]
    document: _Document | str


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
        self._known: dict[str, _Read] = {}

    def look(self) -> Look:
        """Return what is there now; what cannot be read is noted and passed over."""
        look, known = Look(), {}
        shelves = {name: _Shelf(look, self._page, name, top) for name, top in self._tops.items()}
        for door, ending in _ENDINGS.items():
            for folder, names in _walk(self._tops[door], look):
                for name in names:
                    path = os.path.join(self._tops[door], folder, name)
                    if name.endswith(ending) and (read := self._read(path)):
                        known[path] = read
                        look.jobs.append(_job(shelves, door, folder, name, read))
        self._known = known
        look.jobs.sort(key=lambda job: (-job.at, job.document))
        return look

    def _read(self, path: str) -> _Read | None:
        """Return a document or what is wrong with it; None when it is gone, or is no file."""
        status = _regular(path)
        if status is None:
            return None
        identity = (status.st_mtime_ns, status.st_size)
        known = self._known.get(path)
        return known if known and known.identity == identity else _Read(identity, _parsed(path))


class _Shelf:
    """One of the folders, and what lies in it during one look; a place that is no folder holds nothing."""

    def __init__(self, look: Look, page: str, name: str, top: str) -> None:
        self.look = look
        self._name = name
        self._top = top
        self._href = os.path.relpath(top, page) if top else ""
        self._names: dict[str, dict[str, str]] = {}

    def href(self, folder: str, name: str) -> str:
        """Return the address of a file relative to the page."""
        return quote(os.fsencode(os.path.join(self._href, folder, name)))

    def picture(self, folder: str, file: _File, names: list[str]) -> Picture:
        """Return a picture under the first of some names that is there, of the size it is said to have."""
        found = Picture(_cut(file.file), width=max(file.width, 0), height=max(file.height, 0), bytes=file.bytes)
        for name in names if self._top else ():
            real = self._listed(folder).get(name, "")
            path = os.path.join(self._top, folder, real)
            status = _regular(path) if real else None
            if status and status.st_size == file.bytes:
                found.href = self.href(folder, real)
                found.problem = _cut(file.problem)
                found.thumb = _thumb(found.href, status)
                self.look.sources[found.thumb] = path
                return found
        found.problem = f"not in the {self._name} any more" if self._top else "was not kept"
        return found

    def text(self, folder: str, name: str) -> str:
        """Return the beginning of a text file; nothing when it is not there."""
        try:
            return _bytes(os.path.join(self._top, folder, name)).decode("utf-8-sig", "replace").strip()
        except (OSError, ValueError):
            return ""

    def _listed(self, folder: str) -> dict[str, str]:
        """Return the names in a folder, as documents write them and as they are."""
        if folder not in self._names:
            path = os.path.join(self._top, folder)
            self.look.folders.setdefault(path, _changed(path))
            try:
                self._names[folder] = {whole(name): name for name in os.listdir(path)}
            except OSError:
                self._names[folder] = {}
        return self._names[folder]


def opened(path: str) -> int:
    """Open a regular file and nothing else; return its descriptor.

    Raises:
        OSError: It is not there, may not be read, or is a link.
        ValueError: It is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is no regular file")
    return descriptor


def _walk(top: str, look: Look) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a top one, and the names of its files; not those that are hidden or links."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(top, folder)
        look.folders[path] = _changed(path)
        try:
            with os.scandir(path) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # nothing was made yet, or it went in between
        except OSError as error:
            look.notes.append(f"{whole(path)}: cannot be read: {error.strerror}")
            continue
        listed = [entry for entry in listed if not entry.name.startswith(".")]
        inner = [entry.name for entry in listed if entry.is_dir(follow_symlinks=False)]
        waiting += [os.path.join(folder, name) for name in reversed(inner)]
        yield folder, [entry.name for entry in listed]


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _regular(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _bytes(path: str) -> bytes:
    with open(opened(path), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError("is larger than 256 KiB")
    return content


def _parsed(path: str) -> _Document | str:
    """Return a document, or what is wrong with it in words."""
    try:
        return msgspec.convert(unvouched(_bytes(path).decode()), _Document)
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
        at = read.identity[0] // 10**6
        return Job(made=made, name=whole(base), folder=whole(folder), document=href, at=at, message=told)
    stem = os.path.basename(document.source).removesuffix(SUFFIX)
    # The originals of a job that failed lie beside the error file, those of one that was made in the archive.
    origin = shelves["archive" if made else "errors"]
    job = _told(document)
    job.made, job.name, job.folder, job.document = made, _cut(stem) or whole(base), whole(folder), href
    job.at = job.at or read.identity[0] // 10**6
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
