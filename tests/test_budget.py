"""What may be spent, counted from a real ledger with an invented clock."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest

from imagewatch.budget import Budget
from imagewatch.config import Limits
from imagewatch.ledger import Ledger, Row

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path):
    with contextlib.closing(Ledger(str(tmp_path / "ledger.sqlite3"))) as made:
        yield made


def spend(ledger, job, at, credits_=None, *, charged="yes", provider="flux"):
    outcome = "unknown" if charged == "unknown" else "made"
    ledger.write(
        Row(
            job=job,
            attempt=1,
            source=f"{job}.prompt.txt",
            outcome=outcome,
            charged=charged,
            claimed_at=at,
            sent_at=at,
            credits=credits_,
            provider=provider,
        )
    )


def test_without_caps_everything_passes(ledger, clock):
    budget = Budget(ledger, Limits(), clock)
    assert all(budget.reserve(f"job{k}", "flux") is None for k in range(500))


def test_a_request_passes_only_if_what_it_may_cost_still_fits(ledger, clock):
    spend(ledger, "a", NOON - HOUR, 30)
    budget = Budget(ledger, Limits(credits_per_day=60), clock)
    assert budget.reserve("b", "flux") is None
    refusal = budget.reserve("c", "flux")
    assert refusal is not None
    assert refusal.kind == "cap"
    assert "limits.credits_per_day is 60" in refusal.message


def test_a_price_nobody_knows_counts_as_the_assumed_one_and_never_as_zero(ledger, clock):
    budget = Budget(ledger, Limits(credits_per_day=100, assumed_credits=150), clock)
    assert budget.reserve("a", "gemini") is not None


def test_the_highest_recent_charge_of_the_provider_is_what_is_set_aside(ledger, clock):
    spend(ledger, "a", NOON - 40 * 24 * HOUR, 30)
    spend(ledger, "b", NOON - 39 * 24 * HOUR, 90)
    spend(ledger, "c", NOON - 38 * 24 * HOUR, 400, provider="gemini")
    budget = Budget(ledger, Limits(credits_per_day=180), clock)
    assert budget.reserve("d", "flux") is None
    assert budget.reserve("e", "flux") is None
    assert budget.reserve("f", "flux") is not None


def test_what_is_in_flight_counts_until_the_ledger_has_it(ledger, clock):
    spend(ledger, "a", NOON - 40 * 24 * HOUR, 50)
    budget = Budget(ledger, Limits(credits_per_day=100), clock)
    assert budget.reserve("b", "flux") is None
    assert budget.reserve("c", "flux") is None
    assert budget.reserve("d", "flux") is not None
    budget.settle("b")
    assert budget.reserve("d", "flux") is None


def test_a_lost_answer_counts_as_if_it_had_been_charged(ledger, clock):
    spend(ledger, "a", NOON - HOUR, charged="unknown")
    assert Budget(ledger, Limits(credits_per_day=200, assumed_credits=150), clock).reserve("b", "flux") is not None


def test_a_new_utc_day_opens_the_day_cap_but_not_the_month_cap(ledger, clock):
    spend(ledger, "a", NOON - HOUR, 50)
    daily = Budget(ledger, Limits(credits_per_day=60), clock)
    refusal = daily.reserve("b", "flux")
    assert refusal is not None
    assert refusal.seconds == 12 * HOUR
    clock.now = NOON + 12 * HOUR
    assert daily.reserve("b", "flux") is None


def test_a_month_ends_with_the_month(ledger, clock):
    spend(ledger, "a", NOON - 20 * 24 * HOUR, 50)
    monthly = Budget(ledger, Limits(credits_per_month=60), clock)
    refusal = monthly.reserve("b", "flux")
    assert refusal is not None
    assert refusal.seconds == 12 * HOUR
    clock.now = datetime(2026, 4, 1, tzinfo=UTC).timestamp()
    assert monthly.reserve("b", "flux") is None


def test_a_clock_that_was_set_back_opens_no_new_day(ledger, clock):
    spend(ledger, "a", NOON, 50)
    clock.now = NOON - 24 * HOUR
    assert Budget(ledger, Limits(credits_per_day=60), clock).reserve("b", "flux") is not None


def test_a_restart_changes_nothing(ledger, clock):
    spend(ledger, "a", NOON - HOUR, 50)
    for _ in range(3):
        assert Budget(ledger, Limits(credits_per_day=60), clock).reserve("b", "flux") is not None


@pytest.mark.parametrize("most", [1, 3, 60])
def test_no_minute_holds_more_requests_than_allowed(ledger, clock, most):
    budget = Budget(ledger, Limits(requests_per_minute=most), clock)
    passed = []
    for number in range(5 * most):
        while (refusal := budget.reserve(f"job{number}", "flux")) is not None:
            assert refusal.kind == "rate"
            clock.now += refusal.seconds
        passed.append(clock.now)
    assert all(later - earlier > 59.999 for earlier, later in zip(passed, passed[most:], strict=False))


def test_less_than_one_request_a_minute_is_possible(ledger, clock):
    budget = Budget(ledger, Limits(requests_per_minute=0.5), clock)
    assert budget.reserve("a", "flux") is None
    refusal = budget.reserve("b", "flux")
    assert refusal is not None
    assert refusal.seconds == 120
    clock.now += 119
    assert budget.reserve("b", "flux") is not None
    clock.now += 1
    assert budget.reserve("b", "flux") is None


def test_the_minute_is_counted_across_a_restart(ledger, clock):
    spend(ledger, "a", NOON - 10, 1)
    refusal = Budget(ledger, Limits(requests_per_minute=1), clock).reserve("b", "flux")
    assert refusal is not None
    assert refusal.seconds == pytest.approx(50)
