"""The record of one job: its folder in the state folder, with the saved responses.

::

    state/jobs/ID/claim.json      what was claimed                    written before the prompt leaves the inbox
                  sent.N          attempt N                           written before the first byte leaves
                  answer.N.part   the response while it arrives
                  answer.N        the response                        renamed before it is read
                  image.K         image K of the response, decoded or fetched
                  decision.json   destination, files and result file
                  over            the result file is published
                  reopened.json   the decision that was withdrawn, until the originals are here again

A job that was paid for and gave no image is not forgotten: its folder moves to ``paid/ID`` as it is.

The file of a response is one line of JSON (``Head``), the raw body, a line feed and one line of JSON (``Tail``).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import IO, TYPE_CHECKING, TypeVar

from imagewatch.endpoint.saved_answer import Answer, Sink, errno_of, has_tail
from imagewatch.protocol.values import Claim, Decision, Head, Sent, Tail, dump, load, load_decision
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.system.disk import Disk

T = TypeVar("T")
_LINE_BYTES = 64 * 1024
_NUMBERED = re.compile(r"(sent|answer)\.([0-9]{1,4})(\.part)?")


class Record:
    """The folder of one job in the state folder.

    Args:
        disk: The local disk.
        jobs: The folder of all records.
        job: Its id.
    """

    def __init__(self, disk: Disk, jobs: str, job: str) -> None:
        self._disk = disk
        self._jobs = jobs
        self._decision: Decision | None = None
        self._answers: dict[int, Answer] = {}
        self._sent: tuple[int, Sent] | None = None
        self.job = job
        self.folder = os.path.join(jobs, job)

    def path(self, name: str) -> str:
        """Return the path of a file of this record."""
        return os.path.join(self.folder, name)

    def begin(self, claim: Claim) -> None:
        """Write down what is about to be claimed."""
        self._disk.make_folder(self.folder)
        self._disk.write(self.path("claim.json"), dump(claim))
        self._disk.sync_folder(self._jobs)

    def claim(self) -> Claim | None:
        """Return what was claimed, or None if there is no such record."""
        return self._load("claim.json", lambda content: load(content, Claim))

    def exists(self) -> bool:
        """Return whether anything of the record is there."""
        return self._disk.tops.exists(self.folder)

    def attempts(self, names: Iterable[str] | None = None) -> tuple[int, int]:
        """Return the highest N of ``sent.N`` and of ``answer.N``, 0 without.

        Args:
            names: What ``names`` returned, if that is known.
        """
        highest = {"sent": 0, "answer": 0}
        for name in self.names() if names is None else names:
            if (match := _NUMBERED.fullmatch(name)) and not match[3]:
                highest[match[1]] = max(highest[match[1]], int(match[2]))
        return highest["sent"], highest["answer"]

    def write_sent(self, attempt: int, sent: Sent) -> None:
        """Write down an attempt; it may leave when this returns, and does not leave when this fails."""
        path = self.path(f"sent.{attempt}")
        try:
            self._disk.write(path, dump(sent))
        except SpoolError:
            # Its name may be there already, and would mean that its charge is unknown.
            with contextlib.suppress(SpoolError):
                self._disk.unlink(path)
            raise
        self._sent = attempt, sent

    def sent(self, attempt: int) -> Sent | None:
        """Return what was sent, or None."""
        if self._sent and self._sent[0] == attempt:
            return self._sent[1]
        return self._load(f"sent.{attempt}", lambda content: load(content, Sent)) if attempt else None

    def take_back(self, attempt: int) -> None:
        """Remove the mark of an attempt of which no byte left, durably: as if it had never been sent."""
        if not self.exists():
            return
        for name in (f"answer.{attempt}.part", f"sent.{attempt}"):
            self._disk.unlink(self.path(name))
        self._disk.sync_folder(self.folder)
        self._sent = None

    def restore(self, claim: Claim, attempt: int, sent: Sent) -> None:
        """Write again what was removed while a request was in flight; what is there stays."""
        if not self._disk.tops.exists(self.path("claim.json")):
            self._disk.make_folder(self._jobs)
            self._disk.sync_folder(os.path.dirname(self._jobs))
            self.begin(claim)
        if not self._disk.tops.exists(self.path(f"sent.{attempt}")):
            self.write_sent(attempt, sent)

    def sink(
        self,
        attempt: int,
        restore: Callable[[], object] = lambda: None,
        on_error: Callable[[SpoolError], object] = lambda _: None,
    ) -> Sink:
        """Return where the response of an attempt goes; the arguments are those of a ``Sink``."""
        return Sink(self._disk, self.path(f"answer.{attempt}"), restore, on_error)

    def answer(self, attempt: int) -> Answer:
        """Return the saved response of an attempt. A file of this name never changes."""
        if attempt not in self._answers:
            self._answers[attempt] = Answer(self.path(f"answer.{attempt}"), self._disk.tops)
        return self._answers[attempt]

    def partial(self, attempt: int) -> Head | None:
        """Return how the response began that was arriving when the process died, or None."""
        path = self.path(f"answer.{attempt}.part")
        with disk_errors(path, "read"), contextlib.suppress(FileNotFoundError, ValueError), self._read(path) as file:
            line = file.readline(_LINE_BYTES)
            return load(line, Head) if line.endswith(b"\n") else None
        return None

    def _read(self, path: str) -> IO[bytes]:
        return open(self._disk.tops.open_file(path, os.O_RDONLY), "rb")

    def save_partial(self, attempt: int, tail: Tail) -> None:
        """Save the part of a response that arrived; if only its name was missing, it is complete."""
        part = self.path(f"answer.{attempt}.part")
        with closing(self._disk.append(part), part) as file, disk_errors(part, "save the response"):
            if not has_tail(file):
                file.write(b"\n" + dump(tail))
            self._disk.unreserve(file)
            self._disk.sync(file, part)
        self._disk.replace(part, self.path(f"answer.{attempt}"))
        self._disk.sync_folder(self.folder)

    def decide(self, decision: Decision) -> None:
        """Write down how the job ends. A later decision replaces an earlier one of which names exist already."""
        self._decision = None  # if this fails, the disk has to be asked
        self._disk.write(self.path("decision.json"), dump(decision))
        self._decision = decision

    def decision(self) -> Decision | None:
        """Return how the job ends, or None while that is open."""
        if self._decision is None:
            self._decision = self._load("decision.json", load_decision)
        return self._decision

    def keep(self, folder: str) -> None:
        """Keep the whole record in another folder, for ``imagewatch retry``.

        Args:
            folder: Where to; on the same file system.
        """
        self._disk.make_folder(folder)
        self._disk.replace(self.folder, os.path.join(folder, self.job))
        self._disk.sync_folder(folder)
        self._disk.sync_folder(self._jobs)

    def reopen(self, folder: str) -> bool:
        """Move the record out of the folder in which it was kept; its response is to be read again.

        Returns:
            False if there is none.
        """
        kept = Record(self._disk, folder, self.job)
        if kept.claim() is None or self.exists():
            return False
        if kept.decision() is not None:
            self._disk.replace(kept.path("decision.json"), kept.path("reopened.json"))
        for name in kept.names():
            if not name.startswith(("claim.", "sent.", "answer.", "reopened.")):
                self._disk.unlink(kept.path(name))
        self._disk.sync_folder(kept.folder)
        self._disk.replace(kept.folder, self.folder)
        self._disk.sync_folder(self._jobs)
        self._disk.sync_folder(folder)
        return True

    def reopened(self) -> Decision | None:
        """Return the decision that was withdrawn, while its files are still at its destination."""
        return self._load("reopened.json", load_decision)

    def reclaimed(self) -> None:
        """Note that the originals are in the claim again."""
        self._disk.unlink(self.path("reopened.json"))
        self._disk.sync_folder(self.folder)

    def mark_over(self) -> None:
        """Note that the result file is published, by a file ``over``. Not synced: the result file is the durable mark.

        If a reader removes the result file immediately, it is not published again.
        """
        path = self.path("over")
        if not self._disk.tops.exists(path):
            self._disk.create(path).close()

    def remove(self) -> None:
        """Remove the record, then the responses: what was paid for goes last."""
        self._disk.unlink(self.path("claim.json"))
        self._disk.sync_folder(self.folder)
        for name in self._known():
            self._disk.unlink(self.path(name))
        if not self._disk.remove_folder(self.folder):
            for name in sorted(self.names()):
                self._disk.unlink(self.path(name))
            self._disk.remove_folder(self.folder)
        self._disk.sync_folder(self._jobs)

    def _known(self) -> list[str]:
        """Return what is nearly always all that is left, without asking the disk for each name."""
        answers = [f"answer.{attempt}" for attempt in self._answers]
        return [*answers, "decision.json", "over", *([f"sent.{self._sent[0]}"] if self._sent else [])]

    def names(self) -> list[str]:
        """Return the names of its files; none if its folder is missing."""
        with disk_errors(self.folder, "read"), contextlib.suppress(FileNotFoundError):
            return self._disk.tops.names(self.folder)
        return []

    def _load(self, name: str, read: Callable[[bytes], T]) -> T | None:
        path = self.path(name)
        try:
            return read(_content(self._disk.tops.open_file(path, os.O_RDONLY)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SpoolError(
                f"the job record cannot be read: {error}: {path}",
                path=path,
                code=errno_of(error),
                hint="do not remove it before you have read it: it may be the only proof of a charge",
            ) from error


def _content(descriptor: int) -> bytes:
    """Return the bytes of a small file. ``open`` would ask for its size, its position and whether it is a terminal.

    Args:
        descriptor: The open file; it is closed.
    """
    try:
        content = b""
        while piece := os.read(descriptor, _LINE_BYTES):
            content += piece
        return content
    finally:
        os.close(descriptor)
