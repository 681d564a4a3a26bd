"""Real daemons that share one account in a real PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.daemon import Running, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import Folders, LoggedDaemon

    from imagewatch.sandbox import Sandbox


def test_a_prompt_is_completed(alone: Callable[..., Folders], sandbox: Sandbox) -> None:
    folders = alone("one")
    folders.prompt("cat", "a cat")
    daemon = Running(folders, "once")
    assert daemon.wait() == 0, daemon.output
    assert folders.receipt("cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 1


def test_a_database_that_was_restored_from_a_backup_is_not_used(
    alone: Callable[..., Folders],
    sandbox: Sandbox,
    kill_in_flight: Callable[..., None],
    replace_by_earlier: Callable[[Callable[[], None]], None],
) -> None:
    folders = alone("one")
    folders.prompt("cat", "a cat")
    assert Running(folders, "once").wait() == 0
    folders.prompt("dog", "a dog")
    replace_by_earlier(lambda: kill_in_flight(folders))
    again = Running(folders, "once")
    assert again.wait() == 69
    assert "lacks the newest requests" in again.output
    assert "imagewatch db recover" in again.output
    assert sandbox.report()["requests"] == 2


def test_a_running_daemon_does_not_use_a_database_that_was_restored_from_a_backup(
    alone: Callable[..., Folders],
    sandbox: Sandbox,
    run: Callable[..., LoggedDaemon],
    replace_by_earlier: Callable[[Callable[[], None]], None],
) -> None:
    folders = alone("one")
    daemon = run(folders)
    daemon.wait_for("started")

    def completed() -> None:
        folders.prompt("cat", "a cat")
        daemon.wait_for("completed")
        until(lambda: folders.names("archive") == ["cat.prompt.txt"])

    replace_by_earlier(completed)
    folders.prompt("dog", "a dog")
    until(lambda: any("lacks the newest requests" in held["reason"] for held in daemon.events("held")))
    assert {held["kind"] for held in daemon.events("held")} == {"database"}
    assert sandbox.report()["requests"] == 1
    assert folders.names("inbox") == ["dog.prompt.txt"]
