"""Which folder of the inbox is scanned next, and when. Pure; every clock is an argument.

First-level folders take turns, by the time that scanning them takes: so a folder that has few files does not wait until
one with very many has been scanned, nor until very many others have been.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from imagewatch.seen import first_level
from imagewatch.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

AHEAD = "//"
"""In the place of a folder: the next prompts of a first-level folder are to be looked at. No path has such a name."""


class Schedule:
    """Folders that are to be scanned.

    Args:
        owner: Returns the number of the user to whom a first-level folder belongs.
    """

    def __init__(self, owner: Callable[[str], int]) -> None:
        self._owner = owner
        self._turns: Turns[str] = Turns()
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
        """Let the next prompts of a first-level folder be looked at."""
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
        """Forget a folder that is not there any more."""
        self._at.pop(path, None)
        name = first_level(path)
        if name == path:
            self._seconds.pop(name, None)
        if (waiting := self._waiting.get(name)) is not None:
            waiting.pop(path, None)
            if not waiting:
                self._leave(name)

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
            more: Whether something that was begun for it goes on.
        """
        self._seconds[name] = max(seconds, self._seconds.get(name, 0.0) / 2)
        if name in self._turns:
            self._turns.charge(name, seconds)
        if more or self._waiting.get(name):
            self._joins(name)
        else:
            self._leave(name)
