"""Run the real daemon once; its disk kills the process before the change with the number given. 0: never, and count."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading

from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.system import log
from support.losing import SteppingDisk


class KillingDisk(SteppingDisk):
    """A real disk for a process that does not live long.

    Args:
        number: The change, from 1, before which the process is killed.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        self.steps = 0

    def step(self, what: str, path: str) -> None:
        with self._lock:
            self.steps += 1
            if self.steps == self._number:
                os.write(2, f"killed before {what} {path}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    faulthandler.enable()
    log.configure("error", "json")
    disk = KillingDisk(int(sys.argv[1]))
    Daemon(load(None, os.environ), os.environ, disk=disk, once=True).run()
    sys.stdout.write(f"{disk.steps}\n")
