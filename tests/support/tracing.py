"""The real command under strace, which kills it at a system call, or lets that call fail, from outside.

The configuration is a FIFO. The process opens it when it has imported everything and before it does anything, and
while it waits there strace attaches to it. So strace's counters, one for each thread and call, begin at zero
where the work begins, and what the interpreter does to start is not among what is counted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.daemon import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from support.daemon import Folders

KILL = "signal=SIGKILL"
_CALL = re.compile(r"(\d+) +([a-z0-9]+)\(")
_NETWORK = {"connect", "sendto", "recvfrom"}
# Where only ancestors may trace (Yama), the process itself may allow it to others: PR_SET_PTRACER, PR_SET_PTRACER_ANY.
_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@dataclass(frozen=True, order=True)
class Point:
    """The Nth time that a thread makes a system call.

    Attributes:
        call: Its name.
        number: N, from 1, counted from the beginning of the work.
    """

    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.call}, no. {self.number} of its thread"


@dataclass(frozen=True)
class Fault:
    """What strace does at a point.

    Attributes:
        point: Where.
        what: As in strace's ``-e inject=``.
    """

    point: Point
    what: str

    def __str__(self) -> str:
        return f"{self.what} at {self.point}"


@dataclass(frozen=True)
class Traced:
    """A process that was traced and has ended.

    Attributes:
        code: Negative for a signal.
        output: Standard output and standard error.
        log: What strace wrote.
        root: Where all folders are.
    """

    code: int
    output: str
    log: str
    root: Path

    def struck(self, fault: Fault) -> list[bool]:
        """Return for each call that a fault kept from happening, or delayed, whether it was one of ours, by the log.

        An empty list: no thread came to the point.
        """
        marks = (" = ?", "<unfinished ...>") if fault.what == KILL else ("(INJECTED)", "(DELAYED)")
        if fault.what == KILL and self.code != -signal.SIGKILL:
            return []
        return [
            _is_ours(call, line, self.root)
            for call, number, line in _counted(self.log)
            if Point(call, number) == fault.point and line.rstrip().endswith(marks)
        ]

    def points(self) -> dict[Point, str]:
        """Return the points that concern our folders and the endpoint, in order, with the first line that shows each.

        A fault strikes every thread that comes to the point: none of them may be doing something else there.
        """
        found: dict[Point, str] = {}
        others = set()
        for call, number, line in _counted(self.log):
            if _is_ours(call, line, self.root):
                found.setdefault(Point(call, number), line)
            else:
                others.add(Point(call, number))
        return {point: line for point, line in found.items() if point not in others}


def _launch(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCH, *arguments],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def _attached(pid: int, *options: str) -> Iterator[str]:
    """Trace a process until its end; yield what strace reports of it at first."""
    with subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        yield strace.stderr.readline().strip()
        strace.communicate(timeout=60)


def reason_not_to_trace() -> str:
    """Return why no process can be traced here, or nothing."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with _launch("-c", "print(flush=True); input()") as process:
        assert process.stdout is not None
        process.stdout.readline()
        with _attached(process.pid, "-e", "trace=none") as report:
            process.communicate("\n", timeout=60)
    return "" if report.endswith(" attached") else f"no process can be traced here: {report}"


def trace(folders: Folders, calls: Iterable[str], fault: Fault | None = None) -> Traced:
    """Run ``imagewatch once`` under strace.

    Args:
        folders: Its folders.
        calls: What strace writes down.
        fault: What strace does, if anything.
    """
    root = folders.state.parent
    gate, log = root / "gate.toml", root / "strace.log"
    gate.unlink(missing_ok=True)
    os.mkfifo(gate)
    # Without compiling on the way: those would be calls of one run and not of the next.
    environ = {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHONDONTWRITEBYTECODE": "1", **folders.environ}
    options = ["-f", "-y", "-o", str(log), "-e", f"trace={','.join(calls)}"]
    if fault:
        options += ["-e", f"inject={fault.point.call}:{fault.what}:when={fault.point.number}"]
    with _launch("-m", "imagewatch", "once", "--config", str(gate), environ=environ) as process:
        try:
            held = _held(gate)
            with _attached(process.pid, *options) as report:
                os.close(held)
                assert report.endswith(" attached"), report
                output = "".join(process.communicate(timeout=60))
        finally:
            process.kill()
    return Traced(process.returncode, output, log.read_text(errors="replace"), root)


def _held(gate: Path) -> int:
    """Wait until a process opens the FIFO to read it; it continues when the descriptor returned is closed."""
    held: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # ENXIO: no process reads yet
            held.append(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        return bool(held)

    until(is_read)
    return held[0]


def _is_ours(call: str, line: str, root: Path) -> bool:
    return call in _NETWORK or f"{root}/" in line


def _counted(log: str) -> Iterator[tuple[str, int, str]]:
    """Yield each call of a log: its name, the how manieth of its thread it is, its line."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        if match := _CALL.match(line):
            thread, call = match.groups()
            counts[thread, call] += 1
            yield call, counts[thread, call], line
