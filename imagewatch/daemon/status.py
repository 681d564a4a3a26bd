"""The content of ``status.json`` in the state folder: what the daemon does now.

The file is replaced whole. It is information only; the facts are in the journal and the folders.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from imagewatch import __version__
from imagewatch.inbox.candidate import Reasons, Wait, joined
from imagewatch.journal.account import PUT_ON_HOLD
from imagewatch.journal.budget import day_and_month
from imagewatch.journal.events import Counts
from imagewatch.journal.ledger import NO_TOTALS
from imagewatch.protocol.reasons import HOLDS, Others
from imagewatch.system.errors import SpoolError
from imagewatch.system.masking import known
from imagewatch.system.text import amount, iso, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.daemon.admission import Admission
    from imagewatch.inbox.candidate import ScanResult
    from imagewatch.journal.account import AccountHold
    from imagewatch.journal.control import Control
    from imagewatch.journal.events import Events
    from imagewatch.journal.ledger import Ledger
    from imagewatch.system.disk import Disk

SCHEMA = 2
FILE = "status.json"
_MOST_NAMES = 100
_INTERVAL = 1.0
_CHEAP = 0.01
"""A page that takes so much processor time at most is written immediately when the last job has ended, seconds."""
_NONE: MappingProxyType[str, str] = MappingProxyType({})


def read(state: str) -> dict[str, Any] | None:
    """Return the last status that the daemon of a state folder wrote, or None if there is none to be read."""
    try:
        with open(os.path.join(state, FILE), "rb") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return None
    for one in (found, *found.get("budgets", ())):  # an older daemon does not write them
        for name in ("today", "month"):
            if one[name]["credits"] is None:  # JSON has no number for it
                one[name]["credits"] = math.inf
    return found


def lasting(page: Mapping[str, Any], control: Control) -> list[dict[str, Any]]:
    """Return the holds that a daemon will find when it starts.

    Args:
        page: The status that it wrote when it ended.
        control: What commands have asked for since.
    """
    kinds = {*control.refused(), *(kind.name for kind in HOLDS.values() if kind.others is Others.PERSON)}
    holds = [one for one in page["holds"] if one["kind"] in kinds and not control.release_pending()]
    reason = control.held()
    if reason is None:
        return [one for one in holds if one["kind"] != "manual"]
    if all(one["kind"] != "manual" for one in holds):
        reason = reason or "put on hold manually"
        manual = {"kind": "manual", "reason": reason, "next": HOLDS["manual"].next}
        holds.append({**manual, "since": None, "next_try_at": None})
    return holds


def shared_holds(holds: Iterable[AccountHold], now: float) -> list[dict[str, Any]]:
    """Return the holds of a shared account as the page of a running daemon has them.

    Args:
        holds: As the database has them.
        now: Wall-clock time, seconds since the epoch.
    """
    return [
        {
            "kind": hold.kind,
            "provider": None,
            "folder": None,
            "reason": printable(known.text(hold.message)) or PUT_ON_HOLD,
            "since": iso(now - hold.age),
            "next_try_at": None if hold.is_manual else iso(now + hold.forbids("")),
            "next": HOLDS[hold.kind].next,
        }
        for hold in holds
    ]


def as_of(page: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return a page whose sums are those of this day and this month, without those of an earlier one.

    Args:
        page: What a daemon wrote, maybe long ago.
        now: Wall-clock time, seconds since the epoch.
    """
    written = moment(page["updated"])
    day, month = day_and_month(now)
    over = [name for name, (begin, _) in (("today", day), ("month", month)) if written < begin]
    budgets = [{**one, **_begun(one, over)} for one in page.get("budgets", ())]
    return {**page, **_begun(page, over), "budgets": budgets}


def _begun(sums: Mapping[str, Any], over: Collection[str]) -> dict[str, Any]:
    """Return the sums of days and months that have begun since, of which nothing is known to be spent."""
    return {name: dict.fromkeys(sums[name], 0) | {"cap": sums[name]["cap"]} for name in over}


class Status:
    """Keeps the file up to date.

    Args:
        config: Where the file is, and which settings are shown.
        disk: The local disk.
        ledger: What was completed and spent.
        admission: The holds.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        processor: Processor time of this thread, seconds.
    """

    def __init__(
        self,
        config: Config,
        disk: Disk,
        ledger: Ledger,
        admission: Admission,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self.configure(config)
        self._path = os.path.join(config.folders.state, FILE)
        self._disk = disk
        self._ledger = ledger
        self._admission = admission
        self._clock = clock
        self._now = monotonic
        self._processor = processor
        self._started = clock()
        self._last: tuple[dict[str, float], dict[str, float], int, tuple[float, float] | None]
        self._last = dict(NO_TOTALS), dict(NO_TOTALS), 0, None
        self._due: float | None = None
        self._not_before = self._cost = 0.0
        self._counts = Counts()
        self.events: Events | None = None
        self.state = "starting"
        self.summary = ""
        self.mode = ""
        self.polled: Mapping[str, str] = {}
        self.notice: dict[str, str | None] | None = None
        self.last_scan: float | None = None

    def configure(self, config: Config) -> None:
        """Take the settings that are shown."""
        self._config = config

    def change(self, *, at_once: bool = False) -> None:
        """Note that something has changed: the file is written soon.

        Args:
            at_once: Whether it is rare and important; then the file is written immediately.
        """
        if at_once:
            self._due = self._now()
        elif self._due is None:
            self._due = self._not_before

    def idle(self) -> None:
        """Note that the last job in flight has ended: who waited for it looks at the file now."""
        self.change(at_once=self._cost < _CHEAP)

    @property
    def redelivered(self) -> int:
        """How often files of finished jobs came again, as far as the file shows it."""
        return self._last[2]

    @property
    def due(self) -> float | None:
        """Monotonic time at which the file is to be written, or None."""
        return self._due

    def write(
        self,
        result: ScanResult,
        ready: int,
        in_flight: Mapping[str, str],
        stuck: Mapping[str, str],
        capped: Mapping[str, str] = _NONE,
        more: Mapping[str, Any] = _NONE,
    ) -> dict[str, Any]:
        """Write the file now.

        Args:
            result: What the last scan found.
            ready: How many prompts only wait for a worker.
            in_flight: Path of the prompt of each job at work, by job id.
            stuck: The same of each job that cannot finish for a reason of its own.
            capped: Why prompts wait at a cap, by their path.
            more: Further keys of the page.

        Raises:
            SpoolError: The disk failed.
        """
        began = self._processor()
        self._due = None  # also if it fails: a full disk is tried at the next change, not all the time
        try:
            page = self._page(result, ready, capped) | {"in_flight": _jobs(in_flight), "stuck": _jobs(stuck), **more}
            self._disk.jot(self._path, to_json(page, indent=1).encode())
            self.summary = _summary(page)
        finally:
            # Writing takes a hundredth of our time at most, however long the sums of the ledger take. A wait for a
            # locked ledger does not count: the status is needed most then.
            self._cost = self._processor() - began
            self._not_before = self._now() + max(_INTERVAL, 100 * self._cost)
        return page

    def _page(self, result: ScanResult, ready: int, capped: Mapping[str, str]) -> dict[str, Any]:
        now = self._clock()
        day, month = day_and_month(now)
        waiting = _with(result.waiting, capped)
        return {
            "schema": SCHEMA,
            "version": __version__,
            "state": self.state,
            "pid": os.getpid(),
            "updated": iso(now),
            "started": iso(self._started),
            "last_scan": iso(self.last_scan),
            "mode": self.mode,
            "polled": {
                "count": len(self.polled),
                "folders": {printable(path): self.polled[path] for path in sorted(self.polled)[:_MOST_NAMES]},
            },
            "inbox": printable(self._config.folders.inbox),
            "account": printable(self._config.shared.account) if self._config.shared.database else None,
            "notice": self.notice,
            "endpoint": self._config.endpoint.base_url,
            "waiting": {
                "ready": ready,
                "not_ready": waiting.total,
                "why": dict(sorted(waiting.kinds.items(), key=lambda kind: -kind[1])[:20]),
                "files": _named(waiting),
            },
            "ignored": {"count": result.ignored.total, "files": _named(result.ignored)},
            "holds": self._holds(),
            "notifications": self._notifications(),
            **self._sums(day[0].timestamp(), month[0].timestamp()),
        }

    def _sums(self, day: float, month: float) -> dict[str, Any]:
        """Return the sums of the ledger, or the last ones if it cannot be read, which a hold shows."""
        limits, ledger = self._config.limits, self._ledger
        with contextlib.suppress(SpoolError):
            self._last = ledger.totals(day), ledger.totals(month), ledger.redelivered(), ledger.balance()
        today, this_month, redelivered, balance = self._last
        return {
            "today": {**today, "cap": limits.credits_per_day or None},
            "month": {**this_month, "cap": limits.credits_per_month or None},
            "redelivered": redelivered,
            "balance": {"credits": balance[0], "at": iso(balance[1])} if balance else None,
        }

    def _notifications(self) -> dict[str, Any] | None:
        """Return how far notifications are; None if there is no receiver."""
        if self.events is None or not self.events.is_on:
            return None
        with contextlib.suppress(SpoolError):
            self._counts = self.events.counts()
        counts = self._counts
        return {
            "pending": counts.pending,
            "failed": counts.failed,
            "oldest_since": iso(counts.since),
            "last_failure": counts.message or None,
        }

    def _holds(self) -> list[dict[str, Any]]:
        now = self._now()
        return [
            {
                "kind": hold.kind,
                "provider": hold.provider or None,
                "folder": hold.folder or None,
                "reason": printable(known.text(hold.reason.message)),
                "since": iso(self._clock() - (self._now() - hold.began)),
                "next_try_at": self._admission.ends(hold),
                "next": hold.reason.next,
            }
            for hold in self._admission.holds()
            if not hold.brief or now < hold.until
        ]


def _with(waiting: Reasons, capped: Mapping[str, str]) -> Reasons:
    """Return why prompts wait, those that wait at a cap included."""
    if not capped:
        return waiting
    more = Reasons(waiting.most)
    for path, reason in capped.items():
        more.add(path, Wait.CAP, reason)
    return joined((waiting, more), waiting.most)


def _summary(page: Mapping[str, Any]) -> str:
    """Return what ``status --all`` shows of a daemon, as JSON."""
    holds = [{"kind": hold["kind"], "reason": hold["reason"], "next": hold["next"]} for hold in page["holds"]]
    waiting = page["waiting"]["ready"] + page["waiting"]["not_ready"]
    return to_json(
        {
            "state": page["state"],
            "updated": page["updated"],
            "waiting": waiting,
            "in_flight": len(page["in_flight"]),
            "stuck": len(page["stuck"]),
            "holds": holds,
        }
    )


def _jobs(sources: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"job": job, "source": printable(source)} for job, source in sources.items()]


def line(page: Mapping[str, Any]) -> str:
    """Return a status in one line, for ``systemctl status``."""
    waiting, today = page["waiting"], page["today"]
    parts = [
        f"{waiting['ready'] + waiting['not_ready']} waiting",
        f"{len(page['in_flight'])} in flight",
        f"today {today['completed']} completed, {today['refused']} refused, {today['unknown']} unknown",
        f"{amount(today['credits'])} credits",
    ]
    if page["stuck"]:
        parts.insert(2, f"{len(page['stuck'])} stuck")
    if page["state"] == "stopping":
        parts.insert(0, "waiting for requests in flight")
    parts += [f"on hold ({kind(hold)}): {hold['reason']}" for hold in page["holds"]]
    return "; ".join(parts)


def kind(hold: Mapping[str, Any]) -> str:
    """Return the kind of a hold, and the provider or folder whose prompts it concerns if not all."""
    provider, folder = hold.get("provider"), hold.get("folder")  # an older daemon did not write them
    if folder:
        return f"{hold['kind']}, folder {folder}"
    return f"{hold['kind']}, {provider}" if provider else str(hold["kind"])


def moment(text: str) -> datetime:
    """Return what ``iso`` wrote."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _named(reasons: Reasons) -> dict[str, str]:
    """Return names and their reasons; if there are very many, some of each first-level folder."""
    return {printable(path): reason for path, reason in reasons.some(_MOST_NAMES).items()}
