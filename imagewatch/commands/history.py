"""``imagewatch history``: the jobs in the ledger, as a table, as sums, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands.balances import with_balances
from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.ledger import open_ledger
from imagewatch.commands.terminal import print_table, shown
from imagewatch.journal.budget import day_and_month
from imagewatch.protocol.names import SUFFIX
from imagewatch.system.errors import UsageError
from imagewatch.system.text import amount, iso, printable, to_json, utc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_COLUMNS = (
    *("claimed_at", "sent_at", "answered_at", "source", "job", "outcome", "charged", "credits", "provider", "model"),
    *("asked", "got", "attempts", "status", "code", "message", "request_id", "redelivered"),
    *("transaction_id", "new_credit_balance", "owner", "balance_before", "balance_after"),
)
_INSTANCE = "instance"
"""The daemon that a job is of: a column more if daemons share a database."""
_TIMES = {"claimed_at", "sent_at", "answered_at"}
_COLORS = {"completed": "green", "refused": "yellow", "invalid": "yellow", "unknown": "red", "unreadable": "red"}


@click.command()
@click.option(
    "--by",
    type=click.Choice(["day", "month", "provider", "folder", "owner", _INSTANCE]),
    help="Show sums instead of single jobs",
)
@click.option(
    "--days",
    type=click.IntRange(1, 36_500),
    metavar="NUMBER",
    help="Show only this number of days, including today (UTC)",
)
@click.option(
    "--limit",
    type=click.IntRange(0, 10**9),
    metavar="NUMBER",
    help="Show this number of newest jobs; 0 shows all; without it: 20",
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV for spreadsheets")
@config_option
def history(
    by: str | None, days: int | None, limit: int | None, path: str | None, *, as_json: bool, as_csv: bool
) -> None:
    """Show completed, refused and unknown jobs and their cost.

    The ledger has every finished job. Days are UTC, as for the caps.

    If daemons share an account in a database, the jobs of all of them are shown, each with its instance (the daemon).
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv cannot be used together")
    config = load_config(path)
    if by == _INSTANCE and not config.shared.database:
        raise UsageError(
            "--by instance shows the daemons that share a database, and [shared] database is not set",
            hint="use another group, such as --by folder",
        )
    today = day_and_month(time.time())[0][0].timestamp()
    since = today - (days - 1) * 86_400 if days else 0.0
    is_whole = by or as_json or as_csv or days
    newest = limit or None if limit is not None or is_whole else 20
    with open_ledger(config) as ledger:
        jobs = [with_balances(job, ledger) for job in ledger.jobs(since, newest)]
        totals = ledger.totals(since)
    if by:
        _show_sums(_sums(jobs, by), by, as_json=as_json, as_csv=as_csv)
    elif as_json or as_csv:
        click.echo(_as_json(jobs) if as_json else _as_csv(jobs, is_shared=bool(config.shared.database)), nl=as_json)
    else:
        _show_jobs(jobs, totals)


def _show_sums(found: Sequence[Sum], by: str, *, as_json: bool, as_csv: bool) -> None:
    columns = ("completed", "refused", "unknown", "credits", "unknown_cost")
    rows = [{by: one.name, **{name: getattr(one, name) for name in columns}} for one in found]
    if as_json:
        click.echo(to_json(rows, indent=1))
    elif as_csv:
        click.echo(_table_csv((by, *columns), [row.values() for row in rows]), nl=False)
    else:
        head = (f"{by} (UTC)" if by in {"day", "month"} else by, *columns)
        print_table(head, [[shown(value) for value in row.values()] for row in rows])


def _show_jobs(jobs: Sequence[dict[str, Any]], totals: dict[str, float]) -> None:
    if not jobs:
        click.echo("No job has ended yet.")
        return
    is_shared = _INSTANCE in jobs[0]
    outcomes = ["unreadable" if job["charged"] == "yes" and not job["got"] else job["outcome"] for job in jobs]
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job["sent_at"] or job["claimed_at"])),
            *([shown(job[_INSTANCE])] if is_shared else []),
            outcome,
            shown(job["credits"]),
            shown(job["provider"]),
            shown(job["got"] or None),
            printable(job["source"].removesuffix(SUFFIX), 100),
        ]
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]
    print_table(
        ("time", *([_INSTANCE] if is_shared else []), "outcome", "credits", "provider", "images", "prompt"),
        rows,
        colors=[_COLORS.get(outcome) for outcome in outcomes],
        notes=[printable("; ".join(filter(None, (job["message"], job["balances"]))), 400) for job in jobs],
    )
    completed, refused, unknown = (int(totals[name]) for name in ("completed", "refused", "unknown"))
    spent = amount(totals["credits"])
    click.echo(f"\nTotal: {completed} completed, {refused} refused or invalid, {unknown} unknown, {spent} credits.")


@dataclass
class Sum:
    """The sum of a group of jobs.

    Attributes:
        name: The group: a day, month, provider, folder, owner or instance.
        completed: Jobs that were charged.
        refused: Jobs that were not, because the API or our own checks declined them.
        unknown: Jobs that may have been charged.
        credits: Known credits.
        unknown_cost: Charged jobs whose amount was not reported.
    """

    name: str
    completed: int = 0
    refused: int = 0
    unknown: int = 0
    credits: float = 0.0
    unknown_cost: int = 0

    def add(self, job: Mapping[str, Any]) -> None:
        """Count a job."""
        self.completed += job["charged"] == "yes"
        self.unknown += job["charged"] == "unknown"
        self.refused += job["outcome"] in {"refused", "invalid"}
        self.credits += job["credits"] or 0.0
        self.unknown_cost += job["charged"] == "yes" and job["credits"] is None


def _sums(jobs: Iterable[Mapping[str, Any]], by: str) -> list[Sum]:
    """Return one sum for each day, month, provider, folder, owner or instance, in order."""
    found: dict[str, Sum] = {}
    for job in jobs:
        name = _group(job, by)
        found.setdefault(name, Sum(name)).add(job)
    return [found[name] for name in sorted(found)]


def _group(job: Mapping[str, Any], by: str) -> str:
    if by == "provider":
        return job["provider"] or "(none)"
    if by == "folder":
        return os.path.dirname(job["source"]) or "(inbox)"
    if by == "owner":
        return job["owner"] or "(unknown)"
    if by == _INSTANCE:
        return str(job[_INSTANCE])
    day = utc(job["sent_at"] or job["claimed_at"]).date().isoformat()
    return day if by == "day" else day[:7]


def _plain(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job for programs: times are text in UTC."""
    plain = {name: iso(job[name]) if name in _TIMES else job[name] for name in _COLUMNS}
    return {**plain, _INSTANCE: job[_INSTANCE]} if _INSTANCE in job else plain


def _as_json(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Return jobs as a JSON array, one job in a line."""
    lines = ",\n ".join(to_json(_plain(job)) for job in jobs)
    return f"[{lines}]"


def _as_csv(jobs: Iterable[Mapping[str, Any]], *, is_shared: bool) -> str:
    """Return jobs as CSV with a header (RFC 4180, but with line feeds).

    A cell that a spreadsheet would run as a formula gets an apostrophe before it: other people choose file names.
    """
    columns = (*_COLUMNS, _INSTANCE) if is_shared else _COLUMNS
    return _table_csv(columns, (_plain(job).values() for job in jobs))


def _table_csv(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as ``as_csv`` does."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str):
        shown = printable(value)
        return f"'{shown}" if shown[:1] in {"=", "+", "-", "@"} else shown
    return value
