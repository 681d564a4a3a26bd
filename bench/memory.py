"""Peak memory of the real daemon while it carries one huge job, above its own memory at rest, in one run.

    python bench/memory.py

One request with 14 input images of 20 MB, answered with 4 images of 20 MB. Linux only: it reads and resets the
kernel's own high-water mark of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from endpoint import Endpoint, png

MB = 1_000_000
INPUTS, OUTPUTS, SIZE = 14, 4, 20 * MB
MOST_MB = 8.0


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


def drop(inbox: Path, stem: str, inputs: int, picture: bytes) -> None:
    """Drop a prompt with its images, images first."""
    for number in range(inputs):
        (inbox / f"{stem}.{number + 1}.png").write_bytes(picture)
    (inbox / f"{stem}.part").write_text("make it blue\n")
    (inbox / f"{stem}.part").rename(inbox / f"{stem}.prompt.txt")


def main() -> int:
    """Measure, print a table, return 1 when a bound is passed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name, Endpoint(OUTPUTS, SIZE) as endpoint:
        root = Path(name)
        environ = {
            "PATH": os.environ["PATH"],
            "LETTA_BASE_URL": endpoint.base_url,
            "LETTA_API_KEY": "bench",
            "IMAGEWATCH_FOLDERS__ROOT": str(root / "watched"),
            "IMAGEWATCH_FOLDERS__STATE": str(root / "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0.5",
        }
        inbox, outbox = root / "watched/inbox", root / "watched/outbox"
        daemon = subprocess.Popen([sys.executable, "-m", "imagewatch", "run"], env=environ, stderr=subprocess.DEVNULL)
        try:
            wait_for(root / "watched/inbox/.imagewatch/lock")
            drop(inbox, "warm", 0, b"")
            wait_for(outbox / "warm.receipt.toml")
            rest = status(daemon.pid, "VmRSS")
            Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
            began = time.monotonic()
            drop(inbox, "huge", INPUTS, png(SIZE))
            wait_for(outbox / "huge.receipt.toml")
            took, peak = time.monotonic() - began, status(daemon.pid, "VmHWM")
        finally:
            daemon.terminate()
            daemon.wait()
        print(f"request {INPUTS} x {SIZE / MB:.0f} MB, answer {OUTPUTS} x {SIZE / MB:.0f} MB, {took:.1f} s")
        print(f"at rest {rest:.1f} MB, peak {peak:.1f} MB, difference {peak - rest:+.1f} MB (at most {MOST_MB:+.1f})")
        print(f"endpoint: {endpoint.requests} requests, {endpoint.received / MB:.0f} MB received")
    return 0 if peak - rest <= MOST_MB else 1


if __name__ == "__main__":
    sys.exit(main())
