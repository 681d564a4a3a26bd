"""What may be spent: caps in credits for a day and a month, and requests a minute; for all and for single folders.

Counted from the ledger, so that a restart changes nothing, plus what is in flight. A request is let through only
if what was spent, what is in flight and what it may cost itself stay within the cap. What it may cost is what the most
expensive request like it cost lately (``prices``), or ``assumed_credits`` where there is none: an unknown cost is
never zero. So a cap is exceeded at most by what the requests in flight cost above their estimate.

A request is refused for one of four reasons (``protocol.reasons``). ``too_expensive``: it may cost more than a whole
cap, so that no waiting helps. ``cap``: it does not fit beside what was spent, and waits until the day or the month is
over. ``reserved``: it does not fit beside what is reserved for requests in flight, and waits until some of them are
done. A cheaper request may still fit. ``rate``: too many requests in a minute, which concerns every request.

A budget sets the same caps for one first-level folder and everything below it. What it refuses has ``Reason.folder``
and concerns no other folder. Folders are compared by the bytes of their names.

A day and a month are those of UTC, by this machine's clock; what the ledger dates later than now counts, too. So a
clock that is set back opens no new day, and spending recorded with a future date counts until that date has passed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

from imagewatch.config.schema import FolderBudget, Limits, Provider
from imagewatch.journal.prices import SECONDS, Asked, Expected, expected
from imagewatch.protocol.reasons import KINDS, Reason
from imagewatch.system.errors import Problem
from imagewatch.system.text import amount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imagewatch.journal.books import Books, Counted

CAPS = ("limits.credits_per_day", "limits.credits_per_month")
"""The settings that are caps on credits."""
NO_BUDGETS: Mapping[str, FolderBudget] = MappingProxyType({})
_MINUTE = 60.0
_STEP = (
    "wait until the day or month of the budget ends, or raise the budget and reload the daemon; prompts of other "
    "folders are still sent"
)


@dataclass(frozen=True, slots=True)
class _Cap:
    """A cap on credits.

    Attributes:
        setting: Its name in the configuration.
        credits: The cap.
        begin: When the day or month begins.
        end: When it ends.
        folder: The first-level folder whose budget it is; empty: it counts for all.
    """

    setting: str
    credits: float
    begin: datetime
    end: datetime
    folder: str = ""


_NEARLY = 0.8
"""The part of a cap that is spent when an event reports it."""


@dataclass
class _Memo:
    """What was read for several questions, so that the ledger is asked only once; by folder, and then as is asked."""

    counted: dict[tuple[str, float, str], Counted] = field(default_factory=dict)
    charges: dict[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


def folder_of(source: str) -> str:
    """Return the first-level folder of a prompt, by its path below the inbox; empty: it is directly in the inbox."""
    name, slash, _ = source.partition("/")
    return name if slash else ""


def setting(folder: str, key: str = "") -> str:
    """Return the name of a budget, or of a key of it, as it is written in the configuration."""
    is_bare = re.fullmatch(r"[A-Za-z0-9_-]+", folder)
    name = f"budgets.{folder if is_bare else json.dumps(folder, ensure_ascii=False)}"
    return f"{name}.{key}" if key else name


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


def _too_expensive(cap: _Cap, cost: Expected) -> Problem:
    """Return what is wrong with a request that may cost more than a whole cap."""
    reason = f"is {amount(cap.credits)} credits, and this request alone may cost {amount(cost.high)} ({cost.why})"
    is_assumed = "limits.assumed_credits" in cost.why
    others = "set limits.assumed_credits to a likely cost" if is_assumed else "ask for less (n, quality)"
    return Problem(cap.setting, reason, f"raise {cap.setting}, or {others}")


class Budget:
    """Says which requests fit, and why others do not. It reserves nothing: the journal does (``journal.Journal``).

    Args:
        books: What was spent and is reserved.
        limits: The caps; 0 is off.
        now: Wall-clock time, seconds since the epoch.
        budgets: The same for single first-level folders. Where a request is asked about, its folder is, too; empty: it
            is directly in the inbox.
    """

    def __init__(
        self, books: Books, limits: Limits, now: float, budgets: Mapping[str, FolderBudget] = NO_BUDGETS
    ) -> None:
        self._books = books
        self._limits = limits
        self._now = now
        self._budgets = budgets
        self._memo = _Memo()

    def cost(self, asked: Asked) -> Expected:
        """Return what a request may cost; ``high`` is what is reserved for it."""
        charges = self._books.charges(asked.provider, self._now - SECONDS)
        return expected(asked, charges, self._limits.assumed_credits)

    def never(self, asked: Asked, folder: str = "") -> Problem | None:
        """Return why a request can never be sent with these caps, as it may cost more than a whole one, or None."""
        if not (caps := self._caps(folder)):
            return None
        cost = self._cost(asked)
        return next((_too_expensive(cap, cost) for cap in caps if cost.high > cap.credits), None)

    def spent(self, folder: str = "") -> dict[str, tuple[float, str]]:
        """Return what counts as spent below each cap that is set, credits, and when it ends, by the name of the cap.

        Args:
            folder: The folder of whose budget the caps are; empty: those for all.
        """
        return {cap.setting: (self._counted(cap)[0], _shown(cap.end)) for cap in self._own_caps(folder)}

    def spent_in(self, folder: str) -> tuple[float, float, float]:
        """Return the credits that count as spent in a first-level folder, this day and this month; and the reserved."""
        day, month = (self._counted(_Cap("", 0.0, *window, folder)) for window in day_and_month(self._now))
        return day[0], month[0], month[1]

    def nearly_spent(self) -> list[Nearly]:
        """Return the caps, those of budgets included, of which 80 % or more are spent."""
        caps = [cap for folder in ("", *self._budgets) for cap in self._own_caps(folder)]
        found = [Nearly(cap.setting, cap.credits, self._counted(cap)[0], cap.end.timestamp()) for cap in caps]
        return [one for one in found if one.spent >= _NEARLY * one.cap]

    def knows_prices(self) -> bool:
        """Return whether a request to any provider was charged lately."""
        return any(self._books.highest(provider, self._now - SECONDS) for provider in get_args(Provider))

    def reservation(self, asked: Asked, folder: str = "") -> float:
        """Return what is reserved for a request, credits; the journal is not asked while there is no cap."""
        if not self._caps(folder):
            return expected(asked, {}, self._limits.assumed_credits).high
        return self._cost(asked).high

    def has_rate(self, folder: str) -> bool:
        """Return whether only so many requests may be sent in a minute."""
        budget = self._budgets.get(folder)
        return bool(self._limits.requests_per_minute or (budget and budget.requests_per_minute))

    def over_rate(self) -> Reason | None:
        """Return that too many requests were sent in this minute, or None."""
        return self._over_rate("limits.requests_per_minute", self._limits.requests_per_minute)

    def over_budget_rate(self, folder: str) -> Reason | None:
        """Return that too many requests of a first-level folder were sent in this minute, or None."""
        budget = self._budgets.get(folder)
        if budget is None:
            return None
        return self._over_rate(setting(folder, "requests_per_minute"), budget.requests_per_minute, folder)

    def _over_rate(self, name: str, most: float, folder: str = "") -> Reason | None:
        if not most:
            return None
        window, count = (_MINUTE, int(most)) if most >= 1 else (_MINUTE / most, 1)
        recent = self._books.newest(self._now - window, count, folder)
        if len(recent) < count:
            return None
        wait = max(min(recent[-1], self._now) + window - self._now, 0.01)
        return Reason("rate", f"{name} is {most:g}", wait, self._now + wait, folder=folder)

    def over_cap(self, asked: Asked, job: str = "", folder: str = "") -> Reason | None:
        """Return which cap forbids a request beside the other ones, or None.

        Args:
            asked: The request.
            job: Its job: what that has reserved does not count.
            folder: Its first-level folder.
        """
        caps = self._caps(folder)
        if not caps:
            return None
        cost = self._cost(asked)
        for cap in caps:
            if cost.high > cap.credits:
                return Reason("too_expensive", str(_too_expensive(cap, cost)), 0.0)
        found = [reason for cap in caps if (reason := self._over(cap, cost, job))]
        return max(found, key=lambda reason: reason.seconds or 0.0, default=None)

    def _over(self, cap: _Cap, cost: Expected, job: str) -> Reason | None:
        """Return why a request does not fit below one cap, or None."""
        spent, reserved = self._counted(cap, job)
        if spent + reserved + cost.high <= cap.credits:
            return None
        known = f"{amount(spent)} are spent, {amount(reserved)} are reserved for requests in flight"
        message = f"{cap.setting} is {amount(cap.credits)}: {known}, and this request may cost {amount(cost.high)}"
        message += f" ({cost.why})"
        if spent + cost.high <= cap.credits:
            return Reason("reserved", message, KINDS["reserved"].seconds, folder=cap.folder)
        ends = cap.end.timestamp()
        message += f"; the period ends {_shown(cap.end)}"
        step = _STEP if cap.folder else ""
        return Reason("cap", message, max(ends - self._now, 1.0), ends, step=step, folder=cap.folder)

    def _cost(self, asked: Asked) -> Expected:
        charges = self._memo.charges
        if asked.provider not in charges:
            charges[asked.provider] = self._books.highest(asked.provider, self._now - SECONDS)
        return expected(asked, charges[asked.provider], self._limits.assumed_credits)

    def _caps(self, folder: str) -> list[_Cap]:
        """Return every cap on credits that counts for a request."""
        return [*self._own_caps(""), *(self._own_caps(folder) if folder else ())]

    def _own_caps(self, folder: str) -> list[_Cap]:
        """Return the caps on credits of a folder's budget; without a folder those for all."""
        own: Limits | FolderBudget | None = self._budgets.get(folder) if folder else self._limits
        if own is None or not (own.credits_per_day or own.credits_per_month):
            return []
        names = [setting(folder, name.removeprefix("limits.")) for name in CAPS] if folder else CAPS
        caps = zip(names, (own.credits_per_day, own.credits_per_month), day_and_month(self._now), strict=True)
        return [_Cap(name, cap, *window, folder) for name, cap, window in caps if cap]

    def _counted(self, cap: _Cap, job: str = "") -> tuple[float, float]:
        """Return what counts as spent below a cap, and what jobs other than this one have reserved.

        What stuck jobs have reserved counts as spent: nothing may wait for it.
        """
        since = cap.begin.timestamp()
        if (cap.folder, since, job) not in self._memo.counted:
            self._memo.counted[cap.folder, since, job] = self._books.counted(since, job, cap.folder)
        found = self._memo.counted[cap.folder, since, job]
        unknown = sum(self._cost(Asked(*one)).high for one in found.unknown)
        stuck = sum(credits_ for at, credits_ in found.stuck if at >= since)
        return found.known + unknown + stuck, found.reserved
