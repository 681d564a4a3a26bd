"""Run the real daemon once, and kill it before the change with the number given. 0: never, and count.

A change is one of the disk, or a commit of the journal; there is a kill after each commit, too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from typing import Any

from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.journal.sqlite import SqliteDatabase
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


def watch_commits(disk: KillingDisk) -> None:
    """Let each commit of the journal count as a change, and what comes right after it as another."""
    commit = SqliteDatabase._commit

    def counted(self: SqliteDatabase, *values: Any) -> None:
        disk.step("commit", self.path)
        commit(self, *values)
        disk.step("what follows a commit", self.path)

    SqliteDatabase._commit = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    faulthandler.enable()
    log.configure("error", "json")
    disk = KillingDisk(int(sys.argv[1]))
    watch_commits(disk)
    Daemon(load(None, os.environ), os.environ, disk=disk, once=True).run()
    sys.stdout.write(f"{disk.steps}\n")
