"""``imagewatch status --all``: all daemons of a shared account, as the database has them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands.state import local_time, usable_journal
from imagewatch.daemon.status import shared_holds
from imagewatch.journal.account import SHARED
from imagewatch.journal.budget import day_and_month
from imagewatch.protocol.reasons import HOLDS, Others
from imagewatch.system.errors import UsageError
from imagewatch.system.text import amount, iso, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.journal.account import Member

_COUNTS = ("waiting", "in_flight", "stuck")


def account_page(config: Config) -> dict[str, Any]:
    """Return what is known of the account and its daemons, for programs.

    Raises:
        UsageError: There is no shared database.
        SpoolError: It cannot be used.
    """
    if not config.shared.database:
        raise UsageError(
            "--all shows the daemons that share a database, and [shared] database is not set",
            hint="without --all, the command shows the daemon of this configuration",
        )
    with usable_journal(config) as journal:
        members, holds = journal.account.members(), journal.account.holds()
        now = journal.clock()
        day, month = (one[0].timestamp() for one in day_and_month(now))
        today, this_month = journal.ledger.totals(day), journal.ledger.totals(month)
    limits = config.limits
    return {
        "account": printable(config.shared.account),
        "at": iso(now),
        "today": {**today, "cap": limits.credits_per_day or None},
        "month": {**this_month, "cap": limits.credits_per_month or None},
        "holds": shared_holds(holds, now),
        "instances": [_instance(member, config.shared.lease_seconds) for member in members],
    }


def _instance(member: Member, lease_seconds: float) -> dict[str, Any]:
    found = _reported(member.status)
    state = "not_seen" if member.unseen_seconds >= lease_seconds else "running"
    state = "stopped" if member.ended_at is not None else state
    return {
        "instance": printable(member.name),
        "host": printable(member.host),
        "inbox": printable(member.folder),
        "version": printable(member.version),
        "state": state,
        "started": iso(member.started_at),
        "seen": iso(member.seen_at),
        "stopped": iso(member.ended_at),
        **{name: found[name] if isinstance(found.get(name), int) else None for name in _COUNTS},
        "holds": _holds(found.get("holds"), is_running=state == "running"),
    }


def _holds(reported: object, *, is_running: bool) -> list[dict[str, str]]:
    """Return the holds of a daemon alone; of one that does not run those that its next start finds.

    Those of the account are in the database, and what a daemon has reported of them may be over.
    """
    found = [one for one in reported if isinstance(one, dict)] if isinstance(reported, list) else []
    lasting = {kind.name for kind in HOLDS.values() if kind.is_account or kind.others is Others.PERSON}
    return [
        {name: printable(str(one.get(name, ""))) for name in ("kind", "reason", "next")}
        for one in found
        if one.get("kind") not in SHARED and (is_running or one.get("kind") in lasting)
    ]


def _reported(text: str) -> Mapping[str, Any]:
    """Return what a daemon has written of itself; nothing if that cannot be read: it may be of another version."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_held(page: Mapping[str, Any]) -> bool:
    """Return whether the account, or one of its daemons, is on hold."""
    return bool(page["holds"]) or any(one["holds"] for one in page["instances"])


def lines(page: Mapping[str, Any]) -> Iterator[str]:
    """Return the page in lines, for people."""
    count = len(page["instances"])
    daemons = "1 daemon" if count == 1 else f"{count} daemons"
    yield f"account {page['account']}: {daemons}, as of {local_time(page['at'])}"
    for name, label in (("today", "today"), ("month", "this month")):
        one = page[name]
        cap = f" of {amount(one['cap'])}" if one["cap"] else ""
        yield (
            f"  {label:<10} {one['completed']} completed, {one['refused']} refused, {one['unknown']} unknown, "
            f"{amount(one['credits'])}{cap} credits (UTC)"
        )
    for hold in page["holds"]:
        next_try = f"; next try at {local_time(hold['next_try_at'])}" if hold["next_try_at"] else ""
        yield click.style(f"  on hold    {hold['kind']}: {hold['reason']}{next_try}", fg="red")
        yield f"             {hold['next']}"
    for one in page["instances"]:
        yield ""
        yield from _block(one)


def _block(one: Mapping[str, Any]) -> Iterator[str]:
    state = {
        "running": "running",
        "stopped": f"stopped since {local_time(one['stopped'])}",
        "not_seen": click.style(f"not seen since {local_time(one['seen'])}", fg="red"),
    }[one["state"]]
    yield f"{one['instance']}: {state}"
    yield f"  host       {one['host']} (imagewatch {one['version']})"
    yield f"  inbox      {one['inbox']}"
    if one["state"] != "running":
        yield f"             the numbers are those of {local_time(one['seen'])}"
    for name in _COUNTS:
        label, value = name.replace("_", " "), "not known" if one[name] is None else one[name]
        if name != "stuck" or one[name]:
            yield click.style(f"  {label:<10} {value}", fg="red" if name == "stuck" else None)
    for hold in one["holds"]:
        yield click.style(f"  on hold    {hold['kind']}: {hold['reason']}", fg="red")
        yield f"             {hold['next']}"
