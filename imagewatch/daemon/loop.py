"""The main loop of the daemon.

One thread, this one, decides what is done when. Watcher, signals and finished workers only put messages into one
mailbox; the loop takes them out.
"""

from __future__ import annotations

import contextlib
import errno
import math
import signal
import time
from typing import TYPE_CHECKING

import structlog

from imagewatch.config.schema import RESTART
from imagewatch.daemon.arrivals import Arrivals
from imagewatch.daemon.dispatch import Dispatch
from imagewatch.daemon.instructions import Instructions
from imagewatch.daemon.mailbox import Asked, DiskFailed, Finished, Hinted, Notified, Offered, Saved, Signalled
from imagewatch.daemon.parts import Parts
from imagewatch.daemon.recovery import Recovery
from imagewatch.daemon.report import Report
from imagewatch.daemon.results import Results
from imagewatch.daemon.signals import as_messages
from imagewatch.journal.holds import Hold, Holds
from imagewatch.protocol.reasons import DISK_SECONDS
from imagewatch.system import memory
from imagewatch.system.disk import Disk
from imagewatch.system.errors import ConfigError, DatabaseError, SpoolError, UsageError
from imagewatch.system.exits import EXIT_FAILED, EXIT_HELD, EXIT_INTERNAL, EXIT_SPOOL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.daemon.mailbox import Message
    from imagewatch.job.outcome import Outcome

_LONGEST_WAIT = 3600.0
_LONGEST_SCAN = 5.0
"""How long ``once`` scans at most at its end, seconds."""
_DATABASE_SECONDS, _DATABASE_PAUSE = 60.0, 3.0
"""How long a service that starts waits for a shared database that cannot be reached, and between two tries, seconds."""
_NOTIFY_SECONDS = 10.0
"""How long notifications that are due are delivered at the end, seconds; the others wait for the next start."""
_log = structlog.get_logger()


class Daemon:
    """The daemon of one inbox.

    Args:
        config: The configuration.
        environ: Environment: key, systemd's socket.
        disk: The local disk.
        once: Whether to end when the inbox is empty or the queue is on hold.
        on_outcome: Called for each finished job.
        on_found: Called after each scan that found something new.
        reload: Returns a new configuration on SIGHUP.
        on_reloaded: Called with the new configuration when it is used.
        holds: Reasons to wait; given by a caller that cannot wait for the usual interval between two probes.
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
        on_found: Callable[[int], None] = lambda _: None,
        reload: Callable[[], Config] | None = None,
        on_reloaded: Callable[[Config], None] = lambda _: None,
        holds: Holds | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._once = once
        self._on_found, self._on_reloaded, self._reload = on_found, on_reloaded, reload
        self._now = monotonic
        self._parts = Parts(config, environ, disk or Disk(), holds or Holds(), clock, monotonic)
        self._jobs, self._admission, self._intake = self._parts.jobs, self._parts.admission, self._parts.intake
        self._arrivals = Arrivals(self._parts)
        self._recovery = Recovery(self._parts)
        self._dispatch = Dispatch(self._parts, self._arrivals, self._recovery)
        self._results = Results(self._parts, on_outcome)
        self._instructions = Instructions(self._parts, self._arrivals, self._results, self._recovery)
        self._report = Report(self._parts)
        self._is_draining = False
        self._checked_at = -math.inf
        self._asked_at = 0.0  # before it was last asked what may be done, monotonic seconds

    # Running

    def run(self) -> int:
        """Run until a signal comes or, with ``once``, until there is nothing left to do.

        Returns:
            The exit code: 0, 1 (``once``: a job failed, or waits for its name), 69 (``once``: on hold, or the
            database failed), 70 (``once``: a job hit a bug, or its record is damaged), 74 (``once``: local disk).

        Raises:
            ImagewatchError: It cannot start.
        """
        parts = self._parts
        if self._once and parts.team.is_on:
            hint = "use imagewatch run; once is for an inbox that one daemon processes"
            raise UsageError("shared.inbox is set: other daemons process this inbox, too", hint=hint)
        with as_messages(parts.mailbox, self._admission.drain):
            parts.spool.lock()
            try:
                if not self._begin_parts():
                    return 0
                parts.configure(parts.config)
                with self._dispatch.pool:
                    try:
                        self._begin()
                        self._loop()
                    finally:
                        self._end()
            finally:
                parts.spool.unlock()
        return self._exit_code()

    def _begin_parts(self) -> bool:
        """Make sure that everything can be used; return whether no signal to stop came meanwhile.

        A service waits for its shared database for a minute: systemd starts it only so often.
        """
        notify, until = self._parts.notify, self._now()
        until += _DATABASE_SECONDS if notify.is_connected else 0.0
        while True:
            try:
                self._parts.begin()
            except DatabaseError as error:
                if error.code != errno.EIO or self._now() >= until:
                    raise
                notify.send(STATUS=f"waiting: {error}")
            else:
                return True
            for message in self._parts.mailbox.wait(_DATABASE_PAUSE):
                if isinstance(message, Signalled) and message.number != signal.SIGHUP:
                    return False

    def _begin(self) -> None:
        if seconds := self._parts.notify.watchdog_seconds:
            self._intake.scanner.most_seconds = seconds / 2
        with contextlib.suppress(SpoolError):  # what comes next reports why
            self._instructions.accept_ledger()  # before anything is held for the one that is not used any more
        self._admission.start()
        self._admission.has_room()  # also where nothing waits: it is to be known at the start
        self._recovery.begin()
        self._report.begin("once" if self._once else "running")
        self._parts.watch_account()
        self._scan()

    def _loop(self) -> None:
        for message in self._parts.mailbox.arrived():  # a signal may have come before anything was begun
            self._take(message)
        while not self._is_over():
            self._scan_if_due()
            self._asked_at = self._now()
            self._dispatch.run(is_draining=self._is_draining)
            self._report.write_if_due()
            if not self._is_over():
                self._take_messages()

    def _is_over(self) -> bool:
        if self._jobs.any_at_work:
            return False
        if self._is_draining:
            return True
        if not self._once:
            return False
        if self._admission.stores.failed:
            return True
        if self._admission.waits():
            return self._intake.scanner.is_complete and not self._jobs.any_may_continue()
        caps = self._parts.caps
        is_waiting = self._intake.any() or self._intake.scanner.pending or caps.may_fit() or caps.any_waits_briefly()
        return not (is_waiting or self._jobs.any_is_awaited(self._now()))

    def _take_messages(self) -> None:
        """Wait for the next message or the next thing to do, then take what messages there are."""
        is_asked = False  # once for all of them: other daemons of an account may ask often
        for message in self._parts.mailbox.wait(self._patience()):
            if isinstance(message, Asked):
                is_asked = True
            else:
                self._take(message)
        if is_asked:
            self._take(Asked())

    def _patience(self) -> float:
        """Return how long there is nothing to do unless a message comes, seconds."""
        if self._is_draining:  # only workers are waited for; those may wait for a folder
            return DISK_SECONDS if self._admission.stores.failed else _LONGEST_WAIT
        now = self._now()
        times = [
            self._scan_due(),
            self._parts.team.next_due(),
            self._dispatch.next_due(),
            now + self._admission.patience(self._asked_at),
        ]
        times.append(self._admission.announcements.due)
        if (due := self._report.due) is not None:
            times.append(due)
        return min(max(min(times) - now, 0.001), _LONGEST_WAIT)

    def _take(self, message: Message) -> None:
        match message:
            case Hinted():
                self._note_events()
            case Asked():
                self._instructions.follow()
                self._take_over()
            case Offered():
                self._parts.team.offered()
            case Signalled(signal.SIGHUP):
                self._reconfigure()
            case Signalled():
                self._stop(message.number)
            case Saved():
                self._jobs.deliver(message.job)
            case Finished():
                self._report.worked()
                self._results.take(message)
            case DiskFailed():
                self._admission.failed(message.error)
            case Notified():
                self._parts.status.change()

    def _take_over(self) -> None:
        """Take the jobs of other daemons of the inbox that do not run any more."""
        if self._is_draining:
            return
        try:
            self._parts.team.take_over()
        except SpoolError as error:
            self._admission.failed(error)

    def _note_events(self) -> None:
        noted = self._intake.note_events(self._parts.team.taken())
        if noted.asks:
            self._instructions.follow()  # not after the next scan, which a huge inbox may put off
        if noted.ready:
            self._arrivals.changed()

    def _stop(self, number: int) -> None:
        self._is_draining = True
        self._admission.wait_for_first_bytes()
        self._parts.team.drain()
        self._report.stopping(number)

    def _end(self) -> None:
        """Finish what is sent; whatever is only claimed waits for the next start."""
        self._parts.notify.send(STOPPING="1")
        self._is_draining = True
        self._admission.drain()
        while self._jobs.any_at_work:
            self._take_messages()
        if self._once:
            self._scan_all()  # what was given back is in the inbox again
        self._parts.notifier.close(_NOTIFY_SECONDS)
        self._report.stopped()
        self._parts.close()

    # The end of ``once``

    def _exit_code(self) -> int:
        if not self._once:
            return 0
        if self._jobs.left:
            return EXIT_INTERNAL  # not 1: it is not over, and may be paid for
        if "disk" in self._admission.stores.failed or self._jobs.any_fails:
            return EXIT_SPOOL
        if self._admission.stores.failed:
            return EXIT_HELD
        if self.hold is not None and (self.left or self._jobs.any_deferred):
            return EXIT_HELD
        return EXIT_FAILED if self._results.failed or self._jobs.any_deferred else 0

    @property
    def hold(self) -> Hold | None:
        """Why the queue is on hold, if it is, or prompts wait at a cap."""
        return self._admission.shown()

    @property
    def hold_ends(self) -> str | None:
        """When the hold ends or would be probed, as a UTC time; None without one, and if only a person ends it."""
        return self._admission.ends(self.hold) if self.hold else None

    @property
    def left(self) -> int:
        """How many prompts wait in the inbox."""
        return self._intake.count() + self._intake.result.waiting.total

    # Scanning

    def _scan_if_due(self) -> None:
        if self._is_draining:
            with contextlib.suppress(SpoolError):  # a response may wait for the state folder
                self._parts.spool.require_folders()
        elif self._now() >= self._scan_due():
            self._scan()
        else:
            self._admission.check_key()

    def _scan_due(self) -> float:
        """Return the monotonic time of the next scan. A daemon that does not scan only checks its folders then."""
        if self._parts.team.leads():
            return self._intake.scanner.due
        return self._checked_at + self._parts.config.inbox.rescan_seconds

    def _scan_all(self) -> None:
        """Scan until there is nothing to be scanned, but not for long."""
        until = self._now() + _LONGEST_SCAN
        self._scan()
        while self._now() >= self._intake.scanner.due and self._now() < until:
            self._scan()

    def _scan(self) -> None:
        try:
            self._parts.spool.require_folders()
            self._results.forget_removed()
            self._parts.team.refresh()
            self._parts.team.tidy()
            is_new = self._parts.team.leads() and self._intake.scan(self._parts.team.taken())
        except SpoolError as error:
            self._admission.failed(error)
            self._intake.scanner.late(DISK_SECONDS)
            self._parts.team.cannot_scan()
            self._checked_at = self._now() - self._parts.config.inbox.rescan_seconds + DISK_SECONDS
            return
        self._parts.team.can_scan()
        self._checked_at = self._now()
        self._instructions.follow()
        if is_new:
            self._on_found(self._intake.count() + len(self._jobs.at_work))
        self._report.scanned(is_new=is_new)
        self._prepare()

    def _prepare(self) -> None:
        """Make what the first request needs, now that the start does not wait for it any more.

        Not while prompts have to settle first: what is kept of them is freed afterwards, but what is allocated
        beside it stays, and holds all the memory around it.
        """
        client = self._parts.client
        if not self._once and not client.is_prepared and self._intake.result.due is None:
            client.prepare()
            memory.give_back()  # to read the system's certificates needs some megabytes

    # Another configuration

    def _reconfigure(self) -> None:
        """Use a changed configuration, or keep the old one and report why."""
        if self._reload is None:
            return
        before = self._parts.config
        try:
            config = self._reload()
            if fixed := [name for name in RESTART if getattr(config, name) != getattr(before, name)]:
                _log.error("reload_failed", reason=f"a change of [{fixed[0]}] needs a restart")
                return
            self._parts.configure(config)
            self._arrivals.count()
        except (ConfigError, OSError) as error:
            _log.error("reload_failed", reason=str(error))
            return
        self._on_reloaded(config)
        _log.info("reloaded", configuration=config.source)
