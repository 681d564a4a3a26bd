"""How the time of one job is spent."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from contenders import DAEMON, HERE, Contender
from figures import Figure, Row
from plan import say
from stamping import Stamping

if TYPE_CHECKING:
    from plan import Bench


def job(bench: Bench) -> list[Row]:
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
    return [Row("how the time of one job of 1.5 MB is spent", [*spent.values(), whole])]


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
