"""Whose turn it is: what there is not enough of is shared between folders. Pure.

It is used twice: for the requests that may be sent at the same time, and for the time that scanning may take. The
folder comes first that will have had least after its turn. A folder that did not wait saves nothing up: it joins as if
it had had as much as the one whose turn it is.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

_Name = TypeVar("_Name")
MOST = 8
"""An owner with more waiting folders than this gets no more turns for them: any user can create thousands."""


class _Line(Generic[_Name]):
    """Names that wait, first the one that will have had least; of equal ones the one that joined first."""

    __slots__ = ("_count", "_had", "_heap", "_now", "_room", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[_Name, tuple[float, float]] = {}  # how much each will have had, and had when it joined
        self._heap: list[tuple[float, int, _Name]] = []  # the former in order, and names that left
        self._had: dict[_Name, float] = {}
        self._room = MOST  # so many are remembered before those are forgotten that have no more than a new one
        self._now = 0.0
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, name: _Name) -> bool:
        return name in self._waiting

    def join(self, name: _Name, expected: float = 0.0) -> None:
        """Let a name wait, unless it does."""
        if name not in self._waiting:
            had = max(self._now, self._had.get(name, 0.0))
            self._waiting[name] = had + expected, had
            self._count += 1
            heapq.heappush(self._heap, (had + expected, self._count, name))

    def leave(self, name: _Name) -> None:
        """Let a name wait no longer."""
        if self._waiting.pop(name, None) is not None and len(self._heap) > 2 * len(self._waiting) + MOST:
            self._heap = [entry for entry in self._heap if self._waits(entry)]
            heapq.heapify(self._heap)

    def first(self) -> _Name | None:
        """Return the name whose turn it is, or None."""
        while self._heap and not self._waits(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def charge(self, name: _Name, amount: float) -> None:
        """Note that a name has had its turn, and how much it got."""
        _, had = self._waiting[name]
        self.leave(name)
        self._now = max(self._now, had)
        self._had[name] = had + amount
        if len(self._had) > self._room:
            self._had = {other: had for other, had in self._had.items() if had > self._now}
            self._room = 2 * max(len(self._had), len(self._waiting)) + MOST

    def forget(self, name: _Name) -> None:
        """Forget how much a name had."""
        self._had.pop(name, None)

    def _waits(self, entry: tuple[float, int, _Name]) -> bool:
        waiting = self._waiting.get(entry[2])
        return waiting is not None and waiting[0] == entry[0]


class FairTurns(Generic[_Name]):
    """Folders that wait for their turn.

    The folders of one owner share the turns of at most ``most`` folders. So it does not help to make more of them.

    Args:
        most: How many.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._owners: _Line[Hashable] = _Line()
        self._lines: dict[Hashable, _Line[_Name]] = {}
        self._owner: dict[_Name, Hashable] = {}

    def __len__(self) -> int:
        return len(self._owner)

    def __iter__(self) -> Iterator[_Name]:
        return iter(self._owner)

    def __contains__(self, name: _Name) -> bool:
        return name in self._owner

    def join(self, name: _Name, owner: Hashable, expected: float = 0.0) -> None:
        """Let a folder wait, unless it does.

        Args:
            name: The folder.
            owner: Whose it is.
            expected: How much it is likely to get when it is its turn, if that is not the same for all.
        """
        if name not in self._owner:
            self._owner[name] = owner
            self._lines.setdefault(owner, _Line()).join(name, expected)
            self._owners.join(owner)

    def leave(self, name: _Name) -> None:
        """Let a folder wait no longer."""
        if name in self._owner:
            self._left(name, self._owner.pop(name))

    def forget(self, name: _Name) -> None:
        """Let a folder that was removed wait no longer, and forget what it had."""
        self.leave(name)
        for line in self._lines.values():
            line.forget(name)

    def first(self) -> _Name | None:
        """Return the folder whose turn it is, or None if none waits."""
        owner = self._owners.first()
        return None if owner is None else self._lines[owner].first()

    def charge(self, name: _Name, amount: float = 1.0) -> None:
        """Note that a folder that waits has had its turn; it has to join again to get another.

        Args:
            name: The folder.
            amount: How much it got, for example seconds.
        """
        owner = self._owner.pop(name)
        line = self._lines[owner]
        share = amount / min(self._most, len(line))
        line.charge(name, amount)
        self._owners.charge(owner, share)
        self._left(name, owner)

    def _left(self, name: _Name, owner: Hashable) -> None:
        line = self._lines[owner]
        line.leave(name)
        if line:
            self._owners.join(owner)
        else:
            self._owners.leave(owner)
