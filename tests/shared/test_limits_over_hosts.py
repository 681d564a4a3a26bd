"""Three daemons of one account: caps, the rate and redeliveries are counted over all of them; each has its own name."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from support import noon
from support.account import Account, Member
from support.daemon import PATIENCE, LoggedDaemon, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

NAMES = ("one", "two", "three")
NOT_COPIED = shutil.ignore_patterns("*.lock", "lock", "*.tmp")
"""Of the state folder of a daemon that runs; a temporary file of its status is removed the next moment."""
FAKE_HOST = """
import os, socket
socket.gethostname = lambda: os.environ["FAKE_HOST"]
from imagewatch.commands.main import main
main()
"""


@pytest.fixture
def account(tmp_path: Path, postgres: Server, database: str) -> Account:
    return Account(postgres, database, tmp_path)


def started(account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], **settings: Any) -> list[Member]:
    """Start three daemons with the same limits."""
    members = [account.member(name, sandbox.base_url, **settings) for name in NAMES]
    clock = noon.environ()
    for member in members:
        member.environ |= clock
        run(member, script=noon.__file__)
    return members


def waiting(member: Member) -> int:
    """How many prompts wait, as the status shows it."""
    shown = member.status()["waiting"]
    return int(shown["ready"] + shown["not_ready"])


def test_a_cap_is_not_exceeded_by_prompts_that_three_daemons_get_at_the_same_time(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    members = started(account, sandbox, run, limits__credits_per_day="300", limits__assumed_credits="30")
    for number in range(8):
        for member in members:
            member.prompt(f"{member.instance}{number}", f"{member.instance}{number}")
    until(lambda: len(account.finished()) == 10 and not account.open())
    until(
        lambda: all("cap" in member.holds() for member in members if len(member.finished()) < 8),
        saw=lambda: str([m.holds() for m in members]),
    )
    until(lambda: sum(waiting(member) for member in members) == 14)
    assert sandbox.report()["credits"] == 300
    assert sandbox.report()["requests"] == 10
    assert account.rows("SELECT sum(credits) FROM imagewatch.attempts") == [(300.0,)]


def test_requests_in_a_minute_are_counted_over_all_daemons(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    members = started(account, sandbox, run, limits__requests_per_minute="5")
    for number in range(4):
        for member in members:
            member.prompt(f"{member.instance}{number}", f"{member.instance}{number}")
    assert sandbox.wait_for_requests(5, PATIENCE)
    until(lambda: len(account.finished()) == 5)
    until(lambda: all("rate" in member.holds() for member in members if len(member.finished()) < 4))
    assert sandbox.report()["requests"] == 5


@pytest.mark.parametrize("order", ["at the same time", "one after the other"])
def test_a_prompt_that_is_delivered_to_two_inboxes_is_paid_once(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], order: str
) -> None:
    one, two, _ = started(account, sandbox, run)
    for member in (one, two):
        outside = member.root / "outside"
        outside.write_text("a cat")
        os.utime(outside, ns=(10**18, 10**18))
        outside.rename(member.inbox / "cat.prompt.txt")
        if order == "one after the other":
            until(lambda member=member: not (member.inbox / "cat.prompt.txt").exists())

    def is_over() -> bool:
        left = [name for member in (one, two) for name in member.names("inbox")]
        return not left and not account.open() and len(account.finished()) == 1

    until(is_over, saw=lambda: str([member.names("inbox") for member in (one, two)]))
    assert sandbox.report()["requests"] == 1
    assert account.rows("SELECT sum(times) FROM imagewatch.redeliveries") == [(1,)]


def test_a_second_daemon_with_the_same_name_does_not_start(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    run(account.member("one", sandbox.base_url))
    other = Account(account.server, account.uri, tmp_path / "elsewhere").member("one", sandbox.base_url)
    done = command(other, "run")
    assert done.returncode == 75, done.stderr
    assert "is running with the instance name one" in done.stderr
    assert "shared.instance" in done.stderr


def test_the_older_of_two_daemons_with_one_name_sends_nothing_any_more_and_reports_why(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    """As after a machine was copied with its state folder."""
    one = account.member("one", sandbox.base_url)
    older = run(one)
    one.prompt("before", "before")
    until(lambda: account.is_over(1))
    copy = Account(account.server, account.uri, tmp_path / "copy").member("one", sandbox.base_url)
    shutil.rmtree(copy.state, ignore_errors=True)
    shutil.copytree(one.state, copy.state, ignore=NOT_COPIED)
    run(copy)
    one.prompt("cat", "cat")
    until(lambda: one.holds() == ["database"], saw=older.log)
    (hold,) = one.status()["holds"]
    assert "another daemon was started with the same shared.instance" in hold["reason"]
    copy.prompt("dog", "dog")
    until(lambda: "dog" in copy.finished())
    assert [call["prompt"] for call in sandbox.report()["calls"]] == ["before", "dog"]
    assert (one.inbox / "cat.prompt.txt").exists()


def test_a_response_that_comes_after_another_daemon_has_taken_the_name_is_recorded_and_published(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    one = account.member("one", sandbox.base_url)
    older = run(one)
    copy = Account(account.server, account.uri, tmp_path / "copy").member("one", sandbox.base_url)
    shutil.copytree(one.state, copy.state, ignore=NOT_COPIED)
    sandbox.hold()
    one.prompt("cat", "cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    run(copy)
    newest = "SELECT query FROM pg_stat_activity WHERE application_name = 'imagewatch presence one'"
    until(lambda: any("incarnation > " in query for (query,) in account.rows(newest)), what="it has noticed the other")
    sandbox.release()
    until(lambda: one.finished() == {"cat": "outbox"}, saw=older.log)
    rows = account.rows("SELECT outcome, charged, credits FROM imagewatch.attempts")
    assert rows == [("completed", "yes", one.receipt("cat")["credits_charged"])]
    assert sandbox.report()["requests"] == 1


def test_a_changed_host_name_does_not_change_the_name_of_a_daemon(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    member = account.member("", sandbox.base_url)
    script = tmp_path / "fake_host.py"
    script.write_text(FAKE_HOST)
    member.environ["FAKE_HOST"] = "first"
    daemon = run(member, "run", script=str(script), watching=False)
    daemon.wait_for("started")
    sandbox.hold()
    member.prompt("cat", "cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    daemon.stop(signal.SIGKILL)
    sandbox.release()

    member.environ["FAKE_HOST"] = "second"
    run(member, "run", script=str(script), watching=False).wait_for("started")
    until(lambda: member.finished() == {"cat": "errors"})
    assert member.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 1
    ((name, host, incarnation),) = account.rows("SELECT name, host, incarnation FROM imagewatch.instances")
    assert name.startswith("first:")
    assert (host, incarnation) == ("second", 2)


def test_a_prompt_is_sent_soon_when_the_reservation_of_another_daemon_ends(
    account: Account, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    """A daemon is notified only of the ends of its own requests."""
    one, two, _ = started(account, sandbox, run, limits__credits_per_day="30", limits__assumed_credits="30")
    sandbox.hold()
    one.prompt("cat", "cat [sandbox: 400]")
    assert sandbox.wait_for_requests(1, PATIENCE)
    two.prompt("dog", "dog")
    until(lambda: waiting(two) == 1)
    sandbox.release()
    until(lambda: two.finished() == {"dog": "outbox"})
    assert sandbox.report()["credits"] == 30
