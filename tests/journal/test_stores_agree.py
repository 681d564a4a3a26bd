"""Both stores answer alike, whatever was written; and accounts in one PostgreSQL are as separate as two files."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imagewatch.config.schema import FolderBudget, Limits
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim, Decision
from imagewatch.system.errors import SpoolError
from journal.makers import NOON, Clock, Maker, emptied, postgres, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.journal.journal import Journal

NUMBERS = itertools.count()
FLUX = Asked("flux", '["flux",null,null,null]', 1)
SLOW = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8) | st.sampled_from(
    ["", "\0", "a\0b", "\ud800", "caf\udce9", "%_'\"\\?1$1", "\u00e9", "e\u0301", "\U0001f600"]
)
NUMBER = st.integers(-(2**66), 2**66) | st.integers(0, 5)
# Without numbers whose sum depends on the order.
AMOUNT = st.none() | st.integers(-8, 400).map(lambda number: number / 4) | st.sampled_from([1e300, 1e308])
TIME = st.none() | st.sampled_from([NOON, NOON - 86_400, 0.0, -1e12, 1e12, 1e300])
ROWS = st.fixed_dictionaries(
    {
        "job": st.sampled_from(["a", "b", "c", "B", "\u00e9", "~"]),
        "attempt": st.integers(0, 3),
        "nonce": st.just("mine"),
        "source": st.sampled_from(
            ["cat.prompt.txt", "anna/cat.prompt.txt", "A%_/x.prompt.txt", "caf\udce9/x.prompt.txt"]
        ),
        "outcome": st.sampled_from(["unsent", "completed", "refused", "busy", "unknown", "invalid"]),
        "charged": st.sampled_from(["yes", "no", "unknown"]),
        "claimed_at": st.sampled_from([NOON, NOON - 1, 1.0]),
        "sent_at": TIME,
        "answered_at": TIME,
        "source_size": NUMBER,
        "source_mtime_ns": NUMBER,
        "placed_mtime_ns": st.sampled_from([0, 10**18, 10**18 + 100, 2**64]),
        "contents": TEXT,
        "message": TEXT,
        "owner": TEXT,
        "credits": AMOUNT,
        "new_credit_balance": AMOUNT,
        "asked": st.integers(0, 4),
        "got": NUMBER,
        "status": NUMBER,
        "fields": st.sampled_from(['{"provider":"flux"}', '{"provider":"openai","quality":"low"}', "", "{"]),
    }
).map(lambda fields: Row(**fields))


def plain(value: Any) -> Any:
    """What both stores are to have in common: PostgreSQL has no NUL, and no number beyond 1e300."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    return ("huge", value > 0) if isinstance(value, float) and abs(value) >= 1e300 else value


def without_instance(job: dict[str, Any]) -> dict[str, Any]:
    """A job without the name of its daemon, which only a shared database has."""
    return {name: value for name, value in job.items() if name != "instance"}


def answers(journal: Journal, rows: list[Row]) -> list[Any]:
    """What commands and the daemon ask of a ledger."""
    ledger = journal.ledger
    jobs = [[without_instance(job) for job in found] for found in (ledger.jobs(), ledger.jobs(NOON, 2))]
    found: list[Any] = [ledger.rows(), *jobs, ledger.totals(NOON), ledger.redelivered()]
    found += [[ledger.job(job) for job in ("a", "B", "none")], ledger.last_redelivered(2), journal.unfinished()]
    found += [ledger.finished("x", row.source, row.source_size, row.source_mtime_ns) for row in rows if row.sent_at]
    found += [ledger.was_placed(at) for at in (0, 10**18, 10**18 + 1, 2**64)]
    return found


@pytest.fixture
def pair(tmp_path: Path, database: str) -> Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]:
    """Makes two empty stores, one of each kind."""

    def made() -> tuple[Callable[[], Any], Callable[[], Any]]:
        name = f"ledger{next(NUMBERS)}"
        return sqlite(tmp_path / name, synchronous="OFF"), emptied(database, account=name)

    return made


@SLOW
@given(st.lists(ROWS, max_size=8))
@example([Row(job="a", attempt=1, source="s", outcome="completed", charged="yes", claimed_at=1.0, sent_at=1e300)])
def test_both_stores_give_the_same_answers_after_the_same_rows(pair: Any, rows: list[Row]) -> None:
    found = []
    for new in pair():
        with contextlib.closing(Maker(new, Clock())) as make:
            journal = make(Limits())
            for row in rows:
                journal.record(row)
            found.append(plain(answers(journal, rows)))
    assert found[0] == found[1]


# Accounts

JOBS = ("a", "b", "c")
ALL_JOBS = [f"{account}{job}" for account in (0, 1) for job in JOBS]
FOLDERS = ("", "anna", "anna/deep")
ACTS = (
    "open",
    "spend",
    "pay",
    "lose",
    "decide",
    "repeat",
    "finish",
    "stick",
    "hold",
    "refuse",
    "release",
    "released",
    "retry",
    "retried",
    "pass",
    "announce",
    "deliver",
    "forget",
    "correct",
    "wait",
)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),  # the account
        st.sampled_from(ACTS),
        st.sampled_from(JOBS),
        st.sampled_from(FOLDERS),
    ),
    max_size=40,
)
LIMITS = Limits(assumed_credits=30, credits_per_day=70, requests_per_minute=3)


def step(journal: Journal, clock: Clock, what: str, job: str, folder: str) -> object:
    """Do one of the things that the daemon and commands do."""
    claim = Claim(job=job, folder=folder, stem="cat", at=clock())
    given: dict[str, Any] = {"fields": '{"provider":"flux"}', "nonce": "mine", "sent_at": clock(), "contents": "{}"}
    sent = Row(job=job, attempt=1, source=claim.source, outcome="sent", charged="unknown", claimed_at=clock(), **given)
    paid = Row(**{**{name: getattr(sent, name) for name in Row.__struct_fields__}, **PAID})
    decision = Decision(destination="outbox", facts={"charged": "yes"}, result_file="x")
    acts: dict[str, Callable[[], object]] = {
        "open": lambda: journal.open(claim, FLUX),
        "spend": lambda: journal.spend(sent, FLUX, skip_repeated=True, claim=claim),
        "pay": lambda: journal.record(paid),
        "lose": lambda: journal.unsent(job, 1, "mine"),
        "decide": lambda: journal.decide(claim, decision, paid),
        "repeat": lambda: journal.decide(claim, decision, None, repeated=job),
        "finish": lambda: journal.finish(job),
        "stick": lambda: journal.set_stuck(job),
        "hold": lambda: journal.requests.hold(folder),
        "refuse": lambda: journal.requests.refuse({"unreachable": folder, "endpoint": job}),
        "release": journal.requests.release,
        "released": lambda: journal.requests.released(clock()),
        "retry": lambda: journal.requests.retry(job),
        "retried": lambda: journal.requests.retried(job),
        "pass": lambda: journal.requests.let_pass(clock()),
        "announce": lambda: announce(journal, job),
        "deliver": lambda: deliver(journal),
        "forget": journal.forget_old,
        "correct": journal.correct_times,
        "wait": lambda: setattr(clock, "now", clock.now + 9 * 86_400),
    }
    return tried(acts[what])


def tried(act: Callable[..., object], *arguments: object) -> object:
    """Return what something returns, or the name of its error."""
    try:
        return act(*arguments)
    except SpoolError as error:
        return type(error).__name__


PAID = {"outcome": "completed", "charged": "yes", "credits": 12.0, "answered_at": NOON, "new_credit_balance": 5.0}


def announce(journal: Journal, job: str) -> None:
    journal.events.stage("held", f"hold:{job}:", {"kind": job})
    staged = journal.events.staged()
    journal.requests.refuse({}, staged)
    journal.events.written(staged)


def deliver(journal: Journal) -> str:
    event = journal.events.due("url")
    if event is not None:
        journal.events.delivered(event)
    return event.name if event else ""


def state(journal: Journal) -> list[Any]:
    """All that an account has."""
    budget, events, requests = journal.budget(), journal.events, journal.requests
    found = [answers(journal, []), budget.spent(), budget.spent("anna"), budget.cost(FLUX), budget.spent_in("anna")]
    found += [requests.held(), requests.since(), requests.refused(), requests.passed(), requests.retries()]
    found += [requests.release_pending(), events.announced(), events.counts(), journal.ledger.balance()]
    return [*found, [[tried(journal.job, job), journal.is_over(job)] for job in ALL_JOBS]]


@SLOW
@given(STEPS)
def test_two_accounts_in_one_database_are_as_separate_as_two_files(
    tmp_path: Path, database: str, steps: list[tuple[int, str, str, str]]
) -> None:
    name, clock = f"pair{next(NUMBERS)}", Clock()
    emptied(database)
    news = [sqlite(tmp_path / f"{name}-{number}", synchronous="OFF") for number in (0, 1)]
    news += [postgres(database, account=f"account{number}") for number in (0, 1)]
    budgets = {"anna": FolderBudget(credits_per_day=50)}
    with contextlib.ExitStack() as stack:
        makers = [stack.enter_context(contextlib.closing(Maker(new, clock))) for new in news]
        journals = [make(LIMITS, **budgets) for make in makers]
        for journal in journals:
            journal.events.configure(["url"])
        for number, what, letter, folder in steps:
            job = f"{number}{letter}"
            now = clock.now
            done = []
            for journal in (journals[number], journals[number + 2]):
                clock.now = now
                done.append(step(journal, clock, what, job, folder))
            assert done[0] == done[1], what
        for number in (0, 1):
            assert state(journals[number]) == state(journals[number + 2])
