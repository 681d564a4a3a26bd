"""Pure: whether too many prompts came at the same time."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_JUMP_SECONDS = 1.0
"""A clock that goes back by more was set."""
_AHEAD_SECONDS = 60.0
"""How far ahead of our clock that of a server may be, seconds."""
_LATEST_COUNT_SECONDS = 10.0
"""How long after it has settled a prompt is counted for the first time at the latest, seconds."""


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A prompt that was claimed.

    Attributes:
        at: Monotonic time at which it was claimed, seconds.
        changed: Newest ctime of its files, seconds since the epoch.
        is_dated: Whether that is when it came. If not, it counts as if it had come when it was claimed.
    """

    at: float
    changed: float
    is_dated: bool


class BurstGuard:
    """Counts the prompts that came at the same time.

    Args:
        monotonic: Monotonic clock, seconds.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(self, monotonic: Callable[[], float], clock: Callable[[], float]) -> None:
        self._now = monotonic
        self._clock = clock
        self._most = 0
        self._settle_seconds = 0.0
        self._passed = self._passed_at = 0.0
        self._claimed: list[_Claimed] = []
        self._returned: set[str] = set()
        self._released: dict[str, float] = {}
        # Of those in the inbox, and when they came: each is a question to the ledger.
        self._finished: dict[str, float] = {}

    def configure(self, most: int, settle_seconds: float) -> None:
        """Take a configuration.

        Args:
            most: How many prompts may come at the same time; 0: any number.
            settle_seconds: Prompts that come within this time come at the same time.
        """
        self._most = most
        self._settle_seconds = settle_seconds

    @property
    def passed(self) -> float:
        """Until which time nothing is counted, seconds since the epoch. An inbox on a server has that one's times."""
        return self._passed

    def let_pass(self, changed: Mapping[str, float]) -> None:
        """Count none of the prompts that are in the inbox.

        Args:
            changed: As for ``count``. Prompts whose time is far ahead are remembered by their names: with the newest
                time alone, nothing would be counted for a long while.
        """
        now = self._clock()
        self._passed, self._passed_at = max([now, *filter(self._may_be, changed.values())]), now
        self._released = {source: when for source, when in changed.items() if when > self._passed}
        self._returned.clear()
        self.forget()

    def resume(self, passed: float) -> None:
        """Continue with what ``passed`` was in an earlier process.

        A time that is far ahead counts for nothing: the clock was set back since, or is behind now.
        """
        self._passed, self._passed_at = passed if self._may_be(passed) else 0.0, self._clock()

    def _may_be(self, when: float) -> bool:
        """Return whether a time can be the present one of a server, seconds since the epoch."""
        return when <= self._clock() + _AHEAD_SECONDS

    def forget(self) -> None:
        """Ask again which prompts are finished: the ledger may be another one."""
        self._finished.clear()

    def count(self, changed: Mapping[str, float], is_finished: Callable[[str], bool]) -> int:
        """Return how many prompts came at the same time; 0 if they are too few to be counted.

        Prompts in the inbox count. Prompts that were claimed already (those that come by rename are claimed one by one)
        count if they came within ``settle_seconds`` of the newest in the inbox. The time of the claim does not matter:
        a prompt may have had to settle first, or to wait for a worker.

        Args:
            changed: Newest ctime of each prompt in the inbox, seconds since the epoch, by its path.
            is_finished: Returns whether a prompt looks like one that is finished: a sync tool may deliver many again.
        """
        self._notice_clock()
        oldest = self._now() - 2 * self._settle_seconds - _LATEST_COUNT_SECONDS
        self._released = {source: when for source, when in self._released.items() if changed.get(source) == when}
        let_in = self._returned | self._released.keys()
        came = [source for source, when in changed.items() if when > self._passed and source not in let_in]
        dates = sorted(changed[source] for source in came)
        self._claimed = [
            one
            for one in self._claimed
            if one.changed > self._passed and (one.at >= oldest or (one.is_dated and self._is_near(one, dates)))
        ]
        if len(came) + len(self._claimed) <= self._most:
            return 0
        before, self._finished = self._finished, {}
        for source in came:
            if before.get(source) == changed[source] or is_finished(source):
                self._finished[source] = changed[source]
        new = [changed[source] for source in came if source not in self._finished]
        return self._claimed_with(max(new)) + len(new) if new else 0

    def _is_near(self, one: _Claimed, dates: list[float]) -> bool:
        """Return whether a claimed prompt came at the same time as one of some dates, which are in order."""
        place = bisect.bisect_right(dates, one.changed - self._settle_seconds)
        return place < len(dates) and dates[place] < one.changed + self._settle_seconds

    def _notice_clock(self) -> None:
        """Count what comes from now on, if the clock was ahead when prompts were let pass, and was set back since."""
        if (now := self._clock()) < self._passed_at - _JUMP_SECONDS:
            self._passed, self._passed_at = min(self._passed, now), now

    def _claimed_with(self, newest: float) -> int:
        """Return how many claimed prompts came at the same time as one with this ctime, seconds."""
        now, seconds = self._now(), self._settle_seconds
        return sum(
            abs(newest - one.changed) < seconds if one.is_dated else now - one.at <= seconds for one in self._claimed
        )

    def claimed(self, source: str, changed: float, *, is_dated: bool) -> None:
        """Note that a prompt was claimed.

        Args:
            source: Its path below the inbox.
            changed: Newest ctime of its files, seconds since the epoch.
            is_dated: Whether that is when it came.
        """
        if self._most and source not in self._returned and self._released.get(source) != changed:
            self._claimed.append(_Claimed(self._now(), changed, is_dated))

    def returned(self, source: str) -> None:
        """Note that a prompt of this path is back in the inbox: its ctime is new, but it is the same one."""
        if self._most:
            self._returned.add(source)

    def finished(self, source: str) -> None:
        """Note that a prompt of this path is finished: the next one there is another one."""
        self._returned.discard(source)
