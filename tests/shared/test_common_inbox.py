"""Real daemons that process one inbox together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.daemon import PATIENCE, TESTS, command, until
from support.team import SHORT_DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import Folders, LoggedDaemon

    from imagewatch.sandbox import Sandbox

RUNNER = str(TESTS / "support/team_runner.py")


def results(folders: Folders) -> int:
    return len([name for name in folders.names("outbox") if name.endswith(".receipt.toml")])


def test_two_daemons_process_one_inbox_and_each_prompt_is_sent_once(
    team: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    one, two = team("one"), team("two")
    daemons = [run(one, script=RUNNER), run(two, script=RUNNER)]
    sandbox.hold()
    for number in range(30):
        one.prompt(f"cat{number}", f"a cat {number}")
    assert sandbox.wait_for_requests(one.config().limits.concurrency + 1, PATIENCE), "both send"
    sandbox.release()
    until(lambda: results(one) == 30)
    until(lambda: len(one.names("archive")) == 30)
    assert sandbox.report()["requests"] == 30
    until(lambda: one.names("inbox") == [])
    for daemon in daemons:
        daemon.wait_for("completed")


def test_once_is_refused_and_sends_nothing(team: Callable[..., Folders], sandbox: Sandbox) -> None:
    folders = team("one")
    folders.prompt("cat", "a cat")
    done = command(folders, "once")
    assert done.returncode == 64, done.stderr
    assert "shared.inbox is set: other daemons process this inbox, too" in done.stderr
    assert "use imagewatch run" in done.stderr
    assert folders.names("inbox") == ["cat.prompt.txt"]
    assert sandbox.report()["requests"] == 0


def test_a_request_in_flight_of_a_killed_daemon_is_an_unknown_charge_and_is_not_sent_by_another(
    team: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    one, two = team("one"), team("two", **SHORT_DEADLINE)
    first = run(one, script=RUNNER)
    sandbox.hold()
    one.prompt("cat", "a cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    first.kill()
    sandbox.release()
    second = run(two, script=RUNNER)
    second.wait_for("taken_over")
    until(lambda: one.finished() == {"cat": "errors"}, timeout=90)
    assert one.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 1
