"""A table of very many names, compared with a dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.dates import Dates

NAMES = [f"p{number}" for number in range(40)]
steps = st.lists(
    st.tuples(st.sampled_from(["set", "discard", "keep"]), st.sampled_from(NAMES), st.floats(-1e9, 1e12)), max_size=200
)


@given(steps)
@settings(max_examples=200, deadline=None)
def test_it_knows_what_a_dictionary_would_know(history):
    dates, known = Dates(most=4), {}
    for step, name, date in history:
        if step == "set":
            dates.set(name, date)
            known[name] = date
        elif step == "discard":
            assert dates.discard(name) == (known.pop(name, None) is not None)
        else:  # only those up to this one are still there
            there = [other for other in NAMES if other <= name]
            dates.begin()
            assert [dates.find(other) for other in there] == [known.get(other) for other in there]
            dates.end()
            known = {other: at for other, at in known.items() if other in there}
        assert (len(dates), sorted(dates)) == (len(known), sorted(known.values()))
        assert [dates.get(other) for other in NAMES] == [known.get(other) for other in NAMES]


def test_a_hundred_thousand_names_are_kept_apart():
    dates = Dates()
    for number in range(100_000):
        dates.set(f"job-{number}.é", float(number))
    assert len(dates) == 100_000
    assert all(dates.get(f"job-{number}.é") == number for number in range(0, 100_000, 7))
    assert dates.get("job-100000.é") is None
