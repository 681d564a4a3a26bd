"""Claimed prompts whose record is missing or damaged: their names stay taken until a person decides otherwise."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders, LoggedDaemon, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox


@pytest.fixture
def killed(tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]) -> Folders:
    """Folders of a daemon that was killed after it had sent a prompt."""
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("sub/cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    daemon.process.kill()
    daemon.process.wait()
    sandbox.release()
    return folders


def claims(folders: Folders) -> list[Path]:
    return list((folders.inbox / ".imagewatch").glob("*/*"))


def lose(folders: Folders, what: str) -> None:
    for path in (folders.state / "jobs").iterdir():
        if what == "record":
            shutil.rmtree(path)
        else:
            (path / "claim.json").write_bytes({"damaged": b"\xff{", "empty": b"", "zeros": bytes(300)}[what])


@pytest.mark.parametrize("what", ["record", "damaged", "empty", "zeros"])
def test_a_prompt_that_comes_again_while_the_record_of_the_first_is_lost_is_not_sent(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], what: str
) -> None:
    lose(killed, what)
    killed.prompt("sub/cat", "A cat")
    killed.prompt("dog", "A dog")
    daemon = run(killed)
    until(lambda: "dog" in killed.finished())
    (event,) = daemon.events("stuck")
    until(lambda: "stuck" in command(killed, "status").stdout)
    lines = [line.split(maxsplit=2) for line in command(killed, "check").stdout.splitlines()]
    assert [line for line in lines if line[0] == "take"] == []
    assert ["wait", "sub/cat.prompt.txt"] in [line[:2] for line in lines]
    assert any(line[:2] == ["warn", "job"] and "cat.prompt.txt is stuck" in line[2] for line in lines)
    until(lambda: "cat" in command(killed, "status").stdout)
    assert sandbox.report()["requests"] == 2
    assert (killed.inbox / "sub/cat.prompt.txt").read_text() == "A cat"
    assert [path.name for path in claims(killed)] == ["cat.prompt.txt"]
    if what == "record":
        assert "sub/cat.prompt.txt, sent " in event["reason"]
        assert "a possible second charge" in event["next"]


@pytest.mark.parametrize("what", ["record", "damaged"])
def test_moving_the_files_back_and_accepting_a_second_charge_completes_the_prompt(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], what: str
) -> None:
    lose(killed, what)
    daemon = run(killed)
    daemon.wait_for("stuck")
    (path,) = claims(killed)
    if what == "damaged":
        shutil.rmtree(killed.state / "jobs" / path.parent.name)
    os.utime(path)
    path.rename(killed.inbox / "sub/cat.prompt.txt")
    until(lambda: killed.finished() == {"cat": "outbox"}, timeout=40)
    assert sandbox.report()["requests"] == 2


@pytest.mark.parametrize("what", ["record", "damaged"])
@pytest.mark.parametrize("comes", ["moved back", "brought by a sync tool"])
def test_the_same_file_is_not_paid_again_after_the_rest_of_its_job_was_removed(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], what: str, comes: str
) -> None:
    lose(killed, what)
    daemon = run(killed)
    daemon.wait_for("stuck")
    (path,) = claims(killed)
    shutil.rmtree(killed.state / "jobs" / path.parent.name, ignore_errors=True)
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


def finished_with_a_copy(
    folders: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], text: str, destination: str
) -> Path:
    """Let a prompt come to its end; return a copy of its record from while it was at the endpoint."""
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", text)
    assert sandbox.wait_for_requests(1, 20)
    backup = folders.root.parent / "backup"
    shutil.copytree(folders.state / "jobs", backup)
    sandbox.release()
    until(lambda: folders.finished() == {"cat": destination})
    assert daemon.stop() == 0
    return backup


def test_an_older_copy_of_a_record_changes_nothing_in_the_ledger(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    backup = finished_with_a_copy(folders, sandbox, run, "A cat", "outbox")
    before = command(folders, "history", "--json").stdout
    shutil.copytree(backup, folders.state / "jobs", dirs_exist_ok=True)
    daemon = run(folders)
    assert "the job record is an older copy" in daemon.wait_for("stuck")["reason"]
    assert (folders.finished(), command(folders, "history", "--json").stdout) == ({"cat": "outbox"}, before)
    for path in (folders.state / "jobs").iterdir():
        shutil.rmtree(path)
    folders.prompt("cat", "Another cat")
    until(lambda: sandbox.report()["requests"] == 2)
    assert daemon.stop() == 0


@pytest.mark.parametrize("back", ["the record", "the record and the prompt"])
@pytest.mark.parametrize("age", ["claimed", "first sent", "first answered"])
def test_a_copy_of_a_record_from_before_the_last_attempt_sends_nothing_and_changes_no_report(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], age: str, back: str
) -> None:
    """As a backup that is copied file by file has it: the folder of the jobs before the ledger."""
    folders = Folders(tmp_path, sandbox.base_url, retry__initial_seconds="1", retry__max_seconds="1")
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat [sandbox: once 429]")
    assert sandbox.wait_for_requests(1, 20)
    jobs, kept, prompts = folders.state / "jobs", tmp_path / "kept", tmp_path / "prompts"
    if age != "first answered":
        shutil.copytree(jobs, kept)
    sandbox.release()
    until(lambda: list(jobs.glob("*/answer.1")))
    if age == "first answered":
        shutil.copytree(jobs, kept)
    shutil.copytree(folders.inbox / ".imagewatch", prompts)
    if age == "claimed":
        for path in (path for path in kept.glob("*/*") if path.name != "claim.json"):
            path.unlink()
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.stop() == 0
    before = command(folders, "history", "--json").stdout
    shutil.copytree(kept, jobs, dirs_exist_ok=True)
    if back != "the record":
        shutil.copytree(prompts, folders.inbox / ".imagewatch", dirs_exist_ok=True)
    daemon = run(folders)
    if back != "the record" or age == "first sent":
        assert "the job record is an older copy" in daemon.wait_for("stuck")["reason"]
    else:
        until(lambda: folders.leftovers() == [])
    assert (folders.finished(), command(folders, "history", "--json").stdout) == ({"cat": "outbox"}, before)
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 2


def test_an_older_copy_does_not_report_a_saved_response_as_lost(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    backup = finished_with_a_copy(folders, sandbox, run, "A cat [sandbox: no-images]", "errors")
    shutil.copytree(backup, folders.state / "jobs", dirs_exist_ok=True)
    daemon = run(folders)
    assert "the job record is an older copy" in daemon.wait_for("stuck")["reason"]
    assert folders.finished() == {"cat": "errors"}
    assert "do not send it again" in folders.error("cat")["next"]
    assert daemon.stop() == 0


def test_a_request_whose_record_is_damaged_counts_below_the_caps(
    killed: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    (sent,) = (killed.state / "jobs").glob("*/sent.1")
    sent.write_bytes(b"{")
    killed.environ |= {"IMAGEWATCH_LIMITS__CREDITS_PER_DAY": "40", "IMAGEWATCH_LIMITS__ASSUMED_CREDITS": "30"}
    daemon = run(killed)
    assert daemon.wait_for("recovered")["source"] == "sub/cat.prompt.txt"
    assert daemon.wait_for("stuck")["source"] == "sub/cat.prompt.txt"
    killed.prompt("dog", "A dog")
    until(lambda: "credits_per_day is 40: 30 are spent" in command(killed, "status").stdout)
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("decision", ["one is settled", "release"])
def test_nothing_is_sent_while_three_jobs_wait_for_a_person(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], decision: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.5")
    daemon = run(folders)
    sandbox.hold()
    for number in range(3):
        folders.prompt(f"p{number}", f"Number {number}")
    assert sandbox.wait_for_requests(3, 20)
    daemon.process.kill()
    daemon.process.wait()
    sandbox.release()
    lose(folders, "damaged")
    daemon = run(folders)
    until(lambda: len(daemon.events("stuck")) == 3)
    folders.prompt("dog", "A dog")
    daemon.wait_for("held")
    until(lambda: "3 jobs are stuck" in command(folders, "status").stdout)
    assert (sandbox.report()["requests"], folders.finished()) == (3, {})
    if decision == "release":
        assert command(folders, "release").returncode == 0
    else:
        path = claims(folders)[0]
        shutil.rmtree(folders.state / "jobs" / path.parent.name)
        path.unlink()
    until(lambda: folders.finished() == {"dog": "outbox"}, timeout=40)
    assert sandbox.report()["requests"] == 4
