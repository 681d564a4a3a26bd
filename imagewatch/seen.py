"""What a look at the inbox saw: values only."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from imagewatch.job import Claim
from imagewatch.names import SUFFIX

Key = tuple[str, str]
"""A stem: the folder below the inbox, and the stem's name."""
Look = tuple[str, int, int, int, int]
"""What a file looks like: name, inode, size, mtime and ctime; zeros when it is not there."""


class Wait(StrEnum):
    """Why a prompt may not be taken yet."""

    EMPTY = "empty, so not ready yet"
    SETTLING = "not quiet for long enough"
    WRITING = "still being written"
    OPEN = "open for writing"
    ARRIVING = "is on its way: a transfer has not given it its name yet"
    UNREADABLE = "cannot be read at the moment"
    IMAGES = "waiting for images that are missing or empty"


@dataclass(frozen=True)
class Candidate:
    """A prompt that may be claimed now.

    Attributes:
        key: Folder and stem.
        images: Its input images, in the order in which they are sent.
        foreign: Siblings of a kind the endpoint does not take.
        looks: What its files looked like, the prompt first.
        changed_at: Newest ctime of its files, seconds since the epoch.
        declared: Whether the prompt names its images itself.
        folder_inode: Inode of its folder; 0 for the inbox itself.
    """

    key: Key
    images: tuple[str, ...]
    foreign: tuple[str, ...]
    looks: tuple[Look, ...]
    changed_at: float
    declared: bool
    folder_inode: int = 0

    @property
    def source(self) -> str:
        """Path of the prompt below the inbox."""
        return os.path.join(self.key[0], self.key[1] + SUFFIX)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its files, the prompt first."""
        return (self.key[1] + SUFFIX, *self.images, *self.foreign)

    def claim(self, job: str, at: float) -> Claim:
        """Return the claim for it."""
        _, _, size, mtime_ns, _ = self.looks[0]
        return Claim(
            job=job,
            folder=self.key[0],
            stem=self.key[1],
            images=self.images,
            declared=self.declared,
            foreign=self.foreign,
            size=size,
            mtime_ns=mtime_ns,
            files={name: (inode, size, changed) for name, inode, size, changed, _ in self.looks if inode},
            folder_inode=self.folder_inode,
            at=at,
        )


class Reasons(dict[str, str]):
    """Why files are not taken, by path below the inbox. Of very many not all are named, but all are counted.

    Args:
        most: How many are named; None for all.

    Attributes:
        kinds: How many there are of each kind of reason.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most = most
        self.kinds: Counter[str] = Counter()

    def add(self, path: str, kind: str, reason: str = "") -> None:
        """Note why a file is not taken; ``reason`` is the kind with what differs from file to file."""
        self.kinds[kind] += 1
        self._name(path, reason or kind)

    def join(self, other: Reasons) -> None:
        """Take over what was noted elsewhere."""
        self.kinds.update(other.kinds)
        for path, reason in other.items():
            self._name(path, reason)

    def _name(self, path: str, reason: str) -> None:
        if self._most is None or len(self) < self._most:
            self[path] = reason

    @property
    def total(self) -> int:
        """How many there are."""
        return self.kinds.total()


@dataclass
class Seen:
    """What one sweep saw.

    Attributes:
        waiting: What may not yet be claimed, and why.
        ignored: What will not be taken, and why.
        ready: What may be claimed, oldest first: as many as were asked for.
        due: Seconds until something may become ready, or None.
        folders: Every folder looked into, as paths.
        passed: Stems that were left out because a job of their name is not over.
    """

    waiting: Reasons = field(default_factory=Reasons)
    ignored: Reasons = field(default_factory=Reasons)
    ready: list[Candidate] = field(default_factory=list)
    due: float | None = None
    folders: list[str] = field(default_factory=list)
    passed: set[Key] = field(default_factory=set)

    def comes_due(self, seconds: float) -> None:
        """Note that something may be ready after some seconds."""
        self.due = seconds if self.due is None else min(self.due, seconds)

    def wait(self, path: str, kind: str, reason: str, seconds: float) -> None:
        """Note that a prompt may be ready after some seconds."""
        self.waiting.add(path, kind, reason)
        self.comes_due(seconds)
