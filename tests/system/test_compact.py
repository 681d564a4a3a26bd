"""A table of very many names, compared with a dictionary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.system.compact import Numbers

NAMES = [f"p{number}" for number in range(40)]
KINDS = {"d": st.floats(-1e9, 1e12), "q": st.integers(-(2**63), 2**63 - 1)}


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_it_knows_what_a_dictionary_would_know(kind, data):
    numbers, known = Numbers(kind, most=4), {}
    step = st.tuples(st.sampled_from(["set", "discard", "keep"]), st.sampled_from(NAMES), KINDS[kind])
    for what, name, number in data.draw(st.lists(step, max_size=200)):
        if what == "set":
            numbers.set(name, number)
            known[name] = number
        elif what == "discard":
            assert numbers.discard(name) == (known.pop(name, None) is not None)
        else:  # only those up to this one are still there
            there = [other for other in NAMES if other <= name]
            numbers.begin()
            assert [numbers.find(other) for other in there] == [known.get(other) for other in there]
            numbers.end()
            known = {other: at for other, at in known.items() if other in there}
        assert len(numbers) == len(known)
        assert [numbers.get(other) for other in NAMES] == [known.get(other) for other in NAMES]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_set_and_discarded_while_it_is_gone_through_is_known_as_afterwards(data):
    """A look at a huge folder is done in pieces, and what happens in between is taken note of."""
    numbers, known = Numbers("q", most=4), {}
    for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=30)):
        numbers.set(name, 1)
        known[name] = 1
    found = set()
    numbers.begin()
    for what, name in data.draw(
        st.lists(st.tuples(st.sampled_from(["find", "set", "discard"]), st.sampled_from(NAMES)), max_size=60)
    ):
        if what == "find":
            assert numbers.find(name) == known.get(name)
            found.add(name)
        elif what == "set":
            numbers.set(name, 2)
            known[name] = 2
            found.add(name)
        else:
            assert numbers.discard(name) == (known.pop(name, None) is not None)
            found.discard(name)
    if data.draw(st.booleans()):
        numbers.end()
        known = {name: number for name, number in known.items() if name in found}
    else:
        numbers.stop()
    assert [numbers.get(name) for name in NAMES] == [known.get(name) for name in NAMES]
    assert len(numbers) == len(known)


def test_a_hundred_thousand_names_are_kept_apart():
    numbers = Numbers("d")
    for number in range(100_000):
        numbers.set(f"job-{number}.é", float(number))
    assert len(numbers) == 100_000
    assert all(numbers.get(f"job-{number}.é") == number for number in range(0, 100_000, 7))
    assert numbers.get("job-100000.é") is None
