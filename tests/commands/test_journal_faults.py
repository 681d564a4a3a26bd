"""While the journal cannot record, nothing is sent, and people see why: a real daemon, commands, and the endpoint.

Each fault comes while the daemon waits for a response, with other prompts in the inbox. When it ends, all of them are
completed, each is paid once, and the ledger has the same requests as the endpoint.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, command, until

from imagewatch.journal.schema import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

LIMITED = """
import os, sqlite3, sys
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.system import log

connect = sqlite3.connect

class Limited(sqlite3.Connection):
    def execute(self, question, *values):
        if question.startswith(("BEGIN", "INSERT")):
            pages = 1 if os.path.exists(sys.argv[1]) else 2**32 - 2
            super().execute(f"PRAGMA max_page_count = {pages}")
        return super().execute(question, *values)

sqlite3.connect = lambda *path, **options: connect(*path, factory=Limited, **options)
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ).run())
"""
"""A daemon whose journal cannot grow while a file exists."""
MANY = 4
LONG = "A very long text. " * 1000
"""More than fits into what is left of the last pages."""


def ledger(folders: Folders) -> Path:
    return folders.state / "ledger.sqlite3"


def changed(folders: Folders, statement: str) -> sqlite3.Connection:
    """Change something in the journal as another program; return the connection."""
    other = sqlite3.connect(ledger(folders), isolation_level=None)
    other.execute(statement)
    return other


@contextlib.contextmanager
def locked(folders: Folders) -> Iterator[None]:
    with contextlib.closing(changed(folders, "BEGIN IMMEDIATE")):
        yield


@contextlib.contextmanager
def newer(folders: Folders) -> Iterator[None]:
    changed(folders, "PRAGMA user_version = 99").close()
    yield
    changed(folders, f"PRAGMA user_version = {VERSION}").close()


@contextlib.contextmanager
def full(folders: Folders) -> Iterator[None]:
    flag = folders.root / "full"
    flag.touch()
    yield
    flag.unlink()


@contextlib.contextmanager
def deleted(folders: Folders) -> Iterator[None]:
    for path in folders.state.glob("ledger.sqlite3*"):
        path.unlink()
    yield
    (folders.state / "ledger.sqlite3.saved-1").rename(ledger(folders))


@contextlib.contextmanager
def older(folders: Folders) -> Iterator[None]:
    (folders.root / "backup").replace(ledger(folders))
    yield
    (folders.state / "ledger.sqlite3.saved-1").replace(ledger(folders))


@contextlib.contextmanager
def overwritten(folders: Folders) -> Iterator[None]:
    """Another program writes over the file without replacing it; a copy from just before is put back."""
    copied(folders, "newest")
    with ledger(folders).open("r+b") as file:
        file.seek(4096)  # behind the header
        file.write(b"\xff" * (ledger(folders).stat().st_size - 4096))
    yield
    (folders.root / "newest").replace(ledger(folders))


def copied(folders: Folders, name: str) -> None:
    """Copy the journal as a backup does."""
    with (
        contextlib.closing(sqlite3.connect(ledger(folders))) as source,
        contextlib.closing(sqlite3.connect(folders.root / name)) as copy,
    ):
        source.backup(copy)


FAULTS: dict[str, tuple[Callable[[Folders], AbstractContextManager[None]], str]] = {
    "locked": (locked, "locked by another program"),
    "newer": (newer, "written by a newer imagewatch"),
    "full": (full, "database or disk is full"),
    "deleted": (deleted, "the ledger is missing"),
    "overwritten": (overwritten, "another program has written into the ledger"),
    "older": (older, "lacks the newest requests"),
}


FULL, OLDER = FAULTS["full"][1], FAULTS["older"][1]


def holds(folders: Folders) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads((folders.state / "status.json").read_text())["holds"])
    return []


def reported(folders: Folders, text: str) -> None:
    """``check`` and ``status`` report the fault."""
    until(lambda: text in str(holds(folders)))
    assert {hold["kind"] for hold in holds(folders)} == {"disk"}
    done = command(folders, "status")
    assert (done.returncode, text in done.stdout) == (69, True), done.stdout
    if text == OLDER:
        return  # any program that opens the copy adds to it what SQLite keeps beside the file
    done = command(folders, "check")
    assert text in " ".join(done.stdout.split()), done.stdout
    assert done.returncode == (0 if text == FULL else 78), "only the daemon's journal is full: check repeats the hold"


def recovered(folders: Folders, sandbox: Sandbox, stems: list[str]) -> None:
    """Wait until every prompt is completed; compare the ledger with the endpoint."""
    until(lambda: sorted(folders.finished()) == sorted(stems), timeout=60)
    assert set(folders.finished().values()) == {"outbox"}
    until(lambda: holds(folders) == [] and folders.leftovers() == [])
    report = sandbox.report()
    assert report["requests"] == report["charged"] == len(stems)
    rows = json.loads(command(folders, "history", "--json", "--limit", "0").stdout)
    assert sorted((row["source"], row["outcome"]) for row in rows) == sorted(
        (f"{stem}.prompt.txt", "completed") for stem in stems
    )
    assert sum(row["credits"] for row in rows) == report["credits"]


@pytest.fixture
def limited(tmp_path: Path, run: Callable[..., LoggedDaemon]) -> Callable[[Folders], LoggedDaemon]:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    return lambda folders: run(folders, str(folders.root / "full"), script=str(script), watching=False)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_journal_that_cannot_record_holds_the_queue_and_loses_no_response(
    folders: Folders, sandbox: Sandbox, limited: Callable[[Folders], LoggedDaemon], fault: str
) -> None:
    begin, text = FAULTS[fault]
    folders.prompt("before", "Before")
    assert command(folders, "once").returncode == 0
    copied(folders, "backup")
    daemon = limited(folders)
    sandbox.hold()
    folders.prompt("sent", LONG)
    assert sandbox.wait_for_requests(2, 20)
    with begin(folders):
        stems = [f"p{number}" for number in range(MANY)]
        for stem in stems:
            folders.prompt(stem, f"{LONG}{stem}")
        reported(folders, text)
        sandbox.release()
        until(lambda: any(path.name.endswith(".answer.1") for path in folders.answers()))
        reported(folders, text)
        assert (sandbox.report()["requests"], list(folders.finished())) == (2, ["before"])
    recovered(folders, sandbox, ["before", "sent", *stems])
    assert daemon.stop() == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", ["locked", "newer", "full"])
def test_a_daemon_that_starts_while_the_journal_cannot_record_sends_nothing_until_it_can(
    folders: Folders, sandbox: Sandbox, limited: Callable[[Folders], LoggedDaemon], fault: str
) -> None:
    begin, text = FAULTS[fault]
    folders.prompt("before", "Before")
    assert command(folders, "once").returncode == 0
    with begin(folders):
        daemon = limited(folders)
        stems = [f"p{number}" for number in range(MANY)]
        for stem in stems:
            folders.prompt(stem, f"{LONG}{stem}")
        reported(folders, text)
        assert (sandbox.report()["requests"], list(folders.finished())) == (1, ["before"])
    recovered(folders, sandbox, ["before", *stems])
    assert daemon.stop() == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", ["locked", "newer", "full"])
def test_what_was_sent_before_a_kill_is_not_sent_again_though_the_journal_cannot_record_at_the_next_start(
    folders: Folders, sandbox: Sandbox, limited: Callable[[Folders], LoggedDaemon], fault: str
) -> None:
    begin, text = FAULTS[fault]
    sandbox.hold()
    folders.prompt("sent", "Sent")
    daemon = limited(folders)
    assert sandbox.wait_for_requests(1, 20)
    daemon.kill()
    sandbox.release()
    with begin(folders):
        daemon = limited(folders)
        folders.prompt("waits", LONG)
        reported(folders, text)
        assert (sandbox.report()["requests"], folders.finished().get("waits")) == (1, None)
    until(lambda: folders.finished() == {"sent": "errors", "waits": "outbox"}, timeout=60)
    assert folders.error("sent")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 2
    until(lambda: folders.leftovers() == [])
    assert daemon.stop() == 0
