"""Two hosts that try out a common inbox together: ``imagewatch check --shared``, run on both at the same time.

They find each other by files in a folder beside the claims. The one whose name comes first leads. A step begins when
both have left a file of its name, so that no clock is compared; each wait has an end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import msgspec

from imagewatch.job.common_folder import NEXT_STEP, PROBE_INNER, LateFolder
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import AlreadyRunning, SpoolError
from imagewatch.system.locks import lock
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.system.disk import Disk

FOLDER = "check"
_POLL_SECONDS = 0.05
_MEET_SECONDS = 60.0
_STEP_SECONDS = 30.0
_SLOW_SECONDS = 10.0
"""A rename that is seen later than this delays a takeover; the lease should be longer."""
_MOST_SKEW = 5.0
_FILES = 50
_PACE_SECONDS = 0.01
_TURNS = 3
_MOST_BYTES = 4096


class Result(NamedTuple):
    """One line of the table."""

    verdict: Literal["ok", "warn", "bad"]
    what: str
    why: str


def _unusable(what: str, why: str) -> Result:
    return Result("bad", what, f"{why} ({NEXT_STEP})")


class _Message(msgspec.Struct):
    host: str = ""
    beats: int = 0
    at: float = 0.0
    won: list[int] = []


class _NoAnswerError(Exception):
    """The other host did not get as far in time."""


class TwoHosts:
    """One of the two.

    Args:
        disk: The disk.
        folder: Where they meet; opened.
        clock: Wall clock, seconds since the epoch.
        wait: Waits some seconds.
        meet_seconds: How long the other one is waited for at first.
        step_seconds: How long it is waited for in each step.
    """

    def __init__(
        self,
        disk: Disk,
        folder: str,
        clock: Callable[[], float] = time.time,
        wait: Callable[[float], object] = threading.Event().wait,  # noqa: B008
        *,
        meet_seconds: float = _MEET_SECONDS,
        step_seconds: float = _STEP_SECONDS,
    ) -> None:
        self._disk = disk
        self._folder = folder
        self._clock = clock
        self._wait = wait
        self._meet_seconds, self._step_seconds = meet_seconds, step_seconds
        self._me = f"{secrets.token_hex(8)}"
        self._other = ""
        self._made: list[str] = []

    def run(self) -> Iterator[Result]:
        """Yield the lines of the table.

        Raises:
            SpoolError: The folder cannot be used.
        """
        try:
            if not self._meet():
                why = f"none ran this command for this inbox within {self._meet_seconds:.0f} seconds; run it on both"
                yield Result("bad", "other host", f"{why} at the same time")
                return
            yield Result("ok", "other host", f"{printable(self._read('hello').host)} uses the same inbox")
            yield from self._new_files()
            yield from self._renames()
            for leader in sorted((self._me, self._other)):  # each has both parts
                yield from self._fence(leader, acts=leader == self._me)
                yield from self._locks(leader, acts=leader == self._me)
            self._part()
        except _NoAnswerError as error:
            why = f"it has not done its part of the step {error} in time; run the command on both hosts again"
            yield Result("bad", "other host", why)
        finally:
            for path in self._made:
                self._disk.unlink(path)
            self._disk.remove_folder(self._folder)

    def _part(self) -> None:
        """End; the leader removes what is left when the other one needs nothing of it any more."""
        self._sync("end")
        if not self._leads:
            self._write("bye")
            self._made.clear()
            return
        with contextlib.suppress(_NoAnswerError):
            self._until("bye", lambda: self._is_there(f"bye.{self._other}"))
        with disk_errors(self._folder, "list the folder"):
            self._made += [self._path(name) for name in self._disk.tops.names(self._folder)]

    # Messages

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _write(self, name: str, message: _Message | None = None) -> None:
        path = self._path(f"{name}.{self._me}")
        self._disk.jot(path, msgspec.json.encode(message or _Message()))
        self._made += [path, f"{path}.tmp"]

    def _read(self, name: str, other: str = "") -> _Message:
        path = self._path(f"{name}.{other or self._other}")
        with (
            contextlib.suppress(OSError, ValueError, msgspec.DecodeError),
            open(self._disk.tops.open_file(path, os.O_RDONLY), "rb") as file,
        ):
            return msgspec.json.decode(file.read(_MOST_BYTES), type=_Message)
        return _Message()

    def _is_there(self, name: str) -> bool:
        """Return whether a name is in the folder, by listing it: a client of NFS remembers missing names."""
        with disk_errors(self._folder, "list the folder"):
            return name in self._disk.tops.names(self._folder)

    def _until(self, what: str, condition: Callable[[], object]) -> None:
        end = time.monotonic() + self._step_seconds
        while not condition():
            if time.monotonic() > end:
                raise _NoAnswerError(what)
            self._wait(_POLL_SECONDS)

    def _sync(self, step: str, message: _Message | None = None) -> _Message:
        """Begin a step when the other one does; return its message of this step."""
        self._write(step, message)
        self._until(step, lambda: self._is_there(f"{step}.{self._other}"))
        return self._read(step)

    def _meet(self) -> bool:
        """Find one that runs now: the counter of an earlier one does not change."""
        beats, seen, end = 0, dict[str, int](), time.monotonic() + self._meet_seconds
        while time.monotonic() < end and not self._other:
            beats += 1
            self._write("hello", _Message(host=socket.gethostname(), beats=beats, at=self._clock()))
            with disk_errors(self._folder, "list the folder"):
                names = self._disk.tops.names(self._folder)
            for name in sorted(names):
                kind, _, other = name.partition(".")
                if kind == "hello" and "." not in other and other != self._me:
                    found = self._read("hello", other).beats
                    if found > seen.setdefault(other, found):
                        self._other = other
            self._wait(_POLL_SECONDS)
        for _ in range(3 if self._other else 0):  # so that the other one sees this counter change
            beats += 1
            self._write("hello", _Message(host=socket.gethostname(), beats=beats, at=self._clock()))
            self._wait(4 * _POLL_SECONDS)
        return bool(self._other)

    @property
    def _leads(self) -> bool:
        return self._me < self._other

    # The steps

    def _new_files(self) -> Iterator[Result]:
        """Create files from both ends, so that each host comes first at some of them."""
        self._sync("files")
        won = []
        for number in range(_FILES) if self._leads else reversed(range(_FILES)):
            if self._create(number):
                won.append(number)
            self._wait(_PACE_SECONDS)
        theirs = self._sync("created", _Message(won=won)).won
        both, none = set(won) & set(theirs), set(range(_FILES)) - set(won) - set(theirs)
        if both or none:
            why = f"of {_FILES} files, {len(both)} were created by both hosts and {len(none)} by none"
            yield _unusable("O_EXCL", why)
        else:
            yield Result("ok", "O_EXCL", f"each of {_FILES} files was created by one host only ({len(won)} by this)")

    def _create(self, number: int) -> bool:
        path = self._path(f"file.{number}")
        self._made.append(path)
        try:
            self._disk.create(path).close()
        except SpoolError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def _renames(self) -> Iterator[Result]:
        """Rename a file in turns; what one waits for the other's rename is at most twice the delay of one."""
        turns = [f"turn.{number}" for number in range(2 * _TURNS + 1)]
        names = [self._path(turn) for turn in turns]
        self._made += names
        if self._leads:
            self._disk.create(names[0]).close()
        self._sync("turns")
        slowest = 0.0
        for number in range(0 if self._leads else 1, 2 * _TURNS, 2):
            began = time.monotonic()
            self._until("turns", lambda turn=turns[number]: self._is_there(turn))  # type: ignore[misc]
            if number > 1 or not self._leads:
                slowest = max(slowest, (time.monotonic() - began) / 2)
            with disk_errors(names[number], "rename"):
                self._disk.rename(names[number], names[number + 1])
        theirs = self._sync("turned", _Message(at=self._clock())).at
        skew = abs(self._clock() - theirs)
        verdict: Literal["ok", "warn"] = "warn" if slowest > _SLOW_SECONDS else "ok"
        why = f"a rename on the other host is seen after {slowest:.1f} s at most"
        step = "; set shared.lease_seconds to several times that" if verdict == "warn" else ""
        yield Result(verdict, "rename", why + step)
        yield self._clocks(skew, slowest)

    def _clocks(self, skew: float, delay: float) -> Result:
        path = self._path(f"clock.{self._me}")
        self._write("clock")
        with disk_errors(path, "check the file"):
            server = abs(self._clock() - self._disk.tops.lstat(path).st_mtime)
        why = f"the clocks of the hosts differ by {skew:.1f} s (measured to {delay + _POLL_SECONDS:.1f} s), "
        why += f"this one and the times of files by {server:.1f} s"
        is_good = skew < _MOST_SKEW + delay and server < _MOST_SKEW
        return Result("ok" if is_good else "warn", "clocks", why if is_good else f"{why}; set up time synchronization")

    def _fence(self, leader: str, *, acts: bool) -> Iterator[Result]:
        """Empty and remove a folder on one host that the other one has open, which then puts a file into it."""
        inner, moved, late = (self._path(f"{name}.{leader}") for name in ("fence", "moved", "late"))
        if acts:
            for path in (inner, moved):
                self._disk.make_folder(path)
            self._disk.create(os.path.join(inner, "held")).close()
        else:
            self._disk.create(late).close()
        self._sync(f"fence-{leader}")
        self._until("fence", lambda: self._is_there(f"fence.{leader}"))
        with disk_errors(inner, "open the folder"):
            folder = LateFolder(self._disk, inner)
        self._sync(f"fenced-{leader}")
        if acts:
            with disk_errors(inner, "empty the folder"):
                self._disk.rename(os.path.join(inner, "held"), os.path.join(moved, "held"))
            self._disk.remove_folder(inner)
        self._sync(f"renamed-{leader}")
        is_refused = acts or not folder.takes(late)
        self._sync(f"tried-{leader}")
        for path in (os.path.join(moved, "held"), os.path.join(inner, PROBE_INNER)) if acts else (late,):
            self._disk.unlink(path)
        for path in (inner, moved) if acts else ():
            self._disk.remove_folder(path)
        if not is_refused:
            yield _unusable("late rename", "a file could be put into a folder that the other host had removed")
        elif not acts:
            yield Result("ok", "late rename", "it is refused after the other host has emptied and removed the folder")

    def _locks(self, leader: str, *, acts: bool) -> Iterator[Result]:
        path = self._path(f"lock.{leader}")
        self._made.append(path)
        for is_shared, name in ((False, "exclusive"), (True, "shared")):
            step = f"{name}-{leader}"
            self._sync(f"lock-{step}")
            held = self._locked(path, is_shared=is_shared) if acts else None
            self._sync(f"locked-{step}")
            found = "" if acts else self._wrong_locks(path, is_shared=is_shared)
            self._sync(f"unlock-{step}")
            if held is not None:
                held.close()
            if found:
                yield _unusable(f"{name} lock", found)
            elif not acts:
                yield Result("ok", f"{name} lock", "this host notices a lock of the other one")

    def _locked(self, path: str, *, is_shared: bool) -> IO[bytes] | None:
        try:
            return lock(path, self._disk.tops, lambda _: None, is_shared=is_shared)
        except AlreadyRunning:
            return None

    def _wrong_locks(self, path: str, *, is_shared: bool) -> str:
        for wanted in (False, True):
            held = self._locked(path, is_shared=wanted)
            if held is not None:
                held.close()
            kind = "a shared" if wanted else "an exclusive"
            if (held is not None) != (is_shared and wanted):
                return f"this host {'got' if held else 'did not get'} {kind} lock while the other one has its lock"
        return ""
