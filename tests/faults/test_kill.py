"""The real process is killed before each of its changes to the disk, and started again.

``IMAGEWATCH_ALL_KILLS=1`` tries every change; otherwise some forty-five of them, evenly spread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.audit import ORDERS, Audit, drop
from support.daemon import KEY, TESTS, Folders, Running, until
from support.losing import SteppingDisk

from imagewatch.job.spool import Spool
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.sandbox import Sandbox
from imagewatch.system.disk import Disk

if TYPE_CHECKING:
    from pathlib import Path

RUNNER = str(TESTS / "support/kill_runner.py")
KILLS = 45
CONCURRENCY = 2


def dropped(root: Path, sandbox: Sandbox) -> Folders:
    folders = Folders(root, sandbox.base_url, limits__concurrency=str(CONCURRENCY), log__level="error")
    return drop(folders, ORDERS)


def kill_and_start_again(root: Path, number: int) -> int:
    """Kill before a change, start again, check; return how the first process ended."""
    root.mkdir()
    with Sandbox(key=KEY) as sandbox:
        folders = dropped(root, sandbox)
        killed = Running(folders, str(number), script=RUNNER)
        code = killed.wait()
        again = Running(folders, "once")
        assert again.wait() in {0, 1}, again.output
        try:
            assert code in {-signal.SIGKILL, 0}, killed.output
            Audit(folders, sandbox.report(), ORDERS, CONCURRENCY).check()
        except Exception as error:
            error.add_note(f"killed before change {number}\n{killed.output}\n{again.output}")
            raise
    return code


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of changes to the disk until all jobs are finished."""
    with Sandbox(key=KEY) as sandbox:
        folders = dropped(tmp_path_factory.mktemp("count"), sandbox)
        runner = Running(folders, "0", script=RUNNER)
        assert runner.wait() == 0, runner.output
        Audit(folders, sandbox.report(), ORDERS, 0).check()
        return int(runner.output.split()[0])


@pytest.mark.timeout(900)
def test_a_process_killed_at_any_change_pays_nothing_twice_and_loses_nothing(changes: int, tmp_path: Path) -> None:
    every = 1 if os.environ.get("IMAGEWATCH_ALL_KILLS") == "1" else max(1, changes // KILLS)
    numbers = range(1, changes + 1, every)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda number: kill_and_start_again(tmp_path / str(number), number), numbers))
    # Two workers take turns in any order, so the last few changes may not be reached.
    assert ends.count(-signal.SIGKILL) >= len(ends) * 0.9


def test_after_a_kill_in_flight_the_charge_is_unknown_and_nothing_is_sent_again(
    folders: Folders, sandbox: Sandbox
) -> None:
    folders.prompt("cat", "a cat")
    sandbox.hold()
    daemon = Running(folders, "once")
    assert sandbox.wait_for_requests(1, timeout=20)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    sandbox.release()
    for _ in range(2):
        again = Running(folders, "once")
        assert again.wait() in {0, 1}, again.output
        assert folders.finished() == {"cat": "errors"}
        error = folders.error("cat")
        assert error["charged"] == "unknown"
        assert "may have been charged" in error["message"]
        assert (folders.errors / "cat.prompt.txt").read_text() == "a cat"
        assert folders.leftovers() == []
        assert sandbox.report()["requests"] == 1


def test_the_received_part_of_a_response_is_kept(folders: Folders, sandbox: Sandbox) -> None:
    folders.prompt("cat", "a cat [sandbox: trickle 0.05]")
    daemon = Running(folders, "once")
    until(lambda: [part for part in folders.state.glob("answers/*.answer.1.part") if part.read_bytes().count(b"\n")])
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    again = Running(folders, "once")
    assert again.wait() == 1, again.output
    assert folders.error("cat")["charged"] == "yes"
    assert [name for name in folders.names("errors") if name.startswith("cat.answer.")]
    assert sandbox.report()["requests"] == 1


def test_a_response_that_cannot_be_read_now_does_not_count_as_missing(folders: Folders, sandbox: Sandbox) -> None:
    folders.prompt("cat", "a cat [sandbox: trickle 0.05]")
    daemon = Running(folders, "once")
    until(lambda: [part for part in folders.state.glob("answers/*.answer.1.part") if part.read_bytes().count(b"\n")])
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    (path,) = folders.state.glob("answers/*.answer.1.part")
    aside = path.rename(folders.state / "aside")
    path.symlink_to(path)
    failing = Running(folders, "once")
    assert failing.wait() == 74, failing.output
    assert "bug" not in failing.output
    assert folders.finished() == {}
    path.unlink()
    aside.rename(path)
    again = Running(folders, "once")
    assert again.wait() == 1, again.output
    assert folders.error("cat")["charged"] == "yes"
    assert list(folders.errors.glob("cat.answer.*"))
    assert sandbox.report()["requests"] == 1


def test_after_a_kill_the_next_daemon_can_use_the_folders(folders: Folders, sandbox: Sandbox) -> None:
    sandbox.hold()
    folders.prompt("cat", "a cat")
    first = Running(folders, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    second = Running(folders, "once")
    assert second.wait() == 75, second.output
    first.stop(signal.SIGKILL)
    sandbox.release()
    third = Running(folders, "once")
    assert third.wait() == 1, third.output
    assert sandbox.report()["requests"] == 1


class Killed(BaseException):
    """The process ended."""


class DyingDisk(SteppingDisk):
    """The disk of a process that is killed before a change and then changes nothing.

    Args:
        number: The change, from 1.
    """

    def __init__(self, number: int) -> None:
        self._left = number

    def step(self, what: str, path: str) -> None:
        self._left -= 1
        if self._left <= 0:
            raise Killed(what, path)


def test_a_start_that_is_killed_anywhere_does_not_prevent_the_next_one(tmp_path: Path) -> None:
    for number in itertools.count(1):
        folders = Folders(tmp_path / str(number), "http://127.0.0.1:9", outbox__folder_mode="0750")
        config = folders.config()
        journal = Journal(SqliteDatabase(str(tmp_path / f"{number}.sqlite3")), config.limits, float)
        with contextlib.suppress(Killed), contextlib.closing(journal):
            spool = Spool(config, DyingDisk(number), journal)
            spool.prepare()
            spool.take_over()
            break
        with contextlib.closing(journal):
            spool = Spool(config, Disk(), journal)
            spool.prepare()
            spool.take_over()
        assert folders.leftovers() == []
    assert number > 25
