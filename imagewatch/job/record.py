"""The record of one job: its row in the journal, and the files of its responses in the state folder.

::

    state/answers/ID.answer.N.part   a response while it arrives
                  ID.answer.N        the response                        renamed before it is read
                  ID.answer.image.K  image K of a paid response          decoded while it arrives
                  ID.image.K         image K of it, decoded afterwards
                  ID.fetched.K       image K of it, downloaded
                  ID.raw             a paid response without a readable image, as it is published

``endpoint/saved_answer`` describes the file of a response.
"""

from __future__ import annotations

import contextlib
import os
import re
from secrets import token_hex
from typing import IO, TYPE_CHECKING

from msgspec.structs import replace

from imagewatch.endpoint.frames import image_name
from imagewatch.endpoint.saved_answer import Answer, Sink, save_part
from imagewatch.journal.row import AttemptRow, JobRow, Row
from imagewatch.protocol.values import Claim, Decision, Head, Sent, Tail, load
from imagewatch.system.disk_errors import disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.journal.journal import Journal
    from imagewatch.journal.prices import Asked
    from imagewatch.protocol.reasons import Reason
    from imagewatch.system.disk import Disk
    from imagewatch.system.errors import SpoolError

_LINE_BYTES = 64 * 1024
_RESPONSE = re.compile(r"answer\.([1-9][0-9]{0,8})(?:\.part)?")


def attempt_of(name: str) -> int:
    """Return the number of the attempt whose response, or its beginning, has this name; 0: it is another file.

    Args:
        name: Of a file of a job, without the id.
    """
    match = _RESPONSE.fullmatch(name)
    return int(match[1]) if match else 0


class Record:
    """What is recorded of one job. One worker at a time uses it.

    Args:
        journal: The journal.
        disk: The local disk.
        folder: The folder of all saved responses.
        job: The id of the job.
        prepare: Sets mode and group of the file of an image, by its descriptor, before anything is written to it.
    """

    def __init__(
        self,
        journal: Journal,
        disk: Disk,
        folder: str,
        job: str,
        prepare: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._journal = journal
        self._disk = disk
        self._folder = folder
        self._row: JobRow | None = None
        self._is_read = False
        self._unwritten: Claim | None = None
        self._answers: dict[int, Answer] = {}
        self._prepare = prepare
        self.job = job

    def path(self, name: str) -> str:
        """Return the path of a file of this job."""
        return os.path.join(self._folder, f"{self.job}.{name}")

    # The row

    @property
    def row(self) -> JobRow | None:
        """What the journal holds of the job; None if it is over, or not known.

        Raises:
            SpoolError: The journal cannot be read.
        """
        if not self._is_read:
            self._row, self._is_read = self._journal.job(self.job), True
        return self._row

    def read_again(self) -> None:
        """Ask the journal when the row is needed next."""
        self._is_read = False

    def _changed(self, **changes: object) -> None:
        if self._row is not None:
            self._row = replace(self._row, **changes)

    def begin(self, claim: Claim) -> None:
        """Write down what is about to be claimed; see ``Journal.claim``."""
        self._journal.claim(claim)
        self.expect(claim)
        self._unwritten = None

    def expect(self, claim: Claim) -> None:
        """Have what is about to be claimed written down together with its first attempt."""
        self._row, self._is_read, self._unwritten = JobRow(claim=claim, state="open"), True, claim

    def take(self, claim: Claim) -> None:
        """Use what the journal has of a job that was taken just now."""
        self._row, self._is_read = JobRow(claim=claim, state="open"), True

    def claim(self) -> Claim | None:
        """Return what was claimed, or None if the job is over or not known."""
        return self.row.claim if self.row else None

    def attempts(self) -> tuple[int, int]:
        """Return the number of the newest attempt that may have left, and of the newest with a response; 0 without."""
        attempts = self.row.attempts if self.row else ()
        for known in reversed(attempts):
            if known.outcome == "busy" or self.has_answer(known.number):
                return attempts[-1].number, known.number
        return (attempts[-1].number if attempts else 0), 0

    def made(self) -> int:
        """Return how many attempts were made."""
        return len(self.row.attempts) if self.row else 0

    def attempt(self, number: int) -> AttemptRow | None:
        """Return an attempt that may have left, or None."""
        return next((one for one in (self.row.attempts if self.row else ()) if one.number == number), None)

    def next_attempt(self) -> tuple[int, str]:
        """Return number and nonce of the next attempt."""
        return (self.row.highest if self.row else 0) + 1, token_hex(8)

    def spend(self, row: Row, sent: Sent, asked: Asked, *, skip_repeated: bool) -> Reason | None:
        """Spend the right to send an attempt; see ``Journal.spend``."""
        refusal = self._journal.spend(row, asked, skip_repeated=skip_repeated, claim=self._unwritten)
        self._unwritten = None
        if refusal is None and self._row is not None:
            known = AttemptRow(number=row.attempt, outcome="sent", nonce=row.nonce, sent=sent)
            self._changed(attempts=(*self._row.attempts, known), highest=row.attempt)
        return refusal

    def take_back(self, attempt: int, nonce: str) -> None:
        """Note that no byte of an attempt of this process left; it never will."""
        self._journal.unsent(self.job, attempt, nonce)
        self._disk.unlink(self.path(f"answer.{attempt}.part"))
        if self._row is not None:
            self._changed(attempts=tuple(one for one in self._row.attempts if one.number != attempt))

    def write(self, row: Row, *, synced: bool) -> None:
        """Write the result of an attempt; see ``Journal.record``."""
        self._journal.record(row, synced=synced)
        self._note(row)

    def _note(self, row: Row) -> None:
        if self._row is not None:
            attempts = self._row.attempts
            known = tuple(replace(one, outcome=row.outcome) if one.number == row.attempt else one for one in attempts)
            self._changed(attempts=known)

    def decide(self, decision: Decision, row: Row | None = None, *, repeated: str = "") -> None:
        """Write how the job ends, with the result of its last attempt; see ``Journal.decide``."""
        assert self.row is not None
        self._journal.decide(self.row.claim, decision, row, repeated=repeated)
        if row is not None:
            self._note(row)
        self._changed(state="decided", decision=decision)

    def decision(self) -> Decision | None:
        """Return how the job ends, or None while that is open."""
        return self.row.decision if self.row else None

    def restore(self, claim: Claim, row: Row) -> None:
        """Write again what is not in the journal any more, because another one is used since the request was sent."""
        self._journal.restore(claim, row)
        self.read_again()

    def mark_over(self) -> None:
        """Note that the result file is published: if a reader removes it immediately, it is not published again."""
        self._journal.set_state(self.job, "published")
        self._changed(state="published")

    def await_name(self) -> None:
        """Note that the job goes back as soon as a newer file of the same name has left the inbox."""
        if self.row is not None and self.row.state == "open":
            self._journal.set_state(self.job, "returning")
            self._changed(state="returning")

    def reclaimed(self) -> None:
        """Note that the originals of a reopened job are in its claim again."""
        self._journal.reclaimed(self.job)
        self.read_again()

    def keep(self) -> None:
        """Keep the record and the responses of a job that gave no image, for ``imagewatch retry``."""
        for name in self.names():
            if not name.startswith("answer."):
                self._disk.unlink(self.path(name))
        self._journal.keep(self.job)
        self.read_again()

    def remove(self, *, is_unknown: bool = False, is_late: bool = False) -> None:
        """Note that nothing is left of the job, then remove its responses.

        If it is not decided how the job ended, only they show that its requests were free.

        Args:
            is_unknown: Whether another daemon may still find out how it ended.
            is_late: Whether a response came after that was decided: the responses stay.
        """
        synced = self.row is not None and self.row.decision is None and bool(self.row.attempts)
        self._journal.finish(self.job, synced=synced, is_unknown=is_unknown)
        self._row, self._is_read = None, True
        for name in () if is_late else self.names():
            self._disk.unlink(self.path(name))

    # The files

    def names(self) -> list[str]:
        """Return the names of its files, without the id."""
        prefix = f"{self.job}."
        with disk_errors(self._folder, "read"), contextlib.suppress(FileNotFoundError):
            return [name[len(prefix) :] for name in self._disk.tops.names(self._folder) if name.startswith(prefix)]
        return []

    def responses(self) -> list[int]:
        """Return the numbers of the attempts of which there is a response here, or the beginning of one."""
        found = []
        for name in self.names():
            if number := attempt_of(name):
                with disk_errors(self.path(name), "check the file"):
                    if self._disk.tops.lstat(self.path(name)).st_size:
                        found.append(number)
        return found

    def has_answer(self, attempt: int) -> bool:
        """Return whether the response of an attempt is saved.

        A power cut can leave its name without its content, as that is synced only if the result is not.
        """
        path = self.path(f"answer.{attempt}")
        if attempt in self._answers:
            return True
        if not self._disk.tops.exists(path):
            return False
        with disk_errors(path, "read"), self._open(path) as file:
            return bool(file.read(_LINE_BYTES).strip(b"\0"))

    def sink(
        self,
        attempt: int,
        restore: Callable[[], object] = lambda: None,
        on_error: Callable[[SpoolError], object] = lambda _: None,
    ) -> Sink:
        """Return where the response of an attempt goes; the arguments are those of a ``Sink``."""
        path = self.path(f"answer.{attempt}")
        return Sink(
            self._disk,
            path,
            restore,
            on_error,
            image_path=self._image_path,
            prepare=self._prepare,
            defers_sync=True,
        )

    def sync_names(self) -> None:
        """Make the names of the files durable that were made of a response."""
        self._disk.sync_folder(self._folder)

    def make_folder(self) -> None:
        """Make the folder of responses again, if it was removed."""
        self._disk.make_folder(self._folder)
        self._disk.sync_folder(os.path.dirname(self._folder))

    def answer(self, attempt: int) -> Answer:
        """Return the saved response of an attempt. A file of this name never changes."""
        if attempt not in self._answers:
            self._answers[attempt] = Answer(self.path(f"answer.{attempt}"), self._disk.tops, self._image_path)
        return self._answers[attempt]

    def partial(self, attempt: int) -> Head | None:
        """Return how the response began that was arriving when the process died, or None."""
        path = self.path(f"answer.{attempt}.part")
        with disk_errors(path, "read"), contextlib.suppress(FileNotFoundError, ValueError), self._open(path) as file:
            line = file.readline(_LINE_BYTES)
            return load(line, Head) if line.endswith(b"\n") else None
        return None

    def _open(self, path: str) -> IO[bytes]:
        return open(self._disk.tops.open_file(path, os.O_RDONLY), "rb")

    def save_partial(self, attempt: int, tail: Tail) -> None:
        """Save the part of a response that arrived; if only its name was missing, it is complete."""
        save_part(self._disk, self.path(f"answer.{attempt}"), tail, self._image_path)

    def _image_path(self, number: int) -> str:
        return self.path(image_name(number))
