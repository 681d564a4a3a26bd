"""Each precaution of the shared database is needed: without it, a test of it fails."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from support.daemon import PATIENCE, until

from imagewatch.config.schema import Limits
from imagewatch.system.errors import DatabaseError, SpoolError, UncertainError
from shared import test_lost_commits as lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.postgres import Server
    from support.proxy import Proxy

    from imagewatch.journal.journal import Journal

member, standby = lost.member, lost.standby
FAILURES = (AssertionError, pytest.fail.Exception)


def no_lock(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal.postgres import database  # noqa: PLC0415  psycopg may be missing

    assert "FOR UPDATE" in database._LOCK
    patch.setattr(database, "_LOCK", database._LOCK.replace("FOR UPDATE OF a", ""))


def no_warnings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("imagewatch.journal.postgres.session.Session._note", lambda *_: None)


def uncertain_is_written(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415  psycopg may be missing

    commit = PostgresDatabase._commit

    def careless(*given: Any) -> None:
        with contextlib.suppress(UncertainError):
            commit(*given)

    patch.setattr(PostgresDatabase, "_commit", careless)


def no_unsent_row(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal import journal  # noqa: PLC0415

    update = "UPDATE attempts SET outcome = 'unsent' WHERE job = ?1 AND attempt = ?2 AND outcome = 'sent'"
    patch.setattr(journal, "_UNSENT_ROW", update)


def no_incarnation(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415

    register = PostgresDatabase.register

    def careless(self: PostgresDatabase, *given: Any, **more: Any) -> None:
        register(self, *given, **more)
        self.incarnation = 0

    patch.setattr(PostgresDatabase, "register", careless)


def no_nonce(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal import journal  # noqa: PLC0415

    patch.setattr(journal, "_UPSERT", journal._UPSERT.replace(" WHERE attempts.nonce = excluded.nonce", ""))


def spend_twice_below_a_cap(database: str, postgres: Server, member: Callable[..., Journal]) -> None:
    """Two daemons spend at the same time, with a cap that has room for one of them."""
    one, two = member(database, "one", patience=20.0), member(database, "two", patience=20.0)
    for journal in (one, two):
        journal.configure(Limits(assumed_credits=30, credits_per_day=30))
        journal.require(prove=True)
    postgres.psql(lost.SLOW_COMMIT, database.rpartition("/")[2])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lost.spend, one, lost.row("a"))
        until(lost.waits(postgres, "PgSleep"))
        second = pool.submit(lost.spend, two, lost.row("b"))
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        locked = lost.waits(postgres, "Lock")
        until(lambda: locked() or postgres.psql(sleeping) == [(2,)])
        postgres.psql("DROP TABLE gate", database.rpartition("/")[2])
        assert first.result(PATIENCE) is None
        assert second.result(PATIENCE) is not None, "the cap is used up"
    assert lost.outcomes(postgres, database) == {("a", 1): "sent"}


def start_twice(database: str, member: Callable[..., Journal]) -> None:
    """A daemon is started with the name and the state folder of another one."""
    older, newer = member(database), member(database)
    for journal in (older, newer):
        journal.file.register("host", "/inbox", "place", 60.0)
    with pytest.raises(DatabaseError, match="another daemon was started"):
        lost.spend(older, lost.row())
    assert lost.spend(newer, lost.row()) is None


def record_for_another(database: str, member: Callable[..., Journal]) -> None:
    """A process writes the result of an attempt that another process has sent."""
    journal = member(database)
    assert lost.spend(journal, lost.row()) is None
    with pytest.raises(SpoolError, match="another process"):
        journal.record(replace(lost.row(), nonce="another", outcome="busy", charged="no"))


PRECAUTIONS = {
    "the account is locked when something is spent": no_lock,
    "an uncertain commit is not taken as written": uncertain_is_written,
    "an attempt that is not sent leaves a row": no_unsent_row,
    "each start has its number": no_incarnation,
    "a result is written with the nonce": no_nonce,
}


def fails_without(
    take_away: Callable[[pytest.MonkeyPatch], None],
    request: pytest.FixtureRequest,
    patch: pytest.MonkeyPatch,
    act: Callable[[], None],
) -> None:
    """Require that something fails when a precaution is taken away."""
    request.getfixturevalue("postgres")  # else it is skipped
    take_away(patch)
    with pytest.raises(FAILURES):
        act()


def play(precaution: str, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> None:
    """Let happen what a precaution is for."""
    database, made = request.getfixturevalue("database"), request.getfixturevalue("member")
    postgres: Server = request.getfixturevalue("postgres")
    proxy: Proxy = request.getfixturevalue("proxy")
    if precaution == "the account is locked when something is spent":
        spend_twice_below_a_cap(database, postgres, made)
    elif precaution == "an uncertain commit is not taken as written":
        lost.test_an_attempt_whose_commit_was_not_acknowledged_is_never_sent(database, postgres, proxy, made)
    elif precaution == "an attempt that is not sent leaves a row":
        lost.test_a_commit_that_did_not_arrive_leaves_a_row_that_keeps_the_attempt_from_being_sent(
            database, postgres, proxy, made, patch
        )
    elif precaution == "each start has its number":
        start_twice(database, made)
    else:
        record_for_another(database, made)


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_with_each_precaution_nothing_is_sent_twice(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, precaution: str
) -> None:
    play(precaution, request, monkeypatch)


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_without_a_precaution_that_fails(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, precaution: str
) -> None:
    fails_without(PRECAUTIONS[precaution], request, monkeypatch, lambda: play(precaution, request, monkeypatch))


def test_without_the_warnings_of_a_commit_a_canceled_wait_is_taken_as_written(
    own_postgres: Server, standby: Server, member: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_warnings(monkeypatch)
    with pytest.raises(FAILURES):
        lost.test_a_canceled_wait_for_the_standby_counts_as_not_written(own_postgres, standby, member)
