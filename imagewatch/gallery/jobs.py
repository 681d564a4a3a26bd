"""Jobs out of the folders: which result files there are, and where their images and originals are.

The folders are read, and nothing in them is changed. Other people may have written everything in them: what is read is
bounded, and what cannot be read becomes a note or a problem on the page.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from imagewatch.gallery.folders import MOST_BYTES, Scan, Tree, identity
from imagewatch.gallery.page import inert
from imagewatch.gallery.result_files import ResultFile, cut, image_of, job_of, parsed, set_prompt
from imagewatch.gallery.values import Job
from imagewatch.protocol.names import ERROR, NAME_MAX, RECEIPT, SUFFIX, tagged
from imagewatch.system.text import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Folders

_ENDINGS = {"outbox": RECEIPT, "errors": ERROR}
_MOST_FILES = 50
_MOST_READ = 128 << 20
"""Of all result files, bytes, the newest first, so that a flood of them does not keep the page from being written."""
_MOST_SHOWN = 16 << 20
"""Of all jobs on the page, bytes; usually 500 for one job."""
_LONGEST_ID = 64
_LONGEST_NAME = 6 * NAME_MAX
"""Of a file, characters: a byte that is not UTF-8 is written with six."""


@dataclass(frozen=True)
class _Read:
    """A result file as it was read, or what is wrong with it in words; and what distinguishes it from others."""

    identity: tuple[int, ...]
    changed: int
    content: ResultFile | str


@dataclass(frozen=True)
class _Found:
    """A result file that was not read yet."""

    destination: str
    folder: str
    name: str
    changed: int
    bytes: int


class Reader:
    """Scans the folders; reads each result file again only if it has changed.

    Args:
        folders: Outbox, errors and archive.
        page: Folder of the page; addresses are relative to it.
    """

    def __init__(self, folders: Folders, page: str) -> None:
        archive = folders.archive if folders.archive != "delete" else ""
        self._tops = {"outbox": folders.outbox, "errors": folders.errors, "archive": archive}
        self._page = page
        self._known: dict[tuple[str, str, str], _Read] = {}

    def scan(self) -> Scan:
        """Return what is there now; what cannot be read is noted and skipped."""
        scan = Scan()
        trees = {name: Tree(scan, self._page, name, top) for name, top in self._tops.items()}
        found = [one for destination in _ENDINGS for one in _result_files(trees[destination], destination)]
        found.sort(key=lambda one: -one.changed)
        self._read_jobs(scan, trees, found)
        scan.jobs.sort(key=lambda job: (-job.at, job.result_file))
        # Thumbnails are made in this order: those at the top of the page first.
        wanted = (image.thumb for job in scan.jobs for image in (*job.images, *job.inputs) if image.thumb)
        scan.sources = {thumb: scan.sources[thumb] for thumb in wanted}
        return scan

    def _read_jobs(self, scan: Scan, trees: dict[str, Tree], found: list[_Found]) -> None:
        """Read result files into jobs, for as long as there is room."""
        known, read_bytes, shown_bytes = {}, 0, 0
        for number, one in enumerate(found):
            if read_bytes > _MOST_READ or shown_bytes > _MOST_SHOWN:
                scan.note(f"{len(found) - number} older receipts and error files are not shown: there are too many")
                break
            if (read := self._read(trees[one.destination], one)) is None:
                continue
            known[one.destination, one.folder, one.name] = read
            job = _job(trees, one, read)
            scan.jobs.append(job)
            read_bytes += min(one.bytes, MOST_BYTES)
            shown_bytes += len(inert(msgspec.json.encode(job)))
        self._known = known

    def _read(self, tree: Tree, one: _Found) -> _Read | None:
        """Return a result file or what is wrong with it; None if it was removed."""
        status = tree.status(one.folder, one.name)
        if status is None:
            return None
        known = self._known.get((one.destination, one.folder, one.name))
        if known and known.identity == identity(status):
            return known
        return _Read(identity(status), status.st_mtime_ns, _content(tree, one))


def _content(tree: Tree, one: _Found) -> ResultFile | str:
    try:
        return parsed(tree.content(one.folder, one.name))
    except OSError as error:
        return error.strerror or "unknown error"
    except ValueError as error:
        return str(error)


def _result_files(tree: Tree, destination: str) -> Iterator[_Found]:
    for folder, names in tree.walk():
        for name in names:
            status = tree.status(folder, name) if name.endswith(_ENDINGS[destination]) else None
            if status and stat.S_ISREG(status.st_mode):
                yield _Found(destination, folder, name, status.st_mtime_ns, status.st_size)


def _job(trees: dict[str, Tree], one: _Found, read: _Read) -> Job:
    tree, content, base = trees[one.destination], read.content, one.name.removesuffix(_ENDINGS[one.destination])
    folder, is_completed, href = whole(one.folder), one.destination == "outbox", tree.href(one.folder, one.name)
    if isinstance(content, str):
        message = f"{whole(one.name)} cannot be read: {content}"
        at = read.changed // 10**6
        return Job(
            completed=is_completed,
            name=whole(base),
            folder=folder,
            result_file=href,
            unreadable=True,
            at=at,
            message=message,
        )
    stem = os.path.basename(content.source).removesuffix(SUFFIX)
    # The originals of a failed job are beside the error file, those of a completed one in the archive.
    origin = trees["archive" if is_completed else "errors"]
    job = job_of(content)
    job.completed, job.name, job.folder, job.result_file = is_completed, cut(stem) or whole(base), folder, href
    job.at = job.at or read.changed // 10**6
    set_prompt(job, content.prompt or tree.prompt(one.folder, base + SUFFIX))
    job.images = [tree.image(one.folder, image_of(file), [file.file]) for file in content.images[:_MOST_FILES]]
    job.inputs = [
        origin.image(one.folder, image_of(file), [*_kept(file.file, stem, job.job), file.file])
        for file in content.inputs[:_MOST_FILES]
    ]
    return job


def _kept(name: str, stem: str, job: str) -> list[str]:
    """Return the names that a file may have if the plain name existed, the longest first."""
    if not 0 < len(job) <= _LONGEST_ID or len(name) > _LONGEST_NAME:
        return []
    return [tagged(name, stem, tag) for tag in (job, job[:4])]
