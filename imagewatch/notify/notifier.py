"""The thread that delivers events, one after the other.

It is the only one that waits for a receiver: jobs and the main loop only write events and wake it. A receiver that
fails is left alone for a while; so is the event, each time for twice as long, and other events are tried meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Protocol

import structlog

from imagewatch.notify import payload
from imagewatch.notify.command import Command
from imagewatch.system.errors import ConfigError, SpoolError
from imagewatch.system.text import iso

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.config.schema import Notify
    from imagewatch.journal.events import Event, Events

_LONGEST_PAUSE = 60.0
_LONGEST_WAIT = 60.0
_LONGEST_DELIVERY = 3600.0
"""More than any receiver takes: each has a limit of its own."""
_JOURNAL_SECONDS = 5.0
"""How long the journal is not asked again after it failed."""
_LATER = "no action needed unless it lasts; then run: imagewatch check"
_GIVEN_UP = "the event was given up; to test the receivers, run: imagewatch check"
_log = structlog.get_logger()


class Receiver(Protocol):
    """Who is notified.

    Attributes:
        name: ``command`` or ``url``.
    """

    @property
    def name(self) -> str:
        """Return the name."""

    def stop(self) -> None:
        """End what would outlive the daemon."""

    def deliver(self, body: bytes, seconds: float) -> str:
        """Deliver an event once, within a time; return why it failed, or an empty string."""


class Notifier:
    """Delivers events. Its thread runs only if there is a receiver.

    Args:
        events: The events.
        environ: The daemon's environment.
        on_change: Called by the thread when more or less events wait.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(
        self,
        events: Events,
        environ: Mapping[str, str],
        on_change: Callable[[], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._events = events
        self._environ = environ
        self._on_change = on_change
        self._now = monotonic
        self._receivers: tuple[Receiver, ...] = ()
        self._learn: Callable[[], object] | None = None
        self._unmarked: list[Callable[[], object]] = []
        self._pauses: dict[str, tuple[int, float]] = {}
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._ends: float | None = None
        self._is_new = True

    def configure(self, notify: Notify, read_key: Callable[[], object]) -> None:
        """Take receivers.

        Args:
            notify: The receivers.
            read_key: Reads the API key, so that it is masked also before this process has sent a request.
        """
        receivers = receivers_of(notify, self._environ)
        self._events.configure([one.name for one in receivers])
        self._learn, self._receivers, self._pauses, self._is_new = read_key, receivers, {}, True
        if receivers and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
            self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Wake the thread: there may be an event to deliver."""
        self._woken.set()

    def close(self, seconds: float) -> None:
        """Deliver what is due, within a time, and end the thread. What is left is delivered after the next start."""
        if self._thread is None:
            return
        self._ends = self._now() + seconds
        self.wake()
        self._thread.join(seconds + 1.0)
        if self._thread.is_alive():
            for receiver in self._receivers:
                receiver.stop()
            self._thread.join(1.0)
        self._thread = None

    # The thread

    def _run(self) -> None:
        while True:
            self._woken.clear()
            wait = _JOURNAL_SECONDS
            try:
                wait = self._work()
            except SpoolError:
                pass  # the queue is on hold for it
            except Exception:  # noqa: BLE001  the next event may not hit it
                _log.exception("internal_error", next="report this as a bug")
                wait = _LONGEST_WAIT
            if self._ends is not None:
                return
            self._woken.wait(wait)

    def _work(self) -> float:
        """Deliver what is due; return in how many seconds more may be due."""
        if self._is_new and self._receivers:
            self._is_new = False
            try:
                self._events.take_over()
            except SpoolError:
                self._is_new = True  # it is tried again; what is only in memory can be delivered
        has_changed = False
        try:
            while self._deliver_next():
                has_changed = True
        finally:
            if has_changed:
                self._on_change()
        waits = [_LONGEST_WAIT]
        for receiver in self._receivers:
            until = self._paused_until(receiver) - self._now()
            due = self._events.next_due(receiver.name)
            waits += [max(due, until)] if due is not None else []
            waits += [until] if until > 0 else []
        return max(min(waits), 0.01)

    def _deliver_next(self) -> bool:
        """Deliver an event to a receiver that is not left alone; return whether there was one."""
        free = [one for one in self._receivers if self._paused_until(one) <= self._now()]
        if self._ends is not None and self._now() >= self._ends:
            return False
        for receiver in free:
            if (event := self._events.due_unwritten(receiver.name)) is not None:
                self._deliver(receiver, event)
                return True
        if free:
            self._mark()
        for receiver in free:
            if (event := self._events.due(receiver.name)) is not None:
                self._deliver(receiver, event)
                return True
        return False

    def _paused_until(self, receiver: Receiver) -> float:
        return self._pauses.get(receiver.name, (0, 0.0))[1]

    def _deliver(self, receiver: Receiver, event: Event) -> None:
        if self._learn is not None:
            learn, self._learn = self._learn, None
            with contextlib.suppress(ConfigError):
                learn()
        page = payload.page(event)
        seconds = _LONGEST_DELIVERY if self._ends is None else max(self._ends - self._now(), 0.1)
        reason = receiver.deliver(payload.body(page), seconds)
        if reason and self._ends is not None and self._now() >= self._ends:
            return  # it had too little time
        times, _ = self._pauses.pop(receiver.name, (0, 0.0))
        if reason:
            self._pauses[receiver.name] = (times + 1, self._now() + min(2.0**times, _LONGEST_PAUSE))
        self._note(lambda: self._report(receiver, event, payload.source(page), reason))

    def _report(self, receiver: Receiver, event: Event, source: str, reason: str) -> None:
        """Write what became of an event, and log it."""
        fields: dict[str, object] = {"notification": event.name, "event_id": event.id, "target": receiver.name}
        names = {"job": event.job, "source": source} if event.job else {}
        if not reason:
            self._events.delivered(event)
            _log.info("notified", **names, **fields, tries=event.tries + 1)
            return
        known = self._events.failed(event, reason)
        more = {"reason": reason, "tries": known.tries, "next_try_at": None if known.is_over else iso(known.next_at)}
        given = {name: value for name, value in more.items() if value is not None}
        given["next"] = _GIVEN_UP if known.is_over else _LATER
        (_log.error if known.is_over else _log.warning)("notify_failed", **names, **fields, **given)

    def _note(self, act: Callable[[], object]) -> None:
        """Write what became of an event, as soon as that is possible; until then no other one of the journal is tried.

        Else an event would be delivered again and again while the journal is read-only.
        """
        try:
            act()
        except SpoolError:
            self._unmarked.append(act)

    def _mark(self) -> None:
        while self._unmarked:
            self._unmarked[0]()
            del self._unmarked[0]


def receivers_of(notify: Notify, environ: Mapping[str, str]) -> tuple[Receiver, ...]:
    """Return the receivers that are set."""
    found: list[Receiver] = []
    if notify.command:
        found.append(Command(notify.command, environ))
    if notify.url is not None:
        from imagewatch.notify.post import Post  # noqa: PLC0415  loads the HTTP library, which --help does not need

        found.append(Post(notify, environ))
    return tuple(found)
