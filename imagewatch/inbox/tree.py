"""The folders of the inbox and the names in them.

A folder is listed again only if its names may have changed. On file systems that are known to keep the times of folders
the folder itself tells: its ctime differs as soon as a name in it does. Elsewhere every look is a listing. No file is
opened or even looked at here.

A folder is listed in pieces, between which other folders can be listed: another user may have put a million files
into it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from imagewatch.inbox.candidate import Found, Reasons, first_level
from imagewatch.inbox.claimed import MARK, looks_like_claims
from imagewatch.inbox.stability import Settling
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.protocol.names import CLAIMS, SUFFIX, Alike, Beside, in_flight, is_picture, near_miss, stem_of
from imagewatch.system.disk_errors import ours
from imagewatch.system.file_systems import place_of
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator

    from imagewatch.inbox.candidate import Key, Look
    from imagewatch.inbox.window import Window

_Item = TypeVar("_Item")
_STEADY_SECONDS = 2.5
"""A folder that looked the same for so long before it was listed was listed whole: some file systems count in twos."""
_MANY = 4096
_PIECE = 32
"""So many names are one piece of a listing: a name may take a quarter of a millisecond."""
_ROOM = 4
"""So many times as many files as are named at last are named while each folder may name as many as that."""
_MOST_FOLDERS = 50_000
"""How many folders of one owner are looked into: each takes a kilobyte, and one more if the kernel tells of it."""
_LONGEST_PATH = 3800
"""Results of what is in a folder with a longer path below the inbox could not be published."""
_OTHER_PLACE = "another file system, from which nothing can be claimed: it needs an inbox of its own"
_LIKE_CLAIMS = f"it looks like a folder of claimed files; if it is not, remove {MARK} or lock from it"


_NOTHING_BESIDE = Beside(())
"""Of folders without prompts, of which there may be very many. Nothing is ever added to it."""


class Notes:
    """What is remembered of the stems of one folder until they are claimed.

    Args:
        settle_seconds: How long a stem must be quiet.
        looked: Monotonic time at which the last scan of the folder began, seconds.

    Attributes:
        settling: Since when each is quiet that is not settled.
        inputs: The same of the images that settled ones name.
        since: Monotonic time since which each waits for images, seconds.
        arrived: Those whose prompt came by rename.
        held: Date of each that is settled and cannot be claimed yet: it is judged again at the next scan.
        read: Which images each names, and what its prompt looked like when it was read.
        marks: Monotonic time at which each sign of a program at work was first seen, seconds, by its name.
    """

    __slots__ = ("arrived", "held", "inputs", "marks", "read", "settling", "since")

    def __init__(self, settle_seconds: float, looked: float) -> None:
        self.settling = Settling(settle_seconds, looked)
        self.inputs = Settling(settle_seconds)
        self.since: dict[str, float] = {}
        self.arrived: set[str] = set()
        self.held: dict[str, float] = {}
        self.read: dict[str, tuple[Look, tuple[str, ...] | None]] = {}
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
    """What is known of one folder. Of an empty one it is little: anybody can make very many.

    Attributes:
        path: Its path below the inbox; empty for the inbox itself.
        settled: Newest ctime of the files of each stem that is quiet, seconds since the epoch.
        unsettled: The other stems.
        beside: What belongs to a stem beside its prompt, as far as it is remembered.
        arriving: Names of what may become a prompt when its transfer gives it its name.
        place: Device and mount it is on.
        is_local: Whether its times are of our own clock.
        is_scanned: Whether a scan of it is under way.
        is_changed: Whether anything in it may be different since this was set to False.
        is_entered: Whether it could be looked into, and is on the file system of the inbox.
        is_gone: Whether it was not there when it was to be scanned last.
        was_claims: Whether it looked like a folder of claimed files when it was first seen.
        owner: Number of the user to whom it belongs.
        ignored: Why files that are no prompts are not taken, by path below the inbox.
        inner: The folders in it that are looked into, as paths below the inbox.
        found: What the last scan found.
        judged: What was found since, when prompts were looked at whose turn had come.
        was_judged: The same before the last scan, while not all was looked at again.
        window: Those of the settled stems that are the next ones.
        notes: What else is remembered of its stems.
        looked: Monotonic time at which the last scan began, seconds.
        names: How many files are named here that are not taken.
        counted: As whose folder it is counted.
        came: When it was brought into the inbox with what is in it, seconds since the epoch; 0: it was there before.
    """

    path: str
    settled: dict[str, float] = field(default_factory=dict)
    unsettled: dict[str, None] = field(default_factory=dict)
    beside: Beside = _NOTHING_BESIDE
    arriving: Collection[str] = ()
    place: tuple[int, int] = (0, 0)
    is_local: bool = True
    is_scanned: bool = False
    is_changed: bool = True
    is_entered: bool = False
    is_gone: bool = False
    was_claims: bool = False
    owner: int = -1
    ignored: Reasons | None = None
    inner: dict[str, None] = field(default_factory=dict)
    found: Found | None = None
    judged: Found | None = None
    was_judged: Found | None = None
    window: Window | None = None
    notes: Notes | None = None
    looked: float = float("-inf")
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
        """Device and inode when it was looked at last; None before."""
        return self._identity

    def settle(self, stem: str, changed: float) -> None:
        """Note that a stem is quiet."""
        self.unsettled.pop(stem, None)
        self.settled[stem] = changed
        if self._missing is not None:
            self._missing.discard(stem)

    def unsettle(self, stem: str) -> None:
        """Note that a stem that was quiet is not any more."""
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
        self.beside, self.arriving, self.ignored = _NOTHING_BESIDE, (), None
        self.window = self.notes = self.judged = self.was_judged = None
        self.distrust()

    def distrust(self) -> None:
        """See to it that it is listed at the next look, also if it is being listed now."""
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
            self.notes = Notes(settle_seconds, self.looked)
        return self.notes

    def may_need(self, name: str) -> bool:
        """Tell whether a file that is not known as a prompt's may be meant for one that is settled or settling."""
        return self.beside.may_be_for(name)

    def is_other(self, status: os.stat_result) -> bool:
        """Tell whether it is another folder of its name than it was."""
        before, self._identity = self._identity, (status.st_dev, status.st_ino)
        return before != self._identity

    def may_differ(self, status: os.stat_result, now: float, *, keeps_times: bool) -> bool:
        """Tell whether there may be other names in it than when it was listed."""
        stamp = (status.st_mtime_ns, status.st_ctime_ns)
        if stamp != self._stamp:
            self._stamp, self._steady = stamp, now
        elif keeps_times and self._listed >= self._steady + _STEADY_SECONDS:
            return False
        self._listed = now
        return True


class _Others:
    """What is in a folder beside prompts and folders. Of very many none is kept: they are listed again when needed.

    Args:
        descriptor: The folder.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._few: list[tuple[str, bool]] = []

    def add(self, entry: os.DirEntry[str]) -> None:
        """Note that something is there."""
        if len(self._few) <= _MANY:
            self._few.append((entry.name, entry.is_symlink()))

    def __bool__(self) -> bool:
        return bool(self._few)

    def __iter__(self) -> Iterator[tuple[str, bool] | None]:
        """Return the names, and whether each is a link's; None after each piece of the work."""
        return _pieces(self._few) if len(self._few) <= _MANY else self._listed()

    def _listed(self) -> Iterator[tuple[str, bool] | None]:
        with os.scandir(self._descriptor) as entries:
            for entry in _pieces(entries):
                if entry is None:
                    yield None
                elif stem_of(entry.name) is None and not entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.is_symlink()


@dataclass(frozen=True, slots=True)
class Visitor:
    """What is to be done with one folder.

    Attributes:
        found: What cannot be listed, what is ignored and what is passed over is noted here.
        opened: Called with the folder and a descriptor of it before it is listed.
        observe: Called with the folder, the stem and a descriptor for each stem that is not settled; tells whether it
            is settled now.
        taken: Tells whether a stem is to be passed over.
        now: Monotonic time, seconds.
    """

    found: Found
    opened: Callable[[Folder, int], None]
    observe: Callable[[Folder, str, int], bool]
    taken: Callable[[Key], bool]
    now: float


class Folders:
    """All folders of an inbox.

    Args:
        inbox: The inbox.
        recursive: Whether folders in it are looked into.
        keeps_times: Tells of a folder whether it is sure to have the same names in it as long as it looks the same.
        is_local: Tells of an open folder whether its times are of our own clock.
        most_named: How many files that are not taken are named; None for all.
        explain: Whether a reason is given for each file and folder, also for those that nobody takes for a prompt.
        tops: The folders that were opened, the inbox among them; without, it is opened here.

    Attributes:
        tops: The same.
        changed: Whether anything may be different since this was set to False.
        fresh: Folders that were found, and not looked into since this was emptied.
        gone: Folders that are not there any more, since this was emptied.
        is_complete: Whether what is found from now on was not there at the start.
        came: When folders came that were found before: by device and inode, seconds since the epoch.
    """

    def __init__(
        self,
        inbox: str,
        *,
        recursive: bool,
        keeps_times: Callable[[str], bool],
        is_local: Callable[[int], bool],
        most_named: int | None,
        explain: bool,
        tops: Tops | None = None,
    ) -> None:
        self._inbox = inbox
        self._opens = tops is None
        self.tops = tops or Tops()
        self._recursive = recursive
        self._keeps_times = keeps_times
        self._is_local = is_local
        self._most_named = most_named
        self._explain = explain
        self._known: dict[str, Folder] = {}
        self._places: dict[tuple[int, int], tuple[tuple[int, int], bool]] = {}
        self._owned: Counter[int] = Counter()  # how many folders belong to each owner of a first-level folder
        self._names = self._keepers = 0  # files that are not taken and named, and folders in which they are
        self.changed = True
        self.is_complete = False
        self.came: dict[tuple[int, int] | None, float] = {}
        self.fresh: list[str] = []
        self.gone: list[str] = []

    def __iter__(self) -> Iterator[Folder]:
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def get(self, path: str) -> Folder | None:
        """Return what is known of a folder."""
        return self._known.get(path)

    def add(self, path: str) -> Folder:
        """Return what is known of a folder; it may be nothing yet."""
        folder = self._known.get(path)
        if folder is None:
            folder = self._known[path] = Folder(path)
        return folder

    def full(self, path: str) -> str:
        """Return the whole path of something below the inbox."""
        return os.path.join(self._inbox, path) if path else self._inbox

    def is_real(self, path: str) -> bool:
        """Tell whether a folder below the inbox is the one that was listed, reached through no link."""
        try:
            now = self.tops.folder(self.full(path)).status().st_ino
        except OSError:
            return False
        known = self._known.get(path)
        return known is None or known.inode in {0, now}

    def named(self) -> int | None:
        """Return how many files of one folder are named that are not taken; None for all."""
        if self._most_named is None or self._names < _ROOM * self._most_named:
            return self._most_named
        return max(self._most_named // self._keepers, 1)

    def count_names(self, folder: Folder) -> None:
        """Take note of how many files of a folder are named that are not taken."""
        parts = (folder.found, folder.judged)
        reasons = [folder.ignored, *(one for part in parts if part for one in (part.waiting, part.ignored))]
        self._count_names(folder, sum(len(one) for one in reasons if one))

    def _count_names(self, folder: Folder, names: int) -> None:
        self._names += names - folder.names
        self._keepers += (names > 0) - (folder.names > 0)
        folder.names = names

    def begin(self) -> None:
        """Begin to look at everything again.

        Raises:
            SpoolError: The inbox is not there.
        """
        self._places.clear()  # something else may be mounted now
        if self._opens:
            with ours(self._inbox, "list the folder"):
                if self.tops.is_replaced(self._inbox):
                    self.tops.open(self._inbox)

    def forget(self, path: str) -> None:
        """Forget a folder and those in it."""
        if folder := self._known.get(path):
            self.leave(folder)
            self._drop(folder)

    def leave(self, folder: Folder) -> None:
        """Forget what is in a folder, which cannot be looked into."""
        inner = list(self._clear(folder))
        while inner:  # a user may have made a thousand folders, each in the one before
            if below := self._known.get(inner.pop()):
                inner += self._clear(below)
                self._drop(below)

    def _clear(self, folder: Folder) -> dict[str, None]:
        """Forget what is in a folder, the folders in it aside; return those."""
        inner = folder.inner
        folder.is_entered, self.changed = False, True
        self._count_names(folder, 0)
        folder.clear()
        return inner

    def _drop(self, folder: Folder) -> None:
        del self._known[folder.path]
        self._owned[folder.counted] -= 1
        self.gone.append(folder.path)

    def look_into(self, folder: Folder, visitor: Visitor) -> Iterator[None]:
        """Bring the names of a folder up to date, and observe its stems that are not settled; a piece each time.

        Raises:
            SpoolError: It cannot be listed.
        """
        full = self.full(folder.path)
        with self._opened(folder.path) as descriptor:
            with ours(full, "look at the folder"):
                status = os.fstat(descriptor)
                self._meet(folder, status, descriptor)
            folder.owner = status.st_uid
            folder.is_gone, is_here = False, folder.place == self.add("").place
            is_claims = self._is_claims(status)
            if not is_here or folder.was_claims or is_claims:
                if not is_claims:
                    visitor.found.ignored.add(folder.path, _LIKE_CLAIMS if is_here else _OTHER_PLACE)
                self.leave(folder)
                return
            folder.is_entered = True
            visitor.opened(folder, descriptor)
            folder.is_scanned = True
            differs = folder.may_differ(status, visitor.now, keeps_times=self._keeps_times(full))
            try:
                stems = list(folder.unsettled)
                if differs:
                    with ours(full, "list the folder"):
                        stems = yield from self._list(folder, descriptor, visitor)
                for stem in _pieces(stems):
                    if stem is None:
                        yield
                    else:
                        visitor.observe(folder, stem, descriptor)
                folder.unsettled = dict(folder.unsettled)  # which gives back the room of those that are settled now
            except BaseException:
                folder.distrust()
                raise
            finally:
                folder.is_scanned = False

    def _meet(self, folder: Folder, status: os.stat_result, descriptor: int) -> None:
        """Look at what a folder is, if another one has its name now."""
        full, is_new = self.full(folder.path), folder.identity is None
        is_other = folder.is_other(status)
        if is_other:
            folder.place, folder.is_local = self._place(descriptor)
            if is_new or self._keeps_times(full):  # else it may be the same one with another number
                folder.came = self._came(folder, status)
            folder.distrust()
        if is_other or folder.was_claims:  # what makes it look so can be removed
            folder.was_claims = bool(folder.path) and looks_like_claims(descriptor)

    def _came(self, folder: Folder, status: os.stat_result) -> float:
        """Return when a folder was brought into the inbox: a rename of it changes no date of what is in it."""
        above = self._known.get(os.path.dirname(folder.path)) if folder.path else None
        if above is None or not self.is_complete:
            return self.came.get(folder.identity, 0.0)
        return max(status.st_ctime, above.came)

    def _is_claims(self, status: os.stat_result) -> bool:
        """Tell whether it is the folder of claimed files, which others may have given another name."""
        claims = self.tops.opened(os.path.join(self._inbox, CLAIMS))
        return claims is not None and claims.is_same(status)

    def _place(self, descriptor: int) -> tuple[tuple[int, int], bool]:
        """Return on which device and mount a folder is, and whether its times are of our own clock."""
        place = place_of(descriptor)
        if place not in self._places:
            self._places[place] = place, self._is_local(descriptor)
        return self._places[place]

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a folder; one that was replaced by a link meanwhile is not followed."""
        full = self.full(path)
        with ours(full, "list the folder"):
            folder = self.tops.listable(full)
        yield folder.fileno()

    def _list(self, folder: Folder, descriptor: int, visitor: Visitor) -> Generator[None, None, list[str]]:
        """List a folder; return the stems that are still to be observed."""
        stems: list[str] = []
        others, inner, before = _Others(descriptor), dict[str, None](), set(folder.inner)
        ignored = Reasons(visitor.found.ignored.most)
        folder.begin_listing()
        try:
            with os.scandir(descriptor) as entries:
                for entry in _pieces(entries):
                    if entry is None:
                        yield
                    elif entry.is_dir(follow_symlinks=False):
                        self._enter(folder, entry.name, inner, ignored)
                    elif (stem := stem_of(entry.name)) is None:
                        others.add(entry)
                    elif not self._is_known(folder, stem, visitor):
                        stems.append(stem)
            folder.end_listing()
        finally:
            folder.stop_listing()
        for gone in before.difference(inner):
            self.forget(gone)
        folder.inner = inner | {path: None for path in folder.inner if path not in before}  # found meanwhile
        folder.unsettled = dict.fromkeys(stems)
        known, beside = Alike(), _NOTHING_BESIDE
        if folder.unsettled or folder.settled or visitor.found.passed:
            beside = Beside(folder, known)
            for each in _pieces([*folder.settled, *folder.unsettled, *visitor.found.passed]) if others else ():
                if each is None:
                    yield
                else:
                    known.add(each)
        yield from self._sort_out(folder, others, ignored, beside)
        folder.is_changed = True
        return stems

    def _is_known(self, folder: Folder, stem: str, visitor: Visitor) -> bool:
        """Tell whether nothing is to be found out about a stem that is there."""
        if folder.found_again(stem) is not None:
            return True
        if visitor.taken((folder.path, stem)):
            visitor.found.passed.add(stem)
            folder.distrust()
            return True
        return False

    def _enter(self, folder: Folder, name: str, inner: dict[str, None], ignored: Reasons) -> None:
        """Note whether a folder is looked into."""
        path = _join(folder.path, name)
        if why := why_not_entered(name):
            if name != CLAIMS:
                ignored.add(path, why)
        elif not self._recursive:
            ignored.add(path, "a folder, and inbox.recursive is off")
        elif len(os.fsencode(path)) > _LONGEST_PATH:
            ignored.add(path, "a folder whose path is too long")
        elif not self._may_enter(path):
            ignored.add(path, f"a folder beyond the {_MOST_FOLDERS:,} of one owner that are looked into")
            folder.distrust()  # it may be one of them later
        else:
            inner[self._known[path].path] = None  # as it is kept

    def _may_enter(self, path: str) -> bool:
        """Tell whether a folder is looked into; if it is new, note that it has to be."""
        if path in self._known:
            return True
        above = self._known.get(first_level(path))
        owner = above.owner if above else self._owner(path)
        if self._owned[owner] >= _MOST_FOLDERS:
            return False
        folder = self.add(path)
        folder.owner = folder.counted = owner
        self._owned[owner] += 1
        self.fresh.append(path)
        return True

    def _owner(self, path: str) -> int:
        with contextlib.suppress(OSError):
            return self.tops.lstat(self.full(path)).st_uid
        return -1

    def found_inside(self, folder: Folder, name: str) -> None:
        """Note that a folder was seen in this one, so that this one need not be listed to look into it."""
        self._enter(folder, name, folder.inner, Reasons(0))

    def _sort_out(self, folder: Folder, others: _Others, ignored: Reasons, beside: Beside) -> Iterator[None]:
        """Find out to which stems the files belong that are no prompts."""
        has_stems, arriving = beside is not _NOTHING_BESIDE, list[str]()
        for other in others:
            if other is None:
                yield
                continue
            name, is_link = other
            is_own = has_stems and beside.add(name)
            path = _join(folder.path, name)
            if is_link and name[0] != ".":
                ignored.add(path, "a link, which is not followed")
            elif near_miss(name) and in_flight(name) and len(arriving) < _MANY:
                arriving.append(name)
            elif near_miss(name):
                ignored.add(path, _near_miss(name))
            elif self._explain and not is_own:
                ignored.add(path, _no_prompt(name))
        beside.complete()
        folder.beside = beside
        folder.arriving = arriving or ()
        folder.ignored = ignored if ignored.kinds else None


def _near_miss(name: str) -> str:
    rule = f"must end in exactly {SUFFIX}" if not name.endswith(SUFFIX) else "must not begin with ., ~ or #"
    return f"not a prompt: the name {rule}"


def _no_prompt(name: str) -> str:
    """Return why nobody takes a file that is no prompt."""
    if is_picture(name):
        return "an image to which there is no prompt"
    if in_flight(name):
        return "a temporary file of an editor or a transfer"
    return "hidden" if name[0] == "." else "not a prompt"


def _pieces(items: Iterable[_Item]) -> Iterator[_Item | None]:
    """Return these, and None after each piece of the work."""
    for count, item in enumerate(items, 1):
        yield item
        if not count % _PIECE:
            yield None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
