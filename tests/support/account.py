"""Daemons of one account in a real PostgreSQL, and what must be true of them after a fault."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemon import TESTS, Folders

if TYPE_CHECKING:
    from support.postgres import Server

RUNNER = str(TESTS / "support/shared_runner.py")
TIMEOUTS = 3.0
"""Longer than all times that are waited for in a process of the runner, seconds."""


class Member(Folders):
    """The folders of one daemon of an account."""

    account: Account
    instance: str

    def job_states(self) -> dict[str, str]:
        rows = self.account.rows("SELECT id, state FROM imagewatch.jobs WHERE instance = %s", self.instance)
        return dict(rows)

    def status(self) -> dict[str, Any]:
        """What the daemon shows of itself; empty while there is none."""
        path = self.state / "status.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def holds(self) -> list[str]:
        """The kinds of hold in its status."""
        return [hold["kind"] for hold in self.status().get("holds", [])]


class Account:
    """An account in a database.

    Args:
        server: The PostgreSQL.
        uri: How to connect to the database, without a proxy.
        root: Where the folders of its daemons are made.
    """

    def __init__(self, server: Server, uri: str, root: Path) -> None:
        from imagewatch.journal.postgres.place import Place  # noqa: PLC0415  psycopg may be missing
        from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415

        self.server, self.uri, self._root = server, uri, root
        self.members: list[Member] = []
        initialize(Place(uri, "main", inbox="", instance="", is_replicated=False))

    def member(self, name: str, base_url: str, database: str = "", **settings: Any) -> Member:
        """Make the folders of a daemon.

        Args:
            name: Its instance.
            base_url: The endpoint.
            database: How it connects; without a proxy, if it is empty.
            settings: More of the configuration.
        """
        shared = {"database": database or self.uri, "durability": "single", "instance": name}
        given = {**{f"shared__{key}": value for key, value in shared.items()}, **settings}
        made = Member(self._root / name, base_url, **given)
        made.account, made.instance = self, name
        self.members.append(made)
        return made

    def rows(self, question: str, *values: object) -> list[Any]:
        """Ask the database."""
        return self.server.psql(question, self.uri.rpartition("/")[2], values or None)

    def open(self) -> list[Any]:
        """Jobs that are not over, and attempts without a result."""
        return self.rows(
            "SELECT id, state FROM imagewatch.jobs WHERE state NOT IN ('done', 'kept') "
            "UNION ALL SELECT job, outcome FROM imagewatch.attempts WHERE outcome = 'sent'"
        )

    def finished(self) -> dict[str, str]:
        """Each prompt of all daemons that has a result file, and its destination."""
        return {stem: end for member in self.members for stem, end in member.finished().items()}

    def is_over(self, count: int) -> bool:
        """Whether so many prompts have a result, and nothing is left of their jobs."""
        return (
            sum(len(member.finished()) for member in self.members) == count
            and not self.open()
            and not any(member.leftovers() for member in self.members)
        )

    def audit(self, report: dict[str, Any], stems: set[str], most_unknown: int = 0) -> None:
        """Compare the ledger, the folders and what the endpoint has received and charged.

        Args:
            report: The endpoint's. The text of each prompt is its base name, and a tag perhaps.
            stems: The prompts.
            most_unknown: Of how many the charge may be unknown.
        """
        asked = Counter(call["prompt"].split()[0] for call in report["calls"])
        assert set(asked) <= stems
        assert [stem for stem, count in asked.items() if count > 1] == [], "none was sent twice"
        finished = self.finished()
        assert set(finished) == stems, "none was lost"
        unknown = {
            Path(source).name.removesuffix(".prompt.txt"): (outcome, charged)
            for source, outcome, charged in self.rows("SELECT source, outcome, charged FROM imagewatch.attempts")
            if charged == "unknown"
        }
        assert {outcome for outcome, _ in unknown.values()} <= {"unknown"}
        charged = {call["prompt"].split()[0]: call["credits"] for call in report["calls"] if call["credits"]}
        rows = self.rows("SELECT source, credits FROM imagewatch.attempts WHERE charged = 'yes'")
        recorded = {Path(source).name.removesuffix(".prompt.txt"): amount for source, amount in rows}
        assert len(recorded) == len(rows), "one charge for each prompt"
        cut_off = {stem for stem, amount in recorded.items() if amount is None}  # only the beginning had arrived
        assert len(unknown) + len(cut_off) <= most_unknown, (unknown, cut_off)
        assert {stem: amount for stem, amount in recorded.items() if stem not in cut_off} == {
            stem: amount for stem, amount in charged.items() if stem not in unknown.keys() | cut_off
        }
        published = {stem for stem, end in finished.items() if end == "outbox"}
        assert published == recorded.keys() - cut_off, "what was paid is there"
        ((total,),) = self.rows("SELECT coalesce(sum(credits), 0) FROM imagewatch.sums")
        assert total == sum(filter(None, recorded.values())), "what caps count"


def wait_until_stopped(pid: int, seconds: float = 20.0) -> bool:
    """Wait until a process has stopped itself, or is over; return whether it is stopped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZ":
            return state == "T"
        threading.Event().wait(0.01)
    return False
