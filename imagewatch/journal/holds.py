"""Why nothing is sent at the moment, and until when.

A *hold* stops the whole queue for a reason that every request would hit: a rejected key, no credits, an endpoint or a
database that cannot be reached, a full disk. While it lasts the prompts stay in the inbox. When its time is over, one
job is sent as a probe. If the probe is refused for the same reason, the hold continues with twice the interval.

What ends a hold (``protocol.reasons`` has all kinds, and to which of these sorts each belongs):

=============================  =========================================================================================
about the account, the         a response to a request that was begun after the refusal (``disproved``), a reload, or
endpoint or the network        ``imagewatch release``. Those about the account and the endpoint's URL also end when the
                               key file has changed (``Admission.check_key``). If the endpoint says how long to wait,
                               the probe is sent then, after six hours at the latest
``busy``, ``rate`` (brief)     their time, without a probe; a job that waits for them may stay claimed. The time that
                               the endpoint names counts up to an hour (``job.rules.retry_delay``), after a 503 30 s
``disk``                       a test file that can be written
``database``                   a test row that can be written; the local disk is tested separately
``manual``, ``burst``          ``imagewatch release``; ``burst`` also ends with a reload
those of a shared account      a response to its probe, or ``imagewatch release --account`` (``journal.account``). A
                               reload, a changed key and a release on one host only let the next probe be sent
=============================  =========================================================================================

A cap holds only prompts that do not fit below it: one hold for each provider of which some wait. A budget holds only
prompts of its folder: one hold for each folder. They stop nothing else, are not probed, and end when none of these
prompts has to wait any more (``set_caps``).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.protocol.reasons import STORES, Others, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST_SECONDS = 15.0
GRACE_SECONDS = 60.0
LONGEST_SECONDS = 900.0
LONGEST_ASKED_SECONDS = 6 * 3600.0
"""However long an endpoint asks us to wait: a probe is free, and a wrong clock must not stop us for years."""


@dataclass
class Hold:
    """One reason to wait.

    Attributes:
        reason: Why.
        began: Monotonic time of the first refusal, seconds.
        since: Monotonic time of the last refusal, seconds.
        until: Monotonic time of the next probe, seconds; infinite if only a person ends it.
        interval: Seconds between the last two probes.
        provider: The provider whose prompts it concerns; empty: those of each.
        folder: The first-level folder whose prompts it concerns; empty: those of each.
    """

    reason: Reason
    began: float
    since: float
    until: float
    interval: float
    provider: str = ""
    folder: str = ""

    @property
    def kind(self) -> str:
        """The kind of its reason: a key of ``HOLDS``."""
        return self.reason.kind

    @property
    def brief(self) -> bool:
        """Whether it ends automatically and soon: the endpoint is busy, or we are to be slow."""
        return self.reason.row.others in {Others.PAUSE, Others.SLOW}

    @property
    def is_local(self) -> bool:
        """Whether no response ends it. A change of the configuration does not end it either, except for ``burst``."""
        return self.reason.row.others in {Others.DISK, Others.PERSON}


class Holds:
    """All reasons to wait. Workers call ``may_report``, ``not_reported`` and, through ``Admission``, ``waiting``.

    Args:
        first_seconds: How long a hold lasts before its first probe, if its reason does not say.
        grace_seconds: How long after its deadline a probe may be without a result before another daemon of a shared
            account sends one.

    Attributes:
        first_seconds: As given.
        grace_seconds: As given.
        shared: The kinds of hold that concern all daemons of a shared account: only ``set_shared`` changes them.
    """

    def __init__(self, first_seconds: float = FIRST_SECONDS, grace_seconds: float = GRACE_SECONDS) -> None:
        self._first_seconds = self.first_seconds = first_seconds
        self.grace_seconds = grace_seconds
        self.shared: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._reported: set[str] = set()
        self._holds: dict[str, Hold] = {}
        self._caps: dict[tuple[str, str], Hold] = {}

    def may_report(self, kind: str) -> bool:
        """Return whether this job may report a refusal in ``errors``: the first of its kind may."""
        with self._lock:
            first = kind not in self._reported
            self._reported.add(kind)
            return first

    def not_reported(self, kind: str) -> None:
        """Let the next job report a refusal of this kind: the first one could not write its error file."""
        with self._lock:
            self._reported.discard(kind)

    def add(self, reason: Reason, now: float) -> Hold:
        """Begin or prolong a hold.

        Args:
            reason: Why; infinite seconds: until a person ends it.
            now: Monotonic time, seconds.
        """
        kind, seconds = reason.kind, reason.seconds
        if seconds is not None and seconds <= 0 and reason.row.others is not Others.PAUSE:
            seconds = None  # not believed where a person has to change something: it would be no hold
        known = self._holds.get(kind)
        if known is not None and now < known.until and seconds is None:
            return known  # several requests were refused at the same time: one hold
        own = min(known.interval * 2, LONGEST_SECONDS) if known else self._first_seconds
        asked = own if seconds is None else seconds
        interval = asked if math.isinf(asked) else min(max(asked, 0.0), LONGEST_ASKED_SECONDS)
        began, until = (known.began, known.until) if known else (now, 0.0)
        hold = Hold(reason, began, now, max(now + interval, until), interval)
        with self._lock:
            self._holds[kind] = hold
        return hold

    def resume(self, reason: Reason, now: float) -> None:
        """Resume a hold of an earlier process: one request may be sent immediately, as a probe.

        Args:
            reason: Why.
            now: Monotonic time, seconds.
        """
        self.may_report(reason.kind)  # it was reported
        with self._lock:
            self._holds[reason.kind] = Hold(reason, now, now, now, self._first_seconds / 2)

    def set_caps(self, refused: Mapping[tuple[str, str], Reason], now: float) -> tuple[list[Hold], list[Hold]]:
        """Note at which caps prompts wait.

        Args:
            refused: Why, and for how many seconds, by provider and folder.
            now: Monotonic time, seconds.

        Returns:
            The holds that have begun, and those that have ended.
        """
        before = self._caps
        self._caps = {
            whose: Hold(reason, known.began if known else now, now, now + seconds, seconds, *whose)
            for whose, reason in refused.items()
            for known, seconds in ((before.get(whose), reason.seconds or 0.0),)
        }
        return (
            [hold for whose, hold in self._caps.items() if whose not in before],
            [hold for whose, hold in before.items() if whose not in self._caps],
        )

    def set_shared(self, found: Mapping[str, Hold]) -> tuple[list[Hold], list[Hold]]:
        """Take the holds of a shared account as they are now.

        Args:
            found: The holds by kind.

        Returns:
            The holds that have begun, and those that have ended.
        """
        begun = [hold for kind, hold in found.items() if kind not in self._holds]
        ended = [hold for kind, hold in self._holds.items() if kind in self.shared and kind not in found]
        with self._lock:
            for hold in ended:
                del self._holds[hold.kind]
            self._holds |= found
        return begun, ended

    def clear(self, kind: str | None = None) -> list[Hold]:
        """End a hold, or all except caps; return what was ended."""
        return self._end([hold for hold in self._own() if kind in {None, hold.kind}])

    def clear_outer(self) -> list[Hold]:
        """End every hold about the account, the network or a limit; return what was ended."""
        return self._end([hold for hold in self._own() if not hold.is_local])

    def disproved(self, began: float) -> list[Hold]:
        """End every hold that a response disproves; return what was ended.

        Only a request that began after the refusal proves anything: others may have been in flight already when
        the credits ran out.

        Args:
            began: Monotonic time at which the request was begun, seconds.
        """
        return self._end([hold for hold in self._own() if hold.since < began and not hold.is_local])

    def _own(self) -> list[Hold]:
        """Return the holds that this daemon ends itself."""
        return [hold for hold in self._holds.values() if hold.kind not in self.shared]

    def _end(self, ended: list[Hold]) -> list[Hold]:
        with self._lock:
            for hold in ended:
                del self._holds[hold.kind]
                self._reported.discard(hold.kind)
        return ended

    def all(self) -> list[Hold]:
        """Return all holds, the oldest first."""
        return [*self._holds.values(), *self._caps.values()]

    def has(self, kind: str) -> bool:
        """Return whether there is a hold of this kind."""
        return kind in self._holds

    def waits(self, kind: str, now: float) -> bool:
        """Return whether a hold of this kind forbids any request now."""
        hold = self._holds.get(kind)
        return hold is not None and now < hold.until

    def waiting(self, now: float, *, was_admitted: bool = False) -> Hold | None:
        """Return the hold that forbids any request now, or None.

        Args:
            now: Monotonic time, seconds.
            was_admitted: Whether the request was admitted before: our own limits do not count then, and what concerns a
                disk or the database forbids it until a test write succeeds, however long that takes.
        """
        with self._lock:  # workers call this, too
            holds = [
                hold for hold in self._holds.values() if now < hold.until or (was_admitted and hold.kind in STORES)
            ]
        if was_admitted:
            holds = [hold for hold in holds if not hold.reason.row.is_own]
        return max(holds, key=_until, default=None)

    def probing(self) -> bool:
        """Return whether only one request at a time may be sent, as a probe."""
        return any(not hold.brief for hold in self._holds.values())

    def first(self) -> Hold | None:
        """Return the hold of every request that lasts longest, brief ones aside, or None."""
        return max((hold for hold in self._holds.values() if not hold.brief), key=_until, default=None)

    def first_cap(self) -> Hold | None:
        """Return the cap that ends first of those at which prompts wait, or None."""
        return min(self._caps.values(), key=_until, default=None)


def _until(hold: Hold) -> float:
    return hold.until
