"""The real process is killed before each of its changes to the disk, and the real process is started again.

``IMAGEWATCH_ALL_KILLS=1`` tries every change; otherwise some forty-five of them, evenly spread.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, Folders, Running, until
from endpoint import picture

from imagewatch.sandbox import Sandbox

RUNNER = str(Path(__file__).parent / "kill_runner.py")
KILLS = 45
CONCURRENCY = 2

PROMPTS = {
    "text": "a lighthouse at dusk",
    "edit": "make it blue",
    "two": "+++\nn = 2\n+++\ntwo boats",
    "wrong": "+++\ncolour = 1\n+++\nnever sent",
    "bad": "nothing nice [sandbox: 400]",
    "busy": "a busy day [sandbox: once 429-plain]",
}
IMAGES = ("edit.png", "edit.1.png")
ENDS = {
    "text": ("outbox", "yes"),
    "edit": ("outbox", "yes"),
    "two": ("outbox", "yes"),
    "wrong": ("errors", "no"),
    "bad": ("errors", "no"),
    "busy": ("outbox", "yes"),
}


def dropped(root: Path, sandbox: Sandbox) -> Folders:
    folders = Folders(root, sandbox.base_url, limits__concurrency=str(CONCURRENCY), log__level="error")
    for name in IMAGES:
        folders.drop(name, picture(name))
    for stem, text in PROMPTS.items():
        folders.prompt(stem, text)
    return folders


def sent_text(stem: str) -> str:
    return PROMPTS[stem].rpartition("+++\n")[2]


class Audit:
    """Looks from outside: at the folders, at the ledger, at what the endpoint says."""

    def __init__(self, folders: Folders, report: dict[str, Any]) -> None:
        self.folders = folders
        self.calls = {stem: [c for c in report["calls"] if c["prompt"] == sent_text(stem)] for stem in PROMPTS}
        assert sum(map(len, self.calls.values())) == report["requests"]
        self.doors = folders.documents()

    def check(self) -> None:
        assert self.folders.leftovers() == []
        assert set(self.doors) == set(PROMPTS)
        assert [name for name in self.folders.names("inbox") if not name.startswith(".")] == []
        assert sum(self._check(stem) for stem in PROMPTS) <= CONCURRENCY
        self._check_originals()
        self._check_ledger()

    def paid(self, stem: str) -> int:
        return sum(call["credits"] > 0 for call in self.calls[stem])

    def _check(self, stem: str) -> bool:
        """Check one prompt; return whether its request was disturbed."""
        assert self.paid(stem) <= 1, f"{stem} was paid twice"
        made = self.doors[stem] == "outbox"
        document = self.folders.receipt(stem) if made else self.folders.error(stem)
        if made:
            self._check_pictures(stem, document)
        elif self.paid(stem):
            assert document["charged"] in {"yes", "unknown"}
        disturbed = (self.doors[stem], document["charged"]) != ENDS[stem]
        assert not disturbed or (stem != "wrong" and document["charged"] in {"yes", "unknown"})
        return disturbed

    def _check_pictures(self, stem: str, receipt: dict[str, Any]) -> None:
        served = [call["images"] for call in self.calls[stem] if call["images"]]
        assert len(served) == 1
        found = [self._sha256(self.folders.outbox / image["file"]) for image in receipt["images"]]
        assert found == [image["sha256"] for image in receipt["images"]]
        assert found == served[0] or (receipt.get("problems") and found == served[0][: len(found)])

    def _sha256(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _check_originals(self) -> None:
        """Everything that was dropped is kept once; everything in the outbox is named by a receipt."""
        contents = {stem + ".prompt.txt": text.encode() for stem, text in PROMPTS.items()}
        contents |= {name: picture(name) for name in IMAGES}
        for name, content in contents.items():
            door = "archive" if self.doors[name.split(".")[0]] == "outbox" else "errors"
            assert (self.folders.root / door / name).read_bytes() == content
        assert len(self.folders.names("archive")) + len(self.folders.names("errors")) == len(contents) + sum(
            1 + bool(list(self.folders.errors.glob(f"{stem}.answer.*")))
            for stem, door in self.doors.items()
            if door == "errors"
        )
        made = [stem for stem, door in self.doors.items() if door == "outbox"]
        images = [image["file"] for stem in made for image in self.folders.receipt(stem)["images"]]
        assert sorted([*images, *(f"{stem}.receipt.toml" for stem in made)]) == self.folders.names("outbox")

    def _check_ledger(self) -> None:
        with sqlite3.connect(self.folders.state / "ledger.sqlite3") as database:
            rows = database.execute("SELECT source, attempt, charged FROM attempts").fetchall()
        database.close()
        for stem in PROMPTS:
            mine = [(attempt, charged) for source, attempt, charged in rows if source == f"{stem}.prompt.txt"]
            assert len([attempt for attempt, _ in mine if attempt]) >= len(self.calls[stem])
            assert sum(charged != "no" for _, charged in mine) >= self.paid(stem)


def kill_and_start_again(root: Path, number: int) -> int:
    """Kill before a change, start again, look; return how the first process ended."""
    root.mkdir()
    with Sandbox(key=KEY) as sandbox:
        folders = dropped(root, sandbox)
        killed = Running(folders, str(number), script=RUNNER)
        code = killed.wait()
        again = Running(folders, "once")
        assert again.wait() in {0, 1}, again.output
        try:
            assert code in {-signal.SIGKILL, 0}, killed.output
            Audit(folders, sandbox.report()).check()
            assert sandbox.report()["faults"] == []
        except Exception as error:
            error.add_note(f"killed before change {number}\n{killed.output}\n{again.output}")
            raise
    return code


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many changes to the disk the whole work takes."""
    with Sandbox(key=KEY) as sandbox:
        folders = dropped(tmp_path_factory.mktemp("count"), sandbox)
        runner = Running(folders, "0", script=RUNNER)
        assert runner.wait() == 0, runner.output
        audit = Audit(folders, sandbox.report())
        audit.check()
        assert audit.doors == {stem: door for stem, (door, _) in ENDS.items()}
        return int(runner.output.split()[0])


@pytest.mark.timeout(900)
def test_killed_at_any_change_nothing_is_paid_twice_or_lost(changes: int, tmp_path: Path) -> None:
    every = 1 if os.environ.get("IMAGEWATCH_ALL_KILLS") == "1" else max(1, changes // KILLS)
    numbers = range(1, changes + 1, every)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda number: kill_and_start_again(tmp_path / str(number), number), numbers))
    # Two workers take turns as they like, so the last few changes may not be reached.
    assert ends.count(-signal.SIGKILL) >= len(ends) * 0.9


def test_killed_while_the_answer_is_awaited_it_is_in_doubt_and_never_sent_again(
    folders: Folders, sandbox: Sandbox
) -> None:
    folders.prompt("cat", "a cat")
    sandbox.hold()
    daemon = Running(folders, "once")
    assert sandbox.wait_for_requests(1, timeout=20)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    sandbox.release()
    for _ in range(2):
        again = Running(folders, "once")
        assert again.wait() in {0, 1}, again.output
        assert folders.documents() == {"cat": "errors"}
        error = folders.error("cat")
        assert error["charged"] == "unknown"
        assert "may have been charged" in error["message"]
        assert (folders.errors / "cat.prompt.txt").read_text() == "a cat"
        assert folders.leftovers() == []
        assert sandbox.report()["requests"] == 1


def test_what_had_come_of_the_answer_is_kept(folders: Folders, sandbox: Sandbox) -> None:
    folders.prompt("cat", "a cat [sandbox: trickle 0.05]")
    daemon = Running(folders, "once")
    until(lambda: [part for part in folders.state.glob("jobs/*/answer.1.part") if part.read_bytes().count(b"\n")])
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    again = Running(folders, "once")
    assert again.wait() == 1, again.output
    assert folders.error("cat")["charged"] == "yes"
    assert [name for name in folders.names("errors") if name.startswith("cat.answer.")]
    assert sandbox.report()["requests"] == 1


def test_a_killed_daemon_leaves_its_folders_to_the_next(folders: Folders, sandbox: Sandbox) -> None:
    sandbox.hold()
    folders.prompt("cat", "a cat")
    first = Running(folders, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    second = Running(folders, "once")
    assert second.wait() == 75, second.output
    first.stop(signal.SIGKILL)
    sandbox.release()
    third = Running(folders, "once")
    assert third.wait() == 1, third.output
    assert sandbox.report()["requests"] == 1
