"""Caps, through the real worker and the real daemon: never more than allowed, and nothing is lost by waiting."""

from __future__ import annotations

import contextlib
import shutil
import signal

import pytest
from conftest import Folders, Station, until

from imagewatch.outcome import End


@pytest.fixture
def capped(tmp_path, sandbox):
    """Make a station whose first request may cost 30 credits, as flux does at the sandbox."""

    def make(**limits):
        settings = {f"limits__{name}": str(value) for name, value in {"assumed_credits": 30, **limits}.items()}
        return stack.enter_context(contextlib.closing(Station(tmp_path, sandbox.base_url, **settings)))

    with contextlib.ExitStack() as stack:
        yield make


def test_at_a_cap_a_prompt_goes_back_to_the_inbox_unpaid(capped, sandbox):
    station = capped(credits_per_day=60)
    for stem in "abc":
        station.prompt(stem, "a cat")
        outcomes = station.work()
    assert outcomes[-1].end is End.RETURNED
    assert outcomes[-1].trouble.kind == "cap"
    assert "limits.credits_per_day is 60" in outcomes[-1].trouble.message
    assert station.names("inbox") == ["c.prompt.txt"]
    assert sandbox.report()["charged"] == 2
    assert station.leftovers() == []


def test_a_price_that_turns_out_lower_leaves_room_for_another_request(capped, sandbox):
    station = capped(credits_per_day=100, assumed_credits=70)
    for stem in "abc":
        station.prompt(stem, "a cat")
        station.work()
    assert sandbox.report()["credits"] == 90


def test_a_request_that_was_refused_takes_nothing_from_the_cap(capped, sandbox):
    station = capped(credits_per_day=30)
    station.prompt("a", "[sandbox: 400] a cat")
    station.prompt("b", "a cat")
    station.work()
    assert station.documents() == {"a": "errors", "b": "outbox"}


def test_an_answer_that_was_lost_counts_against_the_cap(capped, sandbox):
    station = capped(credits_per_day=30)
    station.prompt("a", "[sandbox: drop] a cat")
    station.work()
    station.prompt("b", "a cat")
    station.work()
    assert station.names("inbox") == ["b.prompt.txt"]
    assert sandbox.report()["requests"] == 1


def test_the_daemon_stops_at_the_cap_though_it_sends_several_at_once(tmp_path, sandbox, start):
    folders = Folders(
        tmp_path, sandbox.base_url, limits__credits_per_day="100", limits__assumed_credits="30", limits__concurrency="8"
    )
    for number in range(12):
        folders.prompt(f"p{number:02}", "a cat")
    daemon = start(folders, "once")
    assert daemon.wait() == 69
    assert sandbox.report()["credits"] == 90
    assert len([name for name in folders.names("inbox") if name.endswith(".prompt.txt")]) == 9
    assert "limits.credits_per_day is 100" in daemon.output
    assert start(folders, "once").wait() == 69
    assert sandbox.report()["credits"] == 90


def test_requests_a_minute_are_counted_across_a_restart(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__requests_per_minute="2")
    for stem in "ab":
        folders.prompt(stem, "a cat")
    assert start(folders, "once").wait() == 0
    folders.prompt("c", "a cat")
    daemon = start(folders, "run")
    assert not sandbox.wait_for_requests(3, timeout=1.5)
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 2


def test_a_paid_answer_of_a_killed_daemon_counts_against_the_cap_before_it_is_read(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="30", limits__assumed_credits="30")
    folders.prompt("a", "[sandbox: big 60, b64] a cat")
    killed = start(folders, "once")
    until(lambda: [part for part in folders.state.glob("jobs/*/answer.1.part") if part.stat().st_size > 1_000_000])
    killed.stop(signal.SIGKILL)
    folders.prompt("b", "a dog")
    assert start(folders, "once").wait() == 69
    assert sandbox.report()["credits"] == 30
    assert folders.names("inbox") == ["b.prompt.txt"]


def paid_once(folders, sandbox, start):
    """Pay for one prompt; return the record of its job as it was while the answer was awaited."""
    folders.prompt("a", "a cat")
    sandbox.hold()
    daemon = start(folders, "once")
    assert sandbox.wait_for_requests(1, timeout=20)
    (record,) = folders.state.glob("jobs/*")
    kept = shutil.copytree(record, folders.state / "kept")
    sandbox.release()
    assert daemon.wait() == 0
    return kept, record


def test_what_is_left_of_a_job_that_was_being_forgotten_is_not_set_aside_for_ever(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="60", limits__assumed_credits="30")
    kept, record = paid_once(folders, sandbox, start)
    (kept / "claim.json").unlink()  # the first that goes, and evidence of what was sent the last
    kept.rename(record)
    folders.prompt("b", "a dog")
    assert start(folders, "once").wait() == 0
    assert folders.documents() == {"a": "outbox", "b": "outbox"}


def test_what_a_damaged_record_may_have_cost_is_counted_and_not_waited_for(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="60", limits__assumed_credits="30")
    kept, record = paid_once(folders, sandbox, start)
    (kept / "claim.json").write_text("{")
    kept.rename(record)
    folders.prompt("b", "a dog")
    assert start(folders, "once").wait() == 70  # a job is left to a person
    assert sandbox.report()["credits"] == 30
    assert [name for name in folders.names("inbox") if name.endswith(".prompt.txt")] == ["b.prompt.txt"]
