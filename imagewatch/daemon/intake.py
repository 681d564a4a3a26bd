"""What of the inbox may be claimed next, and when it has to be looked at again.

Puts together the watcher, which tells when something happened, and the scans, which find out what. Belongs to the main
thread. An event leads to a scan of the folder in which it happened; every folder is scanned regularly.

A user who may put files into one folder cannot keep the others waiting: the folders take turns, a scan is done in
pieces, and scanning as a whole may take a tenth of a core.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from imagewatch.daemon import memory
from imagewatch.inbox.candidate import Seen, first_level
from imagewatch.inbox.judge import path_of
from imagewatch.inbox.scan import Sweep
from imagewatch.inbox.schedule import AHEAD, Allowance, Schedule
from imagewatch.inbox.watching import Watching
from imagewatch.job.spool import blocked
from imagewatch.protocol.names import stem_of
from imagewatch.system.errors import SpoolError
from imagewatch.system.file_systems import POLL_SECONDS, Kinds, eventless, keeps_times
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Generator, Mapping

    from imagewatch.config.load import Folders, Inbox
    from imagewatch.inbox.candidate import Candidate, Key
    from imagewatch.inbox.events import Change
    from imagewatch.inbox.tree import Folder
    from imagewatch.inbox.turns import Turns
    from imagewatch.protocol.request import Opener
    from imagewatch.system.folders import Tops

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
_WINDOW = 1024
"""How many prompts are kept in order."""
_MOST_NAMED = 1000
"""How many files that are not taken are remembered by name."""
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Noted:
    """What came of the events that were taken note of.

    Attributes:
        asks: Whether a command asks for something.
        ready: Whether a prompt became ready.
    """

    asks: bool
    ready: bool


class Intake:
    """The inbox as the main loop sees it.

    Args:
        folders: The inbox, and where its results go.
        control: The folder for requests of commands; it is watched, too.
        ring: Called in the watcher's thread when there are events to be taken note of.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        tops: The folders that were opened.

    Attributes:
        seen: What is known of the inbox.
        is_complete: Whether every folder was scanned since the start, or that takes too long to be waited for.
        most_seconds: Longest interval between two looks that whoever supervises the process allows, or None.
        shut: Folders below the inbox of which a job is stuck: what else is in them may be paid for and get stuck, too.
    """

    def __init__(
        self,
        folders: Folders,
        control: str,
        ring: Callable[[], None],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        tops: Tops,
    ) -> None:
        self._tops = tops
        self._inbox = folders.inbox
        self._folders = folders
        self._clock = clock
        self._now = monotonic
        self._watching = Watching(control, ring)
        self._kinds = Kinds()
        self._kind = ""
        self._allowance = Allowance(monotonic())
        self._spent = self._rested = self._round_at = self._round_took = self._seen_at = self._began = 0.0
        self._idle_at = monotonic()  # when no folder waited to be scanned last
        self._running: dict[str, tuple[str, Generator[None]]] = {}
        self._passed: set[Key] = set()
        self._asked: set[str] = set()  # folders that are to be scanned before all is known
        self._waits: set[str] = set()  # folders of which something may be ready later
        self.seen = Seen()
        self._sweep: Sweep
        self.is_complete = False
        self.most_seconds: float | None = None
        self.shut: frozenset[str] = frozenset()

    def configure(self, config: Inbox, burst: int) -> None:
        """Take a configuration; everything is looked at anew.

        Args:
            config: How the inbox is watched.
            burst: How many prompts at once are too many; more than that have to be kept in order.
        """
        self._config = config
        self._counts_first = burst > 0
        timed = lambda _: keeps_times(self._kind)  # noqa: E731  no other file system is looked into
        for _, scan in self._running.values():
            scan.close()
        self._running.clear()
        self._watching.forget_all()
        before = self._sweep.folders if hasattr(self, "_sweep") else ()
        came = {folder.identity: folder.came for folder in before if folder.came}
        self._sweep = Sweep(
            self._inbox,
            config,
            keeps_times=timed,
            window=max(_WINDOW, burst + 1),
            fewest=burst + 1 if burst else 0,
            most_named=max(_MOST_NAMED, burst + 1),
            blocked=self._blocked,
            opened=self._opened,
            tops=self._tops,
        )
        self._sweep.folders.came = came
        self._schedule = Schedule(self._sweep.order.owner)
        self._round_at, self.is_complete = 0.0, False
        self._complete_at = self._now() + _COMPLETE_SECONDS
        self._asked = {""}
        self._waits.clear()
        self._watching.configure(config.watch)

    def _blocked(self, folder: str) -> str:
        """Return why nothing is to be taken out of a folder below the inbox, or an empty string."""
        if folder in self.shut:
            return "until a job that is stuck goes on (the log says why), nothing is taken out of"
        return blocked(self._folders, folder, self._tops)

    def stop(self) -> None:
        """Stop listening."""
        self._watching.stop()

    # When

    @property
    def due(self) -> float:
        """Monotonic time of the next look, seconds."""
        first = self._began if self.is_at_work() else min(self._schedule.due, self._round_at)
        return max(first, self._rested)

    @property
    def pending(self) -> bool:
        """Whether anything in the inbox may be taken later by itself."""
        return not self.is_complete or bool(self._asked or self._waits) or self._now() >= self._round_at

    def is_at_work(self) -> bool:
        """Tell whether folders wait to be scanned."""
        return bool(self._running) or len(self._schedule) > 0

    def soon(self, key: Key | None = None) -> None:
        """See to it that the folder of a stem is scanned soon; without one, every folder."""
        self._moment()
        if key is None:
            self._round_at = min(self._round_at, self._now())
        else:
            self._asked.add(key[0])
            self._schedule.soon(key[0])

    def late(self, seconds: float) -> None:
        """See to it that no look comes before some seconds."""
        self._rested = self._now() + seconds

    def _lost(self) -> None:
        """Take note that events may have been missed: everything is scanned, but not again and again."""
        pause = max(_LOST_SECONDS, 10 * self._round_took)
        self._round_at = min(self._round_at, max(self._now(), self._began + pause))

    # Looking

    def look(self, taken: Container[Key | None]) -> bool:
        """Scan what is to be scanned, for a short time.

        Args:
            taken: Stems of which a job is not over: the same files again are not another job yet.

        Returns:
            Whether ``seen`` is new.

        Raises:
            SpoolError: The inbox cannot be listed.
        """
        now = self._moment()
        self._allowance.refill(now)
        self._kinds.refresh()
        self._kind = self._kinds.of(self._inbox)
        if self._watching.listen(now):
            self._round_at = now
        self._sweep.is_taken = taken.__contains__
        if now >= self._round_at:
            self._begin_round(now)
        self._schedule.wake(now)
        try:
            self._work(now + _LONGEST_SLICE_SECONDS)
        finally:
            self._rest()
        return self._sum_up()

    def _begin_round(self, now: float) -> None:
        self._sweep.folders.begin()
        paths = [folder.path for folder in self._sweep.folders]
        self._schedule.soon_all(paths or [""])
        self._watching.watch_control()
        self._began, self._round_at = now, now + self._interval()
        self._round_took = self._now() - now

    def _interval(self) -> float:
        intervals = [self._config.rescan_seconds, self.most_seconds]
        if self._watching.is_polled(self._kind):
            intervals.append(POLL_SECONDS)
        return min(seconds for seconds in intervals if seconds is not None)

    def _work(self, until: float) -> None:
        """Scan folders in turn."""
        cost = self._now if eventless(self._kind) else time.thread_time  # a server is to be spared, too
        start = cost()
        while (now := self._moment()) < until and self._allowance.may_go_on(cost() - start):
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
                self._follow()

    def _whose_turn(self) -> str | None:
        """Return the first-level folder that is scanned now: if many scans are under way, one of those goes on.

        Not of an owner of whom none is under way: the others may have begun all of them, each of very many files.
        """
        name, owner = self._schedule.turn(), self._sweep.order.owner
        if name is None or name in self._running or len(self._running) < _MOST_BEGUN:
            return name
        return next(iter(self._running)) if owner(name) in map(owner, self._running) else name

    def _turn(self, name: str, until: float) -> bool:
        """Go on with the scan of a first-level folder, or begin another one; tell whether it is not at its end."""
        if name not in self._running:
            path = self._schedule.take(name)
            if path is None:
                return False
            scan = self._sweep.order.prepare(name) if path == AHEAD else self._sweep.scan(path)
            self._running[name] = path, scan
        path, scan = self._running[name]
        try:
            for _ in scan:
                if self._moment() >= until:
                    return True
        except SpoolError:
            self._schedule.soon(path)
            del self._running[name]
            raise
        del self._running[name]
        if folder := self._sweep.folders.get(path):
            self._scanned(folder)
        return False

    def _scanned(self, folder: Folder) -> None:
        self._asked.discard(folder.path)
        self._waits.discard(folder.path)
        # What was judged in the pieces of the scan before the last one is to be waited for, too.
        dues = [found.due for found in (folder.found, folder.judged) if found and found.due is not None]
        if dues:
            self._waits.add(folder.path)
            self._schedule.later(folder.path, min(dues))
        if folder.path and not folder.is_entered:
            self._watching.forget(self._sweep.folders.full(folder.path))
            if folder.is_gone:  # which the folder shows that it was in
                above = folder.path.rpartition("/")[0]
                self._schedule.soon(above)
                if folder.path not in self._sweep.folders.add(above).inner:
                    self._sweep.folders.forget(folder.path)

    def _follow(self) -> None:
        """Draw the consequences of what the scans have found."""
        folders, order = self._sweep.folders, self._sweep.order
        for path in folders.gone:
            self._forget(path)
        fresh = [path for path in folders.fresh if folders.get(path)]
        self._asked.update(fresh)
        self._schedule.soon_all(fresh)
        folders.gone, folders.fresh = [], []
        for path, at in self._sweep.dues.items():
            self._waits.add(path)
            self._schedule.later(path, at)
        self._sweep.dues.clear()
        for name in order.wanting:
            self._schedule.ahead(name)
        order.wanting.clear()

    def _forget(self, path: str) -> None:
        name = first_level(path)
        if name in self._running and path in {name, self._running[name][0]}:
            self._running.pop(name)[1].close()
        self._asked.discard(path)
        self._waits.discard(path)
        self._schedule.forget(path)
        self._sweep.order.forget(path)
        self._watching.forget(self._sweep.folders.full(path))

    def _rest(self) -> None:
        """Give back what the scans used, and let them rest if they took more than their share."""
        now = self._now()
        if rest := self._allowance.rest():
            self._rested = now + rest
        self.is_complete = self.is_complete or not self.is_at_work() or now >= self._complete_at
        if not self.is_at_work():
            self._sweep.folders.is_complete = True
            self._round_at = min(self._round_at, self._began + self._interval())
            self._watching.tell_mode(self._kind, self._sweep.entered())
            if self._spent > _LONG_SECONDS:
                memory.give_back()
            self._spent = 0.0

    def _sum_up(self) -> bool:
        """Bring ``seen`` up to date: at the end of the scans, and not too often before; tell whether it is new."""
        now = self._now()
        if not self._sweep.folders.changed or (self.is_at_work() and now < self._seen_at):
            return False
        self._moment()
        self.seen, self._sweep.folders.changed = self._sweep.seen(), False
        self._seen_at = now + max(_LOST_SECONDS, 100 * (self._now() - now))
        return True

    def _moment(self) -> float:
        """Tell the scans what time it is."""
        self._sweep.moment.now, self._sweep.moment.wall = self._now(), self._clock()
        if not self.is_at_work():
            self._idle_at = self._sweep.moment.now
        return self._sweep.moment.now

    def _opened(self, folder: Folder, descriptor: int) -> None:
        """Watch a folder that is about to be scanned: what comes after that is told of."""
        if folder.identity:
            self._watching.watch(self._sweep.folders.full(folder.path), folder.identity, descriptor)

    # Events

    def note_events(self, taken: Container[Key | None]) -> Noted:
        """Take note of events, of some if there are very many.

        Args:
            taken: Stems of which a job is not over.
        """
        self._moment()
        asks = ready = False
        if self._watching.hints.has_lost():
            self._lost()
        for change in self._watching.hints.take():
            if change.folder == self._watching.control:
                asks = True
            else:
                ready = self._changed(change, taken) or ready
        self._follow()
        return Noted(asks, ready)

    def _changed(self, change: Change, taken: Container[Key | None]) -> bool:
        """Take note of an event; tell whether a prompt became ready by it."""
        path = change.folder[len(self._inbox) :].lstrip("/")
        folder = self._sweep.folders.get(path)
        if folder is None:
            return False
        if not change.name:
            self._schedule.soon(path)
            return False
        now = self._now()
        if change.is_folder:
            self._sweep.folders.found_inside(folder, change.name)
            if (inner := path_of(path, change.name)) in folder.inner:
                self._schedule.soon(inner)  # also if it had the name of another one
            self._schedule.later(path, now + self._config.settle_seconds)
            return False
        stem = stem_of(change.name)
        key = (path, stem) if stem is not None else self._sweep.owner(path, change.name)
        if stem is None and (self._sweep.waits_for_inputs(path) or (key is None and folder.may_need(change.name))):
            self._schedule.soon(path)
        else:
            self._schedule.later(path, now + self._config.settle_seconds)
        if key is None:
            return False
        if stem is None or not change.renamed:
            self._sweep.touch(key, now)
            return False
        self._sweep.arrived_whole(key, now)
        return key not in taken and self._sweep.look_at(key, now, self._clock()) is not None

    # Taking

    @property
    def turns(self) -> Turns[str]:
        """The first-level folders of which a prompt may be claimed; others may join."""
        return self._sweep.order.turns

    def any(self) -> bool:
        """Tell whether there is something to be taken, as far as is known."""
        return len(self._sweep.order) > 0

    def is_ready(self, name: str) -> bool:
        """Tell whether a prompt of a first-level folder may be claimed, when it is its turn."""
        return self._sweep.order.is_ready(name)

    def may_take(self) -> bool:
        """Tell whether all prompts are known that came at the same time, if they are to be counted first.

        Not known are those in folders that wait to be scanned; but a user may see to it that there always are some.
        """
        if not self._counts_first:
            return True
        is_known = not self.is_at_work() or self._now() >= self._idle_at + _COMPLETE_SECONDS
        return self.is_complete and is_known

    def count(self) -> int:
        """Return how many prompts wait for nothing but a worker."""
        return self._sweep.count()

    def arrived(self) -> dict[str, float]:
        """Return when each prompt that is kept in order came, by path below the inbox, in seconds since the epoch."""
        found = self._sweep.order.arrived()
        if came := {folder.path: folder.came for folder in self._sweep.folders if folder.came}:
            found = {path: max(at, came.get(os.path.dirname(path), 0.0)) for path, at in found.items()}
        return found

    def came(self, path: str) -> float:
        """Return when a folder was brought into the inbox, in seconds since the epoch; 0: it was there at the start."""
        folder = self._sweep.folders.get(path)
        return folder.came if folder else 0.0

    def owner(self, name: str) -> int:
        """Return the number of the user to whom a first-level folder belongs."""
        return self._sweep.order.owner(name)

    def next(
        self, name: str, taken: Container[Key | None], admits: Callable[[Candidate], bool] = lambda _: True
    ) -> Candidate | None:
        """Return the oldest prompt of a first-level folder that may be claimed; it will not be returned again.

        Args:
            name: The folder; empty for prompts directly in the inbox.
            taken: Stems of which a job is not over.
            admits: Tells whether a prompt fits below the caps; one that does not is set aside.
        """
        now = self._moment()
        candidate = self._take(name, taken, admits, now) if self.may_take() else None
        self._follow()
        return candidate

    @property
    def opener(self) -> Opener:
        """Opens a file of the inbox."""
        return functools.partial(open_file, tops=self._tops)

    def is_aside(self, key: Key) -> bool:
        """Tell whether a prompt that was set aside still waits in the inbox."""
        return self._sweep.order.is_aside(key)

    def give_aside(self, keys: Collection[Key]) -> None:
        """Let prompts that were set aside have their turn again."""
        if keys:
            self._sweep.order.give_aside(keys)
            self._follow()

    def _take(
        self, name: str, taken: Container[Key | None], admits: Callable[[Candidate], bool], now: float
    ) -> Candidate | None:
        while self._sweep.order.is_ready(name) and (candidate := self._sweep.order.take(name)):
            if candidate.key in taken:
                self._passed.add(candidate.key)
            elif candidate.key[0] in self.shut or not self._sweep.unchanged(candidate):
                self._sweep.touch(candidate.key, now)
                self._schedule.later(candidate.key[0], now + self._config.settle_seconds)
            elif not admits(candidate):
                self._sweep.order.set_aside(candidate)
            else:
                self._sweep.taken(candidate.key)
                return candidate
        return None

    def served(self, name: str) -> None:
        """Note that a first-level folder has had its turn."""
        self._sweep.order.served(name)

    def over(self, key: Key | None) -> None:
        """Take note that no job of this stem is at work any more."""
        if key is None:
            return
        folder = self._sweep.folders.get(key[0])
        if key in self._passed or (folder and folder.found and key[1] in folder.found.passed):
            self._passed.discard(key)
            self._sweep.give_back(key)
            self.soon(key)  # a file of the same name was dropped meanwhile

    # How it is watched

    @property
    def mode(self) -> str:
        """``native``: the kernel tells of changes; ``poll``: it does not; ``mixed``: it does of some folders."""
        return self._watching.mode(self._kind, len(self._sweep.folders))

    def polled(self) -> Mapping[str, str]:
        """Return of which folders the kernel tells nothing, or not everything, and why."""
        return self._watching.polled(self._kind, self._sweep.entered())

    def why_polled(self) -> dict[str, str]:
        """Return for each reason to look at folders one of them, and how many there are."""
        return self._watching.why_polled(self._kind, self._sweep.entered())
