"""``imagewatch status``: what the daemon's status file says, for people, for programs and for Prometheus."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands import metrics, status_all
from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.state import local_time, status_page
from imagewatch.daemon.status import kind
from imagewatch.inbox.advice import for_name
from imagewatch.inbox.candidate import Wait
from imagewatch.inbox.listing import why_near_miss
from imagewatch.protocol.names import STATUS_TEXT
from imagewatch.system.exits import EXIT_HELD
from imagewatch.system.text import amount, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATES = {
    "stopped": "is not running (it was stopped)",
    "died": "is not running (it was killed; the next start continues its jobs)",
    "starting": "is starting",
    "stopping": "is stopping; it waits for the requests in flight",
}

_MOST_FOLDERS = 10
"""At most so many of the folders in which prompts wait are named."""


@click.command()
@json_option
@click.option(
    "--prometheus",
    is_flag=True,
    help="Print metrics for Prometheus (node_exporter's textfile collector); exit code 0 also while on hold",
)
@click.option("--all", "for_all", is_flag=True, help="Show all daemons of the account, on all hosts; needs [shared]")
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C")
@config_option
def status(path: str | None, *, as_json: bool, prometheus: bool, for_all: bool, watch: bool) -> None:
    """Show what the daemon does: prompts, requests, holds, credits.

    Also works while the daemon is not running. Exits with code 69 while the queue is on hold, also if only the prompts
    of one provider or folder wait, as at a cap or a budget that is reached.

    If daemons share an account in a database, the sums are those of the account; on an idle host, they are as of its
    last scan, up to inbox.rescan_seconds ago. --all shows each daemon of the account as it last reported itself, at
    most a quarter of shared.lease_seconds ago while it runs. It exits with code 69 while the account or one of its
    daemons is on hold.
    """
    if prometheus and (as_json or watch or for_all):
        other = "--json" if as_json else "--all" if for_all else "--watch"
        raise click.UsageError(f"--prometheus and {other} cannot be used together")
    config = load_config(path)
    if prometheus:
        click.echo(metrics.text(status_page(config)), nl=False)
        return
    wait = threading.Event().wait
    while True:
        page = status_all.account_page(config) if for_all else status_page(config)
        if watch and not as_json and sys.stdout.isatty():
            click.echo("\033[H\033[J", nl=False, color=True)  # also with NO_COLOR
        click.echo(to_json(page) if as_json else "\n".join((status_all.lines if for_all else _lines)(page)))
        if not watch:
            break
        wait(2.0)
    is_held = status_all.is_held(page) if for_all else bool(page["holds"])
    sys.exit(EXIT_HELD if is_held else 0)


def _lines(page: dict[str, Any]) -> Iterator[str]:
    state = _STATES.get(page["state"], "is running")
    yield f"imagewatch {page['version']} {state}, as of {local_time(page['updated'])}"
    yield from _places(page)
    yield from _waiting(page)
    yield f"  in flight  {len(page['in_flight'])}"
    for job in page["in_flight"]:
        yield f"             {job['source']}"
    if stuck := page.get("stuck"):  # an older daemon does not write it
        yield click.style(f"  stuck      {len(stuck)}; the log has the reason and the next step", fg="red")
        yield from (f"             {job['source'] or job['job']}" for job in stuck)
    whose = f", account {page['account']}" if page.get("account") else ""  # an older daemon does not write it
    for name, label in (("today", "today"), ("month", "this month")):
        one = page[name]
        cap = f" of {amount(one['cap'])}" if one["cap"] else ""
        yield (
            f"  {label:<10} {one['completed']} completed, {one['refused']} refused, {one['unknown']} unknown, "
            f"{amount(one['credits'])}{cap} credits (UTC{whose})"
        )
    yield from _budgets(page.get("budgets", []))  # the same
    if balance := page.get("balance"):  # an older daemon does not write it
        yield f"  balance    {amount(balance['credits'])} credits, as of {local_time(balance['at'])}"
    if sent := page.get("notifications"):  # an older daemon does not write it
        yield _notified(sent)
    if page["ignored"]["count"]:
        yield f"  ignored    {page['ignored']['count']}"
        for name, reason in page["ignored"]["files"].items():
            yield f"             {name}: {reason}{_step(name, reason)}"
    for one in page["holds"]:
        next_try = f"; next try at {local_time(one['next_try_at'])}" if one["next_try_at"] else ""
        yield click.style(f"  on hold    {kind(one)}: {one['reason']}{next_try}", fg="red")
        yield f"             {one['next']}"


def _waiting(page: dict[str, Any]) -> Iterator[str]:
    if not page["is_running"]:  # what was dropped since then is not in the page
        yield "  waiting    not known while it does not run; imagewatch check lists the prompts"
        return
    waiting = page["waiting"]
    yield f"  waiting    {waiting['ready'] + waiting['not_ready']}" + _why(waiting["why"])
    yield from _folders(page.get("folders", []))  # an older daemon does not write it


def _places(page: dict[str, Any]) -> Iterator[str]:
    yield f"  inbox      {page['inbox']} ({page['mode']}, last scan {local_time(page['last_scan'])})"
    for path, reason in page["polled"]["folders"].items():
        yield f"             {path}: scanned regularly ({reason})"
    if place := page.get("notice"):  # an older daemon does not write it
        yield f"  status     {place['folder']}/{STATUS_TEXT}"
        if place["problem"]:
            yield click.style(f"             not written: {place['problem']}", fg="red")


def _step(name: str, reason: str) -> str:
    """Return what to do about an ignored file if its name is almost a prompt's."""
    file = name.rpartition("/")[2]
    return f"; {for_name(file)}" if reason == why_near_miss(file) else ""


def _folders(folders: list[dict[str, Any]]) -> Iterator[str]:
    """Name the first-level folders that take turns, unless all prompts are directly in the inbox."""
    if all(not one["folder"] for one in folders):
        return
    for one in folders[:_MOST_FOLDERS]:
        yield f"             {one['folder'] + '/' if one['folder'] else 'the inbox itself'}: {one['waiting']}"
    if len(folders) > _MOST_FOLDERS:
        yield "             and other folders, which status --json names"


def _budgets(budgets: list[dict[str, Any]]) -> Iterator[str]:
    """Show what of each budget is spent; caps that are not set are left out."""
    for one in budgets:
        parts = [
            f"{amount(one[name]['credits'])} of {amount(one[name]['cap'])} credits {label}"
            for name, label in (("today", "today"), ("month", "this month"))
            if one[name]["cap"]
        ]
        if one["reserved"]:
            parts.append(f"{amount(one['reserved'])} reserved")
        if one["requests_per_minute"]:
            parts.append(f"{amount(one['requests_per_minute'])} requests per minute")
        yield f"  budget     {one['folder']}/: {', '.join(parts) or 'no cap is set'}"


def _notified(sent: dict[str, Any]) -> str:
    """Return how far notifications are, in red if they fail."""
    since = f" since {local_time(sent['oldest_since'])}" if sent["pending"] else ""
    failed = f", {sent['failed']} given up" if sent["failed"] else ""
    last = f"; last failure: {sent['last_failure']}" if sent["last_failure"] else ""
    line = f"  notify     {sent['pending']} pending{since}{failed}{last}"
    return click.style(line, fg="red") if last or failed else line


def _why(reasons: dict[str, int]) -> str:
    texts = {wait.value: wait.text for wait in Wait}  # a daemon of another version may have other reasons
    return f" ({', '.join(f'{count} {texts.get(key, key)}' for key, count in reasons.items())})" if reasons else ""
