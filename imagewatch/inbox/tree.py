"""The folders of the inbox and the names in them.

A folder is listed again only if its names may have changed. On file systems that are known to keep the times of folders
the ctime of the folder differs as soon as a name in it does. Elsewhere it is listed at each scan. No file is opened
here.

A folder is listed in pieces, between which other folders can be listed: another user may have put a million files
into it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import Found, Reasons, first_level
from imagewatch.inbox.claimed import MARK, looks_like_claims
from imagewatch.inbox.folder import NO_SIBLINGS, Folder
from imagewatch.inbox.listing import MANY, Others, pieces, why_near_miss, why_no_prompt
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.protocol.names import CLAIMS, NOTES, CaselessStems, SiblingIndex, final_name, near_miss, stem_of
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.file_systems import place_of
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from imagewatch.inbox.candidate import Key

_ROOM = 4
"""While folders are scanned, so many times more files are kept by name than are named at the end."""
_MOST_FOLDERS = 50_000
"""How many folders of one owner are scanned: each takes a kilobyte, and one more if it is watched."""
_LONGEST_PATH = 3800
"""Results of what is in a folder with a longer path below the inbox could not be published."""
_OTHER_PLACE = "another file system, from which nothing can be claimed: it needs an inbox of its own"
_LIKE_CLAIMS = f"it looks like a folder of claimed files; if it is not, remove {MARK} or lock from it"


@dataclass(frozen=True, slots=True)
class Visitor:
    """What is to be done with one folder.

    Attributes:
        found: What cannot be listed, what is ignored and what is passed over is noted here.
        opened: Called with the folder and a descriptor of it before it is listed.
        observe: Called with the folder, the stem and a descriptor for each stem that is not settled; returns whether
            it is settled now.
        has_job: Returns whether a job of a stem is not over; the stem is left out.
        after_look: Returns the monotonic time, seconds.
    """

    found: Found
    opened: Callable[[Folder, int], None]
    observe: Callable[[Folder, str, int], bool]
    has_job: Callable[[Key], bool]
    after_look: Callable[[], float]


class Folders:
    """All folders of an inbox.

    Args:
        inbox: The inbox.
        recursive: Whether folders in it are scanned.
        keeps_times: Returns for a folder whether the same times mean the same names in it.
        is_local: Returns for an open folder whether its times are of our own clock.
        most_named: How many ignored files are named; None for all.
        explain: Whether a reason is given for each file and folder, also for those that are clearly no prompts.
        tops: The folders that were opened, the inbox among them; without, it is opened here.

    Attributes:
        tops: The same.
        changed: Whether anything may be different since this was set to False.
        fresh: Folders that were found, and not scanned since this was emptied.
        removed: Folders that do not exist any more, since this was emptied.
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
        self._names = self._keepers = 0  # ignored files that are named, and the folders with them
        self.changed = True
        self.is_complete = False
        self.came: dict[tuple[int, int] | None, float] = {}
        self.fresh: list[str] = []
        self.removed: list[str] = []

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
        """Return whether a folder below the inbox is the one that was listed, reached through no link."""
        try:
            now = self.tops.folder(self.full(path)).status().st_ino
        except OSError:
            return False
        known = self._known.get(path)
        return known is None or known.inode in {0, now}

    def named(self) -> int | None:
        """Return how many ignored files of one folder are named; None for all."""
        if self._most_named is None or self._names < _ROOM * self._most_named:
            return self._most_named
        return max(self._most_named // self._keepers, 1)

    def count_names(self, folder: Folder) -> None:
        """Note how many ignored files of a folder are named."""
        parts = (folder.found, folder.checked)
        reasons = [folder.ignored, *(one for part in parts if part for one in (part.waiting, part.ignored))]
        self._count_names(folder, sum(len(one) for one in reasons if one))

    def _count_names(self, folder: Folder, names: int) -> None:
        self._names += names - folder.names
        self._keepers += (names > 0) - (folder.names > 0)
        folder.names = names

    def begin(self) -> None:
        """Begin to scan everything again.

        Raises:
            SpoolError: The inbox is not there.
        """
        self._places.clear()  # something else may be mounted now
        if self._opens:
            with disk_errors(self._inbox, "list the folder"):
                if self.tops.is_replaced(self._inbox):
                    self.tops.open(self._inbox)

    def forget(self, path: str) -> None:
        """Forget a folder and those in it."""
        if folder := self._known.get(path):
            self.leave(folder)
            self._drop(folder)

    def leave(self, folder: Folder) -> None:
        """Forget what is in a folder, which cannot be scanned."""
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
        self.removed.append(folder.path)

    def refresh(self, folder: Folder, visitor: Visitor) -> Iterator[None]:
        """Bring the names of a folder up to date, and observe its stems that are not settled; a piece each time.

        Raises:
            SpoolError: It cannot be listed.
        """
        full = self.full(folder.path)
        with self._opened(folder.path) as descriptor:
            with disk_errors(full, "check the folder"):
                status = os.fstat(descriptor)
                self._meet(folder, status, descriptor)
            folder.owner = status.st_uid
            folder.is_missing, is_here = False, folder.place == self._place_of_inbox()
            is_claims = self._is_claims(status)
            if not is_here or folder.was_claims or is_claims:
                if not is_claims:
                    visitor.found.ignored.add(folder.path, _LIKE_CLAIMS if is_here else _OTHER_PLACE)
                self.leave(folder)
                return
            folder.is_entered = True
            visitor.opened(folder, descriptor)
            folder.is_scanned = True
            differs = folder.may_differ(status, visitor.after_look(), keeps_times=self._keeps_times(full))
            try:
                stems = list(folder.unsettled)
                if differs:
                    with disk_errors(full, "list the folder"):
                        stems = yield from self._list(folder, descriptor, visitor)
                yield from self._observe(folder, stems, descriptor, visitor)
            except BaseException:
                folder.distrust()
                raise
            finally:
                folder.is_scanned = False

    @staticmethod
    def _observe(folder: Folder, stems: list[str], descriptor: int, visitor: Visitor) -> Iterator[None]:
        room = len(folder.unsettled)
        for stem in pieces(stems):
            if stem is None:
                yield
                continue
            visitor.observe(folder, stem, descriptor)
            if len(folder.unsettled) < room // 2:  # a dictionary keeps the room of what it had; a copy does not
                folder.unsettled = dict(folder.unsettled)
                room = len(folder.unsettled)
        folder.unsettled = dict(folder.unsettled)

    def _meet(self, folder: Folder, status: os.stat_result, descriptor: int) -> None:
        """Note what a folder is, if another one has its name now."""
        full, is_new = self.full(folder.path), folder.identity is None
        is_other = folder.is_other(status)
        if is_other:
            folder.place, folder.is_local = self._place(descriptor)
            if is_new or self._keeps_times(full):  # else it may be the same folder with another inode number
                folder.came = self._came(folder, status)
            folder.distrust()
        if is_other or folder.was_claims:  # the reason may have been removed
            folder.was_claims = bool(folder.path) and looks_like_claims(descriptor)

    def _came(self, folder: Folder, status: os.stat_result) -> float:
        """Return when a folder was brought into the inbox: a rename of it changes no date of what is in it."""
        above = self._known.get(os.path.dirname(folder.path)) if folder.path else None
        if above is None or not self.is_complete:
            return self.came.get(folder.identity, 0.0)
        return max(status.st_ctime, above.came)

    def _is_claims(self, status: os.stat_result) -> bool:
        """Return whether it is the folder of claimed files, which others may have given another name."""
        claims = self.tops.opened(os.path.join(self._inbox, CLAIMS))
        return claims is not None and claims.is_same(status)

    def _place(self, descriptor: int) -> tuple[tuple[int, int], bool]:
        """Return on which device and mount a folder is, and whether its times are of our own clock."""
        place = place_of(descriptor)
        if place not in self._places:
            self._places[place] = place, self._is_local(descriptor)
        return self._places[place]

    def _place_of_inbox(self) -> tuple[int, int]:
        """Return on which device and mount the inbox is; a folder in it may be the first one that is scanned.

        Also the first one since another file system was mounted there.
        """
        inbox, top = self.add(""), self.tops.opened(self._inbox)
        with disk_errors(self._inbox, "check the folder"):
            if inbox.identity is None or (top is not None and not top.is_same_as(inbox.identity)):
                with self._opened("") as descriptor:
                    self._meet(inbox, os.fstat(descriptor), descriptor)
        return inbox.place

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a folder; one that was replaced by a link meanwhile is not followed."""
        full = self.full(path)
        with disk_errors(full, "list the folder"):
            folder = self.tops.listable(full)
        yield folder.fileno()

    def _list(self, folder: Folder, descriptor: int, visitor: Visitor) -> Generator[None, None, list[str]]:
        """List a folder; return the stems that are still to be observed."""
        stems: list[str] = []
        others, inner, before = Others(descriptor), dict[str, None](), set(folder.inner)
        ignored = Reasons(visitor.found.ignored.most)
        folder.begin_listing()
        try:
            with os.scandir(descriptor) as entries:
                for entry in pieces(entries):
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
        for removed in before.difference(inner):
            self.forget(removed)
        folder.inner = inner | {path: None for path in folder.inner if path not in before}  # found meanwhile
        folder.unsettled = dict.fromkeys(stems)
        known, siblings = CaselessStems(), NO_SIBLINGS
        if folder.unsettled or folder.settled or visitor.found.left_out:
            siblings = SiblingIndex(folder, known)
            for each in pieces([*folder.settled, *folder.unsettled, *visitor.found.left_out]) if others else ():
                if each is None:
                    yield
                else:
                    known.add(each)
        yield from self._sort_out(folder, others, ignored, siblings)
        folder.is_changed = True
        return stems

    def _is_known(self, folder: Folder, stem: str, visitor: Visitor) -> bool:
        """Return whether nothing is to be found out about a stem that is there."""
        if folder.found_again(stem) is not None:
            return True
        if visitor.has_job((folder.path, stem)):
            visitor.found.left_out.add(stem)
            folder.distrust()
            return True
        return False

    def _enter(self, folder: Folder, name: str, inner: dict[str, None], ignored: Reasons) -> None:
        """Note whether a folder is scanned."""
        path = _join(folder.path, name)
        if why := why_not_entered(name):
            if name not in {CLAIMS, NOTES}:
                ignored.add(path, why)
        elif not self._recursive:
            ignored.add(path, "a folder; inbox.recursive is off")
        elif len(os.fsencode(path)) > _LONGEST_PATH:
            ignored.add(path, "a folder whose path is too long")
        elif not self._may_enter(path):
            ignored.add(
                path, f"a folder that is not scanned, because its owner has more than {_MOST_FOLDERS:,} folders"
            )
            folder.distrust()  # it may be one of them later
        else:
            inner[self._known[path].path] = None  # as it is kept

    def _may_enter(self, path: str) -> bool:
        """Return whether a folder is scanned; if it is new, note that it has to be."""
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
        """Note that a folder was seen in this one, so that this one need not be listed to scan it."""
        self._enter(folder, name, folder.inner, Reasons(0))

    def _sort_out(self, folder: Folder, others: Others, ignored: Reasons, siblings: SiblingIndex) -> Iterator[None]:
        """Find out to which stems the files belong that are no prompts."""
        has_stems, arriving = siblings is not NO_SIBLINGS, list[str]()
        for other in others:
            if other is None:
                yield
                continue
            name, is_link = other
            is_own = has_stems and siblings.add(name)
            path = _join(folder.path, name)
            if is_link and name[0] != ".":
                ignored.add(path, "a link, which is not followed")
            elif near_miss(name) and final_name(name) and len(arriving) < MANY:
                arriving.append(name)
            elif near_miss(name):
                ignored.add(path, why_near_miss(name))
            elif self._explain and not is_own:
                ignored.add(path, why_no_prompt(name))
        siblings.complete()
        folder.siblings = siblings
        folder.arriving = arriving or ()
        folder.ignored = ignored if ignored.kinds else None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
