"""``imagewatch migrate``: the journal of a stopped daemon goes into a real PostgreSQL and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import TESTS, Folders, Running, command, until
from support.postgres import missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.daemon import LoggedDaemon
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
TABLES = ("jobs", "attempts", "requests", "events", "holds", "announced", "redeliveries", "sums", "folder_sums")


class Moving:
    """A daemon that can use its own ledger or the shared database."""

    def __init__(self, root: Path, base_url: str, uri: str, server: Server, **settings: str) -> None:
        self.folders = Folders(root, base_url, **settings)
        self.alone = dict(self.folders.environ)
        self.shared = {"IMAGEWATCH_SHARED__DATABASE": uri, "IMAGEWATCH_SHARED__DURABILITY": "single"}
        self.shared["IMAGEWATCH_SHARED__INSTANCE"] = settings.get("shared__instance", "one")
        self.server, self.name = server, uri.rpartition("/")[2]
        self.run("db", "init")

    def run(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command with [shared]."""
        self.use(shared=True)
        done = command(self.folders, *arguments)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def use(self, *, shared: bool) -> Folders:
        self.folders.environ = {**self.alone, **(self.shared if shared else {})}
        return self.folders

    def once(self, *, shared: bool) -> int:
        daemon = Running(self.use(shared=shared), "once")
        return daemon.wait(60)

    def ledger(self) -> Path:
        return self.folders.state / "ledger.sqlite3"

    def in_file(self, question: str, path: Path | None = None) -> list[Any]:
        with contextlib.closing(sqlite3.connect(path or self.ledger())) as file:
            return file.execute(question).fetchall()

    def in_database(self, question: str) -> list[Any]:
        return self.server.psql(question, self.name)


@pytest.fixture
def mover(tmp_path: Path, sandbox: Sandbox, database: str, postgres: Server) -> Callable[..., Moving]:
    def made(name: str = "one", **settings: str) -> Moving:
        return Moving(tmp_path / name, sandbox.base_url, database, postgres, shared__instance=name, **settings)

    return made


def killed_in_flight(moving: Moving, sandbox: Sandbox, *, shared: bool) -> None:
    """Kill the daemon while a request is in flight."""
    before = sandbox.report()["requests"]
    moving.use(shared=shared).prompt("flying", "a bird [sandbox: slow 600]")
    daemon = Running(moving.folders, "run")
    try:
        until(lambda: sandbox.report()["requests"] == before + 1)
    finally:
        daemon.process.send_signal(signal.SIGKILL)
        daemon.wait()


def test_the_whole_journal_goes_into_the_database_and_comes_back(
    mover: Callable[..., Moving], sandbox: Sandbox
) -> None:
    moving = mover()
    folders = moving.use(shared=False)
    folders.prompt("cat", "a cat")
    folders.prompt("sub/dog", "a dog")
    folders.prompt("empty", "nothing in it [sandbox: no-images]")
    folders.prompt("bad", "---\nquality: hgih\n---\na bad one")
    assert moving.once(shared=False) == 1
    assert command(folders, "hold", "lunch").returncode == 0
    counts = {table: moving.in_file(f"SELECT count(*) FROM {table}") for table in TABLES}
    attempts = moving.in_file("SELECT job, attempt, outcome, credits, source FROM attempts ORDER BY 1, 2")

    assert "attempts 4" in moving.run("migrate", "--to", "postgresql").stdout
    assert not moving.ledger().exists()
    for table in TABLES:
        assert moving.in_database(f"SELECT count(*) FROM imagewatch.{table}") == counts[table], table
    there = moving.in_database("SELECT job, attempt, outcome, credits, source FROM imagewatch.attempts ORDER BY 1, 2")
    assert there == attempts
    folders.prompt("cow", "a cow")
    assert moving.once(shared=True) == 69  # still on hold
    moving.run("release")
    assert moving.once(shared=True) == 0

    assert "attempts 5" in moving.run("migrate", "--to", "sqlite").stdout
    assert len(moving.in_file("SELECT * FROM attempts")) == 5
    assert moving.in_database("SELECT count(*) FROM imagewatch.jobs") == [(0,)]
    assert moving.in_database("SELECT count(*) FROM imagewatch.attempts") == [(5,)]
    folders.prompt("pig", "a pig")
    assert moving.once(shared=False) == 0

    assert "Attempts that were there already: 5." in moving.run("migrate", "--to", "postgresql").stdout
    assert moving.in_database("SELECT count(*) FROM imagewatch.attempts") == [(6,)]
    assert moving.once(shared=True) == 0
    assert sandbox.report()["requests"] == 5  # the bad one was not sent


def test_what_was_in_flight_is_an_unknown_charge_after_each_move_and_is_never_sent_again(
    mover: Callable[..., Moving], sandbox: Sandbox
) -> None:
    moving = mover()
    killed_in_flight(moving, sandbox, shared=False)
    moving.run("migrate", "--to", "postgresql")
    moving.once(shared=True)
    assert moving.folders.error("flying")["charged"] == "unknown"
    (moving.folders.errors / "flying.prompt.txt").unlink()
    killed_in_flight(moving, sandbox, shared=True)
    moving.run("migrate", "--to", "sqlite")
    assert moving.in_database("SELECT DISTINCT outcome FROM imagewatch.attempts") == [("unknown",)]
    moving.once(shared=False)
    assert moving.in_file("SELECT outcome FROM attempts") == [("unknown",), ("unknown",)]
    assert sandbox.report()["requests"] == 2
    moving.run("migrate", "--to", "postgresql")
    assert moving.in_database("SELECT count(*) FROM imagewatch.attempts WHERE outcome = 'unknown'") == [(2,)]


def test_a_kept_response_is_read_again_after_the_move(mover: Callable[..., Moving], sandbox: Sandbox) -> None:
    moving = mover()
    moving.use(shared=False).prompt("cat", "a cat [sandbox: no-images]")
    moving.once(shared=False)
    assert moving.in_file("SELECT state FROM jobs") == [("kept",)]
    moving.run("migrate", "--to", "postgresql")
    assert moving.in_database("SELECT state FROM imagewatch.jobs") == [("kept",)]
    moving.run("retry", "cat", code=None)
    moving.once(shared=True)
    assert sandbox.report()["requests"] == 1


def test_a_redelivered_prompt_is_recognized_after_both_moves(mover: Callable[..., Moving], sandbox: Sandbox) -> None:
    moving = mover()
    path = moving.use(shared=False).prompt("cat", "a cat")
    status = path.stat()
    assert moving.once(shared=False) == 0
    for target, shared in (("postgresql", True), ("sqlite", False)):
        moving.run("migrate", "--to", target)
        again = moving.folders.inbox / ".again"
        again.write_text("a cat")
        os.utime(again, ns=(status.st_mtime_ns, status.st_mtime_ns))
        again.rename(path)
        moving.once(shared=shared)
        assert not path.exists()
    assert sandbox.report()["requests"] == 1


def test_the_caps_of_a_daemon_that_leaves_count_what_the_account_has_spent(
    mover: Callable[..., Moving], sandbox: Sandbox
) -> None:
    one, other = mover("one"), mover("other")
    for moving in (one, other):
        moving.use(shared=True).prompt("cat", "a cat")
        assert moving.once(shared=True) == 0
    one.run("migrate", "--to", "sqlite")
    spent = one.in_file("SELECT sum(credits) FROM sums")
    assert spent == other.in_database("SELECT sum(credits) FROM imagewatch.sums")
    assert one.in_file("SELECT count(*) FROM jobs") == [(1,)]
    assert sandbox.report()["requests"] == 2


def test_a_hold_of_the_account_by_a_person_lasts_for_a_daemon_that_leaves(
    mover: Callable[..., Moving], sandbox: Sandbox
) -> None:
    moving = mover()
    assert moving.once(shared=True) == 0
    moving.run("hold", "--account", "audit")
    moving.run("migrate", "--to", "sqlite")
    moving.use(shared=False).prompt("cat", "a cat")
    assert moving.once(shared=False) == 69
    assert sandbox.report()["requests"] == 0
    assert command(moving.folders, "release").returncode == 0
    assert moving.once(shared=False) == 0
    assert sandbox.report()["requests"] == 1


def test_values_that_the_database_cannot_hold_are_replaced_and_counted(mover: Callable[..., Moving]) -> None:
    moving = mover()
    moving.use(shared=False).prompt("cat", "a cat")
    assert moving.once(shared=False) == 0
    with contextlib.closing(sqlite3.connect(moving.ledger())) as file, file:
        file.execute("UPDATE attempts SET message = 'a' || char(0) || 'b', model = CAST(x'ff41' AS TEXT), got = 1e300")
    found = json.loads(moving.run("migrate", "--to", "postgresql", "--json").stdout)
    assert found["replaced_values"] == 3
    assert moving.in_database("SELECT message, model, got FROM imagewatch.attempts") == [
        ("a\ufffdb", "\\udcffA", 2**63 - 1)
    ]


def test_a_daemon_that_was_in_a_common_inbox_leaves_its_jobs_there(
    mover: Callable[..., Moving], run: Callable[..., LoggedDaemon]
) -> None:
    moving = mover()
    moving.shared["IMAGEWATCH_SHARED__INBOX"] = "common"
    daemon = run(moving.use(shared=True))
    moving.folders.prompt("cat", "a cat")
    until(lambda: moving.folders.names("archive") == ["cat.prompt.txt"] and not moving.folders.names("inbox"))
    assert daemon.stop() == 0
    del moving.shared["IMAGEWATCH_SHARED__INBOX"]
    (moving.folders.inbox / ".imagewatch/lock").write_bytes(b"")
    moving.in_database("UPDATE imagewatch.jobs SET state = 'open'")  # as if it were not over yet
    refused = moving.run("migrate", "--to", "sqlite", code=74).stderr
    assert "this daemon still has 1 job of a common inbox" in refused
    assert "set shared.inbox again" in refused
    assert usable(moving) == {True}
    moving.in_database("UPDATE imagewatch.jobs SET holder = 'two' WHERE inbox = 'common'")
    moving.run("migrate", "--to", "sqlite")
    there = "SELECT inbox, instance, holder, state FROM imagewatch.jobs"
    assert moving.in_database(there) == [("common", "one", "two", "open")]
    assert moving.in_file("SELECT count(*) FROM jobs") == [(0,)]
    assert "Attempts that were there already: 1." in moving.run("migrate", "--to", "postgresql").stdout
    assert moving.in_database(there) == [("common", "one", "two", "open")]


HASTY = """
from imagewatch.journal.postgres import session
session._SILENT_SECONDS = 0.3
from imagewatch.commands.main import main
main()
"""
"""The command, with less patience for a statement than the server takes here."""
SLOW = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT ON imagewatch.jobs FOR EACH ROW EXECUTE FUNCTION wait();
"""


def test_a_large_journal_may_take_its_time(mover: Callable[..., Moving]) -> None:
    moving = mover()
    moving.use(shared=False).prompt("cat", "a cat")
    assert moving.once(shared=False) == 0
    moving.in_database(SLOW)
    done = migrated(moving, HASTY, "migrate", "--to", "postgresql")
    assert done.returncode == 0, done.stderr
    assert moving.in_database("SELECT count(*) FROM imagewatch.jobs") == [(1,)]


def test_it_needs_the_daemon_stopped(mover: Callable[..., Moving]) -> None:
    moving = mover()
    daemon = Running(moving.use(shared=False), "run")
    try:
        until((moving.folders.state / "status.json").exists)
        assert moving.run("migrate", "--to", "postgresql", code=75).stdout == ""
    finally:
        moving.use(shared=False)
        daemon.stop()
    assert not (moving.folders.state / "shared").exists()


def test_each_reason_to_refuse_names_the_next_action_and_changes_nothing(mover: Callable[..., Moving]) -> None:
    moving = mover()
    (moving.folders.state).mkdir()
    assert "there is no ledger" in moving.run("migrate", "--to", "postgresql", code=74).stderr
    assert "is not in a shared database" in moving.run("migrate", "--to", "sqlite", code=74).stderr
    moving.use(shared=False).prompt("cat", "a cat")
    assert moving.once(shared=False) == 0
    moving.use(shared=False)
    done = command(moving.folders, "migrate", "--to", "postgresql")
    assert done.returncode == 78
    assert "shared.database: is not set" in done.stderr
    moving.shared["IMAGEWATCH_SHARED__INBOX"] = "common"
    for target in ("postgresql", "sqlite"):
        assert "other daemons have jobs of this inbox" in moving.run("migrate", "--to", target, code=64).stderr
    del moving.shared["IMAGEWATCH_SHARED__INBOX"]

    other = mover("other")
    other.use(shared=True).prompt("dog", "a dog")
    assert other.once(shared=True) == 0
    moving.shared["IMAGEWATCH_SHARED__INSTANCE"] = "other"
    assert "has a daemon with the name other" in moving.run("migrate", "--to", "postgresql", code=74).stderr
    assert not (moving.folders.state / "shared").exists()
    assert moving.once(shared=False) == 0
    moving.shared["IMAGEWATCH_SHARED__INSTANCE"] = "one"

    content = moving.ledger().read_bytes()
    moving.ledger().write_bytes(content[:4096] + b"\xff" * 4096 + content[8192:])
    done = moving.run("migrate", "--to", "postgresql", code=74)
    assert "damaged" in done.stderr
    moving.ledger().write_bytes(content)
    with contextlib.closing(sqlite3.connect(moving.ledger())) as file:
        file.execute("PRAGMA user_version = 99")
    assert "newer imagewatch" in moving.run("migrate", "--to", "postgresql", code=74).stderr
    moving.shared["IMAGEWATCH_SHARED__DATABASE"] = "postgresql://127.0.0.1:1/none"
    with contextlib.closing(sqlite3.connect(moving.ledger())) as file:
        file.execute("PRAGMA user_version = 5")
    assert "cannot be reached" in moving.run("migrate", "--to", "postgresql", code=69).stderr
    assert moving.once(shared=False) == 0


RUNNER = """
import os, signal, sys
from imagewatch.commands.main import main
from imagewatch.journal.postgres.session import Session
from imagewatch.system.disk import Disk

left = int(sys.argv.pop(1))

def counted(kind, name):
    real = getattr(kind, name)
    def act(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **options)
    setattr(kind, name, act)

for name in ("write", "rename", "sync_folder", "unlink"):
    counted(Disk, name)
counted(Session, "commit")
main()
"""
"""The command, killed before its act of that number on the disk or in the database."""


def migrated(moving: Moving, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a script."""
    moving.use(shared=True)
    environ = {"PATH": os.environ["PATH"], "HOME": str(moving.folders.root), "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environ | moving.folders.environ,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


def migrate_killed(moving: Moving, target: str, number: int) -> int:
    return migrated(moving, RUNNER, str(number), "migrate", "--to", target).returncode


def usable(moving: Moving) -> set[bool]:
    """Which of both kinds of journal a daemon may use now: that of the shared database (True), the ledger (False)."""
    return {shared for shared in (True, False) if moving.once(shared=shared) not in {69, 74, 78}}


@pytest.mark.parametrize("target", ["postgresql", "sqlite"])
def test_a_move_that_is_killed_anywhere_never_leaves_two_journals_and_is_finished_when_run_again(
    mover: Callable[..., Moving], sandbox: Sandbox, target: str
) -> None:
    there = target == "postgresql"
    moving = mover()
    moving.use(shared=not there).prompt("cat", "a cat")
    assert moving.once(shared=not there) == 0
    killed_in_flight(moving, sandbox, shared=not there)
    ends = []
    for number in range(100):
        code = migrate_killed(moving, target, number)
        may = usable(moving) if number % 3 == 0 or code == 0 else set()
        assert len(may) < 2
        if code == 0:
            assert may == {there}
            break
        assert code == -signal.SIGKILL
        if number and may == {there}:  # the last act was done
            break
        if may:
            assert may == {not there}
        ends.append(may)
        moving.run("migrate", "--to", target, code=None)
        assert usable(moving) == {there}
        moving.run("migrate", "--to", "sqlite" if there else "postgresql")
    assert len(ends) > 5
    assert set() in ends
    assert moving.folders.error("flying")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 2
