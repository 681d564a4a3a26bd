"""Finds the receipts and error files of dropped prompts. It only reads the folders."""

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
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from imagewatch.config.schema import Folders

_MOST_BYTES = 4 << 20
"""Of a result file."""
_LIST_SECONDS = 5.0
"""A folder whose mtime has not changed is listed again after this time: some file systems show a change late."""
_REST = 4.0
"""After a listing, the folder is not listed for this many times as long: four seconds after one that took a second."""
_MOST_TAGS = 2
"""Parts that a result's name may get between base name and ending if the plain name exists."""

_Identity = tuple[str, int, int]


@dataclass
class Result:
    """A dropped prompt and its result.

    Attributes:
        source: Path of the prompt below the inbox.
        prompt: Its text.
        destination: ``outbox`` or ``errors`` once the job has ended, else empty.
        result_file: Path of the receipt or error file.
        images: Paths of the images.
        facts: The keys of the result file.
    """

    source: str
    prompt: str
    destination: str = ""
    result_file: str = ""
    images: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def is_from(self, facts: dict[str, Any]) -> bool:
        """Return whether a result file is about this prompt, and not about an earlier one of its name."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()
        return facts.get("source") == whole(self.source) and facts.get("prompt_sha256", digest) == digest


@dataclass
class _Place:
    """A folder in which result files appear.

    Attributes:
        destination: ``outbox`` or ``errors``.
        path: The folder.
        ending: How the names of result files end.
        stamp: Its mtime when it was last listed, nanoseconds since the epoch.
        listed_at: When that was, by the monotonic clock, seconds.
        rests_until: When it may be listed again.
    """

    destination: str
    path: str
    ending: str
    stamp: int = 0
    listed_at: float = -_LIST_SECONDS
    rests_until: float = 0.0

    def names(self) -> list[str]:
        """Return the names of all result files; nothing while the folder has not changed."""
        began = time.monotonic()
        if began < self.rests_until:
            return []
        try:
            stamp = os.stat(self.path).st_mtime_ns  # before the listing: what appears in between is found next time
            if stamp == self.stamp and began - self.listed_at < _LIST_SECONDS:
                return []
            names = [name for name in os.listdir(self.path) if name.endswith(self.ending)]
        except FileNotFoundError:
            return []  # not created yet
        self.stamp, self.listed_at = stamp, began
        self.rests_until = began + (1 + _REST) * (time.monotonic() - began)
        return names


class Waiting:
    """Waits for the result files of prompts in one folder.

    It is created before the prompts are dropped, so that older result files of their names are not taken for theirs.

    Args:
        folders: Inbox, outbox and errors.
        folder: The folder below the inbox that the prompts are dropped into.
        stems: Their base names.

    Raises:
        SpoolError: This user may not read the outbox or the errors folder.
    """

    def __init__(self, folders: Folders, folder: str, stems: Sequence[str]) -> None:
        self._inbox = folders.inbox
        self._jobs: dict[str, Result] = {}
        self._places = (
            _Place("outbox", os.path.join(folders.outbox, folder), RECEIPT),
            _Place("errors", os.path.join(folders.errors, folder), ERROR),
        )
        self._known: set[_Identity] = set()
        self._over: set[str] = set()
        for place in self._places:
            try:
                with disk_errors(place.path, "list the results"):
                    for path, identity in _result_files(place, frozenset(stems)):
                        self._known.add(identity)
                        self._over |= _job_in(path)
            except SpoolError as error:
                if error.code == errno.EACCES:
                    error.hint = refusal(place.path, os.R_OK | os.X_OK)
                raise
            place.stamp = 0

    def expect(self, job: Result) -> None:
        """Note a prompt that is in the inbox now."""
        self._jobs[os.path.basename(job.source)[: -len(SUFFIX)]] = job

    def refresh(self) -> list[Result]:
        """Read new result files; return the prompts that have none yet.

        Raises:
            SpoolError: This user may not read a result.
        """
        for place in self._places:
            left = {stem: job for stem, job in self._jobs.items() if not job.destination}
            with contextlib.suppress(OSError):  # a share that is not reachable for a moment
                for path, identity in list(_result_files(place, left)) if left else ():
                    if identity not in self._known:
                        self._read(place, path, identity, left)
        return [job for job in self._jobs.values() if not job.destination]

    def unclaimed(self) -> int:
        """Return how many prompts are still in the inbox."""
        return sum(os.path.lexists(os.path.join(self._inbox, job.source)) for job in self._jobs.values())

    def _read(self, place: _Place, path: str, identity: _Identity, left: dict[str, Result]) -> None:
        facts = read_facts(path)
        if facts is None:
            place.stamp = 0  # list the folder again
            return
        self._known.add(identity)
        if str(facts.get("job")) in self._over:
            return
        for job in left.values():
            if job.is_from(facts):
                job.destination, job.result_file, job.facts = place.destination, path, facts
                job.images = [os.path.join(place.path, name) for name in image_names(facts)]


def _result_files(place: _Place, stems: Collection[str]) -> Iterator[tuple[str, _Identity]]:
    """Yield path and identity of what may be the result file of one of these prompts, if the folder has changed."""
    for name in place.names():
        if may_be_of(name[: -len(place.ending)], stems):
            path = os.path.join(place.path, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                yield path, (path, status.st_ino, status.st_ctime_ns)


def may_be_of(base: str, stems: Collection[str]) -> bool:
    """Return whether a result file may belong to one of these prompts. If its name existed, the job's id is in it."""
    for _ in range(_MOST_TAGS + 1):
        if base in stems:
            return True
        base, dot, _ = base.rpartition(".")
        if not dot:
            return False
    return False


def read_facts(path: str) -> dict[str, Any] | None:
    """Return the keys of a result file: none if it is not one of ours, None if it cannot be read at the moment."""
    try:
        with open_file(path) as file:
            return unvouched(file.read(_MOST_BYTES).decode())
    except RefusedError:
        return {}
    except PermissionError:
        hint = "the daemon processes the prompts anyway; ask the administrator to check outbox.file_mode"
        raise SpoolError(f"permission denied: {printable(path)}", path=path, hint=hint) from None
    except OSError:
        return None
    except (ValueError, RecursionError):
        return {}


def _job_in(path: str) -> set[str]:
    """Return the id of the job that an older result file is about.

    A backup, a ``chmod`` or a copy makes that file look new, and its job must not be taken for a later one.
    """
    with contextlib.suppress(SpoolError):  # another sender's, which this user may not read
        job = (read_facts(path) or {}).get("job")
        return {job} if isinstance(job, str) else set()
    return set()


def image_names(facts: dict[str, Any]) -> list[str]:
    """Return the file names of the images; what else the response had is in the result file only."""
    tables = facts.get("images")
    found = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    return [os.path.basename(str(t.get("file"))) for t in found if str(t.get("mime")).startswith("image/")]
