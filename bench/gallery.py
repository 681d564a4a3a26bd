"""How long ``imagewatch gallery`` takes over many jobs: with no thumbnail yet, with all of them, and to see a change.

    python bench/gallery.py [JOBS]

Real receipts' text, pictures of 1024 x 1024 under one name each (hard links of a few). The bounds are ratios.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import tomli_w
from PIL import Image

from imagewatch.config import load
from imagewatch.gallery import Gallery

MOST_WARM = 0.1  # of the time without thumbnails
MOST_BYTES = 1000  # of the page, for each job


def fill(root: Path, jobs: int) -> None:
    """Write the folders of so many finished jobs."""
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
        document = {
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
        (outbox / f"job-{number}.receipt.toml").write_text(tomli_w.dumps(document))


def main() -> int:
    """Measure, print, return 1 when a bound is passed."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        fill(root, jobs)
        environ = {"IMAGEWATCH_FOLDERS__ROOT": str(root / "watched"), "IMAGEWATCH_FOLDERS__STATE": str(root / "state")}
        config = load(None, environ)
        times = []
        gallery = Gallery(config)
        for again in (gallery.write, Gallery(config).write, gallery.refresh, gallery.outdated):
            began = time.perf_counter()
            again()
            times.append(time.perf_counter() - began)
        cold, warm, same, look = times
        size = (root / "watched/gallery.html").stat().st_size / jobs
    print(f"{jobs} jobs: {cold:.2f} s without thumbnails ({cold / jobs * 1000:.1f} ms each), {warm:.2f} s with them")
    print(f"kept open: {same:.3f} s to see that nothing is new, {look * 1e6:.0f} µs to see that no folder changed")
    print(f"page: {size:.0f} bytes for each job (at most {MOST_BYTES}); warm to cold {warm / cold:.2f} ({MOST_WARM})")
    return int(warm > cold * MOST_WARM or size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
