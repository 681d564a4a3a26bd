"""A date for each of very many names, in some twenty bytes each. Pure.

A dictionary of a hundred thousand names takes thirteen megabytes. Here only a hash of each name is kept, of 64 bits
and with the interpreter's own random key; the names themselves are read from the disk again when they are needed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from itertools import compress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Block:
    """Some dates, sorted by hash."""

    __slots__ = ("dates", "found", "hashes")

    def __init__(self, hashes: array[int], dates: array[float]) -> None:
        self.hashes = hashes
        self.dates = dates
        self.found = bytearray()


class Dates:
    """Dates by name.

    Args:
        most: How many are in one block: few enough to insert into the middle of it.
    """

    __slots__ = ("_blocks", "_first", "_most")

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._first: list[int] = []  # smallest hash of each block but the first one
        self._blocks = [_Block(array("q"), array("d"))]

    def __len__(self) -> int:
        return sum(len(block.hashes) for block in self._blocks)

    def __iter__(self) -> Iterator[float]:
        for block in self._blocks:
            yield from block.dates

    def get(self, name: str) -> float | None:
        """Return the date of a name, or None."""
        block, place, there = self._find(name)
        return block.dates[place] if there else None

    def set(self, name: str, date: float) -> None:
        """Remember the date of a name."""
        block, place, there = self._find(name)
        if there:
            block.dates[place] = date
            return
        block.hashes.insert(place, hash(name))
        block.dates.insert(place, date)
        if len(block.hashes) > self._most:
            self._split(block)

    def discard(self, name: str) -> bool:
        """Forget a name; tell whether it had a date."""
        block, place, there = self._find(name)
        if there:
            del block.hashes[place], block.dates[place]
        return there

    def begin(self) -> None:
        """Begin to go through all names that are there: each is to be asked for with ``find``."""
        for block in self._blocks:
            block.found = bytearray(len(block.hashes))

    def find(self, name: str) -> float | None:
        """Return the date of a name that is there, or None."""
        block, place, there = self._find(name)
        if not there:
            return None
        block.found[place] = 1
        return block.dates[place]

    def end(self) -> None:
        """Forget all names that were not found."""
        for block in self._blocks:
            if block.found.count(1) < len(block.found):
                block.dates = array("d", compress(block.dates, block.found))
                block.hashes = array("q", compress(block.hashes, block.found))
            block.found = bytearray()
        self._blocks[1:] = [block for block in self._blocks[1:] if block.hashes]
        self._first = [block.hashes[0] for block in self._blocks[1:]]

    def _find(self, name: str) -> tuple[_Block, int, bool]:
        known = hash(name)
        block = self._blocks[bisect_right(self._first, known)]
        place = bisect_left(block.hashes, known)
        return block, place, place < len(block.hashes) and block.hashes[place] == known

    def _split(self, block: _Block) -> None:
        place, half = self._blocks.index(block), len(block.hashes) // 2
        self._first.insert(place, block.hashes[half])
        self._blocks.insert(place + 1, _Block(block.hashes[half:], block.dates[half:]))
        del block.hashes[half:], block.dates[half:]
