"""What may be spent, counted from a real ledger with a test clock."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from imagewatch.config.schema import Limits
from imagewatch.journal.books import NoBooks
from imagewatch.journal.budget import Budget
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim
from journal.makers import NOON

HOUR = 3600.0


@pytest.fixture
def journal(make):
    return make(Limits())


class Purse:
    """The journal with some limits, and one attempt for each job."""

    def __init__(self, journal, limits):
        self.journal, self.limits = journal, limits

    def open(self, job, asked):
        self.journal.configure(self.limits)
        return self.journal.open(Claim(job=job, folder="", stem=job), asked)

    def spend(self, job, asked):
        self.journal.configure(self.limits)
        row = Row(
            job=job,
            attempt=1,
            source=f"{job}.prompt.txt",
            outcome="sent",
            charged="unknown",
            claimed_at=self.journal._clock(),
            sent_at=self.journal._clock(),
            provider=asked.provider,
        )
        return self.journal.spend(row, asked, skip_repeated=False)

    def reserve(self, job, asked):
        """Claim a prompt and send its request; return why not."""
        if self.journal.job(job) is None and (refusal := self.open(job, asked)):
            return refusal
        return self.spend(job, asked)

    def end(self, job):
        """Let a request turn out to be free."""
        self.journal.unsent(job, 1, "")
        self.journal.finish(job)

    @property
    def budget(self):
        self.journal.configure(self.limits)
        return self.journal.budget()


def asked(provider="flux", **fields):
    return Asked.of({"provider": provider, **fields})


def spend(journal, job, at, credits_=None, *, charged="yes", provider="flux"):
    outcome = "unknown" if charged == "unknown" else "completed"
    journal.record(
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


def test_without_caps_every_request_is_admitted(journal, clock):
    budget = Purse(journal, Limits())
    assert all(budget.reserve(f"job{k}", asked()) is None for k in range(500))


def test_without_caps_no_price_is_read_and_requests_in_flight_count_when_a_cap_is_set(journal, clock):
    class Closed(NoBooks):
        def highest(self, provider, since):
            raise AssertionError(provider, since)

    budget = Budget(Closed(), Limits(assumed_credits=40), clock())
    assert budget.never(asked()) is None
    assert budget.over_cap(asked(n=2)) is None
    assert budget.reservation(asked(n=2)) == 80
    assert Purse(journal, Limits(assumed_credits=40)).reserve("a", asked(n=2)) is None
    capped = Purse(journal, Limits(assumed_credits=40, credits_per_day=100))
    assert "80 are reserved" in capped.reserve("b", asked()).message


def test_a_request_is_admitted_only_if_its_estimate_fits(journal, clock):
    spend(journal, "a", NOON - HOUR, 30)
    budget = Purse(journal, Limits(credits_per_day=60))
    assert budget.reserve("b", asked()) is None
    refusal = budget.reserve("c", asked())
    assert refusal is not None
    assert "limits.credits_per_day is 60" in refusal.message


def test_an_unknown_price_counts_as_the_assumed_one_and_never_as_zero(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=100, assumed_credits=150))
    assert budget.reserve("a", asked("gemini")) is not None


def test_the_highest_recent_charge_of_the_provider_is_reserved(journal, clock):
    spend(journal, "a", NOON - 20 * 24 * HOUR, 30)
    spend(journal, "b", NOON - 19 * 24 * HOUR, 90)
    spend(journal, "c", NOON - 18 * 24 * HOUR, 400, provider="gemini")
    budget = Purse(journal, Limits(credits_per_day=180))
    assert budget.reserve("d", asked()) is None
    assert budget.reserve("e", asked()) is None
    assert budget.reserve("f", asked()) is not None


def test_a_request_in_flight_counts_until_it_turns_out_to_be_free(journal, clock):
    spend(journal, "a", NOON - 20 * 24 * HOUR, 50)
    budget = Purse(journal, Limits(credits_per_day=100))
    assert budget.reserve("b", asked()) is None
    assert budget.reserve("c", asked()) is None
    assert budget.reserve("d", asked()) is not None
    budget.end("b")
    assert budget.reserve("d", asked()) is None


def test_a_request_without_a_job_counts_as_spent_that_day_and_is_not_waited_for(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=60, assumed_credits=30))
    assert budget.reserve("a", asked()) is None
    assert budget.reserve("b", asked()) is None
    assert budget.reserve("c", asked()).kind == "reserved"
    journal.set_stuck("a")
    budget.end("b")
    assert budget.reserve("c", asked()) is None
    assert budget.reserve("d", asked()).kind == "reserved"
    journal.set_stuck("c")
    assert budget.reserve("d", asked()).kind == "cap"
    clock.now += 12 * HOUR
    assert budget.reserve("d", asked()) is None


def test_a_lost_response_counts_as_if_it_had_been_charged(journal, clock):
    spend(journal, "a", NOON - HOUR, charged="unknown")
    assert Purse(journal, Limits(credits_per_day=200, assumed_credits=150)).reserve("b", asked()) is not None


def test_a_new_utc_day_resets_the_day_cap_but_not_the_month_cap(journal, clock):
    spend(journal, "a", NOON - HOUR, 50)
    daily = Purse(journal, Limits(credits_per_day=60))
    refusal = daily.reserve("b", asked())
    assert refusal is not None
    assert refusal.seconds == 12 * HOUR
    clock.now = NOON + 12 * HOUR
    assert daily.reserve("b", asked()) is None


def test_a_month_ends_with_the_month(journal, clock):
    spend(journal, "a", NOON - 20 * 24 * HOUR, 50)
    monthly = Purse(journal, Limits(credits_per_month=60))
    refusal = monthly.reserve("b", asked())
    assert refusal is not None
    assert refusal.seconds == 12 * HOUR
    clock.now = datetime(2026, 4, 1, tzinfo=UTC).timestamp()
    assert monthly.reserve("b", asked()) is None


def test_a_clock_that_was_set_back_starts_no_new_day(journal, clock):
    spend(journal, "a", NOON, 50)
    clock.now = NOON - 24 * HOUR
    assert Purse(journal, Limits(credits_per_day=60)).reserve("b", asked()) is not None


def test_a_clock_that_is_set_back_and_corrected_changes_nothing(journal, clock):
    spend(journal, "a", NOON, 40)
    budget = Purse(journal, Limits(credits_per_day=60, credits_per_month=60))
    for now in (NOON - 24 * HOUR, NOON - 60 * 24 * HOUR, NOON):
        clock.now = now
        for books in (budget, Purse(journal, Limits(credits_per_day=60, credits_per_month=60))):
            assert books.reserve("b", asked()).kind == "cap"


@pytest.mark.parametrize("ahead", [24 * HOUR, 400 * 24 * HOUR])
def test_charges_from_a_time_at_which_the_clock_was_ahead_count_and_so_do_later_ones(journal, clock, ahead):
    spend(journal, "a", NOON + ahead, 10)
    limits = Limits(credits_per_day=30)
    assert Purse(journal, limits).reserve("b", asked()) is None
    spend(journal, "b", NOON, 10)
    assert Purse(journal, limits).reserve("c", asked()) is None
    spend(journal, "c", NOON, 10)
    assert Purse(journal, limits).reserve("d", asked()).kind == "cap"


def test_a_clock_that_jumps_a_day_ahead_starts_a_new_day_as_midnight_does(journal, clock):
    spend(journal, "a", NOON, 50)
    budget = Purse(journal, Limits(credits_per_day=60, credits_per_month=160))
    assert budget.reserve("b", asked()).kind == "cap"
    clock.now = NOON + 12 * HOUR
    assert budget.reserve("b", asked()) is None


@pytest.mark.parametrize("jump", [-24 * HOUR, -1, 24 * HOUR])
def test_after_a_jump_of_the_clock_no_request_waits_longer_than_a_minute_for_the_next_minute(journal, clock, jump):
    budget = Purse(journal, Limits(requests_per_minute=2))
    assert [budget.reserve(f"job{k}", asked()) for k in range(2)] == [None, None]
    clock.now += jump
    waited = 0.0
    while (refusal := budget.reserve("later", asked())) is not None:
        clock.now += refusal.seconds
        waited += refusal.seconds
    assert waited <= 60.1


def test_requests_that_the_ledger_dates_in_the_future_count_for_one_minute(journal, clock):
    spend(journal, "a", NOON + 24 * HOUR, 1)
    budget = Purse(journal, Limits(requests_per_minute=1))
    assert budget.reserve("b", asked()).seconds == pytest.approx(60)
    clock.now += 60.1
    assert budget.reserve("b", asked()) is None


def test_a_request_that_fits_if_those_in_flight_cost_less_is_tried_again_soon_and_not_tomorrow(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=100, assumed_credits=70))
    assert budget.reserve("a", asked()) is None
    refusal = budget.reserve("b", asked())
    assert (refusal.kind, refusal.seconds < 5) == ("reserved", True)
    assert "limits.credits_per_day is 100" in refusal.message
    spend(journal, "a", NOON, 30)
    assert budget.reserve("b", asked()) is None


def test_a_request_of_an_earlier_process_is_reserved_until_its_result_is_known(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=60, assumed_credits=30, requests_per_minute=3))
    assert budget.reserve("old", asked()) is None
    journal.close()
    clock.now += 10
    assert budget.reserve("a", asked()) is None
    assert budget.reserve("b", asked()).kind == "reserved"
    spend(journal, "old", NOON, 60)
    assert budget.reserve("b", asked()).kind == "cap"


def test_a_request_of_an_earlier_process_counts_once_in_its_minute(journal, clock):
    budget = Purse(journal, Limits(requests_per_minute=2))
    assert budget.reserve("old", asked()) is None
    journal.close()
    clock.now += 10
    spend(journal, "old", NOON, 1)
    assert budget.reserve("a", asked()) is None
    assert budget.reserve("b", asked()).seconds == pytest.approx(50)


def test_a_restart_changes_nothing(journal, clock):
    spend(journal, "a", NOON - HOUR, 50)
    for _ in range(3):
        assert Purse(journal, Limits(credits_per_day=60)).reserve("b", asked()) is not None


@pytest.mark.parametrize("most", [1, 3, 60])
def test_no_minute_holds_more_requests_than_allowed(journal, clock, most):
    budget = Purse(journal, Limits(requests_per_minute=most))
    passed = []
    for number in range(5 * most):
        while (refusal := budget.reserve(f"job{number}", asked())) is not None:
            assert refusal.kind == "rate"
            clock.now += refusal.seconds
        passed.append(clock.now)
    assert all(later - earlier > 59.999 for earlier, later in zip(passed, passed[most:], strict=False))


def test_fewer_than_one_request_a_minute_are_possible(journal, clock):
    budget = Purse(journal, Limits(requests_per_minute=0.5))
    assert budget.reserve("a", asked()) is None
    refusal = budget.reserve("b", asked())
    assert refusal is not None
    assert refusal.seconds == 120
    clock.now += 119
    assert budget.reserve("b", asked()) is not None
    clock.now += 1
    assert budget.reserve("b", asked()) is None


def test_the_minute_is_counted_across_a_restart(journal, clock):
    spend(journal, "a", NOON - 10, 1)
    refusal = Purse(journal, Limits(requests_per_minute=1)).reserve("b", asked())
    assert refusal is not None
    assert refusal.seconds == pytest.approx(50)


# What is reserved


def charge(journal, job, credits_, *, at=NOON - HOUR, asked_=1, answered="", **fields):
    """Write the charge of a request, as the daemon does."""
    fields = {"provider": "flux", **fields}
    journal.record(
        Row(
            job=job,
            attempt=1,
            source=f"{job}.prompt.txt",
            outcome="completed",
            charged="yes",
            claimed_at=at,
            sent_at=at,
            answered_at=at,
            credits=credits_,
            provider=answered or fields["provider"],
            fields=json.dumps(fields),
            asked=asked_,
            got=asked_,
        )
    )


def reserved(journal, asked_):
    return Purse(journal, Limits(assumed_credits=150)).budget.cost(asked_).high


def test_an_earlier_charge_for_four_images_does_not_raise_the_estimate_for_one_image(journal, clock):
    charge(journal, "a", 120, n=4, asked_=4)
    assert reserved(journal, asked()) == 30
    assert reserved(journal, asked(n=4)) == 120
    assert Purse(journal, Limits(credits_per_day=160)).reserve("b", asked()) is None


def test_the_price_of_a_high_quality_does_not_raise_the_estimate_for_a_low_one(journal, clock):
    charge(journal, "a", 167, provider="openai", quality="high")
    charge(journal, "b", 11, provider="openai", quality="low")
    assert reserved(journal, asked("openai", quality="low")) == 11
    assert reserved(journal, asked("openai", quality="medium")) == 167


@pytest.mark.parametrize(("days", "wanted"), [(29, 400), (31, 150)])
def test_a_high_charge_is_not_used_after_thirty_days(journal, clock, days, wanted):
    charge(journal, "a", 400, at=NOON - days * 24 * HOUR)
    assert reserved(journal, asked()) == wanted


def test_a_charge_of_zero_is_not_used_as_a_price(journal, clock):
    charge(journal, "a", 0)
    assert reserved(journal, asked()) == 150
    charge(journal, "b", 30)
    assert reserved(journal, asked()) == 30


def test_a_charge_counts_for_the_provider_that_was_asked_whatever_name_the_response_has(journal, clock):
    charge(journal, "a", 134, provider="gemini", answered="google")
    assert reserved(journal, asked("gemini")) == 134


def test_a_row_whose_request_is_not_known_counts_for_its_provider(journal, clock):
    spend(journal, "a", NOON - HOUR, 90)
    assert reserved(journal, asked()) == 90


def test_a_lost_response_counts_as_much_as_its_own_request_may_have_cost(journal, clock):
    charge(journal, "a", 11, provider="openai", quality="low")
    charge(journal, "b", None, provider="openai", quality="low", n=2, asked_=2)
    (spent, _) = Purse(journal, Limits(credits_per_day=1000)).budget.spent()["limits.credits_per_day"]
    assert spent == 33


@pytest.mark.parametrize("cap", ["credits_per_day", "credits_per_month"])
def test_a_request_that_alone_is_more_than_a_cap_is_refused_with_the_name_of_the_cap(journal, clock, cap):
    budget = Purse(journal, Limits(**{cap: 100}, assumed_credits=150))
    refusal = budget.reserve("a", asked())
    assert (refusal.kind, f"limits.{cap}" in refusal.message, "limits.assumed_credits" in refusal.message) == (
        "too_expensive",
        True,
        True,
    )
    assert budget.budget.never(asked()) is not None
    charge(journal, "z", 30)
    assert budget.budget.never(asked()) is None
    assert budget.budget.never(asked(n=4)) is not None


def test_what_a_claimed_prompt_may_cost_is_reserved_and_not_counted_twice(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=60, assumed_credits=30, requests_per_minute=9))
    assert [budget.open(job, asked()) for job in "ab"] == [None, None]
    assert budget.open("c", asked()).kind == "reserved"
    assert [budget.spend(job, asked()) for job in "ab"] == [None, None]
    assert budget.open("c", asked()).kind == "reserved"
    budget.end("a")
    assert budget.open("c", asked()) is None


def test_a_reservation_is_no_request_of_this_minute(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=60, assumed_credits=30, requests_per_minute=1))
    assert budget.open("a", asked()) is None
    assert budget.open("b", asked()) is None
    assert budget.reserve("a", asked()) is None


def test_a_question_reserves_nothing_and_considers_each_request_alone(journal, clock):
    spend(journal, "a", NOON - HOUR, 40)
    budget = Purse(journal, Limits(credits_per_day=100, assumed_credits=30))
    cheap, dear = asked(), asked(n=2)
    found = [(one, budget.budget.over_cap(one)) for one in [cheap, dear] * 3]
    assert {one: refusal.kind for one, refusal in found if refusal} == {dear: "cap"}
    assert budget.open("b", cheap) is None


def test_of_two_caps_the_one_that_lasts_longer_is_reported(journal, clock):
    clock.now = datetime(2026, 3, 15, 12, tzinfo=UTC).timestamp()
    spend(journal, "a", clock.now, 50)
    refusal = Purse(journal, Limits(credits_per_day=60, credits_per_month=60)).reserve("b", asked())
    assert "limits.credits_per_month is 60" in refusal.message
    assert "2026-04-01T00:00Z" in refusal.message


def test_a_refusal_names_the_setting_and_what_is_spent_reserved_and_asked_and_when_it_ends(journal, clock):
    spend(journal, "a", NOON - HOUR, 40)
    budget = Purse(journal, Limits(credits_per_day=100))
    assert budget.reserve("b", asked()) is None
    spend(journal, "c", NOON, 25)
    message = budget.reserve("d", asked()).message
    assert message.startswith("limits.credits_per_day is 100: 65 are spent, 40 are reserved for requests in flight,")
    assert "this request may cost 40" in message
    assert message.endswith("the period ends 2026-04-01T00:00Z")


def test_after_one_huge_charge_a_cap_still_refuses(journal, clock):
    charge(journal, "a", 1e308, n=1)
    charge(journal, "b", 1e308, at=NOON)
    assert Purse(journal, Limits(credits_per_day=1e300)).reserve("c", asked(n=4)).kind == "too_expensive"


def test_only_the_reservation_of_a_job_that_is_stuck_before_it_sends_anything_ends(journal, clock):
    budget = Purse(journal, Limits(credits_per_day=60, assumed_credits=30))
    for job in "ab":
        assert budget.open(job, asked()) is None
    assert budget.reserve("b", asked()) is None
    for job in "ab":
        journal.unreserve(job)
    assert budget.open("c", asked()) is None
    assert budget.open("d", asked()).kind == "reserved"
