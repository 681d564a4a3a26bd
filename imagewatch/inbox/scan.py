"""Scans of the inbox: which prompts are ready.

A *scan* updates the names of a folder, asks ``stability`` which prompts are unchanged, and puts the settled ones in
order. Events of the watcher make a scan come sooner, or check one prompt that was renamed into the inbox. Nothing is
changed here.

Each folder is scanned separately, and in pieces, so that the caller can see to it that a folder with very many files
costs the others no time. Of a settled prompt only its name and the newest ctime of its files are kept; ``readiness``
checks it when its turn comes. A rewrite in place without an event is found then, and the prompt has to settle again.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import Candidate, Found, Key, ScanResult, Wait, first_level, joined
from imagewatch.inbox.order import Order
from imagewatch.inbox.prompt_files import Moment, PromptFiles, path_of
from imagewatch.inbox.readiness import Readiness, every_name
from imagewatch.inbox.tree import Folders, Visitor
from imagewatch.protocol.names import SUFFIX, locks
from imagewatch.system.errors import SpoolError
from imagewatch.system.file_systems import is_local
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator

    from imagewatch.config.schema import Inbox
    from imagewatch.inbox.folder import Folder
    from imagewatch.system.folders import Tops

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""The errors for a folder that was removed or replaced."""


class InboxScan:
    """Scans an inbox, again and again.

    Args:
        inbox: The folder.
        config: Settling, waits, recursion.
        keeps_times: Returns for a folder whether the same times mean the same names in it.
        is_local: Returns for an open folder whether its times are of our own clock.
        most_ordered: How many prompts are kept in order, the oldest ones. None for all.
        fewest: How many of each folder are kept in order at least.
        most_named: How many files are named in ``waiting`` and in ``ignored``; None for all.
        explain: Whether a reason is given for each file and folder, also for those that are clearly no prompts.
        blocked: Returns for a folder below the inbox why nothing can be put where its results go, or an empty string.
        opened: Called with a folder and a descriptor of it before it is scanned.
        tops: The folders that were opened, the inbox among them; without, it is opened here.

    Attributes:
        moment: The present; set before anything but ``scan_all`` and ``more`` is called.
        dues: Monotonic time at which prompts of a folder are to be checked again, seconds, since this was emptied.
        has_job: Returns whether a job of a stem is not over; a prompt of that name waits.
        folders: What is known of the folders.
        order: The settled prompts.
        opener: Opens a file of the inbox.
    """

    def __init__(  # noqa: PLR0913  what a daemon, a command and a test ask for
        self,
        inbox: str,
        config: Inbox,
        *,
        keeps_times: Callable[[str], bool] = lambda _: False,
        is_local: Callable[[int], bool] = is_local,
        most_ordered: int | None = None,
        fewest: int = 0,
        most_named: int | None = None,
        explain: bool = False,
        blocked: Callable[[str], str] = lambda _: "",
        opened: Callable[[Folder, int], None] = lambda _folder, _descriptor: None,
        tops: Tops | None = None,
    ) -> None:
        self._config = config
        self._most_named = most_named
        self._opened = opened
        self.folders = Folders(
            inbox,
            recursive=config.recursive,
            keeps_times=keeps_times,
            is_local=is_local,
            most_named=most_named,
            explain=explain,
            tops=tops,
        )
        self.moment = Moment()
        self._files = PromptFiles(self.folders, config, self.moment, blocked)
        self._readiness = Readiness(self.folders, config, self.moment, self._files)
        self.opener, self.dues = self._files.opener, self._readiness.dues
        self.order = Order(self.folders, self._readiness.check, most_ordered, fewest)
        self.has_job: Callable[[Key], bool] = lambda _: False
        self._result = ScanResult()

    # Events

    def touch(self, key: Key, now: float) -> None:
        """Note that something happened to a stem: it has to settle again from now on."""
        folder = self.folders.add(key[0])
        notes = folder.noted(self._config.settle_seconds)
        notes.settling.touch(key[1], now)
        notes.since.pop(key[1], None)
        notes.arrived.discard(key[1])
        notes.held.pop(key[1], None)
        folder.unsettle(key[1])
        folder.is_changed = True
        self.order.discard(key)

    def arrived_whole(self, key: Key, now: float) -> None:
        """Note that a prompt came by rename: if it declares its images, it need not settle."""
        self.touch(key, now)
        self.folders.add(key[0]).noted(self._config.settle_seconds).arrived.add(key[1])

    def check_arrival(self, key: Key, now: float, wall: float) -> Candidate | None:
        """Check one prompt that came by rename; return it if it declares its images and all are there.

        Its siblings are not listed here, so about a prompt that declares nothing only a scan can decide.
        """
        self.moment.set(now, wall)
        folder, (path, stem) = self.folders.add(key[0]), key
        (state,), changed = self._files.states(path, (stem + SUFFIX,))
        if state[2] <= 0 or any(self._files.is_there(path, lock) for lock in locks(stem + SUFFIX)):
            return None
        if not self._files.names_images(folder, stem, state):
            if folder.notes is not None:
                folder.notes.discard(stem)
            return None
        folder.settle(stem, changed)
        candidate = self._readiness.check(folder, stem)
        if candidate:
            self.order.add(folder, candidate)
        return candidate

    def claimed(self, key: Key) -> None:
        """Note that a prompt is being claimed; it is found again if it is still there when its job is over."""
        if folder := self.folders.get(key[0]):
            folder.forget(key[1])
            self.folders.changed = True

    def give_back(self, key: Key) -> None:
        """Note that a prompt that was returned as ready, and is settled, was not claimed."""
        folder = self.folders.get(key[0])
        if folder and (changed := folder.settled.get(key[1])) is not None:
            self.order.put_back(folder, [(changed, key[1])])

    def owner(self, folder: str, name: str) -> Key | None:
        """Return the stem to which a file belongs that is no prompt, or None."""
        known = self.folders.get(folder)
        stem = known.siblings.owner(name) if known else None
        return None if stem is None else (folder, stem)

    def waits_for_inputs(self, folder: str = "") -> bool:
        """Return whether a prompt in a folder waits for images it names, or for the end of one."""
        known = self.folders.get(folder)
        return bool(known and known.notes and known.notes.since)

    def named(self) -> set[str]:
        """Return the paths below the inbox of all images that the prompts it has opened name."""
        return {
            path_of(folder.path, name)
            for folder in self.folders
            if folder.notes is not None
            for _, names in folder.notes.read.values()
            for name in names or ()
        }

    def unchanged(self, candidate: Candidate) -> bool:
        """Return whether the files of a candidate are unchanged, and no program has begun to write."""
        return self._readiness.is_unchanged(candidate)

    # Scanning

    def scan_folder(self, path: str) -> Generator[None]:
        """Scan one folder, a piece each time, and check the next prompts.

        Args:
            path: The folder, below the inbox. One that is not there any more is forgotten when the folder it is in is
                scanned.

        Raises:
            SpoolError: It is the inbox itself, and cannot be listed.
        """
        folder, began = self.folders.add(path), self.moment.now
        most, found = self.folders.named(), Found(self.folders.named())
        try:
            yield from self._look_into(folder, found)
        except SpoolError as error:
            folder.distrust()
            if not path:
                raise
            found = Found(most)
            self.folders.leave(folder)
            self.order.forget(path)
            folder.is_missing = error.code in _GONE
            if not folder.is_missing:
                found.ignored.add(path, "a folder that cannot be listed", str(error))
        self._note(folder, found, began)
        yield from self.order.prepare(first_level(path))
        folder.was_checked = None

    def _look_into(self, folder: Folder, found: Found) -> Iterator[None]:
        observe = functools.partial(self._observe, found)
        visitor = Visitor(found, self._opened, observe, self.has_job, self.moment.after_look)
        yield from self.folders.refresh(folder, visitor)
        for name in folder.arriving:
            self._note_arriving(folder, name, found)
            yield
        if not folder.is_entered:
            self.order.forget(folder.path)

    def _note(self, folder: Folder, found: Found, began: float) -> None:
        """Keep what a scan of a folder found, and forget what is of no use any more."""
        held = folder.notes is not None and bool(folder.notes.held)
        if folder.is_changed or folder.unsettled or held or folder.arriving or found or folder.found:
            self.order.withdraw(folder)
            folder.was_checked = folder.was_checked or folder.checked
            folder.checked, folder.is_changed = None, False
            self.folders.changed = True
        folder.found = found or None
        self.folders.count_names(folder)
        folder.scanned_at = began
        if (notes := folder.notes) is None:
            return
        notes.settling.forget_others(began)
        notes.inputs.forget_others()
        notes.arrived = {stem for stem in notes.arrived if stem in folder}
        known = {stem for stem in (*notes.since, *notes.read) if self._is_known(folder, stem)}
        notes.since = {stem: since for stem, since in notes.since.items() if stem in known}
        notes.read = {stem: read for stem, read in notes.read.items() if stem in known}
        if notes.marks:
            notes.marks = {name: at for name, at in notes.marks.items() if self._files.is_there(folder.path, name)}
        if not notes:
            folder.notes = None

    def _is_known(self, folder: Folder, stem: str) -> bool:
        return folder.settled.get(stem) is not None or (folder.notes is not None and stem in folder.notes.arrived)

    def _note_arriving(self, folder: Folder, name: str, found: Found) -> None:
        """Note what may become a prompt when its transfer gives it its name."""
        is_arriving = self._files.is_arriving(folder.path, name)
        if is_arriving:
            found.waiting.add(path_of(folder.path, name), Wait.ARRIVING)
        elif is_arriving is not None:
            reason = "an unfinished transfer: rename it, or send it again"
            found.ignored.add(path_of(folder.path, name), reason)

    # One stem that is not settled

    def _observe(self, found: Found, folder: Folder, stem: str, descriptor: int) -> bool:
        """Check a stem that is not settled; return whether it is now."""
        path = path_of(folder.path, stem + SUFFIX)
        try:
            status = os.lstat(stem + SUFFIX, dir_fd=descriptor)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode):
            found.ignored.add(path, "not a plain file")
            return False
        if not status.st_size:
            found.waiting.add(path, Wait.EMPTY)
            return False
        changed = status.st_ctime
        state = hash((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        if folder.siblings.has(stem):
            names = folder.siblings.of(stem)
            if busy := self._files.busy(folder, names, found):
                reason = f"{printable(busy, 120)} shows that it is still being written"
                found.waiting.add(path, Wait.WRITING, reason)
                return False
            states, changed = self._files.states(folder.path, every_name(names))
            state = hash(states)
        left = folder.noted(self._config.settle_seconds).settling.observe(
            stem,
            state,
            changed_at=self._readiness.by_our_clock(folder, changed),
            now=self.moment.now,
            wall=self.moment.wall,
            seen=self.moment.after_look(),
        )
        if left <= 0 or self._is_whole(folder, stem):
            self._settle(folder, stem, changed)
            return True
        reason = f"will be claimed in {left:.1f} s if nothing changes"
        found.wait(path, Wait.SETTLING, reason, self.moment.now + left)
        return False

    def _settle(self, folder: Folder, stem: str, changed: float) -> None:
        folder.settle(stem, changed)
        self.order.offer(folder, changed, stem)
        folder.is_changed = True

    def _is_whole(self, folder: Folder, stem: str) -> bool:
        """Return whether a prompt came by rename and names its images, so that it need not settle."""
        if folder.notes is None or stem not in folder.notes.arrived:
            return False
        (state,), _ = self._files.states(folder.path, (stem + SUFFIX,))
        return self._files.names_images(folder, stem, state)

    # Everything together

    def scan_all(
        self, now: float, wall: float, most: int | None = None, job_keys: Collection[Key | None] = ()
    ) -> ScanResult:
        """Scan everything.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.
            most: How many prompts are made ready together; ``more`` gives the others. None for all.
            job_keys: Stems of which a job is not over; a prompt of that name waits.

        Returns:
            What was found; the same value as the last time if nothing can be different.

        Raises:
            SpoolError: The inbox itself cannot be listed.
        """
        self.moment.set(now, wall)
        self.has_job = job_keys.__contains__
        self.order.give_again()
        self.folders.begin()
        waiting = [""]
        while waiting:
            path = waiting.pop()
            for _ in self.scan_folder(path):
                pass
            folder = self.folders.get(path)
            waiting += reversed(folder.inner) if folder else ()
        self.order.restart()
        ready = self.order.collect(most)
        if self.folders.changed:
            self._result, self.folders.changed = self.result(), False
            self._result.ready = ready
        return self._result

    def more(self, now: float, wall: float, most: int | None = None) -> list[Candidate]:
        """Return the next prompts that may be claimed, in the order in which they are.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.
            most: How many at most; None for all.
        """
        self.moment.set(now, wall)
        return self.order.collect(most)

    # Counting

    def result(self) -> ScanResult:
        """Return what is known of all folders."""
        found_ = ((folder.found, folder.was_checked or folder.checked) for folder in self.folders)
        parts = [found for both in found_ for found in both if found]
        ignored = [folder.ignored for folder in self.folders if folder.ignored and folder.is_entered]
        dues = [found.due for found in parts if found.due is not None]
        return ScanResult(
            joined((found.waiting for found in parts), self._most_named),
            joined((*ignored, *(found.ignored for found in parts)), self._most_named),  # the last one has most
            due=min(dues) - self.moment.now if dues else None,
            folders=self.entered(),
            left_out={(folder.path, stem) for folder in self.folders if folder.found for stem in folder.found.left_out},
        )

    def entered(self) -> list[str]:
        """Return the whole path of each folder that is scanned."""
        return [self.folders.full(folder.path) for folder in self.folders if folder.is_entered]

    def counts(self) -> dict[str, int]:
        """Return how many prompts wait in each first-level folder in which some do; empty: the inbox itself."""
        found: dict[str, int] = {}
        for folder in self.folders:
            parts = (folder.found, folder.was_checked or folder.checked)
            waiting = sum(part.waiting.total for part in parts if part)
            if count := len(folder.settled) - len(folder.notes.held if folder.notes is not None else ()) + waiting:
                name = first_level(folder.path)
                found[name] = found.get(name, 0) + count
        return found

    def count(self) -> int:
        """Return how many prompts are settled and wait for nothing else, as far as is known."""
        return sum(
            len(folder.settled) - len(folder.notes.held if folder.notes is not None else ()) for folder in self.folders
        )
