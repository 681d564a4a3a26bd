"""Real daemons that process one inbox together."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from support.daemon import TESTS, until

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
