"""Commands beside a daemon with a shared database: while it runs, while it is down, and without the database."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders, Running, command, until
from support.ports import free_port
from support.postgres import missing

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.fixture
def folders(tmp_path: Path, sandbox: Sandbox, database: str) -> Folders:
    made = Folders(
        tmp_path, sandbox.base_url, shared__database=database, shared__durability="single", shared__instance="one"
    )
    assert command(made, "db", "init").returncode == 0
    return made


@pytest.fixture
def used(folders: Folders) -> Folders:
    """After a prompt was completed and another one was refused."""
    folders.prompt("cat", "a cat")
    folders.prompt("bad", "a dog [sandbox: 400]")
    assert Running(folders, "once").wait() == 1
    return folders


def printed(folders: Folders, *arguments: str, code: int = 0) -> str:
    done = command(folders, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "ledger.sqlite3" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_each_command_works_while_the_daemon_is_down(used: Folders, sandbox: Sandbox) -> None:
    assert "cat" in printed(used, "history")
    assert "shared database" in printed(used, "check")
    assert "account main, instance one" in printed(used, "check")
    assert "stopped" in printed(used, "status")
    used.prompt("cow", "a cow")
    assert "30" in printed(used, "estimate")
    printed(used, "hold", "lunch")
    assert "lunch" in printed(used, "status", code=69)
    assert "lunch" in json.dumps(json.loads(printed(used, "status", "--json", code=69))["holds"])
    assert Running(used, "once").wait() == 69
    printed(used, "release")
    printed(used, "retry", "bad")
    assert Running(used, "once").wait() == 1
    assert sandbox.report()["requests"] == 4


def test_each_command_reaches_a_running_daemon(used: Folders, sandbox: Sandbox) -> None:
    daemon = Running(used, "run")
    try:
        until(lambda: json.loads(command(used, "status", "--json").stdout or "{}").get("state") == "running")
        assert "On hold. Requests in flight" in printed(used, "hold", "lunch")
        assert "Released." in printed(used, "release")
        printed(used, "retry", "bad")
        until(lambda: sandbox.report()["requests"] == 3)
    finally:
        assert daemon.stop() == 0, daemon.output


@pytest.mark.parametrize(
    "arguments",
    [("history",), ("estimate",), ("hold", "x"), ("release",), ("release", "--accept-new-ledger"), ("retry", "bad")],
)
def test_without_the_database_a_command_says_so(used: Folders, arguments: tuple[str, ...]) -> None:
    used.environ["IMAGEWATCH_SHARED__DATABASE"] = f"postgresql://127.0.0.1:{free_port()}/none"
    output = printed(used, *arguments, code=69)
    assert "the shared database cannot be reached" in output


def test_check_and_status_work_without_the_database(used: Folders) -> None:
    used.environ["IMAGEWATCH_SHARED__DATABASE"] = f"postgresql://127.0.0.1:{free_port()}/none"
    output = printed(used, "check", code=78)
    assert "the shared database cannot be reached" in output
    printed(used, "status")
    printed(used, "status", "--prometheus")
    printed(used, "gallery", "--output", str(used.root / "gallery.html"))


def test_a_daemon_takes_the_place_of_a_lost_state_folder_only_when_a_person_accepts_that(
    folders: Folders, sandbox: Sandbox
) -> None:
    folders.prompt("flying", "a bird [sandbox: slow 600]")
    daemon = Running(folders, "run")
    try:
        until(lambda: sandbox.report()["requests"] == 1)
    finally:
        daemon.stop(signal.SIGKILL)
    assert "with the same name" not in printed(folders, "history")
    assert "no other state folder has the name" in printed(folders, "release", "--accept-new-ledger", code=64)
    shutil.rmtree(folders.state)
    daemon = Running(folders, "once")
    assert daemon.wait() == 75  # the lost one was seen a moment ago
    assert "is running with the instance name one" in daemon.output
    folders.environ["IMAGEWATCH_SHARED__LEASE_SECONDS"] = "10"
    until(lambda: Running(folders, "once").wait() == 74)
    assert "with another state folder" in printed(folders, "check", code=78)
    assert "with another state folder" in printed(folders, "hold", code=74)
    assert "counts as charged" in printed(folders, "release", "--accept-new-ledger")
    assert "the daemon accepts it when it starts" in printed(folders, "check")
    folders.prompt("cat", "a cat")
    daemon = Running(folders, "once")
    daemon.wait()
    assert folders.error("flying")["charged"] == "unknown", daemon.output
    assert folders.receipt("cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 2
    assert Running(folders, "once").wait() == 0
