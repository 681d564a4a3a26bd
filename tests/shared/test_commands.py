"""Commands beside a daemon with a shared database: while it runs, while it is down, and without the database."""

from __future__ import annotations

import json
import os
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


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
OTHER_USER = 65534
FOR_ROOT = """
import os, sys

class ForRoot:
    def find_spec(self, name, path=None, target=None):
        if os.geteuid() != 0 and (name.startswith("psycopg") or ".postgres" in name):
            raise PermissionError(f"only root can read the module {name}")

sys.meta_path.insert(0, ForRoot())
from imagewatch.commands.main import main
main()
"""
"""A command whose library for PostgreSQL only root can read."""
AS_USER = """
import os, sys
import imagewatch.endpoint.client, imagewatch.journal.postgres.database  # for root only, perhaps
from imagewatch.commands.main import COMMANDS, load_command, main

for name in COMMANDS:
    load_command(name)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
main()
"""
"""A command of another user."""


@as_root
def test_a_command_of_root_needs_no_file_of_root_after_it_has_become_the_daemons_user(
    open_path: Path, sandbox: Sandbox, database: str
) -> None:
    settings = {"database": database, "durability": "single", "instance": "one"}
    folders = Folders(open_path, sandbox.base_url, **{f"shared__{key}": value for key, value in settings.items()})
    config = open_path / "config.toml"
    config.write_text("[limits]\nassumed_credits = 30\n")
    config.chmod(0o600)
    folders.environ["IMAGEWATCH_CONFIG"] = str(config)
    assert command(folders, "db", "init").returncode == 0
    folders.prompt("cat", "a cat")
    assert Running(folders, "once").wait() == 0
    for path in (folders.root, folders.state, *folders.root.rglob("*"), *folders.state.rglob("*")):
        os.chown(path, OTHER_USER, OTHER_USER)
    script = open_path / "for_root.py"
    script.write_text(FOR_ROOT)
    for arguments in (["hold"], ["release"], ["db", "recover", "--yes"], ["migrate", "--to", "sqlite"]):
        running = Running(folders, *arguments, script=str(script))
        assert running.wait() == 0, running.output
    assert {path.stat().st_uid for path in folders.state.rglob("*")} == {OTHER_USER}


@as_root
def test_a_user_who_may_not_enter_the_state_folder_gets_no_line_about_the_database(
    open_path: Path, sandbox: Sandbox, database: str
) -> None:
    folders = Folders(open_path, sandbox.base_url, shared__database=database, shared__durability="single")
    assert command(folders, "db", "init").returncode == 0
    assert Running(folders, "once").wait() == 0
    assert folders.state.stat().st_mode & 0o077 == 0
    script = open_path / "as_user.py"
    script.write_text(AS_USER)
    checked = Running(folders, "check", script=str(script))
    checked.wait()
    assert "permission denied" in checked.output
    assert "shared database" not in checked.output


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
