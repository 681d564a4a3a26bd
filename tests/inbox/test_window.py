"""The oldest of very many prompts, compared with a sorted list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.inbox.window import Window

ENTRIES = st.lists(st.tuples(st.floats(0, 1000), st.sampled_from([f"p{n}" for n in range(50)])), unique=True)


@given(ENTRIES, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_it_gives_the_oldest_first_and_runs_low_only_if_there_are_others(entries, most):
    window = Window()
    for entry in entries:
        window.offer(entry, most)
    given_ = []
    while first := window.first():
        window.pop()
        given_.append(first)
    assert given_ == sorted(entries)[: len(given_)]
    assert window.is_low(most) == (len(given_) < len(entries))
    assert len(given_) >= min(most, len(entries))


@given(ENTRIES, st.integers(1, 8), st.data())
@settings(max_examples=200, deadline=None)
def test_all_come_out_in_order_when_it_is_filled_again_whenever_it_runs_low(entries, most, data):
    window, left, given_ = Window(), set(entries), []
    for entry in data.draw(st.permutations(entries)):
        window.offer(entry, most)
    while left:
        if window.is_low(most) and data.draw(st.booleans() if window.first() else st.just(value=True)):
            window.refill(data.draw(st.permutations(sorted(left))), most)
        elif first := window.first():
            window.pop()
            if first in left:  # an entry may be known twice
                given_.append(first)
                left.discard(first)
    assert given_ == sorted(entries)


def test_what_was_taken_out_can_be_put_back():
    window = Window()
    for number in range(10):
        window.offer((float(number), f"p{number}"), 3)
    first = window.first()
    window.pop()
    window.put_back(first)
    assert window.first() == (0.0, "p0")
