"""Budgets of first-level folders in the ledger: counted in the transaction that spends, by the bytes of the name."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from imagewatch.config.schema import FolderBudget, Limits
from imagewatch.journal.budget import folder_of, setting
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim
from journal.makers import NOON, STORES, Clock, Maker, postgres, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.reasons import Reason

DAY = 86_400.0
FLUX = Asked("flux", '["flux",null,null,null]', 1)
ODD = os.fsdecode(b"ann\xe9")


def claim(job: str, folder: str) -> Claim:
    return Claim(job=job, folder=folder, stem=job, at=NOON)


def row(job: str, folder: str, at: float = NOON, **more: Any) -> Row:
    given = {"outcome": "sent", "charged": "unknown", "sent_at": at, "fields": '{"provider":"flux"}', **more}
    return Row(job=job, attempt=1, nonce="mine", source=claim(job, folder).source, claimed_at=at, asked=1, **given)


def spend(journal: Journal, job: str, folder: str, at: float = NOON) -> Reason | None:
    return journal.spend(row(job, folder, at), FLUX, skip_repeated=False, claim=claim(job, folder))


def pay(journal: Journal, job: str, folder: str, at: float = NOON, credits_: float | None = 30.0) -> None:
    journal.record(row(job, folder, at, outcome="completed", charged="yes", credits=credits_))


def test_a_budget_counts_its_folder_and_all_below_it_and_no_other(make: Callable[..., Journal]) -> None:
    journal = make(anna=FolderBudget(credits_per_day=100))
    for number, folder in enumerate(("", "anna2", "bob/anna", "Anna", ODD, "ann", "annb/anna")):
        pay(journal, f"other{number}", folder)
    pay(journal, "one", "anna")
    pay(journal, "two", "anna/deep/er", credits_=None)  # its amount is not known: 30, as was charged before
    assert journal.budget().spent("anna")["budgets.anna.credits_per_day"][0] == 60
    assert spend(journal, "three", "anna") is None
    refusal = spend(journal, "four", "anna/x")
    assert refusal is not None
    assert (refusal.kind, refusal.folder) == ("reserved", "anna")
    pay(journal, "three", "anna")
    refusal = spend(journal, "four", "anna/x")
    assert refusal is not None
    assert (refusal.kind, refusal.folder, refusal.ends) == ("cap", "anna", NOON + DAY / 2)
    assert journal.job("four").attempts == ()
    assert spend(journal, "five", "Anna") is None


def test_a_budget_counts_what_other_processes_reserve(make: Callable[..., Journal]) -> None:
    budget = FolderBudget(credits_per_month=60)
    journal, other = make(anna=budget), make(anna=budget)
    assert journal.open(claim("a", "anna/deep"), FLUX) is None
    assert spend(other, "b", "anna/x") is None
    refusal = journal.open(claim("c", "anna/y/z"), FLUX)
    assert refusal is not None
    assert (refusal.kind, refusal.folder, refusal.is_short) == ("reserved", "anna", False)
    assert journal.open(claim("d", "bob"), FLUX) is None
    other.unsent("b", 1, "mine")
    assert journal.open(claim("c", "anna/y/z"), FLUX) is None


def test_many_threads_and_processes_together_never_exceed_a_budget(make: Callable[..., Journal]) -> None:
    budget = FolderBudget(credits_per_day=100)
    journals = [make(anna=budget) for _ in range(2)]
    admitted: list[str] = []

    def send(number: int) -> None:
        name = f"job{number}"
        if spend(journals[number % 2], name, "anna") is None:
            admitted.append(name)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 3


def test_the_rate_of_a_folder_is_counted_alone_and_in_a_minute_of_its_own(
    make: Callable[..., Journal], clock: Clock
) -> None:
    journal = make(anna=FolderBudget(requests_per_minute=2))
    for number in range(5):
        assert spend(journal, f"bob{number}", "bob") is None
    assert spend(journal, "a", "anna") is None
    clock.now += 20
    assert spend(journal, "b", "anna/x", clock.now) is None
    refusal = spend(journal, "c", "anna", clock.now)
    assert refusal is not None
    assert (refusal.kind, refusal.folder, refusal.message) == ("rate", "anna", "budgets.anna.requests_per_minute is 2")
    assert (refusal.seconds, refusal.ends) == (40, NOON + 60)
    assert journal.open(claim("c", "anna"), FLUX) == refusal
    clock.now += 40.1
    assert spend(journal, "c", "anna", clock.now) is None
    clock.now -= 3600  # set back: what was sent before counts as sent now
    assert journal.open(claim("d", "anna"), FLUX) is not None
    clock.now += 60.1
    assert journal.open(claim("d", "anna"), FLUX) is None
    assert spend(journal, "d", "anna", clock.now) is None


def test_a_budget_that_is_nearly_spent_has_one_event_in_its_period(make: Callable[..., Journal], clock: Clock) -> None:
    limits = Limits(assumed_credits=30, credits_per_day=1000)
    tight = FolderBudget(credits_per_day=100, credits_per_month=10_000)
    journal = make(limits, anna=tight, bob=tight, **{"no caps": FolderBudget(requests_per_minute=1)})
    journal.events.configure(["url"])

    def caps() -> list[tuple[str, float, str]]:
        rows = journal.ledger.ask("SELECT content FROM events WHERE name = 'cap' ORDER BY number")
        pages = [json.loads(row["content"]) for row in rows]
        return [(page["setting"], page["spent"], page["ends"][:10]) for page in pages]

    day = DAY / 2
    for number, (folder, credits_) in enumerate([("anna", 79), ("bob", 10), ("anna/x", 1), ("anna", 5), ("", 70)]):
        spend(journal, f"a{number}", folder)
        pay(journal, f"a{number}", folder, credits_=credits_)
    assert caps() == [("budgets.anna.credits_per_day", 80.0, "2026-04-01")]
    spend(journal, "b", "bob")
    pay(journal, "b", "bob", credits_=75)
    assert caps()[1:] == [("budgets.bob.credits_per_day", 85.0, "2026-04-01")]
    clock.now += day
    spend(journal, "c", "anna", clock.now)
    pay(journal, "c", "anna", clock.now, credits_=90)
    assert caps()[2:] == [("budgets.anna.credits_per_day", 90.0, "2026-04-02")]
    journal.configure(limits, {"anna": replace(tight, credits_per_day=110)})
    spend(journal, "d", "anna", clock.now)
    pay(journal, "d", "anna", clock.now, credits_=1)
    assert caps()[3:] == [("budgets.anna.credits_per_day", 91.0, "2026-04-02")], "another cap"


def test_the_caps_for_all_and_the_budget_of_the_folder_both_count(make: Callable[..., Journal]) -> None:
    journal = make(Limits(assumed_credits=30, credits_per_day=60), anna=FolderBudget(credits_per_day=30))
    assert spend(journal, "a", "anna") is None
    pay(journal, "a", "anna")
    refusal = spend(journal, "b", "anna")
    assert refusal is not None
    assert refusal.folder == "anna"
    assert spend(journal, "c", "bob") is None
    pay(journal, "c", "bob")
    refusal = spend(journal, "d", "bob")
    assert refusal is not None
    assert (refusal.folder, refusal.message.split()[0]) == ("", "limits.credits_per_day")


def test_what_a_stuck_job_has_reserved_counts_as_spent_in_its_folder(make: Callable[..., Journal]) -> None:
    journal = make(anna=FolderBudget(credits_per_day=59))
    assert journal.open(claim("a", "anna"), FLUX) is None
    journal.set_stuck("a")
    refusal = journal.open(claim("b", "anna"), FLUX)
    assert refusal is not None
    assert (refusal.kind, refusal.folder) == ("cap", "anna")
    assert journal.open(claim("c", "bob"), FLUX) is None


def test_a_new_day_and_a_new_month_begin_for_a_folder_as_for_all(make: Callable[..., Journal], clock: Clock) -> None:
    journal = make(anna=FolderBudget(credits_per_day=30, credits_per_month=60))
    pay(journal, "a", "anna")
    refusal = spend(journal, "b", "anna")
    assert refusal is not None
    assert refusal.message.startswith("budgets.anna.credits_per_day is 30")
    clock.now += DAY  # the first of April
    for job in ("b", "c"):
        assert spend(journal, job, "anna", clock.now) is None
        pay(journal, job, "anna", clock.now)
        clock.now += DAY
    refusal = spend(journal, "d", "anna", clock.now)
    assert refusal is not None
    assert refusal.message.startswith("budgets.anna.credits_per_month is 60: 60 are spent")


def test_only_a_request_that_may_cost_more_than_the_whole_budget_never_fits(make: Callable[..., Journal]) -> None:
    journal = make(anna=FolderBudget(credits_per_day=30), bob=FolderBudget(requests_per_minute=1))
    four = Asked("flux", FLUX.kind, 4)
    problem = journal.budget().never(four, "anna")
    assert problem is not None
    assert (problem.field, "raise budgets.anna.credits_per_day" in problem.hint) == (
        "budgets.anna.credits_per_day",
        True,
    )
    assert [journal.budget().never(four, name) for name in ("", "bob", "carol")] == [None] * 3
    assert journal.budget().never(FLUX, "anna") is None


def test_the_name_of_a_setting_is_written_as_in_toml() -> None:
    assert setting("anna-2_x", "credits_per_day") == "budgets.anna-2_x.credits_per_day"
    assert setting('An "x" \u00e9\\') == 'budgets."An \\"x\\" \u00e9\\\\"'


# The sums

FOLDERS = ["", "anna", "anna/deep", "anna b", "bob", "\u00e9", "e\u0301", ODD, "a%_/x"]
NUMBERS = itertools.count()
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from(FOLDERS),
        st.sampled_from([("sent", "unknown"), ("completed", "yes"), ("unknown", "unknown"), ("refused", "no")]),
        st.sampled_from([None, 0.0, 12.5, 30.0]),
        st.sampled_from([NOON, NOON - DAY, None]),
    ),
    max_size=12,
)


@pytest.fixture(params=STORES)
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Callable[[], Any]]:
    """What makes an empty store with a name."""
    if request.param == "sqlite":
        return lambda name: sqlite(tmp_path / name, synchronous="OFF")
    uri = request.getfixturevalue("database")
    return lambda name: postgres(uri, account=name)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_the_sums_of_a_folder_are_those_of_its_rows_whatever_happened(
    new_store: Callable[[str], Callable[[], Any]],
    changes: list[tuple[int, str, tuple[str, str], float | None, float | None]],
) -> None:
    name = f"ledger{next(NUMBERS)}"
    rows: dict[str, Row] = {}
    with contextlib.closing(Maker(new_store(name), Clock())) as make:
        journal = make(Limits())
        for number, folder, (outcome, charged), credits_, at in changes:
            job = f"{name}-{number}-{FOLDERS.index(folder)}"
            made = row(job, folder, outcome=outcome, charged=charged, credits=credits_)
            rows[job] = replace(made, sent_at=at)
            journal.record(rows[job])
        found = journal.ledger.ask(
            "SELECT folder, day, sum(credits) AS credits, sum(unknown) AS n FROM folder_sums GROUP BY 1, 2"
        )
    expected: dict[tuple[str, str], list[float]] = {}
    for one in rows.values():
        counts = one.sent_at is not None and one.charged in {"yes", "unknown"} and one.outcome != "sent"
        if counts and folder_of(one.source):
            name = folder_of(one.source).encode("utf-8", "backslashreplace").decode()
            day = datetime.fromtimestamp(one.sent_at or 0, tz=UTC).date().isoformat()
            sums = expected.setdefault((name, day), [0.0, 0])
            sums[0] += one.credits or 0.0
            sums[1] += one.credits is None
    assert {(one["folder"], one["day"]): [one["credits"], one["n"]] for one in found if one["credits"] or one["n"]} == {
        key: sums for key, sums in expected.items() if any(sums)
    }
