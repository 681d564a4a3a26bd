"""Times until the daemon is ready, and until a command has printed something."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from daemon import COMMAND, environment
from figures import Check, Figure, Row, ratio

if TYPE_CHECKING:
    from plan import Bench

CORE = "import httpx, watchdog.observers, structlog, tomli_w"
ARGPARSE = "import argparse, json, logging, pathlib; argparse.ArgumentParser().parse_args()"


def start(bench: Bench) -> list[Row]:
    """Measure the time until the daemon is ready, and the time of two commands."""
    # With bytecode, as after an installation by pip. Otherwise an edited file would be compiled during the measurement.
    package = Path(__file__).parent.parent / "imagewatch"
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(package)], check=True)
    environ = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    daemon = Figure("to READY", "s")
    others = {
        "core import": [sys.executable, "-c", CORE],
        "argparse": [sys.executable, "-c", ARGPARSE],
        "--version": [*COMMAND, "--version"],
        "--help": [*COMMAND, "--help"],
    }
    times = {name: Figure(name, "s") for name in others}
    for run in range(bench.amount.starts + 1):
        values = {name: timed(command, environ) for name, command in others.items()}
        ready = to_ready(bench.root / f"start-{run}", environ)
        if run:  # the first run only warms the cache
            daemon.values.append(ready)
            for name, value in values.items():
                times[name].values.append(value)
    core, argparse_ = times["core import"], times["argparse"]
    return [
        Row("start-up to READY", [daemon, core], [Check("/ core import", ratio(daemon, core), 1.5)]),
        *(
            Row(f"`{name}`", [times[name], argparse_], [Check("/ argparse", ratio(times[name], argparse_), 2.0)])
            for name in ("--version", "--help")
        ),
    ]


def timed(command: list[str], environ: dict[str, str]) -> float:
    """Return how long a command takes, seconds."""
    began = time.monotonic()
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def to_ready(root: Path, environ: dict[str, str]) -> float:
    """Return how long the daemon takes until it notifies the service manager that it is ready, seconds."""
    root.mkdir()
    path = root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(30)
        # No request is sent during the measurement.
        environ = {**environ, **environment(root, "http://127.0.0.1:9"), "NOTIFY_SOCKET": str(path)}
        began = time.monotonic()
        process = subprocess.Popen([*COMMAND, "run"], env=environ, stderr=subprocess.DEVNULL)
        try:
            while b"READY=1" not in channel.recv(4096):
                pass
            return time.monotonic() - began
        finally:
            process.terminate()
            process.wait()
