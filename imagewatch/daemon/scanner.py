"""Which folder of the inbox is scanned now, and when the next one is.

An event causes a scan of the folder in which it happened; every folder is scanned regularly.

A user who may put files into one folder cannot delay the others: the first-level folders take turns, a scan is done in
pieces, and scanning as a whole may take a tenth of a core.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import first_level
from imagewatch.inbox.schedule import AHEAD, Allowance, Schedule
from imagewatch.system import memory
from imagewatch.system.errors import SpoolError
from imagewatch.system.file_systems import POLL_SECONDS, Kinds, eventless

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from imagewatch.config.schema import Inbox
    from imagewatch.inbox.candidate import Key
    from imagewatch.inbox.folder import Folder
    from imagewatch.inbox.scan import InboxScan
    from imagewatch.inbox.watching import Watching

_LONGEST_SLICE_SECONDS = 0.25
"""For how long nothing but scanning is done at most, by the clock: on a machine that is busy it gets less done."""
_TURN_SECONDS = 0.01
"""For how long the folders of one first-level folder are scanned before it is the turn of the next one."""
_MOST_BEGUN = 8
"""How many scans are under way: each needs descriptors, and memory for what it has found. One more of each owner."""
_COMPLETE_SECONDS = 10.0
"""For how long it is waited until every folder was scanned once, or nothing waits to be scanned."""
_LOST_SECONDS = 1.0
"""How soon everything is scanned again after events were lost, at the earliest."""
_LONG_SECONDS = 0.05
"""Scans that took longer went through very many names, and took memory for them."""


class Scanner:
    """Scans the folders of the inbox, a piece at a time.

    Args:
        inbox: The inbox.
        watching: How the inbox is watched.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.

    Attributes:
        kind: Kind of the file system on which the inbox is.
        is_complete: Whether every folder was scanned since the start, or that takes too long to be waited for.
        most_seconds: Longest interval between two scans that the service manager allows, or None.
    """

    _scan: InboxScan
    _config: Inbox

    def __init__(
        self, inbox: str, watching: Watching, clock: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._inbox = inbox
        self._watching = watching
        self._clock = clock
        self._now = monotonic
        self._kinds = Kinds()
        self._allowance = Allowance(monotonic())
        self._spent = self._rested = self._round_at = self._round_took = self._began = 0.0
        self._idle_at = monotonic()  # when no folder waited to be scanned last
        self._running: dict[str, tuple[str, Generator[None]]] = {}
        self._asked: set[str] = set()  # folders that are to be scanned before all is known
        self._asked_again: set[str] = set()  # those of which a scan was under way then
        self._waits: set[str] = set()  # folders of which something may be ready later
        self.kind = ""
        self.is_complete = False
        self.most_seconds: float | None = None

    def configure(self, config: Inbox, scan: InboxScan) -> None:
        """Take a configuration; everything is scanned again.

        Args:
            config: How the inbox is watched.
            scan: Scans one folder.
        """
        for _, running in self._running.values():
            running.close()
        self._running.clear()
        self._config = config
        self._scan = scan
        scan.moment.clock = self._now
        self._schedule = Schedule(scan.order.owner)
        self._round_at, self.is_complete = 0.0, False
        self._complete_at = self._now() + _COMPLETE_SECONDS
        self._asked = {""}
        self._asked_again.clear()
        self._waits.clear()

    # When

    @property
    def due(self) -> float:
        """Monotonic time of the next scan, seconds."""
        first = self._began if self.is_at_work() else min(self._schedule.due, self._round_at)
        return max(first, self._rested)

    @property
    def pending(self) -> bool:
        """Whether anything in the inbox may become ready later."""
        return not self.is_complete or bool(self._asked or self._waits) or self._now() >= self._round_at

    def is_at_work(self) -> bool:
        """Return whether folders wait to be scanned."""
        return bool(self._running) or len(self._schedule) > 0

    def knows_all(self) -> bool:
        """Return whether no folder waits to be scanned; but a user may see to it that there always are some."""
        is_known = not self.is_at_work() or self._now() >= self._idle_at + _COMPLETE_SECONDS
        return self.is_complete and is_known

    def soon(self, key: Key | None = None) -> None:
        """See to it that the folder of a stem is scanned soon; without one, every folder."""
        self.moment()
        if key is None:
            self._round_at = min(self._round_at, self._now())
        else:
            self._asked.add(key[0])
            if any(path == key[0] for path, _ in self._running.values()):
                self._asked_again.add(key[0])
            self._schedule.soon(key[0])

    def after_event(self, path: str) -> None:
        """Scan a folder soon, as something happened in it."""
        self._schedule.soon(path)

    def when_settled(self, path: str, now: float) -> None:
        """Scan a folder when what is in it now may have settled."""
        self._schedule.later(path, now + self._config.settle_seconds)

    def late(self, seconds: float) -> None:
        """See to it that no scan comes before some seconds."""
        self._rested = self._now() + seconds

    def lost(self) -> None:
        """Note that events may have been missed: everything is scanned, but not again and again."""
        pause = max(_LOST_SECONDS, 10 * self._round_took)
        self._round_at = min(self._round_at, max(self._now(), self._began + pause))

    def moment(self) -> float:
        """Set the time for the scans; return the monotonic one, seconds."""
        self._scan.moment.set(self._now(), self._clock())
        if not self.is_at_work():
            self._idle_at = self._scan.moment.now
        return self._scan.moment.now

    # Scanning

    def run(self) -> None:
        """Scan what is to be scanned, for a short time.

        Raises:
            SpoolError: The inbox cannot be listed.
        """
        now = self.moment()
        self._allowance.refill(now)
        self._kinds.refresh()
        self.kind = self._kinds.of(self._inbox)
        if self._watching.listen(now) or now >= self._round_at:
            self._begin_round(now)
        self._schedule.wake(now)
        try:
            self._work(now + _LONGEST_SLICE_SECONDS)
        finally:
            self._rest()

    def _begin_round(self, now: float) -> None:
        self._scan.folders.begin()
        paths = [folder.path for folder in self._scan.folders]
        self._schedule.soon_all(paths or [""])
        self._watching.watch_control()
        self._began, self._round_at = now, now + self._interval()
        self._round_took = self._now() - now

    def _interval(self) -> float:
        intervals = [self._config.rescan_seconds, self.most_seconds]
        if self._watching.is_polled(self.kind):
            intervals.append(POLL_SECONDS)
        return min(seconds for seconds in intervals if seconds is not None)

    def _work(self, until: float) -> None:
        """Scan folders in turn."""
        cost = self._now if eventless(self.kind) else time.thread_time  # a server is to be spared, too
        start = cost()
        while (now := self.moment()) < until and self._allowance.may_go_on(cost() - start):
            began, more = cost(), False
            name = self._whose_turn()
            if name is None:
                return
            try:
                more = self._turn(name, now + _TURN_SECONDS)
            finally:
                took = cost() - began
                self._allowance.spend(took)
                self._spent += took
                self._schedule.charge(name, took, more=more)
                self.follow()

    def _whose_turn(self) -> str | None:
        """Return the first-level folder that is scanned now: if many scans are under way, one of those continues.

        Not of an owner of whom none is under way: the others may have begun all of them, each of very many files.
        """
        name, owner = self._schedule.turn(), self._scan.order.owner
        if name is None or name in self._running or len(self._running) < _MOST_BEGUN:
            return name
        return next(iter(self._running)) if owner(name) in map(owner, self._running) else name

    def _turn(self, name: str, until: float) -> bool:
        """Continue the scan of a first-level folder, or begin another one; return whether it is not at its end."""
        if name not in self._running:
            path = self._schedule.take(name)
            if path is None:
                return False
            scan = self._scan.order.prepare(name) if path == AHEAD else self._scan.scan_folder(path)
            self._running[name] = path, scan
        path, scan = self._running[name]
        try:
            for _ in scan:
                if self.moment() >= until:
                    return True
        except SpoolError:
            self._schedule.soon(path)
            del self._running[name]
            raise
        del self._running[name]
        if folder := self._scan.folders.get(path):
            self._scanned(folder)
        return False

    def _scanned(self, folder: Folder) -> None:
        if folder.path not in self._asked_again:
            self._asked.discard(folder.path)
        self._asked_again.discard(folder.path)
        self._waits.discard(folder.path)
        # What was found in the pieces of the scan before the last one is to be waited for, too.
        dues = [found.due for found in (folder.found, folder.checked) if found and found.due is not None]
        if dues:
            self._waits.add(folder.path)
            self._schedule.later(folder.path, min(dues))
        if folder.path and not folder.is_entered:
            self._watching.forget(self._scan.folders.full(folder.path))
            if folder.is_missing:  # which the folder shows that it was in
                above = folder.path.rpartition("/")[0]
                self._schedule.soon(above)
                if folder.path not in self._scan.folders.add(above).inner:
                    self._scan.folders.forget(folder.path)

    def follow(self) -> None:
        """Draw the consequences of what the scans have found."""
        folders, order = self._scan.folders, self._scan.order
        for path in folders.removed:
            self._forget(path)
        fresh = [path for path in folders.fresh if folders.get(path)]
        self._asked.update(fresh)
        self._schedule.soon_all(fresh)
        folders.removed, folders.fresh = [], []
        for path, at in self._scan.dues.items():
            self._waits.add(path)
            self._schedule.later(path, at)
        self._scan.dues.clear()
        for name in order.wanting:
            self._schedule.ahead(name)
        order.wanting.clear()

    def _forget(self, path: str) -> None:
        name = first_level(path)
        if name in self._running and path in {name, self._running[name][0]}:
            self._running.pop(name)[1].close()
        self._asked.discard(path)
        self._asked_again.discard(path)
        self._waits.discard(path)
        self._schedule.forget(path)
        self._scan.order.forget(path)
        self._watching.forget(self._scan.folders.full(path))

    def _rest(self) -> None:
        """Give back what the scans used, and let them rest if they took more than their share."""
        now = self._now()
        if rest := self._allowance.rest():
            self._rested = now + rest
        self.is_complete = self.is_complete or not self.is_at_work() or now >= self._complete_at
        if not self.is_at_work():
            self._scan.folders.is_complete = True
            self._round_at = min(self._round_at, self._began + self._interval())
            self._watching.log_mode(self.kind, self._scan.entered())
            if self._spent > _LONG_SECONDS:
                memory.give_back()
            self._spent = 0.0
