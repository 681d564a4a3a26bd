"""Run the real daemon of a shared database, with short waits; at one step of its jobs, do what the test asks for.

Arguments: what to do, and at which step; 0: never, and print how many there were. ``kill``: end. ``stop``: stop the
whole process, until it is continued. ``pause``: let the thread wait until the file in ``RESUME`` exists. A step is a
change that a worker makes to the disk, what comes before and after a commit, and the first byte of a request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from imagewatch.protocol import reasons

HOLD_SECONDS = 0.3
reasons.DISK_SECONDS = HOLD_SECONDS  # before it is imported from there
for _kind in reasons.STORES:
    reasons.KINDS[_kind] = dataclasses.replace(reasons.KINDS[_kind], seconds=HOLD_SECONDS)

from imagewatch.config.load import load  # noqa: E402
from imagewatch.daemon.loop import Daemon  # noqa: E402
from imagewatch.job.sending import Sending  # noqa: E402
from imagewatch.journal.postgres import database, presence, session  # noqa: E402
from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: E402
from imagewatch.system import log  # noqa: E402
from support.losing import SteppingDisk  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 1.5


def hurry() -> None:
    """Make all waits for the database short."""
    session._SILENT_SECONDS = 1.0
    session._PARAMETERS["connect_timeout"] = "2"
    session._SETTINGS |= {"lock_timeout": "1s", "idle_in_transaction_session_timeout": "1500ms"}
    assert PostgresDatabase.__init__.__kwdefaults__ is not None
    PostgresDatabase.__init__.__kwdefaults__["patience"] = PATIENCE
    database._CLOSE_SECONDS = 1.0
    presence._RETRY_SECONDS = 0.5


class DisturbedDisk(SteppingDisk):
    """A real disk that notes the steps of workers.

    Args:
        action: What to do at the step.
        number: The step, from 1; 0: none.
    """

    def __init__(self, action: str, number: int) -> None:
        self._action, self._number = action, number
        self._lock = threading.Lock()
        self.steps = 0
        self.is_over = False

    def step(self, what: str, path: str) -> None:
        if self.is_over or threading.current_thread() is threading.main_thread():
            return  # in the main thread: such as the status
        with self._lock:
            self.steps += 1
            if self.steps != self._number:
                return
        os.write(2, f'{{"event": "step", "what": "{what}", "path": "{path}"}}\n'.encode())
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._action == "pause":
            while not os.path.exists(os.environ["RESUME"]):
                threading.Event().wait(0.01)


def watch(disk: DisturbedDisk) -> None:
    """Let commits, and the first bytes of requests, be steps, too."""
    commit, first_bytes, unregister = PostgresDatabase._commit, Sending._first_bytes, PostgresDatabase.unregister

    def counted(self: PostgresDatabase, *values: Any) -> None:
        disk.step("commit", "")
        commit(self, *values)
        disk.step("what follows a commit", "")

    @contextlib.contextmanager
    def watched(self: Sending, *values: Any) -> Iterator[None]:
        disk.step("first byte", "")
        with first_bytes(self, *values):
            yield
        disk.step("what follows the first byte", "")

    def ended(self: PostgresDatabase) -> None:
        disk.is_over = True
        unregister(self)

    PostgresDatabase.unregister = ended  # type: ignore[method-assign]
    PostgresDatabase._commit = counted  # type: ignore[method-assign]
    Sending._first_bytes = watched  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    faulthandler.enable()
    log.configure("info", "json")
    hurry()
    disk = DisturbedDisk(sys.argv[1], int(sys.argv[2]))
    watch(disk)
    daemon = Daemon(load(None, os.environ), os.environ, disk=disk)
    code = daemon.run()
    sys.stdout.write(f"{disk.steps}\n")
    sys.exit(code)
