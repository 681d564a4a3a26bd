"""Sync tools redeliver claimed prompts, which are not charged again; new requests of people are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, Folders, until, until_finished
from support.endpoint import unique_png
from support.station import Station

from imagewatch.job.outcome import End

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

LONG_AGO = 1_600_000_000
YEAR_2400 = 13_569_465_600
"""In nanoseconds this time needs more than the 63 bits of SQLite's integers."""


class Sender:
    """A folder elsewhere that is copied into the inbox repeatedly, as a cron job does."""

    def __init__(self, place: Path, folders: Folders) -> None:
        self.place = place
        self._folders = folders
        place.mkdir()

    def write(self, name: str, content: str | bytes, mtime: float = LONG_AGO) -> None:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.utime(path, (mtime, mtime))

    def send(self) -> None:
        """Write files as ``rsync -a`` does: each by rename, with its old mtime."""
        for path in sorted(self.place.rglob("*")):
            if path.is_file():
                target = self._folders.inbox / path.relative_to(self.place)
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.Ab3dEf")
                shutil.copy2(path, temporary)
                temporary.rename(target)


@pytest.fixture
def sender(tmp_path: Path, station: Station) -> Sender:
    return Sender(tmp_path / "elsewhere", station)


def requests(sandbox: Sandbox) -> int:
    return sandbox.report()["requests"]


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
@pytest.mark.parametrize("watch", ["auto", "poll"])
def test_rsync_from_cron_redelivers_finished_prompts_and_none_is_charged_again(
    tmp_path: Path, sandbox: Sandbox, start: Any, watch: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__watch=watch, inbox__rescan_seconds="0.2")
    far = Sender(tmp_path / "far", folders)
    far.write("cat.prompt.txt", "a cat")
    far.write("sub/edit.prompt.txt", "blue")
    far.write("sub/edit.png", unique_png("edit"))
    far.write("wrong.prompt.txt", "+++\nn = 9\n+++\nnever sent")
    far.write("no.prompt.txt", "[sandbox: 400] no")
    far.write("lost.prompt.txt", "[sandbox: drop] lost")
    start(folders, "run")
    for _ in range(4):
        subprocess.run(["rsync", "-a", f"{far.place}/", f"{folders.inbox}/"], check=True)
        until(lambda: len(folders.finished()) == 5 and not [n for n in folders.names("inbox") if n[0] != "."])
    assert requests(sandbox) == 4
    assert folders.finished() == {
        "cat": "outbox",
        "edit": "outbox",
        "wrong": "errors",
        "no": "errors",
        "lost": "errors",
    }
    images = [folders.receipt(stem)["images"][0]["file"] for stem in ("cat", "sub/edit")]
    found = [name.rpartition("/")[2] for name in folders.names("outbox")]
    assert sorted(found) == sorted(["cat.receipt.toml", "edit.receipt.toml", *images])
    until(lambda: folders.leftovers() == [])


def test_a_redelivered_prompt_is_removed_and_counted(station: Station, sandbox: Sandbox, sender: Sender) -> None:
    sender.write("cat.prompt.txt", "a cat")
    for _ in range(3):
        sender.send()
        station.work()
    assert (requests(sandbox), station.names("inbox"), station.ledger.redelivered()) == (1, [], 2)
    assert station.names("archive") == ["cat.prompt.txt"]
    assert station.leftovers() == []


@pytest.mark.parametrize("tag", ["400", "402", "500", "drop", "502", "truncate", "not-json"])
def test_a_redelivered_prompt_that_failed_is_not_sent_again(
    station: Station, sandbox: Sandbox, sender: Sender, tag: str
) -> None:
    sender.write("cat.prompt.txt", f"[sandbox: {tag}] a cat")
    sender.send()
    station.work()
    before = station.names("errors")
    sender.send()
    assert [outcome.end for outcome in station.work()] == [End.REDELIVERED]
    assert requests(sandbox) == 1
    assert station.names("errors") == before


def test_a_redelivered_prompt_that_was_invalid_is_not_reported_again(
    station: Station, sandbox: Sandbox, sender: Sender
) -> None:
    sender.write("cat.prompt.txt", "+++\ninput_images = []\ncolour = 1\n+++\na cat")
    sender.write("dog.prompt.txt", "a dog")
    sender.write("dog.gif", b"GIF89a whatever")
    for _ in range(2):
        sender.send()
        station.work()
    assert station.finished() == {"cat": "errors", "dog": "errors"}
    assert station.ledger.redelivered() == 2
    assert requests(sandbox) == 0


def test_a_file_with_the_same_text_that_is_saved_again_is_a_new_request(
    station: Station, sandbox: Sandbox, sender: Sender
) -> None:
    for mtime in (LONG_AGO, LONG_AGO + 1, LONG_AGO + 2):
        sender.write("cat.prompt.txt", "a cat", mtime)
        sender.send()
        station.work()
    assert requests(sandbox) == 3
    assert len([name for name in station.names("outbox") if name.endswith(".receipt.toml")]) == 3


def test_another_text_of_the_same_size_and_time_is_a_new_request(
    station: Station, sandbox: Sandbox, sender: Sender
) -> None:
    for text in ("a cat", "a dog"):
        sender.write("it.prompt.txt", text)
        sender.send()
        station.work()
    assert requests(sandbox) == 2


def test_the_same_file_under_another_name_is_a_new_request(station: Station, sandbox: Sandbox, sender: Sender) -> None:
    for name in ("a.prompt.txt", "b.prompt.txt", "sub/a.prompt.txt"):
        sender.write(name, "a cat")
        sender.send()
        station.work()
    assert requests(sandbox) == 3


def test_a_changed_image_makes_a_new_request(station: Station, sandbox: Sandbox, sender: Sender) -> None:
    sender.write("cat.prompt.txt", "blue")
    for seed in ("one", "two"):
        sender.write("cat.png", unique_png(seed))
        sender.send()
        station.work()
    assert requests(sandbox) == 2


def test_a_prompt_that_is_redelivered_before_its_image_does_not_count_as_one_without_an_image(
    station: Station, sandbox: Sandbox, sender: Sender
) -> None:
    sender.write("cat.png", unique_png("one"))
    sender.write("cat.prompt.txt", "blue")
    sender.send()
    station.work()
    (sender.place / "cat.png").unlink()
    sender.send()
    assert [outcome.end for outcome in station.work()] == [End.REDELIVERED]
    assert requests(sandbox) == 1


@pytest.mark.parametrize("destination", ["errors", "archive"])
def test_a_prompt_that_a_person_moves_back_into_the_inbox_is_a_new_request(
    station: Station, sandbox: Sandbox, sender: Sender, destination: str
) -> None:
    sender.write("cat.prompt.txt", "[sandbox: 500] a cat" if destination == "errors" else "a cat")
    sender.send()
    station.work()
    (station.root / destination / "cat.prompt.txt").rename(station.inbox / "cat.prompt.txt")
    assert [outcome.end for outcome in station.work()] == [End.OVER]
    assert requests(sandbox) == 2
    sender.send()
    assert [outcome.end for outcome in station.work()] == [End.REDELIVERED]


def test_recognition_of_redeliveries_can_be_turned_off(tmp_path: Path, sandbox: Sandbox) -> None:
    station = Station(tmp_path, sandbox.base_url, inbox__redelivery="run")
    sender = Sender(tmp_path / "elsewhere", station)
    sender.write("cat.prompt.txt", "a cat")
    for _ in range(2):
        sender.send()
        station.work()
    station.close()
    assert requests(sandbox) == 2


@pytest.mark.parametrize(("redelivery", "ends"), [("skip", [End.OVER, End.REDELIVERED]), ("run", [End.OVER, End.OVER])])
def test_a_prompt_from_the_year_2400_is_completed_and_its_redelivery_is_recognized(
    tmp_path: Path, sandbox: Sandbox, redelivery: str, ends: list[End]
) -> None:
    station = Station(tmp_path, sandbox.base_url, inbox__redelivery=redelivery)
    sender = Sender(tmp_path / "elsewhere", station)
    sender.write("cat.prompt.txt", "a cat", YEAR_2400)
    outcomes = []
    for _ in ends:
        sender.send()
        outcomes += station.work()
    station.close()
    paid = ends.count(End.OVER)
    assert [outcome.end for outcome in outcomes] == ends
    assert (requests(sandbox), sandbox.report()["charged"]) == (paid, paid)
    assert len([name for name in station.names("outbox") if name.endswith(".receipt.toml")]) == paid
    assert (station.names("inbox"), station.names("errors"), station.leftovers()) == ([], [], [])


def test_a_prompt_from_the_year_2400_does_not_trigger_the_burst_guard(
    tmp_path: Path, sandbox: Sandbox, start: Any
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, limits__burst="1")
    far = Sender(tmp_path / "far", folders)
    far.write("cat.prompt.txt", "a cat", YEAR_2400)
    daemon = start(folders, "run")
    for _ in range(2):
        far.send()
        until(lambda: "cat" in folders.finished() and not [n for n in folders.names("inbox") if n[0] != "."])
        until(lambda: folders.leftovers() == [])
    folders.prompt("dog", "a dog")
    until(lambda: "dog" in folders.finished())
    assert daemon.stop() == 0
    assert folders.finished() == {"cat": "outbox", "dog": "outbox"}
    assert requests(sandbox) == 2


@pytest.mark.parametrize("rescan", ["30", "0.1"], ids=["with events", "at any moment"])
def test_redelivered_prompts_are_no_burst_however_many_they_are(
    tmp_path: Path, sandbox: Sandbox, run: Any, rescan: str
) -> None:
    """A handled redelivery also starts a scan. The next prompts may just have arrived at that time."""
    limits = {"limits__burst": "3", "limits__concurrency": "2"}
    seconds = {"inbox__settle_seconds": "1", "inbox__rescan_seconds": rescan}
    folders = Folders(tmp_path, sandbox.base_url, **limits, **seconds)
    far = Sender(tmp_path / "far", folders)
    daemon = run(folders)  # it watches: until the guard knows the whole inbox, it waits up to ten seconds for that
    for number in range(8):
        far.write(f"p{number}.prompt.txt", f"cat {number}")
        if number % 3 == 2 or number == 7:
            far.send()
            until_finished(folders, daemon, number + 1)
    far.send()
    until_finished(folders, daemon, 8, emptied=True)
    assert daemon.stop() == 0
    assert daemon.events("held") == []
    assert requests(sandbox) == 8


def test_a_prompt_that_is_redelivered_while_its_job_waits_for_a_busy_api_is_not_another_job(
    tmp_path: Path, sandbox: Sandbox, start: Any
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, retry__initial_seconds="1.5", retry__max_seconds="1.5")
    far = Sender(tmp_path / "far", folders)
    far.write("cat.prompt.txt", "a cat [sandbox: once 429-plain]")
    start(folders, "run")
    far.send()
    assert sandbox.wait_for_requests(1, timeout=20)
    far.send()
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: [name for name in folders.names("inbox") if name[0] != "."] == [])
    assert [call["credits"] > 0 for call in sandbox.report()["calls"]] == [False, True]
    assert len(folders.names("archive")) == 1


def test_a_prompt_that_is_redelivered_while_its_request_is_in_flight_is_not_another_job(
    tmp_path: Path, sandbox: Sandbox, start: Any
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    far = Sender(tmp_path / "far", folders)
    far.write("cat.prompt.txt", "a cat")
    sandbox.hold()
    daemon = start(folders, "run")
    far.send()
    assert sandbox.wait_for_requests(1, timeout=20)
    far.send()
    sandbox.release()
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: [name for name in folders.names("inbox") if name[0] != "."] == [])
    assert daemon.stop() == 0
    assert requests(sandbox) == 1


def test_a_prompt_that_is_redelivered_while_its_job_is_given_back_is_in_the_inbox_once(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    """The account refuses two jobs at the same time. One shows it, the other returns beside its redelivery."""
    station = Station(tmp_path, sandbox.base_url)
    station.worker._may_report = lambda _: False
    far = Sender(tmp_path / "far", station)
    far.write("cat.png", unique_png("one"))
    far.write("cat.prompt.txt", "blue")
    sandbox.balance = 0
    far.send()
    claim = station.scan.scan_all(0, LONG_AGO).ready[0].claim(station.spool.new_job(), 1.0)
    station.spool.record(claim.job).begin(claim)
    assert station.spool.originals.claim(claim)
    far.send()
    outcome = station.worker.process(claim.job)
    assert outcome.end is End.RETURNED
    assert station.names("inbox") == ["cat.png", "cat.prompt.txt"]
    assert station.leftovers() == []
    sandbox.balance = None
    assert [outcome.destination for outcome in station.work()] == ["outbox"]
    station.close()
    assert sandbox.report()["charged"] == 1


def test_a_newer_file_of_the_same_name_goes_first_and_the_older_one_is_not_lost(
    tmp_path: Path, sandbox: Sandbox, start: Any
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, retry__attempts="1")
    other = {**folders.environ, "LETTA_API_KEY": "sk-let-another-one-000"}
    key_file = tmp_path / "key"
    key_file.write_text(other["LETTA_API_KEY"])
    folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_FILE"] = str(key_file)
    sandbox.hold()
    folders.prompt("first", "shows the refusal")
    folders.prompt("cat", "the older one")
    start(folders, "run")
    assert sandbox.wait_for_requests(2, timeout=20)
    folders.prompt("cat", "the newer one")
    sandbox.release()
    until(lambda: len(folders.finished()) == 1)
    key_file.write_text(KEY)
    until(lambda: len([n for n in folders.names("outbox") if n.endswith(".receipt.toml")]) == 2)
    paid = {call["prompt"] for call in sandbox.report()["calls"] if call["credits"]}
    (refused,) = (path.read_text() for path in folders.errors.glob("*.prompt.txt"))
    assert {*paid, refused} == {"shows the refusal", "the older one", "the newer one"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_a_file_of_another_user_can_be_moved_back_too(open_path: Path, sandbox: Sandbox, start: Any) -> None:
    """The daemon may not set the time of another user's file, so it moves a copy of its own to the destination."""
    folders = Folders(open_path, sandbox.base_url)
    for place in (open_path, *open_path.rglob("*")):
        os.chown(place, 12345, 12345)
        place.chmod(0o777)
    far = Sender(open_path / "far", folders)
    far.write("cat.prompt.txt", "[sandbox: 500] a cat")
    as_user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(open_path), **folders.environ}

    def once() -> None:
        command = [*as_user, sys.executable, "-m", "imagewatch", "once"]
        done = subprocess.run(command, env=environ, capture_output=True, check=False)
        assert done.returncode == 1, done.stderr

    far.send()
    assert (folders.inbox / "cat.prompt.txt").stat().st_uid == 0
    once()
    back = folders.errors / "cat.prompt.txt"
    assert back.read_text() == "[sandbox: 500] a cat"
    back.rename(folders.inbox / "cat.prompt.txt")
    once()
    assert requests(sandbox) == 2


# Copies that a person makes from the archive or from errors


def copied(folders: Folders, destination: str, name: str = "cat.prompt.txt") -> None:
    """Copy a prompt into the inbox as file managers do: with its mtime."""
    hidden = folders.inbox / ".copy"
    shutil.copy2(folders.root / destination / name, hidden)
    hidden.rename(folders.inbox / "cat.prompt.txt")


@pytest.mark.parametrize(("destination", "text"), [("archive", "a cat"), ("errors", "[sandbox: 400] a cat")])
def test_a_copy_from_the_archive_or_errors_is_one_new_request_and_after_that_gets_an_error_file(
    station: Station, sandbox: Sandbox, destination: str, text: str
) -> None:
    station.prompt("cat", text)
    station.work()
    for _ in range(3):
        copied(station, destination)
        station.work()
    assert sandbox.report()["requests"] == 2
    assert station.names("inbox") == []
    refused = [
        tomllib.loads(path.read_text())
        for path in station.errors.glob("*.error.toml")
        if "requested before" in path.read_text()
    ]
    assert len(refused) == 2
    for page in refused:
        assert page["charged"] == "no"
        assert "save the prompt again" in page["message"]
    jobs = {row["job"] for row in station.ledger.rows() if row["sent_at"]}
    assert all(any(job in page["message"] for job in jobs) for page in refused)


def test_an_original_that_is_moved_out_of_the_archive_after_its_copy_gets_an_error_file_that_says_why(
    station: Station, sandbox: Sandbox
) -> None:
    station.prompt("cat", "a cat")
    station.work()
    copied(station, "archive")
    station.work()
    (station.archive / "cat.prompt.txt").rename(station.inbox / "cat.prompt.txt")
    (outcome,) = station.work()
    assert (outcome.destination, outcome.charged) == ("errors", "no")
    assert sandbox.report()["requests"] == 2


def test_a_finished_prompt_that_a_sync_tool_redelivers_leaves_no_file(station: Station, sandbox: Sandbox) -> None:
    path = station.prompt("cat", "a cat")
    status = path.stat()
    station.work()
    for _ in range(3):
        station.prompt("cat", "a cat")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        station.work()
    assert sandbox.report()["requests"] == 1
    assert (station.names("errors"), station.names("inbox")) == ([], [])


@pytest.mark.parametrize("text", ["a cat", "[sandbox: 400] a cat"])
def test_a_redelivery_by_hard_link_is_not_charged_and_does_not_change_the_senders_file(
    station: Station, sandbox: Sandbox, tmp_path: Path, text: str
) -> None:
    far = tmp_path / "far"
    far.mkdir()
    (far / "cat.prompt.txt").write_text(text)
    os.utime(far / "cat.prompt.txt", (LONG_AGO, LONG_AGO))
    before = (far / "cat.prompt.txt").stat()
    for _ in range(3):
        subprocess.run(["cp", "-al", f"{far}/.", station.inbox], check=True)
        station.work()
    after = (far / "cat.prompt.txt").stat()
    assert sandbox.report()["requests"] == 1
    assert (after.st_mtime_ns, after.st_mode, after.st_nlink) == (before.st_mtime_ns, before.st_mode, 1)
    assert station.names("inbox") == []
