"""The oldest of very many prompts, in order. Pure."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Entry = tuple[float, str]
"""Date and stem of a prompt: newest ctime of its files, seconds since the epoch."""


class OldestPrompts:
    """The oldest settled prompts of one folder. When it runs low, it is filled again from all of them."""

    __slots__ = ("_beyond", "_entries", "_is_heap")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._beyond: Entry | None = None  # from here on they are not in it; None if all are
        self._is_heap = True

    def __iter__(self) -> Iterator[Entry]:
        """Return the entries, in no order."""
        return iter(self._entries)

    def offer(self, entry: Entry, most: int) -> None:
        """Note that a prompt is settled.

        Args:
            entry: The prompt; it may be known already.
            most: How many are kept, about.
        """
        if self._beyond is not None and entry >= self._beyond:
            return
        self._entries.append(entry)
        self._is_heap = False
        if len(self._entries) > 2 * most:
            self._cut(most, set(self._entries))

    def put_back(self, entry: Entry) -> None:
        """Add an entry again that was removed."""
        self.offer(entry, len(self._entries) + 1)

    def refill(self, entries: Iterable[Entry], most: int) -> None:
        """Begin again with these.

        Args:
            entries: All that are settled, each once.
            most: How many are kept.
        """
        self._beyond = None
        self._cut(most, entries)

    def _cut(self, most: int, entries: Iterable[Entry]) -> None:
        oldest = heapq.nsmallest(most + 1, entries)
        self._beyond = oldest.pop() if len(oldest) > most else self._beyond
        self._entries, self._is_heap = oldest, True  # what is sorted is a heap, too

    def first(self) -> Entry | None:
        """Return the oldest entry, or None."""
        if not self._is_heap:
            heapq.heapify(self._entries)
            self._is_heap = True
        return self._entries[0] if self._entries else None

    def pop(self) -> None:
        """Remove the oldest entry, which ``first`` returned."""
        heapq.heappop(self._entries)

    def is_low(self, most: int) -> bool:
        """Return whether it is to be filled again."""
        return self._beyond is not None and len(self._entries) < most // 4 + 1
