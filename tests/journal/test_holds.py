"""Why nothing is sent, and until when. The clock is a test clock."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.journal.holds import FIRST_SECONDS, LONGEST_SECONDS, Holds
from imagewatch.protocol.reasons import Reason

KINDS = ["key", "credits", "quota", "endpoint", "unreachable", "disk"]


def test_without_a_hold_every_request_may_be_sent():
    holds = Holds()
    assert holds.waiting(0) is None
    assert holds.first() is None
    assert not holds.probing()
    assert not holds.has("key")
    assert holds.clear() == []


def test_after_its_time_a_hold_admits_one_probe_at_a_time():
    holds = Holds()
    hold = holds.add(Reason("key", "API key rejected"), 100)
    assert (hold.kind, hold.reason.message, hold.until) == ("key", "API key rejected", 100 + FIRST_SECONDS)
    assert holds.waiting(100 + FIRST_SECONDS - 0.1) is hold
    assert holds.waiting(100 + FIRST_SECONDS) is None
    assert holds.probing()
    assert holds.has("key")
    assert holds.first() is hold


def test_several_requests_that_are_refused_for_one_reason_at_the_same_time_make_one_hold():
    holds = Holds()
    hold = holds.add(Reason("credits", "first"), 100)
    assert holds.add(Reason("credits", "second"), 101) is hold
    assert hold.interval == FIRST_SECONDS


def test_each_probe_that_is_refused_doubles_the_wait_up_to_the_longest():
    holds, now, waits = Holds(), 0.0, []
    for _ in range(10):
        hold = holds.add(Reason("key", "no"), now)
        waits.append(hold.until - now)
        now = hold.until
    assert waits == [15, 30, 60, 120, 240, 480, 900, 900, 900, 900]
    assert waits[-1] == LONGEST_SECONDS


def test_the_time_that_the_api_asked_for_counts():
    holds = Holds()
    assert holds.add(Reason("quota", "wait", 5000), 100).until == 5100
    assert holds.add(Reason("quota", "wait", 20), 100).until == 5100
    assert holds.add(Reason("quota", "wait", 7000), 5000).until == 12000


def test_after_a_very_long_wait_the_intervals_stay_within_the_longest():
    holds = Holds()
    holds.add(Reason("quota", "wait", 5000), 0)
    assert holds.add(Reason("quota", "again"), 5000).until == 5000 + LONGEST_SECONDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0, 0.0, -5])
def test_a_refusal_that_asks_for_no_wait_is_not_probed_immediately(kind, seconds):
    holds, now = Holds(), 100.0
    for expected in (15, 30, 60):
        hold = holds.add(Reason(kind, "no", seconds), now)
        assert hold.until - now == expected
        assert holds.add(Reason(kind, "no", seconds), now + 1) is hold
        now = hold.until


def test_a_hold_for_a_busy_api_needs_no_probe_and_ends_automatically():
    holds = Holds()
    hold = holds.add(Reason("busy", "slow down", 2), 100)
    assert hold.brief
    assert holds.waiting(101) is hold
    assert holds.waiting(102) is None
    assert not holds.probing()
    assert holds.first() is None
    assert holds.add(Reason("busy", "slow down", 0), 103).until == 103


def test_the_hold_that_lasts_longest_is_named():
    holds = Holds()
    holds.add(Reason("key", "no key"), 100)
    holds.add(Reason("quota", "no quota", 500), 100)
    holds.add(Reason("busy", "busy", 3000), 100)
    assert holds.waiting(100).kind == "busy"
    assert holds.first().kind == "quota"
    holds.clear("quota")
    assert holds.first().kind == "key"


def test_a_hold_can_be_ended_alone_or_with_all_others():
    holds = Holds()
    for kind in KINDS:
        holds.add(Reason(kind, kind), 100)
    assert [hold.kind for hold in holds.clear("disk")] == ["disk"]
    assert not holds.has("disk")
    assert holds.clear("disk") == []
    assert sorted(hold.kind for hold in holds.clear()) == sorted(set(KINDS) - {"disk"})
    assert holds.first() is None


def test_a_hold_that_begins_again_after_its_end_begins_with_the_shortest_interval():
    holds = Holds()
    holds.add(Reason("key", "no"), 0)
    holds.add(Reason("key", "no"), 100)
    holds.clear()
    assert holds.add(Reason("key", "no"), 200).until == 200 + FIRST_SECONDS


def test_the_first_refusal_of_a_kind_is_shown_and_the_others_are_not_until_the_hold_is_over():
    holds = Holds()
    assert [holds.may_report("key"), holds.may_report("key"), holds.may_report("credits"), holds.may_report("key")] == [
        True,
        False,
        True,
        False,
    ]
    holds.add(Reason("key", "no"), 0)
    holds.clear("key")
    assert [holds.may_report("key"), holds.may_report("credits")] == [True, False]


def test_a_job_that_could_not_show_a_refusal_leaves_that_to_the_next():
    holds = Holds()
    assert [holds.may_report("key"), holds.may_report("credits")] == [True, True]
    holds.not_reported("key")
    assert [holds.may_report("key"), holds.may_report("key"), holds.may_report("credits")] == [True, False, False]


def test_of_many_workers_exactly_one_reports_a_refusal():
    holds, start = Holds(), threading.Barrier(8)

    def worker(_):
        start.wait()
        return [holds.may_report(kind) for kind in KINDS * 50]

    with ThreadPoolExecutor(8) as pool:
        shown = list(pool.map(worker, range(8)))
    assert sum(map(sum, shown)) == len(KINDS)


def test_only_a_response_to_a_request_begun_after_the_refusal_ends_a_hold():
    holds = Holds()
    holds.add(Reason("credits", "none left"), 100)
    assert holds.disproved(99) == []
    assert holds.disproved(100) == []
    assert [hold.kind for hold in holds.disproved(100.5)] == ["credits"]
    assert holds.may_report("credits")


def test_no_response_ends_a_hold_for_a_full_disk():
    holds = Holds()
    holds.add(Reason("disk", "full", 30), 100)
    holds.add(Reason("key", "no"), 100)
    assert [hold.kind for hold in holds.disproved(200)] == ["key"]
    assert holds.has("disk")


calls = st.lists(
    st.tuples(
        st.sampled_from([*KINDS, "busy"]), st.none() | st.floats(-10, 0) | st.floats(0.5, 1e6), st.floats(0, 100)
    ),
    max_size=30,
)


@given(calls)
@settings(max_examples=200, deadline=None)
def test_another_refusal_never_shortens_a_hold(history):
    holds, now, until = Holds(), 0.0, {}
    for kind, seconds, pause in history:
        now += pause
        hold = holds.add(Reason(kind, "no", seconds), now)
        assert hold.until >= max(now, until.get(kind, 0))
        assert hold.interval >= 0
        if kind != "busy" and seconds is None and now >= until.get(kind, 0):
            assert hold.until > now
        until[kind] = hold.until
        assert (holds.waiting(now) is None) == all(end <= now for end in until.values())
