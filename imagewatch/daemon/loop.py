"""The daemon: puts the parts together and runs the main loop.

One thread, this one, decides what is done when. Watcher, signals and finished workers only put messages into one
mailbox; the loop takes them out. A worker's first act is the claim, so that whatever merely waits in memory still
lies in the inbox.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import queue
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import random
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch import __version__
from imagewatch.config.key import key_stamp, read_key
from imagewatch.daemon import memory
from imagewatch.daemon.admission import Gate
from imagewatch.daemon.caps import Caps
from imagewatch.daemon.descriptors import most_requests
from imagewatch.daemon.ignored import Ignored
from imagewatch.daemon.intake import Intake
from imagewatch.daemon.status import Status, line
from imagewatch.daemon.systemd import Notify
from imagewatch.endpoint.client import Client
from imagewatch.inbox.candidate import ANYWHERE, Taken, first_level
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.spool import Spool
from imagewatch.job.worker import Worker
from imagewatch.journal import sqlite as database
from imagewatch.journal.budget import Budget
from imagewatch.journal.control import Control
from imagewatch.journal.holds import Hold, Holds
from imagewatch.journal.ledger import Ledger
from imagewatch.journal.prices import Asked
from imagewatch.protocol.names import SUFFIX, stem_of
from imagewatch.protocol.reasons import DISK_SECONDS
from imagewatch.system.disk import Disk
from imagewatch.system.errors import MORE_FILES, ConfigError, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from imagewatch.config.load import Config
    from imagewatch.inbox.candidate import Candidate, Key
    from imagewatch.job.sending import Fate

_LONGEST_WAIT = 3600.0
_LEAST_CAP = 0.1
_LONGEST_CAP = 60.0
"""How long the caps are not looked at anew while prompts wait at one, seconds: the clock may be set."""
_LONGEST_RETRY = 300.0
"""How long a job waits at most that fails alone, seconds."""
_LONGEST_LOOK = 5.0
"""For how long the first look at everything is waited for at most, seconds."""
_MOST_AT_ONCE = 1000
"""How many messages are taken before anything else is done."""
_MOST_ALONE = 2
"""So many jobs from the inbox itself fail alone before no more is taken out of it; of another folder one is enough."""
_MOST_PARKED = 3
"""So many jobs may be left to a person before nothing is sent any more: the next ones may be paid for in vain, too."""
_WORKERS = 96
"""As many as there may be jobs at work: half as many as the most slots may be delivering."""
_FIXED = ("folders", "outbox")
"""Sections that are read at start only: folders are proved before anything is paid for."""
_STUCK_HINT = "the log says why and what to do for each; to continue without them: imagewatch release"
_PARKED = "parked"
"""In the place of a job: those that are left to a person hold the queue."""
_log = structlog.get_logger()


@dataclass(frozen=True)
class Hinted:
    """There are events in the inbox to be taken note of."""


@dataclass(frozen=True)
class Signalled:
    """A signal came."""

    number: int


@dataclass(frozen=True)
class Paid:
    """The answer to a request is on our disk: its job needs no request any more."""

    job: str


@dataclass(frozen=True)
class Finished:
    """A worker has ended; its outcome or its exception is in the future."""

    job: str
    began: float
    future: Future[Outcome]


@dataclass(frozen=True)
class Hindered:
    """Our disk refuses a part of an answer, which a worker waits for."""

    error: SpoolError


Message = Hinted | Signalled | Paid | Finished | Hindered


@dataclass
class Later:
    """A claimed job that has to wait.

    Attributes:
        job: Its id.
        at: Monotonic time at which it is carried on, seconds.
        key: Its stem, if its record can be read.
        displaced: Whether a newer file of the same name is to go first, so that this one can go back.
        fresh: Whether it may get further without a request; then it is carried on behind a hold, too.
        turn: Whether it only waits for its turn to be sent; behind a hold it goes back to the inbox at once.
    """

    job: str
    at: float
    key: Key | None
    displaced: bool = False
    fresh: bool = True
    turn: bool = False

    @property
    def name(self) -> str:
        """The first-level folder it came from."""
        return first_level(self.key[0]) if self.key and self.key[0] != ANYWHERE else ""


class Daemon:
    """The daemon of one inbox.

    Args:
        config: The configuration.
        environ: Environment: key, systemd's socket.
        disk: Our disk.
        once: Whether to end when the inbox is drained or the queue is held.
        on_outcome: Called for each finished job.
        on_seen: Called after each sweep.
        reload: Returns a new configuration on SIGHUP.
        on_reloaded: Called with the new configuration when it is in force.
        holds: Reasons to wait; given by whoever cannot wait for the usual interval between two probes.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(  # noqa: PLR0913  what a process gives and what a test replaces
        self,
        config: Config,
        environ: Mapping[str, str],
        *,
        disk: Disk | None = None,
        once: bool = False,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
        on_seen: Callable[[int], None] = lambda _: None,
        reload: Callable[[], Config] | None = None,
        on_reloaded: Callable[[Config], None] = lambda _: None,
        holds: Holds | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._environ, self._once = config, environ, once
        self._on_outcome, self._on_seen, self._on_reloaded = on_outcome, on_seen, on_reloaded
        self._reload = reload
        self._clock, self._now = clock, monotonic
        self._mailbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._spool = Spool(config, disk or Disk())
        self._control = Control(config.folders.state, self._spool.disk)
        self._ledger = Ledger(os.path.join(config.folders.state, database.FILE), guarded=True)
        parts = self._spool, self._ledger, self._control
        self._gate = Gate(*parts, holds or Holds(), self._changed_hold, clock, monotonic)
        self._notify = Notify(environ)
        self._intake = Intake(config.folders, self._control.folder, self._hint, clock, monotonic, self._spool.tops)
        self._later: list[Later] = []
        self._parked: dict[str, Key | None] = {}  # what only a person, or the next start, can carry on
        self._failing: dict[str, tuple[float, Key | None]] = {}  # what fails alone: seconds between two tries, stem
        self._in_flight: dict[str, Key | None] = {}
        self._fates: dict[str, Fate] = {}
        self._paid: set[str] = set()  # of these, those that are only being delivered
        self._are_lost_closed = False  # the rows of requests of which nothing else is left
        self._is_counted = True  # whether the prompts that came at the same time are
        self._ignored = Ignored(monotonic)
        self._caps_due = math.inf  # monotonic time at which the caps are to be looked at anew
        self._draining = self._ready = self._worked = False
        self.failed = 0

    # Running

    def run(self) -> int:
        """Run until a signal comes or, with ``once``, until there is nothing left to do.

        Returns:
            The exit code: 0, 1 (``once``: a job failed, or waits for its name), 69 (``once``: held), 70 (``once``: a
            job met a bug, or its record is damaged), 74 (``once``: own disk).

        Raises:
            ImagewatchError: It cannot start.
        """
        with self._signals():
            self._spool.lock()
            try:
                self._spool.prepare()
                self._budget = Budget(self._ledger, self._config.limits, self._clock)
                self._caps = Caps(self._budget, self._spool.inbox, self._intake.opener)
                self._status = Status(self._config, self._spool.disk, self._ledger, self._gate, self._clock, self._now)
                self._assemble(self._config)
                with ThreadPoolExecutor(_WORKERS, thread_name_prefix="worker") as self._pool:
                    try:
                        self._begin()
                        self._loop()
                    finally:
                        self._end()
            finally:
                self._spool.unlock()
        return self._exit_code()

    def _assemble(self, config: Config) -> None:
        """Make the parts that a configuration changes.

        Raises:
            ConfigError: It cannot be used; then everything is as before.
        """
        config = _within_open_files(config)
        client = Client(config.endpoint, lambda: read_key(config.endpoint, self._environ), clock=self._clock)
        self._config = config
        self._client = client
        self._status.configure(config)
        self._budget.change(config.limits)
        self._caps.configure(config)
        self._worker = Worker(
            self._spool,
            self._client,
            self._ledger,
            config,
            may_report=self._gate.may_report,
            not_reported=self._gate.not_reported,
            on_paid=lambda job: self._mailbox.put(Paid(job)),
            budget=self._budget,
            fates=self._fates,
            leaving=self._gate.leaving,
            on_trouble=lambda error: self._mailbox.put(Hindered(error)),
            clock=self._clock,
            monotonic=self._now,
            jitter=random,
        )
        self._intake.configure(config.inbox, config.limits.burst)
        self._gate.configure(
            config.limits, config.inbox.settle_seconds, lambda: key_stamp(config.endpoint, self._environ)
        )

    def _begin(self) -> None:
        if self._notify.watchdog_seconds:
            self._intake.most_seconds = self._notify.watchdog_seconds / 2
        self._gate.start()
        with contextlib.suppress(SpoolError):  # the next line says why
            self._accept_ledger()  # before anything is held for the one that is not to be used any more
        self._gate.room()  # also where nothing waits: it is to be known at the start
        for job in self._spool.unfinished():
            _log.info("recovered", job=job)
            self._later.append(Later(job, 0.0, self._spool.key(job)))
            self._set_aside(job)
        self._close_lost()  # before anything is sent: what they may have cost counts
        self._status.state = "once" if self._once else "running"
        self._ready_at = self._now() + _LONGEST_LOOK
        self._look()

    def _set_aside(self, job: str) -> None:
        """Count what a recovered job has sent before anything else is sent: the ledger may not have it yet."""
        record = self._spool.record(job)
        with contextlib.suppress(SpoolError):
            if sent := record.sent(record.attempts()[0]):
                self._budget.resume(job, Asked.of(sent.fields), sent.at)
            return
        with contextlib.suppress(SpoolError):  # a damaged record: its job reports that when it is carried on
            if unanswered := self._ledger.unanswered(job):
                self._budget.resume(job, *unanswered)

    def _loop(self) -> None:
        for _ in range(self._mailbox.qsize()):  # a signal may have come before anything was begun
            self._take(self._mailbox.get())
        while not self._is_over():
            self._look_if_due()
            self._look_at_caps()
            self._dispatch()
            self._hold_at_caps()
            self._report()
            if not self._is_over():
                self._take_messages()

    def _is_over(self) -> bool:
        if self._in_flight:
            return False
        if self._draining:
            return True
        if not self._once:
            return False
        if self._gate.disk_failed:
            return True
        if self._gate.waits():
            return self._intake.is_complete and not any(self._may_get_on(later) for later in self._later)
        may_fit = len(self._caps) > 0 and self._caps_due <= self._now()
        return not (self._intake.any() or self._intake.pending or may_fit or any(map(self._is_awaited, self._later)))

    def _may_get_on(self, later: Later) -> bool:
        """Tell whether a claimed job may be carried on behind a hold: to deliver what was paid for needs no request."""
        return later.fresh and not later.displaced and later.job not in self._failing

    def _is_awaited(self, later: Later) -> bool:
        """Tell whether ``once`` does not end before a job that waits: it will get on by itself, and soon."""
        return later.job not in self._failing and (not later.displaced or later.at <= self._now())

    def _take_messages(self) -> None:
        """Wait for the next message or the next thing to do, then take what messages there are.

        Not without end: whoever renames a file in the inbox again and again makes messages as fast as we take them.
        """
        with contextlib.suppress(queue.Empty):
            self._take(message := self._mailbox.get(timeout=self._patience()))
            for _ in range(_MOST_AT_ONCE):
                if isinstance(message, Hinted):
                    break  # some events are taken together, and there may be more
                self._take(message := self._mailbox.get_nowait())

    def _hint(self) -> None:
        """Take a message of the watcher, in its thread."""
        self._mailbox.put(Hinted())

    def _patience(self) -> float:
        """Return how long there is nothing to do unless a message comes, seconds."""
        if self._draining:  # only workers are waited for; those may wait for a folder
            return DISK_SECONDS if self._gate.disk_failed else _LONGEST_WAIT
        now = self._now()
        times = [self._intake.due, self._caps_due, now + self._gate.patience()]
        if self._status.due is not None:
            times.append(self._status.due)
        if self._may_ask():
            times += [later.at for later in self._later]
        elif self._may_deliver():
            times += [later.at for later in self._later if later.fresh]
        return min(max(min(times) - now, 0.001), _LONGEST_WAIT)

    def _take(self, message: Message) -> None:
        match message:
            case Hinted():
                self._note_events()
            case Signalled():
                self._signalled(message.number)
            case Paid():
                self._paid.add(message.job)
            case Finished():
                self._finished(message)
            case Hindered():
                self._gate.failed(message.error)

    def _end(self) -> None:
        """Finish what is sent; whatever is only claimed waits for the next start."""
        self._notify.send(STOPPING="1")
        self._draining = True
        self._gate.drain()
        while self._in_flight:
            self._take_messages()
        if self._once:
            self._look_through()  # what was given back lies in the inbox again
        self._status.state = "stopped"
        self._write_status()
        self._intake.stop()
        self._client.close()
        self._ledger.close()

    def _exit_code(self) -> int:
        if not self._once:
            return 0
        if self._parked:
            return 70  # not 1: it is not over, and may be paid for
        if self._gate.disk_failed or self._failing:
            return 74
        if self.hold is not None and (self.left or self._later):
            return 69
        return 1 if self.failed or self._later else 0

    @property
    def hold(self) -> Hold | None:
        """Why the queue is held, if it is, or prompts wait at a cap."""
        return self._gate.shown()

    @property
    def hold_ends(self) -> str | None:
        """When the hold ends or would be probed, as a UTC time; None without one, and if only a person ends it."""
        return self._gate.ends(self.hold) if self.hold else None

    @property
    def left(self) -> int:
        """How many prompts wait in the inbox."""
        return self._intake.count() + self._intake.seen.waiting.total

    # Looking

    def _look_if_due(self) -> None:
        if self._draining:
            with contextlib.suppress(SpoolError):  # an answer may wait for the state folder
                self._spool.require_folders()
            return
        if self._now() >= self._intake.due:
            self._look()
        else:
            self._gate.look_at_key()

    def _look_through(self) -> None:
        """Look until there is nothing to be looked at, but not for long."""
        until = self._now() + _LONGEST_LOOK
        self._look()
        while self._now() >= self._intake.due and self._now() < until:
            self._look()

    def _look(self) -> None:
        try:
            self._spool.require_folders()
            self._unpark()
            is_new = self._intake.look(self._taken())
        except SpoolError as error:
            self._gate.failed(error)
            self._intake.late(DISK_SECONDS)
            return
        is_known = self._ready or self._intake.is_complete or self._now() >= self._ready_at
        if is_new and is_known:
            self._ignored.tell(self._intake.seen.ignored)
        self._heed()
        self._status.last_scan = self._clock()
        self._status.mode = self._intake.mode
        if is_new:
            self._on_seen(self._intake.count() + len(self._in_flight))
        self._status.change()
        self._notify.send(WATCHDOG="1")
        if is_known and not self._ready:
            self._tell_ready()
        self._prepare()

    def _tell_ready(self) -> None:
        """Say that everything was looked at; who could not look yet is not ready."""
        self._ready = True
        self._write_status()  # it can be asked for from now on
        mode, where = self._intake.mode, self._config.endpoint.base_url
        polled = {"polled": why} if (why := self._intake.why_polled()) else {}
        _log.info("started", inbox=self._spool.inbox, mode=mode, **polled, endpoint=where, version=__version__)
        self._notify.send(READY="1", STATUS=f"watching {self._spool.inbox} ({mode})")

    def _prepare(self) -> None:
        """Make what the first request needs, now that nobody waits for the start any more.

        Not while prompts have to be quiet first: what is kept of them is gone afterwards, but what is made beside it
        stays, and holds all the memory around it.
        """
        if not self._once and not self._client.is_prepared and self._intake.seen.due is None:
            self._client.prepare()
            memory.give_back()  # to read the system's certificates takes some megabytes

    def _heed(self) -> None:
        """Look at what commands have asked for, and at how many prompts came at once."""
        changed = self._arrived()
        if self._control.release_pending():
            self._caps_due = self._now()
        self._gate.look(max(changed.values(), default=0.0))
        self._gate.count(changed, self._is_finished)
        try:
            self._accept_ledger()
            for job in self._control.retries():
                self._reopen(job)
        except SpoolError as error:
            self._gate.failed(error)

    def _accept_ledger(self) -> None:
        """Use the ledger that is there, or an empty one, if ``release --accept-new-ledger`` asked for it."""
        if not self._control.accepts_ledger():
            return
        self._ledger.accept()
        self._gate.burst.forget()
        self._control.accepted_ledger()
        _log.warning("ledger_accepted", ledger=os.path.join(self._spool.state, database.FILE))

    def _reopen(self, job: str) -> None:
        """Look again at the paid answer of a job, as ``retry`` asked for."""
        is_read = job in self._in_flight or any(later.job == job for later in self._later)  # asked for twice
        if not is_read and self._spool.reopen(job):
            _log.info("response_reread", job=job)
            self._parked.pop(job, None)
            self._count_parked()
            self._later.append(Later(job, 0.0, self._spool.key(job)))
            self._status.change()
        elif not is_read:
            _log.warning("response_missing", job=job)
        self._control.retried(job)

    def _arrived(self) -> dict[str, float]:
        """Return when each prompt in the inbox came, also of those not quiet yet; seconds since the epoch."""
        if not self._config.limits.burst:
            return {}
        found, taken = self._intake.arrived(), self._taken()
        for path in self._intake.seen.waiting:
            folder, _, name = path.rpartition("/")
            if (folder, stem_of(name)) in taken:
                continue  # it waited when its folder was scanned last, and is being taken since
            with contextlib.suppress(OSError):
                changed = self._spool.tops.lstat(os.path.join(self._spool.inbox, path)).st_ctime
                found[path] = max(changed, self._intake.came(folder))
        return found

    def _is_finished(self, source: str) -> bool:
        """Tell whether a prompt in the inbox has path, size and mtime of one that is over."""
        if self._config.inbox.redelivery != "skip":
            return False
        with contextlib.suppress(OSError, SpoolError):
            status = self._spool.tops.lstat(os.path.join(self._spool.inbox, source))
            return bool(self._ledger.finished("", source, status.st_size, status.st_mtime_ns))
        return False

    def _taken(self) -> Taken:
        """Return the stems of which a job is at work, waits or is stuck: the same files are not another job yet."""
        waiting = (later.key for later in self._later if not later.displaced)
        return Taken({*self._in_flight.values(), *self._parked.values(), *waiting})

    def _note_events(self) -> None:
        noted = self._intake.note_events(self._taken())
        if noted.asks:
            self._heed()  # not at the next look, which a huge inbox may put off
        self._is_counted = self._is_counted and not noted.ready

    def _count(self) -> None:
        """Look at how many prompts came at the same time."""
        self._is_counted = True
        self._gate.count(self._arrived(), self._is_finished)

    # At a cap

    def _look_at_caps(self) -> None:
        """Let prompts that waited at a cap have their turn again if they may fit now."""
        if self._now() < self._caps_due:
            return
        self._caps_due = math.inf
        try:
            self._intake.give_aside(self._caps.look(self._intake.is_aside))
        except SpoolError as error:  # the ledger cannot be read
            self._gate.failed(error)
            self._caps_due = self._now() + DISK_SECONDS

    def _hold_at_caps(self) -> None:
        """Say at which caps prompts wait now that those that fit were claimed."""
        held = self._caps.held()
        self._gate.set_caps(held)
        if held:
            seconds = min(refusal.ends for refusal in held.values()) - self._clock()
            self._caps_due = min(self._caps_due, self._now() + min(max(seconds, _LEAST_CAP), _LONGEST_CAP))

    # Doing

    def _dispatch(self) -> None:
        """Give workers what may be done now. The first-level folders take turns: what is claimed, then the oldest."""
        if self._draining:
            return
        self._gate.look_at_disk()
        now, held = self._now(), self._gate.first() is not None
        due = [later for later in self._later if later.at <= now or (held and later.turn)]
        claimed: dict[str, list[Later]] = {}
        for later in sorted(due, key=lambda job: job.at):
            claimed.setdefault(later.name, []).append(later)
            self._intake.turns.join(later.name, self._intake.owner(later.name))
        while self._may_ask() and (name := self._intake.turns.first()) is not None:
            if not self._serve(name, claimed.get(name, [])):
                break
        for later in (later for mine in claimed.values() for later in mine):
            if self._may_ask():  # nothing new may be claimed, for which these need not wait
                self._carry_on(later, may_send=True)
            elif later.fresh and self._may_deliver():
                self._carry_on(later, may_send=False)

    def _serve(self, name: str, claimed: list[Later]) -> bool:
        """Give a worker what is next in a first-level folder; tell whether another may have its turn."""
        if claimed:
            self._carry_on(claimed.pop(0), may_send=True)
        elif not self._intake.is_ready(name):
            self._intake.turns.leave(name)
            return True
        elif not self._may_claim():
            return False
        else:
            job = self._spool.new_job()
            if candidate := self._intake.next(name, self._taken(), functools.partial(self._admits, job)):
                self._start(job, candidate)
        self._intake.served(name)
        if claimed:
            self._intake.turns.join(name, self._intake.owner(name))
        return True

    def _admits(self, job: str, candidate: Candidate) -> bool:
        """Tell whether the caps let a prompt be claimed; if the ledger cannot be read, its job finds out."""
        try:
            return self._caps.admits(job, candidate)
        except SpoolError as error:
            self._gate.failed(error)
            return True

    def _carry_on(self, later: Later, *, may_send: bool) -> None:
        self._later.remove(later)
        carry = functools.partial(self._worker.process, later.job, resumed=True, may_send=may_send)
        self._submit(later.job, later.key, carry)

    def _may_claim(self) -> bool:
        """Tell whether another prompt may be claimed."""
        if not self._is_counted:
            self._count()
        if not (self._intake.any() and self._intake.may_take() and self._may_ask() and self._gate.room()):
            return False
        return self._are_lost_closed or self._close_lost()

    def _close_lost(self) -> bool:
        """Close the rows of requests of which nothing else is left; tell whether that is done."""
        try:
            jobs = {*self._spool.unfinished(), *self._in_flight, *(later.job for later in self._later)}
            known = set(filter(self._is_recorded, jobs))
            if lost := self._ledger.close_lost(known):
                _log.warning("results_lost", requests=lost, reason="the requests may have been charged")
        except SpoolError as error:
            self._gate.failed(error)
            return False
        self._are_lost_closed = True
        return True

    def _is_recorded(self, job: str) -> bool:
        """Tell whether it may still be found out what came of a job; without its record only a person can say more."""
        try:
            return job in self._fates or self._spool.record(job).claim() is not None
        except SpoolError:  # it may be readable again
            return True

    def _start(self, job: str, candidate: Candidate) -> None:
        claim = candidate.claim(job, self._clock())
        # What was quiet was counted together with all that had come until then.
        may_count = candidate.is_local or not candidate.was_quiet
        if self._config.limits.burst and may_count and not self._is_finished(candidate.source):
            came = max(candidate.changed_at, self._intake.came(candidate.key[0]))
            self._gate.burst.took(candidate.source, came, is_dated=candidate.is_local)
        self._submit(job, candidate.key, functools.partial(self._worker.start, claim))

    def _may_ask(self) -> bool:
        """Tell whether one more request may be on its way. A job that is only delivered does not use up a slot."""
        return self._gate.open(len(self._in_flight) - len(self._paid)) and self._has_worker()

    def _may_deliver(self) -> bool:
        """Tell whether a job that needs no request may be carried on."""
        return self._gate.deliverable(len(self._in_flight) - len(self._paid)) and self._has_worker()

    def _has_worker(self) -> bool:
        """Tell whether a worker is free: a slow disk must not let paid answers pile up."""
        slots = self._config.limits.concurrency
        return len(self._in_flight) < slots + slots // 2

    def _submit(self, job: str, key: Key | None, call: Callable[[], Outcome]) -> None:
        memory.reuse()  # not before: very many names at rest take less memory as it is
        began = self._now()
        future = self._pool.submit(call)
        self._in_flight[job] = key  # not before: it fails where no more threads can be made
        future.add_done_callback(lambda done: self._mailbox.put(Finished(job, began, done)))

    def _finished(self, message: Finished) -> None:
        key = self._in_flight.pop(message.job, None)
        self._paid.discard(message.job)
        self._worked = True
        self._caps_due = self._now()
        self._status.change()
        self._intake.over(key)
        try:
            outcome = message.future.result()
        except SpoolError as error:
            self._budget.unplan(message.job)
            self._stuck(message.job, key, error)
            return
        except Exception:  # noqa: BLE001  a bug in one job must not stop the others
            _log.exception("internal_error", job=message.job, next="report this as a bug")
            self._budget.unplan(message.job)
            self._park(message.job, key)
            return
        self._gets_on(message.job)
        self._judge(outcome, key, message.began)

    def _stuck(self, job: str, key: Key | None, error: SpoolError) -> None:
        """A job met our own disk, and is tried again later. Unless it is this job alone, nothing is sent until then.

        It is alone where a write probe succeeds at once: a file in its way, a permission. Whatever else lies in its
        folder may meet the same, after it was paid for.
        """
        if error.code == 0:
            _log.error("stuck", job=job, reason=str(error), next=error.hint)
            self._park(job, key)
            return
        delay = DISK_SECONDS
        if self._gate.failed_alone(job, error):
            if job not in self._failing:
                _log.error("stuck", job=job, reason=str(error), next=error.hint, retried="automatically")
            before, _ = self._failing.get(job, (DISK_SECONDS / 2, key))
            delay = min(2 * before, _LONGEST_RETRY)
            self._failing[job] = delay, key
            self._shut()
        self._later.append(Later(job, self._now() + delay, key))

    def _gets_on(self, job: str) -> None:
        """Take note that a job fails no more, if it did."""
        self._gate.got_on(job)
        if failed := self._failing.pop(job, None):
            self._shut()
            self._intake.soon(failed[1])

    def _shut(self) -> None:
        """Let nothing be taken out of the folders of which a job fails alone."""
        self._status.change()
        folders = [key[0] for _, key in self._failing.values() if key]
        # One prompt in the inbox itself may have a fault of its own; if there are more, the others may have it, too.
        self._intake.shut = frozenset(folder for folder in folders if folder or folders.count("") >= _MOST_ALONE)

    def _park(self, job: str, key: Key | None) -> None:
        """Leave a job to whoever looks into it. Its stem stays taken: it may be paid for, and be brought back."""
        self._gets_on(job)
        self._parked[job] = key
        self._budget.strand(job)
        self._count_parked()

    def _count_parked(self) -> None:
        """Hold the queue while there are many jobs that only a person can carry on."""
        if len(self._parked) >= _MOST_PARKED:
            jobs = ", ".join(sorted(self._parked)[:_MOST_PARKED])
            error = SpoolError(f"{len(self._parked)} jobs are stuck ({jobs}, …)", hint=_STUCK_HINT)
            self._gate.brake(_PARKED, error)
        else:
            self._gate.got_on(_PARKED)

    def _unpark(self) -> None:
        """Forget jobs of which a person has taken away what was left: their names are free."""
        for job in [job for job in self._parked if not self._spool.is_left(job)]:
            _log.info("unstuck", job=job, reason="none of its files are left")
            del self._parked[job]
            self._are_lost_closed = False  # its record is not there any more
            self._count_parked()
            self._intake.soon()
            self._status.change()

    def _judge(self, outcome: Outcome, key: Key | None, began: float) -> None:
        """Draw the consequences of an outcome for the queue."""
        if outcome.reason is not None and outcome.reason.kind == "broken":
            self._gate.broke(outcome.job, outcome.reason, began)
        elif outcome.reason is not None:
            self._gate.met(outcome.reason, began)
        elif outcome.answered:
            self._gate.answered(began)
        if outcome.end not in {End.LATER, End.RETURNED}:
            for later in self._later:
                if later.displaced and later.key == key:
                    later.at = self._now()  # its name may be free now
        if outcome.end is End.LATER:
            turn = outcome.reason is not None and outcome.reason.row.is_short
            fresh = outcome.displaced or turn  # any other wait is for a request
            self._later.append(Later(outcome.job, self._now() + outcome.delay, key, outcome.displaced, fresh, turn))
        elif outcome.end in {End.RETURNED, End.REDELIVERED}:
            self._count_again(outcome)
            self._intake.soon(key)
        elif outcome.end is End.OVER:
            self._gate.burst.over(outcome.source)
            self.failed += outcome.door == "errors"
            self._on_outcome(outcome)

    def _count_again(self, outcome: Outcome) -> None:
        """Tell the burst guard what a prompt of this path is from now on: the one that was given back, or a new one."""
        if outcome.end is End.RETURNED:
            self._gate.burst.returned(outcome.source)
        else:
            self._gate.burst.over(outcome.source)

    # Telling

    def _changed_hold(self, *, at_once: bool) -> None:
        self._status.change(at_once=at_once)

    def _report(self) -> None:
        if self._status.due is not None and self._now() >= self._status.due:
            self._write_status()
            if self._worked and not self._in_flight:
                self._worked = False
                memory.give_back()

    def _write_status(self, **fields: str) -> None:
        """Write the status file, and tell the service manager the same in one line and some fields more."""
        failing = {job: key for job, (_, key) in self._failing.items()}
        at_work, stuck = map(_sources, (self._in_flight, failing | self._parked))
        self._status.polled = self._intake.polled()
        try:
            ready = max(self._intake.count() - len(self._caps), 0)
            page = self._status.write(self._intake.seen, ready, at_work, stuck, self._caps.reasons())
        except SpoolError as error:
            _log.debug("status_failed", reason=str(error))
        else:
            fields["STATUS"] = line(page)
        if fields:
            self._notify.send(**fields)

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take signals as messages; the first SIGTERM or SIGINT drains, the second one kills."""
        before: dict[int, object] = {}
        with contextlib.suppress(ValueError):  # not the main thread: the caller has the signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGHUP:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._gate.drain()
        self._mailbox.put(Signalled(number))

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reconfigure()
            return
        self._draining = True
        self._gate.wait_for_first_bytes()
        self._status.state = "stopping"
        self._write_status(STOPPING="1")
        _log.info("shutdown", signal=signal.Signals(number).name, in_flight=len(self._in_flight))

    def _reconfigure(self) -> None:
        """Take a changed configuration, or keep the old one and say why."""
        if self._reload is None:
            return
        try:
            config = self._reload()
            if fixed := [name for name in _FIXED if getattr(config, name) != getattr(self._config, name)]:
                _log.error("reload_failed", reason=f"a changed [{fixed[0]}] needs a restart")
                return
            self._assemble(config)
            self._count()
        except (ConfigError, OSError) as error:
            _log.error("reload_failed", reason=str(error))
            return
        self._on_reloaded(config)
        _log.info("reloaded", configuration=config.source)


def _within_open_files(config: Config) -> Config:
    """Return a configuration with as many requests at the same time as this process has files for."""
    wanted = config.limits.concurrency
    most, files = most_requests(wanted)
    if most < wanted:
        reason = f"only {files} open files are allowed: limits.concurrency is {wanted}, and {most} is used"
        _log.warning("limited", reason=reason, next=MORE_FILES)
    return replace(config, limits=replace(config.limits, concurrency=most))


def _sources(jobs: Mapping[str, Key | None]) -> dict[str, str]:
    """Return the path of the prompt of each job, as far as it is known: ``*/`` is in the place of any folder."""
    return {
        job: "/".join("*" if part == ANYWHERE else part for part in key if part) + SUFFIX if key else ""
        for job, key in jobs.items()
    }
