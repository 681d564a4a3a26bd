"""Why nothing is sent at the moment, and until when.

A *hold* stops the whole queue for a reason that every request would meet: a rejected key, no credits, an endpoint
that cannot be reached, a full disk. While it lasts the prompts stay in the inbox. When its time is over one job is
sent as a probe; if that meets the same, the hold goes on for twice as long. A hold by hand or by the burst guard has
no time: only a person ends it.

A cap holds only prompts that do not fit below it: one hold for each provider of which some wait. It stops nothing else,
is not probed, and ends when none of them has to wait any more (``set_caps``).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

FIRST_SECONDS = 15.0
LONGEST_SECONDS = 900.0
LONGEST_ASKED_SECONDS = 6 * 3600.0
"""However long an endpoint wants us to wait: a probe is free, and a wrong clock must not stop us for years."""

NEXT = {
    "key": "give imagewatch a valid key: a changed key file is noticed by itself, a command is asked again at the next "
    "try or by: imagewatch release; a new LETTA_API_KEY or systemd credential needs a restart, a changed configuration "
    "a reload",
    "credits": "add credits to the account; imagewatch tries again by itself; to try now: imagewatch release",
    "quota": "wait for the quota to be renewed; it is tried again by itself",
    "endpoint": "correct base_url in the configuration, then reload",
    "unreachable": "check the network and base_url; it is tried again by itself",
    "disk": "look at the disk and the system log; it is tried again by itself",
    "cap": "wait until it ends, or raise the cap in the configuration and reload; prompts that fit are still sent",
    "burst": "look into the inbox; to make what is in it now: imagewatch release",
    "manual": "to continue: imagewatch release",
    "rate": "nothing: it goes on by itself",
    "busy": "nothing: it goes on by itself",
}
"""What a person can do about each kind of hold."""
_OURS = {"disk", "manual", "burst"}
"""Kinds about which no answer of the endpoint and no change of the configuration says anything."""


@dataclass
class Hold:
    """One reason to wait.

    Attributes:
        kind: One of ``NEXT``.
        message: What was said.
        began: Monotonic time of the first refusal, seconds.
        since: Monotonic time of the last refusal, seconds.
        until: Monotonic time of the next probe, seconds; infinite if only a person ends it.
        interval: Seconds between the last two probes.
        hint: What a person can do in this very case, if somebody knows better than ``NEXT``.
        provider: The provider whose prompts it concerns; empty: every request.
    """

    kind: str
    message: str
    began: float
    since: float
    until: float
    interval: float
    hint: str = ""
    provider: str = ""

    @property
    def next(self) -> str:
        """What a person can do."""
        return self.hint or NEXT[self.kind]

    @property
    def brief(self) -> bool:
        """Whether it ends by itself soon: the endpoint is busy, or we are to be slow."""
        return self.kind in {"busy", "rate"}


class Holds:
    """All reasons to wait. Workers call ``blame``, ``absolve`` and ``waiting``; the rest is the main thread's.

    Args:
        first_seconds: How long a hold lasts before its first probe, unless somebody says how long to wait.
    """

    def __init__(self, first_seconds: float = FIRST_SECONDS) -> None:
        self._first_seconds = first_seconds
        self._lock = threading.Lock()
        self._blamed: set[str] = set()
        self._holds: dict[str, Hold] = {}
        self._caps: dict[str, Hold] = {}

    def blame(self, kind: str) -> bool:
        """Tell whether this job may show a refusal in ``errors``: the first of its kind may."""
        with self._lock:
            first = kind not in self._blamed
            self._blamed.add(kind)
            return first

    def absolve(self, kind: str) -> None:
        """Let the next job show a refusal of this kind: the one that was to could not write it down."""
        with self._lock:
            self._blamed.discard(kind)

    def add(self, kind: str, message: str, now: float, seconds: float | None = None, hint: str = "") -> Hold:
        """Begin or prolong a hold.

        Args:
            kind: What it is about.
            message: What was said.
            now: Monotonic time, seconds.
            seconds: How long to wait, if somebody said so; infinite: until a person ends it.
            hint: What a person can do in this very case.
        """
        if seconds is not None and seconds <= 0 and kind != "busy":
            seconds = None  # "at once" is not believed where only somebody else can change things: it would be no hold
        known = self._holds.get(kind)
        if known is not None and now < known.until and seconds is None:
            return known  # several requests met the same at once: one hold
        own = min(known.interval * 2, LONGEST_SECONDS) if known else self._first_seconds
        said = own if seconds is None else seconds
        interval = said if math.isinf(said) else min(max(said, 0.0), LONGEST_ASKED_SECONDS)
        began, until = (known.began, known.until) if known else (now, 0.0)
        hold = Hold(kind, message, began, now, max(now + interval, until), interval, hint)
        with self._lock:
            self._holds[kind] = hold
        return hold

    def resume(self, kind: str, message: str, now: float) -> None:
        """Take up a hold of an earlier process: one request may go out at once, to see whether it is over.

        Args:
            kind: What it is about.
            message: What was said.
            now: Monotonic time, seconds.
        """
        self.blame(kind)  # it was shown
        with self._lock:
            self._holds[kind] = Hold(kind, message, now, now, now, self._first_seconds / 2)

    def set_caps(self, refused: Mapping[str, tuple[str, float]], now: float) -> tuple[list[Hold], list[Hold]]:
        """Note at which caps prompts wait.

        Args:
            refused: Why, and for how many seconds, by provider.
            now: Monotonic time, seconds.

        Returns:
            The holds that have begun, and those that have ended.
        """
        before = self._caps
        self._caps = {
            provider: Hold("cap", message, known.began if known else now, now, now + seconds, seconds, "", provider)
            for provider, (message, seconds) in refused.items()
            for known in (before.get(provider),)
        }
        return (
            [hold for provider, hold in self._caps.items() if provider not in before],
            [hold for provider, hold in before.items() if provider not in self._caps],
        )

    def clear(self, kind: str | None = None) -> list[Hold]:
        """End a hold, or all of them; return what was ended."""
        return self._end([hold for hold in self._holds.values() if kind in {None, hold.kind}])

    def clear_outer(self) -> list[Hold]:
        """End every hold that is not about us ourselves; return what was ended."""
        return self._end([hold for hold in self._holds.values() if hold.kind not in _OURS])

    def disproved(self, began: float) -> list[Hold]:
        """End every hold that an answer disproves; return what was ended.

        Only a request that began after the refusal proves anything: others may have been on their way already when
        the credits ran out. No answer says anything about our own disk, or about what a person wants.

        Args:
            began: Monotonic time at which the answered request was begun, seconds.
        """
        return self._end([hold for hold in self._holds.values() if hold.since < began and hold.kind not in _OURS])

    def _end(self, ended: list[Hold]) -> list[Hold]:
        with self._lock:
            for hold in ended:
                del self._holds[hold.kind]
                self._blamed.discard(hold.kind)
        return ended

    def all(self) -> list[Hold]:
        """Return all holds, the oldest first."""
        return [*self._holds.values(), *self._caps.values()]

    def has(self, kind: str) -> bool:
        """Tell whether there is a hold of this kind."""
        return kind in self._holds

    def waits(self, kind: str, now: float) -> bool:
        """Tell whether a hold of this kind forbids anything now."""
        hold = self._holds.get(kind)
        return hold is not None and now < hold.until

    def waiting(self, now: float, but: Collection[str] = ()) -> Hold | None:
        """Return the hold that forbids any request now, or None.

        Args:
            now: Monotonic time, seconds.
            but: Kinds that do not count.
        """
        with self._lock:  # a worker asks, too
            holds = [hold for hold in self._holds.values() if now < hold.until and hold.kind not in but]
        return max(holds, key=_until, default=None)

    def probing(self) -> bool:
        """Tell whether only one request at a time may go out, to see whether a hold is over."""
        return any(not hold.brief for hold in self._holds.values())

    def first(self) -> Hold | None:
        """Return the hold of every request that lasts longest, brief ones aside, or None."""
        return max((hold for hold in self._holds.values() if not hold.brief), key=_until, default=None)

    def first_cap(self) -> Hold | None:
        """Return the cap that ends first of those at which prompts wait, or None."""
        return min(self._caps.values(), key=_until, default=None)


def _until(hold: Hold) -> float:
    return hold.until
