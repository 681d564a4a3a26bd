"""Run the real daemon of a common inbox, and stop it before a step.

A step is a change of the disk or of the journal that concerns a job, the first byte of a request, or a piece of its
response. Each is written to a file, one a line, so that a test sees where the process stopped::

    STEPS_FILE   the file; STEPS_FILE.stopped has the number of the step before which the process has stopped
    STOP_BEFORE  the number of the step, from 1; or parts of its line, with | between them: the first with all of them
    KILL_BEFORE  as STOP_BEFORE: then the process is killed, whatever STOP_BEFORE is
    READ_ONLY_FILE  while it is there, the folder of claimed files cannot be changed
    STOP_BY      kill: SIGKILL; stop: SIGSTOP; pause: only the thread waits, until the file STEPS_FILE.go is there
    LEASE        how long a job is held after a sign of its daemon, seconds
    GIVEN_UP     how long after another daemon has sent a request its charge is unknown, seconds
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.endpoint.saved_answer import Sink
from imagewatch.job import common_steps
from imagewatch.job.handover import Handover
from imagewatch.job.sending import Sending
from imagewatch.journal.common import Common
from imagewatch.journal.holds import Holds
from imagewatch.journal.postgres.database import PostgresDatabase
from imagewatch.system import log
from imagewatch.system.errors import SpoolError
from support.losing import SteppingDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FILE = os.environ["STEPS_FILE"]
_BEFORE = os.environ.get("STOP_BEFORE", "")
_KILL_BEFORE = os.environ.get("KILL_BEFORE", "")
_LOCK = threading.Lock()
_inside = threading.local()
_steps = 0


def step(what: str) -> None:
    """Note a step, and stop before it if it is the one."""
    global _steps  # noqa: PLW0603
    if not (getattr(_inside, "counts", False) or threading.current_thread().name.startswith("worker")):
        return
    with _LOCK:
        _steps += 1
        with open(_FILE, "a") as file:
            file.write(f"{what}\n")
        if _KILL_BEFORE and all(part in what for part in _KILL_BEFORE.split("|")):
            os.kill(os.getpid(), signal.SIGKILL)
        stopped = f"{_FILE}.stopped"
        if not _is_it(what) or os.path.exists(stopped):
            return
        with open(stopped, "w") as file:
            file.write(str(_steps))
    match os.environ["STOP_BY"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "pause":
            while not os.path.exists(f"{_FILE}.go"):
                threading.Event().wait(0.02)


def _is_it(what: str) -> bool:
    if _BEFORE.isdigit():
        return int(_BEFORE) == _steps
    return bool(_BEFORE) and all(part in what for part in _BEFORE.split("|"))


class StoppingDisk(SteppingDisk):
    """A real disk whose changes are steps."""

    def step(self, what: str, path: str) -> None:
        step(f"{what} {path}")
        if "/.imagewatch/" in path and os.path.exists(os.environ["READ_ONLY_FILE"]):
            raise SpoolError("read-only file system", path=path, code=errno.EROFS)


def _counting(owner: type, name: str) -> None:
    """Let the changes of disk and journal within a method count in any thread."""
    before = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        _inside.counts = True
        try:
            return before(*arguments, **options)
        finally:
            _inside.counts = False

    setattr(owner, name, counted)


def _watch_changes() -> None:
    """Let each change of the journal, and what follows it, be a step."""
    change = PostgresDatabase.change

    def counted(self: PostgresDatabase, act: Callable[..., Any], **options: Any) -> Any:
        name = act.__qualname__.removesuffix(".<locals>.act").removesuffix(".<locals>.<lambda>")
        step(f"journal {name}")
        value = change(self, act, **options)
        step(f"after journal {name}")
        return value

    PostgresDatabase.change = counted  # type: ignore[method-assign]


def _watch_request() -> None:
    """Let the first byte, and each piece of the response, be a step."""
    first_bytes, put = Sending._first_bytes, Sink._put

    @contextlib.contextmanager
    def counted(self: Sending, fate: Any) -> Iterator[None]:
        step("first byte")
        with first_bytes(self, fate):
            yield

    def counted_put(self: Sink, content: bytes) -> None:
        step("response")
        put(self, content)

    Sending._first_bytes = counted  # type: ignore[method-assign, assignment]
    Sink._put = counted_put  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    _watch_changes()
    _watch_request()
    for owner, name in ((Common, "take"), (Common, "take_over"), (Handover, "fence"), (Handover, "give_back_late")):
        _counting(owner, name)
    log.configure("info", "json")
    config = load(None, os.environ)
    common_steps._GRACE_SECONDS = float(os.environ["GIVEN_UP"]) - config.endpoint.deadline_seconds
    config = replace(config, shared=replace(config.shared, lease_seconds=float(os.environ["LEASE"])))
    sys.exit(Daemon(config, os.environ, disk=StoppingDisk(), holds=Holds(first_seconds=0.3)).run())
