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

    def __init__(self, hashes: array[int], numbers: array[_Number], found: bytearray) -> None:
        self.hashes = hashes
        self.numbers: array[_Number] = numbers
        self.found = found


class Numbers(Generic[_Number]):
    """Numbers by name.

    Args:
        kind: What ``array`` calls them: ``q`` for whole numbers of 64 bits, ``d`` for others.
        most: How many are in one block: few enough to insert into the middle of it.
    """

    __slots__ = ("_blocks", "_first", "_is_passing", "_kind", "_most")

    def __init__(self, kind: str, most: int = 1024) -> None:
        self._kind = kind
        self._most = most
        self._first: list[int] | None = None  # smallest hash of each block but the first one
        self._blocks: list[_Block[_Number]] | None = None  # none without a name: very many folders are empty
        self._is_passing = False

    def __len__(self) -> int:
        return sum(len(block.hashes) for block in self._blocks or ())

    def get(self, name: Hashable) -> _Number | None:
        """Return the number of a name, or None."""
        if self._blocks is None:
            return None
        block, place, there = self._find(self._blocks, name)
        return block.numbers[place] if there else None

    def set(self, name: Hashable, number: _Number) -> None:
        """Remember the number of a name."""
        if self._blocks is None:
            self._first, self._blocks = [], [_Block(array("q"), array(self._kind), bytearray())]
        block, place, there = self._find(self._blocks, name)
        if there:
            block.numbers[place] = number
        else:
            block.hashes.insert(place, hash(name))
            block.numbers.insert(place, number)
        if self._is_passing:
            block.found[place : place + there] = b"\1"
        if len(block.hashes) > self._most:
            self._split(self._blocks, block)

    def discard(self, name: Hashable) -> bool:
        """Forget a name; tell whether it had a number."""
        if self._blocks is None:
            return False
        block, place, there = self._find(self._blocks, name)
        if there:
            del block.hashes[place], block.numbers[place]
            del block.found[place : place + self._is_passing]
        return there

    def begin(self) -> None:
        """Begin to go through all names that are there: each is to be asked for with ``find``.

        Meanwhile names can be set and discarded: one that is set counts as found.
        """
        self._is_passing = True
        for block in self._blocks or ():
            block.found = bytearray(len(block.hashes))

    def find(self, name: Hashable) -> _Number | None:
        """Return the number of a name that is there, or None."""
        if self._blocks is None:
            return None
        block, place, there = self._find(self._blocks, name)
        if not there:
            return None
        block.found[place] = 1
        return block.numbers[place]

    def end(self) -> None:
        """Forget all names that were not found."""
        for block in self._blocks or ():
            if block.found.count(1) < len(block.found):
                block.numbers = array(self._kind, compress(block.numbers, block.found))
                block.hashes = array("q", compress(block.hashes, block.found))
        self.stop()
        if self._blocks is not None:
            kept = [block for block in self._blocks if block.hashes]
            self._blocks, self._first = (kept, [block.hashes[0] for block in kept[1:]]) if kept else (None, None)

    def stop(self) -> None:
        """Stop going through the names before the end: all are kept."""
        self._is_passing = False
        for block in self._blocks or ():
            block.found = bytearray()

    def _find(self, blocks: list[_Block[_Number]], name: Hashable) -> tuple[_Block[_Number], int, bool]:
        known = hash(name)
        block = blocks[bisect_right(self._first or (), known)]
        place = bisect_left(block.hashes, known)
        return block, place, place < len(block.hashes) and block.hashes[place] == known

    def _split(self, blocks: list[_Block[_Number]], block: _Block[_Number]) -> None:
        assert self._first is not None
        place, half = blocks.index(block), len(block.hashes) // 2
        self._first.insert(place, block.hashes[half])
        blocks.insert(place + 1, _Block(block.hashes[half:], block.numbers[half:], block.found[half:]))
        del block.hashes[half:], block.numbers[half:], block.found[half:]
