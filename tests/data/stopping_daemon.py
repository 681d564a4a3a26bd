"""The real daemon, which stops before each change of the disk until it may continue; ``make_earlier`` starts it.

While it stops, its folders are what a kill at that point would leave: a kill changes nothing on the disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from support.daemon import TESTS, Folders
from support.losing import SteppingDisk

from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.endpoint.client import Client
from imagewatch.endpoint.saved_answer import Sink
from imagewatch.journal.sqlite import Database
from imagewatch.system import log
from imagewatch.system.errors import Broken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

JOB = re.compile(r"[0-9a-f]{16}")
_TOP = re.compile(r"/\S*/(watched|state)\b")
_LOCK = threading.RLock()


def start(folders: Folders, fault: str) -> subprocess.Popen[bytes]:
    """Start the daemon in a process of its own."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), "PYTHONPATH": str(TESTS), **folders.environ}
    command = [sys.executable, __file__, fault]
    return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def points(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield each point at which it stops, without what is random; it continues afterwards, unless it was killed."""
    assert process.stdin
    assert process.stdout
    for line in process.stdout:
        yield JOB.sub("JOB", _TOP.sub(r"\1", os.fsdecode(line.rstrip(b"\n"))))
        if process.poll() is not None:
            return
        process.stdin.write(b"\n")
        process.stdin.flush()


def _stop(what: str) -> None:
    """Stop until a byte comes; all threads that would change something wait, too."""
    os.write(1, os.fsencode(what) + b"\n")
    if not os.read(0, 1):
        os._exit(1)


class StoppingDisk(SteppingDisk):
    """A disk that one thread at a time changes, and that stops before."""

    def step(self, what: str, path: str) -> None:
        _stop(f"{what} {path}")


def _locked(change: Callable[..., Any]) -> Callable[..., Any]:
    def locked(*arguments: Any, **options: Any) -> Any:
        with _LOCK:
            return change(*arguments, **options)

    return locked


def _replace(owner: type, name: str, by: Callable[..., Any]) -> None:
    """Replace a method by one that gets the earlier one as its first argument."""
    before = getattr(owner, name)
    setattr(owner, name, _locked(lambda *arguments, **options: by(before, *arguments, **options)))


def _change(before: Callable[..., None], database: Database, act: object) -> None:
    _stop("ledger")
    before(database, act)


def _put(before: Callable[..., None], sink: Sink, content: bytes | memoryview) -> None:
    """Stop before a piece of the response is written, and in the middle of the body."""
    _stop("response")
    half = len(content) // 2 if len(content) > 100 else len(content)
    before(sink, content[:half])
    if content[half:]:
        _stop("rest of the response")
        before(sink, content[half:])


def _break_off(_client: Client, _job: str, _body: object, on_send: Callable[[], Any], _sink: Sink) -> None:
    with on_send():
        pass
    raise Broken("the connection broke while the request was sent")


if __name__ == "__main__":
    for method in [name for name, value in vars(SteppingDisk).items() if callable(value) and name != "step"]:
        setattr(StoppingDisk, method, _locked(getattr(StoppingDisk, method)))
    StoppingDisk.jot = _locked(StoppingDisk.jot)  # type: ignore[method-assign]
    _replace(Database, "change", _change)
    _replace(Sink, "_put", _put)
    if sys.argv[1:] == ["broken"]:
        Client.send = _break_off  # type: ignore[method-assign]
    log.configure("error", "json")
    Daemon(load(None, os.environ), os.environ, disk=StoppingDisk(), once=True).run()
