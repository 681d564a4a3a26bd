"""A ledger that the daemon's user may read and not write, as root's restore leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from imagewatch.config.schema import Limits
from imagewatch.journal.health import ledger_problem
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from security.people import DAEMON

if TYPE_CHECKING:
    from pathlib import Path

    from security.world import World

FILES = ("ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm")


def restored_by_root(path: Path) -> None:
    """Make a file root's, readable for all."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.chown(path, 0, 0)
    path.chmod(0o644)


@pytest.mark.parametrize("seen_by", [DAEMON, 0])
def test_a_ledger_that_root_has_restored_holds_the_queue_until_the_daemon_may_write_it(
    world: World, seen_by: int
) -> None:
    daemon = world.start()
    world.honest_prompt_is_completed("first")
    world.is_idle()
    assert daemon.stop() == 0
    restored_by_root(world.state / "ledger.sqlite3")
    world.start()
    for number in range(5):
        world.honest_prompt(f"p{number}", f"prompt {number}")
    world.held_for("the ledger cannot be written")
    assert world.requests() == 1
    done = world.command("check", uid=seen_by)
    text = " ".join(done.stdout.split())
    assert (done.returncode, "the ledger cannot be written: it belongs to user number 0" in text) == (78, True), text
    for name in FILES:
        if (world.state / name).exists():
            os.chown(world.state / name, DAEMON, DAEMON)
    for number in range(5):
        world.wait(
            lambda number=number: world.destination(f"theirs/p{number}.prompt.txt") == "outbox", f"prompt {number}"
        )
    assert world.requests() == 6
    assert len(world.rows()) == 6


def test_once_leaves_the_prompts_in_the_inbox_where_the_ledger_cannot_be_written(world: World) -> None:
    daemon = world.start()
    world.honest_prompt_is_completed("first")
    world.is_idle()
    assert daemon.stop() == 0
    restored_by_root(world.state / "ledger.sqlite3")
    source = world.honest_prompt("second", "another prompt")
    done = world.command("once", "--json", uid=DAEMON)
    assert (done.returncode, json.loads(done.stdout)["left"]) == (74, 1), done.stdout
    assert (world.inbox / source).exists()
    assert world.requests() == 1


@pytest.mark.parametrize("seen_by", [DAEMON, 0])
def test_a_ledger_that_its_own_user_may_not_write_holds_the_queue_and_check_says_so(world: World, seen_by: int) -> None:
    daemon = world.start()
    world.honest_prompt_is_completed("first")
    world.is_idle()
    assert daemon.stop() == 0
    ledger = world.state / "ledger.sqlite3"
    ledger.chmod(0o400)
    done = world.command("check", uid=seen_by)
    text = " ".join(done.stdout.split())
    assert (done.returncode, "the ledger cannot be written: its mode is read-only" in text) == (78, True), text
    world.start()
    world.honest_prompt("later", "A later prompt")
    world.held_for("the ledger cannot be written")
    assert world.requests() == 1
    ledger.chmod(0o600)
    world.wait(lambda: world.destination("theirs/later.prompt.txt") == "outbox", "the prompt")
    assert world.requests() == 2


def test_check_names_a_ledger_that_may_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    journal = Journal(SqliteDatabase(str(path)), Limits(), time.time)
    journal.require(prove=True)
    journal.close()
    assert ledger_problem(str(tmp_path)) is None
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        assert "the ledger cannot be written" in str(ledger_problem(str(tmp_path)))
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
