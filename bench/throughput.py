"""Jobs in a second, the cost of a job, and the use of the slots."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from contenders import DAEMON, FLOOR, SHELL, Contender, missing
from figures import Check, Figure, Row, ratio
from plan import say
from preload import without_syncs
from stamping import SIZE, Stamping

if TYPE_CHECKING:
    from plan import Bench


FEW, MANY = 1, 8
"""Slots."""
FREE = "without fsync"


def throughput(bench: Bench) -> list[Row]:
    """Measure jobs in a second, and the CPU time of a job."""
    nothing, way = without_syncs(bench.root)
    # label, contender, slots, environment
    entries = [
        (DAEMON, DAEMON, MANY, {}),
        (FLOOR, FLOOR, MANY, {}),
        (f"{DAEMON}, {FEW} slot", DAEMON, FEW, {}),
        (f"{FLOOR}, {FEW} slot", FLOOR, FEW, {}),
        (SHELL, SHELL, MANY, {}),
        (FREE, DAEMON, MANY, nothing),
    ]
    speed = {label: Figure(label, "/s") for label, name, *_ in entries if not missing(name)}
    cpu = {label: Figure(label, "ms") for label in speed}
    with Stamping() as endpoint:
        for run in range(bench.amount.runs):
            for label, name, slots, environ in entries:
                if label not in speed:
                    continue
                say(f"throughput, run {run + 1}: {label}")
                with Contender(name, bench.root / "work", endpoint, slots, environ) as contender:
                    jobs, seconds = together(contender, bench.amount.jobs // (3 if name == SHELL else 1))
                speed[label].values.append(jobs)
                cpu[label].values.append(seconds * 1000)
    return throughput_rows(speed, cpu, f"{bench.amount.jobs} prompts of 1.5 MB at the same time, latency 0", way)


def throughput_rows(speed: dict[str, Figure], cpu: dict[str, Figure], work: str, way: str) -> list[Row]:
    """Return the rows and bounds of jobs in a second and CPU time.

    Args:
        speed: Jobs in a second by label.
        cpu: CPU time of a job by label.
        work: What had to be done.
        way: How the syncs were disabled.
    """
    mine, floor = (f"{name}, {FEW} slot" for name in (DAEMON, FLOOR))
    rate = [Check("/ floor", ratio(speed[DAEMON], speed[FLOOR]), 0.65, at_most=False)]
    price = [Check("/ floor", ratio(cpu[DAEMON], cpu[FLOOR]), 1.75)]
    if SHELL in speed:
        rate.append(Check("/ shell", ratio(speed[DAEMON], speed[SHELL]), 3.0, at_most=False))
        price.append(Check("/ shell", ratio(cpu[DAEMON], cpu[SHELL]), 1 / 6))
    alone = Check("/ floor", ratio(speed[mine], speed[floor]), 0.6, at_most=False)
    dearer = Check(f"{MANY} slots / {FEW}", ratio(cpu[DAEMON], cpu[mine]), 1.15)
    durable = Check("with / without", ratio(speed[DAEMON], speed[FREE]), 0.8, at_most=False)
    peers = [label for label in (DAEMON, FLOOR, SHELL) if label in speed]
    return [
        Row(f"jobs/s, {MANY} slots, {work}", [speed[label] for label in peers], rate, missing(SHELL)),
        Row(f"CPU per job, {MANY} slots, same work", [cpu[label] for label in peers], price, missing(SHELL)),
        Row(f"jobs/s, {FEW} slot, same work", [speed[mine], speed[floor]], [alone]),
        Row(
            f"CPU per job, {MANY} slots and {FEW}",
            [cpu[DAEMON], cpu[mine], cpu[FLOOR], cpu[floor]],
            [dearer],
        ),
        Row(
            "price of durability: the same run with fsync disabled",
            [speed[DAEMON], speed[FREE]],
            [durable],
            f"disabled by {way}",
        ),
    ]


def together(contender: Contender, jobs: int) -> tuple[float, float]:
    """Drop many at the same time; return jobs in a second, and seconds of CPU for one."""
    before, began = contender.cpu(), time.monotonic()
    names = [contender.drop()[0] for _ in range(jobs)]
    if contender.finish(names) is None:
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
                    used, peak = busy_slots([contender], bench.amount.rounds, seconds)
                figure.values.append(used)
                if name == DAEMON:
                    most.values.append(peak)
        checks = [Check("use", use[DAEMON], bound, at_most=False), Check("in flight", most, count, always=True)]
        rows.append(Row(f"use of {count} slots, the endpoint takes {seconds:g} s", list(use.values()), checks))
    return rows


def busy_slots(contenders: list[Contender], rounds: int, seconds: float, size: int = SIZE) -> tuple[float, float]:
    """Return the part of all slots' time in which the endpoint was busy, and the most requests at the same time.

    It counts while prompts wait: from the start of the first request to the start of the last one. All contenders use
    one endpoint.

    Args:
        contenders: The programs.
        rounds: How often all slots are filled.
        seconds: How long a response takes.
        size: Bytes of an image.
    """
    endpoint, count = contenders[0].endpoint, sum(one.slots for one in contenders)
    endpoint.take(seconds, size)
    turns = rounds * (1 if seconds > 1 else 4)
    dropped = [[one.drop()[0] for _ in range(one.slots * turns)] for one in contenders]
    for one, names in zip(contenders, dropped, strict=True):
        one.finish(names)
    found = endpoint.take(0, SIZE)
    stamps = found["stamps"]
    begin, end = min(began for _, began, _ in stamps), max(began for _, began, _ in stamps)
    return sum(min(over, end) - began for _, began, over in stamps) / count / (end - begin), found["most"]
