"""The oldest of very many prompts by name, and from which date on the others are not. Pure."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Entry = tuple[float, str]
"""Date and stem of a prompt: newest ctime of its files, seconds since the epoch."""


class _Oldest:
    """The oldest entries of those that were offered."""

    __slots__ = ("beyond", "entries", "is_heap")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.beyond: Entry | None = None
        self.is_heap = True

    def offer(self, entry: Entry, most: int) -> None:
        if self.beyond is not None and entry >= self.beyond:
            return
        self.entries.append(entry)
        self.is_heap = False
        if len(self.entries) > 2 * most:
            self.cut(most)

    def cut(self, most: int) -> None:
        self.entries = sorted(set(self.entries))  # which is a heap, too
        self.is_heap = True
        if len(self.entries) > most:
            self.beyond = self.entries[most]
            del self.entries[most:]


class Window:
    """The prompts of one folder that are settled, the oldest first.

    All that are older than a certain one are known by name. Of the others only their number is known elsewhere; when
    the window runs low, the folder is listed again, and all that are settled are offered again.
    """

    __slots__ = ("_next", "_oldest")

    def __init__(self) -> None:
        self._oldest = _Oldest()
        self._next: _Oldest | None = None

    def __iter__(self) -> Iterator[Entry]:
        """Return the entries, in no order."""
        return iter(self._oldest.entries)

    def __len__(self) -> int:
        return len(self._oldest.entries)

    def offer(self, entry: Entry, most: int) -> None:
        """Note that a prompt is settled.

        Args:
            entry: The prompt; it may be known already.
            most: How many are to be known by name, about.
        """
        self._oldest.offer(entry, most)
        if self._next is not None:
            self._next.offer(entry, most)

    def put_back(self, entry: Entry) -> None:
        """Take in again an entry that was taken out."""
        for oldest in filter(None, (self._oldest, self._next)):
            oldest.offer(entry, len(oldest.entries) + 1)

    def begin(self) -> None:
        """Begin to offer all prompts again."""
        self._next = _Oldest()

    def end(self, most: int) -> None:
        """All prompts have been offered again."""
        if self._next is not None:
            self._oldest, self._next = self._next, None
            self._oldest.cut(most)

    def stop(self) -> None:
        """Not all prompts have been offered again: nothing else is known than before."""
        self._next = None

    def first(self) -> Entry | None:
        """Return the oldest entry. None: there is none, or its name is not known."""
        if not self._oldest.is_heap:
            heapq.heapify(self._oldest.entries)
            self._oldest.is_heap = True
        return self._oldest.entries[0] if self._oldest.entries else None

    def pop(self) -> None:
        """Take out the oldest entry, which ``first`` returned."""
        heapq.heappop(self._oldest.entries)

    @property
    def beyond(self) -> Entry | None:
        """From which entry on they are not known by name; None if all are."""
        return self._oldest.beyond

    def is_low(self, most: int) -> bool:
        """Tell whether all prompts are to be offered again."""
        return self._oldest.beyond is not None and len(self._oldest.entries) < most // 4 + 1
