"""From a drop to the first byte of its request, and to its durable receipt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from contenders import DAEMON, FLOOR, OBSERVER, PAUSE, SHELL, Contender, missing
from figures import Check, Figure, Row, percentile, ratio
from plan import say
from preload import FolderSyncs
from stamping import SIZE, Stamping

if TYPE_CHECKING:
    from plan import Bench

GAP = 0.6  # seconds before a prompt, so that all threads are idle: longer than watchdog's half a second
EVERY = 0.1  # seconds between prompts while finished ones leave the inbox


def latency(bench: Bench) -> list[Row]:
    """Measure from a drop to the first byte of its request, and to its durable receipt."""
    names = [name for name in (DAEMON, FLOOR, SHELL, OBSERVER) if not missing(name)]
    found: dict[str, dict[str, list[float]]] = {}
    recorder = FolderSyncs(bench.root, bench.root / "work/outbox")
    with Stamping() as endpoint:
        for run in range(bench.amount.runs):
            for name in names:
                say(f"latency, run {run + 1}: {name}")
                syncs = recorder if recorder.environ and name != SHELL else None
                environ = syncs.environ if syncs else {}
                with Contender(name, bench.root / "work", endpoint, environ=environ) as contender:
                    first, receipt = idle(contender, bench.amount.drops, syncs)
                    busy = [] if name == SHELL else leaving(contender, 2 * bench.amount.drops)
                mine = found.setdefault(name, {"first": [], "receipt": [], "busy": [], "all": []})
                mine["first"].append(percentile(first, 0.5))
                mine["receipt"].append(percentile(receipt, 0.5))
                mine["all"] += first
                if busy:
                    mine["busy"].append(percentile(busy, 0.5))
    return latency_rows(
        {name: {kind: Figure(name, "ms", values) for kind, values in mine.items()} for name, mine in found.items()},
        "" if recorder.environ else "no compiler here: the time at which the receipt came, synced or not",
    )


def idle(contender: Contender, drops: int, syncs: FolderSyncs | None) -> tuple[list[float], list[float]]:
    """Drop one prompt at a time; return milliseconds to the first byte, and to the durable receipt.

    Args:
        contender: The program.
        drops: How many prompts.
        syncs: Those of its outbox; a job's last one is that after the receipt. None: a receipt that came is enough.
    """
    dropped, receipts = {}, {}
    for _ in range(drops):
        name, dropped[name] = contender.drop()
        came = contender.finish([name])
        PAUSE(GAP)
        receipts[name] = syncs.times()[-1] if syncs else (came or {}).get(name, 0)
        if receipts[name] < dropped[name]:
            sys.exit(f"{contender.name}: {name} was not done, or its outbox was not synced")
    first = {name: began for name, began, _ in contender.endpoint.take(0, SIZE)["stamps"]}
    return (
        [(first[name] - at) / 1e6 for name, at in dropped.items()],
        [(receipts[name] - at) / 1e6 for name, at in dropped.items()],
    )


def leaving(contender: Contender, drops: int) -> list[float]:
    """Drop prompts while those before them leave the inbox; return milliseconds to the first byte."""
    dropped = {}
    for _ in range(drops):
        name, dropped[name] = contender.drop()
        PAUSE(EVERY)
    contender.finish(dropped)
    first = {name: began for name, began, _ in contender.endpoint.take(0, SIZE)["stamps"]}
    return [(first[name] - at) / 1e6 for name, at in dropped.items()]


def latency_rows(found: dict[str, dict[str, Figure]], note: str) -> list[Row]:
    """Return the rows and bounds of the latencies; the note is on durable receipts."""
    mine, floor, shell = found[DAEMON], found[FLOOR], found.get(SHELL)
    tails = [Figure(f"{name}, p99", "ms", [percentile(one["all"].values, 0.99)]) for name, one in found.items()]
    first = [Check("/ floor", ratio(mine["first"], floor["first"]), 3.0), Check("p99, ms", tails[0], 50.0)]
    receipt = [Check("/ floor", ratio(mine["receipt"], floor["receipt"]), 1.7)]
    if shell:
        first.insert(1, Check("/ shell", ratio(mine["first"], shell["first"]), 1 / 5))
        receipt.append(Check("/ shell", ratio(mine["receipt"], shell["receipt"]), 1 / 2))
    busy = [Check("/ its own, idle", ratio(mine["busy"], mine["first"]), 1.5)]
    return [
        Row(
            "drop → first byte of the request, p50, idle",
            [*(one["first"] for one in found.values()), *tails],
            first,
            missing(SHELL),
        ),
        Row(
            "the same while finished prompts leave the inbox",
            [one["busy"] for one in found.values() if one["busy"].values],
            busy,
        ),
        Row(
            "drop → receipt durable, p50",
            [one["receipt"] for one in found.values()],
            receipt,
            "\n".join(filter(None, (missing(SHELL), note))),
        ),
    ]
