"""Whether a program has a file open for writing, asked about real files."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from imagewatch.inbox.open_files import has_writer

if TYPE_CHECKING:
    from pathlib import Path

ASK = """
import os, sys
from imagewatch.inbox.open_files import has_writer

print("begun", flush=True)
while os.path.exists(sys.argv[2]):
    has_writer(sys.argv[1])
"""


@pytest.fixture
def path(tmp_path) -> Path:
    """A file on a file system that shows who writes."""
    made = tmp_path / "cat.prompt.txt"
    with made.open("w") as file:
        if not has_writer(file.name):
            pytest.skip("this file system does not report writers")
    return made


@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_who_has_a_file_open_for_writing_is_seen_until_it_is_closed(path, mode):
    with path.open(mode):
        assert has_writer(str(path))
    assert not has_writer(str(path))


def test_who_reads_a_file_is_no_writer(path):
    with path.open():
        assert not has_writer(str(path))


def test_a_writer_in_another_process_is_seen(path):
    with subprocess.Popen(["sh", "-c", 'exec cat > "$1"', "sh", path], stdin=subprocess.PIPE, bufsize=0) as writing:
        assert writing.stdin
        writing.stdin.write(b"A cat")
        while not path.stat().st_size:
            os.sched_yield()
        assert has_writer(str(path))
    assert not has_writer(str(path))


def test_what_cannot_be_asked_about_has_no_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to("target")
    for name in ("pipe", "link", "nothing", "."):
        assert not has_writer(str(tmp_path / name))


def test_to_ask_while_others_open_the_file_disturbs_no_one(path, tmp_path):
    """The kernel sends who asked a signal when another process wants to write; the usual one ends a process."""
    going = tmp_path / "going"
    going.touch()
    with subprocess.Popen([sys.executable, "-c", ASK, path, going], stdout=subprocess.PIPE) as asking:
        assert asking.stdout
        asking.stdout.readline()
        for _ in range(20_000):
            os.close(os.open(path, os.O_WRONLY))
        assert asking.poll() is None
        going.unlink()
    assert asking.returncode == 0
