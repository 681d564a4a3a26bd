"""Money, from outside: what holds the queue and what ends a hold, what caps limit, when a charge is unknown."""

from __future__ import annotations

import contextlib
import email.utils
import itertools
import json
import os
import re
import signal
import subprocess
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, Folders, below, command, until
from support.scripted import Scripted, paid, responding, response, small_image
from support.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

NEVER = 3600.0
"""A first hold that long is ended by anything but its own probe."""
MANY = 500


def content_of(folders: Folders) -> dict[str, tuple[int, bytes]]:
    """What is in the inbox: mtime and content of each file, by name; one that is claimed meanwhile is not there."""
    found = {}
    for path in below(folders.inbox):
        if ".imagewatch" not in path.parts and path.is_file():
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(folders.inbox))] = (path.stat().st_mtime_ns, path.read_bytes())
    return found


def waiting(folders: Folders, count: int) -> None:
    """Wait until nothing is in flight and so many files are in the inbox."""
    until(lambda: len(content_of(folders)) == count and not folders.leftovers())


def holds(folders: Folders) -> list[dict[str, Any]]:
    status = folders.state / "status.json"
    return json.loads(status.read_bytes())["holds"] if status.exists() else []


def held(folders: Folders, kind: str) -> dict[str, Any]:
    """Wait until the status file has a hold."""
    until(lambda: kind in [hold["kind"] for hold in holds(folders)])
    return next(hold for hold in holds(folders) if hold["kind"] == kind)


def one_error(folders: Folders) -> dict[str, Any]:
    (stem,) = [stem for stem, destination in folders.finished().items() if destination == "errors"]
    return folders.error(stem)


@pytest.fixture
def narrow(tmp_path: Path, sandbox: Sandbox) -> Folders:
    """Folders of a daemon that does one thing after the other."""
    return Folders(tmp_path, sandbox.base_url, limits__concurrency="1")


# The account


@pytest.mark.timeout(300)
def test_with_an_expired_key_many_prompts_wait_and_are_completed_when_its_file_is_renewed(tmp_path, hurried, sandbox):
    key = tmp_path / "key"
    key.write_text("sk-let-expired-0123456789\n")
    key.chmod(0o600)
    folders = Folders(tmp_path, sandbox.base_url, endpoint__api_key_file=str(key), limits__concurrency="8")
    for number in range(MANY):
        folders.prompt(f"p{number:03}", f"[sandbox: b64] Number {number}")
    before = content_of(folders)
    daemon = hurried(folders, NEVER)
    event = daemon.wait_for("held")
    assert event["kind"] == "key"
    assert event["next"] == f"replace the key in {key}; the daemon notices the change automatically"
    waiting(folders, MANY - 1)
    error = one_error(folders)
    assert (error["status"], error["charged"]) == (401, "no")
    after = content_of(folders)
    assert after.items() <= before.items()
    assert 1 <= sandbox.report()["requests"] <= 8
    shown = held(folders, "key")
    assert (shown["reason"], shown["next"]) == (event["reason"], event["next"])
    assert shown["next_try_at"] == event["next_try_at"]

    renewed = key.with_name("key.new")
    renewed.write_text(f"{KEY}\n")
    renewed.rename(key)
    until(lambda: len(folders.finished()) == MANY, timeout=200)
    assert list(folders.finished().values()).count("errors") == 1
    daemon.wait_for("released")
    assert len(daemon.events("key_changed")) == 1
    assert [line["kind"] for line in daemon.events("released")] == ["key"]
    until(lambda: holds(folders) == [])
    assert sandbox.report()["charged"] == MANY - 1
    assert daemon.stop() == 0
    assert (folders.names("inbox"), folders.leftovers()) == ([], [])


def test_after_a_refusal_each_start_sends_one_request_and_no_other_job_reports_it(narrow, hurried, sandbox):
    sandbox.key = "another key"
    for number in range(4):
        narrow.prompt(f"p{number}", f"Number {number}")
    before = content_of(narrow)
    for start in range(1, 4):
        assert command(narrow, "once").returncode == 69
        assert one_error(narrow)["status"] == 401
        assert len(content_of(narrow)) == 3
        assert sandbox.report()["requests"] == start
        shown = json.loads(command(narrow, "status", "--json").stdout)
        assert (shown["is_running"], [hold["kind"] for hold in shown["holds"]]) == (False, ["key"])
    assert content_of(narrow).items() <= before.items()
    sandbox.key = KEY
    daemon = hurried(narrow, NEVER)  # whose own first hold would last
    until(lambda: len(narrow.finished()) == 4)
    assert (list(narrow.finished().values()).count("errors"), sandbox.report()["charged"]) == (1, 3)
    assert daemon.events("held") == []
    assert daemon.stop() == 0
    sandbox.key = "a third key"
    narrow.prompt("later", "A cat")
    assert command(narrow, "once").returncode == 1
    assert narrow.finished()["later"] == "errors"


def test_a_corrected_endpoint_is_used_after_a_reload(tmp_path, hurried, sandbox):
    config = tmp_path / "config.toml"
    config.write_text(f'[endpoint]\nbase_url = "{sandbox.base_url}/api"\n')
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="2")
    folders.environ["IMAGEWATCH_CONFIG"] = str(config)
    for number in range(6):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders, NEVER)
    event = daemon.wait_for("held")
    assert (event["kind"], "base_url" in event["next"]) == ("endpoint", True)
    waiting(folders, 5)
    assert one_error(folders)["status"] == 404
    config.write_text(f'[endpoint]\nbase_url = "{sandbox.base_url}"\n')
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(folders.finished()) == 6)
    assert sandbox.report()["charged"] == 5


@pytest.mark.parametrize("how", ["reload", "release"])
def test_a_refusal_from_before_a_change_begins_no_hold(folders, hurried, sandbox, how):
    daemon = hurried(folders, NEVER)
    sandbox.key = "another key"
    sandbox.hold()
    folders.prompt("before", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    sandbox.key = KEY
    if how == "reload":
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
    else:
        command(folders, "release")
    sandbox.release()
    until(lambda: folders.finished() == {"before": "errors"})
    folders.prompt("after", "A dog")
    until(lambda: folders.finished() == {"before": "errors", "after": "outbox"})
    assert daemon.events("held") == []


def test_credits_that_were_added_count_after_release(tmp_path, hurried, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="3")
    sandbox.balance = 75
    for number in range(6):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders, NEVER)
    event = daemon.wait_for("held")
    assert (event["kind"], "add credits" in event["next"]) == ("credits", True)
    waiting(folders, 3)
    assert one_error(folders)["credits_required"] == 30
    sandbox.balance = 1000
    assert command(folders, "release").returncode == 0
    until(lambda: len(folders.finished()) == 6)
    assert sandbox.report()["credits"] == 5 * 30


@pytest.mark.parametrize(
    ("tag", "kind", "status"),
    [("429-quota", "quota", 429), ("403", "key", 403), ("404", "endpoint", 404), ("308", "endpoint", 308)],
)
def test_a_reason_for_every_request_is_reported_by_one_job_and_the_rest_waits(
    narrow, hurried, sandbox, tag, kind, status
):
    narrow.prompt("first", f"[sandbox: {tag}] First")
    daemon = hurried(narrow, NEVER)
    event = daemon.wait_for("held")
    assert event["kind"] == kind
    asked = 60 if kind == "quota" else NEVER  # the endpoint names the time when the quota is renewed
    assert event["seconds"] <= asked  # what is left of it when it is logged
    for number in range(3):
        narrow.prompt(f"p{number}", f"Number {number}")
    shown = held(narrow, kind)
    assert shown["next_try_at"] == event["next_try_at"]
    lasts = datetime.fromisoformat(shown["next_try_at"]) - datetime.fromisoformat(shown["since"])
    assert abs(lasts.total_seconds() - asked) <= 1
    command(narrow, "hold")  # is applied when the daemon has scanned its inbox once more
    assert (narrow.error("first")["status"], sandbox.report()["requests"]) == (status, 1)
    assert len(content_of(narrow)) == 3
    command(narrow, "release")
    until(lambda: len(narrow.finished()) == 4)
    assert (sandbox.report()["requests"], sandbox.report()["redirected"]) == (4, 0)


def test_a_method_that_is_not_allowed_is_a_wrong_endpoint(tmp_path, hurried):
    with Scripted(responding(b"{}", status=b"405 Method Not Allowed")) as server:
        folders = Folders(tmp_path, server.base_url, limits__concurrency="1")
        for stem in "ab":
            folders.prompt(stem, "A cat")
        assert hurried(folders, NEVER).wait_for("held")["kind"] == "endpoint"
        waiting(folders, 1)
    assert one_error(folders)["status"] == 405


def test_a_refused_probe_returns_to_the_inbox_unchanged(narrow, hurried, sandbox):
    sandbox.balance = 0
    for number in range(3):
        narrow.drop(f"p{number}.png", small_image())
        narrow.prompt(f"p{number}", f"Number {number}")
    before = content_of(narrow)
    daemon = hurried(narrow, 0.1)
    daemon.wait_for("held", 4)
    assert daemon.stop() == 0
    (shown,) = narrow.finished()
    del before[f"{shown}.png"], before[f"{shown}.prompt.txt"]
    assert content_of(narrow) == before
    assert sandbox.report()["charged"] == 0
    times = [call["at"] for call in sandbox.report()["calls"]]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(seconds >= 0.1 * 2**number for number, seconds in enumerate(waits))
    assert narrow.leftovers() == []


# Our own disk


@pytest.mark.parametrize("short_of", ["bytes", "inodes"])
def test_a_disk_with_too_little_room_for_a_response_holds_the_queue_until_there_is_room(
    tmp_path, hurried, sandbox, short_of
):
    folders = Folders(tmp_path, sandbox.base_url, limits__min_free_bytes="2000000")
    folders.state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=1100", "tmpfs", str(folders.state)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        filler = folders.state / "filler"
        filler.mkdir()
        if short_of == "bytes":
            (filler / "file").write_bytes(bytes(2_500_000))
        else:
            for number in range(150):
                (filler / str(number)).touch()
        folders.prompt("cat", "A cat")
        daemon = hurried(folders)
        event = daemon.wait_for("held")
        assert event["kind"] == "disk"
        assert ("limits.min_free_bytes" if short_of == "bytes" else "inodes") in event["reason"]
        assert str(folders.state) in event["reason"]
        held(folders, "disk")
        assert (sandbox.report()["requests"], list(content_of(folders))) == (0, ["cat.prompt.txt"])
        for path in filler.iterdir():
            path.unlink()
        until(lambda: folders.finished() == {"cat": "outbox"})
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(folders.state)], check=True)


# Guard rails


@pytest.mark.parametrize(
    ("limits", "front", "text", "rule"),
    [
        ({"max_prompt_chars": "4"}, "", "A cat", "limits.max_prompt_chars"),
        ({"providers": '["flux"]'}, 'quality = "low"', "A cat", "limits.providers"),
        ({"providers": '["flux"]'}, 'preset = "dear"', "A cat", "limits.providers"),
        ({"max_n": "2"}, 'preset = "dear"', "A cat", "limits.max_n"),
    ],
)
def test_a_request_outside_the_guard_rails_is_refused_with_the_rule(tmp_path, sandbox, limits, front, text, rule):
    config = tmp_path / "config.toml"
    config.write_text('[presets.dear]\nprovider = "openai"\nn = 4\n')
    folders = Folders(tmp_path, sandbox.base_url, **{f"limits__{name}": value for name, value in limits.items()})
    folders.prompt("cat", f"+++\n{front}\n+++\n{text}")
    assert command(folders, "once", "--config", str(config)).returncode == 1
    error = folders.error("cat")
    assert rule in " ".join(error["problems"])
    assert (error["charged"], error["attempts"], sandbox.report()["requests"]) == ("no", 0, 0)


# Caps


@pytest.mark.parametrize("concurrency", [3, 8])
def test_a_cap_is_exceeded_by_no_more_than_the_error_of_the_guess_on_what_is_in_flight(
    tmp_path, sandbox, start, concurrency
):
    guess, real = 10, 30
    cap = guess * concurrency
    folders = Folders(
        tmp_path,
        sandbox.base_url,
        limits__concurrency=str(concurrency),
        limits__assumed_credits=str(guess),
        limits__credits_per_day=str(cap),
    )
    for number in range(concurrency + 4):
        folders.prompt(f"p{number}", f"Number {number}")
    sandbox.hold()
    daemon = start(folders, "once")
    assert sandbox.wait_for_requests(concurrency, 20)
    sandbox.release()
    assert (daemon.wait(), "limits.credits_per_day" in daemon.output) == (69, True)
    assert re.search(r"raise the cap.*; next try at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d$", daemon.output, re.MULTILINE)
    spent = sandbox.report()["credits"]
    assert cap < spent <= cap + (real - guess) * concurrency
    assert spent == real * concurrency  # the worst case: all of them left before the first price was known
    assert len(content_of(folders)) == 4
    assert command(folders, "once").returncode == 69
    assert sandbox.report()["credits"] == spent


def test_once_the_price_is_known_a_cap_is_not_exceeded_at_all(tmp_path, sandbox):
    folders = Folders(
        tmp_path, sandbox.base_url, limits__concurrency="4", limits__assumed_credits="10", limits__credits_per_day="500"
    )
    folders.prompt("first", "A cat")
    assert command(folders, "once").returncode == 0
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "100"
    for number in range(6):
        folders.prompt(f"p{number}", f"[sandbox: slow 0.2] Number {number}")
    assert command(folders, "once").returncode == 69
    assert sandbox.report()["credits"] == 90


def test_a_guess_that_is_too_high_makes_prompts_wait_for_each_other_and_not_for_tomorrow(tmp_path, sandbox):
    folders = Folders(
        tmp_path, sandbox.base_url, limits__concurrency="3", limits__assumed_credits="90", limits__credits_per_day="100"
    )
    for number in range(3):
        folders.prompt(f"p{number}", f"[sandbox: slow 0.2] Number {number}")
    ended = command(folders, "once")
    assert (ended.returncode, sandbox.report()["credits"]) == (0, 90)


def test_a_cap_holds_though_the_daemon_is_killed_with_requests_in_flight(tmp_path, run, sandbox):
    folders = Folders(
        tmp_path, sandbox.base_url, limits__concurrency="4", limits__assumed_credits="30", limits__credits_per_day="70"
    )
    for number in range(6):
        folders.prompt(f"p{number}", f"Number {number}")
    sandbox.hold()
    daemon = run(folders)
    assert sandbox.wait_for_requests(2, 20)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    sandbox.release()
    assert command(folders, "once").returncode == 69
    assert (sandbox.report()["requests"], len(content_of(folders))) == (2, 4)
    assert list(folders.finished().values()) == ["errors", "errors"]


def test_a_cap_that_stops_several_at_the_same_time_is_logged_once_with_its_end(tmp_path, hurried, sandbox):
    folders = Folders(
        tmp_path,
        sandbox.base_url,
        limits__concurrency="6",
        limits__assumed_credits="30",
        limits__credits_per_month="50",
    )
    folders.prompt("first", "A cat")
    assert command(folders, "once").returncode == 0
    for number in range(8):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders)
    event = daemon.wait_for("held")
    waiting(folders, 8)
    assert (event["kind"], "limits.credits_per_month is 50" in event["reason"]) == ("cap", True)
    assert held(folders, "cap")["next_try_at"] >= event["next_try_at"]
    assert len(daemon.events("held")) == 1
    assert sandbox.report()["requests"] == 1


# Busy endpoints


class Busy:
    """An endpoint that is busy once and then completes everything; it keeps the times of the requests."""

    def __init__(self, headers: Callable[[], bytes], status: bytes = b"429 Too Many Requests", body: bytes = b"{}"):
        self.asked: list[float] = []
        self._headers = headers
        self._status = status
        self._body = body

    def busy(self, exchange: Any) -> None:
        exchange.request()
        self.asked.append(time.time())
        exchange.send(response(self._body, self._headers(), status=self._status))

    def good(self, exchange: Any) -> None:
        exchange.request()
        self.asked.append(time.time())
        exchange.send(response(paid(small_image())))


def at_a_date(seconds: int) -> bytes:
    """An HTTP date has no fractions: this one is at least so many seconds away."""
    return b"Retry-After: " + email.utils.formatdate(int(time.time()) + seconds + 1, usegmt=True).encode()


@pytest.mark.parametrize(
    ("headers", "seconds", "attempts"),
    [
        (lambda: b"Retry-After: 2", 2, 4),
        (lambda: at_a_date(2), 2, 4),
        (lambda: b"Retry-After: 2", 2, 1),
    ],
    ids=["seconds", "a date", "after the last attempt"],
)
def test_a_429_slows_the_whole_queue_for_the_time_it_names(tmp_path, run, headers, seconds, attempts):
    endpoint = Busy(headers)
    more = 3 if attempts == 1 else 4
    with Scripted(endpoint.busy, *[endpoint.good] * more) as server:
        folders = Folders(tmp_path, server.base_url, retry__attempts=str(attempts))
        folders.prompt("first", "First")
        daemon = run(folders)
        event = daemon.wait_for("held")
        assert event["kind"] == "busy"
        for number in range(3):
            folders.prompt(f"p{number}", f"Number {number}")
        until(lambda: len(folders.finished()) == 4)
        assert daemon.stop() == 0
    first, *rest = endpoint.asked
    assert len(rest) == more
    assert min(rest) >= first + seconds - 0.01
    assert folders.finished()["first"] == ("errors" if attempts == 1 else "outbox")


def test_a_shutdown_without_a_charge_is_retried_a_few_times_and_never_charged(tmp_path, hurried, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, retry__attempts="2")
    folders.prompt("never", "[sandbox: 503-shutdown] Never")
    folders.prompt("once", "[sandbox: once 503-shutdown] Once")
    daemon = hurried(folders)
    until(lambda: folders.finished() == {"never": "errors", "once": "outbox"})
    assert daemon.stop() == 0
    error = folders.error("never")
    assert (error["attempts"], error["charged"], error["status"]) == (2, "no", 503)
    assert "busy" in error["next"]
    calls = sandbox.report()["calls"]
    for word in ("Never", "Once"):
        first, second = [call["at"] for call in calls if call["prompt"].endswith(word)]
        assert second >= first + 1  # Retry-After was 1
    assert (sandbox.report()["charged"], folders.receipt("once")["attempts"]) == (1, 2)


# Charge unknown


LOST = [
    *("408", "500-empty", "502", "503", "503-interrupted", "504", "520", "521", "522", "523", "524"),
    *("drop", "reset", "drop-headers"),
]
ANSWERED = [tag for tag in LOST if not tag.startswith("drop") and tag != "reset"]


def charge_is_unknown(folders: Folders, stem: str) -> dict[str, Any]:
    """What every report has of a request that may have been charged."""
    error = folders.error(stem)
    assert error["charged"] == "unknown"
    assert "may have been charged" in error["message"]
    assert error["times"]["claimed"] <= error["times"]["sent"] <= error["times"]["published"]
    assert "imagewatch check --balance" in error["next"]
    assert len(error["job"]) == 16
    return error


def test_every_lost_response_is_reported_with_its_times_and_ids_and_how_to_check_the_account(tmp_path, sandbox):
    station = Station(tmp_path, sandbox.base_url)
    for tag in LOST:
        station.prompt(tag, f"A cat [sandbox: {tag}]")
    station.work()
    station.close()
    assert station.finished() == dict.fromkeys(LOST, "errors")
    for tag in LOST:
        error = charge_is_unknown(station, tag)
        if tag in ANSWERED:
            assert error["ids"]["x-request-id"]
            assert error["times"]["answered"] >= error["times"]["sent"]
        assert ("cf-ray" in error.get("ids", {})) == (tag in {"502", "504", *(str(n) for n in range(520, 525))})
    doubts = [line for line in command(station, "check", "--balance").stdout.splitlines() if "may have been" in line]
    assert len(doubts) == len(LOST)
    for tag in ANSWERED:
        assert any(station.error(tag)["ids"]["x-request-id"] in line for line in doubts)


def silent(exchange: Any) -> None:
    exchange.request()
    exchange.linger()


def trickling(exchange: Any) -> None:
    exchange.request()
    exchange.trickle(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000, 0.05)


def garbage(exchange: Any) -> None:
    exchange.request()
    exchange.send(b"what do you want?\r\n\r\n")


@pytest.mark.parametrize("script", [silent, trickling, garbage])
def test_a_response_that_never_comes_is_reported_in_the_same_way(tmp_path, script):
    limits = {"endpoint__connect_timeout_seconds": "2", "endpoint__deadline_seconds": "3"}
    with Scripted(script) as server:
        station = Station(tmp_path, server.base_url, **limits)
        station.prompt("cat", "A cat")
        station.work()
        station.close()
    assert "answered" not in charge_is_unknown(station, "cat")["times"]


@pytest.mark.parametrize("how", ["killed", "stopped twice"])
def test_a_response_that_comes_after_a_kill_is_reported_in_the_same_way(folders, run, sandbox, how):
    sandbox.hold()
    folders.prompt("cat", "A cat")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    if how == "stopped twice":
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("shutdown")
        daemon.stop()
    else:
        daemon.stop(signal.SIGKILL)
    sandbox.release()
    assert command(folders, "once").returncode == 1
    charge_is_unknown(folders, "cat")
    assert sandbox.report()["requests"] == 1
