"""What was made, refused and spent, told from the ledger: as sums, for programs (JSON, CSV) and for people.

Days are those of UTC, like those of the caps.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagewatch.daemon.status import iso
from imagewatch.system.text import printable, to_json, utc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BY = ("day", "month", "provider", "folder", "owner")
_COLUMNS = (
    *("claimed_at", "sent_at", "answered_at", "source", "job", "outcome", "charged", "credits", "provider", "model"),
    *("asked", "got", "attempts", "status", "code", "message", "request_id", "redelivered"),
    *("transaction_id", "new_credit_balance", "owner", "balance_before", "balance_after"),
)
_TIMES = {"claimed_at", "sent_at", "answered_at"}


@dataclass
class Sum:
    """What a group of jobs came to.

    Attributes:
        name: What they have in common.
        completed: Jobs that were charged.
        refused: Jobs that were not, by the API or by our own checks.
        unknown: Jobs that may have been charged.
        credits: Known credits.
        unknown_cost: Charged jobs whose price nobody said.
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


def sums(jobs: Iterable[Mapping[str, Any]], by: str) -> list[Sum]:
    """Return one sum for each day, month, provider, folder or owner, in order."""
    found: dict[str, Sum] = {}
    for job in jobs:
        name = _group(job, by)
        found.setdefault(name, Sum(name)).add(job)
    return [found[name] for name in sorted(found)]


def _group(job: Mapping[str, Any], by: str) -> str:
    if by == "provider":
        return job["provider"] or "(none was asked)"
    if by == "folder":
        return os.path.dirname(job["source"]) or "(inbox)"
    if by == "owner":
        return job["owner"] or "(not known)"
    day = utc(job["sent_at"] or job["claimed_at"]).date().isoformat()
    return day if by == "day" else day[:7]


def plain(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as a program wants it: times as text in UTC."""
    return {name: iso(job[name]) if name in _TIMES else job[name] for name in _COLUMNS}


def as_json(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Return jobs as a JSON array, one job in a line."""
    lines = ",\n ".join(to_json(plain(job)) for job in jobs)
    return f"[{lines}]"


def as_csv(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Return jobs as CSV with a header (RFC 4180, but with line feeds).

    A cell that a spreadsheet would run as a formula gets an apostrophe before it: file names are chosen by strangers.
    """
    return table_csv(_COLUMNS, (plain(job).values() for job in jobs))


def table_csv(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
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
