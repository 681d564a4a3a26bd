"""The oldest of very many prompts, compared with a sorted list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.inbox.oldest_prompts import OldestPrompts

ENTRIES = st.lists(st.tuples(st.floats(0, 1000), st.sampled_from([f"p{n}" for n in range(50)])), unique=True)


@given(ENTRIES, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_it_gives_the_oldest_first_and_runs_low_only_if_there_are_others(entries, most):
    oldest = OldestPrompts()
    for entry in entries:
        oldest.offer(entry, most)
    given_ = []
    while first := oldest.first():
        oldest.pop()
        given_.append(first)
    assert given_ == sorted(entries)[: len(given_)]
    assert oldest.is_low(most) == (len(given_) < len(entries))
    assert len(given_) >= min(most, len(entries))


@given(ENTRIES, st.integers(1, 8), st.data())
@settings(max_examples=200, deadline=None)
def test_all_come_out_in_order_when_it_is_filled_again_whenever_it_runs_low(entries, most, data):
    oldest, left, given_ = OldestPrompts(), set(entries), []
    for entry in data.draw(st.permutations(entries)):
        oldest.offer(entry, most)
    while left:
        if oldest.is_low(most) and data.draw(st.booleans() if oldest.first() else st.just(value=True)):
            oldest.refill(data.draw(st.permutations(sorted(left))), most)
        elif first := oldest.first():
            oldest.pop()
            if first in left:  # an entry may be known twice
                given_.append(first)
                left.discard(first)
    assert given_ == sorted(entries)


def test_what_was_removed_can_be_put_back():
    oldest = OldestPrompts()
    for number in range(10):
        oldest.offer((float(number), f"p{number}"), 3)
    first = oldest.first()
    oldest.pop()
    oldest.put_back(first)
    assert oldest.first() == (0.0, "p0")
