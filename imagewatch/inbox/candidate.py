"""A prompt that may be claimed, and what a scan found. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from imagewatch.protocol.values import Claim, Dropped

if TYPE_CHECKING:
    from collections.abc import Iterable

Key = tuple[str, str]
"""A stem: the folder below the inbox, and the stem's name."""
ANYWHERE = "?/"
"""In the place of a folder: which one it was is not known. No path has such a name."""
FileState = tuple[str, int, int, int, int]
"""The state of a file: name, inode, size, mtime and ctime; zeros when it does not exist."""


class Wait(StrEnum):
    """Why a prompt may not be claimed yet; the keys of ``waiting.why`` in ``status.json``, and a metric's labels."""

    EMPTY = "empty"
    SETTLING = "settling"
    WRITING = "writing"
    OPEN = "open"
    ARRIVING = "arriving"
    UNREADABLE = "unreadable"
    IMAGES = "images"
    CAP = "cap"

    @property
    def text(self) -> str:
        """The same for people."""
        return _WAITS[self]


_WAITS = {
    Wait.EMPTY: "empty, so not ready yet",
    Wait.SETTLING: "changed a moment ago",
    Wait.WRITING: "still being written",
    Wait.OPEN: "open for writing",
    Wait.ARRIVING: "being transferred: it does not have its final name yet",
    Wait.UNREADABLE: "cannot be read at the moment",
    Wait.IMAGES: "waiting for images that are missing or empty",
    Wait.CAP: "waiting at a cap",
}


class Candidate(Dropped, frozen=True, kw_only=True):
    """A prompt that may be claimed now.

    Attributes:
        states: The states of its files, the prompt first.
        changed_at: Newest ctime of its files, seconds since the epoch.
        folder_inode: Inode of its folder; 0 for the inbox itself.
        is_local: Whether its times are of our own clock.
        was_unchanged: Whether nothing had happened to it for ``settle_seconds``: it came longer ago than that.
    """

    states: tuple[FileState, ...]
    changed_at: float
    folder_inode: int = 0
    is_local: bool = True
    was_unchanged: bool = True

    def claim(self, job: str, at: float) -> Claim:
        """Return the claim for it."""
        _, _, size, mtime_ns, _ = self.states[0]
        return Claim(
            **{name: getattr(self, name) for name in Dropped.__struct_fields__},
            job=job,
            size=size,
            mtime_ns=mtime_ns,
            files={name: (inode, size, changed) for name, inode, size, changed, _ in self.states if inode},
            folder_inode=self.folder_inode,
            at=at,
        )


class Reasons(dict[str, str]):
    """Why files are ignored or wait, by path below the inbox. Of very many not all are named, but all are counted.

    Args:
        most: How many are named; None for all.

    Attributes:
        most: The same.
        kinds: How many there are of each kind of reason.
        kind_of: Of which kind the reason of each named file is.
    """

    __slots__ = ("kind_of", "kinds", "most")

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most
        self.kinds: dict[str, int] = {}
        self.kind_of: dict[str, str] = {}

    def add(self, path: str, kind: str, reason: str = "") -> None:
        """Note why a file is ignored or waits; ``reason`` is the kind with what differs from file to file."""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if self.most is None or len(self) < self.most:
            self[path] = reason or (kind.text if isinstance(kind, Wait) else kind)
            self.kind_of[path] = kind

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.kinds.values())

    def some(self, most: int) -> dict[str, str]:
        """Return some of those that are named, in the order of their paths.

        The first-level folders share the places, so that a folder with very many leaves room for the others.
        """
        if len(self) <= most:
            return dict(sorted(self.items()))
        return dict(sorted(shared(sorted(self.items()), most)))


def joined(parts: Iterable[Reasons], most: int | None) -> Reasons:
    """Return the reasons of several folders as those of one.

    Args:
        parts: Theirs.
        most: How many files are named, the first-level folders sharing the places; None for all.
    """
    whole, named, kind_of = Reasons(most), list[tuple[str, str]](), dict[str, str]()
    for part in parts:
        for kind, count in part.kinds.items():
            whole.kinds[kind] = whole.kinds.get(kind, 0) + count
        named += part.items()
        kind_of |= part.kind_of
    whole.update(named if most is None or len(named) <= most else shared(named, most))
    whole.kind_of = {path: kind_of[path] for path in whole}
    return whole


def shared(named: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """Return so many of these, by path; each first-level folder has as many as the others, if it has as many at all."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, reason in named:
        groups.setdefault(first_level(path.rpartition("/")[0]), []).append((path, reason))
    chosen: list[tuple[str, str]] = []
    for count, group in enumerate(sorted(groups.values(), key=len)):
        chosen += group[: (most - len(chosen)) // (len(groups) - count)]
    return chosen


class JobKeys:
    """Stems of which a job is not over.

    Args:
        keys: The stems; ``None`` where one is not known.
    """

    def __init__(self, keys: Iterable[Key | None] = ()) -> None:
        self._keys = frozenset(keys)
        self._anywhere = frozenset(key[1] for key in self._keys if key is not None and key[0] == ANYWHERE)

    def joined(self, keys: Iterable[Key]) -> JobKeys:
        """Return these stems and others."""
        return JobKeys([*self._keys, *keys])

    def __contains__(self, key: object) -> bool:
        """Return whether a stem is one of them."""
        return key in self._keys or (isinstance(key, tuple) and key[1] in self._anywhere)


def first_level(folder: str) -> str:
    """Return in which first-level folder a folder below the inbox is; both are empty for the inbox itself."""
    return folder.partition("/")[0]


class Found:
    """What was found in one folder: why its files are ignored or wait, and when to scan again.

    Args:
        most: How many files are named, of each kind; None for all.

    Attributes:
        waiting: What may not yet be claimed, and why.
        ignored: What is ignored, and why.
        due: Monotonic time at which something may become ready, seconds, or None.
        left_out: Stems that were left out because a job of their name is not over.
    """

    __slots__ = ("due", "ignored", "left_out", "waiting")

    def __init__(self, most: int | None = None) -> None:
        self.waiting = Reasons(most)
        self.ignored = Reasons(most)
        self.due: float | None = None
        self.left_out: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.waiting.kinds or self.ignored.kinds or self.left_out) or self.due is not None

    def comes_due(self, at: float) -> None:
        """Note that something may be ready at a monotonic time, seconds."""
        self.due = at if self.due is None else min(self.due, at)

    def wait(self, path: str, kind: str, reason: str, at: float) -> None:
        """Note that a prompt may be ready at a monotonic time, seconds."""
        self.waiting.add(path, kind, reason)
        self.comes_due(at)


@dataclass
class ScanResult:
    """What is known of the inbox after a scan.

    Attributes:
        waiting: What may not yet be claimed, and why.
        ignored: What is ignored, and why.
        ready: What may be claimed, in the order in which it is: as many as were asked for.
        due: Seconds until something may become ready, or None.
        folders: Every folder scanned, as paths.
        left_out: Stems that were left out because a job of their name is not over.
    """

    waiting: Reasons = field(default_factory=Reasons)
    ignored: Reasons = field(default_factory=Reasons)
    ready: list[Candidate] = field(default_factory=list)
    due: float | None = None
    folders: list[str] = field(default_factory=list)
    left_out: set[Key] = field(default_factory=set)
