"""What a person and a sender see of several daemons that process one inbox together."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
from support import noon
from support.daemon import PATIENCE, command, until
from support.team import SHORT_LEASE, Member, Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox


@pytest.fixture
def make(tmp_path: Path, postgres: Server, sandbox: Sandbox) -> Iterator[Callable[..., Team]]:
    """Start daemons of one inbox; the first one leads."""
    made: list[Team] = []

    def start(*names: str, environ: Mapping[str, str] = {}, **settings: str) -> Team:
        made.append(Team(tmp_path, postgres, sandbox, **settings))
        made[0].folders.environ |= environ
        for name in names:
            member = made[0].member(name)
            member.start().wait_for("started")
            until(made[0].leader)
        return made[0]

    yield start
    for team in made:
        team.__exit__()


def completed(team: Team, count: int) -> None:
    """Wait until so many prompts are completed and nothing of them is left."""
    __tracebackhide__ = True
    outbox = team.folders.outbox
    until(
        lambda: len(list(outbox.rglob("*.receipt.toml"))) == count and team.leftovers() == [],
        saw=lambda: f"{team.folders.finished()}\n{team.leftovers()}",
    )


def with_a_prompt_that_waits(make: Callable[..., Team], sandbox: Sandbox, **settings: str) -> Team:
    """Start two daemons, and a prompt that the first one has to send once more in ten minutes."""
    team = make("one", "two", retry__initial_seconds="600", retry__max_seconds="600", **settings)
    two = team.members["two"]
    two.pause()
    team.folders.prompt("cat", "a cat [sandbox: once 429-plain]")
    assert sandbox.wait_for_requests(1, PATIENCE)
    until(lambda: not team.in_flight())
    two.resume()
    return team


def holds(member: Member) -> set[str]:
    """Return the kinds of hold that the status of a daemon shows."""
    page = json.loads((member.folders.state / "status.json").read_text())
    return {hold["kind"] for hold in page["holds"]}


# A daemon that does not come back


def test_what_a_killed_daemon_has_not_sent_is_sent_by_another_and_another_one_leads(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = with_a_prompt_that_waits(make, sandbox, **SHORT_LEASE)
    one = team.members["one"]
    one.kill()
    team.folders.prompt("dog", "a dog")
    assert sandbox.wait_for_requests(3, PATIENCE)
    assert team.leader() == "two"
    one.start()  # its state folder still has the response that was free
    completed(team, 2)
    assert sandbox.report()["requests"] == 3


def test_prompts_that_a_killed_daemon_had_taken_and_not_moved_are_sent_once(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = make("one", "two", **SHORT_LEASE)
    one, two = team.members.values()
    one.pause()
    until(lambda: team.leader() == "two")
    taken = "INSERT INTO jobs (account, inbox, instance, id, folder, stem, claim, state, opened_at, holder, epoch)"
    claim = '{"job":"0123456789abcdef","folder":"","stem":"cat","prompt":"cat.prompt.txt","images":[],"at":1.0}'
    values = f"VALUES ('main', 'common', 'removed', '0123456789abcdef', '', 'cat', '{claim}', 'open', 1, 'removed', 1)"
    team.rows(f"{taken} {values}")
    team.folders.prompt("cat", "a cat")
    one.kill()
    completed(team, 1)
    assert sandbox.report()["requests"] == 1
    assert two.log is not None
    two.log.wait_for("completed")


def test_a_daemon_that_is_stopped_finishes_its_jobs_and_lets_another_one_lead_immediately(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = make("one", "two", limits__concurrency="2")
    one, two = team.members.values()
    sandbox.hold()
    for number in range(12):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    assert sandbox.wait_for_requests(4, PATIENCE)
    assert not sandbox.wait_for_requests(5, 1), "no daemon sends more than limits.concurrency at the same time"
    assert one.log is not None
    assert two.log is not None
    one.log.wait_for("leader_started")
    assert (len(one.events("leader_started")), two.events("leader_started")) == (1, [])
    one.signal(signal.SIGTERM)
    until(lambda: team.leader() == "two", saw=lambda: "its lease lasts ten minutes")
    two.log.wait_for("leader_started")
    sandbox.release()
    assert one.log.end() == 0
    completed(team, 12)
    assert len(one.events("completed")) == 2
    two.log.wait_for("completed", 10)
    assert sandbox.report()["requests"] == 12


def test_a_prompt_that_waits_for_its_next_attempt_is_sent_by_another_daemon_when_its_own_is_stopped(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = with_a_prompt_that_waits(make, sandbox)
    one, two = team.members.values()
    assert one.stop() == 0
    until(lambda: two.events("taken_over"))
    one.start()  # its state folder still has the response that was free
    completed(team, 1)
    assert sandbox.report()["requests"] == 2


def test_a_leader_without_the_shared_folder_lets_another_one_lead(
    make: Callable[..., Team], sandbox: Sandbox, tmp_path: Path
) -> None:
    team = make()
    (tmp_path / "mount").symlink_to(team.folders.root)
    one = team.member("one", folders__root=str(tmp_path / "mount"), inbox__rescan_seconds="1")
    one.start().wait_for("started")
    until(lambda: team.leader() == "one")
    two = team.member("two")
    two.start().wait_for("started")
    (tmp_path / "mount").unlink()
    until(lambda: team.leader() == "two")
    until(lambda: one.events("leader_ended") and two.events("leader_started"))
    team.folders.prompt("cat", "a cat")
    completed(team, 1)
    assert sandbox.report()["requests"] == 1


# Limits


def test_a_cap_is_not_exceeded_by_three_daemons(make: Callable[..., Team], sandbox: Sandbox) -> None:
    limits = {"limits__credits_per_day": "300", "limits__assumed_credits": "30"}
    team = make("one", "two", "three", environ=noon.environ(), **limits)
    for number in range(20):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    until(lambda: len(team.folders.finished()) == 10)
    leader = team.members[team.leader()]
    until(lambda: "cap" in holds(leader))
    assert sandbox.report()["credits"] == 300
    assert sandbox.report()["requests"] == 10
    assert len([name for name in team.folders.names("inbox") if name[0] != "."]) == 10


def test_requests_in_a_minute_are_counted_over_all_daemons(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two", "three", limits__requests_per_minute="5")
    for number in range(12):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    assert sandbox.wait_for_requests(5, PATIENCE)
    until(lambda: len(team.folders.finished()) == 5)
    until(lambda: any("rate" in holds(member) for member in team.members.values()))
    assert not sandbox.wait_for_requests(6, 2)


def test_a_budget_of_a_folder_concerns_only_its_prompts(make: Callable[..., Team], sandbox: Sandbox) -> None:
    limits = {"budgets__ann__credits_per_day": "60", "limits__assumed_credits": "30"}
    team = make("one", "two", "three", environ=noon.environ(), **limits)
    for number in range(6):
        team.folders.prompt(f"ann/cat{number}", f"a cat {number}")
        team.folders.prompt(f"bob/dog{number}", f"a dog {number}")
    until(lambda: len(team.folders.finished()) == 8)
    left = [f"inbox/ann/cat{number}.prompt.txt" for number in range(6)]
    until(lambda: len(team.leftovers()) == 4 and set(team.leftovers()) < set(left), saw=lambda: str(team.leftovers()))
    asked = [call["prompt"] for call in sandbox.report()["calls"]]
    assert len([text for text in asked if "cat" in text]) == 2
    assert len(asked) == 8


def test_a_prompt_that_is_delivered_again_is_not_sent_by_another_daemon(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = make("one", "two", **SHORT_LEASE)
    dropped = team.folders.prompt("cat", "a cat").stat()
    completed(team, 1)
    team.members[team.leader()].kill()
    temporary = team.folders.root / "again"
    temporary.write_text("a cat")
    os.utime(temporary, ns=(dropped.st_atime_ns, dropped.st_mtime_ns))
    temporary.rename(team.folders.inbox / "cat.prompt.txt")
    until(lambda: team.leftovers() == [])
    assert sandbox.report()["requests"] == 1


# Commands


def test_a_hold_concerns_one_daemon_and_the_others_continue(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two")
    one, two = team.members.values()
    assert team.leader() == "one"
    assert command(one.folders, "hold").returncode == 0
    one.log.wait_for("held")  # type: ignore[union-attr]
    for number in range(5):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    completed(team, 5)
    two.log.wait_for("completed", 5)  # type: ignore[union-attr]
    assert one.events("completed") == []
    assert command(two.folders, "hold").returncode == 0
    two.log.wait_for("held")  # type: ignore[union-attr]
    team.folders.prompt("dog", "a dog")
    until(lambda: team.rows("SELECT id FROM jobs WHERE holder = '' AND state = 'open'"))
    assert command(one.folders, "release").returncode == 0
    completed(team, 6)
    one.log.wait_for("completed")  # type: ignore[union-attr]
    assert holds(two) == {"manual"}
    assert sandbox.report()["requests"] == 6


def test_a_hold_of_the_account_concerns_all_daemons(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two")
    one, two = team.members.values()
    assert command(two.folders, "hold", "--account").returncode == 0
    until(lambda: holds(one) == holds(two) == {"manual_account"})
    team.folders.prompt("cat", "a cat")
    assert not sandbox.wait_for_requests(1, 2)
    assert command(one.folders, "release", "--account").returncode == 0
    completed(team, 1)


def test_a_burst_is_released_from_any_host(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two", limits__burst="3")
    one, two = team.members.values()
    one.pause()
    for number in range(6):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    one.resume()
    one.log.wait_for("held")  # type: ignore[union-attr]
    assert sandbox.report()["requests"] == 0
    assert command(two.folders, "release").returncode == 0
    completed(team, 6)


def charged_without_image(team: Team) -> tuple[Member, Member]:
    """Let a daemon keep a response whose image cannot be downloaded; return it and another daemon."""
    team.folders.prompt("cat", "a cat [sandbox: url-404]")
    until(lambda: team.rows("SELECT id FROM jobs WHERE state = 'kept'"))
    ((holder,),) = [tuple(row.values()) for row in team.rows("SELECT holder FROM jobs")]
    others = [member for name, member in team.members.items() if name != holder]
    return team.members[holder], others[0]


def test_retry_on_another_host_reaches_the_daemon_that_has_the_response(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = make("one", "two")
    holder, other = charged_without_image(team)
    assert command(other.folders, "retry", "cat").returncode == 0
    until(lambda: holder.events("response_reread"))
    until(lambda: len(holder.events("failed")) == 2, saw=lambda: str(holder.logs[0].log()))
    assert other.events("response_reread") == []
    assert sandbox.report()["requests"] == 1


def test_retry_is_done_by_another_daemon_if_the_one_that_has_the_response_does_not_run(
    make: Callable[..., Team], sandbox: Sandbox
) -> None:
    team = make("one", "two")
    holder, other = charged_without_image(team)
    assert holder.stop() == 0
    assert command(other.folders, "retry", "cat").returncode == 0
    until(lambda: other.events("response_reread"))
    until(lambda: other.events("failed"), saw=lambda: str(other.logs[0].log()))
    assert sandbox.report()["requests"] == 1
    until(lambda: team.rows("SELECT state, holder FROM jobs") == [{"state": "kept", "holder": other.name}])


def test_retry_reports_that_only_a_removed_daemon_had_the_response(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two")
    holder, other = charged_without_image(team)
    assert holder.stop() == 0
    for path in (team.folders.inbox / ".imagewatch").rglob("answer.*"):
        path.unlink()
    assert command(other.folders, "retry", "cat").returncode == 0
    assert command(other.folders, "hosts", "forget", holder.name, "--yes").returncode == 0
    until(lambda: other.events("response_missing"))
    assert holder.name in other.events("response_missing")[0]["reason"]


def test_submit_waits_for_a_prompt_whichever_daemon_has_it(make: Callable[..., Team]) -> None:
    team = make("one", "two")
    for member in team.members.values():
        done = command(member.folders, "submit", "--wait", "a cat")
        assert done.returncode == 0, done.stderr
    completed(team, 2)


def test_a_reload_of_one_daemon_does_not_disturb_the_others(make: Callable[..., Team], sandbox: Sandbox) -> None:
    team = make("one", "two")
    one, _ = team.members.values()
    sandbox.hold()
    for number in range(4):
        team.folders.prompt(f"cat{number}", f"a cat {number}")
    assert sandbox.wait_for_requests(2, PATIENCE)
    one.signal(signal.SIGHUP)
    one.log.wait_for("reloaded")  # type: ignore[union-attr]
    team.folders.prompt("dog", "a dog")
    sandbox.release()
    completed(team, 5)
    assert sandbox.report()["requests"] == 5
