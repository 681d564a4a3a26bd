"""The outcome of a COMMIT is not known: what it was to allow is not sent, and the next attempt is another one."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from support.daemon import until

from imagewatch.config.schema import Limits
from imagewatch.journal.journal import Journal
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim
from imagewatch.system.errors import DatabaseError, SpoolError, UncertainError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.postgres import Server
    from support.proxy import Proxy

PATIENCE = 20.0
"""How long a change is waited for where no test waits for its end, however busy the machine is, seconds."""
SHORT = 2.0
FLUX = Asked("flux", "kind", 1)
SLOW_COMMIT = """
CREATE TABLE gate ();
CREATE FUNCTION wait_for_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    WHILE EXISTS (SELECT 1 FROM pg_class WHERE relname = 'gate') LOOP PERFORM pg_sleep(0.02); END LOOP;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON imagewatch.attempts DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION wait_for_gate();
"""
"""Each COMMIT of an attempt lasts until the table ``gate`` is dropped."""


def claim(job: str = "a") -> Claim:
    return Claim(job=job, folder="", stem=job, at=1.0)


def row(job: str = "a", attempt: int = 1, **more: Any) -> Row:
    given = {"outcome": "sent", "charged": "unknown", "sent_at": time.time(), "fields": '{"provider":"flux"}'}
    given |= {"nonce": f"{job}{attempt}", **more}
    return Row(job=job, attempt=attempt, source=f"{job}.prompt.txt", claimed_at=time.time(), **given)


def spend(journal: Journal, one: Row) -> Any:
    return journal.spend(one, FLUX, skip_repeated=True, claim=claim(one.job))


@pytest.fixture
def member() -> Iterator[Callable[..., Journal]]:
    """Return a function that makes the journal of a daemon of the account."""
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415  psycopg may be missing
    from imagewatch.journal.postgres.place import Place  # noqa: PLC0415
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415

    made: list[Journal] = []

    def new(
        uri: str, name: str = "one", *, is_replicated: bool = False, patience: float = PATIENCE, common: str = ""
    ) -> Journal:
        is_common = bool(common)
        place = Place(
            uri, "main", inbox=common or name, instance=name, is_replicated=is_replicated, is_common=is_common
        )
        if not made:
            initialize(place)
        database = PostgresDatabase(place, patience=patience)
        made.append(Journal(database, Limits(assumed_credits=30), database.clock))
        return made[-1]

    yield new
    for one in made:
        one.close()


def outcomes(server: Server, uri: str) -> dict[tuple[str, int], str]:
    """The result of each attempt."""
    rows = server.psql("SELECT job, attempt, outcome FROM imagewatch.attempts", uri.rpartition("/")[2])
    return {(job, attempt): outcome for job, attempt, outcome in rows}


def waits(server: Server, kind: str) -> Callable[[], bool]:
    """Return whether a session waits for something of a kind."""
    question = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = %s OR wait_event = %s"
    return lambda: bool(server.psql(question, parameters=(kind, kind)))


@pytest.fixture
def standby(own_postgres: Server) -> Server:
    """The synchronous standby of the server of a test."""
    return own_postgres.standby(synchronous=True)


def either(first: int, second: int, uri: str) -> str:
    """How to connect to a database on that of two servers which can be written."""
    return f"host=127.0.0.1,127.0.0.1 port={first},{second} user=imagewatch dbname={uri.rpartition('/')[2]}"


def is_back(journal: Journal, then: Callable[[], bool] = lambda: True) -> bool:
    """Whether the database can be read and written again, and then something is so."""
    with contextlib.suppress(DatabaseError):
        journal.require(prove=True)
        journal.require()
        return then()
    return False


def test_an_attempt_whose_commit_was_not_acknowledged_is_never_sent(
    database: str, postgres: Server, proxy: Proxy, member: Callable[..., Journal]
) -> None:
    journal = member(proxy.through(database))
    journal.require(prove=True)
    proxy.swallow_reply_of(b"COMMIT")
    with pytest.raises(UncertainError):
        spend(journal, row())
    assert outcomes(postgres, database) == {("a", 1): "sent"}, "it was committed"

    found = journal.job("a")  # the job continues
    assert outcomes(postgres, database) == {("a", 1): "unsent"}
    assert found is not None
    assert (found.attempts, found.highest) == ((), 1)
    with pytest.raises(SpoolError, match="must not be sent"):
        spend(journal, row())
    assert spend(journal, row(attempt=2)) is None


def test_a_commit_that_did_not_arrive_leaves_a_row_that_keeps_the_attempt_from_being_sent(
    database: str, postgres: Server, proxy: Proxy, member: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = member(proxy.through(database))
    journal.require(prove=True)
    hung = hang_at_commit(proxy, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(spend, journal, row())
        assert hung.wait(20)
        proxy.wait_for(b"COMMIT")
        proxy.cut()
        with pytest.raises(UncertainError):
            answer.result(10)
    assert outcomes(postgres, database) == {}
    proxy.restore()
    assert journal.job("a") is None
    assert outcomes(postgres, database) == {("a", 1): "unsent"}
    with pytest.raises(SpoolError, match="must not be sent"):
        spend(journal, row())
    assert spend(journal, row(attempt=2)) is None


@pytest.mark.parametrize("end", ["it gives up", "it is disconnected"])
def test_a_commit_that_comes_later_than_the_next_question_does_not_let_the_attempt_be_sent(
    database: str, postgres: Server, proxy: Proxy, member: Callable[..., Journal], end: str
) -> None:
    journal = member(proxy.through(database), patience=SHORT if end == "it gives up" else PATIENCE)
    journal.require(prove=True)
    postgres.psql(SLOW_COMMIT, database.rpartition("/")[2])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(spend, journal, row())
        proxy.wait_for(b"COMMIT")
        until(waits(postgres, "PgSleep"))
        if end == "it is disconnected":
            proxy.cut()
            proxy.restore()
        with pytest.raises(UncertainError):
            answer.result(10)
        next_question = pool.submit(journal.job, "a")
        if end == "it is disconnected":
            until(waits(postgres, "Lock"))
        postgres.psql("DROP TABLE gate", database.rpartition("/")[2])
        with contextlib.suppress(DatabaseError):
            next_question.result(20)

    def is_unsent() -> bool:
        with contextlib.suppress(DatabaseError):
            journal.job("a")
        return outcomes(postgres, database) == {("a", 1): "unsent"}

    until(is_unsent)
    with pytest.raises(SpoolError, match="must not be sent"):
        spend(journal, row())
    assert spend(journal, row(attempt=2)) is None


def test_a_lost_connection_before_the_commit_is_known_to_have_written_nothing(
    database: str, postgres: Server, proxy: Proxy, member: Callable[..., Journal]
) -> None:
    journal = member(proxy.through(database))
    journal.require(prove=True)
    proxy.swallow_reply_of(b"UPDATE jobs SET reserved")
    with pytest.raises(DatabaseError) as caught:
        spend(journal, row())
    assert not isinstance(caught.value, UncertainError)
    assert outcomes(postgres, database) == {}
    assert spend(journal, row()) is None


@pytest.mark.parametrize("question", ["read", "write"])
def test_a_server_that_hangs_does_not_delay_a_thread_for_long(
    database: str,
    proxy: Proxy,
    member: Callable[..., Journal],
    monkeypatch: pytest.MonkeyPatch,
    question: str,
) -> None:
    journal = member(proxy.through(database), patience=20.0)
    journal.require(prove=True)
    journal.require()
    monkeypatch.setattr("imagewatch.journal.postgres.session._SILENT_SECONDS", 0.5)  # not while the server answers
    proxy.hang()
    began = time.monotonic()
    with pytest.raises(DatabaseError, match="not answered"):
        journal.require(prove=True) if question == "write" else journal.ledger.redelivered()
    assert time.monotonic() - began < 10
    proxy.restore()
    until(lambda: is_back(journal))


def test_while_the_database_is_out_of_reach_many_threads_do_not_wait_one_after_the_other(
    database: str, proxy: Proxy, member: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = member(proxy.through(database), patience=30.0)
    journal.require()
    monkeypatch.setattr("imagewatch.journal.postgres.session._SILENT_SECONDS", 1.0)
    proxy.hang()

    def ask(_: int) -> bool:
        with pytest.raises(DatabaseError):
            journal.ledger.redelivered()
        return True

    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))
    assert time.monotonic() - began < 10


def test_a_canceled_wait_for_the_standby_counts_as_not_written(
    own_postgres: Server, standby: Server, member: Callable[..., Journal]
) -> None:
    uri = own_postgres.database()
    journal = member(uri, is_replicated=True, patience=30.0)
    journal.require(prove=True)
    standby.stop()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(spend, journal, row())
        until(waits(own_postgres, "SyncRep"))
        own_postgres.psql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        with pytest.raises(UncertainError, match="01000"):
            answer.result(20)
    assert outcomes(own_postgres, uri) == {("a", 1): "sent"}
    standby.start()
    until(lambda: journal.job("a") is not None)
    assert outcomes(own_postgres, uri) == {("a", 1): "unsent"}


def test_a_stopped_standby_lets_threads_give_up_and_its_return_lets_all_continue(
    own_postgres: Server, standby: Server, member: Callable[..., Journal]
) -> None:
    uri = own_postgres.database()
    journal = member(uri, is_replicated=True, patience=1.0)
    journal.require(prove=True)
    standby.stop()
    with pytest.raises(UncertainError):
        spend(journal, row())
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(DatabaseError, match="not answered"):
            spend(journal, row("b"))
    assert time.monotonic() - began < 5, "the next ones do not wait as long"
    standby.start()
    until(lambda: is_back(journal, lambda: journal.job("a") is not None))
    assert outcomes(own_postgres, uri) == {("a", 1): "unsent"}
    assert spend(journal, row("a", 2)) is None
    assert spend(journal, row("b")) is None


@pytest.mark.parametrize("primary", ["killed", "hanging"])
def test_after_a_failover_to_the_synchronous_standby_every_attempt_is_known(
    own_postgres: Server,
    standby: Server,
    member: Callable[..., Journal],
    monkeypatch: pytest.MonkeyPatch,
    primary: str,
) -> None:
    """The primary that hangs has its side of the network open for good, as a stopped virtual machine may."""
    from support.proxy import Proxy  # noqa: PLC0415

    monkeypatch.setattr("imagewatch.journal.postgres.session.CONNECT_SECONDS", 2)
    monkeypatch.setitem(_parameters(), "connect_timeout", "2")
    uri = own_postgres.database()
    with Proxy(own_postgres.port) as proxy:
        journal = member(either(proxy.port, standby.port, uri), patience=2.0)
        assert spend(journal, row("a")) is None
        monkeypatch.setattr("imagewatch.journal.postgres.session._SILENT_SECONDS", 1.0)
        if primary == "killed":
            own_postgres.kill()
        else:
            proxy.hang()
        with pytest.raises(DatabaseError):
            spend(journal, row("b"))
        standby.promote()
        until(lambda: is_back(journal, lambda: journal.job("b") is None), timeout=40)
        assert outcomes(standby, uri)["a", 1] == "sent"
        with pytest.raises(SpoolError, match="must not be sent"):
            spend(journal, replace(row("a"), nonce="another"))
        assert spend(journal, row("b", attempt=2 if ("b", 1) in outcomes(standby, uri) else 1)) is None


def test_a_commit_that_hangs_on_a_replaced_primary_does_not_hang_without_end(
    own_postgres: Server, standby: Server, member: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.proxy import Proxy  # noqa: PLC0415

    monkeypatch.setitem(_parameters(), "connect_timeout", "2")
    uri = own_postgres.database()
    with Proxy(own_postgres.port) as proxy:
        journal = member(either(proxy.port, standby.port, uri), patience=2.0)
        journal.require(prove=True)
        monkeypatch.setattr("imagewatch.journal.postgres.session._SILENT_SECONDS", 1.0)
        hang_at_commit(proxy, monkeypatch)
        with pytest.raises(UncertainError):
            journal.file.change(lambda _: None)
        standby.promote()
        until(lambda: is_back(journal), timeout=40)


def hang_at_commit(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the network hang right before the next COMMIT; return what is set then."""
    from imagewatch.journal.postgres.session import Session  # noqa: PLC0415

    commit, hung = Session.commit, threading.Event()

    def hanging(self: Session, *given: Any) -> None:
        monkeypatch.setattr(Session, "commit", commit)
        proxy.hang()
        hung.set()
        commit(self, *given)

    monkeypatch.setattr(Session, "commit", hanging)
    return hung


def _parameters() -> dict[str, str]:
    from imagewatch.journal.postgres import session  # noqa: PLC0415

    return session._PARAMETERS


def test_times_are_those_of_the_database_whatever_the_clock_of_the_host_says(
    database: str, postgres: Server, member: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in (86_400.0, -86_400.0):
        with monkeypatch.context() as changed:
            real = time.time
            changed.setattr(time, "time", lambda real=real, seconds=seconds: real() + seconds)
            journal = member(database, f"host{seconds:.0f}")
            journal.require()
            question = "SELECT extract(epoch FROM clock_timestamp())::float8"
            (((before,),), at, ((after,),)) = postgres.psql(question), journal.clock(), postgres.psql(question)
            assert before - 5 < at < after + 5
