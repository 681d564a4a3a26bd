"""Why nothing is sent at the moment, and until when.

A *hold* stops the whole queue for a reason that every request would meet: a rejected key, no credits, an endpoint
that cannot be reached, a full disk. While it lasts the prompts stay in the inbox. When its time is over one job is
sent as a probe; if that meets the same, the hold goes on for twice as long.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

FIRST_SECONDS = 15.0
LONGEST_SECONDS = 900.0


@dataclass
class Hold:
    """One reason to wait.

    Attributes:
        kind: ``key``, ``credits``, ``quota``, ``address``, ``unreachable``, ``disk`` or ``busy``.
        message: What was said.
        until: Monotonic time of the next probe, seconds.
        interval: Seconds between the last two probes.
    """

    kind: str
    message: str
    until: float
    interval: float

    @property
    def brief(self) -> bool:
        """Whether it ends by itself: the endpoint is only busy."""
        return self.kind == "busy"


class Holds:
    """All reasons to wait. ``blame`` is called by workers, the rest by the main thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blamed: set[str] = set()
        self._holds: dict[str, Hold] = {}

    def blame(self, kind: str) -> bool:
        """Tell whether this job may show a refusal in ``errors``: the first of its kind may."""
        with self._lock:
            first = kind not in self._blamed
            self._blamed.add(kind)
            return first

    def add(self, kind: str, message: str, now: float, seconds: float | None = None) -> Hold:
        """Begin or prolong a hold.

        Args:
            kind: What it is about.
            message: What was said.
            now: Monotonic time, seconds.
            seconds: How long to wait, if somebody said so.
        """
        known = self._holds.get(kind)
        if known is not None and now < known.until and seconds is None:
            return known  # several requests met the same at once: one hold
        own = min(known.interval * 2, LONGEST_SECONDS) if known else FIRST_SECONDS
        interval = seconds if seconds is not None else own
        hold = Hold(kind, message, max(now + interval, known.until if known else 0.0), interval)
        self._holds[kind] = hold
        return hold

    def clear(self, kind: str | None = None) -> list[Hold]:
        """End a hold, or all of them; return what was ended."""
        with self._lock:
            ended = [hold for hold in self._holds.values() if kind in {None, hold.kind}]
            for hold in ended:
                del self._holds[hold.kind]
                self._blamed.discard(hold.kind)
            if kind is None:
                self._blamed.clear()
        return ended

    def has(self, kind: str) -> bool:
        """Tell whether there is a hold of this kind."""
        return kind in self._holds

    def waiting(self, now: float) -> Hold | None:
        """Return the hold that forbids any request now, or None."""
        return max((hold for hold in self._holds.values() if now < hold.until), key=_until, default=None)

    def probing(self) -> bool:
        """Tell whether only one request at a time may go out, to see whether a hold is over."""
        return any(not hold.brief for hold in self._holds.values())

    def first(self) -> Hold | None:
        """Return the hold that lasts longest, brief ones aside, or None."""
        return max((hold for hold in self._holds.values() if not hold.brief), key=_until, default=None)


def _until(hold: Hold) -> float:
    return hold.until
