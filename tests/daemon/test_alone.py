"""What goes wrong with the files of one prompt concerns it alone: nothing wrong is sent, and the others continue."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from support.daemon import HURRIED, PATIENCE, Folders, LoggedDaemon, command, until
from support.scripted import Exchange, Scripted, response
from support.station import Station
from support.tracing import reason_not_to_trace

from imagewatch.job.outcome import End
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.protocol.values import Claim, Move
    from imagewatch.sandbox import Sandbox

_png = io.BytesIO()
Image.new("RGB", (16, 16), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
NAMES_LOGO = '+++\ninput_images = ["logo.png"]\n+++\nPut this logo on a mug'


def inputs(sandbox: Sandbox) -> list[int]:
    """How many images each request had."""
    return [len(call["inputs"]) for call in sandbox.report()["calls"]]


# What cannot be read for a moment


@pytest.mark.parametrize("fault", ["openat:error=EIO:when=1", "openat:error=EMFILE:when=1", "read:error=EIO:when=1"])
def test_a_prompt_that_cannot_be_read_for_a_moment_is_not_sent_without_the_images_it_names(
    tmp_path: Path, sandbox: Sandbox, fault: str
) -> None:
    if reason := reason_not_to_trace():
        pytest.skip(reason)
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    folders.drop("logo.png", IMAGE)
    path, log = folders.prompt("mug", NAMES_LOGO), tmp_path / "strace.log"
    strace = [  # without -f: of the main thread, which scans; in a claim the file has the same name
        "strace",
        "-o",
        str(log),
        "-P",
        str(path),
        "-P",
        path.name,
        "-e",
        "trace=openat,read",
        "-e",
        f"inject={fault}",
    ]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **folders.environ}
    subprocess.run([*strace, sys.executable, "-m", "imagewatch", "once"], env=environ, check=True, capture_output=True)
    assert "(INJECTED)" in log.read_text()
    assert (folders.finished(), inputs(sandbox)) == ({"mug": "outbox"}, [1])


def test_a_prompt_that_stays_unreadable_is_named_and_once_completes_the_others_and_ends(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    if reason := reason_not_to_trace():
        pytest.skip(reason)
    folders = Folders(tmp_path, sandbox.base_url, inbox__input_wait_seconds="0.5", inbox__rescan_seconds="0.2")
    path = folders.prompt("broken", "On a bad sector")
    folders.prompt("cat", "A cat")
    strace = ["strace", "-f", "-o", "/dev/null", "-P", str(path), "-e", "trace=read", "-e", "inject=read:error=EIO"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **folders.environ}
    result, done = (
        subprocess.run(
            [*strace, sys.executable, "-m", "imagewatch", command],
            env=environ,
            check=True,
            capture_output=True,
            text=True,
            timeout=40,
        )
        for command in ("check", "once")
    )
    assert done.returncode == 0
    assert (folders.finished(), folders.names("inbox")) == ({"cat": "outbox"}, ["broken.prompt.txt"])
    (line,) = [line for line in result.stdout.splitlines() if "broken" in line]
    assert "wait" in line
    assert "cannot be read: Input/output error" in line
    assert "take" in next(line for line in result.stdout.splitlines() if "cat.prompt.txt" in line)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NAMES_LOGO, "No images any more"),
        ("Not one image", NAMES_LOGO),
        (NAMES_LOGO, NAMES_LOGO.replace("logo", "other")),
        (NAMES_LOGO, NAMES_LOGO.replace('["logo.png"]', '["logo.png", "other.png"]')),
    ],
)
def test_a_prompt_that_is_replaced_just_before_its_claim_is_read_again(
    station: Station, sandbox: Sandbox, before: str, after: str
) -> None:
    for name in ("logo.png", "other.png"):
        station.drop(name, IMAGE)
    station.prompt("mug", before)
    (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
    station.prompt("mug", after)
    outcome = station.worker.start(candidate.claim(station.spool.new_job(), time.time()))
    assert (outcome.end, sandbox.report()["requests"]) == (End.RETURNED, 0)
    assert station.names("inbox") == ["logo.png", "mug.prompt.txt", "other.png"]
    assert station.leftovers() == []
    (outcome,) = station.work()
    assert (outcome.destination, inputs(sandbox)) == ("outbox", [after.count(".png")])


@pytest.mark.parametrize("victim", ["mug.prompt.txt", "logo.png"])
@pytest.mark.parametrize("how", ["another file", "the same file, changed", "another file of the same size and time"])
def test_a_file_that_was_replaced_before_its_claim_goes_back_unsent(
    station: Station, sandbox: Sandbox, victim: str, how: str
) -> None:
    station.drop("logo.png", IMAGE)
    station.prompt("mug", NAMES_LOGO)
    (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
    path = station.inbox / victim
    before, content = path.stat(), path.read_bytes()
    if how == "the same file, changed":
        path.write_bytes(content + b"\n")
    else:
        other = station.inbox / ".other"
        other.write_bytes(content if "same" in how else content + b"\n")
        if "same" in how:
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(path)
    dropped = {one.name: one.read_bytes() for one in station.inbox.iterdir() if one.is_file()}
    outcome = station.worker.start(candidate.claim(station.spool.new_job(), time.time()))
    assert (outcome.end, sandbox.report()["requests"]) == (End.RETURNED, 0)
    assert {one.name: one.read_bytes() for one in station.inbox.iterdir() if one.is_file()} == dropped
    assert station.leftovers() == []
    (outcome,) = station.work()
    assert (outcome.destination, inputs(sandbox)) == ("outbox", [1])


@pytest.mark.parametrize("when", ["before it is read", "between reading and claim"])
@pytest.mark.parametrize("becomes", ["another text", "nothing"])
def test_a_prompt_without_images_that_changes_before_its_claim_is_not_sent(
    station: Station, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, when: str, becomes: str
) -> None:
    station.prompt("cat", "A cat")
    (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
    path, claim = station.inbox / "cat.prompt.txt", station.spool.originals.claim

    def change() -> None:
        path.write_text("A dog") if becomes == "another text" else path.unlink()

    if when == "before it is read":
        change()
    else:
        monkeypatch.setattr(station.spool.originals, "claim", lambda one: (change(), claim(one))[1])
    outcome = station.worker.start(candidate.claim(station.spool.new_job(), time.time()))
    assert outcome.end in {End.RETURNED, End.NOTHING}
    assert (sandbox.report()["requests"], station.leftovers()) == (0, [])
    monkeypatch.undo()
    outcomes = station.work()
    assert [one.destination for one in outcomes] == (["outbox"] if becomes == "another text" else [])
    assert [call["prompt"] for call in sandbox.report()["calls"]] == ["A dog"][: len(outcomes)]


@pytest.mark.parametrize(
    ("text", "destination"), [("Put this on a mug", "outbox"), ("Put this on a mug [sandbox: 400]", "errors")]
)
def test_a_foreign_file_in_a_claim_is_neither_moved_nor_removed(
    station: Station, sandbox: Sandbox, text: str, destination: str
) -> None:
    station.prompt("mug", text)
    (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
    job = station.spool.new_job()
    beside = Path(station.spool.claim_folder(job), "evil.sh")
    sandbox.hold()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(station.worker.start, candidate.claim(job, time.time()))
        until(lambda: sandbox.report()["requests"])
        beside.write_text("echo pwned")
        sandbox.release()
        outcome = working.result()
    assert (outcome.end, outcome.destination) == (End.OVER, destination)
    assert beside.read_text() == "echo pwned"
    assert [path for path in station.root.rglob("evil*") if path != beside] == []


def test_accents_composed_in_another_way_are_the_same_image(station: Station, sandbox: Sandbox) -> None:
    station.drop("cafe\u0301.png", IMAGE)
    station.prompt("mug", '+++\ninput_images = ["caf\u00e9.png"]\n+++\nPut this on a mug')
    (outcome,) = station.work()
    assert (outcome.destination, inputs(sandbox)) == ("outbox", [1])


# What is in the way


def test_a_folder_that_a_prompt_names_as_its_image_stays_where_it_is(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__input_wait_seconds="0.1")
    (folders.inbox / "logo.png").mkdir()
    (folders.inbox / "logo.png/inner.txt").write_text("mine")
    folders.prompt("mug", NAMES_LOGO)
    daemon = run(folders)
    until(lambda: folders.finished() == {"mug": "errors"})
    assert "logo.png" in folders.error("mug")["message"]
    assert daemon.stop() == 0
    assert (folders.names("inbox"), folders.leftovers()) == (["logo.png/inner.txt"], [])
    assert sandbox.report()["requests"] == 0


@pytest.mark.parametrize("destination", ["outbox", "errors", "archive"])
def test_a_file_in_the_way_of_results_is_reported_before_anything_is_paid_for(
    tmp_path: Path, sandbox: Sandbox, run: Callable, destination: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    (folders.root / destination / "sub").write_text("a file of another user")
    folders.prompt("sub/deep/cat", "A cat")
    folders.prompt("dog", "A dog")
    daemon = run(folders)
    until(lambda: folders.finished() == {"dog": "outbox"})
    event = daemon.wait_for("ignored")
    assert event["file"] == "sub/deep/cat.prompt.txt"
    assert f"{destination}/sub is not a folder" in event["reason"]
    checked = command(folders, "check")
    assert f"{destination}/sub is not a folder" in checked.stdout
    assert sandbox.report()["requests"] == 1
    (folders.root / destination / "sub").unlink()
    until(lambda: len(list(folders.outbox.rglob("cat.receipt.toml"))) == 1)
    assert daemon.stop() == 0
    assert folders.leftovers() == []


def blocked(folders: Folders, run: Callable, sandbox: Sandbox) -> LoggedDaemon:
    """Start a daemon with a prompt whose results cannot be written when its response is there."""
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("sub/cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    (folders.outbox / "sub").write_text("a file of another user")
    sandbox.release()
    return daemon


def test_a_job_whose_results_cannot_be_written_waits_alone(tmp_path: Path, sandbox: Sandbox, run: Callable) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = blocked(folders, run, sandbox)
    stuck = daemon.wait_for("stuck")
    assert str(folders.outbox / "sub") in stuck["reason"]
    assert stuck["source"] == "sub/cat.prompt.txt"
    for number in range(5):
        folders.prompt(f"dog{number}", "A dog")
    until(lambda: len(folders.finished()) == 5)
    assert daemon.events("held") == []
    (folders.outbox / "sub").unlink()
    until((folders.outbox / "sub/cat.receipt.toml").exists, timeout=40)
    assert daemon.stop() == 0
    assert (sandbox.report()["charged"], folders.leftovers()) == (6, [])


def test_while_a_job_of_a_folder_is_stuck_nothing_else_of_that_folder_is_paid_for(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = blocked(folders, run, sandbox)
    daemon.wait_for("stuck")
    folders.prompt("sub/dog", "A dog")
    assert "until a stuck job continues" in daemon.wait_for("ignored")["reason"]
    until(lambda: re.search(r"stuck +1.*\n +sub/cat\.prompt\.txt\n", command(folders, "status").stdout))
    assert sandbox.report()["requests"] == 1
    (folders.outbox / "sub").unlink()  # which the daemon notices when the job is retried
    until(lambda: len(folders.finished()) == 2)
    assert daemon.stop() == 0
    assert (sandbox.report()["charged"], folders.leftovers()) == (2, [])


def test_once_completes_the_others_and_exits_with_74_if_one_job_cannot_be_delivered(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = blocked(folders, run, sandbox)
    assert daemon.stop() == 0
    for number in range(3):
        folders.prompt(f"dog{number}", "A dog")
    assert command(folders, "once").returncode == 74
    assert folders.finished() == {f"dog{number}": "outbox" for number in range(3)}
    (folders.outbox / "sub").unlink()
    assert command(folders, "once").returncode == 0
    assert (folders.outbox / "sub/cat.receipt.toml").exists()
    assert (sandbox.report()["charged"], folders.leftovers()) == (4, [])


def test_a_name_as_long_as_a_name_can_be_is_copied_where_its_time_is_not_ours_to_set(tmp_path: Path) -> None:
    path, other, target = tmp_path / ("n" * 255), tmp_path / "other", tmp_path / ("m" * 255)
    path.write_text("A cat")
    os.link(path, other)
    os.utime(path, ns=(1, 1))
    Disk().carry(str(path), str(target), str(tmp_path / ".temporary"), mtime_ns=0)
    assert sorted(one.name for one in tmp_path.iterdir()) == [target.name, other.name]
    assert (target.read_text(), target.stat().st_nlink, other.stat().st_mtime_ns) == ("A cat", 1, 1)
    assert target.stat().st_mtime_ns > 1


def test_a_folder_that_is_missing_when_its_prompt_is_given_back_is_created_again(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="2")
    daemon = run(folders)
    sandbox.hold()
    for name in ("one", "two"):
        folders.prompt(f"sub/{name}", "[sandbox: 402] Too poor")
    assert sandbox.wait_for_requests(2, 20)
    shutil.rmtree(folders.inbox / "sub")
    sandbox.release()
    until(lambda: len(folders.finished()) == 1 and list((folders.inbox / "sub").glob("*.prompt.txt")) != [])
    ((shown, destination),) = folders.finished().items()
    assert destination == "errors"
    (back,) = (folders.inbox / "sub").iterdir()
    assert {f"{shown}.prompt.txt", back.name} == {"one.prompt.txt", "two.prompt.txt"}
    assert daemon.stop() == 0
    assert folders.leftovers() == []


def test_two_jobs_that_wait_for_the_same_name_do_not_keep_each_other_busy(tmp_path: Path, run: Callable) -> None:
    arrived, go_on = ([threading.Event() for _ in range(4)] for _ in range(2))
    go_on[0].set()

    def refusing(number: int) -> Callable[[Exchange], None]:
        def script(exchange: Exchange) -> None:
            exchange.request()
            arrived[number].set()
            go_on[number].wait(PATIENCE)
            exchange.send(response(b"{}", status=b"402 Payment Required"))

        return script

    with Scripted(*map(refusing, range(4))) as server:
        folders = Folders(tmp_path, server.base_url, limits__concurrency="1")
        script = tmp_path / "telling.py"
        script.write_text(HURRIED.replace('"info"', '"debug"'))
        daemon = run(folders, "0.2", script=str(script))
        folders.prompt("shown", "The one that shows that there are no credits")
        daemon.wait_for("held")
        for number in range(1, 4):
            folders.prompt("cat", f"Version {number}")
            go_on[number - 1].set()  # the one before is refused now that its name is taken
            assert arrived[number].wait(PATIENCE)
        returned = lambda: [line for line in daemon.events("step") if line["step"] == "give_back"]  # noqa: E731
        until(lambda: len({line["job"] for line in returned()}) == 2)
        before, began = len(returned()), time.monotonic()
        threading.Event().wait(2)
        seconds = time.monotonic() - began
        assert len(returned()) - before <= 2 * (1 + seconds // 5)  # each tries it every five seconds
        daemon.process.kill()
        go_on[3].set()


def test_a_hold_for_the_disk_ends_automatically_also_if_no_prompt_waits(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.5")
    daemon = run(folders)
    folders.prompt("cat", "[sandbox: slow 1] A cat")
    until(lambda: not (folders.inbox / "cat.prompt.txt").exists())
    away = folders.outbox.rename(folders.outbox.with_name("away"))
    assert daemon.wait_for("held")["kind"] == "disk"
    until(lambda: command(folders, "status").returncode == 69)
    away.rename(folders.outbox)
    until(lambda: folders.finished() == {"cat": "outbox"}, timeout=40)
    assert daemon.wait_for("released")["kind"] == "disk"
    until(lambda: command(folders, "status").returncode == 0)
    assert daemon.stop() == 0


# What is stuck


def damage_jobs(folders: Folders) -> None:
    """Damage what the ledger has of the jobs that are not over."""
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        database.execute("UPDATE jobs SET claim = 'damaged' WHERE state <> 'done'")
        database.commit()


def test_a_stuck_job_keeps_its_name_so_that_a_redelivery_is_not_paid_again(
    tmp_path: Path, sandbox: Sandbox, run: Callable, start: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    daemon = run(folders)
    folders.prompt("cat", "[sandbox: slow 20] A cat")
    until(lambda: sandbox.report()["requests"] == 1)
    daemon.process.kill()
    daemon.end()
    damage_jobs(folders)
    daemon = run(folders)
    daemon.wait_for("stuck")
    folders.prompt("cat", "[sandbox: slow 20] A cat")
    folders.prompt("dog", "A dog")
    until(lambda: folders.finished() == {"dog": "outbox"})
    assert daemon.stop() == 0
    assert folders.names("inbox")[-1] == "cat.prompt.txt"
    assert sandbox.report()["requests"] == 2


# Several stuck jobs


BAD_SECTORS = """
import errno, os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

class Bad(Disk):
    def carry(self, source, target, *rest, **more):
        if os.path.basename(source).startswith("bad") and not os.path.exists(sys.argv[1]):
            raise SpoolError(f"{source}: cannot read: Input/output error", path=source, code=errno.EIO)
        super().carry(source, target, *rest, **more)

log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ, disk=Bad()).run())
"""
"""A daemon whose disk cannot read claimed files of some names, until a file is there."""


def test_if_two_jobs_from_the_inbox_itself_are_stuck_no_more_is_claimed_out_of_it(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    script, repaired = tmp_path / "bad.py", tmp_path / "repaired"
    script.write_text(BAD_SECTORS)
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.5")
    daemon = run(folders, str(repaired), script=str(script))
    folders.prompt("bad1", "One")
    until(lambda: len(daemon.events("stuck")) == 1)
    folders.prompt("cat", "A cat")
    until(lambda: "cat" in folders.finished())
    folders.prompt("bad2", "Two")
    until(lambda: len(daemon.events("stuck")) == 2)
    folders.prompt("dog", "A dog")
    folders.prompt("sub/elk", "An elk")
    until(lambda: "elk" in folders.finished())
    assert (folders.inbox / "dog.prompt.txt").exists()
    assert sandbox.report()["requests"] == 4
    repaired.touch()
    until(lambda: "dog" in folders.finished(), timeout=60)
    assert sandbox.report()["requests"] == 5
    until(lambda: folders.leftovers() == [])


def test_too_many_stuck_jobs_hold_the_queue_only_until_there_are_fewer(
    tmp_path: Path, sandbox: Sandbox, run: Callable
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    daemon = run(folders)
    for number in range(3):
        folders.prompt(f"p{number}", f"[sandbox: slow 20] {number}")
    assert sandbox.wait_for_requests(3, 20)
    daemon.process.kill()
    daemon.end()
    damage_jobs(folders)
    daemon = run(folders)
    until(lambda: any("jobs are stuck" in event["reason"] for event in daemon.events("held")))
    folders.prompt("dog", "A dog")
    daemon.wait_for("stuck", 3)
    stuck = [event["job"] for event in daemon.events("stuck")]
    for job in stuck[:2]:
        shutil.rmtree(folders.inbox / ".imagewatch" / job)
    until(lambda: folders.finished() == {"dog": "outbox"})
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 4


def test_a_bug_while_the_originals_of_one_job_are_kept_leaves_those_of_the_others_alone(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    with contextlib.closing(Station(tmp_path, sandbox.base_url)) as station:
        delivery, stems = station.spool.delivery, ("cat", "dog")
        carry_all = delivery._carry_all

        def slip(claim: Claim, moves: tuple[Move, ...], folder: str, *more: Any) -> None:
            if folder == str(station.archive) and claim.stem == "cat":
                raise RuntimeError("a slip")
            carry_all(claim, moves, folder, *more)

        delivery._carry_all = slip  # type: ignore[method-assign]
        delivery.expect("another")  # so that the two wait for each other
        for stem in stems:
            station.prompt(stem, f"a {stem}")
        ready = station.scan.scan_all(time.monotonic(), time.time()).ready
        claims = [candidate.claim(station.spool.new_job(), time.time()) for candidate in ready]
        with ThreadPoolExecutor(len(claims)) as pool:
            ends = dict(zip([claim.stem for claim in claims], pool.map(end_of(station), claims), strict=True))
        assert (ends["dog"], "a slip" in ends["cat"]) == ("outbox", True)
        assert station.finished() == dict.fromkeys(stems, "outbox")
        assert station.names("archive") == ["dog.prompt.txt"]


def end_of(station: Station) -> Callable[[Claim], str]:
    """Return what carries a prompt to its end; it returns the destination, or why there is none."""

    def end(claim: Claim) -> str:
        try:
            return station.worker.start(claim).destination
        except SpoolError as error:
            return str(error)

    return end
