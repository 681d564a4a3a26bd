"""Peak memory of the real daemon during huge jobs, above its own memory at rest.

The kernel records the high-water mark and can reset it. Each case is warmed up with a small prompt first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemon import MB, Daemon, drop, environment
from endpoint import Endpoint, png
from figures import Check, Figure, Row
from plan import say

if TYPE_CHECKING:
    from pathlib import Path

    from plan import Bench

INPUTS, OUTPUTS, SIZE = 14, 4, 20 * MB
CASES = (
    # what, jobs, input images of each, images in the response, most MB
    ("14 x 20 MB in", 1, INPUTS, 0, 2.4),
    ("4 x 20 MB out", 1, 1, OUTPUTS, 6.0),
    ("8 jobs at the same time, 14 in and 4 out", 8, INPUTS, OUTPUTS, 40.0),
)


def memory(bench: Bench) -> list[Row]:
    """Measure huge jobs."""
    rows = []
    for number, (what, jobs, inputs, outputs, most) in enumerate(CASES):
        rest, above = Figure("at rest", "MB"), Figure("above it", "MB")
        for run in range(bench.amount.few):
            say(f"memory, run {run + 1}: {what}")
            before, peak = huge(bench.root / f"memory-{run}-{number}", jobs, inputs, outputs)
            rest.values.append(before)
            above.values.append(peak - before)
        rows.append(Row(f"peak memory: {what}", [rest], [Check("MB above rest", above, most)]))
    return rows


def huge(root: Path, jobs: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the memory at rest, and its peak during some huge jobs, MB."""
    # A request of more than 10 kB gets the large answer.
    with Endpoint(outputs or 1, SIZE if outputs else 2000) as endpoint:
        environ = environment(root, endpoint.base_url, inbox__settle_seconds=0.5, limits__concurrency=jobs)
        with Daemon(root, environ) as daemon:
            daemon.until(daemon.has_scanned)
            drop(daemon.inbox, ["warm"])
            daemon.until((daemon.outbox / "warm.receipt.toml").exists)
            rest = daemon.memory()
            daemon.forget_peak()
            names, image = [f"huge-{number}" for number in range(jobs)], png(SIZE if inputs > 1 else 20_000)
            for name in names:
                for number in range(inputs):
                    (daemon.inbox / f"{name}.{number + 1}.png").write_bytes(image)
            drop(daemon.inbox, names)
            daemon.until(lambda: all((daemon.outbox / f"{name}.receipt.toml").exists() for name in names), every=0.05)
            return rest, daemon.memory("VmHWM")
