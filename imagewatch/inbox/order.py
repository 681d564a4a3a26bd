"""In which order prompts are claimed: first-level folders take turns, the oldest prompt of each comes first.

Prompts directly in the inbox count as those of one folder. The next prompts of each folder are checked ahead of their
turn, so that people can see early what their prompts wait for.
"""

from __future__ import annotations

import math
import sys
from bisect import insort
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import first_level
from imagewatch.inbox.fair_turns import FairTurns
from imagewatch.inbox.oldest_prompts import OldestPrompts
from imagewatch.inbox.passed_over import PassedOver
from imagewatch.protocol.names import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from imagewatch.inbox.candidate import Candidate, Key
    from imagewatch.inbox.folder import Folder
    from imagewatch.inbox.oldest_prompts import Entry
    from imagewatch.inbox.tree import Folders

_AHEAD = 128
"""How many prompts are opened ahead: more than there are workers. The first-level folders share them."""
_FEWEST = 8
"""So many prompts of each folder are kept in order, however many folders there are."""
_PIECE = 4
_Ready = tuple[float, "Key", "Candidate"]


class _Group:
    """The settled prompts of one first-level folder and of those in it.

    Attributes:
        ready: Those that were checked and may be claimed, the oldest first.
        keys: The same.
        folders: Those with others, by path.
    """

    __slots__ = ("folders", "keys", "ready")

    def __init__(self) -> None:
        self.ready: list[_Ready] = []
        self.keys: set[Key] = set()
        self.folders: dict[str, Folder] = {}

    def add(self, changed: float, candidate: Candidate) -> None:
        if candidate.key in self.keys:
            self.discard(candidate.key)
        insort(self.ready, (changed, candidate.key, candidate), key=lambda entry: entry[:2])
        self.keys.add(candidate.key)

    def discard(self, key: Key) -> None:
        self.keys.discard(key)
        self.ready = [entry for entry in self.ready if entry[1] != key]


class Order:
    """The prompts that are settled, in the order in which they are claimed.

    Args:
        folders: What is known of the inbox.
        check: Checks a settled prompt; returns what may be claimed, or None.
        size: How many prompts are kept in order, the folders sharing them; None for all.
        fewest: So many of each folder at least.

    Attributes:
        turns: The first-level folders of which something may be claimed; others may join.
        wanting: First-level folders of which more prompts should be checked ahead.
        passed_over: Prompts that are passed over, as they may not be claimed for now.
    """

    def __init__(
        self, folders: Folders, check: Callable[[Folder, str], Candidate | None], size: int | None, fewest: int = 0
    ) -> None:
        self._folders = folders
        self._check = check
        self._size = size
        self._fewest = max(fewest, _FEWEST)
        self._groups: dict[str, _Group] = {}
        self._sharing = 0
        self._given: dict[Key, float] = {}
        self.turns: FairTurns[str] = FairTurns()
        self.wanting: set[str] = set()
        self.passed_over = PassedOver()

    # What is settled

    def most(self) -> int:
        """Return how many prompts of a folder are kept in order."""
        if self._size is None:
            return sys.maxsize // 4
        return max(self._size // max(self._sharing, 1), self._fewest)

    def offer(self, folder: Folder, changed: float, stem: str) -> None:
        """Note that a prompt is settled; it may be known already."""
        if not self._was_checked(folder, stem):
            self._oldest_of(folder).offer((changed, stem), self.most())
            self.wanting.add(first_level(folder.path))

    def _was_checked(self, folder: Folder, stem: str) -> bool:
        group, key = self._groups.get(first_level(folder.path)), (folder.path, stem)
        return (
            (group is not None and key in group.keys)
            or key in self._given
            or key in self.passed_over
            or (folder.notes is not None and stem in folder.notes.held)
        )

    def _oldest_of(self, folder: Folder) -> OldestPrompts:
        group = self._groups.setdefault(first_level(folder.path), _Group())
        if folder.path not in group.folders:
            group.folders[folder.path] = folder
            self._sharing += 1
        if folder.oldest is None:
            folder.oldest = OldestPrompts()
        return folder.oldest

    def put_back(self, folder: Folder, entries: Iterable[Entry]) -> None:
        """Let prompts that were checked wait to be checked again."""
        for entry in entries:
            self._oldest_of(folder).put_back(entry)

    def withdraw(self, folder: Folder) -> None:
        """Let all prompts of a folder that were checked wait to be checked again."""
        if folder.notes is not None and folder.notes.held:
            self.put_back(folder, ((changed, stem) for stem, changed in folder.notes.held.items()))
            folder.notes.held.clear()
        if group := self._groups.get(name := first_level(folder.path)):
            mine = [entry for entry in group.ready if entry[1][0] == folder.path]
            if mine:
                self.put_back(folder, ((changed, key[1]) for changed, key, _ in mine))
                group.ready = [entry for entry in group.ready if entry[1][0] != folder.path]
                group.keys.difference_update(key for _, key, _ in mine)
                self._joins(name, group)

    def forget(self, path: str) -> None:
        """Forget a folder that is not there any more."""
        for stem in self.passed_over.stems(path):
            self.passed_over.discard((path, stem))
        if group := self._groups.get(name := first_level(path)):
            self._sharing -= group.folders.pop(path, None) is not None
            for _, key, _ in [entry for entry in group.ready if entry[1][0] == path]:
                group.discard(key)
            self._joins(name, group)
        if path == name:
            self.turns.forget(name)

    # What may be claimed

    def add(self, folder: Folder, candidate: Candidate) -> None:
        """Note that a prompt may be claimed."""
        name = first_level(folder.path)
        group = self._groups.setdefault(name, _Group())
        group.add(folder.settled.get(candidate.key[1]) or candidate.changed_at, candidate)
        self._joins(name, group)

    def discard(self, key: Key) -> None:
        """Note that something happened to a prompt, so that it may not be claimed."""
        self.passed_over.discard(key)
        if (group := self._groups.get(name := first_level(key[0]))) and key in group.keys:
            group.discard(key)
            self.wanting.add(name)
            self._joins(name, group)

    def __len__(self) -> int:
        """Return of how many first-level folders something may be claimed, or is still to be checked for that."""
        return len(self._groups) - sum(
            name in self._groups for name in self.passed_over.names() if self.passed_over.is_full(name)
        )

    def is_ready(self, name: str) -> bool:
        """Return whether anything of a first-level folder may be claimed."""
        return name in self._groups and not self.passed_over.is_full(name) and bool(self._groups[name].ready)

    def take(self, name: str) -> Candidate | None:
        """Return the oldest prompt of a first-level folder that may be claimed; it is not returned again."""
        group = self._groups.get(name)
        if not group or not group.ready:
            return None
        _, key, candidate = group.ready.pop(0)
        group.keys.discard(key)
        if len(group.ready) <= self._ahead() // 2 and group.folders:
            self.wanting.add(name)
        return candidate

    # What is passed over

    def pass_over(self, candidate: Candidate) -> None:
        """Pass over a prompt that ``take`` has returned, until ``reconsider`` gives it back."""
        folder = self._folders.get(candidate.key[0])
        changed = folder.settled.get(candidate.key[1]) if folder else None
        self.passed_over.add(candidate.key, candidate.changed_at if changed is None else changed)

    def reconsider(self, keys: Iterable[Key]) -> None:
        """Let prompts that were passed over be checked again, if they are still settled."""
        for key in keys:
            self.passed_over.discard(key)
            folder = self._folders.get(key[0])
            if folder and (changed := folder.settled.get(key[1])) is not None:
                self.put_back(folder, [(changed, key[1])])
                self.wanting.add(first_level(key[0]))
        for name in self.passed_over.names():  # it may not be full any more
            self._joins(name, self._groups.get(name))

    def is_passed_over(self, key: Key) -> bool:
        """Return whether a prompt is passed over and still settled."""
        folder = self._folders.get(key[0])
        return key in self.passed_over and folder is not None and folder.settled.get(key[1]) is not None

    def served(self, name: str) -> None:
        """Note that a first-level folder has had its turn."""
        if name in self.turns:
            self.turns.charge(name)
        self._joins(name, self._groups.get(name))

    def _joins(self, name: str, group: _Group | None) -> None:
        """Let a first-level folder wait for its turn if anything of it may be claimed."""
        if group and group.ready:
            self.turns.join(name, self.owner(name))
            return
        self.turns.leave(name)
        if group and not group.folders:
            del self._groups[name]
            self.wanting.discard(name)

    def owner(self, name: str) -> int:
        """Return the number of the user to whom a first-level folder belongs."""
        folder = self._folders.get(name)
        return folder.owner if folder else -1

    # Checking ahead

    def prepare(self, name: str) -> Generator[None]:
        """Check the next prompts of a first-level folder, a few each time."""
        self.wanting.discard(name)
        checked = 0
        while (group := self._groups.get(name)) and (found := self._next(group)):
            folder, (changed, stem) = found
            assert folder.oldest is not None
            folder.oldest.pop()
            if (folder.path, stem) not in group.keys and (candidate := self._check(folder, stem)):
                group.add(changed, candidate)
                self._joins(name, group)
            checked += 1
            if not checked % _PIECE:
                yield
        if group:
            self._joins(name, group)

    def _next(self, group: _Group) -> tuple[Folder, Entry] | None:
        """Return the next prompt to be checked, and its folder; None if enough are ready, or none is left."""
        found = self._oldest(group)
        if found is None or len(group.ready) < self._ahead():
            return found
        folder, (changed, stem) = found
        youngest = group.ready[-1]
        if (changed, (folder.path, stem)) > youngest[:2]:
            return None
        group.discard(youngest[1])
        self.put_back(self._folders.add(youngest[1][0]), [(youngest[0], youngest[1][1])])
        return found

    def _oldest(self, group: _Group) -> tuple[Folder, Entry] | None:
        oldest: tuple[Entry, Folder] | None = None
        for path, folder in list(group.folders.items()):
            if folder.is_scanned and folder.scanned_at == -math.inf:
                continue  # the first scan may find an older one; after it this is asked again
            entry = self._head(folder)
            if entry is None:
                del group.folders[path]
                self._sharing -= 1
            elif oldest is None or entry < oldest[0]:
                oldest = entry, folder
        return (oldest[1], oldest[0]) if oldest else None

    def _head(self, folder: Folder) -> Entry | None:
        """Return the oldest prompt of a folder that is still settled and was not checked."""
        if (oldest := folder.oldest) is None:
            return None
        while True:
            if oldest.is_low(self.most()):
                left = ((at, stem) for stem, at in folder.settled.items() if not self._was_checked(folder, stem))
                oldest.refill(left, self.most())
            entry = oldest.first()
            if entry is None or folder.settled.get(entry[1]) == entry[0]:
                return entry
            oldest.pop()

    def _ahead(self) -> int:
        return max(_AHEAD // max(len(self._groups), 1), 1)

    # All together

    def give_again(self) -> None:
        """Let all that ``collect`` has returned be returned again, if it is still settled."""
        given, self._given = self._given, {}
        for (path, stem), changed in given.items():
            if folder := self._folders.get(path):
                self.put_back(folder, [(changed, stem)])

    def restart(self) -> None:
        """Let the first-level folders take turns from the beginning, the one with the oldest prompt first."""
        self.turns = FairTurns()
        ready = [(group.ready[0][:2], name) for name, group in self._groups.items() if group.ready]
        for _, name in sorted(ready):
            self._joins(name, self._groups[name])

    def collect(self, most: int | None) -> list[Candidate]:
        """Return the next prompts in the order in which they are claimed.

        Args:
            most: How many at most; None for all.
        """
        found: list[Candidate] = []
        while (most is None or len(found) < most) and (name := self.turns.first()) is not None:
            changed = self._groups[name].ready[0][0]
            if candidate := self.take(name):
                found.append(candidate)
                self._given[candidate.key] = changed
            self.served(name)
            if name in self.wanting:
                for _ in self.prepare(name):
                    pass
        return found

    def in_turn(self) -> dict[str, float]:
        """Return the newest ctime of each prompt that waits for its turn, seconds since the epoch, by its path.

        Of very many in a folder these are the oldest.
        """
        found: dict[str, float] = {}
        for group in self._groups.values():
            for changed, (path, stem), _ in group.ready:
                found[_path(path, stem)] = changed
            for folder in group.folders.values():
                found |= _dates(folder, folder.oldest or ())
        return found

    def arrived(self) -> dict[str, float]:
        """Return the newest ctime of each prompt that is kept in order, seconds since the epoch, by its path."""
        found = self.in_turn()
        for group in self._groups.values():
            for folder in group.folders.values():
                found |= _dates(folder, _held(folder))
        return found | {_path(*key): at for key, at in self.passed_over if self.is_passed_over(key)}


def _dates(folder: Folder, entries: Iterable[Entry]) -> dict[str, float]:
    return {_path(folder.path, stem): at for at, stem in entries if folder.settled.get(stem) == at}


def _held(folder: Folder) -> list[Entry]:
    return [(changed, stem) for stem, changed in folder.notes.held.items()] if folder.notes is not None else []


def _path(folder: str, stem: str) -> str:
    return f"{folder}/{stem}{SUFFIX}" if folder else stem + SUFFIX
