"""What may be spent: caps in credits for a day and a month, and requests a minute.

Counted from the ledger, so that a restart changes nothing, plus what is in flight. A request is let through only
if what was spent, what is in flight and what it may cost itself stay within the cap. What it may cost is what the most
expensive request like it cost lately (``prices``), or ``assumed_credits`` where there is none: an unknown cost is
never zero. So a cap is exceeded at most by what the requests in flight cost above their estimate.

A request is refused for one of four reasons (``protocol.reasons``). ``too_expensive``: it may cost more than a whole
cap, so that no waiting helps. ``cap``: it does not fit beside what was spent, and waits until the day or the month is
over. ``reserved``: it does not fit beside what is reserved for requests in flight, and waits until some of them are
done. A cheaper request may still fit. ``rate``: too many requests in a minute, which concerns every request.

A day and a month are those of UTC, by this machine's clock; what the ledger dates later than now counts, too. So a
clock that is set back opens no new day, and spending recorded with a future date counts until that date has passed.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol, get_args

from imagewatch.config.schema import Provider
from imagewatch.journal.prices import SECONDS, Asked, Expected, expected
from imagewatch.protocol.reasons import KINDS, Reason
from imagewatch.system.errors import Problem, SpoolError
from imagewatch.system.text import amount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from imagewatch.config.schema import Limits

CAPS = ("limits.credits_per_day", "limits.credits_per_month")
"""The settings that are caps on credits."""
_MINUTE = 60.0


class Books(Protocol):
    """What is asked of the ledger."""

    def spending(self, since: float) -> tuple[float, list[tuple[str, str, int]]]:
        """Return what was spent since a time, seconds since the epoch.

        Returns:
            Known credits; and of requests with an unknown amount provider, kind of price and number of images.
        """

    def charges(self, provider: str, since: float) -> Mapping[str, Sequence[float]]:
        """Return what requests to a provider were charged for an image since a time, by the kind of their price."""

    def sent_since(self, since: float) -> list[float]:
        """Return the times of the attempts since a time, oldest first."""


class NoBooks:
    """The ledger of a daemon that has never run."""

    def spending(self, since: float) -> tuple[float, list[tuple[str, str, int]]]:  # noqa: ARG002
        """Return that nothing was spent."""
        return 0.0, []

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:  # noqa: ARG002
        """Return that nothing was charged."""
        return {}

    def sent_since(self, since: float) -> list[float]:  # noqa: ARG002
        """Return that nothing was sent."""
        return []


@dataclass
class _Memo:
    """What was read for several questions, so that the ledger is asked only once."""

    spent: dict[float, float] = field(default_factory=dict)
    charges: dict[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


def day_and_month(now: float) -> tuple[tuple[datetime, datetime], tuple[datetime, datetime]]:
    """Return beginning and end of the day and of the month of a time in seconds since the epoch, by UTC."""
    day = datetime.fromtimestamp(now, tz=UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    return (day, day + timedelta(days=1)), (month, (month + timedelta(days=32)).replace(day=1))


def _shown(end: datetime) -> str:
    return end.isoformat(timespec="minutes").replace("+00:00", "Z")


def _too_expensive(rule: str, cap: float, cost: Expected) -> Problem:
    """Return what is wrong with a request that may cost more than a whole cap."""
    reason = f"is {amount(cap)} credits, and this request alone may cost {amount(cost.high)} ({cost.why})"
    is_assumed = "limits.assumed_credits" in cost.why
    others = "set limits.assumed_credits to a likely cost" if is_assumed else "ask for less (n, quality)"
    return Problem(rule, reason, f"raise {rule}, or {others}")


class Budget:
    """Lets requests through, or returns why not. Safe to use from several threads.

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
        self._planned: set[str] = set()  # of these, jobs that have not asked to send anything yet
        self._resumed: dict[str, tuple[Asked, float]] = {}  # request and time of those whose cost is not known yet
        self._assumed_spent: list[tuple[float, float]] = []
        self._recent: list[float] = []
        self._has_recent = False

    def change(self, limits: Limits) -> None:
        """Take other caps; what is in flight stays counted."""
        with self._lock:
            self._limits = limits

    def cost(self, asked: Asked) -> Expected:
        """Return what a request may cost; ``high`` is what is reserved for it."""
        with self._lock:
            return self._cost(asked, self._clock(), _Memo())

    def never(self, asked: Asked) -> Problem | None:
        """Return why a request can never be sent with these caps, as it may cost more than a whole one, or None."""
        caps = self._caps()
        if not caps:
            return None
        with self._lock:
            cost = self._cost(asked, self._clock(), _Memo())
        return next((_too_expensive(rule, cap, cost) for rule, cap in caps if cost.high > cap), None)

    def spent(self) -> dict[str, tuple[float, str]]:
        """Return what counts as spent below each cap that is set, credits, and when it ends, by the name of the cap."""
        with self._lock:
            now, memo = self._clock(), _Memo()
            return {
                rule: (self._spent(begin.timestamp(), now, memo), _shown(end))
                for (rule, _), (begin, end) in zip(self._caps(), self._windows(now), strict=True)
            }

    def knows_prices(self) -> bool:
        """Return whether a request to any provider was charged lately."""
        since = self._clock() - SECONDS
        return any(self._books.charges(provider, since) for provider in get_args(Provider))

    def check(self, many: Iterable[Asked]) -> dict[Asked, Reason]:
        """Return which requests do not fit now, and why; nothing is reserved.

        Args:
            many: Requests; each is checked as if it were the only one.
        """
        with self._lock:
            self._catch_up()
            now, memo = self._clock(), _Memo()
            refusals = ((asked, self._over_cap(now, asked, "", memo)) for asked in many)
            return {asked: refusal for asked, refusal in refusals if refusal is not None}

    def plan(self, job: str, asked: Asked) -> Reason | None:
        """Reserve what a request may cost that is going to be claimed; ``end_reservation`` ends that.

        Before it is sent ``reserve`` checks again: this only avoids claiming more prompts than fit.

        Args:
            job: Its job id.
            asked: The request.

        Returns:
            Why it may not be sent, or None.
        """
        with self._lock:
            self._catch_up()
            now, memo = self._clock(), _Memo()
            refusal = self._over_cap(now, asked, job, memo)
            if refusal is None:
                self._in_flight[job] = self._reservation(asked, now, memo)
                self._planned.add(job)
            return refusal

    def unplan(self, job: str) -> None:
        """End a reservation of ``plan`` if its job has not come to ``reserve``: it may be stuck for long."""
        with self._lock:
            if job in self._planned:
                self._planned.discard(job)
                self._in_flight.pop(job, None)

    def reserve(self, job: str, asked: Asked) -> Reason | None:
        """Reserve what a request may cost that is about to be sent; ``end_reservation`` ends that.

        Args:
            job: Its job id.
            asked: The request.

        Returns:
            Why it may not be sent, or None: it may.
        """
        with self._lock:
            self._catch_up()
            now, memo = self._clock(), _Memo()
            refusal = self._over_rate(now) or self._over_cap(now, asked, job, memo)
            if refusal is None:
                self._in_flight[job] = self._reservation(asked, now, memo)
                self._planned.discard(job)
                self._recent.append(now)
            return refusal

    def resume(self, job: str, asked: Asked, sent_at: float) -> None:
        """Count a request of an earlier process, whose row the ledger may not have yet, until ``settle``.

        Args:
            job: Its job id.
            asked: The request.
            sent_at: When, seconds since the epoch.
        """
        with self._lock:
            self._resumed[job] = asked, sent_at

    def end_reservation(self, job: str) -> None:
        """End a reservation: the ledger has the row, or nothing was sent."""
        with self._lock:
            self._in_flight.pop(job, None)
            self._resumed.pop(job, None)
            self._planned.discard(job)

    def count_as_spent(self, job: str) -> None:
        """Count a reservation as spent now: its job does not continue in this process, so nothing may wait for it."""
        with self._lock:
            with contextlib.suppress(SpoolError):
                self._catch_up()
            is_resumed = self._resumed.pop(job, None) is not None
            cost = self._in_flight.pop(job, self._limits.assumed_credits if is_resumed else 0.0)
            self._assumed_spent.append((self._clock(), cost))

    def _catch_up(self) -> None:
        """Ask the ledger what was not needed before the first request."""
        if not self._has_recent:
            window = _MINUTE / min(self._limits.requests_per_minute or 1, 1)
            self._recent = self._books.sent_since(self._clock() - window)
            self._has_recent = True
        now, memo = self._clock(), _Memo()
        for job, (asked, sent_at) in list(self._resumed.items()):
            self._in_flight[job] = self._reservation(asked, now, memo)
            if sent_at not in self._recent:
                bisect.insort(self._recent, sent_at)
            del self._resumed[job]

    def _reservation(self, asked: Asked, now: float, memo: _Memo) -> float:
        """Return what is reserved for a request, credits; the ledger is not asked while there is no cap."""
        if not self._caps():
            return expected(asked, {}, self._limits.assumed_credits).high
        return self._cost(asked, now, memo).high

    def _cost(self, asked: Asked, now: float, memo: _Memo) -> Expected:
        if asked.provider not in memo.charges:
            memo.charges[asked.provider] = self._books.charges(asked.provider, now - SECONDS)
        return expected(asked, memo.charges[asked.provider], self._limits.assumed_credits)

    def _over_rate(self, now: float) -> Reason | None:
        most = self._limits.requests_per_minute
        if not most:
            return None
        window, count = (_MINUTE, int(most)) if most >= 1 else (_MINUTE / most, 1)
        # What is dated later than now was sent before the clock was set back; its true time is unknown.
        self._recent = [min(sent, now) for sent in self._recent if sent > now - window]
        if len(self._recent) < count:
            return None
        wait = self._recent[-count] + window - now
        return Reason("rate", f"limits.requests_per_minute is {most:g}", max(wait, 0.01))

    def _caps(self) -> list[tuple[str, float]]:
        caps = zip(CAPS, (self._limits.credits_per_day, self._limits.credits_per_month), strict=True)
        return [(rule, cap) for rule, cap in caps if cap]

    def _over_cap(self, now: float, asked: Asked, job: str, memo: _Memo) -> Reason | None:
        """Return which cap forbids a request beside the other ones, or None."""
        caps = self._caps()
        if not caps:
            return None
        cost = self._cost(asked, now, memo)
        for rule, cap in caps:
            if cost.high > cap:
                return Reason("too_expensive", str(_too_expensive(rule, cap, cost)), 0.0)
        reserved = sum(credits_ for other, credits_ in self._in_flight.items() if other != job)
        found: list[Reason] = []
        for (rule, cap), (begin, end) in zip(caps, self._windows(now), strict=True):
            spent = self._spent(begin.timestamp(), now, memo)
            if spent + reserved + cost.high <= cap:
                continue
            known = f"{amount(spent)} are spent, {amount(reserved)} are reserved for requests in flight"
            message = f"{rule} is {amount(cap)}: {known}, and this request may cost {amount(cost.high)} ({cost.why})"
            if spent + cost.high > cap:
                ends = end.timestamp()
                found.append(Reason("cap", f"{message}; the period ends {_shown(end)}", max(ends - now, 1.0), ends))
            else:
                found.append(Reason("reserved", message, KINDS["reserved"].seconds))
        return max(found, key=lambda reason: reason.seconds or 0.0, default=None)

    def _windows(self, now: float) -> list[tuple[datetime, datetime]]:
        """Return begin and end of the time of each cap that is set."""
        day, month = day_and_month(now)
        set_ = ((self._limits.credits_per_day, day), (self._limits.credits_per_month, month))
        return [window for cap, window in set_ if cap]

    def _spent(self, since: float, now: float, memo: _Memo) -> float:
        if since not in memo.spent:
            known, unknown = self._books.spending(since)
            guessed = sum(self._cost(Asked(*one), now, memo).high for one in unknown)
            memo.spent[since] = known + guessed + sum(cost for at, cost in self._assumed_spent if at >= since)
        return memo.spent[since]
