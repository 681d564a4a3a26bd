"""How fast the real daemon is, next to the floor and to the peers: one table of ratios, each within one run.

    python bench/speed.py                     # about a quarter of an hour
    python bench/speed.py --quick             # two minutes; the figures are rough
    python bench/speed.py --only latency      # of: latency, throughput, slots, start, syncs, phases
    python bench/speed.py --json FILE
    python bench/speed.py --write-docs        # docs/performance.md

It starts an endpoint of its own, warms everybody up, lets the contenders take turns, and repeats. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import page
from contenders import DAEMON, FLOOR, HERE, OBSERVER, PAUSE, SHELL, Contender, missing, without_syncs
from figures import Check, Figure, Row, machine, percentile, ratio
from loop import SYNCS
from stamping import Stamping

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1_500_000  # bytes of each picture
GAP = 0.6  # seconds of quiet before a prompt that finds everybody idle: longer than watchdog's half a second
EVERY = 0.1  # seconds between prompts while finished ones leave the inbox
CORE = "import httpx, watchdog.observers, structlog, tomli_w"
ARGPARSE = "import argparse, json, logging, pathlib; argparse.ArgumentParser().parse_args()"


@dataclass(frozen=True)
class Amount:
    """How much is done."""

    runs: int
    drops: int
    jobs: int
    rounds: int
    starts: int


FULL, QUICK = Amount(4, 20, 300, 10, 7), Amount(1, 6, 30, 2, 3)


@dataclass
class Bench:
    """What all rows share."""

    root: Path
    endpoint: Stamping
    amount: Amount

    def contender(self, name: str, **options: object) -> Contender:
        """Return a contender with folders of its own."""
        self.endpoint.take(0, SIZE)
        return Contender(name, self.root / "work", self.endpoint, **options)  # type: ignore[arg-type]


# Latency


def latency(bench: Bench) -> list[Row]:
    """Measure from a drop to the first byte of its request, and to its durable receipt."""
    names = [name for name in (DAEMON, FLOOR, SHELL, OBSERVER) if not missing(name)]
    found: dict[str, dict[str, list[float]]] = {}
    for run in range(bench.amount.runs):
        for name in names:
            say(f"latency, run {run + 1}: {name}")
            with bench.contender(name) as contender:
                first, receipt = idle(bench, contender)
                busy = [] if name == SHELL else leaving(bench, contender)
            mine = found.setdefault(name, {"first": [], "receipt": [], "busy": [], "all": []})
            mine["first"].append(percentile(first, 0.5))
            mine["receipt"].append(percentile(receipt, 0.5))
            mine["all"] += first
            if busy:
                mine["busy"].append(percentile(busy, 0.5))
    return latency_rows(
        {name: {kind: Figure(name, "ms", values) for kind, values in mine.items()} for name, mine in found.items()}
    )


def idle(bench: Bench, contender: Contender) -> tuple[list[float], list[float]]:
    """Drop one prompt at a time; return milliseconds to the first byte, and to the durable receipt."""
    dropped, receipts = {}, {}
    for _ in range(bench.amount.drops):
        name, dropped[name] = contender.drop()
        receipts |= contender.finish([name])
        PAUSE(GAP)
    first = {name: began for name, began, _ in bench.endpoint.take(0, 2000)["stamps"]}
    return (
        [(first[name] - at) / 1e6 for name, at in dropped.items()],
        [(receipts[name] - at) / 1e6 for name, at in dropped.items()],
    )


def leaving(bench: Bench, contender: Contender) -> list[float]:
    """Drop prompts while those before them leave the inbox; return milliseconds to the first byte."""
    dropped = {}
    for _ in range(2 * bench.amount.drops):
        name, dropped[name] = contender.drop()
        PAUSE(EVERY)
    contender.finish(dropped)
    first = {name: began for name, began, _ in bench.endpoint.take(0, SIZE)["stamps"]}
    return [(first[name] - at) / 1e6 for name, at in dropped.items()]


def latency_rows(found: dict[str, dict[str, Figure]]) -> list[Row]:
    """Return what the latencies are held to."""
    mine, floor, shell = found[DAEMON], found[FLOOR], found.get(SHELL)
    tails = [Figure(f"{name}, p99", "ms", [percentile(one["all"].values, 0.99)]) for name, one in found.items()]
    first = [Check("/ loop", ratio(mine["first"], floor["first"]), 2.0), Check("p99, ms", tails[0], 50.0)]
    receipt = [Check("/ loop", ratio(mine["receipt"], floor["receipt"]), 2.0)]
    if shell:
        first.insert(1, Check("/ shell", ratio(mine["first"], shell["first"]), 1 / 5))
        receipt.append(Check("/ shell", ratio(mine["receipt"], shell["receipt"]), 1 / 2))
    busy = [Check("/ its own, idle", ratio(mine["busy"], mine["first"]), 1.5)]
    return [
        Row(
            "drop → first byte of the request, p50, idle",
            [*(one["first"] for one in found.values()), *tails],
            first,
            skipped(),
        ),
        Row(
            "the same while finished prompts leave the inbox",
            [one["busy"] for one in found.values() if one["busy"].values],
            busy,
        ),
        Row("drop → receipt durable, p50", [one["receipt"] for one in found.values()], receipt, skipped()),
    ]


# Throughput


def throughput(bench: Bench) -> list[Row]:
    """Measure jobs in a second, and the CPU time of a job."""
    nothing, way = without_syncs(bench.root)
    entries = [(DAEMON, DAEMON, {}), (FLOOR, FLOOR, {}), (SHELL, SHELL, {}), ("without fsync", DAEMON, nothing)]
    speed = {label: Figure(label, "/s") for label, name, _ in entries if not missing(name)}
    cpu = {label: Figure(label, "ms") for label in speed}
    for run in range(bench.amount.runs):
        for label, name, environ in entries:
            if label not in speed:
                continue
            say(f"throughput, run {run + 1}: {label}")
            with bench.contender(name, environ=environ) as contender:
                jobs, seconds = burst(bench, contender, bench.amount.jobs // (3 if name == SHELL else 1))
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
        Row(f"jobs/s, {bench.amount.jobs} prompts of 1.5 MB at once, latency 0", kept, rate, skipped()),
        Row(
            "CPU per job, same work",
            [figure for label, figure in cpu.items() if label != "without fsync"],
            work,
            skipped(),
        ),
        Row(
            "price of durability: the same run with fsync made a no-op",
            [speed[DAEMON], speed["without fsync"]],
            [price],
            f"made a no-op by {way}",
        ),
    ]


def burst(bench: Bench, contender: Contender, jobs: int) -> tuple[float, float]:
    """Drop many at once; return jobs in a second, and seconds of CPU for one."""
    before, began = contender.cpu(), time.monotonic()
    names = [contender.drop()[0] for _ in range(jobs)]
    if not contender.finish(names):
        sys.exit(f"{contender.name}: not all were done")
    took = time.monotonic() - began
    made = [name for name, *_ in bench.endpoint.take(0, SIZE)["stamps"] if name in names]
    if sorted(made) != sorted(names):
        sys.exit(f"{contender.name}: {len(made)} requests for {len(names)} prompts")
    return jobs / took, (contender.cpu() - before) / jobs


# Slots


def slots(bench: Bench) -> list[Row]:
    """Measure how much of the time the slots are at work for somebody."""
    rows = []
    for count, seconds, bound in ((32, 2.0, 0.95), (8, 0.2, 0.65)):
        use = {name: Figure(name, "") for name in (DAEMON, FLOOR)}
        most = Figure("most in flight", "", [])
        for run in range(max(1, bench.amount.runs // 2)):
            for name, figure in use.items():
                say(f"{count} slots, run {run + 1}: {name}")
                with bench.contender(name, slots=count) as contender:
                    used, peak = busy_slots(bench, contender, count, seconds)
                figure.values.append(used)
                if name == DAEMON:
                    most.values.append(peak)
        checks = [Check("use", use[DAEMON], bound, at_most=False), Check("in flight at once", most, count)]
        rows.append(Row(f"use of {count} slots, the endpoint takes {seconds:g} s", list(use.values()), checks))
    return rows


def busy_slots(bench: Bench, contender: Contender, count: int, seconds: float) -> tuple[float, float]:
    """Return the part of all slots' time in which the endpoint was at work, and the most requests at once.

    It counts as long as prompts wait: from the first request's beginning to the last one's.
    """
    bench.endpoint.take(seconds, SIZE)
    jobs = count * bench.amount.rounds * (1 if seconds > 1 else 4)
    contender.finish([contender.drop()[0] for _ in range(jobs)])
    found = bench.endpoint.take(0, SIZE)
    stamps = found["stamps"]
    begin, end = min(began for _, began, _ in stamps), max(began for _, began, _ in stamps)
    return sum(min(over, end) - began for _, began, over in stamps) / count / (end - begin), found["most"]


# Start


def start(bench: Bench) -> list[Row]:
    """Measure how long it takes to be ready, and to say a word."""
    # With bytecode, as pip leaves it: whoever has just edited it would measure compiling.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(HERE.parent / "imagewatch")], check=True)
    environ = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    daemon = Figure("to READY", "s")
    python = [sys.executable, "-c"]
    program = [sys.executable, "-m", "imagewatch"]
    others = {
        "core import": [*python, CORE],
        "argparse": [*python, ARGPARSE],
        "--version": [*program, "--version"],
        "--help": [*program, "--help"],
    }
    times = {name: Figure(name, "s") for name in others}
    for run in range(bench.amount.starts + 1):
        values = {name: timed(command, environ) for name, command in others.items()}
        ready = to_ready(bench, environ)
        if run:  # the first only warms the cache
            daemon.values.append(ready)
            for name, value in values.items():
                times[name].values.append(value)
    core, argparse_ = times["core import"], times["argparse"]
    return [
        Row("start-up to READY", [daemon, core], [Check("/ core import", ratio(daemon, core), 1.5)]),
        *(
            Row(f"`{name}`", [times[name], argparse_], [Check("/ argparse", ratio(times[name], argparse_), 2.0)])
            for name in ("--version", "--help")
        ),
    ]


def timed(command: list[str], environ: dict[str, str]) -> float:
    """Return how long a command takes, seconds."""
    began = time.monotonic()
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def to_ready(bench: Bench, environ: dict[str, str]) -> float:
    """Return how long the daemon takes until it tells the service manager that it is ready, seconds."""
    contender = bench.contender(DAEMON)
    path = bench.root / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(30)
        environ = {**environ, **contender.settings(), "NOTIFY_SOCKET": str(path)}
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "imagewatch", "run"], env=environ, stderr=subprocess.DEVNULL)
        try:
            while b"READY=1" not in channel.recv(4096):
                pass
            return time.monotonic() - began
        finally:
            process.terminate()
            process.wait()


# What one job waits for, and where its time goes


def syncs(bench: Bench) -> list[str]:
    """Return what one job of the daemon waits for, in order, by its file's name."""
    if not shutil.which("strace"):
        say("no strace here: the syncs of one job are not counted")
        return []
    trace = bench.root / "trace"
    under = ("strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace))
    with bench.contender(DAEMON, under=under) as contender:
        before = len(trace.read_text().splitlines())
        name, _ = contender.drop()
        contender.finish([name])
        PAUSE(1)
        lines = trace.read_text().splitlines()[before:]
    paths = [match[1] for line in lines if (match := re.search(r"sync\(\d+<([^>]*)>", line))]
    known = [re.sub(r"\b[0-9a-f]{16}\b", "ID", os.path.relpath(path, bench.root / "work")) for path in paths]
    if len(known) != len(SYNCS):
        sys.exit(f"one job waits {len(known)} times, the floor {len(SYNCS)} times: {known}")
    return known


def phases(bench: Bench) -> list[tuple[str, float, float]]:
    """Return the parts of one job: milliseconds, and how often each is entered."""
    out = bench.root / "phases.json"
    command = (sys.executable, str(HERE / "phases.py"), str(out))
    with bench.contender(DAEMON, instead=command) as contender:
        for _ in range(3 * bench.amount.drops):
            contender.finish([contender.drop()[0]])
        contender.stop()
    found = json.loads(out.read_text())
    done = found["worker: all else"][1]  # and those of the warming up
    return [(part, spent / done, calls / done) for part, (spent, calls) in found.items()]


# All


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "latency": latency,
    "throughput": throughput,
    "slots": slots,
    "start": start,
}


def say(text: str) -> None:
    """Tell on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)


def skipped() -> str:
    """Return why a peer is missing, or an empty string."""
    return f"the shell is skipped: {missing(SHELL)}" if missing(SHELL) else ""


def measure(arguments: argparse.Namespace) -> page.Found:
    """Return everything that was asked for."""
    only = arguments.only
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name, Stamping() as endpoint:
        bench = Bench(Path(name), endpoint, QUICK if arguments.quick else FULL)
        found = page.Found(machine(bench.root), "quick" if arguments.quick else "full")
        for key, rows in ROWS.items():
            if only in {None, key}:
                found.rows += rows(bench)
        if only in {None, "syncs"}:
            found.syncs = syncs(bench)
        if only in {None, "phases"}:
            found.phases = phases(bench)
    return found


def main() -> int:
    """Measure, print, return 1 when a bound is passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*ROWS, "syncs", "phases"])
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, too")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(page.text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=1))
    if arguments.write_docs:
        page.write(found, "python bench/speed.py" + (" --quick" if arguments.quick else ""))
    return int(any(not check.reached for row in found.rows for check in row.checks))


if __name__ == "__main__":
    sys.exit(main())
