"""The tables in PostgreSQL: made once, refused if they are others, and no attempt is ever deleted."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from imagewatch.config.schema import Limits
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim, Decision
from imagewatch.system.errors import DatabaseError
from journal.makers import NOON, Clock, Maker, postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.postgres import Server

    from imagewatch.journal.journal import Journal

FLUX = Asked("flux", '["flux",null,null,null]', 1)
LIMITS = Limits(assumed_credits=30, credits_per_day=100, requests_per_minute=3)


def place(uri: str) -> Any:
    from imagewatch.journal.postgres.place import Place  # noqa: PLC0415  psycopg may be missing

    return Place(uri, "main", inbox="one", instance="one", is_replicated=False)


def name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


def spend(journal: Journal, job: str) -> Any:
    row = Row(
        job=job,
        attempt=1,
        source=f"{job}.prompt.txt",
        outcome="sent",
        charged="unknown",
        claimed_at=NOON,
        sent_at=NOON,
        fields='{"provider":"flux"}',
        contents='{"prompt": 1}',
        source_mtime_ns=5,
        nonce=job,
    )
    return journal.spend(row, FLUX, skip_repeated=True, claim=Claim(job=job, folder="", stem=job, at=NOON))


def test_of_several_that_make_the_tables_at_the_same_time_one_makes_them(database: str) -> None:
    from imagewatch.journal.postgres.tables import check, initialize  # noqa: PLC0415

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: initialize(place(database)), range(6)))
    assert sorted(made) == [False] * 5 + [True]
    assert check(place(database)) == []


def test_without_the_rights_no_tables_are_made_and_the_message_says_what_is_needed(
    database: str, postgres: Server
) -> None:
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415

    with contextlib.suppress(Exception):  # another test of this worker has made it
        postgres.psql("CREATE ROLE guest LOGIN")
    guest = place(database.replace("imagewatch@", "guest@"))
    with pytest.raises(DatabaseError, match="does not let its user do that: permission denied") as caught:
        initialize(guest)
    assert "grant it the rights" in caught.value.hint
    assert postgres.psql("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'imagewatch%'", name_of(database)) == [
        (0,)
    ]


def test_another_user_without_rights_on_the_tables_is_refused_with_what_to_do(database: str, postgres: Server) -> None:
    with contextlib.suppress(Exception):  # another test of this worker has made it
        postgres.psql("CREATE ROLE guest LOGIN")
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415

    initialize(place(database))
    with (
        contextlib.closing(PostgresDatabase(place(database.replace("imagewatch@", "guest@")))) as found,
        pytest.raises(DatabaseError, match="does not let its user do that") as caught,
        found.using(),
    ):
        pass
    assert "run imagewatch db init as the same database user" in caught.value.hint


def test_tables_of_a_newer_version_are_neither_used_nor_changed(database: str, postgres: Server) -> None:
    from imagewatch.journal.postgres.tables import check, initialize, upgrade  # noqa: PLC0415

    journal = Maker(made(database), Clock())()
    postgres.psql("UPDATE imagewatch.about SET version = version + 1", name_of(database))
    refused = "has tables of a newer version"
    with contextlib.closing(journal):
        for use in (journal.require, lambda: spend(journal, "a"), lambda: journal.require(prove=True)):
            with pytest.raises(DatabaseError, match=refused) as caught:
                use()
            assert caught.value.hint == "run the newer version of imagewatch"
    assert [why for why, _ in check(place(database))] == ["has tables of a newer version (2)"]
    for change in (initialize, upgrade):
        with pytest.raises(DatabaseError, match=refused):
            change(place(database))
    assert postgres.psql("SELECT count(*) FROM imagewatch.attempts", name_of(database)) == [(0,)]


def made(uri: str, **names: str) -> Callable[[], Any]:
    return postgres(uri, **names)


@pytest.mark.parametrize(
    "statement", ["DELETE FROM {}.attempts", "TRUNCATE {}.attempts", "TRUNCATE {}.attempts, {}.jobs"]
)
def test_an_attempt_cannot_be_deleted_not_even_by_the_owner_of_the_tables(database: str, statement: str) -> None:
    with contextlib.closing(Maker(made(database), Clock())) as make:
        journal = make(LIMITS)
        assert spend(journal, "a") is None
        with journal.file.using() as connection, pytest.raises(Exception, match="an attempt is never deleted"):
            connection.execute(statement.replace("{}", "imagewatch"))
        with pytest.raises(Exception, match="an attempt is never deleted"):
            journal.file.change(lambda connection: connection.execute("DELETE FROM attempts"))
        assert [row["job"] for row in make().ledger.rows()] == ["a"]


def test_a_query_reaches_a_table_only_through_its_view(database: str) -> None:
    from imagewatch.journal.postgres.schema import SCHEMA, TABLES, VIEWS  # noqa: PLC0415

    with contextlib.closing(Maker(made(database), Clock())) as make, make().file.using() as connection:
        found = {row["name"]: row["kind"] for row in connection.execute(_KINDS).fetchall()}
        (path,) = connection.execute("SELECT current_schemas(false) AS names").fetchone()
    assert path == [VIEWS] != [SCHEMA]
    assert set(found.values()) == {"v"}
    tables = {line.split()[2] for line in TABLES.splitlines() if line.startswith("CREATE TABLE")}
    assert set(found) == tables - {"about", "accounts"} | {"own_jobs", "inbox_jobs"}


_KINDS = (
    "SELECT relname AS name, relkind::text AS kind FROM pg_class WHERE relnamespace = 'imagewatch_view'::regnamespace"
)


# Two daemons of one account


@pytest.fixture
def daemons(database: str) -> Iterator[tuple[Journal, Journal]]:
    """The journals of two daemons of one account, with caps and a rate."""
    with contextlib.ExitStack() as stack:
        makers = [Maker(made(database, inbox=name, instance=name), Clock()) for name in ("one", "two")]
        one, two = (stack.enter_context(contextlib.closing(make))(LIMITS) for make in makers)
        for journal in (one, two):
            journal.events.configure(["url"])
        yield one, two


def paid(job: str, credits_: float) -> Row:
    given = {"outcome": "completed", "charged": "yes", "claimed_at": NOON, "sent_at": NOON, "credits": credits_}
    given |= {"answered_at": NOON, "new_credit_balance": 7.0, "asked": 1, "nonce": job}
    return Row(job=job, attempt=1, source=f"{job}.prompt.txt", fields='{"provider":"flux"}', **given)


def test_daemons_of_an_account_share_sums_prices_balance_and_what_is_reserved(
    daemons: tuple[Journal, Journal],
) -> None:
    one, two = daemons
    assert spend(one, "a") is None
    assert "30 are reserved for requests in flight" in two.budget().over_cap(Asked("flux", FLUX.kind, 3)).message
    one.record(paid("a", 45.0))
    assert two.budget().spent()["limits.credits_per_day"][0] == 45
    assert two.budget().cost(FLUX).high == 45
    assert two.ledger.balance() == (7, NOON)
    assert [row["job"] for row in two.ledger.jobs()] == ["a"]
    assert spend(two, "b") is None
    refusal = spend(one, "c")
    assert (refusal.kind, "45 are spent, 45 are reserved" in refusal.message) == ("reserved", True)


def test_daemons_of_an_account_share_its_rate(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    for journal in daemons:
        journal.configure(Limits(requests_per_minute=3))
    assert [spend(journal, job) for journal, job in ((one, "a"), (two, "b"), (one, "c"))] == [None] * 3
    assert [spend(journal, job).kind for journal, job in ((one, "d"), (two, "e"))] == ["rate", "rate"]


def test_what_one_daemon_has_requested_is_a_redelivery_for_the_other(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    row = Row(
        job="a",
        attempt=1,
        source="cat.prompt.txt",
        source_size=5,
        source_mtime_ns=9,
        contents="{}",
        outcome="completed",
        charged="yes",
        claimed_at=NOON,
    )
    one.record(row)
    assert two.ledger.finished("b", "cat.prompt.txt", 5, 9) == [("a", "{}")]
    claim = Claim(job="b", folder="", stem="cat", at=NOON)
    again = Row(
        job="b",
        attempt=1,
        source="cat.prompt.txt",
        source_mtime_ns=9,
        contents="{}",
        outcome="sent",
        charged="unknown",
        claimed_at=NOON,
        nonce="b",
    )
    assert two.spend(again, FLUX, skip_repeated=True, claim=claim).kind == "repeated"
    two.decide(claim, Decision(destination="discarded"), None, repeated="a")
    assert (one.ledger.redelivered(), two.ledger.redelivered()) == (1, 1)


def test_jobs_requests_events_and_manual_holds_are_those_of_one_daemon(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.claim(Claim(job="a", folder="", stem="cat", at=NOON))
    two.claim(Claim(job="b", folder="", stem="cat", at=NOON))  # the same name in another inbox
    assert (one.unfinished(), two.unfinished()) == (["a"], ["b"])
    one.requests.retry("a")
    one.requests.release()
    one.requests.let_pass(5.0)
    assert (two.requests.retries(), two.requests.release_pending(), two.requests.passed()) == ([], False, 0.0)
    two.requests.released(6.0)
    assert (one.requests.retries(), one.requests.release_pending(), one.requests.passed()) == (["a"], True, 5.0)
    one.decide(Claim(job="a", folder="", stem="cat", at=NOON), Decision(destination="errors"), None)
    assert (one.events.counts().pending, two.events.counts().pending) == (1, 0)
    one.requests.hold("here")
    assert (one.requests.held(), two.requests.held()) == ("here", None)
    assert spend(two, "c") is None
    assert spend(one, "d").kind == "manual"
