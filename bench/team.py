"""One inbox that several daemons process together: jobs in a second, waits, and the use of all slots."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from contenders import DAEMON, Contender
from daemon import COMMAND, PAUSE, environment
from figures import Check, Figure, Row, percentile, ratio
from plan import say
from shared import EVERY, SMALL
from stamping import SIZE, Stamping
from support.postgres import Server
from support.postgres import missing as missing_postgres
from throughput import busy_slots

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from plan import Bench

SLOTS = 8
COUNTS = (1, 2, 4)
MANY, MANY_SLOTS, SECONDS = 3, 32, 2.0
_START = """
for n in $(seq "$0"); do
    IMAGEWATCH_SHARED__INSTANCE=d$n IMAGEWATCH_FOLDERS__STATE="$1/state$n" "$2" -m imagewatch run &
done
wait
"""


def team(bench: Bench) -> list[Row]:
    """Measure daemons with one inbox."""
    if reason := missing_postgres():
        say(f"team is skipped: {reason}")
        return []
    labels = {count: f"{count} daemon{'s' * (count > 1)}" for count in COUNTS}
    rate, cpu, waits = ({count: Figure(label, unit) for count, label in labels.items()} for unit in ("/s", "ms", "ms"))
    with Stamping() as endpoint, Server(in_memory=False) as server:
        for run in range(bench.amount.runs):
            for count in COUNTS:
                say(f"team, run {run + 1}: {labels[count]}")
                with _daemons(bench.root / "work", endpoint, server, count, SLOTS) as (daemons, name):
                    speed, busy = _together(daemons, bench.amount.jobs)
                    rate[count].values.append(speed)
                    cpu[count].values.append(busy * 1000)
                    waits[count].values.append(
                        percentile(_waits(daemons, server, name, 4 * bench.amount.drops), 0.95) * 1000
                    )
        use = [row for size in (SMALL, SIZE) for row in _use(bench, endpoint, server, size)]
    work = f"{bench.amount.jobs} prompts at the same time, images of {SMALL // 1000} kB, latency 0"
    several = Figure("2 daemons / 1", "", ratio(rate[2], rate[1]).values)
    return [
        Row(
            f"jobs/s for an inbox, {SLOTS} slots each, {work}",
            list(rate.values()),
            [Check("two daemons, jobs/s", rate[2], 100, at_most=False)],
        ),
        Row("the same, as a ratio", [several, Figure("4 daemons / 1", "", ratio(rate[4], rate[1]).values)]),
        Row("drop → request, p95, while slots are free", list(waits.values()), [Check("ms", waits[2], 250)]),
        Row("CPU per job, daemons, same work as the first row", list(cpu.values())),
        *use,
    ]


def _use(bench: Bench, endpoint: Stamping, server: Server, size: int) -> list[Row]:
    """Measure how many slots of many daemons are busy, beside daemons that share nothing."""
    use, apart, peak = (Figure(name, "") for name in ("PostgreSQL, one inbox", "SQLite, an inbox each", "in flight"))
    many, work = MANY * MANY_SLOTS, bench.root / "work"
    for run in range(max(1, bench.amount.runs // 2)):
        say(f"team, run {run + 1}: {MANY} daemons, {MANY_SLOTS} slots each, images of {size // 1000} kB")
        with _daemons(work, endpoint, server, MANY, MANY_SLOTS) as (daemons, _):
            used, most = busy_slots([daemons], bench.amount.rounds, SECONDS, size)
        use.values.append(used)
        peak.values.append(most)
        with _apart(work, endpoint) as alone:
            apart.values.append(busy_slots(alone, bench.amount.rounds, SECONDS, size)[0])
    checks = [Check("/ SQLite", ratio(use, apart), 0.9, at_most=False), Check("in flight", peak, many, always=True)]
    if size == SMALL:
        checks.insert(0, Check("use", use, 0.9, at_most=False))
    what = f"use of {many} slots of {MANY} daemons, the endpoint takes {SECONDS:g} s, images of {size // 1000} kB"
    return [Row(what, [use, apart], checks)]


@contextlib.contextmanager
def _daemons(root: Path, endpoint: Stamping, server: Server, count: int, slots: int) -> Iterator[tuple[Contender, str]]:
    """Start daemons with one inbox; yield them as one contender, and the name of their database."""
    uri = server.database()
    name = uri.rpartition("/")[2]
    settings = {
        "shared__database": uri,
        "shared__durability": "single",
        "shared__inbox": "bench",
        "limits__concurrency": slots,
    }
    environ = environment(root, endpoint.base_url, **settings)
    subprocess.run([*COMMAND, "db", "init"], env=environ, check=True, capture_output=True)
    start = ("sh", "-c", _START, str(count), str(root), sys.executable)
    try:
        with Contender(DAEMON, root, endpoint, slots * count, environ, instead=start) as daemons:
            _until_all_run(server, name, count)
            endpoint.take(0, SMALL)
            yield daemons, name
    finally:
        server.drop(name)


@contextlib.contextmanager
def _apart(root: Path, endpoint: Stamping) -> Iterator[list[Contender]]:
    """Start daemons that share nothing but the endpoint and the machine."""
    with contextlib.ExitStack() as stack:
        ones = (Contender(DAEMON, root / f"alone{number}", endpoint, MANY_SLOTS) for number in range(MANY))
        yield [stack.enter_context(one) for one in ones]


def _until_all_run(server: Server, name: str, count: int) -> None:
    end = time.monotonic() + 60
    while server.psql("SELECT count(*) FROM imagewatch.instances WHERE slots > 0", name) != [(count,)]:
        if time.monotonic() > end:
            sys.exit("not all daemons have started")
        PAUSE(0.1)


def _together(daemons: Contender, jobs: int) -> tuple[float, float]:
    """Drop many at the same time; return jobs in a second, and seconds of CPU for one."""
    before, began = daemons.cpu(), time.monotonic()
    if daemons.finish([daemons.drop()[0] for _ in range(jobs)]) is None:
        sys.exit("not all prompts were done")
    return jobs / (time.monotonic() - began), (daemons.cpu() - before) / jobs


def _waits(daemons: Contender, server: Server, name: str, drops: int) -> list[float]:
    """Drop prompts one after the other; return the seconds until the request of each was recorded."""
    dropped = {}
    for _ in range(drops):
        at = time.time()
        dropped[daemons.drop()[0]] = at
        PAUSE(EVERY)
    if daemons.finish(dropped) is None:
        sys.exit("not all prompts were done")
    sent = dict(server.psql("SELECT source, sent_at FROM imagewatch.attempts", name))
    return [sent[f"{job}.prompt.txt"] - at for job, at in dropped.items()]
