"""The benchmarks fit the present code, and what they count is what a program does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tracing import reason_not_to_trace

BENCH = Path(__file__).parents[2] / "bench"
CHECK = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
for path in sorted(pathlib.Path(sys.argv[1]).glob("[a-z]*.py")):
    importlib.import_module(path.stem)
for part, owners in importlib.import_module("phases").PARTS.items():
    for owner, names in owners:
        for name in names:
            assert callable(getattr(owner, name, None)), f"{part}: there is no {name} in {owner}"
"""
COMMIT = """
import sqlite3
journal = sqlite3.connect("journal", isolation_level=None)
journal.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE job (id)")
open("begin", "wb").write(b"-")
for job in range(3):
    journal.execute("INSERT INTO job VALUES (1)")
"""
WRITERS = """
import os, threading
def write(name):
    file = os.open(name, os.O_CREAT | os.O_WRONLY)
    for _ in range(100):
        os.write(file, b"x" * 1000)
        os.fsync(file)
threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
RANGES = """
import ctypes, mmap, os
libc = ctypes.CDLL(None)
file = os.open("a", os.O_CREAT | os.O_RDWR)
os.ftruncate(file, 4096)
libc.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(4096), 2)  # begins to write
libc.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(4096), 7)  # waits
mapped = mmap.mmap(file, 4096)
mapped[0] = 1
mapped.flush()
os.fsync(os.open(".", os.O_RDONLY))
"""
SYNCHRONOUS = """
import os
os.open("a", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
"""
TRACE = """
import dataclasses, json, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
from tracing import Trace
trace = Trace(pathlib.Path("../log"))
subprocess.run([*trace.command, sys.executable, "-c", sys.argv[2]], check=True)
print(json.dumps([dataclasses.asdict(call) for call in trace.take()]))
"""
SYNCS = """
import os
for folder in ("outbox", "archive", "outbox"):
    os.fsync(os.open(folder, os.O_RDONLY))
os.fsync(os.open("outbox/a", os.O_CREAT | os.O_RDWR))
"""
RECORD = """
import os, pathlib, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from preload import FolderSyncs
os.makedirs("outbox"), os.makedirs("archive")
syncs, began = FolderSyncs(pathlib.Path().resolve(), pathlib.Path("outbox").resolve()), time.monotonic_ns()
subprocess.run([sys.executable, "-c", sys.argv[2]], env=os.environ | syncs.environ, check=True)
times = [began, *syncs.times(), time.monotonic_ns()]
assert times == sorted(times)
print(len(times) - 2)
"""


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(BENCH), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def traced(program: str, root: Path) -> subprocess.CompletedProcess[str]:
    if reason := reason_not_to_trace():
        pytest.skip(reason)
    folder = root / "work"
    folder.mkdir()
    return run(TRACE, program, folder=folder)


def calls(program: str, root: Path) -> list[tuple[str, str, int]]:
    """Return name, file and result of each counted call of a program in a folder of its own."""
    done = traced(program, root)
    assert done.returncode == 0, done.stderr
    found = [(call["name"], call["target"], call["result"]) for call in json.loads(done.stdout)]
    return [
        (name, os.path.relpath(target, root / "work"), result)
        for name, target, result in found
        if not target or Path(target).is_relative_to(root / "work")
    ]


def test_the_benchmarks_can_be_imported_and_the_functions_they_time_exist(tmp_path: Path) -> None:
    done = run(CHECK, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_synced_commit_of_sqlite_counts_as_one_wait(tmp_path: Path) -> None:
    found = calls(COMMIT, tmp_path)
    begin = found.index(("write", "begin", 1))
    waits = [file for name, file, _ in found[begin:] if name in {"fsync", "fdatasync"}]
    assert waits[:3] == ["journal-wal"] * 3


def test_no_byte_and_no_wait_of_threads_that_interrupt_each_other_is_missed(tmp_path: Path) -> None:
    found = calls(WRITERS, tmp_path)
    for file in ("a", "b"):
        assert sum(result for name, target, result in found if (name, target) == ("write", file)) == 100_000
        assert len([name for name, target, _ in found if (name, target) == ("fsync", file)]) == 100


def test_only_calls_that_wait_count_as_waits(tmp_path: Path) -> None:
    done = traced(RANGES, tmp_path)
    assert [call["name"] for call in json.loads(done.stdout)] == ["sync_file_range", "msync", "fsync"]


def test_a_file_that_waits_at_each_write_ends_the_measurement(tmp_path: Path) -> None:
    done = traced(SYNCHRONOUS, tmp_path)
    assert done.returncode == 1
    assert "which is not counted" in done.stderr


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no compiler here")
def test_the_syncs_of_one_folder_are_recorded_and_no_others(tmp_path: Path) -> None:
    done = run(RECORD, SYNCS, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
