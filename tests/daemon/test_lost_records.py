"""Claimed prompts of which the ledger has no record, or a damaged one: their names stay taken until a person decides.

A ledger lacks a record if an older copy of it was put back, or an empty one was accepted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders, LoggedDaemon, below, command, until
from support.endpoint import unique_png
from support.station import Station

from imagewatch.job.outcome import End
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

BROKEN = {"damaged": b"\xff{", "empty": b"", "zeros": bytes(300)}


@pytest.fixture
def killed(tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]) -> Folders:
    """Folders of a daemon that was killed after it had sent a prompt, and a copy of its ledger from before."""
    folders = Folders(tmp_path, sandbox.base_url, limits__assumed_credits="30")
    daemon = run(folders)
    until((folders.state / "identity").exists)
    back_up(folders)
    sandbox.hold()
    folders.prompt("sub/cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    kill(daemon, sandbox)
    return folders


def kill(daemon: LoggedDaemon, sandbox: Sandbox) -> None:
    daemon.process.kill()
    daemon.process.wait()
    sandbox.release()


def back_up(folders: Folders) -> None:
    """Copy the ledger of a running daemon."""
    with (
        contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as source,
        contextlib.closing(sqlite3.connect(folders.root.parent / "backup.sqlite3")) as copy,
    ):
        source.backup(copy)


def remove_ledger(folders: Folders) -> None:
    for path in folders.state.glob("ledger.sqlite3*"):
        path.unlink()


def restore(folders: Folders) -> None:
    """Put the copy in the place of the ledger, while no daemon runs."""
    remove_ledger(folders)
    shutil.copyfile(folders.root.parent / "backup.sqlite3", folders.state / "ledger.sqlite3")


def claims(folders: Folders) -> list[Path]:
    top = folders.inbox / ".imagewatch"
    return [path for path in below(top) if path.parent.parent == top]


def damage(folders: Folders, column: str, value: bytes, table: str = "jobs") -> None:
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        database.execute(f"UPDATE {table} SET {column} = CAST(? AS TEXT)", (value,))
        database.commit()


def lose(folders: Folders, what: str) -> None:
    match what:
        case "an older copy":
            restore(folders)
            assert command(folders, "release", "--accept-new-ledger").returncode == 0
        case "an empty ledger":
            remove_ledger(folders)
            assert command(folders, "release", "--accept-new-ledger").returncode == 0
        case _:
            damage(folders, "claim", BROKEN[what])


@pytest.mark.parametrize("what", ["an older copy", "an empty ledger", *BROKEN])
def test_a_prompt_that_comes_again_while_the_record_of_the_first_is_lost_is_not_sent(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], what: str
) -> None:
    lose(killed, what)
    killed.prompt("sub/cat", "A cat")
    killed.prompt("dog", "A dog")
    daemon = run(killed)
    until(lambda: "dog" in killed.finished())
    daemon.wait_for("stuck")
    (event,) = daemon.events("stuck")
    until(lambda: "stuck" in command(killed, "status").stdout)
    lines = [line.split(maxsplit=2) for line in command(killed, "check").stdout.splitlines()]
    assert [line for line in lines if line[0] == "take"] == []
    assert ["wait", "sub/cat.prompt.txt"] in [line[:2] for line in lines]
    assert any(line[:2] == ["warn", "job"] and "cat.prompt.txt is stuck" in line[2] for line in lines)
    until(lambda: "cat" in command(killed, "status").stdout)
    assert sandbox.report()["requests"] == 2
    assert (killed.inbox / "sub/cat.prompt.txt").read_text() == "A cat"
    until(lambda: [path.name for path in claims(killed)] == ["cat.prompt.txt"])  # that of the dog goes to the archive
    assert "may have been charged" in event["reason"]
    assert "a possible second charge" in event["next"]
    assert claims(killed)[0].parent.name in event["next"]


@pytest.mark.parametrize("what", ["an older copy", "damaged"])
def test_moving_the_files_back_and_accepting_a_second_charge_completes_the_prompt(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], what: str
) -> None:
    lose(killed, what)
    daemon = run(killed)
    daemon.wait_for("stuck")
    (path,) = claims(killed)
    os.utime(path)
    path.rename(killed.inbox / "sub/cat.prompt.txt")
    until(lambda: killed.finished() == {"cat": "outbox"}, timeout=40)
    assert daemon.stop() == 0
    assert command(killed, "once").returncode == 0
    assert (sandbox.report()["requests"], killed.leftovers()) == (2, [])


@pytest.mark.parametrize("comes", ["moved back", "brought by a sync tool"])
def test_the_same_file_is_not_paid_again_after_its_claim_was_removed(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], comes: str
) -> None:
    lose(killed, "damaged")
    daemon = run(killed)
    daemon.wait_for("stuck")
    (path,) = claims(killed)
    if comes == "moved back":
        path.rename(killed.inbox / "sub/cat.prompt.txt")
    else:
        shutil.copy2(path, killed.root / "copy")
        shutil.copy2(path, killed.inbox / "sub/cat.prompt.txt")
        shutil.rmtree(path.parent)
    until(lambda: killed.finished() == {"cat": "errors"}, timeout=40)
    assert "requested before" in killed.error("sub/cat")["message"]
    assert "for another image, save the prompt again" in killed.error("sub/cat")["next"]
    if comes == "brought by a sync tool":
        (killed.root / "copy").rename(killed.inbox / "sub/cat.prompt.txt")
        daemon.wait_for("redelivered")  # once, however often it comes
        assert len(list(killed.errors.glob("sub/*.error.toml"))) == 1
    assert sandbox.report()["requests"] == 1


def test_a_damaged_record_of_what_was_sent_delays_nothing_and_nothing_is_sent_again(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    damage(killed, "request", b"\xff{", "attempts")
    daemon = run(killed)
    until(lambda: killed.finished() == {"cat": "errors"})
    assert killed.error("sub/cat")["charged"] == "unknown"
    assert daemon.stop() == 0
    assert (sandbox.report()["requests"], killed.leftovers()) == (1, [])


PAUSING = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.job.completion import Completion

busy = Completion.busy

def paused(self, job):
    busy(self, job)
    if os.path.exists(sys.argv[1]):
        open(sys.argv[1]).close()  # a pipe: waits until its other end is opened
        os.unlink(sys.argv[1])

Completion.busy = paused
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ).run())
"""
"""A daemon that, when it has recorded the first refusal, waits for the test before it goes on."""


@pytest.mark.parametrize("back", ["the ledger", "the ledger and the prompt"])
@pytest.mark.parametrize("age", ["before", "claimed", "first sent", "first answered"])
def test_an_older_copy_of_the_ledger_that_is_put_back_while_no_daemon_runs_is_named_and_nothing_is_sent(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], age: str, back: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    go_on, script, prompts = tmp_path / "go_on", tmp_path / "pausing.py", tmp_path / "prompts"
    os.mkfifo(go_on)
    script.write_text(PAUSING)
    daemon = run(folders, str(go_on), script=str(script))
    until((folders.state / "identity").exists)
    if age == "before":
        back_up(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat [sandbox: once 429]")
    assert sandbox.wait_for_requests(1, 20)
    if age in {"claimed", "first sent"}:
        back_up(folders)
    sandbox.release()
    if age == "first answered":
        until(lambda: "busy" in outcomes(folders))
        back_up(folders)
    shutil.copytree(folders.inbox / ".imagewatch", prompts)
    go_on.open("w").close()
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.stop() == 0
    if age == "claimed":
        with contextlib.closing(sqlite3.connect(tmp_path / "backup.sqlite3")) as copy:
            copy.execute("DELETE FROM attempts")
            copy.commit()
    newer = shutil.copyfile(folders.state / "ledger.sqlite3", tmp_path / "newer")
    restore(folders)
    if back != "the ledger":
        shutil.copytree(prompts, folders.inbox / ".imagewatch", dirs_exist_ok=True)
    folders.prompt("dog", "A dog")
    daemon = run(folders)
    assert "an older copy of the ledger" in daemon.wait_for("held")["reason"]
    checked = command(folders, "check")
    assert (checked.returncode, "an older copy of the ledger" in checked.stdout) == (78, True), checked.stdout
    assert (folders.finished(), sandbox.report()["requests"]) == ({"cat": "outbox"}, 2)
    newer.rename(folders.state / "ledger.sqlite3")
    until(lambda: folders.finished() == {"cat": "outbox", "dog": "outbox"}, timeout=40)
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 3
    assert sorted(outcomes(folders)) == ["busy", "completed", "completed"]


def outcomes(folders: Folders) -> list[str]:
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        return [row[0] for row in database.execute("SELECT outcome FROM attempts")]


def test_a_request_of_a_job_whose_record_is_damaged_counts_below_the_caps(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    damage(killed, "claim", b"{")
    killed.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "40"
    daemon = run(killed)
    assert daemon.wait_for("stuck")["job"] == claims(killed)[0].parent.name
    killed.prompt("dog", "A dog")
    until(lambda: "credits_per_day is 40: 30 are spent" in command(killed, "status").stdout)
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("what", ["damaged", "an older copy"])
@pytest.mark.parametrize("decision", ["one is settled", "release"])
def test_nothing_is_sent_while_three_jobs_wait_for_a_person(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], decision: str, what: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.5")
    daemon = run(folders)
    until((folders.state / "identity").exists)
    back_up(folders)
    sandbox.hold()
    for number in range(3):
        folders.prompt(f"p{number}", f"Number {number}")
    assert sandbox.wait_for_requests(3, 20)
    kill(daemon, sandbox)
    lose(folders, what)
    daemon = run(folders)
    until(lambda: len(daemon.events("stuck")) == 3)
    folders.prompt("dog", "A dog")
    daemon.wait_for("held")
    until(lambda: "3 jobs are stuck" in command(folders, "status").stdout)
    assert (sandbox.report()["requests"], folders.finished()) == (3, {})
    if decision == "release":
        assert command(folders, "release").returncode == 0
    else:
        claims(folders)[0].unlink()
    until(lambda: folders.finished() == {"dog": "outbox"}, timeout=40)
    assert sandbox.report()["requests"] == 4


def test_an_older_copy_that_was_made_since_the_start_is_not_used_after_a_kill(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = run(folders)
    folders.prompt("dog", "A dog")
    until(
        lambda: folders.finished() == {"dog": "outbox"} and folders.leftovers() == []
    )  # what is recorded last is the attempt
    sandbox.hold()
    folders.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(2, 20)
    back_up(folders)
    with contextlib.closing(sqlite3.connect(folders.root.parent / "backup.sqlite3")) as copy:
        # As it was right before the attempt was recorded.
        copy.execute("DELETE FROM attempts WHERE outcome = 'sent'")
        copy.execute("UPDATE meta SET value = value - 1 WHERE name = 'recorded'")
        copy.commit()
    kill(daemon, sandbox)
    restore(folders)
    again = run(folders)
    assert "older copy of the ledger" in again.wait_for("held")["reason"]
    assert again.stop() == 0
    assert sandbox.report()["requests"] == 2


class LosingLedger(Disk):
    """A disk on which the ledger is lost as soon as a prompt is claimed."""

    def __init__(self, state: Path) -> None:
        self._ledger = state / "ledger.sqlite3"

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        if "/.imagewatch/" in target and target.endswith(".prompt.txt"):
            self._ledger.unlink()


def test_what_this_process_has_claimed_and_not_sent_is_sent_once_with_the_ledger_that_is_accepted(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    disk = LosingLedger(tmp_path / "state")
    with contextlib.closing(Station(tmp_path, sandbox.base_url, disk=disk)) as station:
        station.drop("cat.png", unique_png("it is claimed before its attempt is recorded"))
        station.prompt("cat", "A cat")
        (candidate,) = station.scan.scan_all(0, 0).ready
        claim = candidate.claim(station.spool.new_job(), 1.0)
        with pytest.raises(SpoolError, match="the ledger is missing"):
            station.worker.start(claim)
        assert sandbox.report()["requests"] == 0
        station.journal.accept()
        outcome = station.worker.process(claim.job)
        assert (outcome.destination, station.leftovers()) == ("outbox", [])
        assert station.worker.process(claim.job).end is End.NOTHING
    assert sandbox.report()["requests"] == 1
