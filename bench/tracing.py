"""System calls of a contender that wait for the disk, write to it, or send: recorded by strace.

It records the calls of the whole process, so those of SQLite are among them. A traced process is slower: nothing is
timed in such a run.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAITS = ("fsync", "fdatasync", "sync_file_range", "msync", "syncfs", "sync")
WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "copy_file_range", "sendfile")
SENDS = ("sendto", "sendmsg")
OPENS = ("open", "openat", "openat2", "creat")
_BEGIN = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?:\w+<(?P<target>.*?)>[,) ])?(?P<rest>.*)")
_END = re.compile(r"(?P<thread>\d+) +<\.\.\. \w+ resumed>.* = (?P<result>-?\d+)")
_RESULT = re.compile(r" = (-?\d+)")
_UNCOUNTED = re.compile(r"\bO_D?SYNC\b|\bRWF_D?SYNC\b")


@dataclass
class Call:
    """One system call.

    Attributes:
        name: Its name.
        target: The path or the address of its first descriptor; empty if it has none.
        result: What it returned.
    """

    name: str
    target: str
    result: int = 0


class Trace:
    """The calls of a contender that was started with ``command``.

    Args:
        log: Where strace writes.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        calls = ",".join((*WAITS, *WRITES, *SENDS, *OPENS))
        self.command = ("strace", "-f", "--seccomp-bpf", "-yy", "-s0", "-o", str(log), "-e", f"trace={calls}")

    def take(self) -> list[Call]:
        """Return the calls since the last time, in the order in which they began."""
        with self._log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._read)
            text = file.read()
            self._read = file.tell()
        return list(_calls(text.splitlines()))


def _calls(lines: list[str]) -> Iterator[Call]:
    """Yield the calls; the result of one that another thread interrupted is filled in later."""
    unfinished: dict[str, Call] = {}
    for line in lines:
        if end := _END.match(line):
            if call := unfinished.pop(end["thread"], None):
                call.result = int(end["result"])
        elif begin := _BEGIN.match(line):
            if _UNCOUNTED.search(line):
                sys.exit(f"each write to this file waits for the disk, which is not counted: {line}")
            if not _is_counted(begin["name"], begin["rest"]):
                continue
            call = Call(begin["name"], begin["target"] or "")
            results = _RESULT.findall(line)
            if results:
                call.result = int(results[-1])
            else:
                unfinished[begin["thread"]] = call
            yield call


def _is_counted(name: str, rest: str) -> bool:
    """Return whether a call is one that waits, writes or sends."""
    if name == "sync_file_range":
        return "WAIT" in rest  # else it only starts to write
    return "MS_SYNC" in rest if name == "msync" else name not in OPENS
