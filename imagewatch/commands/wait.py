"""What became of prompts that were dropped: waiting for receipts and error files, by looking at the folders only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagewatch.config.locate import refusal
from imagewatch.job.receipts import unvouched
from imagewatch.protocol.names import SUFFIX
from imagewatch.system.disk_errors import ours
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from imagewatch.config.load import Folders

_MOST_DOCUMENT = 4 << 20
_LIST_SECONDS = 5.0
"""A folder whose mtime stands still is listed again after this time: some file systems are slow to show theirs."""
_REST = 4.0
"""A list that took a second is followed by four seconds without one."""
_MOST_TAGS = 2
"""Parts that a name may get between stem and ending where names are taken."""

_Identity = tuple[str, int, int]


@dataclass
class Made:
    """What became of a prompt.

    Attributes:
        source: Its path below the inbox.
        prompt: Its text.
        door: ``outbox`` or ``errors`` once it is over, else empty.
        document: Path of the receipt or error file.
        images: Paths of the pictures.
        facts: What the document says.
    """

    source: str
    prompt: str
    door: str = ""
    document: str = ""
    images: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def is_told_by(self, document: dict[str, Any]) -> bool:
        """Tell whether a document is about this prompt, and not about an earlier one of its name."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()
        return document.get("source") == whole(self.source) and document.get("prompt_sha256", digest) == digest


@dataclass
class _Place:
    """A folder in which documents appear.

    Attributes:
        door: ``outbox`` or ``errors``.
        path: The folder.
        ending: How the names of documents end.
        stamp: Its mtime when it was last listed, nanoseconds since the epoch.
        listed_at: When that was, by the monotonic clock, seconds.
        rests_until: When it may be listed again.
    """

    door: str
    path: str
    ending: str
    stamp: int = 0
    listed_at: float = -_LIST_SECONDS
    rests_until: float = 0.0

    def names(self) -> list[str]:
        """Return the names of all documents; nothing while the folder has not changed."""
        began = time.monotonic()
        if began < self.rests_until:
            return []
        try:
            stamp = os.stat(self.path).st_mtime_ns  # before the list: what comes in between is seen next time
            if stamp == self.stamp and began - self.listed_at < _LIST_SECONDS:
                return []
            names = [name for name in os.listdir(self.path) if name.endswith(self.ending)]
        except FileNotFoundError:
            return []  # not made yet
        self.stamp, self.listed_at = stamp, began
        self.rests_until = began + (1 + _REST) * (time.monotonic() - began)
        return names


class Waiting:
    """Waits for the documents of prompts in one folder.

    It is made before the prompts are dropped, so that older documents of their names are not taken for theirs.

    Args:
        folders: Where they appear.
        folder: The folder below the inbox that the prompts are dropped into.
        stems: Their names.

    Raises:
        SpoolError: This user may not look into the outbox or the errors folder.
    """

    def __init__(self, folders: Folders, folder: str, stems: Sequence[str]) -> None:
        self._inbox = folders.inbox
        self._jobs: dict[str, Made] = {}
        self._places = (
            _Place("outbox", os.path.join(folders.outbox, folder), ".receipt.toml"),
            _Place("errors", os.path.join(folders.errors, folder), ".error.toml"),
        )
        self._known: set[_Identity] = set()
        self._over: set[str] = set()
        for place in self._places:
            try:
                with ours(place.path, "look for results"):
                    for path, identity in _documents(place, frozenset(stems)):
                        self._known.add(identity)
                        self._over |= _job_in(path)
            except SpoolError as error:
                if error.code == errno.EACCES:
                    error.hint = refusal(place.path, os.R_OK | os.X_OK)
                raise
            place.stamp = 0

    def expect(self, job: Made) -> None:
        """Note a prompt that is in the inbox now."""
        self._jobs[os.path.basename(job.source)[: -len(SUFFIX)]] = job

    def look(self) -> list[Made]:
        """Look once; return what is not over yet.

        Raises:
            SpoolError: This user may not read a result.
        """
        for place in self._places:
            left = {stem: job for stem, job in self._jobs.items() if not job.door}
            with contextlib.suppress(OSError):  # a share that is away for a moment
                for path, identity in list(_documents(place, left)) if left else ():
                    if identity not in self._known:
                        self._read(place, path, identity, left)
        return [job for job in self._jobs.values() if not job.door]

    def untouched(self) -> int:
        """Return how many prompts still lie in the inbox."""
        return sum(os.path.lexists(os.path.join(self._inbox, job.source)) for job in self._jobs.values())

    def _read(self, place: _Place, path: str, identity: _Identity, left: dict[str, Made]) -> None:
        document = _document(path)
        if document is None:
            place.stamp = 0  # look at it again
            return
        self._known.add(identity)
        if str(document.get("job")) in self._over:
            return
        for job in left.values():
            if job.is_told_by(document):
                job.door, job.document, job.facts = place.door, path, document
                job.images = [os.path.join(place.path, name) for name in _pictures(document)]


def _documents(place: _Place, stems: Collection[str]) -> Iterator[tuple[str, _Identity]]:
    """Yield path and identity of what may be the document of one of these prompts, if the folder has changed."""
    for name in place.names():
        if _may_be_of(name[: -len(place.ending)], stems):
            path = os.path.join(place.path, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                yield path, (path, status.st_ino, status.st_ctime_ns)


def _may_be_of(base: str, stems: Collection[str]) -> bool:
    """Tell whether a document may be one of these prompts': a name that is taken gets the job's id in it."""
    for _ in range(_MOST_TAGS + 1):
        if base in stems:
            return True
        base, dot, _ = base.rpartition(".")
        if not dot:
            return False
    return False


def _document(path: str) -> dict[str, Any] | None:
    """Return what a document says: nothing if it is a stranger's, None if it cannot be read at the moment."""
    try:
        with open_file(path) as file:
            return unvouched(file.read(_MOST_DOCUMENT).decode())
    except RefusedError:
        return {}
    except PermissionError:
        hint = "outbox.file_mode and the folder's group decide who may; the prompts go on without you"
        raise SpoolError(f"{printable(path)}: this user may not read it", path=path, hint=hint) from None
    except OSError:
        return None
    except (ValueError, RecursionError):
        return {}


def _job_in(path: str) -> set[str]:
    """Return the id of the job that an older document is about.

    A backup, a ``chmod`` or a copy makes that document look new, and its job must not be taken for a later one.
    """
    with contextlib.suppress(SpoolError):  # it may be somebody else's, whose results are none of ours
        job = (_document(path) or {}).get("job")
        return {job} if isinstance(job, str) else set()
    return set()


def _pictures(document: dict[str, Any]) -> list[str]:
    """Return the names of the pictures; whatever else came is in the document only."""
    tables = document.get("images")
    found = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    return [os.path.basename(str(t.get("file"))) for t in found if str(t.get("mime")).startswith("image/")]
