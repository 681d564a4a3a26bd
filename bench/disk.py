"""How often a job waits for the disk, and how many bytes it writes."""

from __future__ import annotations

import os
import re
import shutil
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contenders import DAEMON, FLOOR, Contender
from daemon import PAUSE
from figures import Check, Figure, Row, plain
from plan import say
from stamping import SIZE, Stamping
from tracing import SENDS, WAITS, WRITES, Trace

if TYPE_CHECKING:
    from pathlib import Path

    from plan import Bench
    from tracing import Call

SLOTS = 8
FIRST_BYTE = "the first byte of the request"
AFTERWARDS = 1.0  # seconds after the last prompt is in the archive: what follows belongs to the jobs, too


@dataclass(frozen=True)
class Counted:
    """What one run of a contender did.

    Attributes:
        alone: For each of some prompts, one at a time, the files it waited for, in order, with ``FIRST_BYTE`` between.
        waits: The same for each of many prompts at the same time: file and waits for one job.
        written: File and bytes written for each byte of image, for many prompts at the same time.
    """

    alone: list[list[str]]
    waits: dict[str, float]
    written: dict[str, float]

    @property
    def usual(self) -> list[str]:
        """The one of the prompts, one at a time, whose number of waits is in the middle."""
        return sorted(self.alone, key=len)[len(self.alone) // 2]

    @property
    def before(self) -> float:
        """How often a prompt alone waits before the first byte of its request, in the middle."""
        return statistics.median(files.index(FIRST_BYTE) for files in self.alone)


def disk(bench: Bench) -> list[Row]:
    """Count the waits for the disk and the bytes written, of the daemon and of the floor."""
    if not shutil.which("strace"):
        say("no strace here: the waits for the disk and the bytes written are not counted")
        return []
    found: dict[str, list[Counted]] = {DAEMON: [], FLOOR: []}
    for run in range(bench.amount.few):
        for name, counted in found.items():
            say(f"disk, run {run + 1}: {name}")
            counted.append(count(bench, name))
    return rows(found, bench.amount.jobs)


def rows(found: dict[str, list[Counted]], jobs: int) -> list[Row]:
    """Return the rows and bounds."""
    last = found[DAEMON][-1]

    def row(metric: str, unit: str, most: float, value, note: str = "") -> Row:
        figures = [Figure(name, "", [value(one) for one in counted]) for name, counted in found.items()]
        return Row(metric, figures, [Check(unit, figures[0], most)], note)

    return [
        row("waits for the disk before the first byte, one prompt at a time", "waits", 2, lambda one: one.before),
        row(
            "waits for the disk of one job, one prompt at a time",
            "waits",
            10,
            lambda one: len(one.usual) - 1,
            numbered(last.usual),
        ),
        row(
            f"waits for the disk of one job, {jobs} prompts at the same time",
            "waits",
            7,
            lambda one: sum(one.waits.values()),
            listed(last.waits),
        ),
        row(
            f"bytes written for each byte of image, {jobs} prompts at the same time",
            "bytes",
            1.1,
            lambda one: sum(one.written.values()),
            listed(last.written),
        ),
    ]


def numbered(files: list[str]) -> str:
    """Return waited-for files as numbered lines; ``FIRST_BYTE`` has no number."""
    place = files.index(FIRST_BYTE)
    lines = [f"{number}. `{file}`" for number, file in enumerate(files[:place] + files[place + 1 :], 1)]
    return "\n".join([*lines[:place], f"*{FIRST_BYTE}*", *lines[place:]])


def listed(amounts: dict[str, float]) -> str:
    """Return amounts of files as lines, the largest first, without those below 0.005."""
    ordered = sorted(amounts.items(), key=lambda item: -item[1])
    return "\n".join(f"{plain(amount)} `{file}`" for file, amount in ordered if amount >= 0.005)


def count(bench: Bench, name: str) -> Counted:
    """Run a contender under strace and count."""
    trace, root = Trace(bench.root / "trace"), (bench.root / "work").resolve()
    with Stamping() as endpoint, Contender(name, root, endpoint, SLOTS, under=trace.command) as contender:
        trace.take()
        alone = [waited_for(done(contender, trace, 1), root) for _ in range(bench.amount.drops)]
        calls = done(contender, trace, bench.amount.jobs)
    waits = Counter(file for file in waited_for(calls, root) if file != FIRST_BYTE)
    written: Counter[str] = Counter()
    for call in calls:
        if call.name in WRITES and call.target.startswith(f"{root}/"):
            written[kind(call.target, root)] += call.result
    return Counted(
        alone,
        {file: waits[file] / bench.amount.jobs for file in waits},
        {file: written[file] / bench.amount.jobs / SIZE for file in written},
    )


def done(contender: Contender, trace: Trace, jobs: int) -> list[Call]:
    """Drop prompts at the same time, wait for them and for what comes afterwards, and return the calls."""
    contender.finish([contender.drop()[0] for _ in range(jobs)])
    PAUSE(AFTERWARDS)
    return trace.take()


def waited_for(calls: list[Call], root: Path) -> list[str]:
    """Return the kinds of the files that calls waited for, in order, with ``FIRST_BYTE`` before the first request."""
    files, sent = [], False
    for call in calls:
        if call.name in WAITS:
            files.append(kind(call.target, root) if call.target else call.name)
        elif call.name in SENDS and call.target.startswith("TCP") and not sent:
            files.append(FIRST_BYTE)
            sent = True
    return files


def kind(path: str, root: Path) -> str:
    """Return the path of a file without what differs from job to job."""
    name = re.sub(r"\b[0-9a-f]{16}\b", "ID", os.path.relpath(path, root))
    return re.sub(r"\bjob-[0-9]{6}\b", "NAME", name)
