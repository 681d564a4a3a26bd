"""Jobs by name, for ``imagewatch mcp``: the same name is always the same job. Only the folders are needed.

A client that gets no response in time asks again, although the image may be paid for already. So a name is never used
for a second prompt: not while the first one waits or is in flight, and not after it is finished, failed, canceled or
archived. What is known of a name is read from the folders: the note (``name_notes``), the inbox, the result files, the
archive, and the daemon's status file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from imagewatch.commands.drop import NAMED, Delivery, SubmitRequest, folder_of
from imagewatch.commands.name_notes import Note, Notes
from imagewatch.commands.queue_state import silent_seconds
from imagewatch.commands.wait import image_names, may_be_of, read_facts
from imagewatch.config.locate import refusal
from imagewatch.protocol import notice
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX
from imagewatch.system.errors import BadRequest, ImagewatchError, Problem, SpoolError
from imagewatch.system.folders import Tops
from imagewatch.system.text import printable, whole
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from io import FileIO

    from imagewatch.commands.allowed_images import AllowedImages
    from imagewatch.config.schema import Config

State = Literal[
    "waiting", "in_progress", "completed", "failed", "canceled", "not_dropped", "results_moved", "missing", "unknown"
]
NAME: Final = "^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$"
"""What a name is. It is a part of file names, and of none of them an ending or the number of an image."""
_INTERRUPTED_SECONDS = 60.0
"""A prompt that has had its hidden name for this long is dropped by no process any more."""
_MISSING_SECONDS = 7200.0
_WRITTEN_SECONDS = 1.0
"""How much later than a claim a status is written that names it."""
"""A job takes less: the largest deadline of one request, and its attempts."""
_ATTEMPTS = 3
_MOST_PREVIEW_BYTES = 64 << 20
_USED = "an earlier request has this name"
_OTHER_NAME = "use another name; the earlier request continues unchanged"


@dataclass(frozen=True)
class Job:
    """What is known of a name.

    Attributes:
        name: The name.
        state: ``waiting`` (in the inbox), ``in_progress`` (claimed), ``completed``, ``failed``, ``canceled``,
            ``not_dropped`` (interrupted before it was dropped), ``results_moved`` (completed, and its results were
            moved or removed), ``missing`` (dropped, and in none of the folders) or ``unknown`` (never used).
        result_file: Path of the receipt or error file, or an empty string.
        images: Paths of the images.
        facts: Keys of the result file.
    """

    name: str
    state: State
    result_file: str = ""
    images: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether waiting longer changes nothing."""
        return self.state not in {"waiting", "in_progress"}


class NamedJobs:
    """The jobs of one folder of the inbox by their names.

    Args:
        config: Folders, presets and limits.
        folder: The folder below the inbox into which prompts are dropped, or an empty string.
        images: Which images may be sent.
        blind: Only the folders are known, so that presets cannot be checked.
        clock: Wall-clock time, seconds since the epoch.

    Raises:
        BadRequest: The daemon would not scan the folder.
    """

    def __init__(
        self,
        config: Config,
        folder: str,
        images: AllowedImages,
        *,
        blind: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._folder = folder_of(folder, recursive=config.inbox.recursive)
        self._images = images
        self._blind = blind
        self._clock = clock
        self._notes = Notes(config.folders.inbox, self._folder)
        # Of each prompt that waits: when the status was written before it was dropped or found, and when that was.
        self._dropped: dict[str, tuple[datetime | None, float]] = {}
        self._tops = Tops.of(config.folders.outbox)

    def create(self, name: str, text: str, options: Mapping[str, Any], images: Sequence[str]) -> Job:
        """Drop a prompt, unless its name was used; return what is known of it then.

        Args:
            name: The name.
            text: The prompt.
            options: Front matter; options that are None are not written.
            images: Paths of input images as the client names them.

        Raises:
            BadRequest: The daemon would refuse it, or the name was used for something else. Nothing was dropped.
            SpoolError: The folders cannot be read or written.
        """
        _require_name(name)
        digest = _digest(text, options, images)
        request = SubmitRequest(text.strip(), options, tuple(images))
        for _ in range(_ATTEMPTS):
            note = self._notes.read(name)
            if note is None:
                if self._drop(name, digest, request):
                    break
            elif not (self._is_interrupted(note) and self._notes.withdraw(name, note)):
                if note.request != digest:
                    reason = f"{_USED}, with another text, other options or other images"
                    raise BadRequest([Problem("name", reason, _OTHER_NAME)])
                break
        return self.find(name)

    def find(self, name: str) -> Job:
        """Return what is known of a name.

        Raises:
            BadRequest: It is not a name.
            SpoolError: A folder or a result cannot be read.
        """
        _require_name(name)
        note = self._notes.read(name)
        if note and note.is_canceled:
            return Job(name, "canceled")
        if self._notes.is_waiting(name):
            return Job(name, "waiting")
        self._dropped.pop(name, None)
        if note and self._notes.is_staged(note) is not None:
            return Job(name, "not_dropped" if self._is_interrupted(note) else "in_progress")
        return self._claimed(name, note)

    def _claimed(self, name: str, note: Note | None) -> Job:
        """Return what is known of a name whose prompt is not in the inbox."""
        status, found = self.status(), self._result(name, note)
        is_busy = self._is_in_flight(name, status)
        if found and (found.state == "completed" or not is_busy):
            return found
        if not is_busy and self._is_archived(name):
            return self._result(name, note) or Job(name, "results_moved")  # it may be published since
        if note is None and not is_busy:
            return Job(name, "unknown")
        is_old = note is not None and self._clock() - note.at > _MISSING_SECONDS
        return Job(name, "missing" if is_old and not is_busy and self._shows_all(status) else "in_progress")

    def _shows_all(self, status: notice.Notice | None) -> bool:
        """Return whether a status names all that is in flight, also what was claimed last.

        A note has the time at which its prompt was dropped; that may have waited in the inbox for days.
        """
        if status is None or status.in_flight.count > len(status.in_flight.files):
            return False
        try:
            changed = os.stat(os.path.join(self._config.folders.inbox, self._folder)).st_mtime
        except OSError:
            return False
        return status.written_at.timestamp() > changed + _WRITTEN_SECONDS

    def cancel(self, name: str) -> Job:
        """Take a prompt out of the inbox, if the daemon has not claimed it; return what is known of it then.

        Raises:
            BadRequest: No request of this name was dropped here: the prompts of others are not touched.
            SpoolError: It cannot be taken out.
        """
        _require_name(name)
        note = self._notes.read(name)
        if note is None:
            raise BadRequest([Problem("name", "no request of this name was made with this tool", "check the name")])
        if not note.is_canceled:
            self._notes.cancel(name, note)
        return self.find(name)

    def status(self) -> notice.Notice | None:
        """Return the status of a daemon that runs, or None."""
        found = self.last_status()
        return found if found and found.is_running(self._clock()) else None

    def last_status(self) -> notice.Notice | None:
        """Return what the status file in the folders says, or None if there is none that can be read."""
        folder = self._config.folders.notice
        return notice.read(folder) if folder else None

    def is_silent(self, job: Job, status: notice.Notice) -> bool:
        """Return whether a prompt waits for so long that a daemon would have written its status again, and has not.

        The clock of the daemon may be another one. So it counts since when this process knows that the prompt waits.
        """
        if job.state != "waiting":
            return False
        written_before, at = self._dropped.setdefault(job.name, (status.written_at, self._clock()))
        return status.written_at == written_before and self._clock() - at >= silent_seconds(self._config.inbox)

    def open_image(self, path: str) -> FileIO:
        """Open an image of a finished job for reading.

        Raises:
            OSError: It was moved, is not a plain file, or is too large for a preview.
        """
        return open_file(path, self._tops, most_bytes=_MOST_PREVIEW_BYTES)

    # Dropping

    def _drop(self, name: str, digest: str, request: SubmitRequest) -> bool:
        """Drop a prompt whose name was not noted; return False if another process has noted it meanwhile."""
        before = self.last_status()
        try:
            self._drop_new(
                name, digest, SubmitRequest(request.text, request.options, self._images.find(request.images))
            )
        except FileExistsError:
            return False
        except BadRequest:
            if self._notes.read(name) is None:  # else the reason may be what the other process has dropped
                raise
            return False
        self._dropped[name] = (before.written_at if before else None, self._clock())
        return True

    def _drop_new(self, name: str, digest: str, request: SubmitRequest) -> None:
        images = self._images.open
        with Delivery(self._config, self._folder, blind=self._blind, opener=images, staged=NAMED) as delivery:
            delivery.stage(request, name)
            if self._is_used(name):
                raise BadRequest([Problem("name", f"{_USED}, and was not made with this tool", _OTHER_NAME)])
            (staged,) = delivery.staged
            text = hashlib.sha256(staged.text.encode()).hexdigest()
            note = Note(
                request=digest, prompt_sha256=text, staged=staged.prompt, images=staged.images, at=self._clock()
            )
            self._notes.create(name, note)
            try:
                with contextlib.closing(delivery.place()) as placed:
                    list(placed)
            except ImagewatchError:
                try:
                    self._notes.withdraw(name, note)
                except SpoolError:
                    delivery.keep_staged()  # the hidden file shows that it was not dropped
                raise

    def _is_interrupted(self, note: Note) -> bool:
        since = self._notes.is_staged(note)
        return since is not None and not note.is_canceled and self._clock() - since > _INTERRUPTED_SECONDS

    def _is_used(self, name: str) -> bool:
        """Return whether the folders show a prompt of this name that another sender has dropped."""
        if self._notes.is_waiting(name) or self._is_archived(name) or self._result(name, None):
            return True
        return self._is_in_flight(name, self.status())

    def _is_in_flight(self, name: str, status: notice.Notice | None) -> bool:
        return status is not None and self._source(name) in {one.name for one in status.in_flight.files}

    # Reading the folders

    def _source(self, name: str) -> str:
        return os.path.join(self._folder, name + SUFFIX)

    def _is_archived(self, name: str) -> bool:
        archive = self._config.folders.archive
        return archive != "delete" and os.path.lexists(os.path.join(archive, self._source(name)))

    def _result(self, name: str, note: Note | None) -> Job | None:
        """Return the job of a receipt, else of an error file of this name; the newest if there are several."""
        places: tuple[tuple[State, str, str], ...] = (
            ("completed", self._config.folders.outbox, RECEIPT),
            ("failed", self._config.folders.errors, ERROR),
        )
        for state, top, ending in places:
            folder = os.path.join(top, self._folder)
            found = list(self._facts(folder, name, ending, note))
            if found:
                path, facts = max(found, key=lambda one: _published(one[1]))
                images = tuple(os.path.join(folder, image) for image in image_names(facts))
                return Job(name, state, path, images, facts)
        return None

    def _facts(self, folder: str, name: str, ending: str, note: Note | None) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            files = [file for file in os.listdir(folder) if file.endswith(ending) and file.startswith(name)]
        except FileNotFoundError:
            return  # not created yet
        except OSError as error:
            message = f"cannot list the folder: {error.strerror}: {printable(folder)}"
            raise SpoolError(message, path=folder, hint=refusal(folder, os.R_OK | os.X_OK)) from None
        source = whole(self._source(name))
        for file in sorted(files):
            if not may_be_of(file[: -len(ending)], {name}):
                continue
            path = os.path.join(folder, file)
            facts = read_facts(path)
            if not facts or facts.get("source") != source:
                continue
            if note is None or facts.get("prompt_sha256", note.prompt_sha256) == note.prompt_sha256:
                yield path, facts


def _require_name(name: str) -> None:
    if not re.match(NAME, name) or name.endswith("\n"):  # a pattern's $ allows one line end
        hint = "use 1 to 80 letters, digits, - and _; the first one is a letter or a digit"
        raise BadRequest([Problem("name", f'"{printable(name, 100)}" is not a name for a request', hint)])


def _published(facts: Mapping[str, Any]) -> str:
    times = facts.get("times")
    return str(times.get("published")) if isinstance(times, dict) else ""


def _digest(text: str, options: Mapping[str, Any], images: Sequence[str]) -> str:
    given = {name: value for name, value in options.items() if value is not None}
    asked = json.dumps([text.strip(), given, list(images)], sort_keys=True)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
