"""How the real daemon stands a huge inbox: time to the first request, memory, CPU for each job, cost at rest, bursts.

    python bench/scale.py             # about seven minutes
    python bench/scale.py --rest 60 --jobs 500
    python bench/scale.py --json      # for programs

All bounds are ratios within one run, or differences to the same daemon with an empty inbox. Linux only.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import page
from endpoint import KEY, Endpoint

MB = 1_000_000
TICKS = os.sysconf("SC_CLK_TCK")
PAUSE = threading.Event().wait
FIRST_SECONDS, MORE_MB, FLAT = 2.0, 20.0, 1.15
REST_TICKS, REST_WAKE_UPS, REST_MB = 2 / 60, 0.5, 45.0


@dataclass
class Daemon:
    """The real daemon on folders of its own; ``with`` starts and ends it."""

    root: Path
    endpoint: Endpoint
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inbox, self.outbox, self.state = (
            self.root / "watched/inbox",
            self.root / "watched/outbox",
            self.root / "state",
        )
        self.inbox.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(mode=0o700)
        self.environ = {
            "PATH": os.environ["PATH"],
            "LETTA_BASE_URL": self.endpoint.base_url,
            "LETTA_API_KEY": KEY,
            "IMAGEWATCH_FOLDERS__ROOT": str(self.root / "watched"),
            "IMAGEWATCH_FOLDERS__STATE": str(self.state),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "1",
            **self.settings,
        }

    def command(self, *words: str) -> None:
        """Run another command on the same folders."""
        subprocess.run([sys.executable, "-m", "imagewatch", *words], env=self.environ, check=True, capture_output=True)

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "imagewatch", "run"]
        self.process = subprocess.Popen(command, env=self.environ, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)  # what is left in the inbox is of no interest
        self.process.wait()

    def memory(self, name: str = "VmRSS") -> float:
        """Return memory in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 / MB for line in text.splitlines() if line.startswith(name + ":"))

    def ticks(self) -> int:
        """Return the CPU time used so far, in ticks of the kernel."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def wake_ups(self) -> int:
        """Return how often its threads began to run because what they waited for was there."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            text = (task / "status").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("voluntary"))
        return total

    def page(self) -> dict[str, Any]:
        """Return its status."""
        try:
            return json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def waiting(self) -> int:
        """Return how many prompts wait for a worker by its own count."""
        return self.page().get("waiting", {}).get("ready", -1)

    def until(self, condition: Any, seconds: float = 600) -> float:
        """Wait for something; return how long after the start it was, in seconds."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                sys.exit("it did not happen")
            PAUSE(0.005)
        return time.monotonic() - self.began


def prompts(inbox: Path, count: int, first: int = 0) -> None:
    """Drop prompts by rename, as fast as one process can."""
    part = inbox / ".part"
    for number in range(first, first + count):
        part.write_text(f"job-{number:06}")
        part.rename(inbox / f"job-{number:06}.prompt.txt")


def junk(inbox: Path, count: int) -> None:
    """Drop what is no prompt: pictures of nobody, notes, temporary files."""
    for number in range(count):
        (inbox / f"junk-{number:06}.{('png', 'txt', 'tmp', 'prompt.txt.bak')[number % 4]}").touch()


def backlog(root: Path, endpoint: Endpoint, count: int, jobs: int) -> dict[str, float]:
    """Start on a full inbox; measure until some jobs are done."""
    daemon = Daemon(root, endpoint, {"IMAGEWATCH_LIMITS__CONCURRENCY": "4"})
    prompts(daemon.inbox, count)
    PAUSE(1.5)  # quiet for long enough
    endpoint.forget()
    with daemon:
        first = daemon.until(lambda: endpoint.requests >= 1)
        daemon.until(lambda: endpoint.requests >= 50)  # warm
        ticks, began, before = daemon.ticks(), time.monotonic(), endpoint.requests
        daemon.until(lambda: endpoint.requests >= before + jobs)
        ticks, took, done = daemon.ticks() - ticks, time.monotonic() - began, endpoint.requests - before
        peak = daemon.memory("VmHWM")
    numbers = [int(text.removeprefix("job-")) for text in endpoint.prompts]
    # Four are under way at once, so neighbours may change places.
    late = max(abs(number - place) for place, number in enumerate(numbers))
    return {
        "prompts": count,
        "first_request_s": first,
        "cpu_ms_per_job": ticks / TICKS / done * 1000,
        "jobs_per_s": done / took,
        "peak_mb": peak,
        "twice": len(numbers) - len(set(numbers)),
        "out_of_order": late,
    }


def rest(root: Path, endpoint: Endpoint, name: str, count: int, seconds: float) -> dict[str, float | str]:
    """Leave the daemon alone."""
    daemon = Daemon(root, endpoint, {"IMAGEWATCH_INBOX__WATCH": "poll"} if name == "polled" else {})
    if name in {"held", "polled"}:
        daemon.command("hold")
        prompts(daemon.inbox, count)
    elif name == "junk":
        junk(daemon.inbox, count)
    with daemon:
        daemon.until(
            lambda: daemon.page().get("last_sweep") and (name in {"empty", "junk"} or daemon.waiting() == count)
        )
        PAUSE(35)  # the second look, which learns that nothing changes
        ticks, wake_ups = daemon.ticks(), daemon.wake_ups()
        PAUSE(seconds)
        ticks, wake_ups = daemon.ticks() - ticks, daemon.wake_ups() - wake_ups
        return {
            "inbox": f"{count:,} {name}" if count else "empty",
            "ticks_per_s": ticks / seconds,
            "wake_ups_per_s": wake_ups / seconds,
            "rss_mb": daemon.memory(),
            "peak_mb": daemon.memory("VmHWM"),
        }


def burst(root: Path, endpoint: Endpoint, count: int, *, make: bool) -> dict[str, float | str]:
    """Drop many at once before a running daemon, and count what comes of them.

    Without ``make`` the queue is held, and the daemon is stopped (SIGSTOP) while they are dropped. The kernel keeps
    16,384 events for it, fewer than there are.
    """
    daemon = Daemon(root, endpoint, {"IMAGEWATCH_LIMITS__CONCURRENCY": "4"})
    if not make:
        daemon.command("hold")
    endpoint.forget()
    with daemon:
        daemon.until(lambda: daemon.page().get("last_sweep"))
        began = time.monotonic()
        if not make:
            daemon.process.send_signal(signal.SIGSTOP)
        prompts(daemon.inbox, count)
        daemon.process.send_signal(signal.SIGCONT)
        dropped = time.monotonic() - began
        if make:
            daemon.until(lambda: endpoint.requests >= count)
        else:
            daemon.until(lambda: daemon.waiting() >= count)
        took = time.monotonic() - began
        PAUSE(2)
        peak = daemon.memory("VmHWM")
        made = Counter(endpoint.prompts) if make else Counter(range(daemon.waiting()))
    twice = sum(many - 1 for many in made.values())
    return {
        "dropped": count,
        "stopped": "no" if make else "yes",
        "drop_s": dropped,
        "done_s": took,
        "missed": count - len(made),
        "twice": twice,
        "peak_mb": peak,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name, Endpoint(1, 2000, keep=True) as endpoint:
        top = Path(name)
        found: dict[str, Any] = {"backlog": [], "rest": [], "burst": []}
        for count in (1000, arguments.prompts):
            found["backlog"].append(backlog(top / f"backlog{count}", endpoint, count, arguments.jobs))
        for kind in ("empty", "held", "junk", "polled"):
            count = 0 if kind == "empty" else arguments.prompts
            found["rest"].append(rest(top / kind, endpoint, kind, count, arguments.rest))
        found["burst"].append(burst(top / "burst", endpoint, 2000, make=True))
        found["burst"].append(burst(top / "more", endpoint, 20_000, make=False))
    return found


def judge(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return what is held to a bound, and the bound."""
    small, large = found["backlog"]
    empty, *full = found["rest"]
    checks = {
        "start to first request, s": (large["first_request_s"], FIRST_SECONDS),
        "CPU for a job, huge inbox / small one": (large["cpu_ms_per_job"] / small["cpu_ms_per_job"], FLAT),
        "memory of a huge inbox above a small one, MB": (large["peak_mb"] - small["peak_mb"], MORE_MB),
        "missed or twice": (
            sum(one["missed"] + one["twice"] for one in found["burst"]) + small["twice"] + large["twice"],
            0,
        ),
    }
    polled = full.pop()  # a look every five seconds, for which a tenth of a core is the most
    checks[f"CPU at rest, {polled['inbox']}, ticks/s"] = (polled["ticks_per_s"], TICKS / 10)
    for one in (empty, *full):
        checks[f"CPU at rest, {one['inbox']}, ticks/s"] = (one["ticks_per_s"], REST_TICKS)
        checks[f"wake-ups at rest, {one['inbox']}, /s"] = (one["wake_ups_per_s"], REST_WAKE_UPS)
        checks[f"memory at rest, {one['inbox']}, MB"] = (one["rss_mb"], REST_MB)
    return checks


def verdict(value: float, most: float) -> str:
    """Return whether a bound is kept, in a word."""
    return "reached" if value <= most else "not reached"


def document(found: dict[str, Any], checks: dict[str, tuple[float, float]], command: str) -> str:
    """Return the section of the page about speed."""
    today = dt.datetime.now(tz=dt.UTC).date()
    lines = [f"`{command}`, {today}.", "", "| metric | today | at most | |", "|---|--:|--:|---|"]
    lines += [
        f"| {what} | {value:.2f} | {most:.2f} | {verdict(value, most)} |" for what, (value, most) in checks.items()
    ]
    raw = "\n\n".join(f"{name}\n{table(rows)}" for name, rows in found.items())
    return "\n".join([*lines, "", "```", raw, "```", ""])


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of the same keys as text."""
    cells = [list(rows[0]), *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main() -> int:
    """Measure, print, return 1 when a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=400, help="jobs whose CPU is measured")
    parser.add_argument("--rest", type=float, default=15.0, help="seconds at rest")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    found = measure(arguments)
    checks = judge(found)
    if arguments.write_docs:
        page.put("scale", document(found, checks, " ".join(["python", *sys.argv]).replace(" --write-docs", "")))
    if arguments.json:
        print(json.dumps(found | {"checks": checks}, indent=1))
    else:
        verdicts = (
            f"{verdict(value, most):<12}{what:<48}{value:10.3f}  (at most {most:.3f})"
            for what, (value, most) in checks.items()
        )
        print("\n\n".join([*(f"{name}\n{table(rows)}" for name, rows in found.items()), "\n".join(verdicts)]))
    return any(value > most for value, most in checks.values())


if __name__ == "__main__":
    sys.exit(main())
