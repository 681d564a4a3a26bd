"""How long ``imagewatch gallery`` takes for many jobs: without thumbnails, with all of them, and to detect a change.

The receipts have realistic text. The images of 1024 x 1024 are hard links to a few files.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import tomli_w
from figures import Check, Figure, Row, ratio
from gallery_page import in_browser
from PIL import Image
from plan import say

from imagewatch.config.load import load
from imagewatch.gallery import Gallery

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from plan import Bench


def fill(root: Path, jobs: int) -> None:
    """Write the folders of this number of finished jobs."""
    outbox = root / "watched/outbox"
    outbox.mkdir(parents=True)
    pool = []
    for number, kind in enumerate(("png", "jpeg", "webp", "png")):
        noise = [Image.effect_noise((1024, 1024), 20 + 20 * number) for _ in "rgb"]
        pool.append(root / f"{number}.{kind}")
        Image.merge("RGB", noise).save(pool[-1], kind)
    for number in range(jobs):
        source = pool[number % len(pool)]
        name = f"job-{number}{source.suffix}"
        os.link(source, outbox / name)
        receipt = {
            "schema": 1,
            "job": f"{number:016x}",
            "source": f"job-{number}.prompt.txt",
            "charged": "yes",
            "credits_charged": 30,
            "provider": "flux",
            "model": "flux-2-pro",
            "asked": 1,
            "got": 1,
            "prompt": f"A lighthouse on a cliff at dusk, long exposure, calm sea, as seen on day {number}",
            "images": [{"file": name, "bytes": source.stat().st_size, "width": 1024, "height": 1024}],
        }
        (outbox / f"job-{number}.receipt.toml").write_text(tomli_w.dumps(receipt))


def gallery(bench: Bench) -> list[Row]:
    """Measure how long the page takes to be written, and in a browser."""
    jobs = bench.amount.gallery // 10
    cold, warm = Figure("without thumbnails", "ms for each job"), Figure("with all of them", "ms for each job")
    same, check = Figure("to detect that nothing is new", "ms"), Figure("to detect that no folder changed", "ms")
    size = Figure("size", "bytes for each job")
    for run in range(bench.amount.few):
        say(f"gallery, run {run + 1}")
        root = bench.root / f"gallery-{run}"
        fill(root, jobs)
        environ = {"IMAGEWATCH_FOLDERS__ROOT": str(root / "watched"), "IMAGEWATCH_FOLDERS__STATE": str(root / "state")}
        config = load(None, environ)
        kept = Gallery(config)
        cold.values.append(milliseconds(kept.write) / jobs)
        warm.values.append(milliseconds(Gallery(config).write) / jobs)
        same.values.append(milliseconds(kept.refresh))
        check.values.append(milliseconds(kept.outdated))
        size.values.append((root / "watched/gallery.html").stat().st_size / jobs)
    checks = [Check("warm / cold", ratio(warm, cold), 0.1), Check("bytes for each job", size, 1000)]
    return [Row(f"the gallery of {jobs:,} jobs", [cold, warm, same, check], checks), *in_browser(bench)]


def milliseconds(act: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000
