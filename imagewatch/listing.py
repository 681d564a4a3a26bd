"""The folders of the inbox and the names in them, as compact as a hundred thousand prompts need it.

A folder is listed again only if its names may have changed. On file systems that are known to keep the times of folders
the folder itself tells: its ctime differs as soon as a name in it does. Elsewhere every look is a listing. No file is
opened or even looked at here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.compact import Numbers
from imagewatch.durable import ours
from imagewatch.errors import SpoolError
from imagewatch.folders import Tops
from imagewatch.mounts import place_of
from imagewatch.names import CLAIMS, SKIPPED_FOLDERS, SUFFIX, Beside, in_flight, is_picture, near_miss, stem_of
from imagewatch.seen import Reasons

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from imagewatch.seen import Key, Seen

_STEADY_SECONDS = 2.5
"""A folder that looked the same for so long before it was listed was listed whole: some file systems count in twos."""
_MANY = 4096
_OTHER_PLACE = "another file system, from which nothing can be claimed: it needs an inbox of its own"


class Unsettled:
    """The stems of a folder that are not quiet. Of very many only some are named: it is listed for the others.

    Args:
        named: Some that are named.
    """

    __slots__ = ("_hashed", "_named")

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._named = set(named)
        self._hashed = Numbers[int]("b")

    def __contains__(self, stem: str) -> bool:
        return stem in self._named or self._hashed.get(stem) is not None

    def __bool__(self) -> bool:
        return bool(self._named) or not self.are_named

    def __iter__(self) -> Iterator[str]:
        """Return those that are named."""
        return iter(self._named)

    @property
    def are_named(self) -> bool:
        """Whether all of them are named."""
        return not len(self._hashed)

    def add(self, stem: str) -> None:
        """Note that a stem is not quiet."""
        if len(self._named) < _MANY:
            self._named.add(stem)
        else:
            self._hashed.set(stem, 1)

    def discard(self, stem: str) -> None:
        """Forget a stem."""
        self._named.discard(stem)
        self._hashed.discard(stem)


@dataclass(slots=True)
class Folder:
    """What is known of one folder.

    Attributes:
        path: Its path below the inbox; empty for the inbox itself.
        settled: Newest ctime of the files of each stem that is quiet, seconds since the epoch.
        unsettled: The other stems.
        beside: What belongs to a stem beside its prompt, as far as it is remembered.
        arriving: Names of what may become a prompt when its transfer gives it its name.
        place: Device and mount it is on.
        is_local: Whether its times are of our own clock.
        ignored: Why files that are no prompts are not taken, by path below the inbox.
        inner: The folders in it that are looked into, as paths below the inbox.
    """

    path: str
    settled: Numbers[float] = field(default_factory=lambda: Numbers("d"))
    unsettled: Unsettled = field(default_factory=Unsettled)
    beside: Beside = field(default_factory=lambda: Beside(()))
    arriving: list[str] = field(default_factory=list)
    place: tuple[int, int] = (0, 0)
    is_local: bool = True
    ignored: Reasons = field(default_factory=Reasons)
    inner: list[str] = field(default_factory=list)
    _identity: tuple[int, int] | None = None
    _stamp: tuple[int, ...] | None = None
    _steady: float = 0.0
    _listed: float = 0.0

    def __contains__(self, stem: object) -> bool:
        return isinstance(stem, str) and (stem in self.unsettled or self.settled.get(stem) is not None)

    def settle(self, stem: str, changed: float) -> None:
        """Note that a stem is quiet."""
        self.unsettled.discard(stem)
        self.settled.set(stem, changed)

    def unsettle(self, stem: str) -> None:
        """Note that a stem that was quiet is not any more."""
        if self.settled.discard(stem):
            self.unsettled.add(stem)

    def forget(self, stem: str) -> None:
        """Forget a stem. It is found again if it is still there."""
        self.settled.discard(stem)
        self.unsettled.discard(stem)
        self.distrust()

    def distrust(self) -> None:
        """See to it that it is listed at the next look."""
        self._stamp = None

    @property
    def inode(self) -> int:
        """Its inode when it was listed last; 0 for the inbox itself, and before."""
        return self._identity[1] if self._identity and self.path else 0

    def is_other(self, descriptor: int) -> bool:
        """Tell whether it is another folder of its name than it was."""
        status = os.fstat(descriptor)
        before, self._identity = self._identity, (status.st_dev, status.st_ino)
        return before != self._identity

    def may_differ(self, descriptor: int, now: float, *, keeps_times: bool) -> bool:
        """Tell whether there may be other names in it than when it was listed."""
        status = os.fstat(descriptor)
        stamp = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if stamp != self._stamp:
            self._stamp, self._steady = stamp, now
        elif keeps_times and self._listed >= self._steady + _STEADY_SECONDS:
            return False
        self._listed = now
        return True


class _Asked:
    """A container that contains nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        self.stems: set[object] = set()

    def __contains__(self, stem: object) -> bool:
        self.stems.add(stem)
        return False


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

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """Return the names, and whether each is a link's."""
        return iter(self._few) if len(self._few) <= _MANY else self._listed()

    def _listed(self) -> Iterator[tuple[str, bool]]:
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                if stem_of(entry.name) is None and not entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.is_symlink()


@dataclass(frozen=True)
class Visitor:
    """What is to be done with the stems of all folders.

    Attributes:
        observe: Called with the folder, the stem and a descriptor of the folder for each stem that is not settled;
            tells whether it is settled now.
        offer: Called with date and key of each stem that is settled; every folder is listed for it. None: not needed.
        taken: Stems to pass over.
    """

    observe: Callable[[Folder, str, int], bool]
    offer: Callable[[float, Key], None] | None
    taken: Collection[Key | None]


class Folders:
    """All folders of an inbox.

    Args:
        inbox: The inbox.
        recursive: Whether folders in it are looked into.
        keeps_times: Tells of a folder whether it is sure to have the same names in it as long as it looks the same.
        is_local: Tells of a folder whether its times are of our own clock.
        most_named: How many files that are not taken are named; None for all.
        explain: Whether a reason is given for each file and folder, also for those that nobody takes for a prompt.
        tops: The folders that were opened, the inbox among them; without, it is opened here.

    Attributes:
        tops: The same.
        changed: Whether any name may be different since somebody set this to False.
    """

    def __init__(
        self,
        inbox: str,
        *,
        recursive: bool,
        keeps_times: Callable[[str], bool],
        is_local: Callable[[str], bool],
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
        self.changed = True

    def __iter__(self) -> Iterator[Folder]:
        return iter(self._known.values())

    def get(self, path: str) -> Folder | None:
        """Return what is known of a folder."""
        return self._known.get(path)

    def add(self, path: str) -> Folder:
        """Return what is known of a folder; it may be nothing yet."""
        return self._known.setdefault(path, Folder(path))

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

    def look(self, seen: Seen, now: float, visitor: Visitor) -> None:
        """Bring the names of all folders up to date, and observe all stems that are not settled.

        Args:
            seen: What cannot be listed, what is ignored and what is passed over is noted here.
            now: Monotonic time, seconds.
            visitor: What is to be done with the stems.

        Raises:
            SpoolError: The inbox itself cannot be listed.
        """
        if self._opens:
            with ours(self._inbox, "list the folder"):
                if self.tops.is_replaced(self._inbox):
                    self.tops.open(self._inbox)
        found: set[str] = set()
        waiting = [""]
        while waiting:
            path = waiting.pop()
            folder = self.add(path)
            try:
                self._look_into(folder, seen, now, visitor)
            except SpoolError as error:
                folder.distrust()
                if not path:
                    raise
                seen.ignored.add(path, "a folder that cannot be listed", str(error))
                self.changed = True
                continue
            if folder.place != self.add("").place:
                seen.ignored.add(path, _OTHER_PLACE)
                continue
            found.add(path)
            seen.folders.append(self.full(path))
            seen.ignored.join(folder.ignored)
            waiting += folder.inner
        for path in self._known.keys() - found:
            del self._known[path]
            self.changed = True

    def _look_into(self, folder: Folder, seen: Seen, now: float, visitor: Visitor) -> None:
        full = self.full(folder.path)
        with self._opened(folder.path) as descriptor:
            if folder.is_other(descriptor):
                folder.place, folder.is_local = place_of(descriptor), self._is_local(full)
            if folder.place != self.add("").place:
                return
            differs = folder.may_differ(descriptor, now, keeps_times=self._keeps_times(full))
            if differs or visitor.offer or not folder.unsettled.are_named:
                with ours(full, "list the folder"):
                    stems = self._list(folder, descriptor, seen, visitor)
            else:
                stems = list(folder.unsettled)
            for stem in stems:
                visitor.observe(folder, stem, descriptor)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a folder; one that was replaced by a link meanwhile is not followed."""
        full = self.full(path)
        with ours(full, "list the folder"):
            folder = self.tops.listable(full)
        yield folder.fileno()

    def _list(self, folder: Folder, descriptor: int, seen: Seen, visitor: Visitor) -> list[str]:
        """List a folder; return the stems that are still to be observed."""
        stems: list[str] = []
        others = _Others(descriptor)
        folders: list[str] = []
        many = False
        folder.settled.begin()
        with os.scandir(descriptor) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif (stem := stem_of(name)) is None:
                    others.add(entry)
                elif (changed := folder.settled.find(stem)) is not None:
                    if visitor.offer:
                        visitor.offer(changed, (folder.path, stem))
                elif (folder.path, stem) in visitor.taken:
                    seen.passed.add((folder.path, stem))
                    folder.distrust()
                elif len(stems) < _MANY:
                    stems.append(stem)
                else:
                    many = True
        folder.settled.end()
        folder.unsettled = Unsettled(stems)
        folder.ignored = Reasons(self._most_named)
        self._enter(folder, folders)
        if many:
            stems = self._list_many(folder, descriptor, others, visitor)
        self._sort_out(folder, others)
        self.changed = True
        return stems

    def _list_many(self, folder: Folder, descriptor: int, others: _Others, visitor: Visitor) -> list[str]:
        """List a folder again in which very many prompts are not quiet, and observe them without holding their names.

        Returns:
            Those to which another file may belong: they have to wait until it is known which files do.
        """
        asked, later = _Asked(), list[str]()
        probe, folder.beside, folder.unsettled = Beside(asked), Beside(()), Unsettled()
        for name, _ in others:
            probe.owner(name)
            folder.beside.add(name)
        with os.scandir(descriptor) as entries:
            for entry in entries:
                stem = stem_of(entry.name)
                if stem is None or (folder.path, stem) in visitor.taken or folder.settled.get(stem) is not None:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    continue
                if stem in asked.stems:
                    later.append(stem)
                elif visitor.observe(folder, stem, descriptor):
                    continue
                folder.unsettled.add(stem)
        return later

    def _enter(self, folder: Folder, names: list[str]) -> None:
        """Note which folders are looked into."""
        folder.inner = []
        for name in names:
            path = _join(folder.path, name)
            if name.startswith(SKIPPED_FOLDERS):
                if self._explain and name != CLAIMS:
                    folder.ignored.add(path, "a folder that systems and tools keep for themselves")
            elif not self._recursive:
                folder.ignored.add(path, "a folder, and inbox.recursive is off")
            elif name.startswith(("~", "#")):
                folder.ignored.add(path, "a folder whose name begins with ~ or #")
            else:
                folder.inner.append(path)

    def _sort_out(self, folder: Folder, others: _Others) -> None:
        """Find out to which stems the files belong that are no prompts."""
        folder.beside, folder.arriving = Beside(folder), []
        for name, is_link in others:
            is_own = folder.beside.add(name)
            path = _join(folder.path, name)
            if is_link and name[0] != ".":
                folder.ignored.add(path, "a link, which is not followed")
            elif near_miss(name) and in_flight(name) and len(folder.arriving) < _MANY:
                folder.arriving.append(name)
            elif near_miss(name):
                folder.ignored.add(path, _near_miss(name))
            elif self._explain and not is_own:
                folder.ignored.add(path, _no_prompt(name))


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


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
