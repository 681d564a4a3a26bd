"""Jobs in a second, the cost of a job, and the use of the slots."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from contenders import DAEMON, FLOOR, SHELL, Contender, missing, without_syncs
from figures import Check, Figure, Row, ratio
from plan import say
from stamping import SIZE, Stamping

if TYPE_CHECKING:
    from plan import Bench


def throughput(bench: Bench) -> list[Row]:
    """Measure jobs in a second, and the CPU time of a job."""
    nothing, way = without_syncs(bench.root)
    entries = [(DAEMON, DAEMON, {}), (FLOOR, FLOOR, {}), (SHELL, SHELL, {}), ("without fsync", DAEMON, nothing)]
    speed = {label: Figure(label, "/s") for label, name, _ in entries if not missing(name)}
    cpu = {label: Figure(label, "ms") for label in speed}
    with Stamping() as endpoint:
        for run in range(bench.amount.runs):
            for label, name, environ in entries:
                if label not in speed:
                    continue
                say(f"throughput, run {run + 1}: {label}")
                with Contender(name, bench.root / "work", endpoint, environ=environ) as contender:
                    jobs, seconds = together(contender, bench.amount.jobs // (3 if name == SHELL else 1))
                speed[label].values.append(jobs)
                cpu[label].values.append(seconds * 1000)
    rate = [Check("/ loop", ratio(speed[DAEMON], speed[FLOOR]), 0.7, at_most=False)]
    work = [Check("/ loop", ratio(cpu[DAEMON], cpu[FLOOR]), 1.5)]
    if SHELL in speed:
        rate.append(Check("/ shell", ratio(speed[DAEMON], speed[SHELL]), 3.0, at_most=False))
        work.append(Check("/ shell", ratio(cpu[DAEMON], cpu[SHELL]), 1 / 6))
    price = Check("with / without", ratio(speed[DAEMON], speed["without fsync"]), 0.8, at_most=False)
    kept = [figure for label, figure in speed.items() if label != "without fsync"]
    return [
        Row(f"jobs/s, {bench.amount.jobs} prompts of 1.5 MB at the same time, latency 0", kept, rate, missing(SHELL)),
        Row(
            "CPU per job, same work",
            [figure for label, figure in cpu.items() if label != "without fsync"],
            work,
            missing(SHELL),
        ),
        Row(
            "price of durability: the same run with fsync disabled",
            [speed[DAEMON], speed["without fsync"]],
            [price],
            f"disabled by {way}",
        ),
    ]


def together(contender: Contender, jobs: int) -> tuple[float, float]:
    """Drop many at the same time; return jobs in a second, and seconds of CPU for one."""
    before, began = contender.cpu(), time.monotonic()
    names = [contender.drop()[0] for _ in range(jobs)]
    if not contender.finish(names):
        sys.exit(f"{contender.name}: not all were done")
    took = time.monotonic() - began
    requested = [name for name, *_ in contender.endpoint.take(0, SIZE)["stamps"] if name in names]
    if sorted(requested) != sorted(names):
        sys.exit(f"{contender.name}: {len(requested)} requests for {len(names)} prompts")
    return jobs / took, (contender.cpu() - before) / jobs


def slots(bench: Bench) -> list[Row]:
    """Measure the part of the time in which the slots are busy."""
    rows = []
    for count, seconds, bound in ((32, 2.0, 0.95), (8, 0.2, 0.65)):
        use = {name: Figure(name, "") for name in (DAEMON, FLOOR)}
        most = Figure("most in flight", "", [])
        for run in range(max(1, bench.amount.runs // 2)):
            for name, figure in use.items():
                say(f"{count} slots, run {run + 1}: {name}")
                with (
                    Stamping() as endpoint,
                    Contender(name, bench.root / "work", endpoint, slots=count) as contender,
                ):
                    used, peak = busy_slots(contender, bench.amount.rounds, seconds)
                figure.values.append(used)
                if name == DAEMON:
                    most.values.append(peak)
        checks = [Check("use", use[DAEMON], bound, at_most=False), Check("in flight", most, count, always=True)]
        rows.append(Row(f"use of {count} slots, the endpoint takes {seconds:g} s", list(use.values()), checks))
    return rows


def busy_slots(contender: Contender, rounds: int, seconds: float) -> tuple[float, float]:
    """Return the part of all slots' time in which the endpoint was busy, and the most requests at the same time.

    It counts while prompts wait: from the start of the first request to the start of the last one.
    """
    count = contender.slots
    contender.endpoint.take(seconds, SIZE)
    jobs = count * rounds * (1 if seconds > 1 else 4)
    contender.finish([contender.drop()[0] for _ in range(jobs)])
    found = contender.endpoint.take(0, SIZE)
    stamps = found["stamps"]
    begin, end = min(began for _, began, _ in stamps), max(began for _, began, _ in stamps)
    return sum(min(over, end) - began for _, began, over in stamps) / count / (end - begin), found["most"]
