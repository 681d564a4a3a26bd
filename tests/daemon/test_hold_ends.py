"""When a hold ends, as the log, the status and the notifications show it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagewatch.daemon.held import HoldsThereAre
from imagewatch.journal.holds import Holds
from imagewatch.protocol.reasons import Reason

MIDNIGHT = 1_796_083_200  # 2026-12-01T00:00:00Z
NOW = MIDNIGHT - 39_862.25


class Clocks:
    """A wall clock and a monotonic clock."""

    def __init__(self):
        self.wall, self.monotonic = NOW, 1000.0
        self.holds = Holds()
        self.held = HoldsThereAre(self.holds, lambda: self.wall, lambda: self.monotonic)

    def cap(self):
        """Note that a budget is reached until the end of the day."""
        reason = Reason("cap", "a budget is reached", MIDNIGHT - self.wall)
        self.holds.set_caps({("", "anna"): reason}, self.monotonic)

    def ends(self):
        (hold,) = self.held.holds()
        return self.held.ends(hold)


@given(st.lists(st.floats(-0.49, 0.49), min_size=1, max_size=5), st.floats(0, 30_000))
def test_the_end_of_a_day_is_shown_in_whole_seconds_though_the_two_clocks_do_not_run_alike(differences, passed):
    clocks = Clocks()
    clocks.cap()
    for difference in differences:
        clocks.wall, clocks.monotonic = NOW + passed + difference, 1000.0 + passed
        assert clocks.ends() == "2026-12-01T00:00:00Z"


def test_the_same_end_is_shown_while_a_cap_is_compared_again_and_again():
    clocks = Clocks()
    for number in range(100):
        clocks.cap()
        clocks.wall += 60 + (0.4 if number % 2 else -0.4)
        clocks.monotonic += 60
        assert clocks.ends() == "2026-12-01T00:00:00Z"


def test_the_same_end_of_the_same_hold_is_shown_however_the_clocks_drift():
    clocks = Clocks()
    clocks.holds.add(Reason("key", "the key was refused", 3600), clocks.monotonic)
    before = clocks.ends()
    for _ in range(30):
        clocks.monotonic += 100
        clocks.wall += 101.5
        assert clocks.ends() == before


def test_the_end_changes_when_a_hold_is_prolonged_or_the_clock_is_set():
    clocks = Clocks()
    clocks.holds.add(Reason("key", "the key was refused", 60), clocks.monotonic)
    assert clocks.ends() == "2026-11-30T12:56:38Z"
    clocks.wall += 3600
    assert clocks.ends() == "2026-11-30T13:56:38Z"
    clocks.monotonic += 61
    clocks.wall += 61
    clocks.holds.add(Reason("key", "the key was refused", 60), clocks.monotonic)
    assert clocks.ends() == "2026-11-30T13:57:39Z"


def test_a_hold_that_only_a_person_ends_has_no_end():
    clocks = Clocks()
    clocks.holds.add(Reason("manual", "put on hold", float("inf")), clocks.monotonic)
    assert clocks.ends() is None
