"""Whether another request may go out now: every reason to wait in one place.

The gate belongs to the main thread; workers only ask which job reports an account-level refusal
(``Holds.may_report``), or say that it could not (``Holds.not_reported``). Each hold is logged once when it begins, with
the next step, and once when it ends.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import structlog

from imagewatch.daemon.burst import BurstGuard
from imagewatch.protocol.reasons import KINDS, Others, Reason
from imagewatch.system.disk import FULL
from imagewatch.system.errors import SpoolError, Withdrawn
from imagewatch.system.text import utc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from imagewatch.config.load import Limits
    from imagewatch.job.spool import Spool
    from imagewatch.journal.control import Control
    from imagewatch.journal.holds import Hold, Holds
    from imagewatch.journal.ledger import Ledger

_KEY_SECONDS = 2.0
"""How often the file of the key is looked at while the account refuses us."""
_MOST_BROKEN = 2
"""How many prompts in a row may have their upload cut off before it is taken for the network's trouble."""
_MOST_CAUSES = 10
"""How many causes of one hold are told at most; status has the newest one."""
_NONE = ("", 0, "")
_ACCOUNT = [kind.name for kind in KINDS.values() if kind.is_account]
_log = structlog.get_logger()


class OnChange(Protocol):
    """What is told of changes."""

    def __call__(self, *, at_once: bool) -> None:
        """Take note of a change."""


class Gate:
    """Lets requests through, or not.

    Args:
        spool: The folders.
        ledger: Where everything that is sent is recorded.
        control: What commands asked for.
        holds: Reasons to wait.
        on_change: Called when a hold begins, changes or ends, and whether that is rare and important.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(
        self,
        spool: Spool,
        ledger: Ledger,
        control: Control,
        holds: Holds,
        on_change: OnChange,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._on_change = on_change
        self._spool = spool
        self._ledger = ledger
        self._control = control
        self._holds = holds
        self._clock = clock
        self._now = monotonic
        self._key_stamp: Callable[[], object] = lambda: None
        self._stamp: object = None
        self._stamp_at = 0.0
        self._reason: str | None = None
        self._anew = -math.inf
        self._ended: dict[str, float] = {}
        self.burst = BurstGuard(monotonic)
        self._braking: dict[str, SpoolError] = {}
        self._causes: set[tuple[str, int, str]] = set()  # those of the hold for our disk that were told
        self._is_proved = False  # whether the ledger was written once: the first prompt is not to find out for it
        self.may_report, self.not_reported = holds.may_report, holds.not_reported
        self.disk_failed = False
        self._broken: set[str] = set()
        self._first_bytes = threading.Lock()
        self._is_draining = False

    def configure(self, limits: Limits, settle_seconds: float, key_stamp: Callable[[], object]) -> None:
        """Take a configuration; whatever is about the account, the network or a limit is to be tried anew.

        Args:
            limits: Concurrency, burst, free space.
            settle_seconds: Prompts that come within this time come at once.
            key_stamp: Returns a value that differs when the key's file was changed.
        """
        self._anew = self._now()
        self._limits = limits
        self.burst.configure(limits.burst, settle_seconds)
        self._key_stamp = key_stamp
        self._stamp = key_stamp()
        self._end([*self._holds.clear_outer(), *self._holds.clear("burst")])

    # Asked by the main loop

    def open(self, in_flight: int) -> bool:
        """Tell whether another job may go to a worker."""
        if self._braking or self._holds.waiting(self._now()) is not None:
            return False
        return in_flight < (1 if self._holds.probing() else self._limits.concurrency)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Let the first bytes of a request leave during the block; used by workers, right before those leave.

        Raises:
            Withdrawn: None may leave: something has come up since the prompt was claimed.
        """
        with self._first_bytes:
            if self._is_draining:
                raise Withdrawn("the daemon was told to stop before the request was sent")
            for error in list(self._braking.values()):
                raise Withdrawn(f"the queue was held (disk) before the request was sent: {error}")
            hold = self._holds.waiting(self._now(), was_admitted=True)
            if hold is not None:
                raise Withdrawn(f"the queue was held ({hold.kind}) before the request was sent: {hold.reason.message}")
            yield

    def drain(self) -> None:
        """Let no request leave any more; called in the main thread, also by a signal."""
        self._is_draining = True

    def wait_for_first_bytes(self) -> None:
        """Return when every request that was let through has begun to leave: from now on none does any more."""
        with self._first_bytes:
            pass

    def deliverable(self, in_flight: int) -> bool:
        """Tell whether a job that needs no request any more may go to a worker: only our own disk can forbid that."""
        return in_flight < self._limits.concurrency and not self._holds.waits("disk", self._now())

    def room(self) -> bool:
        """Tell whether our disks can take another paid answer; if not, hold."""
        for error in self._braking.values():
            self.failed(error)
            return False
        if not self._works(probe=self._holds.has("disk")):
            return False
        self._end(self._holds.clear("disk"))
        return True

    def look_at_disk(self) -> None:
        """Make the next write probe if it is time, also where nothing waits: a status must not tell of what is over."""
        if self._holds.has("disk") and not self._holds.waits("disk", self._now()) and not self._braking:
            self.room()

    def failed_alone(self, job: str, error: SpoolError) -> bool:
        """Tell whether our disks work all the same after a job could not go on; if not, hold.

        Then it is something about this job's own files, which somebody else may have put there; the others go on.
        What all jobs share (ledger, state folder) is never the fault of one: the hold lasts until this job goes on.
        """
        if error.path == self._spool.state or error.path.startswith(self._spool.state + "/"):
            try:
                self._spool.require_folders()
            except SpoolError as cause:  # another state folder has its name: nothing in that one is ours
                error = cause
            self.brake(job, error)
            return False
        if error.code in FULL:  # a small probe may succeed where pictures do not
            self.failed(error)
            return False
        return self._works(probe=True)

    def brake(self, job: str, error: SpoolError) -> None:
        """Hold until a job goes on, also if a write probe succeeds meanwhile."""
        if job not in self._braking and error.code:  # others were told of already
            _log.error("stuck", job=job, reason=str(error), next=error.hint, retried="automatically")
        self._braking[job] = error
        self.failed(error)

    def got_on(self, job: str) -> None:
        """Take note that a job goes on, if it did not."""
        self._braking.pop(job, None)

    def _works(self, *, probe: bool) -> bool:
        """Tell whether there is room, and whether a file can be written in every folder if that is asked; else hold."""
        try:
            if probe:
                self._spool.probe()
            self._spool.require_room(self._limits.min_free_bytes)
            self._ledger.require(prove=probe or not self._is_proved)
            self._is_proved = True
        except SpoolError as error:
            self.failed(error)
            return False
        return True

    def count(self, changed: Mapping[str, float], is_finished: Callable[[str], bool]) -> None:
        """Hold until a person releases it if too many prompts came at the same time.

        Args:
            changed: As for ``BurstGuard.count``.
            is_finished: As for ``BurstGuard.count``.
        """
        most = self._limits.burst
        if most and not self._holds.has("burst") and (new := self.burst.count(changed, is_finished)) > most:
            self._begin(Reason("burst", f"{new} prompts at once are more than limits.burst ({most})"))

    def look(self, newest: float = 0.0) -> None:
        """Look at what commands have asked for, and at the file of the key.

        Args:
            newest: Newest ctime of a prompt in the inbox, seconds since the epoch.
        """
        try:
            self._obey(newest)
        except SpoolError as error:  # what was asked for stays, and is looked at again
            self.failed(error)
        self.look_at_key()

    def _obey(self, newest: float) -> None:
        if self._control.release_pending():
            self._anew = self._now()
            passed = max(self._clock(), newest)
            self.burst.let_pass(passed)
            self._braking.clear()  # a job that still fails holds the queue again
            self._control.let_pass(passed)
            self._control.released()
            self._end(self._holds.clear())
        reason, before = self._control.held(), self._reason
        self._reason = reason
        if reason is None:
            self._end(self._holds.clear("manual"))
        elif reason != before or not self._holds.has("manual"):
            self._begin(Reason("manual", reason or "held manually"))

    def look_at_key(self) -> None:
        """Look at the file of the key, if it is time."""
        if not self.watches_key() or self._now() < self._stamp_at:
            return
        self._stamp_at = self._now() + _KEY_SECONDS
        stamp, self._stamp = self._stamp, self._key_stamp()
        if stamp != self._stamp:
            _log.info("key_changed")
            for kind in _ACCOUNT:
                self._end(self._holds.clear(kind))

    def watches_key(self) -> bool:
        """Tell whether there is a hold that a changed key would end."""
        return any(self._holds.has(kind) for kind in _ACCOUNT)

    def start(self) -> None:
        """Take up what was asked for while nobody was running."""
        self._control.prepare()
        self._control.tidy()
        self.burst.let_pass(self._control.passed())
        for kind, message in self._control.refused().items():
            if kind in _ACCOUNT:
                _log.info("hold_resumed", kind=kind, reason=message)
                self._holds.resume(Reason(kind, message), self._now())
        self.look()

    def patience(self) -> float:
        """Return after how many seconds a hold is to be looked at again; infinite without one."""
        now = self._now()
        waiting = self._holds.waiting(now)
        seconds = waiting.until - now if waiting else math.inf
        return min(seconds, self._stamp_at - now) if self.watches_key() else seconds

    # Told by the main loop

    def met(self, reason: Reason, began: float) -> None:
        """Take note of what every other request would meet too, unless that is over already.

        Args:
            reason: What it met.
            began: Monotonic time at which it was begun, seconds; a key, say, may have been changed since.
        """
        others = reason.row.others
        if reason.error is not None:
            self.failed(reason.error)
        elif others in {Others.CONTINUE, Others.FITTING}:
            pass
        elif others is Others.PAUSE or began >= max(self._anew, self._ended.get(reason.kind, self._anew)):
            self._begin(reason)

    def broke(self, job: str, reason: Reason, began: float) -> None:
        """Take note that the upload of a job was cut off. One prompt's trouble is not the network's; several's may be.

        Args:
            job: Whose.
            reason: How.
            began: As for ``met``.
        """
        self._broken.add(job)
        if len(self._broken) > _MOST_BROKEN:
            self.met(Reason("unreachable", reason.message), began)

    def answered(self, began: float) -> None:
        """Take note that a request begun at this monotonic time was answered."""
        self._broken.clear()
        self._end(self._holds.disproved(began))

    def failed(self, error: SpoolError) -> None:
        """Take note that our own disk failed: nothing is sent until a write probe succeeds."""
        self.disk_failed = True
        hint = "" if error.code in FULL else error.hint  # wherever a full disk is noticed
        self._begin(Reason("disk", str(error), error=error), (self._spool.top(error.path), error.code, hint))

    def set_caps(self, refused: Mapping[str, Reason]) -> None:
        """Take note of the providers of which prompts wait at a cap, and why."""
        now = self._clock()
        told = {provider: replace(reason, seconds=max(reason.ends - now, 0.0)) for provider, reason in refused.items()}
        begun, ended = self._holds.set_caps(told, self._now())
        if begun or ended:
            self._on_change(at_once=True)
        for hold in begun:
            say = {
                "seconds": round(hold.until - self._now(), 1),
                "next_try_at": self.ends(hold),
                "next": hold.reason.next,
            }
            _log.warning("held", kind=hold.kind, provider=hold.provider, reason=hold.reason.message, **say)
        for hold in ended:
            _log.info("released", kind=hold.kind, provider=hold.provider)

    def _begin(self, reason: Reason, cause: tuple[str, int, str] = _NONE) -> None:
        kind = reason.kind
        if reason.seconds is None:
            reason = replace(reason, seconds=reason.row.seconds)
        if not self.watches_key():
            self._stamp, self._stamp_at = self._key_stamp(), self._now() + _KEY_SECONDS
        now = self._now()
        known = self._is_told(cause) if kind == "disk" else kind != "manual" and self._holds.waits(kind, now)
        hold = self._holds.add(reason, now)
        self._on_change(at_once=not known and not hold.brief)
        if known:
            return
        self.wait_for_first_bytes()
        self._remember()
        say: dict[str, object] = {"kind": kind, "reason": hold.reason.message, "next": hold.reason.next}
        if math.isfinite(hold.until):
            say |= {"seconds": round(hold.until - now, 1), "next_try_at": self.ends(hold)}
        (_log.error if kind == "disk" else _log.warning)("held", **say)

    def _is_told(self, cause: tuple[str, int, str]) -> bool:
        """Tell whether the hold for our disk and this cause of it were told; the cause is from now on."""
        if not self._holds.has("disk"):
            self._causes.clear()
        elif cause in self._causes or len(self._causes) >= _MOST_CAUSES:
            return True
        self._causes.add(cause)
        return False

    def _end(self, ended: list[Hold]) -> None:
        if ended:
            self._on_change(at_once=not all(hold.brief for hold in ended))
            self._remember()
        for hold in ended:
            self._ended[hold.kind] = self._now()
            if not hold.brief:
                _log.info("released", kind=hold.kind)

    def _remember(self) -> None:
        """Write down what the next start has to know, lest each one shows another prompt the same refusal."""
        with contextlib.suppress(SpoolError):  # the disk has a hold of its own
            self._control.refuse(
                {hold.kind: hold.reason.message for hold in self._holds.all() if hold.kind in _ACCOUNT}
            )

    # Told to others

    def ends(self, hold: Hold) -> str | None:
        """Return when a hold is over or probed next, as a UTC time; None if only a person ends it."""
        if not math.isfinite(hold.until):
            return None
        return utc(self._clock() + hold.until - self._now()).isoformat().replace("+00:00", "Z")

    def holds(self) -> list[Hold]:
        """Return all holds."""
        return self._holds.all()

    def first(self) -> Hold | None:
        """Return the hold of every request that lasts longest, brief ones aside, or None."""
        return self._holds.first()

    def shown(self) -> Hold | None:
        """Return the hold to be named where there is room for one, or None."""
        return self._holds.first() or self._holds.first_cap()

    def waits(self) -> bool:
        """Tell whether a hold, brief ones aside, forbids any request now."""
        hold = self.first()
        return hold is not None and self._now() < hold.until
