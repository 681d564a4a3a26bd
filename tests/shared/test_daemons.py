"""Real daemons that share one account in a real PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.daemon import Running, command, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import Folders, LoggedDaemon

    from imagewatch.sandbox import Sandbox

LACKS = "lacks the newest requests"


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
    assert LACKS in again.output
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
    until(lambda: any(LACKS in held["reason"] for held in daemon.events("held")))
    assert {held["kind"] for held in daemon.events("held")} == {"database"}
    assert sandbox.report()["requests"] == 1
    assert folders.names("inbox") == ["dog.prompt.txt"]


def test_a_person_can_accept_a_database_that_lacks_requests_and_then_restart_the_daemon(
    alone: Callable[..., Folders],
    sandbox: Sandbox,
    run: Callable[..., LoggedDaemon],
    replace_by_earlier: Callable[[Callable[[], None]], None],
) -> None:
    folders = alone("one")
    daemons: list[LoggedDaemon] = []

    def completed() -> None:
        daemons.append(run(folders))
        folders.prompt("cat", "a cat")
        until(lambda: folders.names("archive") == ["cat.prompt.txt"])

    replace_by_earlier(completed)
    folders.prompt("dog", "a dog")
    held: list[dict[str, Any]] = []
    until(lambda: held.extend(one for one in daemons[0].events("held") if LACKS in one["reason"]) or held)
    assert "imagewatch release --accept-new-ledger, then restart the daemon" in held[0]["next"]
    done = command(folders, "release", "--accept-new-ledger")
    assert done.returncode == 0, done.stderr
    assert daemons[0].stop() == 0
    assert folders.names("inbox") == ["dog.prompt.txt"]
    run(folders)
    until(lambda: set(folders.finished()) == {"cat", "dog"})
    assert sandbox.report()["requests"] == 2
