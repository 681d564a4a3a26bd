"""Real daemons that process one inbox together."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import TESTS, Folders, LoggedDaemon, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

LEASE = 10
RUNNER = str(TESTS / "support/team_runner.py")


@pytest.fixture
def team(tmp_path: Path, sandbox: Sandbox, database: str) -> Callable[..., Folders]:
    """Return a function that makes another daemon of the same inbox, with a state folder of its own."""

    def made(name: str, **settings: Any) -> Folders:
        given = {
            "shared__database": database,
            "shared__durability": "single",
            "shared__instance": name,
            "shared__inbox": "common",
            "shared__lease_seconds": str(LEASE),
            "endpoint__connect_timeout_seconds": "2",
            "endpoint__timeout_seconds": "4",
            "endpoint__deadline_seconds": "4",
            **settings,
        }
        is_first = not (tmp_path / "watched").exists()
        folders = Folders.__new__(Folders)
        if is_first:
            Folders.__init__(folders, tmp_path, sandbox.base_url, **given)
        else:
            environ = {f"IMAGEWATCH_{key.upper()}": value for key, value in given.items()}
            first = Folders.__new__(Folders)
            first.environ = {}
            folders.root = tmp_path / "watched"
            folders.environ = {**made.first.environ, **environ}  # type: ignore[attr-defined]
        folders.state = tmp_path / f"state-{name}"
        folders.environ["IMAGEWATCH_FOLDERS__STATE"] = str(folders.state)
        if is_first:
            made.first = folders  # type: ignore[attr-defined]
            command(folders, "db", "init")
        return folders

    return made


def results(folders: Folders) -> int:
    return len([name for name in folders.names("outbox") if name.endswith(".receipt.toml")])


def test_two_daemons_process_one_inbox_and_each_prompt_is_sent_once(
    team: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    one, two = team("one"), team("two")
    daemons = [run(one, script=RUNNER), run(two, script=RUNNER)]
    for number in range(30):
        one.prompt(f"cat{number}", f"a cat {number}")
    until(lambda: results(one) == 30, timeout=60)
    until(lambda: len(one.names("archive")) == 30)
    assert sandbox.report()["requests"] == 30
    until(lambda: one.names("inbox") == [])
    assert all(daemon.events("completed") for daemon in daemons)


def test_a_prompt_of_a_daemon_that_was_stopped_before_it_sent_is_sent_once_by_another(
    team: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    one, two = team("one"), team("two")
    first = run(one, script=RUNNER)
    sandbox.hold()
    one.prompt("cat", "a cat")
    assert sandbox.wait_for_requests(1, 20)
    second = run(two, script=RUNNER)
    first.process.send_signal(signal.SIGKILL)
    sandbox.release()
    second.wait_for("taken_over")
    until(lambda: one.finished() == {"cat": "errors"}, timeout=90)
    assert one.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 1
