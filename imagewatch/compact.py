"""A number for each of very many names, in some twenty bytes each. Pure.

A dictionary of a hundred thousand names takes thirteen megabytes. Here only a hash of each name is kept, of 64 bits
and with the interpreter's own random key; the names themselves are read from the disk again when they are needed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from itertools import compress
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

_Number = TypeVar("_Number", int, float)


class _Block(Generic[_Number]):
    """Some numbers, in the order of the hashes of their names."""

    __slots__ = ("found", "hashes", "numbers")

    def __init__(self, hashes: array[int], numbers: array[_Number]) -> None:
        self.hashes = hashes
        self.numbers: array[_Number] = numbers
        self.found = bytearray()


class Numbers(Generic[_Number]):
    """Numbers by name.

    Args:
        kind: What ``array`` calls them: ``q`` for whole numbers of 64 bits, ``d`` for others.
        most: How many are in one block: few enough to insert into the middle of it.
    """

    __slots__ = ("_blocks", "_first", "_kind", "_most")

    def __init__(self, kind: str, most: int = 1024) -> None:
        self._kind = kind
        self._most = most
        self._first: list[int] = []  # smallest hash of each block but the first one
        self._blocks: list[_Block[_Number]] = [_Block(array("q"), array(kind))]

    def __len__(self) -> int:
        return sum(len(block.hashes) for block in self._blocks)

    def get(self, name: Hashable) -> _Number | None:
        """Return the number of a name, or None."""
        block, place, there = self._find(name)
        return block.numbers[place] if there else None

    def set(self, name: Hashable, number: _Number) -> None:
        """Remember the number of a name."""
        block, place, there = self._find(name)
        if there:
            block.numbers[place] = number
            return
        block.hashes.insert(place, hash(name))
        block.numbers.insert(place, number)
        if len(block.hashes) > self._most:
            self._split(block)

    def discard(self, name: Hashable) -> bool:
        """Forget a name; tell whether it had a number."""
        block, place, there = self._find(name)
        if there:
            del block.hashes[place], block.numbers[place]
        return there

    def begin(self) -> None:
        """Begin to go through all names that are there: each is to be asked for with ``find``."""
        for block in self._blocks:
            block.found = bytearray(len(block.hashes))

    def find(self, name: Hashable) -> _Number | None:
        """Return the number of a name that is there, or None."""
        block, place, there = self._find(name)
        if not there:
            return None
        block.found[place] = 1
        return block.numbers[place]

    def end(self) -> None:
        """Forget all names that were not found."""
        for block in self._blocks:
            if block.found.count(1) < len(block.found):
                block.numbers = array(self._kind, compress(block.numbers, block.found))
                block.hashes = array("q", compress(block.hashes, block.found))
            block.found = bytearray()
        self._blocks[1:] = [block for block in self._blocks[1:] if block.hashes]
        self._first = [block.hashes[0] for block in self._blocks[1:]]

    def _find(self, name: Hashable) -> tuple[_Block[_Number], int, bool]:
        known = hash(name)
        block = self._blocks[bisect_right(self._first, known)]
        place = bisect_left(block.hashes, known)
        return block, place, place < len(block.hashes) and block.hashes[place] == known

    def _split(self, block: _Block[_Number]) -> None:
        place, half = self._blocks.index(block), len(block.hashes) // 2
        self._first.insert(place, block.hashes[half])
        self._blocks.insert(place + 1, _Block(block.hashes[half:], block.numbers[half:]))
        del block.hashes[half:], block.numbers[half:]
