"""The real daemon with a huge inbox: time to the first request, memory, CPU for each job, cost at rest."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from daemon import PAUSE, SLOTS, TICKS, Daemon, drop, environment, jobs
from endpoint import Endpoint
from figures import Check, Figure, Row, ratio
from plan import say

if TYPE_CHECKING:
    from pathlib import Path

    from plan import Bench

SMALL, WARM, JOBS = 1000, 50, 400
EMPTY, HELD, JUNK, POLLED = "empty", "held", "junk", "polled"
SECOND_SCAN = 35.0
"""Seconds until the daemon has scanned once more and found no change: ``rescan_seconds`` and a margin."""
JUNK_NAMES = ("{}.png", "{}.txt", "{}.tmp", "{}.prompt.txt.bak")


def scale(bench: Bench) -> list[Row]:
    """Measure a full inbox while its prompts are processed, and at rest."""
    count = bench.amount.waiting
    found: dict[str, dict[str, Figure]] = {}
    with Endpoint(1, 2000, keep=True) as endpoint:
        for run in range(bench.amount.few):
            for name, many in ((f"{SMALL:,} waiting", SMALL), (f"{count:,} waiting", count)):
                say(f"scale, run {run + 1}: {name}")
                _note(found, name, backlog(bench.root / f"backlog-{run}-{many}", endpoint, many))
            say(f"scale, run {run + 1}: at rest")
            for name, one in rest(bench.root / f"rest-{run}", endpoint, count, bench.amount.rest).items():
                _note(found, name, one)
    return [*backlog_rows(found, count), *rest_rows(found, count)]


def _note(found: dict[str, dict[str, Figure]], name: str, one: dict[str, tuple[float, str]]) -> None:
    mine = found.setdefault(name, {})
    for what, (value, unit) in one.items():
        mine.setdefault(what, Figure(name, unit)).values.append(value)


def backlog(root: Path, endpoint: Endpoint, count: int) -> dict[str, tuple[float, str]]:
    """Start on a full inbox; measure until some jobs are done."""
    daemon = Daemon(root, environment(root, endpoint.base_url, inbox__settle_seconds=1, limits__concurrency=SLOTS))
    drop(daemon.inbox, jobs(count))
    PAUSE(1.5)  # until they have settled
    endpoint.forget()
    with daemon:
        first = daemon.until(lambda: endpoint.requests >= 1)
        daemon.until(lambda: endpoint.requests >= WARM)
        ticks, before = daemon.ticks(), endpoint.requests
        daemon.until(lambda: endpoint.requests >= before + min(JOBS, count - 2 * WARM))
        ticks, done = daemon.ticks() - ticks, endpoint.requests - before
        peak = daemon.memory("VmHWM")
    numbers = [int(text.removeprefix("job-")) for text in endpoint.prompts]
    return {
        "first": (first, "s"),
        "cpu": (ticks / TICKS / done * 1000, "ms"),
        "peak": (peak, "MB"),
        "twice": (len(numbers) - len(set(numbers)), ""),
        # Some are in flight at the same time, so neighbors may change places.
        "out_of_order": (max(abs(number - place) for place, number in enumerate(numbers)), ""),
    }


def backlog_rows(found: dict[str, dict[str, Figure]], count: int) -> list[Row]:
    """Return the rows and bounds of a full inbox."""
    small, large, empty = found[f"{SMALL:,} waiting"], found[f"{count:,} waiting"], found[EMPTY]
    above = Figure("", "MB", [a - b for a, b in zip(large["peak"].values, empty["rss"].values, strict=True)])
    twice = Figure("", "", [a + b for a, b in zip(small["twice"].values, large["twice"].values, strict=True)])
    name = f"{count:,} waiting"
    return [
        Row(f"{name}: start → first request", [small["first"], large["first"]], [Check("s", large["first"], 2.0)]),
        Row(
            f"{name}: memory, at its peak", [empty["rss"], small["peak"], large["peak"]], [Check("MB more", above, 20)]
        ),
        Row(
            f"{name}: CPU per job",
            [small["cpu"], large["cpu"]],
            [Check(f"/ {SMALL:,} waiting", ratio(large["cpu"], small["cpu"]), 1.15)],
        ),
        Row(
            f"{name}: oldest first, each once",
            [],
            [Check("places off", large["out_of_order"], SLOTS, always=True), Check("twice", twice, 0, always=True)],
        ),
    ]


def rest(root: Path, endpoint: Endpoint, count: int, seconds: float) -> dict[str, dict[str, tuple[float, str]]]:
    """Measure idle daemons, all at the same time."""
    daemons = {}
    with contextlib.ExitStack() as stack:
        for name in (EMPTY, HELD, JUNK, POLLED):
            polled = {"inbox__watch": "poll"} if name == POLLED else {}
            environ = environment(root / name, endpoint.base_url, inbox__settle_seconds=1, **polled)
            daemon = daemons[name] = Daemon(root / name, environ)
            if name in {HELD, POLLED}:
                daemon.command("hold")
                drop(daemon.inbox, jobs(count))
            elif name == JUNK:
                for number in range(count):
                    (daemon.inbox / JUNK_NAMES[number % len(JUNK_NAMES)].format(number)).touch()
            stack.enter_context(daemon)  # immediately: the last prompts have not settled yet
        for name, daemon in daemons.items():
            daemon.until(daemon.has_scanned)
            if name in {HELD, POLLED}:
                daemon.until(lambda daemon=daemon: daemon.waiting() == count)
        PAUSE(SECOND_SCAN)
        before = {name: (daemon.ticks(), daemon.wake_ups()) for name, daemon in daemons.items()}
        PAUSE(seconds)
        return {
            name: {
                "ticks": ((daemon.ticks() - before[name][0]) / seconds * 60, "ticks a minute"),
                "wake-ups": ((daemon.wake_ups() - before[name][1]) / seconds, "/s"),
                "rss": (daemon.memory(), "MB"),
                "peak": (daemon.memory("VmHWM"), "MB"),
            }
            for name, daemon in daemons.items()
        }


def rest_rows(found: dict[str, dict[str, Figure]], count: int) -> list[Row]:
    """Return the rows and bounds of the cost at rest."""
    rows = []
    for what, name, most in (("ticks", "CPU", 2.0), ("wake-ups", "wake-ups", 0.5), ("rss", "memory", 45.0)):
        bounds = {
            EMPTY: most,
            HELD: 60.0 if what == "rss" else most,
            JUNK: most,
        }  # the daemon remembers the name of each held prompt
        checks = [Check(kind, found[kind][what], bound) for kind, bound in bounds.items()]
        rows.append(Row(f"at rest, empty and with {count:,} files: {name}", [], checks))
    polled = found[POLLED]
    # A scan every five seconds, which may take a tenth of a core.
    checks = [Check("CPU", polled["ticks"], 6 * TICKS), Check("memory", polled["rss"], 60.0)]
    wakes = Figure("wake-ups", "/s", polled["wake-ups"].values)
    return [*rows, Row(f"at rest, {count:,} held and polled", [wakes], checks)]
