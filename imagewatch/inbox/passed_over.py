"""Prompts that are passed over for now, by name. Pure.

There is room for a number of them, which the first-level folders share. Beyond it a folder counts as full, and its
other prompts have to wait behind those that were passed over.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import first_level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.inbox.candidate import Key

_MOST = 4000
_MOST_EACH = 1000


class PassedOver:
    """Prompts that are passed over.

    Args:
        most: How many there may be before every folder that has one is full.
        most_each: How many of a first-level folder before it is full.
    """

    def __init__(self, most: int = _MOST, most_each: int = _MOST_EACH) -> None:
        self._most, self._most_each = most, most_each
        self._folders: dict[str, dict[str, float]] = {}
        self._counts: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[tuple[Key, float]]:
        """Return each prompt and its date, seconds since the epoch."""
        return (((path, stem), at) for path, stems in self._folders.items() for stem, at in stems.items())

    def __contains__(self, key: Key) -> bool:
        return key[1] in self._folders.get(key[0], ())

    def add(self, key: Key, changed: float) -> None:
        """Pass over a prompt.

        Args:
            key: The prompt.
            changed: Newest ctime of its files, seconds since the epoch.
        """
        if key not in self:
            self._counts[first_level(key[0])] += 1
            self._total += 1
        self._folders.setdefault(key[0], {})[key[1]] = changed

    def discard(self, key: Key) -> None:
        """Remove a prompt, if it is there."""
        stems = self._folders.get(key[0], {})
        if stems.pop(key[1], None) is None:
            return
        self._total -= 1
        name = first_level(key[0])
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]
        if not stems:
            del self._folders[key[0]]

    def stems(self, path: str) -> set[str]:
        """Return the stems of a folder that are passed over."""
        return set(self._folders.get(path, ()))

    def names(self) -> list[str]:
        """Return the first-level folders of which something is passed over."""
        return list(self._counts)

    def is_full(self, name: str) -> bool:
        """Return whether no more of a first-level folder is to be checked."""
        return self._counts[name] >= (self._most_each if self._total < self._most else 1)
