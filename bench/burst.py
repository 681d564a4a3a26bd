"""Very many prompts at the same time for a running or stopped daemon: none is missed, none is sent twice."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from daemon import PAUSE, SLOTS, Daemon, drop, environment, jobs
from endpoint import Endpoint
from figures import Check, Figure, Row
from plan import say

if TYPE_CHECKING:
    from pathlib import Path

    from plan import Bench


def burst(bench: Bench) -> list[Row]:
    """Drop very many at the same time, also while the daemon is stopped, and count the requests at the endpoint."""
    rows = []
    with Endpoint(1, 2000, keep=True) as endpoint:
        for count, stop in ((2000, False), (bench.amount.flood, True)):
            say(f"burst: {count:,}" + (", stopped meanwhile" if stop else ""))
            took, peak, asked = drop_together(
                bench.root / ("stopped" if stop else "running"), endpoint, count, stop=stop
            )
            missed, twice = count - len(set(asked)), len(asked) - len(set(asked))
            rows.append(
                Row(
                    f"{count:,} dropped at the same time" + (", the daemon stopped meanwhile" if stop else ""),
                    [Figure("until all were completed", "s", [took]), Figure("memory at its peak", "MB", [peak])],
                    [Check("missed", Figure("", "", [missed]), 0), Check("twice", Figure("", "", [twice]), 0)],
                )
            )
    return rows


def drop_together(root: Path, endpoint: Endpoint, count: int, *, stop: bool) -> tuple[float, float, list[str]]:
    """Drop prompts for a running daemon; return seconds until all were completed, its memory, and the prompts sent.

    While it is stopped (SIGSTOP) it does not read the kernel's queue of events, which keeps 16,384 of them by default.
    """
    daemon = Daemon(root, environment(root, endpoint.base_url, inbox__settle_seconds=1, limits__concurrency=SLOTS))
    endpoint.forget()
    with daemon:
        daemon.until(daemon.has_scanned)
        began = time.monotonic()
        if stop:
            daemon.process.send_signal(signal.SIGSTOP)
        drop(daemon.inbox, jobs(count))
        if stop:
            daemon.process.send_signal(signal.SIGCONT)
        daemon.until(daemon.is_done, every=0.25)
        took = time.monotonic() - began
        PAUSE(2)  # time for a second request, which must not come
        return took, daemon.memory("VmHWM"), list(endpoint.prompts)
