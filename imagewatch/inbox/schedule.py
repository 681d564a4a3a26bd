"""Which folder of the inbox is scanned next, and when. Pure; every clock is an argument.

First-level folders take turns, by the time that scanning them takes: so a folder that has few files does not wait until
one with very many has been scanned, nor until very many others have been.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import first_level
from imagewatch.inbox.fair_turns import FairTurns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SHARE = 0.1
"""Which part of a core scanning may take, averaged over some time."""
_SAVED_SECONDS = 10.0
"""For how long it may take a whole one after it took less: for example to scan a huge inbox for the first time."""
_SLICE_SECONDS = 0.05
"""For how long nothing but scanning is done at most, by the time it takes."""
_LONGEST_REST_SECONDS = 2.0
"""For how long nothing is scanned at most, though a file system may be so slow that one step takes seconds."""
AHEAD = "//"
"""In the place of a folder: the next prompts of a first-level folder are to be checked. No path has such a name."""


class Allowance:
    """How much time scanning may take: a share of all the time, and what was saved of it.

    Args:
        now: Monotonic time, seconds.
    """

    def __init__(self, now: float) -> None:
        self._left = _SAVED_SECONDS
        self._at = now

    def refill(self, now: float) -> None:
        """Take note of the time that has passed.

        Args:
            now: Monotonic time, seconds.
        """
        self._left = min(self._left + (now - self._at) * _SHARE, _SAVED_SECONDS)
        self._at = now

    def spend(self, seconds: float) -> None:
        """Note that scanning took so much time."""
        self._left -= seconds

    def may_go_on(self, spent: float) -> bool:
        """Return whether scanning may continue now, after it has just taken so many seconds."""
        return self._left > 0 and spent < _SLICE_SECONDS

    def rest(self) -> float:
        """Return for how many seconds nothing is to be scanned."""
        if self._left > 0:
            return 0.0
        self._left = max(self._left, -_LONGEST_REST_SECONDS * _SHARE)
        return (_SLICE_SECONDS - self._left) / _SHARE


class Schedule:
    """Folders that are to be scanned.

    Args:
        owner: Returns the number of the user to whom a first-level folder belongs.
    """

    def __init__(self, owner: Callable[[str], int]) -> None:
        self._owner = owner
        self._turns: FairTurns[str] = FairTurns()
        self._seconds: dict[str, float] = {}  # how long turns of each first-level folder took last
        self._waiting: dict[str, dict[str, None]] = {}  # what is to be done now, by first-level folder
        self._later: list[tuple[float, str]] = []  # a heap; the dictionary has what is valid of it
        self._at: dict[str, float] = {}

    def __len__(self) -> int:
        """Return how many first-level folders wait for their turn."""
        return len(self._turns)

    def soon(self, path: str) -> None:
        """Let a folder be scanned as soon as it is its turn."""
        self._at.pop(path, None)
        self._join(first_level(path), path)

    def soon_all(self, paths: Iterable[str]) -> None:
        """The same with many folders."""
        for path in paths:
            self.soon(path)

    def ahead(self, name: str) -> None:
        """Let the next prompts of a first-level folder be checked."""
        self._join(name, AHEAD)

    def _join(self, name: str, what: str) -> None:
        self._waiting.setdefault(name, {})[what] = None
        self._joins(name)

    def _joins(self, name: str) -> None:
        self._turns.join(name, self._owner(name), self._seconds.get(name, 0.0))

    def later(self, path: str, at: float) -> None:
        """Let a folder be scanned at a monotonic time, seconds, if it is not scanned before."""
        if at < self._at.get(path, math.inf) and path not in self._waiting.get(first_level(path), ()):
            self._at[path] = at
            heapq.heappush(self._later, (at, path))
            if len(self._later) > 2 * len(self._at) + 64:
                self._later = [(at, path) for path, at in self._at.items()]
                heapq.heapify(self._later)

    def forget(self, path: str) -> None:
        """Forget a folder that is not there any more.

        The first-level folder that it was in keeps its turn: something that was begun for it may have to continue.
        """
        self._at.pop(path, None)
        name = first_level(path)
        if name == path:
            self._seconds.pop(name, None)
            self._waiting.pop(name, None)
            self._turns.forget(name)
        elif waiting := self._waiting.get(name):
            waiting.pop(path, None)

    def _leave(self, name: str) -> None:
        self._waiting.pop(name, None)
        self._turns.leave(name)

    def wake(self, now: float) -> None:
        """Let all be scanned whose time has come."""
        while self.due <= now:
            _, path = heapq.heappop(self._later)
            self.soon(path)

    @property
    def due(self) -> float:
        """Monotonic time at which the next one's time comes, seconds; infinite without any."""
        while self._later and self._at.get(self._later[0][1]) != self._later[0][0]:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else math.inf

    def turn(self) -> str | None:
        """Return the first-level folder whose turn it is, or None."""
        return self._turns.first()

    def take(self, name: str) -> str | None:
        """Return what is to be done next for a first-level folder; None if there is nothing."""
        waiting = self._waiting.get(name)
        if not waiting:
            return None
        what = next(iter(waiting))
        del waiting[what]
        return what

    def charge(self, name: str, seconds: float, *, more: bool) -> None:
        """Note that a first-level folder has had its turn.

        Args:
            name: The folder.
            seconds: How long it took.
            more: Whether something that was begun for it continues.
        """
        self._seconds[name] = max(seconds, self._seconds.get(name, 0.0) / 2)
        if name in self._turns:
            self._turns.charge(name, seconds)
        if more or self._waiting.get(name):
            self._joins(name)
        else:
            self._leave(name)
