"""Which holds there are, for those who ask; and what is logged when they begin and end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import structlog

from imagewatch.protocol.reasons import STORES
from imagewatch.system.text import iso

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.journal.holds import Hold, Holds

_SAME_SECONDS = 1.0
"""An end that is computed again, as that of a cap is, and differs by no more is the same."""
_SET_SECONDS = 60.0
"""If the two clocks differ by more than before, the wall clock was set."""
_log = structlog.get_logger()


class HoldsThereAre:
    """Answers questions about holds.

    Args:
        holds: The holds.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(self, holds: Holds, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._holds = holds
        self._clock = clock
        self._now = monotonic
        self._ends: dict[tuple[str, str, str], tuple[float, int]] = {}

    def end(self, hold: Hold) -> int | None:
        """Return when a hold ends or the next request is tried.

        The two clocks do not run exactly alike. So a time that was returned before is returned again while it differs
        by little: all who show a hold show the same time, until it is prolonged or the wall clock is set.

        Returns:
            Wall-clock time, the nearest whole second since the epoch; None if only a person ends the hold.
        """
        if not math.isfinite(hold.until):
            return None
        exact = self._clock() + hold.until - self._now()
        whose = hold.kind, hold.provider, hold.folder
        until, shown = self._ends.get(whose, (math.inf, 0))
        if abs(exact - shown) > (_SET_SECONDS if until == hold.until else _SAME_SECONDS):
            shown = round(exact)
        self._ends[whose] = hold.until, shown
        return shown

    def ends(self, hold: Hold) -> str | None:
        """Return the same as ``end`` as text, in UTC."""
        return iso(self.end(hold))

    def holds(self) -> list[Hold]:
        """Return all holds, also brief ones and those of single providers."""
        return self._holds.all()

    def first(self) -> Hold | None:
        """Return the hold of every request that lasts longest, brief ones aside, or None."""
        return self._holds.first()

    def shown(self) -> Hold | None:
        """Return the hold that is named where there is room for one, or None."""
        return self._holds.first() or self._holds.first_cap()

    def waits(self) -> bool:
        """Return whether a hold, brief ones aside, forbids any request now."""
        hold = self.first()
        return hold is not None and self._now() < hold.until


def log_begin(holds: Iterable[Hold], now: float, ends: Callable[[Hold], str | None]) -> None:
    """Log that holds have begun.

    Args:
        holds: The holds.
        now: Monotonic time, seconds.
        ends: Returns when a hold ends, as a UTC time.
    """
    for hold in holds:
        fields: dict[str, object] = {"kind": hold.kind, "reason": hold.reason.message, "next": hold.reason.next}
        if hold.folder:
            fields["folder"] = hold.folder
        elif hold.provider:
            fields["provider"] = hold.provider
        if math.isfinite(hold.until):
            fields |= {"seconds": round(hold.until - now, 1), "next_try_at": ends(hold)}
        (_log.error if hold.kind in STORES else _log.warning)("held", **fields)


def log_end(holds: Iterable[Hold]) -> None:
    """Log that holds have ended, except for brief ones."""
    for hold in holds:
        fields: dict[str, object] = {"kind": hold.kind}
        if hold.folder:
            fields["folder"] = hold.folder
        elif hold.provider:
            fields["provider"] = hold.provider
        if not hold.brief:
            _log.info("released", **fields)
