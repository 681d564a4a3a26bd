"""The syncs of one job, and how its time is spent."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING

from contenders import DAEMON, HERE, Contender
from daemon import PAUSE
from figures import Check, Figure, Row, ratio
from loop import SYNCS
from plan import say
from stamping import Stamping

if TYPE_CHECKING:
    from plan import Bench


def job(bench: Bench) -> list[Row]:
    """Measure one job."""
    return [*sync_rows(bench), phase_row(bench)]


def sync_rows(bench: Bench) -> list[Row]:
    """Count the syncs of a job."""
    if not shutil.which("strace"):
        say("no strace here: the syncs of one job are not counted")
        return []
    say("job: its syncs")
    known = syncs(bench)
    note = "\n".join(f"{number}. `{path}`" for number, path in enumerate(known, 1))
    mine, floor = Figure("imagewatch", "", [len(known)]), Figure("loop", "", [len(SYNCS)])
    # The loop is a valid baseline only if it syncs as often.
    fewer = Check("loop / imagewatch", ratio(floor, mine), 1.0, at_most=False)
    return [
        Row(
            "how often one job waits for the disk",
            [mine, floor],
            [Check("/ loop", ratio(mine, floor), 1.0), fewer],
            note,
        )
    ]


def syncs(bench: Bench) -> list[str]:
    """Return the names of the files that one job of the daemon syncs, in order."""
    trace = bench.root / "trace"
    under = ("strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace))
    with Stamping() as endpoint, Contender(DAEMON, bench.root / "work", endpoint, under=under) as contender:
        before = len(trace.read_text().splitlines())
        name, _ = contender.drop()
        contender.finish([name])
        PAUSE(1)
        lines = trace.read_text().splitlines()[before:]
    paths = [match[1] for line in lines if (match := re.search(r"sync\(\d+<([^>]*)>", line))]
    return [re.sub(r"\b[0-9a-f]{16}\b", "ID", os.path.relpath(path, bench.root / "work")) for path in paths]


def phase_row(bench: Bench) -> Row:
    """Measure how the time of a job is spent. The measurement itself takes time, so there is no bound."""
    spent: dict[str, Figure] = {}
    for run in range(bench.amount.few):
        say(f"job, run {run + 1}: its parts")
        for part, milliseconds, calls in phases(bench):
            figure = spent.setdefault(part, Figure(f"{part} ({calls:.0f} times)", "ms"))
            figure.values.append(milliseconds)
    whole = Figure("all", "ms", [sum(values) for values in zip(*(one.values for one in spent.values()), strict=True)])
    for figure in spent.values():
        figure.unit = f"ms, {figure.median / whole.median:.0%}"
    return Row("how the time of one job of 1.5 MB is spent", [*spent.values(), whole])


def phases(bench: Bench) -> list[tuple[str, float, float]]:
    """Return the parts of one job: milliseconds, and how often each is entered."""
    out = bench.root / "phases.json"
    command = (sys.executable, str(HERE / "phases.py"), str(out))
    with Stamping() as endpoint, Contender(DAEMON, bench.root / "work", endpoint, instead=command) as contender:
        for _ in range(3 * bench.amount.drops):
            contender.finish([contender.drop()[0]])
        contender.stop()
    found = json.loads(out.read_text())
    done = found["worker: everything else"][1]  # including warm-up
    return [(part, spent / done, calls / done) for part, (spent, calls) in found.items()]
