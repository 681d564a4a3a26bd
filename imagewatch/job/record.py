"""The evidence of one job: its folder in the state folder, and the answers banked there.

::

    state/jobs/ID/claim.json      what was claimed                    written before the prompt leaves the inbox
                  sent.N          attempt N                           written before the first byte leaves
                  answer.N.part   the answer as it comes in
                  answer.N        the answer                          renamed before anybody reads it
                  image.K         image K of the answer, decoded or fetched
                  decision.json   which door, which files, which document
                  over            the document is out
                  reopened.json   the decision that was taken back, until the originals are here again

A job that was paid for and gave no picture is not forgotten: its folder moves to ``paid/ID`` as it is.

An answer's file is one line of JSON (``Head``), the raw body, a line feed and one line of JSON (``Tail``).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import threading
import time
from typing import IO, TYPE_CHECKING, TypeVar

from imagewatch.protocol.values import Claim, Decision, Head, Sent, Tail, dump, load
from imagewatch.system.disk import Disk, closing, ours
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
_TAIL_BYTES = 64 * 1024
_LINE_BYTES = 1024
_CHUNK_BYTES = 512 * 1024
_PATIENCE = 1.0
"""Between two tries of what our disk refuses with the answer on the line, seconds."""
_HINT = "look at the disk and the system log; do not remove the answer, it was paid for"
_NUMBERED = re.compile(r"(sent|answer)\.([0-9]{1,4})(\.part)?")


class Answer:
    """A banked answer: what the endpoint said, read from disk in pieces.

    Attributes:
        head: Status and headers.
        tail: Whether it came whole.
        length: Size of the body, bytes.
    """

    def __init__(self, path: str, tops: Tops | None = None) -> None:
        self.path = path
        self._tops = tops or Tops()
        try:
            with self._opened() as file:
                first = _line(lambda size: os.pread(file.fileno(), size, 0).partition(b"\n"))
                end = file.seek(0, os.SEEK_END)
                last = _line(lambda size: os.pread(file.fileno(), size, max(0, end - size)).rpartition(b"\n")[::-1])
            self.head, self.tail = load(first, Head), load(last, Tail)
        except (OSError, ValueError) as error:
            raise SpoolError(
                f"{path}: the banked answer cannot be read: {error}", path=path, code=_code(error), hint=_HINT
            ) from error
        self._start = len(first) + 1
        self.length = end - len(last) - 1 - self._start

    def _opened(self) -> io.FileIO:
        return io.FileIO(self._tops.open_file(self.path, os.O_RDONLY))

    def chunks(self, size: int = _CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the body in pieces of at most ``size`` bytes."""
        left = self.length
        with self._opened() as file:
            file.seek(self._start)
            while left > 0 and (chunk := file.read(min(size, left))):
                left -= len(chunk)
                yield chunk

    def sample(self, size: int = _TAIL_BYTES) -> bytes:
        """Return the beginning of the body, enough for any error message."""
        return next(self.chunks(size), b"")


class Sink:
    """Where an answer is written while it comes in.

    Its file is open, with room for the answer, before the request leaves. What the disk refuses later is tried again
    for as long as the call lasts, by the open file and not by its name: meanwhile the endpoint waits, too.

    Args:
        disk: Our disk.
        path: The answer's final name.
        restore: Makes the record again, if its folder was removed or replaced meanwhile.
        on_trouble: Called with what the disk refuses, once before that is waited for.
        wait: Waits some seconds.
        now: Monotonic clock, seconds.

    Attributes:
        written: Bytes of the body so far.
        status: HTTP status of the answer, 0 before it has come.
        until: Until when a failing disk is waited for, by the monotonic clock.
        trouble: What the disk refused last, in words; empty if it refused nothing.
    """

    def __init__(
        self,
        disk: Disk,
        path: str,
        restore: Callable[[], object] = lambda: None,
        on_trouble: Callable[[SpoolError], object] = lambda _: None,
        wait: Callable[[float], object] = threading.Event().wait,  # noqa: B008
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk = disk
        self._path = path
        self._part = path + ".part"
        self._restore = restore
        self._on_trouble = on_trouble
        self._wait = wait
        self._now = now
        self._file: IO[bytes] | None = None
        self._is_suspect = False
        self.written = self.status = 0
        self.until = -math.inf
        self.trouble = ""

    def open(self, room: int = 0) -> None:
        """Make the file and reserve room in it. Nothing is waited for: what fails here costs nothing.

        Args:
            room: Bytes.
        """
        self._file = self._disk.create_anew(self._part)
        if room:
            self._disk.reserve(self._file, room, self._part)

    def start(self, head: Head) -> None:
        """Write down how the answer begins."""
        if self._file is None:
            self.open()
        self.status = head.status
        self._put(dump(head) + b"\n")

    def write(self, chunk: bytes | memoryview) -> None:
        """Append a piece of the body."""
        self._put(chunk)
        self.written += len(chunk)

    def finish(self, tail: Tail) -> None:
        """Make the answer durable under its final name. Only now may anybody read it."""
        self._put(b"\n" + dump(tail))
        self._insist(self._settle)
        self.close()

    def close(self) -> None:
        """Let go of the file; what was written stays as ``answer.N.part``."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _put(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        rest = memoryview(content)
        while rest:
            rest = rest[self._insist(functools.partial(os.write, self._file.fileno(), rest)) :]

    def _settle(self) -> None:
        """Give the whole answer its name; what failed half way may be done again."""
        if self._is_suspect or not self._has_name():
            self._write_anew()
        assert self._file is not None
        self._disk.unreserve(self._file)
        self._is_suspect = True
        self._disk.sync(self._file, self._part)
        self._is_suspect = False
        self._disk.replace(self._part, self._path)
        self._disk.sync_folder(os.path.dirname(self._path))

    def _has_name(self) -> bool:
        """Tell whether the open file is the one of its name: the folder may have been removed, or replaced."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._disk.tops.lstat(self._part))
        except OSError:
            return False

    def _write_anew(self) -> None:
        """Write what the open file holds to a new one: it lost its name, or a failed sync may have lost its content."""
        assert self._file is not None
        self._restore()
        copy = self._disk.create_anew(self._part)
        try:
            offset = 0
            while piece := os.pread(self._file.fileno(), _CHUNK_BYTES, offset):
                offset += copy.write(piece)
        except BaseException:
            copy.close()
            raise
        self._file.close()
        self._file = copy

    def _insist(self, act: Callable[[], T]) -> T:
        """Do what the disk may refuse, again and again while there is time."""
        is_told = False
        while True:
            try:
                with ours(self._path, "save the answer"):
                    return act()
            except SpoolError as error:
                left = self.until - self._now()
                if not error.code or left <= 0:
                    raise
                self.trouble = str(error)
                if not is_told:
                    self._on_trouble(error)
                is_told = True
                self._wait(min(_PATIENCE, left))


class Record:
    """The folder of one job in the state folder.

    Args:
        disk: Our disk.
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
        return self._load("claim.json", Claim)

    def exists(self) -> bool:
        """Tell whether anything of the record is there."""
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
            # Its name may be there already, and would say that nobody knows what became of it.
            with contextlib.suppress(SpoolError):
                self._disk.unlink(path)
            raise
        self._sent = attempt, sent

    def sent(self, attempt: int) -> Sent | None:
        """Return what was sent, or None."""
        if self._sent and self._sent[0] == attempt:
            return self._sent[1]
        return self._load(f"sent.{attempt}", Sent) if attempt else None

    def take_back(self, attempt: int) -> None:
        """Remove the mark of an attempt of which no byte left, durably: the record says that it was never sent."""
        if not self.exists():
            return
        for name in (f"answer.{attempt}.part", f"sent.{attempt}"):
            self._disk.unlink(self.path(name))
        self._disk.sync_folder(self.folder)
        self._sent = None

    def restore(self, claim: Claim, attempt: int, sent: Sent) -> None:
        """Write down again what somebody removed while a request was on its way; what is there stays."""
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
        on_trouble: Callable[[SpoolError], object] = lambda _: None,
    ) -> Sink:
        """Return where the answer of an attempt goes; the arguments are those of a ``Sink``."""
        return Sink(self._disk, self.path(f"answer.{attempt}"), restore, on_trouble)

    def answer(self, attempt: int) -> Answer:
        """Return the banked answer of an attempt. What has its name does not change any more."""
        if attempt not in self._answers:
            self._answers[attempt] = Answer(self.path(f"answer.{attempt}"), self._disk.tops)
        return self._answers[attempt]

    def partial(self, attempt: int) -> Head | None:
        """Return how the answer began that was coming in when the process died, or None."""
        path = self.path(f"answer.{attempt}.part")
        with ours(path, "read"), contextlib.suppress(FileNotFoundError, ValueError), self._read(path) as file:
            line = file.readline(_TAIL_BYTES)
            return load(line, Head) if line.endswith(b"\n") else None
        return None

    def _read(self, path: str) -> IO[bytes]:
        return open(self._disk.tops.open_file(path, os.O_RDONLY), "rb")

    def bank_partial(self, attempt: int, tail: Tail) -> None:
        """Close what came of an answer and bank it as it is; if only its name was missing, it is whole."""
        part = self.path(f"answer.{attempt}.part")
        with closing(self._disk.append(part), part) as file, ours(part, "bank the answer"):
            if not _has_tail(file):
                file.write(b"\n" + dump(tail))
            self._disk.unreserve(file)
            self._disk.sync(file, part)
        self._disk.replace(part, self.path(f"answer.{attempt}"))
        self._disk.sync_folder(self.folder)

    def decide(self, decision: Decision) -> None:
        """Write down how the job ends. A later decision replaces an earlier one whose names were taken."""
        self._decision = None  # should this fail, the disk has to be asked
        self._disk.write(self.path("decision.json"), dump(decision))
        self._decision = decision

    def decision(self) -> Decision | None:
        """Return how the job ends, or None while that is open."""
        if self._decision is None:
            self._decision = self._load("decision.json", Decision)
        return self._decision

    def bank(self, folder: str) -> None:
        """Keep the whole record in another folder, for somebody who looks again.

        Args:
            folder: Where to; on the same file system.
        """
        self._disk.make_folder(folder)
        self._disk.replace(self.folder, os.path.join(folder, self.job))
        self._disk.sync_folder(folder)
        self._disk.sync_folder(self._jobs)

    def reopen(self, folder: str) -> bool:
        """Take the record out of the folder it was kept in; the answer is to be read again.

        Returns:
            False when there is none.
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
        """Return the decision that was taken back, while its files are still behind its door."""
        return self._load("reopened.json", Decision)

    def taken_back(self) -> None:
        """Note that the originals are in the claim again."""
        self._disk.unlink(self.path("reopened.json"))
        self._disk.sync_folder(self.folder)

    def mark_over(self) -> None:
        """Note that the document is out, by a file ``over``. Not synced: the document itself is the durable mark.

        It spares a reader who takes the document away at once a second delivery.
        """
        path = self.path("over")
        if not self._disk.tops.exists(path):
            self._disk.create(path).close()

    def remove(self) -> None:
        """Remove the record, then the answers: evidence of payment goes last."""
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
        """Return the names of its files."""
        with ours(self.folder, "read"), contextlib.suppress(FileNotFoundError):
            return self._disk.tops.names(self.folder)
        return []

    def _load(self, name: str, kind: type[T]) -> T | None:
        path = self.path(name)
        try:
            return load(_content(self._disk.tops.open_file(path, os.O_RDONLY)), kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SpoolError(
                f"{path}: the record cannot be read: {error}",
                path=path,
                code=_code(error),
                hint="it is evidence of a payment: do not remove it before you looked into it",
            ) from error


def _line(read: Callable[[int], tuple[bytes, bytes, bytes]]) -> bytes:
    """Return the first or the last line of a file.

    Args:
        read: Returns so many bytes of the file from that end: what is before the first line feed, that, and the rest.

    Raises:
        ValueError: There is no such line.
    """
    for size in (_LINE_BYTES, _TAIL_BYTES):
        line, feed, _ = read(size)
        if feed:
            return line
    raise ValueError("a line of it is missing")


def _content(descriptor: int) -> bytes:
    """Return the bytes of a small file. ``open`` would ask for its size, its position and whether it is a terminal.

    Args:
        descriptor: The open file; it is closed.
    """
    try:
        content = b""
        while piece := os.read(descriptor, _TAIL_BYTES):
            content += piece
        return content
    finally:
        os.close(descriptor)


def _code(error: Exception) -> int:
    """Return an errno if the disk failed, which may pass; 0 if what it holds is damaged, which does not."""
    return (isinstance(error, OSError) and error.errno) or 0


def _has_tail(file: IO[bytes]) -> bool:
    """Tell whether an answer was written to its end; leave the file there."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    last = file.read().rpartition(b"\n")[2]
    try:
        load(last, Tail)
    except (ValueError, RecursionError):  # a piece of the body, which may be anything
        return False
    return True
