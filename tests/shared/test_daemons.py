"""Real daemons that share one account in a real PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, Running, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox


@pytest.fixture
def member(tmp_path: Path, sandbox: Sandbox, database: str) -> Callable[..., Folders]:
    """Return a function that makes the folders of a daemon of the account."""

    def made(name: str, **settings: Any) -> Folders:
        given = {"shared__database": database, "shared__durability": "single", "shared__instance": name, **settings}
        folders = Folders(tmp_path / name, sandbox.base_url, **given)
        command(folders, "db", "init")
        return folders

    return made


def test_a_prompt_is_completed(member: Callable[..., Folders], sandbox: Sandbox) -> None:
    folders = member("one")
    folders.prompt("cat", "a cat")
    daemon = Running(folders, "once")
    assert daemon.wait() == 0, daemon.output
    assert folders.receipt("cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 1


def replace_by_earlier(postgres: Server, uri: str, act: Callable[[], None]) -> None:
    """Copy the database, let something happen, then put the copy in its place, as a restored backup."""
    name = uri.rpartition("/")[2]
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    postgres.psql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres.psql(end)
    postgres.psql(f"CREATE DATABASE {name}_copy TEMPLATE {name} OWNER imagewatch")
    postgres.psql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    act()
    postgres.psql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres.psql(end)
    postgres.psql(f"ALTER DATABASE {name} RENAME TO {name}_newer")
    postgres.psql(f"ALTER DATABASE {name}_copy RENAME TO {name}")


def test_a_database_that_was_restored_from_a_backup_is_not_used(
    member: Callable[..., Folders], sandbox: Sandbox, postgres: Server, database: str
) -> None:
    folders = member("one")
    folders.prompt("cat", "a cat")
    assert Running(folders, "once").wait() == 0

    def dropped_and_killed() -> None:
        sandbox.hold()
        folders.prompt("dog", "a dog")
        daemon = Running(folders, "run")
        assert sandbox.wait_for_requests(2, 20)
        daemon.kill()
        sandbox.release()

    replace_by_earlier(postgres, database, dropped_and_killed)
    again = Running(folders, "once")
    assert again.wait() == 69
    assert "lacks the newest requests" in again.output
    assert "imagewatch db recover" in again.output
    assert sandbox.report()["requests"] == 2


def test_a_running_daemon_does_not_use_a_database_that_was_restored_from_a_backup(
    member: Callable[..., Folders], sandbox: Sandbox, postgres: Server, database: str, run: Callable[..., LoggedDaemon]
) -> None:
    folders = member("one")
    daemon = run(folders)
    daemon.wait_for("started")

    def completed() -> None:
        folders.prompt("cat", "a cat")
        daemon.wait_for("completed")
        until(lambda: folders.names("archive") == ["cat.prompt.txt"])

    replace_by_earlier(postgres, database, completed)
    folders.prompt("dog", "a dog")
    until(lambda: any("lacks the newest requests" in held["reason"] for held in daemon.events("held")))
    assert {held["kind"] for held in daemon.events("held")} == {"database"}
    assert sandbox.report()["requests"] == 1
    assert folders.names("inbox") == ["dog.prompt.txt"]
