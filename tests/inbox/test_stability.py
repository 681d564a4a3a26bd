"""When a stem has settled. Every clock is invented."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.inbox.stability import Settling

KEY = ("", "cat")
WALL = 1_800_000_000.0


def observe(settling, now, print_="a", *, age=0.0, wall=None, key=KEY):
    """Observe a stem whose newest change is some seconds ago, by the wall clock."""
    wall = WALL + now if wall is None else wall
    return settling.observe(key, print_, changed_at=wall - age, now=now, wall=wall)


def test_a_stem_that_was_just_written_has_to_be_unchanged_for_the_whole_time():
    settling = Settling(5)
    assert [observe(settling, now) for now in (100, 101, 104.5, 105, 200)] == [5, 4, 0.5, 0, 0]


def test_the_first_scan_gives_credit_for_the_time_since_the_last_change():
    assert observe(Settling(5), 100, age=3) == 2
    assert observe(Settling(5), 100, age=5) == 0
    assert observe(Settling(5), 100, age=10**6) == 0


def test_credit_does_not_grow_beyond_the_settling_time():
    settling = Settling(5)
    observe(settling, 100, age=10**6)
    assert observe(settling, 100, "b") == 5


@pytest.mark.parametrize("age", [-0.001, -10, -(10**9)])
def test_a_change_in_the_future_counts_as_now(age):
    settling = Settling(5)
    assert observe(settling, 100, age=age) == 5
    assert observe(settling, 105, age=age) == 0


def test_any_change_starts_the_time_again():
    settling = Settling(5)
    observe(settling, 100)
    assert observe(settling, 104, "b") == 5
    assert observe(settling, 108, "c") == 5
    assert observe(settling, 112, "c") == 1
    assert observe(settling, 113, "c") == 0
    assert observe(settling, 114, "d") == 5


def test_a_change_back_to_what_was_seen_before_is_a_change():
    settling = Settling(5)
    observe(settling, 100, "a")
    observe(settling, 101, "b")
    assert observe(settling, 102, "a") == 5


def test_a_change_that_shows_an_old_date_gets_no_credit():
    settling = Settling(5)
    observe(settling, 100)
    assert observe(settling, 101, "b", age=10**6) == 5


def test_a_touch_starts_the_time_again_although_nothing_is_different():
    settling = Settling(5)
    observe(settling, 100, age=100)
    settling.touch(KEY, 103)
    assert observe(settling, 104, age=100) == 4
    assert observe(settling, 108, age=100) == 0


def test_a_touch_before_the_first_scan_takes_the_credit_away():
    settling = Settling(5)
    settling.touch(KEY, 99)
    assert observe(settling, 100, age=100) == 4


def test_a_touch_long_ago_leaves_the_credit_of_the_file():
    settling = Settling(5)
    settling.touch(KEY, 10)
    assert observe(settling, 100, age=2) == 3


def test_stems_do_not_disturb_each_other():
    settling = Settling(5)
    observe(settling, 100)
    settling.touch(("", "dog"), 103)
    observe(settling, 103, key=("sub", "cat"))
    assert observe(settling, 105) == 0


def test_who_is_missing_is_forgotten_and_begins_again_when_it_comes_back():
    settling = Settling(5)
    observe(settling, 100)
    observe(settling, 100, key=("", "dog"))
    settling.forget_others()
    observe(settling, 101, key=("", "dog"))
    settling.forget_others()
    assert observe(settling, 105) == 5
    assert observe(settling, 105, key=("", "dog")) == 0


def test_a_touch_of_one_who_is_missing_is_forgotten_too():
    settling = Settling(5)
    settling.touch(KEY, 100)
    settling.forget_others()
    settling.forget_others()
    assert observe(settling, 101, age=10) == 0


def test_a_touch_between_two_scans_outlives_the_next_one():
    settling = Settling(5)
    observe(settling, 100, age=10)
    settling.forget_others()
    settling.touch(KEY, 103)
    assert observe(settling, 104, age=10) == 4
    settling.forget_others()
    assert observe(settling, 105, age=10) == 3


@pytest.mark.parametrize("jump", [-(10.0**9), -3600.0, 3600.0, 10.0**9])
def test_a_wall_clock_that_jumps_changes_nothing_after_the_first_scan(jump):
    settling = Settling(5)
    observe(settling, 100, age=1)
    changed = WALL + 99
    left = settling.observe(KEY, "a", changed_at=changed, now=102, wall=WALL + 102 + jump)
    assert left == 2
    assert settling.observe(KEY, "b", changed_at=changed, now=103, wall=WALL + 103 + jump) == 5


@pytest.mark.parametrize("jump", [3600.0, 10.0**9])
def test_a_wall_clock_that_jumps_ahead_does_not_outvote_a_touch(jump):
    settling = Settling(5)
    observe(settling, 100)
    settling.touch(KEY, 101)
    assert observe(settling, 102, wall=WALL + jump, age=jump) == 4


def test_without_a_settling_time_everything_is_ready_immediately():
    settling = Settling(0)
    assert observe(settling, 100) == 0
    settling.touch(KEY, 101)
    assert observe(settling, 101, "b") == 0


events = st.lists(
    st.tuples(st.sampled_from(["observe", "touch"]), st.sampled_from("ab"), st.floats(0, 4), st.floats(-1e9, 1e9)),
    max_size=20,
)


@given(events, st.floats(-100, 100))
@settings(max_examples=300, deadline=None)
def test_a_stem_is_never_ready_before_it_was_unchanged_long_enough_by_our_own_observation(history, age):
    settling, now = Settling(5), 1000.0
    seen, last_event = None, None
    for kind, print_, pause, wall in history:
        now += pause
        if kind == "touch":
            settling.touch(KEY, now)
            seen, last_event = None, now
            continue
        if seen is not None and seen != print_:
            last_event = now
        left = settling.observe(KEY, print_, changed_at=wall - age, now=now, wall=wall)
        seen = print_
        assert 0 <= left <= 5 + 1e-6
        if last_event is not None:
            assert left >= last_event + 5 - now - 1e-6
        if not left:  # what comes next is another file
            seen, last_event = None, None
