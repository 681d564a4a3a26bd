"""The administrator's commands from outside: a real daemon, a real endpoint, and mistakes of people."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, TESTS, Folders, Running, command, stopped, until, until_finished
from support.ports import free_port
from support.scripted import Scripted, responding, response, small_image
from support.station import Station

from commands.test_cli import HOSTILE, RAW
from imagewatch.commands.ledger import open_journal
from imagewatch.commands.retry import Retry
from imagewatch.config.schema import Limits
from imagewatch.daemon.admission import Admission
from imagewatch.daemon.status import Status
from imagewatch.inbox.scan import ScanResult
from imagewatch.journal.control import Control
from imagewatch.journal.holds import Holds
from imagewatch.sandbox import Sandbox
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.locks import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DECLARES_NOTHING = "+++\ninput_images = []\n+++\n"
OTHER_USER = 12345
"""A user and a group that are in no passwd file."""

KILLED_BEFORE = """
import os, signal, sys
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.journal.journal import Journal

setattr(Journal, sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
Daemon(load(None, os.environ), os.environ, once=True).run()
"""
"""A daemon that is killed when it is about to write this to its journal."""

AS_USER = """
import os, sys
# Now: the interpreter itself may be where only root may read.
import encodings.idna, httpcore, sqlite3, imagewatch.daemon.loop
from imagewatch.commands.main import COMMANDS, load_command, main

for name in COMMANDS:
    load_command(name)

user = int(sys.argv.pop(1))
os.setgroups([])
os.setgid(user)
os.setuid(user)
main()
"""
"""A command of another user."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def status_of(folders: Folders) -> dict[str, Any]:
    """The daemon's status as a reader of the file sees it; empty before the file exists."""
    try:
        return json.loads((folders.state / "status.json").read_bytes())
    except FileNotFoundError:
        return {}


def held_for(folders: Folders) -> list[str]:
    return [hold["kind"] for hold in status_of(folders).get("holds", [])]


def waiting(folders: Folders, count: int) -> None:
    """Wait until the daemon has found this number of prompts and may not claim them."""
    until(lambda: status_of(folders).get("waiting", {}).get("ready") == count)


def prompts_in(folders: Folders) -> list[str]:
    return [name for name in folders.names("inbox") if not name.startswith(".imagewatch/")]


def requests(sandbox: Sandbox) -> int:
    return sandbox.report()["requests"]


def ledger_of(folders: Folders) -> list[dict[str, Any]]:
    result = command(folders, "history", "--json", "--limit", "0")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def once(folders: Folders, *expected: int) -> str:
    """Process the inbox."""
    ended = command(folders, "once")
    assert ended.returncode in (expected or {0}), ended.stderr
    return ended.stderr


@pytest.fixture
def killed_before(tmp_path: Path, start: Any) -> Callable[[Folders, str], None]:
    """Process an inbox and be killed meanwhile."""
    script = tmp_path / "killed_before.py"
    script.write_text(KILLED_BEFORE)

    def killer(folders: Folders, name: str) -> None:
        running = start(folders, name, script=str(script))
        assert running.wait() == -signal.SIGKILL, running.output

    return killer


# Hold and release


@pytest.mark.parametrize("watch", ["auto", "poll"])
def test_a_manual_hold_keeps_prompts_until_release_across_restarts(tmp_path, run, sandbox, watch):
    folders = Folders(tmp_path, sandbox.base_url, inbox__watch=watch, inbox__rescan_seconds="0.2")
    daemon = run(folders)
    said = command(folders, "hold", "stock-taking until noon")
    assert (said.returncode, said.stdout.splitlines()[0].split(".")[0]) == (0, "On hold")
    held = daemon.wait_for("held")
    assert (held["kind"], held["reason"], "imagewatch release" in held["next"]) == (
        "manual",
        "stock-taking until noon",
        True,
    )
    folders.prompt("cat", "A cat")
    waiting(folders, 1)
    assert daemon.stop() == 0
    daemon = run(folders)
    assert daemon.wait_for("held")["reason"] == "stock-taking until noon"
    folders.prompt("dog", "A dog")
    waiting(folders, 2)
    assert (prompts_in(folders), requests(sandbox)) == (["cat.prompt.txt", "dog.prompt.txt"], 0)
    said = command(folders, "release")
    assert (said.returncode, said.stdout) == (0, "Released.\n")
    until(lambda: folders.finished() == {"cat": "outbox", "dog": "outbox"})
    assert daemon.wait_for("released")["kind"] == "manual"


def test_release_says_if_nothing_was_on_hold(folders, run):
    run(folders)
    until(lambda: status_of(folders).get("state") == "running")
    said = command(folders, "release")
    assert (said.returncode, said.stdout) == (0, "Nothing was on hold.\n")


def test_hold_says_how_to_stop_a_daemon_whose_configuration_was_broken_meanwhile(folders, run):
    run(folders)
    said = command(folders, "hold", IMAGEWATCH_LIMITS__CONCURRENCY="none")
    assert said.returncode == 78
    assert "stop the daemon: systemctl stop imagewatch, or Ctrl-C in its terminal" in said.stderr


def test_hold_and_release_reach_a_daemon_that_is_not_running_when_it_starts(folders, run, sandbox):
    assert run(folders).stop() == 0
    said = command(folders, "hold")
    assert (said.returncode, "not running. When it starts, it sends nothing" in said.stdout) == (0, True)
    folders.prompt("cat", "A cat")
    daemon = run(folders)
    waiting(folders, 1)
    assert (held_for(folders), requests(sandbox)) == (["manual"], 0)
    assert daemon.stop() == 0
    said = command(folders, "release")
    assert (said.returncode, "When it starts, it sends prompts again" in said.stdout) == (0, True)
    daemon = run(folders)
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.events("held") == []


def test_during_a_hold_requests_in_flight_finish_and_a_second_reason_replaces_the_first(folders, run, sandbox):
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("sent", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    command(folders, "hold", "one")
    command(folders, "hold", "another")
    folders.prompt("later", "A dog")
    sandbox.release()
    until(lambda: folders.finished() == {"sent": "outbox"})
    waiting(folders, 1)
    daemon.wait_for("held", 2)
    until(lambda: [hold["reason"] for hold in status_of(folders)["holds"]] == ["another"])
    (hold,) = status_of(folders)["holds"]
    assert (hold["kind"], hold["next_try_at"]) == ("manual", None)
    assert [line["reason"] for line in daemon.events("held")] == ["one", "another"]
    assert requests(sandbox) == 1


@pytest.mark.parametrize("command_", ["run", "once"])
def test_charged_results_are_delivered_during_a_hold(folders, run, sandbox, killed_before, command_):
    folders.prompt("cat", "A cat")
    killed_before(folders, "decide")
    assert (requests(sandbox), folders.finished()) == (1, {})
    command(folders, "hold", "night")
    folders.prompt("dog", "A dog")
    if command_ == "run":
        run(folders)
        until(lambda: folders.finished() == {"cat": "outbox"})
    else:
        assert "night" in once(folders, 69)
    assert (folders.finished(), prompts_in(folders)) == ({"cat": "outbox"}, ["dog.prompt.txt"])
    assert requests(sandbox) == 1


def test_a_claimed_prompt_that_was_not_sent_goes_back_during_a_hold(folders, sandbox, killed_before):
    folders.drop("cat.png", small_image())  # with an image it is claimed before its attempt is recorded
    folders.prompt("cat", "A cat")
    killed_before(folders, "spend")
    assert prompts_in(folders) == []
    command(folders, "hold")
    once(folders, 69)
    assert (prompts_in(folders), requests(sandbox), folders.leftovers()) == (["cat.png", "cat.prompt.txt"], 0, [])


def test_during_a_hold_no_prompt_waits_outside_of_the_inbox(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__requests_per_minute="1")
    names = [folders.prompt(f"p{number}", f"Number {number}").name for number in range(3)]
    run(folders)
    until(lambda: len(folders.finished()) == 1 and "rate" in held_for(folders))
    command(folders, "hold")
    until(lambda: len(prompts_in(folders)) == 2 and folders.leftovers() == [])
    assert set(prompts_in(folders)) < set(names)


def test_hold_and_release_report_to_programs_whether_the_daemon_has_applied_them(folders, run):
    daemon = run(folders)
    for name in ("hold", "release"):
        result = command(folders, name, "--json")
        assert (result.returncode, json.loads(result.stdout)) == (
            0,
            {"action": name, "is_running": True, "is_applied": True},
        )
    assert daemon.stop() == 0
    result = json.loads(command(folders, "hold", "--json", "night").stdout)
    assert result == {"action": "hold", "is_running": False, "is_applied": False}


def test_status_counts_a_prompt_without_its_image_under_the_right_reason(folders, run):
    folders.prompt("named", '+++\ninput_images = ["later.png"]\n+++\nA cat')
    folders.prompt("beside", "A dog")
    folders.drop("beside.png", b"")
    run(folders)
    until(lambda: status_of(folders).get("waiting", {}).get("not_ready") == 2)
    result = command(folders, "status").stdout
    assert "waiting    2 (2 waiting for images that are missing or empty)" in result


def test_a_release_that_cannot_be_applied_yet_is_not_forgotten(folders, run, sandbox):
    once(folders)
    command(folders, "hold", "night")
    folders.prompt("cat", "A cat")
    assert command(folders, "release").returncode == 0
    with locked_journal(folders):
        daemon = run(folders)
        until(lambda: held_for(folders) == ["disk"])
        assert requests(sandbox) == 0
    until(lambda: folders.finished() == {"cat": "outbox"}, timeout=60)
    until(lambda: held_for(folders) == [])
    assert [line["kind"] for line in daemon.events("held")] == ["disk"]
    assert daemon.stop() == 0


@pytest.mark.parametrize("name", ["hold", "release"])
def test_a_command_that_the_journal_cannot_record_says_so_and_changes_nothing(folders, sandbox, name):
    once(folders)
    if name == "release":
        command(folders, "hold", "night")
    with locked_journal(folders):
        result = command(folders, name)
    assert (result.returncode, "the ledger is locked by another program" in result.stderr) == (74, True)
    folders.prompt("cat", "A cat")
    once(folders, 69 if name == "release" else 0)
    assert requests(sandbox) == (0 if name == "release" else 1)


@contextlib.contextmanager
def locked_journal(folders: Folders) -> Iterator[None]:
    """Another program writes into the journal meanwhile."""
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


# The burst guard


@pytest.fixture
def guarded(tmp_path: Path, sandbox: Sandbox) -> Folders:
    """Folders of a daemon whose burst guard allows three prompts at the same time."""
    return Folders(tmp_path, sandbox.base_url, limits__burst="3", inbox__settle_seconds="1")


def test_a_burst_waits_and_release_admits_exactly_that_one(guarded, run, sandbox):
    daemon = run(guarded)
    for number in range(4):  # as slowly as over a network: none of them has settled when the last one comes
        (guarded.inbox / f"a{number}.prompt.txt").write_text(f"Number {number}")
        threading.Event().wait(0.15)
    held = daemon.wait_for("held")
    assert held["kind"] == "burst"
    assert "4 prompts arrived at the same time; limits.burst allows 3" in held["reason"]
    assert "imagewatch release" in held["next"]
    waiting(guarded, 4)
    assert requests(sandbox) == 0
    command(guarded, "release")
    until(lambda: len(guarded.finished()) == 4)
    with stopped(daemon):  # they are there at the same time, however slowly they are written
        for number in range(5):
            (guarded.inbox / f"b{number}.prompt.txt").write_text(f"Number {number}")
    assert daemon.wait_for("held", 2)["kind"] == "burst"
    waiting(guarded, 5)
    assert requests(sandbox) == 4


def test_a_released_burst_needs_no_second_release_after_a_restart(guarded, run, sandbox):
    guarded.environ |= {"IMAGEWATCH_LIMITS__CONCURRENCY": "1", "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0"}
    for number in range(6):
        guarded.prompt(f"p{number}", f"Number {number}")
    assert run(guarded).stop() == 0
    command(guarded, "release")
    sandbox.hold()
    daemon = run(guarded)
    assert sandbox.wait_for_requests(1, 20)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("shutdown")
    sandbox.release()
    assert daemon.end() == 0
    assert len(prompts_in(guarded)) == 5
    daemon = run(guarded)
    until(lambda: len(guarded.finished()) == 6)
    assert daemon.events("held") == []


def test_a_burst_of_prompts_that_are_claimed_immediately_stops_at_the_limit(guarded, run, sandbox):
    guarded.environ["IMAGEWATCH_INBOX__SETTLE_SECONDS"] = "3600"  # the same time, however slowly they come
    daemon = run(guarded)
    for number in range(12):
        guarded.prompt(f"p{number:02}", f"{DECLARES_NOTHING}Number {number}")
    assert daemon.wait_for("held")["kind"] == "burst"
    until(lambda: status_of(guarded)["in_flight"] == [] and held_for(guarded) == ["burst"])
    assert requests(sandbox) <= 3
    command(guarded, "release")
    until(lambda: len(guarded.finished()) == 12)


def test_prompts_that_were_given_back_to_the_inbox_are_no_new_burst(tmp_path, hurried):
    port = free_port()
    folders = Folders(tmp_path, f"http://127.0.0.1:{port}", limits__burst="2", retry__attempts="1")
    for number in range(5):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders, 0.05)
    assert daemon.wait_for("held")["kind"] == "burst"
    command(folders, "release")
    until(lambda: len([line for line in daemon.events("held") if line["kind"] == "unreachable"]) >= 4)
    assert [line["kind"] for line in daemon.events("held")].count("burst") == 1
    with Sandbox(port=port, key=KEY) as late:
        until(lambda: len(folders.finished()) == 5)
        # A connection that was never established was no attempt, and nothing was sent twice.
        assert [folders.receipt(f"p{number}")["attempts"] for number in range(5)] == [1] * 5
        assert (late.report()["requests"], set(folders.finished().values())) == (5, {"outbox"})


def test_prompts_that_a_sync_tool_redelivers_are_no_burst(guarded, run, sandbox, tmp_path):
    guarded.environ["IMAGEWATCH_INBOX__SETTLE_SECONDS"] = "0"
    away = tmp_path / "away"
    away.mkdir()
    for number in range(5):
        (away / f"p{number}.prompt.txt").write_text(f"Number {number}")
        shutil.copy2(away / f"p{number}.prompt.txt", guarded.inbox)
    daemon = run(guarded)
    assert daemon.wait_for("held")["kind"] == "burst"
    command(guarded, "release")
    until(lambda: len(guarded.finished()) == 5)
    assert daemon.stop() == 0
    for path in away.iterdir():
        shutil.copy2(path, guarded.inbox)
    (guarded.inbox / "new.prompt.txt").write_text("A new one")
    daemon = run(guarded)
    until(lambda: len(guarded.finished()) == 6 and prompts_in(guarded) == [])
    assert daemon.events("held") == []
    assert requests(sandbox) == 6


def test_prompts_that_come_after_others_were_completed_are_no_burst_together_with_them(guarded, run, sandbox):
    """These had settled before they were claimed, so they came long before. A scan may start at any moment."""
    guarded.environ["IMAGEWATCH_INBOX__RESCAN_SECONDS"] = "0.1"
    daemon = run(guarded)
    for made in (3, 6):
        for number in range(made - 3, made):
            (guarded.inbox / f"p{number}.prompt.txt").write_text(f"Number {number}")
        until_finished(guarded, daemon, made)
    assert daemon.events("held") == []
    assert requests(sandbox) == 6


def test_prompts_that_waited_for_a_worker_are_no_burst_together_with_those_that_come_when_they_are_claimed(
    guarded, run, sandbox
):
    guarded.environ |= {"IMAGEWATCH_INBOX__RESCAN_SECONDS": "0.1", "IMAGEWATCH_LIMITS__CONCURRENCY": "1"}
    daemon = run(guarded)
    sandbox.hold()
    for number in range(3):
        last = guarded.prompt(f"a{number}", f"{DECLARES_NOTHING}Number {number}")
    came = last.stat().st_ctime
    assert sandbox.wait_for_requests(1, 20)
    until(lambda: time.time() > came + 2)
    sandbox.release()
    until_finished(guarded, daemon, 3)
    for number in range(3):
        (guarded.inbox / f"b{number}.prompt.txt").write_text(f"Number {number}")
    until_finished(guarded, daemon, 6)
    assert daemon.events("held") == []


def test_a_folder_that_is_moved_into_the_inbox_is_a_burst_though_its_prompts_are_older_than_the_last_release(
    guarded, run, sandbox
):
    """A rename of their folder does not change their ctime."""
    (guarded.root / "older/before").mkdir(parents=True)
    for number in range(4):
        (guarded.root / f"older/before/p{number}.prompt.txt").write_text(f"Number {number}")
    daemon = run(guarded)
    assert command(guarded, "release").returncode == 0
    (guarded.root / "older").rename(guarded.inbox / "older")
    until(lambda: held_for(guarded) == ["burst"])
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("held", 2)
    assert requests(sandbox) == 0
    assert command(guarded, "release").returncode == 0
    until(lambda: len(guarded.finished()) == 4)


def test_folders_that_are_moved_into_the_inbox_one_after_another_are_a_burst_whatever_their_age(guarded, run, sandbox):
    for number in range(5):
        (guarded.root / f"older{number}").mkdir()
        (guarded.root / f"older{number}/p{number}.prompt.txt").write_text(f"Number {number}")
        threading.Event().wait(1.1)
    daemon = run(guarded)
    for number in range(5):
        (guarded.root / f"older{number}").rename(guarded.inbox / f"older{number}")
        threading.Event().wait(0.15)
    assert daemon.wait_for("held")["kind"] == "burst"
    assert requests(sandbox) <= 3


def named(*came: float) -> dict[str, float]:
    """Prompts in the inbox that came at these times."""
    return {f"b{time}.prompt.txt": time for time in came}


class Guard:
    """A burst guard of three prompts within five seconds, by a clock that the test sets."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self.now, self.ahead = 0.0, 0.0
        self.control = Control(str(station.state), Disk(), station.journal.requests)
        self.restart()

    def restart(self) -> None:
        """Continue as another process."""
        spool, journal, self._holds = self._station.spool, self._station.journal, Holds()
        wall, clock = lambda: self.now + self.ahead, lambda: self.now
        self.gate = Admission(spool, journal, self.control, self._holds, lambda **_: None, wall, clock)
        self.gate.configure(Limits(burst=3), 5.0, lambda: None, str)

    def release(self, *came: float) -> None:
        """Release the queue, with prompts in the inbox that came at these times."""
        self.control.prepare()
        self.control.release()
        self.gate.follow(named(*came))

    def claim(self, *times: float, is_dated: bool = True) -> None:
        """Claim a prompt at each time, immediately. A server's clock shows another time."""
        for self.now in times:
            self.gate.burst.claimed(f"a{self.now}.prompt.txt", self.now if is_dated else 7.0, is_dated=is_dated)

    def holds(self, at: float, *came: float) -> bool:
        """Count, at one time, prompts in the inbox that came at other times; return whether they are on hold."""
        self.now = at
        self.gate.count(named(*came), lambda _: False)
        return self._holds.has("burst")


@pytest.fixture
def guard(station: Station) -> Guard:
    return Guard(station)


@pytest.mark.parametrize("counted", [104.9, 109.9, 119.0], ids=["immediately", "when it had settled", "late"])
def test_prompts_that_have_to_settle_are_one_burst_with_those_of_the_same_time_that_were_claimed_immediately(
    guard, counted
):
    guard.claim(100.0, 100.1, 100.2)
    assert guard.holds(counted, 104.9)


@pytest.mark.parametrize(("came", "counted"), [(105.3, 105.3), (105.3, 110.3), (1e6, 106.0)])
def test_prompts_that_came_later_are_no_burst_with_those_that_were_claimed_before(guard, came, counted):
    guard.claim(100.0, 100.1, 100.2)
    assert not guard.holds(counted, came)


def test_a_prompt_that_waits_long_is_no_burst_with_those_that_were_claimed_when_it_came(guard):
    guard.claim(100.0, 100.1)
    assert not guard.holds(105.3, 100.2)
    assert not guard.holds(108.0, 100.2, 107.9)
    assert guard.holds(108.1, 100.2, 107.9, 108.0, 108.1)


def test_a_prompt_with_the_time_of_a_server_counts_for_as_long_as_others_have_to_settle(guard):
    guard.claim(100.0, 100.1, 100.2, is_dated=False)
    assert not guard.holds(105.3, 7.0)
    guard.claim(106.0, 106.1, 106.2, is_dated=False)
    assert guard.holds(110.9, 2.0)


def test_prompts_of_one_burst_count_together_though_the_daemon_was_stopped_in_the_middle_of_it(guard):
    guard.claim(100.0, 100.1, 100.2)
    assert guard.holds(130.0, 100.5, 100.6, 100.7)


def test_what_was_claimed_long_ago_takes_no_memory_though_a_prompt_stays_in_the_inbox(guard):
    tracemalloc.start()
    sizes = []
    for rounds in range(3):
        guard.claim(*(1000.0 * rounds + 20 + 60.0 * number for number in range(1000)))
        assert not guard.holds(guard.now, 1.0)
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[2] - sizes[1] < 20_000


def test_a_release_while_the_clock_was_ahead_lets_nothing_pass_that_comes_after_it_was_set_back(guard):
    guard.now, guard.ahead = 100.0, 864_000.0
    guard.release()
    guard.ahead = 0.0
    assert not guard.holds(150.0, 99.0, 99.1, 99.2, 99.3)
    guard.gate.follow()
    assert guard.holds(200.3, 200.0, 200.1, 200.2, 200.3)


def test_a_release_while_the_clock_was_ahead_lets_nothing_pass_after_a_restart(guard):
    guard.now, guard.ahead = 100.0, 864_000.0
    guard.release()
    guard.now, guard.ahead = 150.0, 0.0
    for _ in range(2):
        guard.restart()
        guard.gate.follow()
        guard.now += 1
        assert guard.holds(guard.now + 100, 200.0, 200.1, 200.2, 200.3)
    guard.now = 900_000.0
    guard.restart()
    guard.gate.follow()
    assert guard.holds(900_001.0, 200.0, 200.1, 200.2, 200.3)
    guard.release()
    assert not guard.holds(900_002.0, 200.0, 200.1, 200.2, 200.3)


def test_a_release_of_a_prompt_that_is_dated_far_ahead_lets_pass_only_what_is_there(guard):
    assert guard.holds(100.0, 100.0, 100.1, 100.2, 4e9)
    guard.release(100.0, 100.1, 100.2, 4e9)
    assert not guard.holds(101.0, 100.0, 100.1, 100.2, 4e9)
    assert guard.holds(200.3, 200.0, 200.1, 200.2, 200.3, 4e9)


def test_a_release_lets_pass_what_came_during_the_hold_though_the_clock_of_the_server_is_far_ahead(guard):
    first, later = (220.0, 220.1, 220.2, 220.3), (225.0, 130.0)
    assert guard.holds(100.0, *first)
    guard.release(*first, *later)
    assert not guard.holds(101.0, *first, *later)
    assert guard.holds(300.0, 299.0, 299.1, 299.2, 299.3)


def test_a_clock_that_was_set_back_is_remembered_over_a_restart(guard):
    guard.now, guard.ahead = 100.0, 3600.0
    guard.release()
    guard.ahead = 0.0
    assert not guard.holds(150.0)
    assert guard.holds(200.0, 199.0, 199.1, 199.2, 199.3)
    guard.now = 4000.0
    guard.restart()
    guard.gate.follow()
    assert guard.holds(4001.0, 199.0, 199.1, 199.2, 199.3)


def test_new_prompts_with_the_names_of_released_ones_count(guard):
    dated = {f"p{number}.prompt.txt": 500.0 for number in range(4)}
    guard.now = 100.0
    guard.gate.follow(dated)
    guard.gate.count(dated, lambda _: False)
    guard.control.release()
    guard.gate.follow(dated)
    assert not guard.holds(101.0)
    guard.gate.count(dict.fromkeys(dated, 102.0), lambda _: False)
    assert guard.holds(102.0)


def test_what_a_release_let_pass_passes_after_a_restart_though_the_clock_of_a_server_is_ahead(guard):
    assert guard.holds(100.0, 130.0, 130.1, 130.2, 130.3)
    guard.release(130.0, 130.1, 130.2, 130.3)
    guard.restart()
    guard.gate.follow()
    assert not guard.holds(101.0, 130.0, 130.1, 130.2, 130.3)


def test_the_ledger_is_read_once_for_redelivered_prompts(guard):
    came = {f"p{number}.prompt.txt": 100.0 + number for number in range(20)}
    asked = []

    def is_finished(source):
        asked.append(source)
        return True

    for _ in range(3):
        guard.gate.count(came, is_finished)
    assert sorted(asked) == sorted(came)
    guard.gate.count(came | {"p0.prompt.txt": 200.0}, is_finished)
    assert asked[20:] == ["p0.prompt.txt"]
    guard.gate.burst.forget()
    guard.gate.count(came, lambda _: False)
    assert guard.holds(200.0)


def test_a_prompt_that_was_given_back_and_claimed_again_is_not_a_new_arrival(guard):
    for number in range(3):
        guard.gate.burst.returned(f"a10{number}.0.prompt.txt")
    guard.claim(100.0, 101.0, 102.0)
    assert not guard.holds(102.1, 102.1)
    guard.gate.burst.finished("a100.0.prompt.txt")
    guard.claim(100.0)
    assert not guard.holds(102.2, 102.1)
    assert guard.holds(102.3, 102.1, 102.2, 102.3)


def test_new_text_under_the_names_of_redelivered_prompts_is_a_burst(guarded, run, sandbox, tmp_path):
    daemon = run(guarded)
    away = tmp_path / "away"
    away.mkdir()
    for number in range(4):
        path = away / f"p{number}.prompt.txt"
        path.write_text(f"Number {number}")
        shutil.copy2(path, guarded.inbox)
        until_finished(guarded, daemon, number + 1)
    for path in away.iterdir():
        shutil.copy2(path, guarded.inbox)
    until(lambda: prompts_in(guarded) == [])
    until(lambda: guarded.leftovers() == [])
    assert daemon.events("held") == []
    with stopped(daemon):  # they are there at the same time, however slowly they are written
        for path in away.iterdir():
            (guarded.inbox / path.name).write_text("Something else")
    until(lambda: daemon.events("held") or requests(sandbox) > 4)
    assert "4 prompts arrived at the same time; limits.burst allows 3" in daemon.wait_for("held")["reason"]
    assert (requests(sandbox), len(prompts_in(guarded))) == (4, 4)


SLOW_TO_CLAIM = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.job.originals import Originals

claim = Originals.claim

def slowly(self, what, *more):
    open(f"{sys.argv[1]}/{what.stem}", "w").close()
    open(f"{sys.argv[1]}/go").close()  # a pipe: until the test opens it, too
    return claim(self, what, *more)

Originals.claim = slowly
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ).run())
"""
"""A daemon whose disk delays claims until the test continues it; it reports when a claim begins."""


def test_a_prompt_that_is_being_claimed_is_counted_once(guarded, run, tmp_path):
    guarded.environ |= {"IMAGEWATCH_LIMITS__BURST": "2", "IMAGEWATCH_INBOX__SETTLE_SECONDS": "20"}
    script, signals = tmp_path / "slow.py", tmp_path / "signals"
    script.write_text(SLOW_TO_CLAIM)
    signals.mkdir()
    os.mkfifo(signals / "go")
    (guarded.inbox / "cat.prompt.txt").write_text("A cat")
    daemon = run(guarded, str(signals), script=str(script))
    assert status_of(guarded)["waiting"]["not_ready"] == 1
    for stem in ("cat", "dog"):
        guarded.prompt(stem, f"{DECLARES_NOTHING}A {stem}")
        until(lambda stem=stem: (signals / stem).exists() or daemon.events("held"))
    with open(os.open(signals / "go", os.O_RDWR), "rb"):
        until_finished(guarded, daemon, 2)
    assert daemon.events("held") == []


def test_a_reload_with_a_higher_limit_releases_a_burst(guarded, run, tmp_path, sandbox):
    del guarded.environ["IMAGEWATCH_LIMITS__BURST"]
    config = tmp_path / "config.toml"
    config.write_text("[limits]\nburst = 3\n")
    for number in range(4):
        guarded.prompt(f"p{number}", f"Number {number}")
    daemon = run(guarded, "--config", str(config))
    assert daemon.wait_for("held")["kind"] == "burst"
    config.write_text("[limits]\nburst = 4\n")
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(guarded.finished()) == 4)
    assert len(daemon.events("held")) == 1


@pytest.mark.parametrize("kind", ["burst", "manual"])
def test_once_does_not_wait_for_a_person_and_says_what_to_do(guarded, sandbox, kind):
    guarded.environ["IMAGEWATCH_INBOX__SETTLE_SECONDS"] = "0"
    if kind == "manual":
        once(guarded)  # creates the state folder
        command(guarded, "hold", "no money this month")
    count = 4 if kind == "burst" else 1
    for number in range(count):
        guarded.prompt(f"p{number}", f"Number {number}")
    result = once(guarded, 69)
    assert f"The queue is on hold ({kind}: " in result
    assert ("limits.burst allows 3" if kind == "burst" else "no money this month") in result
    assert f"{count} prompt" in result
    assert "imagewatch release" in result
    assert (len(prompts_in(guarded)), requests(sandbox), held_for(guarded)) == (count, 0, [kind])


# Status


def test_status_says_what_a_daemon_does_before_while_and_after_it_runs(folders, run, sandbox):
    result = command(folders, "status")
    assert (result.returncode, "no daemon has run" in result.stderr) == (74, True)

    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat")
    folders.drop("dog.prompt.txt.txt", "A near miss")
    assert sandbox.wait_for_requests(1, 20)
    until(lambda: len(status_of(folders)["in_flight"]) == 1 and status_of(folders)["ignored"]["count"] == 1)
    result = command(folders, "status")
    assert result.returncode == 0
    for words in (" is running", "in flight  1", "cat.prompt.txt", "dog.prompt.txt.txt: not a prompt"):
        assert words in result.stdout
    page = json.loads(command(folders, "status", "--json").stdout)
    assert (page["state"], page["is_running"], page["pid"]) == ("running", True, daemon.process.pid)

    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    result = command(folders, "status")
    assert (result.returncode, "it was killed; the next start continues its jobs" in result.stdout) == (0, True)
    page = json.loads(command(folders, "status", "--json").stdout)
    assert (page["state"], page["is_running"], page["in_flight"]) == ("died", False, [])

    sandbox.release()
    daemon = run(folders)
    until(lambda: folders.finished() == {"cat": "errors"})
    assert daemon.stop() == 0
    result = command(folders, "status")
    assert (result.returncode, "it was stopped" in result.stdout) == (0, True)
    assert "0 completed, 0 refused, 1 unknown" in result.stdout


def test_while_the_daemon_is_down_status_does_not_say_that_no_prompt_waits(folders, run):
    daemon = run(folders)
    assert "  waiting    0\n" in command(folders, "status").stdout
    assert daemon.stop() == 0
    folders.prompt("cat", "A cat")
    words = "  waiting    not known while it does not run; imagewatch check lists the prompts\n"
    assert words in command(folders, "status").stdout


def test_status_exits_with_69_while_the_queue_is_on_hold_and_shows_pending_requests(folders, run, sandbox):
    daemon = run(folders)
    command(folders, "hold", "night")
    result = command(folders, "status")
    assert (result.returncode, "manual: night" in result.stdout, "imagewatch release" in result.stdout) == (
        69,
        True,
        True,
    )
    assert daemon.stop() == 0
    assert command(folders, "status").returncode == 69
    command(folders, "release")
    assert command(folders, "status").returncode == 0
    command(folders, "hold", "another night")
    result = command(folders, "status")
    assert (result.returncode, "another night" in result.stdout) == (69, True)


def test_a_reload_shows_in_the_status_and_one_that_fails_changes_nothing(folders, run, sandbox, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("[limits]\ncredits_per_day = 1000\n")
    daemon = run(folders, "--config", str(config))
    config.write_text("[limits]\ncredits_per_day = 5000\n")
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: status_of(folders)["today"]["cap"] == 5000)
    wrong = tmp_path / "no.pem"
    config.write_text(f'[endpoint]\nca_file = "{wrong}"\n[limits]\ncredits_per_day = 1\n')
    daemon.process.send_signal(signal.SIGHUP)
    assert "no.pem" in daemon.wait_for("reload_failed")["reason"]
    folders.prompt("cat", "A cat")
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: status_of(folders)["today"]["completed"] == 1)
    assert status_of(folders)["today"]["cap"] == 5000


def test_a_reader_of_the_status_file_gets_it_complete_and_without_the_key(folders, run, sandbox, tmp_path):
    daemon = run(folders)
    read, stop = [], threading.Event()

    def reader() -> None:
        while not stop.is_set():
            read.append((folders.state / "status.json").read_bytes())
            stop.wait(0.005)

    until((folders.state / "status.json").exists)
    reading = threading.Thread(target=reader)
    reading.start()
    try:
        sandbox.key = "another key"
        folders.prompt("cat", f"A cat that says {KEY}")
        folders.prompt("dog", "A dog")
        daemon.wait_for("held")
        command(folders, "release")
        command(folders, "hold", "night")
        until(lambda: "manual" in held_for(folders))
    finally:
        stop.set()
        reading.join()
    pages = set(read)
    assert len(pages) > 1
    for page in pages:
        assert json.loads(page)["schema"] == 2
        assert KEY.encode() not in page


def test_the_status_command_never_prevents_a_daemon_from_starting(folders, sandbox):
    once(folders)
    stop, asked = threading.Event(), []

    def ask() -> None:
        while not stop.wait(0.002):  # what each "status" checks, far more often than people run it
            asked.append(locked(str(folders.state / "lock")))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for number in range(3):
            folders.prompt(f"p{number}", f"Number {number}")
            once(folders)
            assert command(folders, "status").returncode == 0
    finally:
        stop.set()
        asking.join()
    assert (set(asked), len(folders.finished())) == ({True, False}, 3)


def test_a_status_that_cannot_be_written_is_not_tried_again_before_something_changes(tmp_path, sandbox):
    station = Station(tmp_path, sandbox.base_url)
    with contextlib.closing(station):
        gate = Admission(
            station.spool,
            station.journal,
            Control(str(station.state), Disk(), station.journal.requests),
            Holds(),
            lambda **_: None,
            time.time,
            time.monotonic,
        )
        result = Status(station.config(), Disk(), station.ledger, gate, time.time, time.monotonic)
        (station.state / "status.json.tmp").mkdir()
        result.change()
        assert result.due is not None
        tried = time.monotonic()
        with pytest.raises(SpoolError):
            result.write(ScanResult(), 0, {}, {})
        assert result.due is None
        result.change()
        assert result.due >= tried + 1


# History


MIXED = {
    "cat": "A cat",
    "sub/two": "+++\nn = 2\n+++\nTwo dogs",
    "sub/dear": '+++\nprovider = "openai"\nquality = "high"\n+++\nA house',
    "no": "[sandbox: 400] Nothing nice",
    "never": "+++\nn = 9\n+++\nNever sent",
    "lost": "[sandbox: drop] Lost",
    "=cmd()": "A formula",
    f"{HOSTILE}/{HOSTILE}": '+++\nprovider = "flux"\nmodel = "\\u001b[31mred"\n+++\nA trap',
}


def test_history_agrees_with_the_api_in_every_format_and_harms_no_terminal(folders, sandbox):
    for stem, text in MIXED.items():
        folders.prompt(stem, text)
    once(folders, 1)
    report = sandbox.report()
    jobs = ledger_of(folders)
    paid = [job for job in jobs if job["charged"] == "yes"]
    assert sorted(job["source"] for job in jobs if job["outcome"] in {"refused", "invalid"}) == [
        "never.prompt.txt",
        "no.prompt.txt",
    ]
    (lost,) = [job for job in jobs if job["charged"] == "unknown"]
    assert lost["source"] == "lost.prompt.txt"
    assert len(paid) + 1 == report["charged"]
    assert sum(job["credits"] for job in paid) + 30 == report["credits"]
    assert all(job["sent_at"].endswith("Z") for job in paid)

    rows = list(csv.DictReader(io.StringIO(command(folders, "history", "--csv").stdout)))
    assert [row["job"] for row in rows] == [job["job"] for job in jobs]
    assert "'=cmd().prompt.txt" in [row["source"] for row in rows]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())

    for by in ("day", "month", "provider", "folder"):
        sums = json.loads(command(folders, "history", "--by", by, "--json").stdout)
        assert [sum(group[name] for group in sums) for name in ("completed", "refused", "unknown")] == [len(paid), 2, 1]
        assert sum(group["credits"] for group in sums) + 30 == report["credits"]
        result = command(folders, "history", "--by", by)
        assert not RAW.search(result.stdout.replace("\n", "").encode("utf-8", "surrogateescape"))
    assert {group["folder"]: group["completed"] for group in sums}["sub"] == 2

    result = command(folders, "history")
    assert (
        result.stdout.splitlines()[-1]
        == f"Total: {len(paid)} completed, 2 refused or invalid, 1 unknown, {report['credits'] - 30} credits."
    )
    assert not RAW.search(result.stdout.replace("\n", "").encode("utf-8", "surrogateescape"))
    newest = json.loads(command(folders, "history", "--json", "--limit", "2", "--days", "1").stdout)
    assert newest == jobs[-2:]


def test_history_equals_the_count_of_the_api_although_the_daemon_was_killed_during_jobs(tmp_path, start, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="3")
    for number in range(15):
        folders.prompt(f"p{number:02}", f"[sandbox: slow 0.1] Number {number}")
    for killed_at in (2, 5, 9):
        daemon = start(folders, "run")
        assert sandbox.wait_for_requests(killed_at, 20)
        daemon.stop(signal.SIGKILL)
    once(folders, 0, 1)
    jobs, report = ledger_of(folders), sandbox.report()
    outcomes = [job["charged"] for job in jobs if job["charged"] != "no"]
    assert len(outcomes) == len(folders.finished()) == 15
    # A request in flight at the kill may have reached the API or not: its charge is unknown.
    sure, unknown = outcomes.count("yes"), outcomes.count("unknown")
    assert sure <= report["charged"] <= sure + unknown
    assert sum(job["credits"] for job in jobs if job["charged"] == "yes") == 30 * sure
    assert report["requests"] == report["charged"]
    assert unknown <= 9


# Estimate


def test_before_the_first_start_status_names_the_service_first_so_that_root_does_not_run_the_daemon(tmp_path, sandbox):
    result = command(Folders(tmp_path, sandbox.base_url), "status")
    assert result.returncode != 0
    assert "no daemon has run with this configuration yet" in result.stderr
    assert "start the daemon (systemctl start imagewatch, or imagewatch run)" in result.stderr


def test_before_the_first_start_of_one_of_several_inboxes_status_names_its_unit(tmp_path, sandbox):
    state = "/var/lib/imagewatch-no-such-inbox"
    result = command(Folders(tmp_path, sandbox.base_url), "status", IMAGEWATCH_FOLDERS__STATE=state)
    assert "start the daemon (systemctl start imagewatch@no-such-inbox, or imagewatch run)" in result.stderr


def test_estimate_before_the_first_start_says_what_is_missing(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url)
    folders.inbox.rmdir()
    result = command(folders, "estimate")
    assert (result.returncode, f"no such inbox: {folders.inbox}" in result.stderr) == (74, True)
    assert "the daemon creates the folders at its first start" in result.stderr


def test_estimate_needs_no_network_and_uses_only_charges_in_this_ledger(folders, sandbox):
    folders.prompt("cat", "A cat")
    folders.prompt("wrong", "+++\nn = 9\n+++\nNever sent")
    folders.prompt("half", '+++\ninput_images = ["logo.png"]\n+++\nIts image is not here yet')
    offline = {"LETTA_BASE_URL": "http://127.0.0.1:9", "LETTA_API_KEY": ""}
    result = command(folders, "estimate", **offline)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"cat\.prompt\.txt +flux +unknown: no similar request was charged in the last 30 days; a cap reserves 150",
        result.stdout,
    )
    assert re.search(r"wrong\.prompt\.txt +none: the request will be refused \(n: ", result.stdout)
    assert re.search(
        r"half\.prompt\.txt +none: the request will be refused \(logo\.png: the file is not there", result.stdout
    )
    assert "Total: 0 credits, and 1 of unknown cost." in result.stdout
    assert not folders.state.exists()

    for stem in ("wrong", "half"):
        (folders.inbox / f"{stem}.prompt.txt").unlink()
    once(folders)
    folders.prompt("two", "+++\nn = 2\n+++\nTwo dogs")
    folders.prompt("dear", '+++\nprovider = "openai"\nquality = "high"\n+++\nA house')
    result = {one["source"]: one for one in json.loads(command(folders, "estimate", "--json", **offline).stdout)}
    assert result["two.prompt.txt"]["request"] == "flux, 2 images"
    assert (result["two.prompt.txt"]["usual"], result["two.prompt.txt"]["seen"]) == (60, 1)
    assert result["dear.prompt.txt"]["usual"] is None
    assert "Total: 60 credits, and 1 of unknown cost." in command(folders, "estimate", **offline).stdout
    assert requests(sandbox) == 1


# Retry


def test_a_free_failure_goes_back_by_name_or_path_with_its_images_and_is_a_new_request(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__max_n="1")
    folders.drop("sub/dog.png", small_image())
    for stem in ("cat", "sub/dog", "bird", "sub/fish"):
        folders.prompt(stem, f"+++\nn = 2\n+++\nTwo of {stem}")
    once(folders, 1)
    assert set(folders.finished().values()) == {"errors"}
    result = command(folders, "retry", "cat", "../outbox/bird")
    assert (result.returncode, "no error file of this name" in result.stderr) == (64, True)
    result = command(folders, "retry", "cat", str(folders.errors / "sub/dog.error.toml"), "errors/bird.prompt.txt")
    assert (result.returncode, result.stderr) == (0, "")
    assert folders.names("inbox") == ["bird.prompt.txt", "cat.prompt.txt", "sub/dog.png", "sub/dog.prompt.txt"]
    assert folders.names("errors") == ["sub/fish.error.toml", "sub/fish.prompt.txt"]
    result = command(folders, "retry", "--all")
    assert (result.returncode, "sub/fish: back in the inbox" in result.stdout) == (0, True)
    assert folders.names("errors") == []
    folders.environ["IMAGEWATCH_LIMITS__MAX_N"] = "4"
    once(folders)
    assert folders.finished() == dict.fromkeys(("cat", "dog", "bird", "fish"), "outbox")
    assert sandbox.report()["charged"] == 4
    assert [len(call["inputs"]) for call in sandbox.report()["calls"]].count(1) == 1


def test_a_failure_with_an_unknown_charge_goes_back_only_with_pay_again(folders, sandbox):
    folders.prompt("lost", "[sandbox: once drop] Lost")
    folders.prompt("no", "[sandbox: 400] No")
    once(folders, 1)
    result = command(folders, "retry", "--all")
    assert "no: back in the inbox" in result.stdout
    assert "lost: may have been charged" in result.stderr
    assert prompts_in(folders) == ["no.prompt.txt"]
    assert command(folders, "retry", "lost").returncode == 1
    assert command(folders, "retry", "--all", "--pay-again").returncode == 64
    assert folders.finished() == {"lost": "errors"}
    result = command(folders, "retry", "--pay-again", "lost")
    assert (result.returncode, result.stdout) == (0, "lost: back in the inbox\n")
    assert prompts_in(folders) == ["lost.prompt.txt", "no.prompt.txt"]


def test_the_ledger_counts_and_not_an_error_file_that_claims_it_was_free(folders, sandbox):
    folders.prompt("lost", "[sandbox: drop] Lost")
    once(folders, 1)
    path = folders.errors / "lost.error.toml"
    honest = path.read_text()
    path.write_text(honest.replace('charged = "unknown"', 'charged = "no"'))
    assert "may have been charged" in command(folders, "retry", "lost").stderr
    path.write_text(
        re.sub('^job = ".*"', 'job = "0123456789abcdef"', honest, flags=re.MULTILINE).replace('"unknown"', '"no"')
    )
    assert "may have been charged" in command(folders, "retry", "lost").stderr
    assert folders.names("errors") == ["lost.error.toml", "lost.prompt.txt"]


@pytest.mark.parametrize("folder", ["@Recycle", "team/.old", "RECYCLER"])
def test_retry_puts_nothing_into_a_folder_that_is_never_entered(folders, sandbox, folder):
    folders.prompt("in/cat", "[sandbox: 400] No")
    once(folders, 1)
    (folders.errors / folder).parent.mkdir(exist_ok=True)
    (folders.errors / "in").rename(folders.errors / folder)
    before = folders.names("errors")
    result = command(folders, "retry", f"{folder}/cat", "--pay-again")
    assert result.returncode == 1
    assert "never entered" in result.stderr
    assert "move its files into another folder of the inbox, the prompt last" in result.stderr
    assert (folders.names("errors"), folders.names("inbox")) == (before, [])


def test_retry_overwrites_nothing_and_reports_a_missing_prompt(folders, sandbox):
    for stem in ("cat", "missing"):
        folders.prompt(stem, "[sandbox: 400] No")
    once(folders, 1)
    folders.prompt("cat", "Another cat")
    (folders.errors / "missing.prompt.txt").unlink()
    result = command(folders, "retry", "--all")
    assert result.returncode == 1
    assert "the inbox has a file of this name" in result.stderr
    assert "the prompt of this error file is missing" in result.stderr
    assert (folders.inbox / "cat.prompt.txt").read_text() == "Another cat"
    assert folders.names("errors") == ["cat.error.toml", "cat.prompt.txt", "missing.error.toml"]


def test_images_of_a_missing_prompt_are_not_given_to_another_of_its_name(folders, sandbox):
    folders.drop("cat.png", small_image())
    folders.prompt("cat", "[sandbox: 400] No")
    once(folders, 1)
    (folders.errors / "cat.prompt.txt").unlink()
    folders.prompt("cat", "Another cat, without an image")
    before = folders.names("errors")
    result = command(folders, "retry", "cat")
    assert result.returncode == 1
    assert "the inbox has another one of its name" in result.stderr
    assert "nothing was moved" in result.stderr
    assert (folders.names("errors"), folders.names("inbox")) == (before, ["cat.prompt.txt"])


def test_a_retry_that_was_killed_after_it_moved_the_prompt_is_finished_by_the_next_one(folders, sandbox):
    folders.drop("cat.png", small_image())
    folders.prompt("cat", "[sandbox: 400] No")
    once(folders, 1)
    for name in ("cat.png", "cat.prompt.txt"):
        (folders.errors / name).rename(folders.inbox / name)
    result = command(folders, "retry", "cat")
    assert (result.returncode, result.stdout) == (0, "cat: back in the inbox\n")
    assert (folders.names("errors"), folders.names("inbox")) == ([], ["cat.png", "cat.prompt.txt"])


class Slow(Disk):
    """A disk on which something happens while a copy is about to get its name in the inbox."""

    def __init__(self, meanwhile: Callable[[], object], before: str = "rename") -> None:
        super().__init__()
        self._meanwhile, self._before = [meanwhile], before

    def _happens(self) -> None:
        if self._meanwhile:
            self._meanwhile.pop()()

    def sync(self, file: IO[bytes], path: str) -> None:
        if self._before == "sync" and "/inbox/" in path:
            self._happens()
        super().sync(file, path)

    def rename(self, source: str, target: str) -> None:
        if self._before == "rename" and ".iw-" in source:
            self._happens()
        super().rename(source, target)


@pytest.fixture
def failed_elsewhere(tmp_path: Path, sandbox: Sandbox) -> Iterator[Folders]:
    """A prompt that failed without a charge; the errors folder is on another file system than the inbox."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as errors:
        folders = Folders(tmp_path, sandbox.base_url, folders__errors=errors)
        folders.prompt("cat", "[sandbox: 400] No")
        once(folders, 1)
        yield folders


def put_back(folders: Folders, disk: Disk) -> None:
    """Retry the failed prompt in this process."""
    config = folders.config()
    with open_journal(config) as journal:
        again = Retry(config.folders, disk, journal, Control(config.folders.state, disk, journal.requests))
        again.put_back(again.read(again.find("cat")))


def test_two_people_who_retry_a_prompt_at_the_same_moment_send_it_once(failed_elsewhere, sandbox):
    folders, others = failed_elsewhere, []

    def meanwhile() -> None:
        others.append(command(folders, "retry", "cat"))
        once(folders)

    put_back(folders, Slow(meanwhile))
    assert others[0].returncode == 1
    assert "another command has locked the error file" in others[0].stderr
    assert folders.names("inbox") == ["cat.prompt.txt"]
    assert os.listdir(folders.config().folders.errors) == []
    once(folders, 1)
    assert sandbox.report()["requests"] == 2


def test_without_locks_a_second_retry_neither_cuts_the_prompt_nor_puts_it_back_again(
    failed_elsewhere, sandbox, monkeypatch
):
    folders = failed_elsewhere

    def has_none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def meanwhile() -> None:
        put_back(folders, Disk())
        assert (folders.inbox / "cat.prompt.txt").read_text() == "[sandbox: 400] No"
        once(folders, 1)

    monkeypatch.setattr(fcntl, "flock", has_none)
    with pytest.raises(SpoolError, match="was moved meanwhile"):
        put_back(folders, Slow(meanwhile, before="sync"))
    assert folders.names("inbox") == []
    assert sandbox.report()["requests"] == 2


def test_an_error_file_that_became_another_one_is_not_taken_for_the_one_that_was_read(folders, sandbox):
    folders.prompt("cat", "[sandbox: 400] No")
    once(folders, 1)
    config = folders.config()
    with open_journal(config) as journal:
        disk = Disk()
        again = Retry(config.folders, disk, journal, Control(config.folders.state, disk, journal.requests))
        failed = again.read(again.find("cat"))
        for path in folders.errors.iterdir():
            path.unlink()
        folders.prompt("cat", "[sandbox: 502] Maybe")
        assert command(folders, "once").returncode == 1
        with pytest.raises(SpoolError, match="is another one now"):
            again.put_back(failed)
    assert folders.names("inbox") == []
    assert folders.error("cat")["charged"] == "unknown"


def test_names_that_are_not_utf8_go_back_unchanged_even_if_the_name_existed(folders, sandbox):
    stem = os.fsdecode(b"caf\xe9 \\udce9")
    dropped = sorted([f"{stem}.png", f"{stem}.prompt.txt"])
    for _ in range(2):
        folders.drop(f"sub/{stem}.png", small_image())
        folders.prompt(f"sub/{stem}", "[sandbox: 400] No")
        once(folders, 1)
    assert len(list(folders.errors.rglob("*.error.toml"))) == 2, "the second has its id in its names"
    for path in folders.errors.rglob("*.error.toml"):
        result = command(folders, "retry", str(path))
        assert (result.returncode, result.stderr) == (0, "")
        assert sorted(os.listdir(folders.inbox / "sub")) == dropped
        once(folders, 1)
    assert [len(call["inputs"]) for call in sandbox.report()["calls"]] == [1, 1, 1, 1]


def test_a_retry_that_was_killed_is_finished_even_if_names_are_not_utf8(folders, sandbox):
    name = os.fsdecode(b"caf\xe9.prompt.txt")
    folders.prompt(name.removesuffix(".prompt.txt"), "[sandbox: 400] No")
    once(folders, 1)
    (folders.errors / name).rename(folders.inbox / name)
    result = command(folders, "retry", "--all")
    assert (result.returncode, result.stderr) == (0, "")
    assert (os.listdir(folders.errors), prompts_in(folders)) == ([], [name])


_LINES = re.MULTILINE | re.DOTALL
HOSTILE_FILES: dict[str, Callable[[str], str | bytes]] = {
    "not TOML": lambda _: "charged = ",
    "not text": lambda _: b"\xff\xfe\x00",
    "empty": lambda _: "",
    "an original above": lambda good: good.replace('file = "good.prompt.txt"', 'file = "../../secret.txt"'),
    "an original elsewhere": lambda good: good.replace('file = "good.prompt.txt"', 'file = "/etc/hostname"'),
    "a target above": lambda good: good.replace('dropped_as = "good.prompt.txt"', 'dropped_as = "../../x.prompt.txt"'),
    "a target that is none": lambda good: good.replace('dropped_as = "good.prompt.txt"', 'dropped_as = ""'),
    "a job above": lambda good: re.sub('^job = ".*"', 'job = "../../../../x"', good, flags=re.MULTILINE),
    "a job that is a number": lambda good: re.sub('^job = ".*"', "job = 7", good, flags=re.MULTILINE),
    "originals that are none": lambda good: re.sub(r"originals = \[.*?^\]", "originals = 7", good, flags=_LINES),
    "no originals": lambda good: re.sub(r"originals = \[.*?^\]", "", good, flags=_LINES),
    "huge": lambda good: good + "# " + "x" * (5 << 20) + "\n[[",
    "nested without end": lambda good: ".".join("a" * 100_000) + " = 1\n" + good,
    "escapes": lambda _: f"charged = \x1b[31m{'x' * 100}",
}


def test_a_hostile_error_file_moves_nothing_and_does_not_stop_the_others(folders, sandbox, tmp_path):
    (folders.root / "secret.txt").write_text("private text")
    folders.prompt("good", "[sandbox: 400] No")
    once(folders, 1)
    good = (folders.errors / "good.error.toml").read_text()
    for number, make in enumerate(HOSTILE_FILES.values()):
        content = make(good)
        path = folders.errors / f"h{number:02}.error.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folders.errors / "link.error.toml").symlink_to(folders.errors / "good.error.toml")
    os.mkfifo(folders.errors / "pipe.error.toml")
    (folders.errors / "folder.error.toml").mkdir()
    (folders.errors / "elsewhere").symlink_to(folders.root)
    before = folders.names("errors")
    result = command(folders, "retry", "--all")
    assert result.returncode == 1
    refused = result.stderr.splitlines()
    assert len(refused) == len(HOSTILE_FILES) + 2, result.stderr
    assert all(len(line) < 1000 and line.isprintable() for line in refused)
    assert result.stdout == "good: back in the inbox\n"
    assert set(before) - set(folders.names("errors")) == {"good.error.toml", "good.prompt.txt"}
    assert folders.names("inbox") == ["good.prompt.txt"]
    assert (folders.root / "secret.txt").read_text() == "private text"
    assert not list(tmp_path.glob("*.prompt.txt"))


def test_retry_does_not_follow_a_link_in_its_path(folders, sandbox, tmp_path):
    folders.prompt("sub/cat", "[sandbox: 400] No")
    once(folders, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(folders.inbox / "sub")
    (folders.inbox / "sub").symlink_to(outside)
    result = command(folders, "retry", "sub/cat")
    assert (
        result.returncode,
        "a symbolic link is where a folder should be" in result.stderr,
        list(outside.iterdir()),
    ) == (
        1,
        True,
        [],
    )
    shutil.move(folders.errors / "sub", tmp_path / "moved")
    (folders.errors / "sub").symlink_to(tmp_path / "moved")
    (folders.inbox / "sub").unlink()
    result = command(folders, "retry", "sub/cat")
    assert (result.returncode, "a symbolic link is where a folder should be" in result.stderr) == (1, True)
    assert (tmp_path / "moved/cat.prompt.txt").exists()


# Charged, but no image


class Clock:
    """A clock for urls that can be set back, as if their host were reachable again."""

    def __init__(self) -> None:
        self.behind = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self.behind


@pytest.fixture
def lost_image(tmp_path: Path) -> Iterator[tuple[Folders, Sandbox, Clock]]:
    """A prompt with an image; the result was paid for but could not be downloaded."""
    clock = Clock()
    with Sandbox(key=KEY, clock=clock) as sandbox:
        folders = Folders(tmp_path, sandbox.base_url)
        folders.drop("sub/cat.png", small_image())
        folders.prompt("sub/cat", "[sandbox: url-expired] A cat")
        once(folders, 1)
        assert folders.error("sub/cat")["charged"] == "yes"
        assert folders.names("errors") == [
            "sub/cat.answer.json",
            "sub/cat.error.toml",
            "sub/cat.png",
            "sub/cat.prompt.txt",
        ]
        yield folders, sandbox, clock
        assert sandbox.report()["faults"] == []


def published(folders: Folders, sandbox: Sandbox) -> None:
    """The image is published, its originals are in the archive, and it was charged once, in one row of the ledger."""
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: folders.leftovers() == [] and "kept" not in folders.job_states().values())
    receipt = folders.receipt("sub/cat")
    (call,) = sandbox.report()["calls"]
    assert [image["sha256"] for image in receipt["images"]] == call["images"]
    assert (folders.outbox / "sub" / receipt["images"][0]["file"]).stat().st_size == receipt["images"][0]["bytes"]
    assert folders.names("errors") == []
    assert folders.names("archive") == ["sub/cat.png", "sub/cat.prompt.txt"]
    (job,) = ledger_of(folders)
    assert (job["charged"], job["credits"], job["got"]) == ("yes", sandbox.report()["credits"], 1)


def test_retry_downloads_a_charged_image_again_without_another_request(lost_image, run):
    folders, sandbox, clock = lost_image
    assert "imagewatch retry sub/cat reads the saved response again" in folders.error("sub/cat")["next"]
    result = command(folders, "history").stdout.splitlines()
    assert (result[1].split()[2], "HTTP 403" in result[2]) == ("unreadable", True), (
        "the reason for the missing image is below its row"
    )
    daemon = run(folders)
    result = command(folders, "retry", "sub/cat")
    assert (result.returncode, "was charged" in result.stdout) == (0, True)
    daemon.wait_for("failed")  # its host is not reachable yet: nothing changes
    until(lambda: len(folders.names("errors")) == 4 and folders.leftovers() == [])
    assert len(ledger_of(folders)) == 1
    clock.behind = 60
    assert command(folders, "retry", "--all").returncode == 0
    published(folders, sandbox)
    assert command(folders, "retry", "sub/cat").returncode == 64


def test_an_image_that_was_paid_for_long_ago_does_not_end_a_hold_for_credits(lost_image, run):
    folders, sandbox, clock = lost_image
    daemon = run(folders)
    sandbox.balance = 0
    folders.prompt("poor", "A dog")
    assert daemon.wait_for("held")["kind"] == "credits"
    folders.prompt("waits", "An owl")
    clock.behind = 60
    assert command(folders, "retry", "sub/cat").returncode == 0
    daemon.wait_for("completed")
    assert daemon.stop() == 0
    assert (daemon.events("released"), sandbox.report()["requests"]) == ([], 2)
    assert [name for name in folders.names("inbox") if ".imagewatch" not in name] == ["waits.prompt.txt"]


def test_a_charged_image_is_downloaded_at_the_next_start_even_during_a_hold(lost_image, run):
    folders, sandbox, clock = lost_image
    clock.behind = 60
    result = command(folders, "retry", "sub/cat")
    assert (result.returncode, "when it starts" in result.stdout) == (0, True)
    command(folders, "hold")
    run(folders)
    published(folders, sandbox)


@pytest.mark.timeout(180)
def test_a_kill_while_a_charged_image_is_downloaded_again_loses_nothing(lost_image, tmp_path, start):
    folders, sandbox, clock = lost_image
    clock.behind = 60
    assert command(folders, "retry", "sub/cat").returncode == 0

    def copied(name: str) -> Folders:
        copy = Folders(tmp_path / name, sandbox.base_url)
        shutil.copytree(folders.root, copy.root, symlinks=True, dirs_exist_ok=True)
        shutil.copytree(folders.state, copy.state, symlinks=True)
        return copy

    runner = str(TESTS / "support/kill_runner.py")
    counted = start(copied("count"), "0", script=runner)
    assert counted.wait() == 0, counted.output
    changes = int(counted.output.split()[0])
    for number in range(3, changes, changes // 4):
        copy = copied(str(number))
        assert start(copy, str(number), script=runner).wait() == -signal.SIGKILL
        once(copy)
        published(copy, sandbox)


def test_a_charged_response_whose_error_file_was_moved_uses_no_file_of_another_prompt(lost_image):
    folders, _, clock = lost_image
    clock.behind = 60
    (folders.errors / "old").mkdir()
    for name in ("cat.error.toml", "cat.prompt.txt", "cat.png", "cat.answer.json"):
        (folders.errors / "sub" / name).rename(folders.errors / "old" / name)
    folders.prompt("sub/cat", "[sandbox: 400] Another cat")
    once(folders, 1)
    result = command(folders, "retry", "old/cat")
    assert (result.returncode, "sub/cat.error.toml" in result.stderr) == (1, True)
    once(folders)
    assert (folders.errors / "sub/cat.prompt.txt").read_text() == "[sandbox: 400] Another cat"
    assert folders.error("sub/cat")["charged"] == "no"
    shutil.rmtree(folders.errors / "sub")
    (folders.errors / "old").rename(folders.errors / "sub")
    assert command(folders, "retry", "sub/cat").returncode == 0
    once(folders)
    assert folders.finished() == {"cat": "outbox"}


# Other users


@pytest.fixture
def strange(sandbox: Sandbox) -> Iterator[Folders]:
    """Folders of a daemon with another user; none of its files may become root's."""
    with tempfile.TemporaryDirectory() as top:
        folders = Folders(Path(top), sandbox.base_url)
        folders.state.mkdir(mode=0o700)
        os.chmod(top, 0o755)
        for path in (folders.state, folders.root, *folders.root.iterdir()):
            os.chown(path, OTHER_USER, OTHER_USER)
        yield folders


@pytest.fixture
def as_user(tmp_path: Path) -> Callable[..., Running]:
    """Run a command as another user."""
    script = tmp_path / "as_user.py"
    script.write_text(AS_USER)
    return lambda folders, user, *arguments: Running(folders, str(user), *arguments, script=str(script))


COMMANDS = (
    ("status",),
    ("history",),
    ("estimate",),
    ("check", "--balance"),
    ("hold", "night"),
    ("release",),
    ("retry", "--all"),
)


@as_root
@pytest.mark.timeout(180)
def test_commands_of_root_create_no_file_that_the_daemons_user_cannot_use(strange, sandbox, as_user):
    strange.prompt("no", "[sandbox: 400] No")
    daemon = as_user(strange, OTHER_USER, "run")
    try:
        until(lambda: strange.finished() == {"no": "errors"})
        for arguments in COMMANDS:
            result = command(strange, *arguments)
            assert result.returncode == 0, (arguments, result.stderr)
        until(lambda: strange.finished() == {"no": "errors"} and requests(sandbox) == 2)
    finally:
        assert daemon.stop() == 0
    for arguments in (("history",), ("hold",), ("retry", "--all"), ("release",)):
        result = command(strange, *arguments)
        assert result.returncode == 0, (arguments, result.stderr)
    state = [strange.state, *strange.state.rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in state} == {(OTHER_USER, OTHER_USER)}
    assert len(state) > 5
    assert (strange.inbox / "no.prompt.txt").exists()
    once_more = as_user(strange, OTHER_USER, "once")
    assert once_more.wait() == 1, once_more.output
    assert requests(sandbox) == 3


@as_root
@pytest.mark.parametrize("arguments", [one for one in COMMANDS if one[0] != "check"], ids=lambda one: one[0])
def test_a_user_without_rights_gets_a_message_of_one_line(strange, sandbox, as_user, arguments):
    (strange.state / "status.json").write_text("{}")
    refused = as_user(strange, OTHER_USER + 1, *arguments)
    assert refused.wait() == 74
    first, *more = refused.output.splitlines()
    assert first.startswith(f"imagewatch: permission denied: {strange.state}")
    assert "permission denied" in first
    assert len(more) <= 1
    assert [path.name for path in strange.state.iterdir()] == ["status.json"]


@as_root
def test_a_user_without_rights_can_still_check_the_balance(strange, sandbox, as_user):
    (strange.state / "ledger.sqlite3").write_bytes(b"")
    os.chmod(strange.state, 0o755)
    os.chmod(strange.state / "ledger.sqlite3", 0o600)
    checked = as_user(strange, OTHER_USER + 1, "check", "--balance")
    checked.wait()
    assert "total balance" in checked.output
    assert "ledger" in checked.output
    assert "Traceback" not in checked.output


# Balance


def test_check_shows_the_balance_and_unknown_charges_with_time_and_ids(folders, sandbox):
    sandbox.balance = 1234.5
    folders.prompt("sub/lost", "[sandbox: 502] Lost")
    folders.prompt("fine", "Fine")
    once(folders, 1)
    job = folders.error("sub/lost")["job"]
    result = command(folders, "check", "--balance")
    assert result.returncode == 0
    assert re.search(r"ok +total balance +1174\.5 credits", result.stdout)
    (line,) = [line for line in result.stdout.splitlines() if "may have been charged" in line]
    sent = folders.error("sub/lost")["times"]["sent"].astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert "sub/lost.prompt.txt" in line
    assert f"sent {sent}, job {job}, request id {folders.error('sub/lost')['ids']['x-request-id']}" in line
    assert KEY not in result.stdout + result.stderr
    assert "credits" not in command(folders, "check").stdout


GOOD_BALANCE = json.dumps({"total_balance": 5, "monthly_credit_balance": 2.5, "billing_tier": "pro"}).encode()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (b"404 Not Found", b"{}", "HTTP 404"),
        (b"500 Oops", b"", "HTTP 500"),
        (b"302 Found", b"", "HTTP 302"),
        (b"200 OK", b"<!DOCTYPE html>", "HTTP 200"),
        (b"200 OK", b'{"total_balance": "much"}', "HTTP 200"),
        (b"200 OK", b'{"total_balance": 1e999, "%s_balance": 3}' % KEY.encode(), "HTTP 200"),
        (b"200 OK", b"[" * 100_000, "HTTP 200"),
    ],
    ids=["404", "500", "302", "a page", "no number", "the key", "nested"],
)
def test_a_missing_balance_is_not_available_and_changes_nothing(tmp_path, status, body, words):
    with Scripted(responding(body, b"Location: http://127.0.0.1:9/", status=status)) as server:
        result = command(Folders(tmp_path, server.base_url), "check", "--balance")
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if re.match(r"\w+ +[a-z ]*balance ", line)]
    assert "not available" in line
    assert words in line
    assert KEY not in result.stdout + result.stderr


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"403 Forbidden"])
def test_a_key_that_the_api_refuses_is_bad(tmp_path, status):
    with Scripted(responding(b'{"message": "not this %s"}' % KEY.encode(), status=status)) as server:
        result = command(Folders(tmp_path, server.base_url), "check", "--balance")
    assert result.returncode == 78
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("bad ")]
    assert line.split(maxsplit=2) == ["bad", "key", f"the API refused it (HTTP {status[:3].decode()})"]
    assert KEY not in result.stdout + result.stderr


def test_a_balance_that_never_comes_is_not_waited_for_longer_than_its_timeout(tmp_path):
    def silent(exchange: Any) -> None:
        exchange.head()
        exchange.linger()

    with Scripted(silent) as server:
        folders = Folders(tmp_path, server.base_url, endpoint__timeout_seconds="0.3")
        result = command(folders, "check", "--balance")
    assert (result.returncode, "not available" in result.stdout) == (0, True)


def test_a_balance_that_comes_slowly_is_not_waited_for_longer_than_its_timeout(tmp_path):
    def dribbling(exchange: Any) -> None:
        exchange.head()
        exchange.trickle(response(GOOD_BALANCE), 0.02)

    with Scripted(dribbling) as server:
        folders = Folders(tmp_path, server.base_url, endpoint__timeout_seconds="0.5")
        result = command(folders, "check", "--balance")
    assert (result.returncode, "not finished after 0.5 seconds" in result.stdout) == (0, True)


def test_a_balance_is_requested_without_compression(tmp_path):
    heads = []

    def script(exchange: Any) -> None:
        heads.append(exchange.head().lower())
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD_BALANCE), GOOD_BALANCE))

    with Scripted(script) as server:
        result = command(Folders(tmp_path, server.base_url), "check", "--balance")
    assert b"accept-encoding: identity" in heads[0]
    assert re.search(r"total balance +5 credits", result.stdout)
    assert re.search(r"monthly credit balance +2\.5 credits", result.stdout)


def test_without_a_key_or_a_network_check_reports_it_and_continues(folders):
    result = command(folders, "check", "--balance", LETTA_BASE_URL="http://127.0.0.1:9")
    assert (result.returncode, "not available (" in result.stdout) == (0, True)
    result = command(folders, "check", "--balance", LETTA_API_KEY="")
    assert (result.returncode, "no API key is set" in result.stdout.split("balance")[-1]) == (78, True)
