"""What cannot be recorded is not paid: a real daemon, and a ledger that it cannot use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import PATIENCE, Folders, LoggedDaemon, command, until

from imagewatch.daemon.arrivals import Arrivals
from imagewatch.daemon.dispatch import Dispatch
from imagewatch.daemon.instructions import Instructions
from imagewatch.daemon.mailbox import Finished
from imagewatch.daemon.parts import Parts
from imagewatch.daemon.recovery import Recovery
from imagewatch.daemon.results import Results
from imagewatch.journal import sqlite
from imagewatch.journal.holds import Holds
from imagewatch.protocol.values import Claim
from imagewatch.system.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

MANY = 12


@pytest.fixture
def used(tmp_path: Path, sandbox: Sandbox) -> Folders:
    """Folders of a daemon that has completed one prompt."""
    folders = Folders(tmp_path, sandbox.base_url)
    folders.prompt("before", "Before")
    assert command(folders, "once").returncode == 0
    return folders


def ledger(folders: Folders) -> Path:
    return folders.state / "ledger.sqlite3"


def holds(folders: Folders) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads((folders.state / "status.json").read_text())["holds"])
    return []


def drop(folders: Folders) -> None:
    for number in range(MANY):
        folders.prompt(f"p{number}", f"Number {number}")


def waits(folders: Folders, daemon: LoggedDaemon, sandbox: Sandbox, *words: str, requests: int = 1) -> None:
    """Wait for the hold: all prompts are there, nothing was sent, and ``check`` reports the same."""
    until(lambda: all(word in str(holds(folders)) for word in words))
    assert [hold["kind"] for hold in holds(folders)] == ["disk"]
    until(lambda: len([name for name in folders.names("inbox") if name.endswith(".prompt.txt")]) == MANY)
    assert sandbox.report()["requests"] == requests
    result = command(folders, "check")
    assert result.returncode != 0
    text = " ".join(result.stdout.split())
    assert all(word in text for word in words), result.stdout
    assert daemon.process.poll() is None


def continues(folders: Folders, sandbox: Sandbox, *, before: int = 1) -> None:
    """Wait until every prompt was completed, once, and compare the ledger with the endpoint."""
    until(lambda: len(folders.finished()) == MANY + before, timeout=60)
    assert set(folders.finished().values()) == {"outbox"}
    until(lambda: holds(folders) == [])
    report = sandbox.report()
    assert report["requests"] == report["charged"] == MANY + before


def rows(path: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT source, outcome FROM attempts ORDER BY source").fetchall()


def lose_a_request(folders: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]) -> None:
    """Kill a daemon while a prompt is at the endpoint, and remove all that is left of it but the ledger."""
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(2, 20)
    daemon.process.kill()
    daemon.process.wait()
    sandbox.release()
    shutil.rmtree(folders.state / "answers")
    shutil.rmtree(folders.inbox / ".imagewatch")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_a_ledger_that_another_program_has_locked_holds_the_queue_until_it_is_free(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    with locked(ledger(used)):
        drop(used)
        waits(used, daemon, sandbox, "locked by another program")
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 1


def test_a_result_that_cannot_be_recorded_is_not_lost_and_nothing_else_is_sent_meanwhile(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    used.environ["IMAGEWATCH_LIMITS__CONCURRENCY"] = "1"
    daemon = run(used)
    sandbox.hold()
    drop(used)
    assert sandbox.wait_for_requests(2, 20)
    with locked(ledger(used)):
        sandbox.release()
        until(lambda: "locked by another program" in str(holds(used)))
        until(lambda: len(daemon.events("held")) == 1 and len(holds(used)) == 1)
        assert sandbox.report()["requests"] == 2
        assert list(used.finished()) == ["before"]
    continues(used, sandbox)


def test_the_status_is_still_written_while_the_ledger_is_locked(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    sandbox.hold()
    run(used)
    drop(used)
    assert sandbox.wait_for_requests(2, 20)
    with locked(ledger(used)):
        sandbox.release()
        until(lambda: "locked by another program" in str(holds(used)))
        for _ in range(3):
            before = holds(used)[0]["next_try_at"]
            until(lambda before=before: holds(used)[0]["next_try_at"] > before)


@pytest.mark.parametrize("when", ["while it runs", "before it starts", "before it starts, with its id"])
def test_a_ledger_that_was_deleted_holds_the_queue_until_it_is_there_again(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path, when: str
) -> None:
    kept = tmp_path / "kept.sqlite3"
    shutil.copyfile(ledger(used), kept)
    daemon = run(used) if when == "while it runs" else None
    for path in used.state.glob("ledger.sqlite3*"):
        path.unlink()
    if when == "before it starts, with its id":
        (used.state / "identity").unlink()
    daemon = daemon or run(used)
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing", "release --accept-new-ledger")
    shutil.copyfile(kept, tmp_path / "restored")
    (tmp_path / "restored").rename(ledger(used))
    if when == "before it starts, with its id":
        waits(used, daemon, sandbox, "was put here", "release --accept-new-ledger")
        assert command(used, "release", "--accept-new-ledger").returncode == 0
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert ("before.prompt.txt", "completed") in rows(ledger(used))


def test_a_ledger_that_is_restored_into_a_new_state_folder_holds_the_queue_until_a_person_accepts_it(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.sqlite3"
    shutil.copyfile(ledger(used), kept)
    shutil.rmtree(used.state)
    used.state.mkdir(mode=0o700)
    shutil.copyfile(kept, ledger(used))
    assert "was put here" in command(used, "check").stdout
    daemon = run(used)
    drop(used)
    waits(used, daemon, sandbox, "was put here", "release --accept-new-ledger")
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    continues(used, sandbox)
    assert daemon.stop() == 0
    run(used)
    until(lambda: holds(used) == [])


def test_a_ledger_that_is_renamed_back_from_a_new_state_folder_is_the_newest(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    ledger(used).unlink()
    (used.state / "identity").unlink()
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing", ".saved-1")
    (used.state / "ledger.sqlite3.saved-1").rename(ledger(used))
    continues(used, sandbox)


def test_a_ledger_that_is_deleted_while_in_use_is_saved_beside_its_place(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    ledger(used).unlink()
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing", "ledger.sqlite3.saved-1")
    (used.state / "ledger.sqlite3.saved-1").rename(ledger(used))
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 1


def test_a_ledger_that_was_moved_away_and_back_is_used_as_before(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(used)
    ledger(used).rename(tmp_path / "away")
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing")
    (tmp_path / "away").rename(ledger(used))
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 1


def test_another_state_folder_in_the_place_of_the_one_in_use_holds_the_queue_until_that_is_back(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    until((used.state / "status.json").exists)
    away, other = used.state.with_name("away"), used.state.with_name("other")
    os.rename(used.state, away)
    used.state.mkdir(0o700)
    drop(used)
    until(lambda: "the state folder was replaced" in str(daemon.events("held")))
    held = daemon.events("held")[-1]
    assert "the state folder was replaced" in held["reason"]
    assert "restart imagewatch" in held["next"]
    assert sandbox.report()["requests"] == 1
    os.rename(used.state, other)
    os.rename(away, used.state)
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 1


def test_a_hold_whose_cause_changes_is_logged_again_and_ends_with_it_though_nothing_waits(
    used: Folders, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    used.environ["IMAGEWATCH_INBOX__RESCAN_SECONDS"] = "86400"
    aside, away = tmp_path / "aside", used.outbox.with_name("away")
    ledger(used).rename(aside)
    daemon = run(used)
    until(lambda: "the ledger is missing" in str(daemon.events("held")))
    used.outbox.rename(away)
    until(lambda: f": {used.outbox}" in str(daemon.events("held")))
    until(lambda: f": {used.outbox}" in str(holds(used)))
    aside.rename(ledger(used))
    away.rename(used.outbox)
    until(lambda: holds(used) == [])
    daemon.wait_for("released")  # the log is read by a thread of this process
    assert [line["kind"] for line in daemon.events("released")] == ["disk"]
    assert daemon.stop() == 0


def test_a_saved_ledger_is_found_at_the_next_start_however_old_its_rows_are(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    """Then no status repeats them: it shows this month only."""
    with contextlib.closing(sqlite3.connect(ledger(used), isolation_level=None)) as database:
        past = ", ".join(f"{name} = {name} - 40 * 86400" for name in ("claimed_at", "sent_at", "answered_at"))
        database.execute(f"UPDATE attempts SET {past}")
    daemon = run(used)
    shutil.rmtree(used.state)
    used.state.mkdir(0o700)
    drop(used)
    until(lambda: "the ledger is missing" in str(daemon.events("held")))
    assert daemon.stop() == 0
    daemon = run(used)
    waits(used, daemon, sandbox, "the ledger is missing", "ledger.sqlite3.saved-1")
    assert daemon.stop() == 0


@pytest.mark.parametrize("running", [True, False])
def test_only_a_person_accepts_an_empty_ledger(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], running: bool
) -> None:
    daemon = run(used) if running else None
    for path in used.state.glob("ledger.sqlite3*"):
        path.unlink()
    drop(used)
    if daemon:
        waits(used, daemon, sandbox, "the ledger is missing")
    result = command(used, "release")
    assert (result.returncode, "--accept-new-ledger" in result.stderr) == (74, True)
    result = command(used, "release", "--accept-new-ledger")
    assert (result.returncode, "Caps, history" in result.stderr) == (0, True)
    daemon = daemon or run(used)
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY
    assert command(used, "release", "--accept-new-ledger").returncode == 64


@pytest.mark.parametrize("fault", ["deleted", "damaged"])
def test_once_uses_the_ledger_that_was_accepted_before_it_started(used: Folders, sandbox: Sandbox, fault: str) -> None:
    if fault == "damaged":
        damage(ledger(used), "attempts")
    else:
        for path in used.state.glob("ledger.sqlite3*"):
            path.unlink()
    drop(used)
    result = command(used, "history")
    assert (result.returncode, "release --accept-new-ledger" in result.stderr) == (74, True)
    assert "nothing was made" not in result.stderr
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    result = command(used, "once")
    assert result.returncode == 0, result.stderr
    continues(used, sandbox)


def test_a_foreign_ledger_in_the_place_of_the_own_one_is_named(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    other = Folders(tmp_path / "other", sandbox.base_url)
    (tmp_path / "other/state").mkdir()
    other.prompt("else", "Else")
    assert command(other, "once").returncode == 0
    ledger(used).rename(tmp_path / "own")
    shutil.copyfile(ledger(other), ledger(used))
    daemon = run(used)
    drop(used)
    waits(used, daemon, sandbox, "not the ledger that was here before", requests=2)
    (tmp_path / "own").rename(ledger(used))
    until(lambda: len(used.finished()) == MANY + 1, timeout=60)


def test_a_copy_from_before_the_newest_result_in_the_place_of_the_ledger_in_use_is_named(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(used)
    sandbox.hold()
    used.prompt("second", "Second")
    assert sandbox.wait_for_requests(2, 20)
    with (
        contextlib.closing(sqlite3.connect(ledger(used))) as source,
        contextlib.closing(sqlite3.connect(tmp_path / "copy")) as copy,
    ):
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
    sandbox.release()
    until(lambda: "second" in used.finished() and used.leftovers() == [])
    (tmp_path / "copy").rename(ledger(used))
    drop(used)
    until(lambda: "lacks the newest requests" in str(holds(used)))
    (used.state / "ledger.sqlite3.saved-1").rename(ledger(used))
    continues(used, sandbox, before=2)
    assert daemon.stop() == 0
    assert rows(ledger(used)).count(("second.prompt.txt", "completed")) == 1


def test_an_older_copy_that_is_put_in_the_place_of_the_ledger_in_use_is_named(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    old = tmp_path / "old.sqlite3"
    shutil.copyfile(ledger(used), old)
    daemon = run(used)
    used.prompt("second", "Second")
    until(lambda: len(used.finished()) == 2)
    until(lambda: used.leftovers() == [])
    ledger(used).rename(tmp_path / "newer")
    old.rename(ledger(used))
    drop(used)
    until(lambda: "lacks the newest requests" in str(holds(used)))
    assert sandbox.report()["requests"] == 2
    (tmp_path / "newer").rename(ledger(used))
    continues(used, sandbox, before=2)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 2


def damage(path: Path, name: str) -> None:
    """Overwrite the first page of a table or an index."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = database.execute("PRAGMA page_size").fetchone()[0]
        page = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


@pytest.mark.parametrize("name", ["attempts_by_source", "attempts_by_claim", "attempts_by_time", "attempts"])
def test_a_damaged_page_of_the_ledger_holds_the_queue_until_the_ledger_is_restored(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path, name: str
) -> None:
    shutil.copyfile(ledger(used), tmp_path / "backup")
    damage(ledger(used), name)
    daemon = run(used)
    drop(used)
    waits(used, daemon, sandbox, "it is damaged", "release --accept-new-ledger")
    (tmp_path / "backup").rename(ledger(used))
    continues(used, sandbox)


def test_a_damaged_ledger_is_kept_when_an_empty_one_is_accepted(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    damage(ledger(used), "attempts")
    size = ledger(used).stat().st_size
    used.environ["IMAGEWATCH_INBOX__RESCAN_SECONDS"] = "5"  # what the damaged ledger had claimed is found by a scan
    daemon = run(used)
    drop(used)
    waits(used, daemon, sandbox, "it is damaged")
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    continues(used, sandbox)
    kept = (used.state / "ledger.sqlite3.damaged-1").read_bytes()
    assert (len(kept), b"\xff" * 4096 in kept) == (size, True)
    assert daemon.stop() == 0


def test_check_does_not_ask_again_for_what_was_accepted_while_no_daemon_runs(used: Folders) -> None:
    damage(ledger(used), "attempts")
    assert command(used, "check").returncode == 78
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    result = command(used, "check")
    assert (result.returncode, "the daemon accepts it when it starts" in result.stdout) == (0, True)


def test_once_reports_why_it_did_nothing_if_the_ledger_cannot_be_used(used: Folders, sandbox: Sandbox) -> None:
    ledger(used).unlink()
    drop(used)
    done = command(used, "once", "--json")
    assert done.returncode == 74
    page = json.loads(done.stdout)
    assert "the ledger is missing" in str(page), page
    assert sandbox.report()["requests"] == 1


def test_a_request_of_which_only_the_ledger_is_left_may_have_been_charged(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    lose_a_request(used, sandbox, run)
    used.prompt("dog", "A dog")
    run(used)
    until(lambda: used.finished() == {"before": "outbox", "cat": "errors", "dog": "outbox"})
    (found,) = [line for line in command(used, "history").stdout.splitlines() if line.endswith(" cat")]
    assert " unknown " in found
    assert used.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 3


def test_nothing_is_kept_of_a_request_that_was_not_sent(used: Folders, sandbox: Sandbox) -> None:
    used.environ["LETTA_BASE_URL"] = "http://127.0.0.1:9"
    used.prompt("cat", "A cat")
    assert command(used, "once").returncode == 69
    assert rows(ledger(used)) == [("before.prompt.txt", "completed")]
    assert (used.leftovers(), used.names("inbox")) == ([], ["cat.prompt.txt"])


def test_a_damaged_text_in_the_ledger_does_not_end_the_daemon(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    with contextlib.closing(sqlite3.connect(ledger(used))) as database:
        damaged = "price_kind = CAST(X'FF80' AS TEXT), provider = CAST(X'FF80' AS TEXT)"
        database.execute(f"UPDATE attempts SET {damaged}")
        database.commit()
    used.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "100000"
    daemon = run(used)
    drop(used)
    continues(used, sandbox)
    assert command(used, "history").returncode == 0
    assert daemon.stop() == 0


def test_the_newest_rows_outlive_the_file_beside_the_ledger_that_has_them(
    used: Folders, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    used.prompt("cat", "A cat")
    until(lambda: "cat" in used.finished() and used.leftovers() == [])
    ledger(used).with_name("ledger.sqlite3-wal").unlink()
    used.prompt("dog", "A dog")
    until(lambda: "dog" in used.finished() and used.leftovers() == [])
    daemon.process.kill()
    daemon.process.wait()
    assert [source.partition(".")[0] for source, _ in rows(ledger(used))] == ["before", "cat", "dog"]


def test_nothing_is_sent_when_the_file_beside_the_ledger_was_cut_off_while_it_is_used(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    used.prompt("cat", "A cat")
    until(lambda: "cat" in used.finished() and used.leftovers() == [])
    os.truncate(ledger(used).with_name("ledger.sqlite3-wal"), 0)
    used.prompt("dog", "A dog")
    until(lambda: "it is damaged or older now" in str(holds(used)))
    assert sandbox.report()["requests"] == 2
    assert "saved-1" in str(holds(used))
    ledger(used).with_name("ledger.sqlite3.saved-1").rename(ledger(used))
    until(lambda: "dog" in used.finished() and used.leftovers() == [])
    assert daemon.stop() == 0
    assert [source.partition(".")[0] for source, _ in rows(ledger(used))] == ["before", "cat", "dog"]


@pytest.mark.parametrize("content", [b"", b"no database " * 1000, None])
def test_a_ledger_that_is_replaced_by_something_else_is_saved_beside_its_place(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path, content: bytes | None
) -> None:
    other = tmp_path / "other"
    shutil.copyfile(ledger(used), other)
    if content is not None:
        other.write_bytes(content)
    daemon = run(used)
    used.prompt("second", "Second")
    until(lambda: "second" in used.finished() and used.leftovers() == [])
    other.rename(ledger(used))
    drop(used)
    until(lambda: "ledger.sqlite3.saved-1" in str(holds(used)))
    assert sandbox.report()["requests"] == 2
    (used.state / "ledger.sqlite3.saved-1").rename(ledger(used))
    continues(used, sandbox, before=2)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 2


def test_a_ledger_that_was_moved_away_and_back_is_saved_again_when_it_is_deleted(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(used)
    ledger(used).rename(tmp_path / "away")
    used.prompt("second", "Second")
    until(lambda: "ledger.sqlite3.saved-1" in str(holds(used)))
    (tmp_path / "away").rename(ledger(used))
    until(lambda: "second" in used.finished() and holds(used) == [])
    until(lambda: used.leftovers() == [])
    ledger(used).unlink()
    drop(used)
    until(lambda: "ledger.sqlite3.saved-2" in str(holds(used)))
    (used.state / "ledger.sqlite3.saved-2").rename(ledger(used))
    continues(used, sandbox, before=2)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 2


def test_a_lost_request_is_closed_in_the_ledger_also_where_no_prompt_waits(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    lose_a_request(used, sandbox, run)
    assert command(used, "once").returncode == 1
    assert ("cat.prompt.txt", "unknown") in rows(ledger(used))


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_ledger_that_is_moved_away_while_the_daemon_stops_has_all_rows_when_it_is_back(
    used: Folders, run: Callable[..., LoggedDaemon], tmp_path: Path, is_noticed: bool
) -> None:
    daemon = run(used)
    used.prompt("cat", "A cat")
    until(lambda: "cat" in used.finished() and used.leftovers() == [])
    ledger(used).rename(tmp_path / "away")
    if is_noticed:
        used.prompt("dog", "A dog")
        until(lambda: "the ledger is missing" in str(holds(used)))
    assert daemon.stop() == 0
    (tmp_path / "away").rename(ledger(used))
    assert command(used, "once").returncode == 0
    names = [source.partition(".")[0] for source, _ in rows(ledger(used))]
    assert names == ["before", "cat", *(["dog"] if is_noticed else [])]


def test_a_prompt_that_comes_again_after_its_request_was_lost_gets_an_error_file(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(used)
    sandbox.hold()
    os.utime(used.prompt("../cat", "A cat"), (1e9, 1e9))
    (used.root / "cat.prompt.txt").rename(used.inbox / "cat.prompt.txt")
    assert sandbox.wait_for_requests(2, 20)
    daemon.process.kill()
    daemon.process.wait()
    sandbox.release()
    shutil.rmtree(used.inbox / ".imagewatch")
    os.utime(used.prompt("../cat", "A cat"), (1e9, 1e9))
    (used.root / "cat.prompt.txt").rename(used.inbox / "cat.prompt.txt")
    assert command(used, "once").returncode == 1
    assert used.finished()["cat"] == "errors"
    assert used.error("cat")["charged"] == "unknown"
    assert used.names("inbox") == []
    assert sandbox.report()["requests"] == 2


@pytest.mark.parametrize("running", [True, False])
def test_a_ledger_of_a_newer_version_holds_the_queue_and_is_not_changed(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path, running: bool
) -> None:
    newer = tmp_path / "newer"
    shutil.copyfile(ledger(used), newer)
    with contextlib.closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA user_version = 99")
    content = newer.read_bytes()
    daemon = run(used) if running else None
    own = ledger(used).rename(tmp_path / "own")
    shutil.copyfile(newer, ledger(used))
    daemon = daemon or run(used)
    drop(used)
    waits(used, daemon, sandbox, "written by a newer imagewatch (format 99)", "run the newer version")
    assert ledger(used).read_bytes() == content
    own.rename(ledger(used))
    continues(used, sandbox)
    assert daemon.stop() == 0
    assert len(rows(ledger(used))) == MANY + 1


@pytest.mark.parametrize("remedy", ["a backup", "an empty ledger"])
@pytest.mark.parametrize("fault", ["damaged", "deleted"])
def test_a_ledger_that_is_lost_while_requests_are_in_flight_costs_no_image_and_no_second_charge(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path, fault: str, remedy: str
) -> None:
    shutil.copyfile(ledger(used), tmp_path / "backup")
    used.environ["IMAGEWATCH_LIMITS__CONCURRENCY"] = "4"
    daemon = run(used)
    sandbox.hold()
    drop(used)
    assert sandbox.wait_for_requests(5, 20)
    if fault == "damaged":
        damage(ledger(used), "attempts")
    else:
        ledger(used).unlink()
    sandbox.release()
    waits(used, daemon, sandbox, "damaged" if fault == "damaged" else "missing", requests=5)
    assert used.finished() == {"before": "outbox"}
    if remedy == "a backup":
        (tmp_path / "backup").rename(ledger(used))
        until(lambda: "lacks the newest requests" in str(holds(used)))
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    continues(used, sandbox)
    until(lambda: used.leftovers() == [])
    assert daemon.stop() == 0
    before = ["before.prompt.txt"] if remedy == "a backup" else []
    assert [source for source, _ in rows(ledger(used))] == sorted([*before, *(f"p{n}.prompt.txt" for n in range(MANY))])


def copied(folders: Folders, copy: Path) -> None:
    """Copy the ledger as a backup does."""
    with (
        contextlib.closing(sqlite3.connect(ledger(folders))) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def test_an_older_copy_is_known_also_after_a_daemon_that_lost_its_ledger_was_killed(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(used)
    copied(used, tmp_path / "backup")
    used.prompt("second", "Second")
    until(lambda: "second" in used.finished() and used.leftovers() == [])
    for path in used.state.glob("ledger.sqlite3*"):
        path.unlink()
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing", requests=2)
    daemon.process.kill()
    daemon.process.wait()
    for path in used.state.glob("ledger.sqlite3-*"):
        path.unlink()
    (tmp_path / "backup").rename(ledger(used))
    daemon = run(used)
    waits(used, daemon, sandbox, "an older copy of the ledger", "release --accept-new-ledger", requests=2)
    (used.state / "ledger.sqlite3.saved-1").rename(ledger(used))
    continues(used, sandbox, before=2)
    assert daemon.stop() == 0


def test_a_job_that_only_an_accepted_older_copy_has_open_is_ended_and_its_name_is_free(
    used: Folders, sandbox: Sandbox, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(used)
    sandbox.hold()
    used.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(2, 20)
    copied(used, tmp_path / "backup")
    sandbox.release()
    until(lambda: "cat" in used.finished() and used.leftovers() == [])
    ledger(used).unlink()
    drop(used)
    waits(used, daemon, sandbox, "the ledger is missing", requests=2)
    (tmp_path / "backup").rename(ledger(used))
    until(lambda: "lacks the newest requests" in str(holds(used)))
    assert command(used, "release", "--accept-new-ledger").returncode == 0
    used.prompt("cat", "Another cat")
    until(lambda: len(list(used.outbox.glob("cat*.receipt.toml"))) == 2)
    until(lambda: len(list(used.outbox.glob("*.receipt.toml"))) == MANY + 3 and holds(used) == [])
    assert used.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == MANY + 3
    assert daemon.stop() == 0


# What follows a commit fails: by a clock that the test moves


class Still:
    """The parts of a daemon whose loop does not run."""

    def __init__(self, folders: Folders) -> None:
        self.now = 1000.0
        config = folders.config()
        self.parts = Parts(config, folders.environ, Disk(), Holds(), time.time, lambda: self.now)
        self.parts.begin()
        self.parts.configure(config)
        arrivals, recovery = Arrivals(self.parts), Recovery(self.parts)
        self.results = Results(self.parts, lambda _: None)
        self.dispatch = Dispatch(self.parts, arrivals, recovery)
        self.instructions = Instructions(self.parts, arrivals, self.results, recovery)

    def step(self) -> None:
        """Do what the daemon does now, wait until it is done, and let a minute pass."""
        self.parts.intake.scanner.soon()
        self.parts.intake.scan(self.parts.team.taken())
        self.dispatch.run(is_draining=False)
        while self.parts.jobs.any_at_work:
            for message in self.parts.mailbox.wait(PATIENCE):
                if isinstance(message, Finished):
                    self.results.take(message)
        self.now += 60


@pytest.fixture
def still(folders: Folders) -> Iterator[Still]:
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "1000"
    made = Still(folders)
    yield made
    made.dispatch.pool.shutdown()
    made.parts.close()


def test_a_prompt_is_completed_though_the_ledger_failed_after_its_job_was_recorded(
    folders: Folders, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure = sqlite.SqliteDatabase._ensure
    failed: list[Exception] = []

    def failing(self: Any, *, is_ours: bool = False) -> None:
        if is_ours and not failed and self._connection.execute("SELECT 1 FROM jobs").fetchone():
            failed.append(OSError(5, "Input/output error", self.path))
            raise failed[0]
        ensure(self, is_ours=is_ours)

    monkeypatch.setattr(sqlite.SqliteDatabase, "_ensure", failing)
    folders.prompt("cat", "A cat")
    for _ in range(4):
        still.step()
    assert failed
    assert folders.finished() == {"cat": "outbox"}


def test_a_saved_response_is_read_again_though_the_ledger_failed_after_that_was_recorded(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, job = still.parts.journal, "0" * 16
    journal.claim(Claim(job=job, folder="", stem="cat", at=1.0))
    journal.keep(job)
    journal.requests.retry(job)
    recorded = sqlite.recorded
    failed: list[sqlite3.Error] = []

    def failing(connection: sqlite3.Connection) -> int:
        if not failed and connection.execute("SELECT state FROM jobs").fetchone()[0] == "reopened":
            failed.append(sqlite3.OperationalError("disk I/O error"))
            failed[0].sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise failed[0]
        return recorded(connection)

    monkeypatch.setattr(sqlite, "recorded", failing)
    for _ in range(2):
        still.instructions.follow()
    assert failed
    assert job in still.parts.jobs
