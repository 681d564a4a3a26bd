"""Peak memory of the real daemon while it carries one huge job, above its own memory at rest, in one run.

    python bench/memory.py
    python bench/memory.py --write-docs

14 input images of 20 MB with a small answer; a small request answered with 4 images of 20 MB; eight jobs at once with
both. Linux only: it reads and resets the kernel's own high-water mark of the process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import page
from endpoint import KEY, Endpoint, png

MB = 1_000_000
INPUTS, OUTPUTS, SIZE = 14, 4, 20 * MB
CASES = (
    # what, jobs, input images each, pictures in the answer, most MB
    ("14 x 20 MB in", 1, INPUTS, 0, 8.0),
    ("4 x 20 MB out", 1, 1, OUTPUTS, 8.0),
    ("8 jobs at once, 14 in and 4 out", 8, INPUTS, OUTPUTS, 40.0),
)


def status(pid: int, name: str) -> float:
    """Return a field of /proc/PID/status in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise KeyError(name)


def wait_for(path: Path, seconds: float = 300) -> None:
    """Wait until a file is there."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not path.exists():
        if time.monotonic() > end:
            sys.exit(f"{path} did not appear")
        pause.wait(0.05)


def images(inbox: Path, stem: str, count: int, picture: bytes) -> None:
    """Drop the images of a prompt."""
    for number in range(count):
        (inbox / f"{stem}.{number + 1}.png").write_bytes(picture)


def drop(inbox: Path, stem: str) -> None:
    """Drop a prompt."""
    (inbox / f"{stem}.part").write_text("make it blue\n")
    (inbox / f"{stem}.part").rename(inbox / f"{stem}.prompt.txt")


def measure(what: str, jobs: int, inputs: int, outputs: int, most: float) -> float:
    """Measure one case, print a line; return the peak above the memory at rest, MB."""
    # A request of more than 10 kB gets the large answer.
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name,
        Endpoint(outputs or 1, SIZE if outputs else 2000) as endpoint,
    ):
        root = Path(name)
        environ = {
            "PATH": os.environ["PATH"],
            "LETTA_BASE_URL": endpoint.base_url,
            "LETTA_API_KEY": KEY,
            "IMAGEWATCH_FOLDERS__ROOT": str(root / "watched"),
            "IMAGEWATCH_FOLDERS__STATE": str(root / "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0.5",
            "IMAGEWATCH_LIMITS__CONCURRENCY": str(jobs),
        }
        inbox, outbox = root / "watched/inbox", root / "watched/outbox"
        daemon = subprocess.Popen([sys.executable, "-m", "imagewatch", "run"], env=environ, stderr=subprocess.DEVNULL)
        try:
            wait_for(root / "watched/inbox/.imagewatch/lock")
            drop(inbox, "warm")
            wait_for(outbox / "warm.receipt.toml")
            rest = status(daemon.pid, "VmRSS")
            Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
            began, picture = time.monotonic(), png(SIZE if inputs > 1 else 20_000)
            for number in range(jobs):
                images(inbox, f"huge-{number}", inputs, picture)
            for number in range(jobs):
                drop(inbox, f"huge-{number}")
            for number in range(jobs):
                wait_for(outbox / f"huge-{number}.receipt.toml")
            took, peak = time.monotonic() - began, status(daemon.pid, "VmHWM")
        finally:
            daemon.terminate()
            daemon.wait()
    print(f"{what}: {peak - rest:+.1f} MB above {rest:.1f} MB at rest (at most {most:+.1f}), {took:.1f} s")
    return peak - rest


def main() -> int:
    """Measure, print, return 1 when a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    found = [(case[0], measure(*case), case[-1]) for case in CASES]
    if arguments.write_docs:
        lines = ["| what | above rest | at most |", "|---|--:|--:|"]
        lines += [f"| {what} | {above:.1f} MB | {most:.0f} MB |" for what, above, most in found]
        page.put("memory", "\n".join([*lines, ""]))
    return any(above > most for _, above, most in found)


if __name__ == "__main__":
    sys.exit(main())
