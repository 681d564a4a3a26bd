"""The real daemon on folders of its own, and figures of the kernel about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from endpoint import KEY

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 1_000_000
TICKS = os.sysconf("SC_CLK_TCK")
PAUSE = threading.Event().wait
SLOTS = 4
"""Requests at the same time if the number does not matter: the default."""
COMMAND = (sys.executable, "-m", "imagewatch")


def environment(root: Path, base_url: str, **settings: object) -> dict[str, str]:
    """Return the environment that configures imagewatch.

    Args:
        root: Where its folders are.
        base_url: The API.
        settings: Keys of the configuration as ``section__key``.
    """
    return {
        "PATH": os.environ["PATH"],
        "LETTA_BASE_URL": base_url,
        "LETTA_API_KEY": KEY,
        "IMAGEWATCH_FOLDERS__ROOT": str(root),
        "IMAGEWATCH_FOLDERS__STATE": str(root / "state"),
        **{f"IMAGEWATCH_{name.upper()}": str(value) for name, value in settings.items()},
    }


@dataclass
class Daemon:
    """The daemon; ``with`` starts and ends it.

    Attributes:
        root: Its folders.
        environ: From ``environment``.
    """

    root: Path
    environ: dict[str, str] = field(repr=False)

    def __post_init__(self) -> None:
        self.inbox, self.outbox, self.state = (self.root / name for name in ("inbox", "outbox", "state"))
        self.inbox.mkdir(parents=True)
        self.state.mkdir(mode=0o700)

    def command(self, *words: str) -> None:
        """Run another command on the same folders."""
        subprocess.run([*COMMAND, *words], env=self.environ, check=True, capture_output=True)

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.process = subprocess.Popen([*COMMAND, "run"], env=self.environ, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)  # the rest of the inbox does not matter
        self.process.wait()

    def memory(self, name: str = "VmRSS") -> float:
        """Return memory in MB: ``VmRSS``, or the highest so far, ``VmHWM``."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 / MB for line in text.splitlines() if line.startswith(name + ":"))

    def forget_peak(self) -> None:
        """Reset the kernel's high-water mark."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def ticks(self) -> int:
        """Return the CPU time used so far, in ticks of the kernel."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def wake_ups(self) -> int:
        """Return how often its threads woke up after waiting."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            text = (task / "status").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("voluntary"))
        return total

    def page(self) -> dict[str, Any]:
        """Return its status."""
        try:
            return json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def has_scanned(self) -> bool:
        """Return whether it has scanned the inbox."""
        return bool(self.page().get("last_scan"))

    def waiting(self) -> int:
        """Return how many prompts wait for a worker according to its status."""
        return self.page().get("waiting", {}).get("ready", -1)

    def is_done(self) -> bool:
        """Return whether the inbox has no prompts and no claims."""
        prompts, claims = self.inbox.glob("*.prompt.txt"), (self.inbox / ".imagewatch").iterdir()
        return not any(prompts) and not any(path.is_dir() for path in claims)

    def until(self, condition: Callable[[], bool], every: float = 0.005) -> float:
        """Wait for a condition; return the seconds since the start."""
        end = time.monotonic() + 600
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                sys.exit("the condition did not become true")
            PAUSE(every)
        return time.monotonic() - self.began


def jobs(count: int) -> list[str]:
    """Return the names of this number of prompts."""
    return [f"job-{number:06}" for number in range(count)]


def drop(inbox: Path, names: list[str]) -> None:
    """Drop prompts by rename, as fast as one process can; the text of each is its name."""
    part = inbox / ".part"
    for name in names:
        part.write_text(name)
        part.rename(inbox / f"{name}.prompt.txt")
