"""What is known of one folder of the inbox, and of the prompts in it that are not claimed yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.inbox.stability import Settling
from imagewatch.protocol.names import SiblingIndex

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

    from imagewatch.inbox.candidate import FileState, Found, Reasons
    from imagewatch.inbox.oldest_prompts import OldestPrompts

_STEADY_SECONDS = 2.5
"""A listing is complete if the times of the folder had not changed for so long: some file systems count in twos."""
NO_SIBLINGS = SiblingIndex(())
"""Of folders without prompts, of which there may be very many. Nothing is ever added to it."""


class Notes:
    """What is remembered of the stems of one folder until they are claimed.

    Args:
        settle_seconds: How long a prompt must be unchanged.
        scanned_at: Monotonic time at which the last scan of the folder began, seconds.

    Attributes:
        settling: Since when each is unchanged that is not settled.
        inputs: The same of the images that settled ones name.
        since: Monotonic time since which each waits for images, seconds.
        arrived: Those whose prompt came by rename.
        held: Date of each that is settled and cannot be claimed yet: it is checked again at the next scan.
        read: Which images each names, and the state of its prompt when it was read.
        marks: Monotonic time at which each sign of a program at work was first seen, seconds, by its name.
    """

    __slots__ = ("arrived", "held", "inputs", "marks", "read", "settling", "since")

    def __init__(self, settle_seconds: float, scanned_at: float) -> None:
        self.settling = Settling(settle_seconds, scanned_at)
        self.inputs = Settling(settle_seconds)
        self.since: dict[str, float] = {}
        self.arrived: set[str] = set()
        self.held: dict[str, float] = {}
        self.read: dict[str, tuple[FileState, tuple[str, ...] | None]] = {}
        self.marks: dict[str, float] = {}

    def __bool__(self) -> bool:
        return any((self.settling, self.inputs, self.since, self.arrived, self.held, self.read, self.marks))

    def discard(self, stem: str) -> None:
        """Forget a stem that is not there any more, or that is claimed."""
        self.arrived.discard(stem)
        for notes in (self.held, self.since, self.read):
            notes.pop(stem, None)


@dataclass(slots=True)
class Folder:
    """What is known of one folder. Of an empty one it is little: any user can create very many.

    Attributes:
        path: Its path below the inbox; empty for the inbox itself.
        settled: Newest ctime of the files of each settled stem, seconds since the epoch.
        unsettled: The other stems.
        siblings: What belongs to a stem beside its prompt, as far as it is remembered.
        arriving: Names of what may become a prompt when its transfer gives it its name.
        place: Device and mount it is on.
        is_local: Whether its times are of our own clock.
        is_scanned: Whether a scan of it is under way.
        is_changed: Whether anything in it may be different since this was set to False.
        is_entered: Whether it could be scanned, and is on the file system of the inbox.
        is_missing: Whether it was not there when it was to be scanned last.
        was_claims: Whether it was like a folder of claimed files when it was first opened.
        owner: Number of the user to whom it belongs.
        ignored: Why files that are no prompts are ignored, by path below the inbox.
        inner: The folders in it that are scanned, as paths below the inbox.
        found: What the last scan found.
        checked: What was found since, when prompts were checked whose turn had come.
        was_checked: The same before the last scan, while not all was checked again.
        oldest: Those of the settled stems that are the next ones.
        notes: What else is remembered of its stems.
        scanned_at: Monotonic time at which the last scan began, seconds.
        names: How many ignored files are named here.
        counted: As whose folder it is counted.
        came: When it was brought into the inbox with what is in it, seconds since the epoch; 0: it was there before.
    """

    path: str
    settled: dict[str, float] = field(default_factory=dict)
    unsettled: dict[str, None] = field(default_factory=dict)
    siblings: SiblingIndex = NO_SIBLINGS
    arriving: Collection[str] = ()
    place: tuple[int, int] = (0, 0)
    is_local: bool = True
    is_scanned: bool = False
    is_changed: bool = True
    is_entered: bool = False
    is_missing: bool = False
    was_claims: bool = False
    owner: int = -1
    ignored: Reasons | None = None
    inner: dict[str, None] = field(default_factory=dict)
    found: Found | None = None
    checked: Found | None = None
    was_checked: Found | None = None
    oldest: OldestPrompts | None = None
    notes: Notes | None = None
    scanned_at: float = float("-inf")
    names: int = 0
    counted: int = -1
    came: float = 0.0
    _identity: tuple[int, int] | None = None
    _stamp: tuple[int, int] | None = None
    _steady: float = 0.0
    _listed: float = 0.0
    _missing: set[str] | None = None

    def __contains__(self, stem: object) -> bool:
        return isinstance(stem, str) and (stem in self.unsettled or stem in self.settled)

    @property
    def inode(self) -> int:
        """Its inode when it was listed last; 0 for the inbox itself, and before."""
        return self._identity[1] if self._identity and self.path else 0

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode when it was opened last; None before."""
        return self._identity

    def settle(self, stem: str, changed: float) -> None:
        """Note that a stem is settled."""
        self.unsettled.pop(stem, None)
        self.settled[stem] = changed
        if self._missing is not None:
            self._missing.discard(stem)

    def unsettle(self, stem: str) -> None:
        """Note that a stem is not settled any more."""
        if self.settled.pop(stem, None) is not None:
            self.unsettled[stem] = None
        if self.is_scanned:
            self.distrust()  # the listing may have gone past it

    def forget(self, stem: str) -> None:
        """Forget a stem. It is found again if it is still there."""
        self.settled.pop(stem, None)
        self.unsettled.pop(stem, None)
        if self.notes is not None:
            self.notes.discard(stem)
        self.distrust()

    def clear(self) -> None:
        """Forget all that is in it."""
        self.settled, self.unsettled, self.inner = {}, {}, {}
        self.siblings, self.arriving, self.ignored = NO_SIBLINGS, (), None
        self.oldest = self.notes = self.checked = self.was_checked = None
        self.distrust()

    def distrust(self) -> None:
        """Make sure that it is listed at the next scan, also if it is being listed now."""
        self._stamp = None

    def begin_listing(self) -> None:
        """Note that it is listed from the beginning: settled stems have to be found again."""
        self._missing = set(self.settled)

    def found_again(self, stem: str) -> float | None:
        """Return the date of a stem that the listing has come to; None if it is not settled."""
        if self._missing is not None:
            self._missing.discard(stem)
        return self.settled.get(stem)

    def end_listing(self) -> None:
        """Note that it was listed to the end: settled stems that were not found are not there any more."""
        for stem in self._missing or ():
            self.settled.pop(stem, None)
        self.stop_listing()

    def stop_listing(self) -> None:
        """Note that it is not listed any more, be it to the end or not."""
        self._missing = None

    def noted(self, settle_seconds: float) -> Notes:
        """Return what is remembered of its stems, to note something."""
        if self.notes is None:
            self.notes = Notes(settle_seconds, self.scanned_at)
        return self.notes

    def may_need(self, name: str) -> bool:
        """Return whether a file that is not known as a prompt's may be meant for one that is settled or settling."""
        return self.siblings.may_be_for(name)

    def is_other(self, status: os.stat_result) -> bool:
        """Return whether it is another folder of its name than it was."""
        before, self._identity = self._identity, (status.st_dev, status.st_ino)
        return before != self._identity

    def may_differ(self, status: os.stat_result, now: float, *, keeps_times: bool) -> bool:
        """Return whether there may be other names in it than when it was listed."""
        stamp = (status.st_mtime_ns, status.st_ctime_ns)
        if stamp != self._stamp:
            self._stamp, self._steady = stamp, now
        elif keeps_times and self._listed >= self._steady + _STEADY_SECONDS:
            return False
        self._listed = now
        return True
