"""Caps, through the real worker and the real daemon: never more than allowed, and nothing is lost by waiting."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import threading
import time

import pytest
from support.daemon import PATIENCE, Folders, command, until
from support.scripted import Scripted, heavy, paid, response
from support.station import Station

from imagewatch.job.outcome import End


@pytest.fixture
def capped(tmp_path, sandbox):
    """Return a station whose first request may cost 30 credits, as flux does at the sandbox."""

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
    assert outcomes[-1].reason.kind == "cap"
    assert "limits.credits_per_day is 60" in outcomes[-1].reason.message
    assert station.names("inbox") == ["c.prompt.txt"]
    assert sandbox.report()["charged"] == 2
    assert station.leftovers() == []


def test_a_price_that_turns_out_lower_leaves_room_for_another_request(capped, sandbox):
    station = capped(credits_per_day=100, assumed_credits=70)
    for stem in "abc":
        station.prompt(stem, "a cat")
        station.work()
    assert sandbox.report()["credits"] == 90


def test_a_refused_request_does_not_count_against_the_cap(capped, sandbox):
    station = capped(credits_per_day=30)
    station.prompt("a", "[sandbox: 400] a cat")
    station.prompt("b", "a cat")
    station.work()
    assert station.finished() == {"a": "errors", "b": "outbox"}


def test_a_response_that_was_lost_counts_against_the_cap(capped, sandbox):
    station = capped(credits_per_day=30)
    station.prompt("a", "[sandbox: drop] a cat")
    station.work()
    station.prompt("b", "a cat")
    station.work()
    assert station.names("inbox") == ["b.prompt.txt"]
    assert sandbox.report()["requests"] == 1


def test_the_daemon_stops_at_the_cap_though_it_sends_several_at_the_same_time(tmp_path, sandbox, start):
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


def test_requests_a_minute_are_counted_across_a_restart(tmp_path, sandbox, start, run):
    folders = Folders(tmp_path, sandbox.base_url, limits__requests_per_minute="2")
    for stem in "ab":
        folders.prompt(stem, "a cat")
    assert start(folders, "once").wait() == 0
    folders.prompt("c", "a cat")
    daemon = run(folders)
    until(lambda: [one["kind"] for one in page(folders)["holds"]] == ["rate"])
    assert not sandbox.wait_for_requests(3, timeout=1.5)
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 2


def test_a_saved_response_of_a_killed_daemon_counts_against_the_cap_before_it_is_read(tmp_path, start):
    body, killed = paid(heavy(2_000_000), billing={"credits_charged": 30}), threading.Event()

    def half(exchange):
        exchange.request()
        exchange.send(response(body)[: -len(body) // 4])
        killed.wait(PATIENCE)

    with Scripted(half) as server:
        folders = Folders(tmp_path, server.base_url, limits__credits_per_day="30", limits__assumed_credits="30")
        folders.prompt("a", "a cat")
        daemon = start(folders, "once")
        until(lambda: [part for part in folders.state.glob("answers/*.answer.*") if part.stat().st_size > 1_000_000])
        daemon.stop(signal.SIGKILL)
        killed.set()
        folders.prompt("b", "a dog")
        assert start(folders, "once").wait() == 69
        assert server.connections == 1
    assert folders.names("inbox") == ["b.prompt.txt"]


def test_the_possible_cost_of_a_damaged_record_counts_and_delays_nothing(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="60", limits__assumed_credits="30")
    folders.prompt("a", "a cat")
    sandbox.hold()
    killed = start(folders, "once")
    assert sandbox.wait_for_requests(1, timeout=20)
    killed.stop(signal.SIGKILL)
    sandbox.release()
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        database.execute("UPDATE jobs SET claim = '{'")
        database.commit()
    for stem in "bc":
        folders.prompt(stem, "a dog")
    assert start(folders, "once").wait() == 70  # a job needs a person
    assert sandbox.report()["requests"] == 2
    assert len([name for name in folders.names("inbox") if name in {"b.prompt.txt", "c.prompt.txt"}]) == 1


# Only what does not fit waits

GEMINI = '+++\nprovider = "gemini"\n+++\na dog'


def waiting_of(folders):
    return [name for name in folders.names("inbox") if name.endswith(".prompt.txt") and "/" not in name]


def page(folders):
    result = command(folders, "status", "--json")
    return json.loads(result.stdout)


def at_a_cap(tmp_path, sandbox, start, **limits):
    """Folders in which one request to gemini was paid, 134 credits, and a second one does not fit into the day."""
    settings = {"assumed_credits": "30", "credits_per_day": "200", "concurrency": "1", **limits}
    folders = Folders(tmp_path, sandbox.base_url, **{f"limits__{name}": value for name, value in settings.items()})
    folders.prompt("a", GEMINI)
    assert start(folders, "once").wait() == 0
    assert sandbox.report()["credits"] == 134
    return folders


def test_a_request_that_alone_exceeds_the_cap_is_invalid_and_the_queue_continues(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start, assumed_credits="250", credits_per_day="300")
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "240"
    folders.prompt("dear", "a cat")
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "249"
    folders.prompt("n", GEMINI.replace('"gemini"', '"gemini"\nn = 2'))
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_MONTH"] = "1000"
    assert start(folders, "once").wait() == 1
    assert sandbox.report()["requests"] == 1
    for stem in ("dear", "n"):
        error = folders.error(stem)
        assert (error["charged"], error["attempts"]) == ("no", 0)
        assert "limits.credits_per_day: is 249 credits" in error["message"]
        assert error["next"].startswith("raise the cap")
    assert "may cost 250 (limits.assumed_credits" in folders.error("dear")["message"]
    assert "set limits.assumed_credits to a likely cost" in folders.error("dear")["message"]
    assert "may cost 268 (the highest charge" in folders.error("n")["message"]
    assert folders.leftovers() == []


def test_with_a_cap_below_the_assumed_credits_nothing_is_held_and_check_finds_it(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="100")
    page = json.loads(command(folders, "check", "--json").stdout)
    (line,) = [one for one in page["settings"] if one["what"] == "limits.credits_per_day"]
    assert (line["verdict"], "assumed_credits (150)" in line["why"]) == ("bad", True)
    folders.prompt("a", "a cat")
    daemon = start(folders, "once")
    assert (daemon.wait(), "held" in daemon.output) == (1, False)
    assert folders.finished() == {"a": "errors"}
    folders.environ["IMAGEWATCH_LIMITS__ASSUMED_CREDITS"] = "40"
    folders.prompt("b", "a cat")
    assert start(folders, "once").wait() == 0
    del folders.environ["IMAGEWATCH_LIMITS__ASSUMED_CREDITS"]
    result = command(folders, "check")
    assert (result.returncode, "30 are spent; the period ends" in result.stdout) == (0, True)
    assert "a provider that was not charged in the last 30 days" in result.stdout


def test_at_a_cap_the_prompts_of_other_providers_that_fit_are_sent(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start)
    for number in range(3):
        folders.prompt(f"dog{number}", GEMINI)
    for number in range(3):
        folders.prompt(f"z{number}", "a cat")
    daemon = start(folders, "once")
    assert daemon.wait() == 69
    assert sandbox.report()["credits"] == 134 + 60
    assert waiting_of(folders) == ["dog0.prompt.txt", "dog1.prompt.txt", "dog2.prompt.txt", "z2.prompt.txt"]
    assert "limits.credits_per_day is 200: 194 are spent" in daemon.output
    assert daemon.output.count('"event": "held"') == 2
    assert folders.leftovers() == []


def test_of_one_provider_prompts_that_cost_less_are_still_sent(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="170", limits__assumed_credits="30")
    folders.prompt("a", "+++\nn = 2\n+++\na cat")
    assert start(folders, "once").wait() == 0
    folders.prompt("four", "+++\nn = 4\n+++\nfour cats")
    folders.prompt("one", "a cat")
    assert start(folders, "once").wait() == 69
    assert folders.finished() == {"a": "outbox", "one": "outbox"}
    assert waiting_of(folders) == ["four.prompt.txt"]


def test_however_many_wait_at_a_cap_before_it_a_prompt_that_fits_is_sent(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start)
    for number in range(300):
        folders.prompt(f"dog{number}", GEMINI)
    folders.prompt("zebra", "a zebra")
    assert start(folders, "once").wait() == 69
    assert folders.finished()["zebra"] == "outbox"
    assert len(waiting_of(folders)) == 300
    assert sandbox.report()["requests"] == 2


def test_prompts_at_a_cap_are_neither_claimed_nor_changed(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start)
    before = folders.prompt("dog", GEMINI).stat()
    assert start(folders, "once").wait() == 69
    after = (folders.inbox / "dog.prompt.txt").stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_status_and_check_name_the_cap_its_provider_and_its_end(tmp_path, sandbox, run, start):
    folders = at_a_cap(tmp_path, sandbox, start)
    for number in range(3):
        folders.prompt(f"dog{number}", GEMINI)
    daemon = run(folders)
    event = daemon.wait_for("held")
    assert (event["kind"], event["provider"]) == ("cap", "gemini")
    until(lambda: page(folders)["waiting"]["why"] == {"cap": 3})
    (hold,) = page(folders)["holds"]
    assert (hold["kind"], hold["provider"], hold["next_try_at"][11:19]) == ("cap", "gemini", "00:00:00")
    assert "limits.credits_per_day is 200: 134 are spent" in hold["reason"]
    assert "this request may cost 134" in hold["reason"]
    assert page(folders)["waiting"]["ready"] == 0
    assert set(page(folders)["waiting"]["files"]) == {f"dog{number}.prompt.txt" for number in range(3)}
    shown = json.loads(command(folders, "check", "--json").stdout)["files"]
    assert [(line["verdict"], "limits.credits_per_day is 200" in line["why"]) for line in shown] == [("wait", True)] * 3
    assert "on hold    cap, gemini: " in command(folders, "status").stdout
    folders.prompt("cat", "a cat")
    until(lambda: folders.finished().get("cat") == "outbox")
    assert len(daemon.events("held")) == 1
    for path in folders.inbox.glob("dog*"):
        path.unlink()
    folders.prompt("cat2", "a cat")
    until(lambda: page(folders)["holds"] == [])
    assert (daemon.stop(), [one["kind"] for one in daemon.events("released")]) == (0, ["cap"])


def test_a_raised_cap_applies_after_a_reload_and_waiting_prompts_are_sent(tmp_path, sandbox, start, run):
    folders = at_a_cap(tmp_path, sandbox, start)
    folders.prompt("dog", GEMINI)
    del folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"]
    path = tmp_path / "imagewatch.toml"
    path.write_text("[limits]\ncredits_per_day = 200\n")
    folders.environ["IMAGEWATCH_CONFIG"] = str(path)
    daemon = run(folders)
    daemon.wait_for("held")
    path.write_text("[limits]\ncredits_per_day = 300\n")
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: folders.finished().get("dog") == "outbox")
    assert daemon.stop() == 0


SHIFTED = """
import os, sys, time
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.system import log
config = load(None, os.environ)
log.configure("info", "json")
def clock():
    with open(os.environ["OFFSET"]) as file:
        return time.time() + float(file.read())
sys.exit(Daemon(config, os.environ, clock=clock).run())
"""


def shifted(tmp_path, folders, run, offset):
    """Start a daemon whose clock is ahead by the seconds in a file; return it and the file."""
    file = tmp_path / "offset"
    set_clock(file, offset)
    folders.environ["OFFSET"] = str(file)
    script = tmp_path / "shifted.py"
    script.write_text(SHIFTED)
    return run(folders, script=str(script)), file


def set_clock(file, offset):
    """Change the clock in one step: it must never read half a number."""
    written = file.with_suffix(".new")
    written.write_text(str(offset))
    written.rename(file)


def to_midnight():
    return 86_400 - time.time() % 86_400


@pytest.mark.parametrize("seconds_before", [5])
def test_at_the_end_of_the_day_prompts_that_waited_are_sent_first(tmp_path, sandbox, start, run, seconds_before):
    folders = at_a_cap(tmp_path, sandbox, start)
    folders.prompt("dog", GEMINI)
    folders.prompt("dog2", GEMINI)
    shifted(tmp_path, folders, run, to_midnight() - seconds_before)
    until(lambda: "dog" in folders.finished(), timeout=60)
    assert "dog2" not in folders.finished()
    assert waiting_of(folders) == ["dog2.prompt.txt"]


def test_release_applies_a_clock_that_was_set_and_one_set_back_frees_no_credits(tmp_path, sandbox, start, run):
    folders = at_a_cap(tmp_path, sandbox, start)
    folders.prompt("dog", GEMINI)
    daemon, offset = shifted(tmp_path, folders, run, 0)
    daemon.wait_for("held")
    set_clock(offset, -40 * 86_400)
    command(folders, "release")
    folders.prompt("cat", "a cat")
    until(lambda: folders.finished().get("cat") == "outbox")
    assert sandbox.report()["requests"] == 2
    set_clock(offset, 86_400)
    command(folders, "release")
    until(lambda: folders.finished().get("dog") == "outbox")


def test_prompts_at_a_cap_cost_other_folders_no_turn(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start, credits_per_day="260")
    for number in range(40):
        folders.drop(f"dogs/d{number}.prompt.txt", GEMINI)
    for number in range(2):
        folders.drop(f"cats/c{number}.prompt.txt", "a cat")
    assert start(folders, "once").wait() == 69
    assert {stem for stem, destination in folders.finished().items() if destination == "outbox"} == {"a", "c0", "c1"}


def test_a_prompt_that_does_not_fit_beside_those_in_flight_is_not_claimed_before_it_fits(tmp_path, sandbox, start):
    folders = Folders(
        tmp_path, sandbox.base_url, limits__credits_per_day="100", limits__assumed_credits="70", limits__concurrency="4"
    )
    for number in range(3):
        folders.prompt(f"p{number}", f"Number {number}")
    sandbox.hold()
    daemon = start(folders, "once")
    assert sandbox.wait_for_requests(1, timeout=20)
    assert not sandbox.wait_for_requests(2, timeout=1.5)
    assert len(waiting_of(folders)) == 2
    sandbox.release()
    assert (daemon.wait(), sandbox.report()["credits"]) == (0, 90)


def test_a_cap_is_the_same_for_two_daemons_one_after_the_other(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start)
    folders.prompt("dog", GEMINI)
    for _ in range(2):
        assert start(folders, "once").wait() == 69
    assert sandbox.report()["requests"] == 1


def test_estimate_shows_what_the_caps_reserve(tmp_path, sandbox, start):
    folders = at_a_cap(tmp_path, sandbox, start, credits_per_day="500")
    folders.prompt("two", GEMINI.replace('"gemini"', '"gemini"\nn = 2'))
    folders.prompt("cat", "+++\nn = 3\n+++\na cat")
    folders.prompt("much", '+++\nprovider = "gemini"\nn = 4\n+++\na cat')
    page = {one["source"]: one for one in json.loads(command(folders, "estimate", "--json").stdout)}
    assert [page["two.prompt.txt"][name] for name in ("usual", "high", "reserve", "seen")] == [268, 268, 268, 1]
    assert [page["cat.prompt.txt"][name] for name in ("usual", "reserve", "seen")] == [None, 90, 0]
    assert "limits.credits_per_day: is 500" in page["much.prompt.txt"]["problem"]


def test_a_paid_response_that_cannot_be_delivered_counts_once(tmp_path, sandbox, run):
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="90", limits__assumed_credits="30")
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("sub/cat", "a cat")
    assert sandbox.wait_for_requests(1, 20)
    (folders.outbox / "sub").write_text("in the way")
    sandbox.release()
    daemon.wait_for("stuck")
    folders.prompt("dog", "a dog")
    folders.prompt("fox", "a fox")
    until(lambda: folders.finished() == {"dog": "outbox", "fox": "outbox"})
    assert sandbox.report()["credits"] == 90
    assert not (folders.outbox / "sub").is_dir()
