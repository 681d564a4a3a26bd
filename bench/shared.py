"""Daemons that share an account in PostgreSQL, beside one daemon with SQLite: jobs in a second, waits, cost."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from contenders import DAEMON, Contender
from daemon import COMMAND, PAUSE, TICKS, environment
from figures import Check, Figure, Row, percentile, ratio
from plan import say
from stamping import Stamping
from support.postgres import Server
from support.postgres import missing as missing_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plan import Bench

SLOTS = 8
SMALL = 2000
"""Bytes of an image: what is measured is the journal."""
EVERY = 0.03  # seconds between prompts while slots are free
COUNTED = 1.5  # seconds until a session of PostgreSQL has counted its commits
SQLITE = "SQLite, 1 daemon"
KINDS = {SQLITE: 0, "PostgreSQL, 1 daemon": 1, "PostgreSQL, 2 daemons": 2, "PostgreSQL, 4 daemons": 4}
"""How many daemons share a database; 0: there is none."""
GOAL = "PostgreSQL, 2 daemons"


@dataclass(frozen=True)
class Found:
    """What one run has shown.

    Attributes:
        rate: Jobs in a second.
        cpu: Of the daemons for a job, seconds.
        server_cpu: Of PostgreSQL for a job, seconds.
        commits: Transactions for a job.
        claimed: From a drop to the claim, seconds, while slots are free.
    """

    rate: float
    cpu: float
    server_cpu: float
    commits: float
    claimed: list[float]


def shared(bench: Bench) -> list[Row]:
    """Measure daemons with one account."""
    if reason := missing_postgres():
        say(f"shared is skipped: {reason}")
        return []
    found: dict[str, list[Found]] = {label: [] for label in KINDS}
    with Stamping() as endpoint, Server(in_memory=False) as server:
        for run in range(bench.amount.runs):
            for label, count in KINDS.items():
                say(f"shared, run {run + 1}: {label}")
                found[label].append(_run(bench, endpoint, server, count))
    return rows(found, f"{bench.amount.jobs} prompts at the same time, images of {SMALL // 1000} kB, latency 0")


def rows(found: dict[str, list[Found]], work: str) -> list[Row]:
    """Return the rows and bounds."""
    figures = {
        what: {label: Figure(label, unit, [value(one) for one in runs]) for label, runs in found.items()}
        for what, unit, value in (
            ("rate", "/s", lambda one: one.rate),
            ("cpu", "ms", lambda one: one.cpu * 1000),
            ("server", "ms", lambda one: one.server_cpu * 1000),
            ("commits", "", lambda one: one.commits),
            ("claimed", "ms", lambda one: percentile(one.claimed, 0.95) * 1000),
        )
    }
    rate, claimed = figures["rate"], figures["claimed"]
    several = [label for label, count in KINDS.items() if count]
    speed = [Check("two daemons, jobs/s", rate[GOAL], 100, at_most=False)]
    ratios = [Figure(label, "", ratio(rate[label], rate[SQLITE]).values) for label in several]
    return [
        Row(f"jobs/s for an account, {SLOTS} slots each, {work}", list(rate.values()), speed),
        Row(f"the same / {SQLITE}", ratios),
        Row("drop → claim, p95, while slots are free", list(claimed.values()), [Check("ms", claimed[GOAL], 250)]),
        Row("CPU per job, daemons, same work as the first row", list(figures["cpu"].values())),
        Row("CPU per job, PostgreSQL", [figures["server"][label] for label in several]),
        Row("commits per job in PostgreSQL", [figures["commits"][label] for label in several]),
    ]


def _run(bench: Bench, endpoint: Stamping, server: Server, count: int) -> Found:
    uri = server.database() if count else ""
    name = uri.rpartition("/")[2]
    try:
        with contextlib.ExitStack() as stack:
            daemons = [stack.enter_context(one) for one in _daemons(bench.root / "work", endpoint, uri, max(count, 1))]
            endpoint.take(0, SMALL)
            before = _commits(server, name)
            busy, jobs = sum(one.cpu() for one in daemons), bench.amount.jobs
            serving, began = _server_cpu(server), time.monotonic()
            _finish([(one, [one.drop()[0] for _ in range(jobs // len(daemons))]) for one in daemons])
            took, jobs = time.monotonic() - began, jobs // len(daemons) * len(daemons)
            busy, serving = sum(one.cpu() for one in daemons) - busy, _server_cpu(server) - serving
            commits = _commits(server, name) - before
            claimed = _claims(daemons, server, name, 4 * bench.amount.drops)
        return Found(jobs / took, busy / jobs, serving / jobs, commits / jobs, claimed)
    finally:
        if count:
            server.drop(name)


def _daemons(root: Path, endpoint: Stamping, uri: str, count: int) -> Iterator[Contender]:
    settings = {"shared__database": uri, "shared__durability": "single"} if uri else {}
    if uri:
        environ = environment(root, endpoint.base_url, **settings)
        subprocess.run([*COMMAND, "db", "init"], env=environ, check=True, capture_output=True)
    for number in range(count):
        given = {**settings, "shared__instance": f"daemon{number}"} if uri else {}
        environ = environment(root / str(number), endpoint.base_url, limits__concurrency=SLOTS, **given)
        yield Contender(DAEMON, root / str(number), endpoint, SLOTS, environ)


def _finish(dropped: list[tuple[Contender, list[str]]]) -> None:
    for daemon, names in dropped:
        if daemon.finish(names) is None:
            sys.exit("not all prompts were done")


def _claims(daemons: list[Contender], server: Server, name: str, drops: int) -> list[float]:
    """Drop prompts one after the other into one inbox after the other; return the seconds until each was claimed."""
    dropped: dict[tuple[str, str], float] = {}
    waiting: list[tuple[Contender, list[str]]] = [(daemon, []) for daemon in daemons]
    for number in range(drops):
        daemon, names = waiting[number % len(daemons)]
        at = time.time()
        job, _ = daemon.drop()
        names.append(job)
        dropped[f"daemon{number % len(daemons)}", f"{job}.prompt.txt"] = at
        PAUSE(EVERY)
    _finish(waiting)
    found = _claimed_at(daemons[0], server, name)
    return [found[key] - at for key, at in dropped.items()]


def _claimed_at(daemon: Contender, server: Server, name: str) -> dict[tuple[str, str], float]:
    rows: list[Any]
    if name:
        rows = server.psql("SELECT instance, source, claimed_at FROM imagewatch.attempts", name)
    else:
        with contextlib.closing(sqlite3.connect(daemon.root / "state/ledger.sqlite3")) as ledger:
            rows = ledger.execute("SELECT 'daemon0', source, claimed_at FROM attempts").fetchall()
    return {(instance, source): at for instance, source, at in rows}


def _commits(server: Server, name: str) -> int:
    """Return how many transactions a database has committed."""
    if not name:
        return 0
    PAUSE(COUNTED)
    ((count,),) = server.psql("SELECT xact_commit FROM pg_stat_database WHERE datname = %s", parameters=[name])
    return int(count)


def _server_cpu(server: Server) -> float:
    """Return the CPU time used so far by all processes of PostgreSQL, seconds."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if server.pid in (int(path.parent.name), int(fields[1])):
                total += sum(int(field) for field in fields[11 : 15 if server.pid == int(path.parent.name) else 13])
    return total / TICKS
