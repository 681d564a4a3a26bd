"""The daemon's status in the text format of Prometheus. Pure.

https://prometheus.io/docs/instrumenting/exposition_formats/; names follow
https://prometheus.io/docs/practices/naming/. No sample has a time of its own: the textfile collector of node_exporter
takes none. No label has text that others wrote: each has a fixed set of values, except ``folder``,
which has the folders that have a budget in the configuration. Each series has its inbox as a label,
so that one machine may have several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imagewatch.daemon.status import moment
from imagewatch.inbox.candidate import Wait
from imagewatch.protocol.reasons import HOLDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Sample = tuple[dict[str, str], float]
"""Labels and a value."""
Family = tuple[str, str, str, "Sequence[Sample]"]
"""Name, type, help, samples."""
_PERIODS = {"day": "today", "month": "month"}
_OUTCOMES = ("completed", "refused", "unknown")
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def text(page: Mapping[str, Any]) -> str:
    """Return a status page (``imagewatch status --json``) as metrics."""
    inbox, lines = {"inbox": str(page["inbox"])}, []
    for name, kind, meaning, samples in _families(page):
        if samples:
            lines += [f"# HELP imagewatch_{name} {meaning}", f"# TYPE imagewatch_{name} {kind}"]
            lines += [f"imagewatch_{name}{_labels(inbox | labels)} {value:.15g}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def _families(page: Mapping[str, Any]) -> Iterator[Family]:
    waiting = page["waiting"]
    yield "up", "gauge", "Whether the daemon is running.", [({}, page["is_running"])]
    yield "build_info", "gauge", "Version of the daemon, always 1.", [({"version": page["version"]}, 1)]
    yield "last_scan_timestamp_seconds", "gauge", "Time of the last scan of the inbox.", _time(page["last_scan"])
    yield "status_timestamp_seconds", "gauge", "When the daemon last wrote its status.", _time(page["updated"])
    yield "ready_prompts", "gauge", "Prompts that could be claimed now.", [({}, waiting["ready"])]
    yield "not_ready_prompts", "gauge", "Prompts that may not be claimed yet, by reason.", _reasons(waiting["why"])
    yield "ignored_files", "gauge", "Files in the inbox that are not claimed.", [({}, page["ignored"]["count"])]
    yield "in_flight_jobs", "gauge", "Jobs in progress.", [({}, len(page["in_flight"]))]
    stuck = page.get("stuck", [])  # an older daemon does not write it
    yield "stuck_jobs", "gauge", "Jobs that cannot finish for a reason of their own.", [({}, len(stuck))]
    held = {one["kind"] for one in page["holds"] if not one.get("folder")}
    holds = [({"reason": kind}, float(kind in held)) for kind in HOLDS]
    yield "held", "gauge", "Whether nothing is sent for this reason.", holds
    jobs = [
        ({"period": period, "outcome": outcome}, page[key][outcome])
        for period, key in _PERIODS.items()
        for outcome in _OUTCOMES
    ]
    yield "period_jobs", "gauge", "Jobs of this day and this month (UTC), by outcome.", jobs
    spent = [({"period": period}, page[key]["credits"]) for period, key in _PERIODS.items()]
    yield "period_credits", "gauge", "Credits charged this day and this month (UTC).", spent
    caps = [({"period": period}, page[key]["cap"]) for period, key in _PERIODS.items() if page[key]["cap"]]
    yield "period_cap_credits", "gauge", "Most credits for a day and a month; absent without a cap.", caps
    yield from _budgets(page)
    if balance := page.get("balance"):  # an older daemon does not write it
        yield "balance_credits", "gauge", "Balance of the account in the last response.", [({}, balance["credits"])]
        yield "balance_timestamp_seconds", "gauge", "Time of that response.", _time(balance["at"])
    if sent := page.get("notifications"):  # an older daemon does not write it
        yield "pending_notifications", "gauge", "Notifications that wait to be delivered.", [({}, sent["pending"])]
        yield "failed_notifications", "gauge", "Notifications given up in the last 30 days.", [({}, sent["failed"])]
    again: list[Sample] = [({}, page["redelivered"])]
    yield "redelivered_prompts_total", "counter", "Prompts that a sync tool delivered again; skipped.", again


def _budgets(page: Mapping[str, Any]) -> Iterator[Family]:
    budgets = page.get("budgets", [])  # an older daemon does not write them
    held = {one.get("folder") for one in page["holds"]}
    waits = [({"folder": one["folder"]}, float(one["folder"] in held)) for one in budgets]
    yield "budget_held", "gauge", "Whether prompts of this folder wait at its budget.", waits
    both = [
        ({"folder": one["folder"], "period": period}, one[key]) for one in budgets for period, key in _PERIODS.items()
    ]
    spent = [(labels, sums["credits"]) for labels, sums in both]
    yield "budget_credits", "gauge", "Credits that count as spent in this folder this day and this month (UTC).", spent
    caps = [(labels, sums["cap"]) for labels, sums in both if sums["cap"]]
    yield "budget_cap_credits", "gauge", "Most credits for a day and a month; absent without a cap.", caps


def _time(when: str | None) -> list[Sample]:
    return [({}, moment(when).timestamp())] if when else []


def _reasons(why: Mapping[str, int]) -> list[Sample]:
    """Return how many prompts wait for each reason; reasons of another version are one."""
    known = [({"reason": wait.value}, float(why.get(wait, 0))) for wait in Wait]
    return [*known, ({"reason": "other"}, float(sum(why.values()) - sum(why.get(wait, 0) for wait in Wait)))]
