"""What of the inbox may be claimed next: watcher and scans together.

The watcher reports that something happened, the scanner finds out what. Belongs to the main thread.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.daemon.scanner import Scanner
from imagewatch.inbox.candidate import ScanResult
from imagewatch.inbox.prompt_files import path_of
from imagewatch.inbox.scan import InboxScan
from imagewatch.inbox.watching import Watching
from imagewatch.job.delivery import blocked
from imagewatch.protocol.names import SUFFIX, stem_of
from imagewatch.system.file_systems import keeps_times
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Mapping

    from imagewatch.config.schema import Folders, Inbox
    from imagewatch.inbox.candidate import Candidate, Key
    from imagewatch.inbox.events import Change
    from imagewatch.inbox.fair_turns import FairTurns
    from imagewatch.inbox.folder import Folder
    from imagewatch.protocol.request import Opener
    from imagewatch.system.folders import Tops

_SUM_SECONDS = 1.0
"""How often ``result`` is brought up to date at most while folders are being scanned."""
_MOST_ORDERED = 1024
"""How many prompts are kept in order."""
_MOST_NAMED = 1000
"""How many files that are not claimed are remembered by name."""


@dataclass(frozen=True, slots=True)
class Noted:
    """What change events have shown.

    Attributes:
        asks: Whether a command asks for something.
        ready: Whether a prompt became ready.
    """

    asks: bool
    ready: bool


class Intake:
    """The inbox as the main loop sees it.

    Args:
        folders: The inbox, and the folders of its results.
        control: The folder for requests of commands; it is watched, too.
        wake: Called in the watcher's thread when there are change events.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        tops: The folders that were opened.

    Attributes:
        scanner: Scans the folders of the inbox.
        result: What is known of the inbox.
        closed: Folders below the inbox of which a job is stuck: other prompts of theirs may be paid for and get stuck.
    """

    def __init__(
        self,
        folders: Folders,
        control: str,
        wake: Callable[[], None],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        tops: Tops,
    ) -> None:
        self._tops = tops
        self._inbox = folders.inbox
        self._folders = folders
        self._clock = clock
        self._now = monotonic
        self._watching = Watching(control, wake)
        self._left_out: set[Key] = set()
        self._result_at = 0.0
        self._scan: InboxScan
        self.scanner = Scanner(folders.inbox, self._watching, clock, monotonic)
        self.result = ScanResult()
        self.closed: frozenset[str] = frozenset()

    def configure(self, config: Inbox, burst: int) -> None:
        """Take a configuration; everything is scanned again.

        Args:
            config: How the inbox is watched.
            burst: How many prompts may come at the same time; one more than that has to be kept in order.
        """
        self._counts_first = burst > 0
        self._watching.forget_all()
        before = self._scan.folders if hasattr(self, "_scan") else ()
        came = {folder.identity: folder.came for folder in before if folder.came}
        self._scan = InboxScan(
            self._inbox,
            config,
            keeps_times=lambda _: keeps_times(self.scanner.kind),  # no other file system is scanned
            most_ordered=max(_MOST_ORDERED, burst + 1),
            fewest=burst + 1 if burst else 0,
            most_named=max(_MOST_NAMED, burst + 1),
            blocked=self._blocked,
            opened=self._opened,
            tops=self._tops,
        )
        self._scan.folders.came = came
        self.scanner.configure(config, self._scan)
        self._watching.configure(config.watch)

    def _blocked(self, folder: str) -> str:
        """Return why nothing is claimed out of a folder below the inbox, or an empty string."""
        if folder in self.closed:
            return "until a stuck job continues (the log has the reason), nothing is claimed from"
        return blocked(self._folders, folder, self._tops)

    def stop(self) -> None:
        """End the thread that reads change events; scans stay possible."""
        self._watching.stop()

    # Scanning

    def scan(self, taken: Container[Key | None]) -> bool:
        """Scan what is to be scanned, for a short time.

        Args:
            taken: Stems of which a job is not over: the same files again are not another job yet.

        Returns:
            Whether ``result`` is new.

        Raises:
            SpoolError: The inbox cannot be listed.
        """
        self._scan.has_job = taken.__contains__
        self.scanner.run()
        return self._sum_up()

    def _sum_up(self) -> bool:
        """Bring ``result`` up to date at the end of the scans, and not too often before; return whether it is new."""
        now = self._now()
        if not self._scan.folders.changed or (self.scanner.is_at_work() and now < self._result_at):
            return False
        self.scanner.moment()
        self.result, self._scan.folders.changed = self._scan.result(), False
        self._result_at = now + max(_SUM_SECONDS, 100 * (self._now() - now))
        return True

    def _opened(self, folder: Folder, descriptor: int) -> None:
        """Watch a folder that is about to be scanned: what happens later causes an event."""
        if folder.identity:
            self._watching.watch(self._scan.folders.full(folder.path), folder.identity, descriptor)

    # Events

    def note_events(self, taken: Container[Key | None]) -> Noted:
        """Note change events, some of them if there are very many.

        Args:
            taken: Stems of which a job is not over.
        """
        self.scanner.moment()
        asks = ready = False
        if self._watching.hints.has_lost():
            self.scanner.lost()
        for change in self._watching.hints.take():
            if change.folder == self._watching.control:
                asks = True
            else:
                ready = self._changed(change, taken) or ready
        self.scanner.follow()
        return Noted(asks, ready)

    def _changed(self, change: Change, taken: Container[Key | None]) -> bool:
        """Note an event; return whether a prompt became ready by it."""
        path = change.folder[len(self._inbox) :].lstrip("/")
        folder = self._scan.folders.get(path)
        if folder is None:
            return False
        if not change.name:
            self.scanner.after_event(path)
            return False
        now = self._now()
        if change.is_folder:
            self._scan.folders.found_inside(folder, change.name)
            if (inner := path_of(path, change.name)) in folder.inner:
                self.scanner.after_event(inner)  # also if it had the name of another one
            self.scanner.when_settled(path, now)
            return False
        stem = stem_of(change.name)
        key = (path, stem) if stem is not None else self._scan.owner(path, change.name)
        if stem is None and (self._scan.waits_for_inputs(path) or (key is None and folder.may_need(change.name))):
            self.scanner.after_event(path)
        else:
            self.scanner.when_settled(path, now)
        if key is None:
            return False
        if stem is None or not change.renamed:
            self._scan.touch(key, now)
            return False
        self._scan.arrived_whole(key, now)
        return key not in taken and self._scan.check_arrival(key, now, self._clock()) is not None

    # Claiming

    @property
    def turns(self) -> FairTurns[str]:
        """The first-level folders of which a prompt may be claimed; others may join."""
        return self._scan.order.turns

    def any(self) -> bool:
        """Return whether a prompt may be claimed, as far as is known."""
        return len(self._scan.order) > 0

    def is_ready(self, name: str) -> bool:
        """Return whether a prompt of a first-level folder may be claimed, when it is its turn."""
        return self._scan.order.is_ready(name)

    def may_claim(self) -> bool:
        """Return whether all prompts are known that came at the same time, if they are to be counted first."""
        return not self._counts_first or self.scanner.knows_all()

    def count(self) -> int:
        """Return how many prompts wait for nothing but a worker."""
        return self._scan.count()

    def arrived(self) -> dict[str, float]:
        """Return when each prompt that is kept in order came, by path below the inbox, in seconds since the epoch."""
        found = self._scan.order.arrived()
        if came := {folder.path: folder.came for folder in self._scan.folders if folder.came}:
            found = {path: max(at, came.get(os.path.dirname(path), 0.0)) for path, at in found.items()}
        return found

    def in_turn(self) -> dict[str, float]:
        """Return since when the prompts wait that are the next ones, by path below the inbox, seconds since the epoch.

        Of very many in a folder these are the oldest.
        """
        return self._scan.order.in_turn()

    def counts(self) -> dict[str, int]:
        """Return how many prompts wait in each first-level folder in which some do; empty: the inbox itself."""
        return self._scan.counts()

    def came(self, path: str) -> float:
        """Return when a folder was brought into the inbox, in seconds since the epoch; 0: it was there at the start."""
        folder = self._scan.folders.get(path)
        return folder.came if folder else 0.0

    def owner(self, name: str) -> int:
        """Return the user id of the owner of a first-level folder."""
        return self._scan.order.owner(name)

    def next(
        self, name: str, taken: Container[Key | None], admits: Callable[[Candidate], bool | None] = lambda _: True
    ) -> Candidate | None:
        """Return the oldest prompt of a first-level folder that may be claimed; it will not be returned again.

        Args:
            name: The folder; empty for prompts directly in the inbox.
            taken: Stems of which a job is not over.
            admits: Returns whether a prompt fits below the caps; one that does not waits until ``reconsider``. None if
                that cannot be found out; then nothing is returned.
        """
        now = self.scanner.moment()
        candidate = self._take(name, taken, admits, now) if self.may_claim() else None
        self.scanner.follow()
        return candidate

    @property
    def opener(self) -> Opener:
        """Opens a file of the inbox."""
        return functools.partial(open_file, tops=self._tops)

    def is_passed_over(self, key: Key) -> bool:
        """Return whether a prompt that did not fit below the caps is still in the inbox."""
        return self._scan.order.is_passed_over(key)

    def is_file(self, key: Key) -> bool:
        """Return whether a prompt is in the inbox now, also if it was not scanned yet."""
        return self._tops.exists(os.path.join(self._inbox, key[0], key[1] + SUFFIX))

    def reconsider(self, keys: Collection[Key]) -> None:
        """Let prompts that did not fit below the caps have their turn again."""
        if keys:
            self._scan.order.reconsider(keys)
            self.scanner.follow()

    def _take(
        self, name: str, taken: Container[Key | None], admits: Callable[[Candidate], bool | None], now: float
    ) -> Candidate | None:
        while self._scan.order.is_ready(name) and (candidate := self._scan.order.take(name)):
            if candidate.key in taken:
                self._left_out.add(candidate.key)
            elif candidate.key[0] in self.closed or not self._scan.unchanged(candidate):
                self._scan.touch(candidate.key, now)
                self.scanner.when_settled(candidate.key[0], now)
            elif (is_admitted := admits(candidate)) is None:
                self._scan.give_back(candidate.key)
                return None
            elif not is_admitted:
                self._scan.order.pass_over(candidate)
            else:
                self._scan.claimed(candidate.key)
                return candidate
        return None

    def served(self, name: str) -> None:
        """Note that a first-level folder has had its turn."""
        self._scan.order.served(name)

    def over(self, key: Key | None) -> None:
        """Note that no worker has a job of this stem any more."""
        if key is None:
            return
        folder = self._scan.folders.get(key[0])
        if key in self._left_out or (
            folder and (folder.is_scanned or (folder.found and key[1] in folder.found.left_out))
        ):
            self._left_out.discard(key)
            self._scan.give_back(key)
            self.scanner.soon(key)  # a file of the same name was dropped meanwhile

    # How it is watched

    @property
    def mode(self) -> str:
        """``native``: the kernel reports changes; ``poll``: it does not; ``mixed``: it does for some folders."""
        return self._watching.mode(self.scanner.kind, len(self._scan.folders))

    def polled(self) -> Mapping[str, str]:
        """Return the folders whose changes the kernel does not report, or not all of them, and why."""
        return self._watching.polled(self.scanner.kind, self._scan.entered())

    def why_polled(self) -> dict[str, str]:
        """Return for each reason to poll folders one of them, and how many there are."""
        return self._watching.why_polled(self.scanner.kind, self._scan.entered())
