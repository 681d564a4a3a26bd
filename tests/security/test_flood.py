"""Very many files, folders and changes of one user: the prompts of the others are claimed all the same, and soon.

The figures are those of the issue in one case. ``IMAGEWATCH_FLOOD=1`` runs all cases with them, in some minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, command, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

ALL = bool(os.environ.get("IMAGEWATCH_FLOOD"))
NEAR_MISSES, IMAGES, EMPTY, FOLDERS = 100_000, 20_000, 5_000, 3_000
SECONDS = 10.0
"""How soon after it has settled a prompt is claimed."""
SETTLE = 1.0
SETTINGS = {"inbox__settle_seconds": str(SETTLE)}
MALLORY, COLLEAGUE = 61235, 61236
"""User ids that no user has."""


def flood(inbox: Path, where: str, share: float) -> None:
    """Put very much into one first-level folder, into the inbox itself, or into very many first-level folders."""

    def place(number: int) -> str:
        name = {"one folder": "mallory/", "the inbox": "", "very many folders": f"m{number % FOLDERS}/"}[where]
        folder = f"{inbox}/{name}"
        os.makedirs(folder, exist_ok=True)
        return folder

    for name, content, count in (
        ("near{}.prompt.txt.txt", b"", NEAR_MISSES),
        ("image{}.gif", b"GIF89a", IMAGES),
        ("empty{}.prompt.txt", b"", EMPTY),
    ):
        for number in range(int(count * share)):
            with open(place(number) + name.format(number), "wb") as file:
                file.write(content)
    for number in range(int(FOLDERS * share)):
        os.makedirs(f"{place(number)}folder{number}", exist_ok=True)


@pytest.fixture
def crowded(tmp_path: Path, sandbox: Sandbox) -> Iterator[Callable[..., Folders]]:
    """Make folders that are removed at the end: a hundred thousand files are not kept for three runs."""

    def maker(**settings: str) -> Folders:
        return Folders(tmp_path, sandbox.base_url, **{**SETTINGS, **settings})

    yield maker
    shutil.rmtree(tmp_path / "watched", ignore_errors=True)


def asked(sandbox: Sandbox) -> list[str]:
    return [call["prompt"] for call in sandbox.report()["calls"]]


def drop(folders: Folders, source: str, text: str) -> None:
    """Write a prompt as an editor does: only that it stays unchanged shows that it is whole."""
    path = folders.inbox / f"{source}.prompt.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def is_claimed_soon(sandbox: Sandbox, text: str, more: float = 0.0) -> None:
    until(lambda: text in asked(sandbox), timeout=SETTLE + SECONDS + more)


def status(folders: Folders) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folders.state / "status.json").read_text())
    return {"waiting": {"ready": -1}, "ignored": {"count": -1, "files": {}}}


CASES = [
    ("one folder", "native", 1.0),
    ("the inbox", "poll", 1.0 if ALL else 0.05),
    ("very many folders", "native", 1.0 if ALL else 0.05),
    *([(where, watch, 1.0) for where, watch in [("one folder", "poll"), ("the inbox", "native")]] if ALL else []),
    *([("very many folders", "poll", 1.0)] if ALL else []),
]


@pytest.mark.parametrize(("where", "watch", "share"), CASES)
def test_beside_very_many_files_of_one_user_the_prompt_of_another_is_claimed_soon(
    crowded: Callable[..., Folders],
    sandbox: Sandbox,
    run: Callable[..., LoggedDaemon],
    where: str,
    watch: str,
    share: float,
) -> None:
    folders = crowded(inbox__watch=watch)
    flood(folders.inbox, where, share)
    drop(folders, "colleague/first", "First")
    daemon = run(folders, watching=False)
    is_claimed_soon(sandbox, "First", more=2.0)  # the process has to start
    for number in range(3):
        drop(folders, "colleague/again", f"Again {number}")
        is_claimed_soon(sandbox, f"Again {number}")
    drop(folders, "new-colleague/deep/down/first", "In a new folder")
    is_claimed_soon(sandbox, "In a new folder")
    until(lambda: status(folders)["ignored"]["count"] == int(NEAR_MISSES * share), timeout=60)
    assert daemon.stop() == 0
    assert len(asked(sandbox)) == 5
    assert len(daemon.events("ignored")) <= 5000


STORM = """
import itertools, os, sys
kind, inbox = sys.argv[1:]
mine = os.path.join(inbox, "mallory")
os.makedirs(mine, exist_ok=True)
if kind == "files":
    for number in itertools.count():
        open(f"{mine}/n{number}.txt", "w").close()
        if number > 99:
            os.unlink(f"{mine}/n{number - 100}.txt")
if kind == "folders":
    for number in itertools.count():
        os.mkdir(f"{inbox}/d{number}")
        if number > 99:
            os.rmdir(f"{inbox}/d{number - 100}")
if kind == "renames":
    open(f"{mine}/a.prompt.txt", "w").write("never quiet")
    while True:
        os.rename(f"{mine}/a.prompt.txt", f"{mine}/b.prompt.txt")
        os.rename(f"{mine}/b.prompt.txt", f"{mine}/a.prompt.txt")
if kind == "everywhere":
    places = [f"{inbox}/m{number}" for number in range(1000)]
    for place in places:
        os.makedirs(place, exist_ok=True)
    for number in itertools.count():
        for place in places:
            open(f"{place}/p.prompt.txt", "w").write(f"never quiet {number}")
            open(f"{place}/n{number % 7}.txt", "w").close()
            os.unlink(f"{place}/n{number % 7}.txt")
"""


@pytest.mark.parametrize("watch", ["native", "poll"])
@pytest.mark.parametrize("kind", ["files", "folders", "renames", "everywhere"])
def test_while_one_user_changes_files_without_end_the_prompt_of_another_is_claimed_soon(
    crowded: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon], kind: str, watch: str
) -> None:
    folders = crowded(inbox__watch=watch)
    (folders.inbox / "colleague").mkdir()
    if os.geteuid() == 0:
        os.chown(folders.inbox / "colleague", COLLEAGUE, COLLEAGUE)
    elif kind == "everywhere":
        pytest.skip("only root may give a folder to another user; a thousand folders of one user take turns")
    daemon = run(folders)
    with subprocess.Popen([sys.executable, "-c", STORM, kind, folders.inbox]) as storm:
        try:
            until((folders.inbox / "mallory").exists)
            for number in range(3):
                drop(folders, f"colleague/{number}", f"Number {number}")
                is_claimed_soon(sandbox, f"Number {number}")
        finally:
            storm.kill()
    assert daemon.stop() == 0
    assert [text for text in asked(sandbox) if text.startswith("Number")] == [f"Number {n}" for n in range(3)]
    assert len(daemon.lines) < 6000


# Turns


def test_five_thousand_prompts_of_one_user_delay_that_of_another_by_about_one_request(
    crowded: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = crowded(limits__concurrency="1")
    for number in range(5000):
        drop(folders, f"mallory/p{number:04}", f"Mallory {number:04}")
    sandbox.hold()
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    until(lambda: status(folders)["waiting"]["ready"] == 4999, timeout=40)
    drop(folders, "colleague/cat", "A cat")
    drop(folders, "top", "At the top")
    until(lambda: status(folders)["waiting"]["ready"] == 5001, timeout=40)
    sandbox.release()
    until(lambda: {"A cat", "At the top"} <= set(asked(sandbox)))
    order = asked(sandbox)
    assert daemon.stop() == 0
    assert max(order.index("A cat"), order.index("At the top")) <= 3
    mallory = [text for text in asked(sandbox) if text.startswith("Mallory")]
    assert mallory == [f"Mallory {number:04}" for number in range(len(mallory))], "the oldest comes first"


def test_the_users_share_all_slots_in_turns(
    crowded: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = crowded(limits__concurrency="4")
    for number in range(200):
        drop(folders, f"mallory/p{number:04}", f"Mallory {number}")
    sandbox.hold()
    daemon = run(folders)
    assert sandbox.wait_for_requests(4, 20)
    for name in ("ann", "bob"):
        for number in range(4):
            drop(folders, f"{name}/{number}", f"{name} {number}")
    until(lambda: status(folders)["waiting"]["ready"] == 204, timeout=40)
    sandbox.release()
    until(lambda: len(asked(sandbox)) > 40)
    assert daemon.stop() == 0
    first = asked(sandbox)[4 : 4 + 12 + 4]  # those that were sent at the same time may change places
    assert sum(text.startswith("ann") for text in first) == 4
    assert sum(text.startswith("bob") for text in first) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_a_user_with_very_many_folders_gets_no_more_turns_than_with_a_few(
    crowded: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = crowded(limits__concurrency="1")
    for number in range(10_000 if ALL else 1000):
        drop(folders, f"m{number}/p", f"Mallory {number}")
        os.chown(folders.inbox / f"m{number}", MALLORY, MALLORY)
    sandbox.hold()
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    for number in range(2):
        drop(folders, f"colleague/{number}", f"Colleague {number}")
    os.chown(folders.inbox / "colleague", COLLEAGUE, COLLEAGUE)
    until(lambda: status(folders)["waiting"]["ready"] == (10_001 if ALL else 1001), timeout=60)
    sandbox.release()
    until(lambda: {"Colleague 0", "Colleague 1"} <= set(asked(sandbox)), timeout=60)
    order = asked(sandbox)
    assert daemon.stop() == 0
    assert order.index("Colleague 0") <= 3
    assert order.index("Colleague 1") <= 3 + 9, "a folder has a turn after eight of theirs"


# What is reported


def test_names_that_come_and_go_without_end_do_not_fill_the_log(
    crowded: Callable[..., Folders], sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = crowded(inbox__settle_seconds="0.2", inbox__rescan_seconds="0.5")
    mallory = folders.inbox / "mallory"
    mallory.mkdir()
    daemon = run(folders)
    for turn in range(5):
        for number in range(700):
            (mallory / f"turn{turn}-{number}.txt").touch()
        start = f"mallory/turn{turn}"
        until(lambda start=start: any(name.startswith(start) for name in status(folders)["ignored"]["files"]))
        until(lambda: status(folders)["ignored"]["count"] == 700)
        for path in mallory.iterdir():
            path.unlink()
        until(lambda: status(folders)["ignored"]["count"] == 0)
    (folders.inbox / "colleague").mkdir()
    (folders.inbox / "colleague/cat.prompt").write_text("A cat")
    until(lambda: "colleague/cat.prompt" in {line.get("file") for line in daemon.events("ignored")})
    assert daemon.stop() == 0
    ignored = daemon.events("ignored")
    assert len([line for line in ignored if "file" in line]) == 1001
    assert len([line for line in ignored if "file" not in line]) == 1


def test_status_names_files_of_each_folder_however_many_one_has(
    crowded: Callable[..., Folders], run: Callable[..., LoggedDaemon]
) -> None:
    folders = crowded()
    for number in range(3000):
        (folders.inbox / f"a{number}.txt").touch()
    for name in ("x", "y", "z"):
        drop(folders, f"{name}/empty", "")
        (folders.inbox / f"{name}/note.txt").touch()
    daemon = run(folders)
    until(lambda: status(folders)["ignored"]["count"] == 3003)  # it is ready after 5 s though not all is scanned
    page = status(folders)
    assert daemon.stop() == 0
    assert (page["ignored"]["count"], len(page["ignored"]["files"])) == (3003, 100)
    assert {"x/note.txt", "y/note.txt", "z/note.txt"} <= page["ignored"]["files"].keys()
    assert {"x/empty.prompt.txt", "y/empty.prompt.txt", "z/empty.prompt.txt"} == page["waiting"]["files"].keys()
    named = {line["file"] for line in daemon.events("ignored") if "file" in line}
    assert {"x/note.txt", "y/note.txt", "z/note.txt"} <= named


def test_check_names_the_prompts_that_are_ready_beside_very_many_other_files(crowded: Callable[..., Folders]) -> None:
    folders = crowded()
    flood(folders.inbox, "one folder", 1.0 if ALL else 0.1)
    drop(folders, "colleague/cat", "A cat")
    began = time.monotonic()
    result = command(folders, "check", "--json", IMAGEWATCH_INBOX__SETTLE_SECONDS="0")
    assert time.monotonic() < began + 30
    files = {line["what"]: line["verdict"] for line in json.loads(result.stdout)["files"]}
    assert files["colleague/cat.prompt.txt"] == "take"
