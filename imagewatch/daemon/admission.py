"""Whether the queue is on hold: it begins holds and ends them, and lets the first byte of a request leave.

Caps (``caps``), free slots (``jobs``) and folders with a stuck job (``intake``) are other reasons to wait. ``dispatch``
combines all of them.

It belongs to the main thread. Workers call only ``leaving``, ``may_report`` and ``not_reported``. The log names each
hold when it begins, with the next step. It also names the end of each hold, except of ``busy`` and ``rate``.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import structlog

from imagewatch.daemon.account import SharedHolds
from imagewatch.daemon.announcements import Announcements
from imagewatch.daemon.burst import BurstGuard
from imagewatch.daemon.held import HoldsThereAre, log_begin, log_end
from imagewatch.daemon.stores import Stores
from imagewatch.protocol.reasons import KINDS, STORES, Others, Reason, failure
from imagewatch.system.disk_errors import FULL
from imagewatch.system.errors import SpoolError, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from imagewatch.config.schema import Limits
    from imagewatch.daemon.jobs import Job
    from imagewatch.job.spool import Spool
    from imagewatch.journal.control import Control
    from imagewatch.journal.holds import Hold, Holds
    from imagewatch.journal.journal import Journal

_KEY_SECONDS = 2.0
"""How often the key file is checked while the account refuses requests, seconds."""
_MOST_BROKEN = 2
"""After more cut-off uploads in a row than this, the network is taken to be the cause."""
_ACCOUNT = [kind.name for kind in KINDS.values() if kind.is_account]
_log = structlog.get_logger()


class OnChange(Protocol):
    """Called when a hold begins, changes or ends."""

    def __call__(self, *, at_once: bool) -> None:
        """Note a change; ``at_once``: it is rare and important."""


class Admission(HoldsThereAre):
    """Lets requests be sent, or puts the queue on hold.

    Args:
        spool: The folders.
        journal: Records everything that is sent.
        control: What commands asked for.
        holds: Reasons to wait.
        on_change: Called when a hold begins, changes or ends.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        is_at_work: Returns whether a worker has a job now.

    Attributes:
        shared: The holds of a shared account.
    """

    def __init__(
        self,
        spool: Spool,
        journal: Journal,
        control: Control,
        holds: Holds,
        on_change: OnChange,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        is_at_work: Callable[[str], bool] = lambda _: False,
    ) -> None:
        super().__init__(holds, clock, monotonic)
        self._on_change = on_change
        self._spool = spool
        self._journal = journal
        self._control = control
        self.shared = SharedHolds(journal.account, holds, is_at_work, monotonic)
        self._key_stamp: Callable[[], object] = lambda: None
        self._key_step: Callable[[], str] = str
        self._stamp: object = None
        self._stamp_at = 0.0
        self._reason: str | None = None
        self._since = -math.inf
        self._ended: dict[str, float] = {}
        self.burst = BurstGuard(monotonic, clock)
        self.announcements = Announcements(journal.events, self.ends, clock, monotonic)
        self.stores = Stores(spool, journal)
        self.may_report, self.not_reported = holds.may_report, holds.not_reported
        self._broken: set[str] = set()
        self._first_bytes = threading.Lock()
        self._is_draining = self._knows_holds = False
        self._passed = 0.0

    def configure(
        self, limits: Limits, settle_seconds: float, key_stamp: Callable[[], object], key_step: Callable[[], str]
    ) -> None:
        """Take a configuration. Holds for the account, the network or a limit end: the next request tries again.

        Args:
            limits: Concurrency, burst, free space.
            settle_seconds: Prompts that come within this time come at the same time.
            key_stamp: Returns a value that differs when the key's file was changed.
            key_step: Returns what to do if the API does not accept the key.
        """
        self._since = self._now()
        self._limits = limits
        self.burst.configure(limits.burst, settle_seconds)
        self._key_stamp, self._key_step = key_stamp, key_step
        self._stamp = key_stamp()
        self.announcements.configure()
        self._end([*self._holds.clear_outer(), *self._holds.clear("burst")])
        self.shared.probe_soon()

    # What may be done

    def slots(self) -> int:
        """Return how many requests there may be at the same time: 0 during a hold, 1 while one is a probe."""
        if self.stores.held_by or self._holds.waiting(self._now()) is not None:
            return 0
        return 1 if self._holds.probing() else self._limits.concurrency

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Send the first bytes of a request during the block; workers enter it right before they do.

        Raises:
            Withdrawn: None may be sent: a hold or the end has come since the prompt was claimed.
        """
        with self._first_bytes:
            if self._is_draining:
                raise Withdrawn("the daemon stopped before the request was sent")
            for error in list(self.stores.held_by.values()):
                kind = failure(error).kind
                raise Withdrawn(f"the queue was put on hold ({kind}) before the request was sent: {error}")
            hold = self._holds.waiting(self._now(), was_admitted=True)
            if hold is not None:
                raise Withdrawn(
                    f"the queue was put on hold ({hold.kind}) before the request was sent: {hold.reason.message}"
                )
            yield

    def drain(self) -> None:
        """Let no more requests be sent; called in the main thread, also by a signal handler."""
        self._is_draining = True

    def wait_for_first_bytes(self) -> None:
        """Return when no worker is about to send first bytes: from now on none does any more."""
        with self._first_bytes:
            pass

    def is_burst(self) -> bool:
        """Return whether too many prompts came at the same time."""
        return self._holds.has("burst")

    def stores_work(self) -> bool:
        """Return whether no hold for local disk or database forbids what needs no request any more."""
        return not any(self._holds.waits(kind, self._now()) for kind in STORES)

    def has_room(self) -> bool:
        """Return whether another response can be paid, saved and recorded; if not, put the queue on hold."""
        held = self.stores.held()
        for error in held.values():
            self.failed(error)
        failed = self._failures(set(held), probe=any(self._holds.has(kind) for kind in STORES))
        for kind in STORES:
            if kind not in failed:
                self._end(self._holds.clear(kind))
        return not failed

    def probe_stores(self) -> None:
        """Make the next write probe if it is due, also where nothing waits: the status must not show a past hold."""
        held = self.stores.held()
        kinds = [kind for kind in STORES if self._holds.has(kind) and kind not in held]
        if any(not self._holds.waits(kind, self._now()) for kind in kinds):
            self.has_room()

    def works_for_others(self, job: Job, error: SpoolError) -> bool:
        """Return whether the local disks work although a job cannot continue; if not, put the queue on hold.

        If they work, the cause is in this job's own files, which another user may have put there; the others continue.
        For what all jobs share (ledger, state folder, database), the queue is on hold until this job continues.
        """
        is_database = failure(error).kind == "database"
        if is_database or error.path == self._spool.state or error.path.startswith(self._spool.state + "/"):
            try:
                if not is_database:
                    self._spool.require_folders()
            except SpoolError as cause:  # another state folder has its name: nothing in that one is ours
                error = cause
            if job.id not in self.stores.held_by and error.code:  # others were logged already
                _log.error("stuck", **job.names, reason=str(error), next=error.hint, retried="automatically")
            self.hold_for(job.id, error)
            return False
        if error.code in FULL:  # a small probe may succeed where images do not
            self.failed(error)
            return False
        return not self._failures(set(), probe=True)

    def hold_for(self, job: str, error: SpoolError) -> None:
        """Put the queue on hold until a job continues, also if a write probe succeeds meanwhile."""
        self.stores.held_by[job] = error
        self.failed(error)

    def continues(self, job: str) -> None:
        """Note that a job continues: the queue is not on hold for it any more."""
        self.stores.held_by.pop(job, None)

    def _failures(self, held: set[str], *, probe: bool) -> set[str]:
        """Test local disk and journal and return the kinds of hold of what fails; there is a hold for each.

        While one fails, the other is tested only if it has a hold to be ended.

        Args:
            held: Kinds that are known to fail; they are not tested.
            probe: Whether it is tested that every folder and the journal can be written.
        """
        failed = set(held)
        for kind in STORES:
            if kind in held or (failed and not self._holds.has(kind)):
                continue
            try:
                self.stores.test(kind, least_free=self._limits.min_free_bytes, probe=probe)
            except SpoolError as error:  # of a journal on the local disk it is the disk's
                self.failed(error)
                failed.add(failure(error).kind)
        return failed

    def count(self, changed: Mapping[str, float], is_finished: Callable[[str], bool]) -> None:
        """Put the queue on hold until a person releases it if too many prompts came at the same time.

        Args:
            changed: As for ``BurstGuard.count``.
            is_finished: As for ``BurstGuard.count``.
        """
        most = self._limits.burst
        if most and not self._holds.has("burst") and (new := self.burst.count(changed, is_finished)) > most:
            self._begin(Reason("burst", f"{new} prompts arrived at the same time; limits.burst allows {most}"))
        with contextlib.suppress(SpoolError):  # the next time
            self._keep_passed()

    def follow(self, changed: Mapping[str, float] | None = None) -> None:
        """Do what commands have asked for, and check the key file.

        Args:
            changed: As for ``BurstGuard.count``, if it is known.
        """
        try:
            self._read_account()
            self._read_control(changed or {})
        except SpoolError as error:  # the request of the command stays, and is read again
            self.failed(error)
        self.check_key()

    def _read_control(self, changed: Mapping[str, float]) -> None:
        self._remember_holds()
        if self._control.release_pending():
            self._since = self._now()
            self.burst.let_pass(changed)
            self.shared.probe_now()  # what concerns other daemons, too, is not ended by this one
            self.stores.held_by.clear()  # a job that still fails puts the queue on hold again
            self._control.released(self.burst.passed)
            self._passed = self.burst.passed
            self._end(self._holds.clear())
        reason, before = self._control.held(), self._reason
        self._reason = reason
        if reason is None:
            self._end(self._holds.clear("manual"))
        elif reason != before or not self._holds.has("manual"):
            self._begin(Reason("manual", reason or "put on hold manually"))

    def _read_account(self) -> None:
        """Begin and end the holds of a shared account here, too."""
        begun, ended = self.shared.read()
        if begun:
            self._began(begun)
        self._end(ended)

    def check_key(self) -> None:
        """Check whether the key file was changed, if that is due."""
        if not self.watches_key() or self._now() < self._stamp_at:
            return
        self._stamp_at = self._now() + _KEY_SECONDS
        stamp, self._stamp = self._stamp, self._key_stamp()
        if stamp != self._stamp:
            _log.info("key_changed")
            for kind in _ACCOUNT:
                self._end(self._holds.clear(kind))
            self.shared.probe_soon()

    def watches_key(self) -> bool:
        """Return whether there is a hold that a changed key would end."""
        return any(self._holds.has(kind) for kind in _ACCOUNT)

    def start(self) -> None:
        """Do what commands have asked for while no daemon was running."""
        self._control.prepare()
        self._control.tidy()
        self.follow()

    def _remember_holds(self) -> None:
        """Resume the holds of an earlier process, as soon as the journal can be read."""
        if self._knows_holds:
            return
        self._control.adopt()
        self._passed = self._control.passed()
        self.burst.resume(self._passed)
        self._keep_passed()
        for kind, message in self._control.refused().items():
            if kind in _ACCOUNT:
                _log.info("hold_resumed", kind=kind, reason=message)
                self._holds.resume(self._with_step(Reason(kind, message)), self._now())
        self._knows_holds = True

    def _keep_passed(self) -> None:
        """Record until when the burst guard counts nothing, if a clock that was set has changed that."""
        if self.burst.passed != self._passed:
            self._control.let_pass(self.burst.passed)
            self._passed = self.burst.passed

    def patience(self, since: float) -> float:
        """Return after how many seconds a hold is due to be tried again; infinite without one.

        Args:
            since: Monotonic time before it was asked what may be done. A hold that has ended since then is due.
        """
        now = self._now()
        waiting = self._holds.waiting(since)
        seconds = waiting.until - now if waiting else math.inf
        return min(seconds, self._stamp_at - now) if self.watches_key() else seconds

    # What has happened

    def refused(self, reason: Reason, began: float) -> None:
        """Put the queue on hold for a reason that concerns every request, unless it is already out of date.

        Args:
            reason: Why a request was refused.
            began: Monotonic time at which that request began, seconds. The key, for example, may have changed since.
        """
        others = reason.row.others
        if reason.error is not None:
            self.failed(reason.error)
        elif self.shared.concerns(reason.kind):
            self.follow()
        elif others in {Others.CONTINUE, Others.FITTING} or reason.folder:
            pass
        elif others is Others.PAUSE or began >= max(self._since, self._ended.get(reason.kind, self._since)):
            self._begin(reason)

    def upload_broke(self, job: str, reason: Reason, began: float) -> None:
        """Note that the upload of a job was cut off: of one job for its own reasons, of several by the network.

        Args:
            job: The job.
            reason: How it was cut off.
            began: As for ``refused``.
        """
        self._broken.add(job)
        if len(self._broken) > _MOST_BROKEN:
            self.refused(Reason("unreachable", reason.message), began)

    def answered(self, began: float) -> None:
        """Note that a request that began at this monotonic time was answered."""
        self._broken.clear()
        self._end(self._holds.disproved(began))

    def failed(self, error: SpoolError) -> None:
        """Note that local disk or shared database failed: nothing is sent until a write probe of it succeeds."""
        reason = failure(error)
        self.stores.failed.add(reason.kind)
        self._begin(reason)

    def set_caps(self, refused: Mapping[tuple[str, str], Reason]) -> None:
        """Note whose prompts wait at a cap or a budget, by provider and folder, and why."""
        now = self._journal.clock()  # that of the caps
        reasons = {whose: replace(reason, seconds=max(reason.ends - now, 0.0)) for whose, reason in refused.items()}
        begun, ended = self._holds.set_caps(reasons, self._now())
        if begun or ended:
            self._on_change(at_once=not all(hold.brief for hold in (*begun, *ended)))
        if begun or ended or self.announcements.is_due():
            self._remember()
        log_begin([hold for hold in begun if not hold.brief], self._now(), self.ends)
        log_end(ended)

    def _begin(self, reason: Reason) -> None:
        kind = reason.kind
        if reason.seconds is None:
            reason = replace(reason, seconds=reason.row.seconds)
        reason = self._with_step(reason)
        if not self.watches_key():
            self._stamp, self._stamp_at = self._key_stamp(), self._now() + _KEY_SECONDS
        if reason.error is not None:
            known = self.stores.is_logged(kind, reason.error, is_held=self._holds.has(kind))
        else:
            known = kind != "manual" and self._holds.waits(kind, self._now())
        hold = self._holds.add(reason, self._now())
        if known:
            self._on_change(at_once=False)
        else:
            self._began([hold])

    def _began(self, holds: list[Hold]) -> None:
        self._on_change(at_once=any(not hold.brief for hold in holds))
        self.wait_for_first_bytes()
        self._remember()
        log_begin(holds, self._now(), self.ends)

    def _with_step(self, reason: Reason) -> Reason:
        """Return a reason with its next step, which for the key depends on where the key comes from."""
        return replace(reason, step=self._key_step()) if reason.kind == "key" and not reason.step else reason

    def _end(self, ended: list[Hold]) -> None:
        if ended:
            self._on_change(at_once=not all(hold.brief for hold in ended))
            self._remember()
        self._ended |= {hold.kind: self._now() for hold in ended}
        self.stores.ended(hold.kind for hold in ended)
        log_end(ended)

    def _remember(self) -> None:
        """Write the refusals for the next start, so that not every start makes a prompt fail with the same one.

        The events of all holds that have begun or ended are written in the same transaction.
        """
        self.announcements.note(self._holds.all())
        if not self._knows_holds:
            self.announcements.unwritable()
            return
        events = self.announcements.to_write()
        refusals = [hold for hold in self._holds.all() if hold.kind in _ACCOUNT and hold.kind not in self._holds.shared]
        try:
            self._control.refuse({hold.kind: hold.reason.message for hold in refusals}, events)
            self.announcements.written(events)
        except SpoolError:  # disk or database has a hold of its own
            self.announcements.unwritable()
