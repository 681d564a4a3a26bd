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

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, get_args

from imagewatch.config.schema import Provider
from imagewatch.journal.prices import SECONDS, Asked, Expected, expected
from imagewatch.protocol.reasons import KINDS, Reason
from imagewatch.system.errors import Problem
from imagewatch.system.text import amount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imagewatch.config.schema import Limits
    from imagewatch.journal.books import Books

CAPS = ("limits.credits_per_day", "limits.credits_per_month")
"""The settings that are caps on credits."""
_MINUTE = 60.0
_NEARLY = 0.8
"""The part of a cap that is spent when an event reports it."""


@dataclass
class _Memo:
    """What was read for several questions, so that the ledger is asked only once."""

    spent: dict[float, float] = field(default_factory=dict)
    reserved: dict[str, tuple[float, list[tuple[float, float]]]] = field(default_factory=dict)
    charges: dict[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Nearly:
    """A cap that is nearly spent.

    Attributes:
        setting: Its name.
        cap: Credits.
        spent: Credits that count as spent.
        ends: When its day or month ends, seconds since the epoch.
    """

    setting: str
    cap: float
    spent: float
    ends: float


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
    """Says which requests fit, and why others do not. It reserves nothing: the journal does (``journal.Journal``).

    Args:
        books: What was spent and is reserved.
        limits: The caps; 0 is off.
        now: Wall-clock time, seconds since the epoch.
    """

    def __init__(self, books: Books, limits: Limits, now: float) -> None:
        self._books = books
        self._limits = limits
        self._now = now
        self._memo = _Memo()

    def cost(self, asked: Asked) -> Expected:
        """Return what a request may cost; ``high`` is what is reserved for it."""
        charges = self._books.charges(asked.provider, self._now - SECONDS)
        return expected(asked, charges, self._limits.assumed_credits)

    def never(self, asked: Asked) -> Problem | None:
        """Return why a request can never be sent with these caps, as it may cost more than a whole one, or None."""
        if not (caps := self._caps()):
            return None
        cost = self._cost(asked)
        return next((_too_expensive(rule, cap, cost) for rule, cap in caps if cost.high > cap), None)

    def spent(self) -> dict[str, tuple[float, str]]:
        """Return what counts as spent below each cap that is set, credits, and when it ends, by the name of the cap."""
        return {
            rule: (self._spent(begin.timestamp(), ""), _shown(end))
            for (rule, _), (begin, end) in zip(self._caps(), self._windows(), strict=True)
        }

    def nearly_spent(self) -> list[Nearly]:
        """Return the caps of which 80 % or more are spent."""
        found = [
            Nearly(rule, cap, self._spent(begin.timestamp(), ""), end.timestamp())
            for (rule, cap), (begin, end) in zip(self._caps(), self._windows(), strict=True)
        ]
        return [one for one in found if one.spent >= _NEARLY * one.cap]

    def knows_prices(self) -> bool:
        """Return whether a request to any provider was charged lately."""
        return any(self._books.highest(provider, self._now - SECONDS) for provider in get_args(Provider))

    def reservation(self, asked: Asked) -> float:
        """Return what is reserved for a request, credits; the journal is not asked while there is no cap."""
        if not self._caps():
            return expected(asked, {}, self._limits.assumed_credits).high
        return self._cost(asked).high

    def over_rate(self) -> Reason | None:
        """Return that too many requests were sent in this minute, or None."""
        most = self._limits.requests_per_minute
        if not most:
            return None
        window, count = (_MINUTE, int(most)) if most >= 1 else (_MINUTE / most, 1)
        recent = self._books.newest(self._now - window, count)
        if len(recent) < count:
            return None
        wait = min(recent[-1], self._now) + window - self._now
        return Reason("rate", f"limits.requests_per_minute is {most:g}", max(wait, 0.01))

    def over_cap(self, asked: Asked, job: str = "") -> Reason | None:
        """Return which cap forbids a request beside the other ones, or None.

        Args:
            asked: The request.
            job: Its job: what that has reserved does not count.
        """
        caps = self._caps()
        if not caps:
            return None
        cost = self._cost(asked)
        for rule, cap in caps:
            if cost.high > cap:
                return Reason("too_expensive", str(_too_expensive(rule, cap, cost)), 0.0)
        reserved, _ = self._reserved(job)
        found: list[Reason] = []
        for (rule, cap), (begin, end) in zip(caps, self._windows(), strict=True):
            spent = self._spent(begin.timestamp(), job)
            if spent + reserved + cost.high <= cap:
                continue
            known = f"{amount(spent)} are spent, {amount(reserved)} are reserved for requests in flight"
            message = f"{rule} is {amount(cap)}: {known}, and this request may cost {amount(cost.high)} ({cost.why})"
            if spent + cost.high > cap:
                ends = end.timestamp()
                reason = Reason("cap", f"{message}; the period ends {_shown(end)}", max(ends - self._now, 1.0), ends)
                found.append(reason)
            else:
                found.append(Reason("reserved", message, KINDS["reserved"].seconds))
        return max(found, key=lambda reason: reason.seconds or 0.0, default=None)

    def _cost(self, asked: Asked) -> Expected:
        charges = self._memo.charges
        if asked.provider not in charges:
            charges[asked.provider] = self._books.highest(asked.provider, self._now - SECONDS)
        return expected(asked, charges[asked.provider], self._limits.assumed_credits)

    def _caps(self) -> list[tuple[str, float]]:
        caps = zip(CAPS, (self._limits.credits_per_day, self._limits.credits_per_month), strict=True)
        return [(rule, cap) for rule, cap in caps if cap]

    def _windows(self) -> list[tuple[datetime, datetime]]:
        """Return begin and end of the time of each cap that is set."""
        day, month = day_and_month(self._now)
        set_ = ((self._limits.credits_per_day, day), (self._limits.credits_per_month, month))
        return [window for cap, window in set_ if cap]

    def _reserved(self, job: str) -> tuple[float, list[tuple[float, float]]]:
        if job not in self._memo.reserved:
            self._memo.reserved[job] = self._books.reserved(job)
        return self._memo.reserved[job]

    def _spent(self, since: float, job: str) -> float:
        """Return what counts as spent since a time, with what stuck jobs have reserved: nothing may wait for it."""
        if since not in self._memo.spent:
            known, unknown = self._books.spending(since)
            self._memo.spent[since] = known + sum(self._cost(Asked(*one)).high for one in unknown)
        return self._memo.spent[since] + sum(credits_ for at, credits_ in self._reserved(job)[1] if at >= since)
