"""Both stores answer alike, whatever was written; and accounts in one PostgreSQL are as separate as two files."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imagewatch.config.schema import Limits
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from journal.makers import NOON, Clock, Maker, emptied, sqlite

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
AMOUNT = st.none() | st.integers(-8, 400).map(lambda number: number / 4) | st.sampled_from([1e300, 1e308, math.inf])
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


def answers(journal: Journal, rows: list[Row]) -> list[Any]:
    """What commands and the daemon ask of a ledger."""
    ledger = journal.ledger
    found: list[Any] = [ledger.rows(), ledger.jobs(), ledger.jobs(NOON, 2), ledger.totals(NOON), ledger.redelivered()]
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
