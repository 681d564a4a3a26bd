"""Which holds are to be notified: their begin and their end, each once, also over a restart.

The journal has the holds that were reported and whose end was not. They are compared with the holds that there are. So
a daemon that is killed reports the end of a hold after its next start, and a hold that a restart finds again is not
reported twice. ``busy`` and ``rate`` are never reported.

Belongs to the main thread.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from imagewatch.system.errors import SpoolError
from imagewatch.system.masking import known
from imagewatch.system.text import iso, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.journal.events import Event, Events
    from imagewatch.journal.holds import Hold

_GRACE_SECONDS = 60.0
"""How long after the start a hold of an earlier process counts as one that may be found again."""
_RETRY_SECONDS = 5.0


class Announcements:
    """Finds out which holds are to be notified.

    Args:
        events: The events.
        ends: Returns when a hold ends, as text; None if only a person ends it.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(
        self,
        events: Events,
        ends: Callable[[Hold], str | None],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._events = events
        self._ends = ends
        self._clock = clock
        self._now = monotonic
        self._grace_ends = monotonic() + _GRACE_SECONDS
        self._known: dict[str, float] = {}
        self._own: set[str] = set()
        self._is_read = False
        self._due = -math.inf
        self.on_written: Callable[[], object] = lambda: None

    def configure(self) -> None:
        """Compare again soon: there may be a receiver now, and there was none before."""
        self._is_read, self._due = False, -math.inf

    def accepted(self) -> None:
        """Let another ledger know which holds were reported: else their ends would not be."""
        if self._events.is_on:
            for subject, since in self._known.items():
                self._events.stage_reported(subject, since)
        self.configure()

    @property
    def due(self) -> float:
        """Monotonic time at which there is something to do though no hold has begun or ended; maybe infinite."""
        return self._due if self._events.is_on else math.inf

    def is_due(self) -> bool:
        """Return whether there is something to do though no hold has begun or ended."""
        return self._now() >= self.due

    def note(self, holds: Iterable[Hold]) -> None:
        """Keep an event for each hold that has begun or ended since the last time; in memory until it is written."""
        if not self._events.is_on:
            return
        self._read()
        there = {_subject(hold): hold for hold in holds if not hold.brief}
        is_settled = self._now() >= self._grace_ends
        for subject, hold in there.items():
            if subject not in self._known:
                self._known[subject] = self._clock() - (self._now() - hold.began)
                self._events.stage("held", subject, self._page(hold, self._known[subject]))
            self._own.add(subject)
        for subject in [one for one in self._known if one not in there and (is_settled or one in self._own)]:
            since = self._known.pop(subject)
            self._own.discard(subject)
            page = {**_named(subject), "since": iso(since), "ended_at": iso(self._clock())}
            self._events.stage("released", subject, page)
        self._due = math.inf if is_settled else self._grace_ends
        if not self._is_read:
            self._due = self._now() + _RETRY_SECONDS

    def _read(self) -> None:
        if self._is_read:
            return
        with contextlib.suppress(SpoolError):
            self._known = self._events.announced() | self._known
            self._is_read = True

    def to_write(self) -> list[Event]:
        """Return the events that are only in memory."""
        return self._events.staged() if self._events.is_on else []

    def written(self, events: list[Event]) -> None:
        """Note that events are in the journal."""
        if events:
            self._events.written(events)
            self.on_written()

    def unwritable(self) -> None:
        """Note that events could not be written: they are delivered from memory, and written later."""
        if self.to_write():
            self._events.unwritable()
            self._due = min(self._due, self._now() + _RETRY_SECONDS)
            self.on_written()

    def _page(self, hold: Hold, since: float) -> dict[str, object]:
        """Return what is known of a hold; the same names as in ``status.json``."""
        return {
            "kind": hold.kind,
            "provider": hold.provider or None,
            "folder": printable(hold.folder) or None,
            "reason": printable(known.text(hold.reason.message)),
            "since": iso(since),
            "next_try_at": self._ends(hold),
            "next": hold.reason.next,
        }


def _subject(hold: Hold) -> str:
    return f"hold:{hold.kind}:{hold.provider}:{hold.folder}"


def _named(subject: str) -> dict[str, object]:
    _, kind, provider, folder = subject.split(":", 3)
    return {"kind": kind, "provider": provider or None, "folder": printable(folder) or None}
