"""Temporary files of a killed daemon: removed at the next start, without those of other processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support.daemon import TESTS, Folders
from support.daemon import command as command_of
from support.scripted import small_image

from imagewatch.job.spool import Spool
from imagewatch.journal.files import FILE
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system import leftovers
from imagewatch.system.disk import Disk

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

KILLED_BEFORE_RENAME = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from support.losing import SteppingDisk
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon

class KillingDisk(SteppingDisk):
    def rename(self, source, target):
        if target.endswith(sys.argv[2]):
            os.link(source, target)  # as if a rename that replaces nothing consisted of two calls
            os.kill(os.getpid(), signal.SIGKILL)
        super().rename(source, target)

    def replace(self, source, target):
        if target.endswith(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().replace(source, target)

Daemon(load(None, os.environ), os.environ, disk=KillingDisk(), once=True).run()
"""


@pytest.fixture
def killed(folders: Folders, tmp_path: Path, start):
    """Run a daemon that is killed while a file with this ending gets its name."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED_BEFORE_RENAME)

    def run(ending: str) -> None:
        daemon = start(folders, str(TESTS), ending, script=str(script))
        assert daemon.wait() == -signal.SIGKILL, daemon.output

    return run


def temporaries(folders: Folders) -> list[str]:
    tops = (folders.root, folders.state)
    return sorted(path.name for top in tops for path in top.rglob("*") if path.name.endswith(".tmp"))


def take_over(folders: Folders) -> None:
    """Do what a start does before the first prompt is claimed."""
    folders.state.mkdir(exist_ok=True)
    config = folders.config()
    with contextlib.closing(Journal(SqliteDatabase(str(folders.state / FILE)), config.limits, time.time)) as journal:
        spool = Spool(config, Disk(), journal)
        spool.prepare()
        spool.take_over()


@pytest.mark.parametrize("folder", ["", "sub/folder/"])
def test_temporary_files_of_a_killed_daemon_are_removed_at_the_next_start(
    folders: Folders, sandbox: Sandbox, killed, folder: str
) -> None:
    folders.prompt(f"{folder}cat", "a cat")
    killed("cat.receipt.toml")
    assert [name[:4] for name in temporaries(folders)] == [".iw-"]
    assert command_of(folders, "once").returncode == 0
    assert temporaries(folders) == []
    assert folders.finished() == {"cat": "outbox"}
    assert sandbox.report()["requests"] == 1


def test_temporary_files_that_another_process_may_be_writing_stay(folders: Folders) -> None:
    stranger = f".iw-{'0123456789abcdef'}.0.tmp"
    others = [folders.outbox / stranger, folders.errors / stranger, folders.outbox / ".iw-mine.tmp"]
    control = folders.state / "control"
    control.mkdir(parents=True)
    writing = [control / name for name in ("accept-ledger.tmp", "wake.tmp")]
    for path in (*others, *writing):
        path.write_text("half")
    assert command_of(folders, "once").returncode == 0
    assert all(path.exists() for path in (*others, *writing))


def test_temporary_files_of_ours_are_removed_after_a_day(folders: Folders, monkeypatch) -> None:
    monkeypatch.setattr(leftovers, "STALE_SECONDS", 0.0)
    ours = folders.outbox / f".iw-{'0123456789abcdef'}.0.tmp"
    link = folders.outbox / f".iw-{'0123456789abcdef'}.1.tmp"
    others = [folders.outbox / name for name in (".iw-mine.tmp", "cat.tmp", ".iw-0123456789abcdef.0.tmp.png")]
    for path in (ours, *others):
        path.write_text("half")
    link.symlink_to(others[0])
    if os.geteuid() == 0:
        foreign = folders.errors / ours.name
        foreign.write_text("half")
        os.chown(foreign, 12345, 12345)
        others.append(foreign)
    take_over(folders)
    assert not ours.exists()
    assert link.is_symlink()
    assert all(path.exists() for path in others)


KILLED_BEFORE_THE_ATTEMPT = """
import os, signal
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.journal.journal import Journal

Journal.spend = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
Daemon(load(None, os.environ), os.environ, once=True).run()
"""


@pytest.mark.parametrize("image", [False, True])
def test_the_file_for_a_response_to_a_request_that_was_not_recorded_is_removed_at_the_next_start(
    folders: Folders, sandbox: Sandbox, tmp_path: Path, start, image: bool
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED_BEFORE_THE_ATTEMPT)
    if image:
        folders.drop("cat.png", small_image())
    folders.prompt("cat", "a cat")
    daemon = start(folders, script=str(script))
    assert daemon.wait() == -signal.SIGKILL, daemon.output
    assert [path.name[16:] for path in folders.answers()] == [".answer.1.part"]
    folders.prompt("dog", "a dog")  # and the cat is canceled
    for path in folders.inbox.glob("cat.*"):
        path.unlink()
    assert command_of(folders, "once").returncode == 0
    assert folders.leftovers() == []
    assert sandbox.report()["requests"] == (2 if image else 1)
