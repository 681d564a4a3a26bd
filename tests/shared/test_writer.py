"""What a daemon does if its connections, its threads or its rows in the shared database are not as they were."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs
from support.daemon import PATIENCE, until

from imagewatch.system.errors import DatabaseError
from shared.test_lost_commits import claim, member, row, spend

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.postgres import Server

    from imagewatch.journal.journal import Journal

    Made = Callable[..., Journal]

__all__ = ["member"]
SECRET = "INSERT INTO meta (name, value) VALUES ('test', 'undone')"


def registered(journal: Journal) -> Journal:
    """Let a daemon start."""
    journal.file.register("host", "/srv/inbox", "place", 60.0)  # type: ignore[attr-defined]
    return journal


def test_a_writer_that_cannot_be_started_is_an_error_with_a_next_step_and_the_next_change_starts_it(
    database: str, member: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, start = member(database), threading.Thread.start

    def no_more(self: threading.Thread) -> None:
        if self.name == "database":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as changed:
        changed.setattr(threading.Thread, "start", no_more)
        with pytest.raises(DatabaseError, match="can't start new thread") as caught:
            spend(journal, row())
        assert "TasksMax=" in caught.value.hint
    assert journal.job("a") is None
    assert spend(journal, row("b")) is None
    assert [one["job"] for one in journal.ledger.rows()] == ["b"], "what failed is not written later"


def test_what_was_not_committed_because_of_a_bug_is_not_committed_with_the_next_change(
    database: str, postgres: Server, member: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imagewatch.journal.postgres.session import Session  # noqa: PLC0415  psycopg may be missing

    def full(self: Session, *given: Any) -> None:
        raise MemoryError

    journal = member(database)
    journal.require(prove=True)
    with monkeypatch.context() as changed:
        changed.setattr(Session, "commit", full)
        with pytest.raises(MemoryError):
            journal.file.change(lambda one: one.execute(SECRET))
    journal.require(prove=True)
    question = "SELECT count(*) FROM imagewatch.meta WHERE name = 'test'"
    assert postgres.psql(question, database.rpartition("/")[2]) == [(0,)]


def test_a_change_right_after_the_close_keeps_its_connection(
    database: str, member: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imagewatch.journal.postgres import database as module  # noqa: PLC0415  psycopg may be missing

    journal = member(database, patience=20.0)
    journal.require(prove=True)
    closing, may_close, closed, begun = (threading.Event() for _ in range(4))
    close = module.PostgresDatabase._close_writer

    def slow(self: module.PostgresDatabase) -> None:
        closing.set()
        may_close.wait(PATIENCE)
        close(self)
        closed.set()

    def act(connection: Any) -> int:
        begun.set()
        assert closed.wait(PATIENCE)
        return int(connection.execute("SELECT 1 AS one").fetchone()["one"])

    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(module.PostgresDatabase, "_close_writer", slow)
    with ThreadPoolExecutor(1) as pool:
        journal.close()
        assert closing.wait(PATIENCE)
        answer = pool.submit(journal.file.change, act)
        begun.wait(0.5)  # it does not begin before the connection of the earlier thread is closed
        may_close.set()
        assert answer.result(PATIENCE) == 1


def test_a_bug_in_what_a_daemon_does_regularly_is_logged_and_it_continues_to_report_that_it_runs(
    database: str, postgres: Server, member: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagewatch.journal.postgres.presence._RETRY_SECONDS", 0.02)
    journal, bugs = registered(member(database)), [ValueError("a bug")]

    def tick() -> None:
        if bugs:
            raise bugs.pop()

    with capture_logs() as logged:
        journal.file.watch(lambda: ('{"seen": 1}', 1), tick, lambda: None)  # type: ignore[attr-defined]
        question = "SELECT status FROM imagewatch.instances"
        until(lambda: postgres.psql(question, database.rpartition("/")[2]) == [('{"seen": 1}',)])
    assert [(one["event"], one["exc_info"]) for one in logged] == [("internal_error", True)]


@pytest.mark.parametrize(
    "change", ["DELETE FROM imagewatch.instances", "UPDATE imagewatch.instances SET incarnation = 0"]
)
def test_a_database_without_the_latest_start_of_a_daemon_is_an_earlier_copy_and_not_another_daemon(
    database: str, postgres: Server, member: Made, change: str
) -> None:
    journal = registered(member(database))
    postgres.psql(change, database.rpartition("/")[2])
    with pytest.raises(DatabaseError, match="lacks the latest start of this daemon") as caught:
        spend(journal, row())
    assert "imagewatch db recover --yes" in caught.value.hint
    assert spend(registered(journal), row()) is None, "the next start is recorded"


def test_the_lease_of_a_job_that_is_taken_again_is_counted_from_before_its_commit(
    database: str, postgres: Server, member: Made
) -> None:
    journal, now = member(database, common="common"), [1000.0]
    common, change = journal.common, journal.file.change
    common._now = lambda: now[0]

    def slow(act: Any, **options: Any) -> Any:
        value = change(act, **options)
        now[0] += common.lease_seconds
        return value

    journal.open(claim("a"))
    assert [one.job for one in common.take(1)] == ["a"]
    journal.file.change = slow  # type: ignore[method-assign]
    for state, take_again in (("kept", common.reopen_kept), ("done", lambda job: common.unsent(job, 1, "a1"))):
        postgres.psql(f"UPDATE imagewatch.jobs SET state = '{state}', decision = '{{}}'", database.rpartition("/")[2])
        if state == "done":
            journal.record(row(outcome="unknown"))
        assert take_again("a")
        assert (common.epoch("a") > 1, common.is_sure("a")) == (True, False), state
