"""What may be spent: caps in credits for a day and a month, and requests a minute.

Counted from the ledger, so that a restart changes nothing, plus what is in flight. A request is let through only
if what was spent, what is in flight and what it may cost itself stay within the cap. What it may cost is the highest
of the provider's recent charges, or ``assumed_credits`` where there are none: a cost nobody knows is never zero. So a
cap is exceeded by no more than the error of that guess on the requests in flight at that moment.

A request that fits, but for what those in flight may cost, is told to come again soon: when they have come in there may
be room.

A day and a month are those of UTC, by this machine's clock; what the ledger dates later than now counts, too. So a
clock that is set back opens no new day, and what was spent while it was wrong ahead counts until that time has come.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from imagewatch.errors import SpoolError
from imagewatch.text import amount

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config import Limits

_MINUTE = 60.0
_SOON = 2.0
"""When a request is to come again that would fit if those in flight cost less than is set aside, seconds."""


@dataclass(frozen=True)
class Spending:
    """What the ledger says of a time.

    Attributes:
        credits: Charged and known.
        unpriced: For each provider, how many requests were or may have been charged without a price.
    """

    credits: float
    unpriced: dict[str, int]


class Books(Protocol):
    """What is asked of the ledger."""

    def spending(self, since: float) -> Spending:
        """Return what was spent since a time, seconds since the epoch."""

    def highest_charge(self, provider: str) -> float | None:
        """Return the highest of a provider's recent charges, or None without any."""

    def sent_since(self, since: float) -> list[float]:
        """Return the times of the attempts since a time, oldest first."""


@dataclass(frozen=True)
class Refusal:
    """Why a request may not be sent now.

    Attributes:
        kind: ``cap``, or ``rate`` if it may soon.
        message: In words, with the rule.
        seconds: Until it may be, or is to be asked for again.
    """

    kind: str
    message: str
    seconds: float


def day_and_month(now: float) -> tuple[tuple[datetime, datetime], tuple[datetime, datetime]]:
    """Return beginning and end of the day and of the month of a time in seconds since the epoch, by UTC."""
    day = datetime.fromtimestamp(now, tz=UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    return (day, day + timedelta(days=1)), (month, (month + timedelta(days=32)).replace(day=1))


class Budget:
    """Lets requests through, or says why not. Safe to use from several threads.

    Args:
        books: The ledger.
        limits: The caps; 0 is off.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(self, books: Books, limits: Limits, clock: Callable[[], float]) -> None:
        self._books = books
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight: dict[str, float] = {}
        self._resumed: dict[str, tuple[str, float]] = {}  # provider and time of those whose cost is not guessed yet
        self._stranded: list[tuple[float, float]] = []
        self._recent: list[float] = []
        self._has_recent = False

    def change(self, limits: Limits) -> None:
        """Take other caps; what is in flight stays counted."""
        with self._lock:
            self._limits = limits

    def reserve(self, job: str, provider: str) -> Refusal | None:
        """Set aside what a request may cost; ``settle`` ends that.

        Args:
            job: Its job id.
            provider: Whom it asks.

        Returns:
            Why it may not be sent, or None: it may.
        """
        with self._lock:
            now, cost = self._clock(), self._guess(provider)
            self._catch_up()
            refusal = self._over_rate(now) or self._over_cap(now, cost)
            if refusal is None:
                self._in_flight[job] = cost
                self._recent.append(now)
            return refusal

    def resume(self, job: str, provider: str, sent_at: float) -> None:
        """Count a request of an earlier process, whose row the ledger may not have yet, until ``settle``.

        Args:
            job: Its job id.
            provider: Whom it asked.
            sent_at: When, seconds since the epoch.
        """
        with self._lock:
            self._resumed[job] = provider, sent_at

    def settle(self, job: str) -> None:
        """End a reservation: the ledger has the row, or nothing was sent."""
        with self._lock:
            self._in_flight.pop(job, None)
            self._resumed.pop(job, None)

    def strand(self, job: str) -> None:
        """Count a reservation as spent now: its job does not go on in this process, so that nobody may wait for it."""
        with self._lock:
            with contextlib.suppress(SpoolError):
                self._catch_up()
            is_resumed = self._resumed.pop(job, None) is not None
            cost = self._in_flight.pop(job, self._limits.assumed_credits if is_resumed else 0.0)
            self._stranded.append((self._clock(), cost))

    def _catch_up(self) -> None:
        """Ask the ledger what was not needed before the first request."""
        if not self._has_recent:
            window = _MINUTE / min(self._limits.requests_per_minute or 1, 1)
            self._recent = self._books.sent_since(self._clock() - window)
            self._has_recent = True
        for job, (provider, sent_at) in list(self._resumed.items()):
            self._in_flight[job] = self._guess(provider)
            if sent_at not in self._recent:
                bisect.insort(self._recent, sent_at)
            del self._resumed[job]

    def _guess(self, provider: str) -> float:
        known = self._books.highest_charge(provider)
        return self._limits.assumed_credits if known is None else known

    def _over_rate(self, now: float) -> Refusal | None:
        most = self._limits.requests_per_minute
        if not most:
            return None
        window, count = (_MINUTE, int(most)) if most >= 1 else (_MINUTE / most, 1)
        # What is dated later than now was sent before the clock was set back: when, nobody knows.
        self._recent = [min(sent, now) for sent in self._recent if sent > now - window]
        if len(self._recent) < count:
            return None
        wait = self._recent[-count] + window - now
        return Refusal("rate", f"limits.requests_per_minute is {most:g}", max(wait, 0.01))

    def _over_cap(self, now: float, cost: float) -> Refusal | None:
        day, month = day_and_month(now)
        windows = (
            ("limits.credits_per_day", self._limits.credits_per_day, *day),
            ("limits.credits_per_month", self._limits.credits_per_month, *month),
        )
        for rule, cap, begin, end in windows:
            if not cap:
                continue
            spent, aside = self._spent(begin.timestamp()), sum(self._in_flight.values())
            if spent + aside + cost <= cap:
                continue
            known = f"{amount(spent)} are spent, {amount(aside)} set aside, and a request may cost {amount(cost)}"
            message = f"{rule} is {amount(cap)}: {known}"
            if spent + cost <= cap:
                return Refusal("rate", message, _SOON)
            return Refusal("cap", message, max(end.timestamp() - now, 1.0))
        return None

    def _spent(self, since: float) -> float:
        found = self._books.spending(since)
        unpriced = sum(self._guess(provider) * count for provider, count in found.unpriced.items())
        return found.credits + unpriced + sum(cost for at, cost in self._stranded if at >= since)
