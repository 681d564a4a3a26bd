"""Whose turn is it? Folders, their owners and how much each gets are invented."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.inbox.fair_turns import FairTurns


def served(
    turns: FairTurns[str], count: int, owners: dict[str, int], amounts: dict[str, float] | None = None
) -> list[str]:
    """Give so many turns to folders that always want another one."""
    names = []
    for _ in range(count):
        name = turns.first()
        assert name is not None
        turns.charge(name, (amounts or {}).get(name, 1.0))
        turns.join(name, owners[name], (amounts or {}).get(name, 0.0))
        names.append(name)
    return names


def waiting(owners: dict[str, int], amounts: dict[str, float] | None = None) -> FairTurns[str]:
    turns: FairTurns[str] = FairTurns()
    for name, owner in owners.items():
        turns.join(name, owner, (amounts or {}).get(name, 0.0))
    return turns


def test_folders_of_one_owner_take_turns_in_the_order_in_which_they_came():
    owners = dict.fromkeys(["a", "b", "c"], 1)
    assert served(waiting(owners), 7, owners) == ["a", "b", "c", "a", "b", "c", "a"]


def test_a_folder_that_comes_later_waits_for_one_turn_of_another_and_not_for_all_it_has_missed():
    owners = {"mallory": 1, "colleague": 1}
    turns = waiting({"mallory": 1})
    served(turns, 1000, owners)
    turns.join("colleague", 1)
    assert set(served(turns, 2, owners)) == {"mallory", "colleague"}
    assert Counter(served(turns, 1000, owners)) == {"mallory": 500, "colleague": 500}


def test_a_folder_that_waited_for_nothing_saves_up_no_turns():
    owners = {"a": 1, "b": 1}
    turns = waiting(owners)
    served(turns, 2, owners)
    turns.leave("b")
    served(turns, 1000, owners)
    turns.join("b", 1)
    assert Counter(served(turns, 10, owners)) == {"a": 5, "b": 5}


def test_very_many_folders_of_one_owner_get_no_more_turns_than_a_few():
    owners = {f"m{number}": 666 for number in range(10_000)} | {"colleague": 1}
    turns = waiting({name: owner for name, owner in owners.items() if name != "colleague"})
    served(turns, 50, owners)
    turns.join("colleague", 1)
    got = served(turns, 900, owners)
    assert got.index("colleague") <= 1
    assert got.count("colleague") == pytest.approx(100, abs=2), "every ninth turn: the others count as eight folders"


def test_folders_of_several_owners_get_as_many_turns_as_each_other_while_no_owner_has_many():
    owners = {"a": 1, "b": 1, "c": 1, "d": 2}
    assert Counter(served(waiting(owners), 400, owners)) == dict.fromkeys(owners, 100)


def test_who_takes_little_time_comes_before_those_who_take_much():
    amounts = {f"m{number}": 5.0 for number in range(100)} | {"colleague": 0.1}
    owners = dict.fromkeys(amounts, 1)
    turns = waiting({name: 1 for name in owners if name != "colleague"}, amounts)
    served(turns, 30, owners, amounts)
    turns.join("colleague", 1, amounts["colleague"])
    assert turns.first() == "colleague"


def test_time_is_shared_whatever_one_turn_takes():
    amounts = {"long": 10.0, "short": 1.0}
    owners = dict.fromkeys(amounts, 1)
    got = Counter(served(waiting(owners, amounts), 1100, owners, amounts))
    assert got["short"] / got["long"] == pytest.approx(10, rel=0.05)


def test_that_very_many_folders_had_their_turn_is_not_gone_through_at_each_turn():
    class ScanResult(float):
        """An amount that counts how often it is compared."""

        compared = 0

        def __add__(self, other: float) -> ScanResult:
            return ScanResult(float(self) + other)

        __radd__ = __add__

        def __gt__(self, other: float) -> bool:
            ScanResult.compared += 1
            return float(self) > other

    count = 3000
    turns = waiting(dict.fromkeys(map(str, range(count)), 1))
    for _ in range(count):
        turns.charge(turns.first(), ScanResult(1.0))
    assert ScanResult.compared < 20 * count


def test_folders_that_come_and_go_without_end_leave_nothing_behind():
    turns = waiting({"always": 1})
    for number in range(2000):
        turns.join(f"d{number}", 1)
        turns.join(f"d{number + 1}", 1)
        name = turns.first()
        turns.charge(name)
        turns.forget(name)
    assert len(turns._lines[1]._had) < 50
    assert "d1" not in turns


STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "forget", "turn"]), st.sampled_from("abcdefgh"), st.floats(0, 5)),
    max_size=150,
)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_only_who_waits_gets_a_turn(steps):
    turns: FairTurns[str] = FairTurns(most=2)
    wait: set[str] = set()
    for what, name, amount in steps:
        if what == "join":
            turns.join(name, ord(name) % 3, amount)
            wait.add(name)
        elif what == "leave":
            turns.leave(name)
            wait.discard(name)
        elif what == "forget":
            turns.forget(name)
            wait.discard(name)
        else:
            first = turns.first()
            assert (first in wait) if wait else first is None
            if first is not None:
                turns.charge(first, amount)
                wait.discard(first)
        assert set(turns) == wait
        assert len(turns) == len(wait)
    for _ in range(len(wait)):
        name = turns.first()
        assert name in wait
        turns.charge(name, 1.0)
        wait.discard(name)
    assert turns.first() is None


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=200), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_no_one_waits_longer_than_a_round_however_others_come_and_go(comings, owners):
    """``x`` waits; the others join again and again, also if they have just been served."""
    turns: FairTurns[str] = FairTurns()
    for name in "abcd":
        turns.join(name, ord(name) % owners)
    for name in comings[:-1]:
        turns.charge(turns.first())
        turns.join(name, ord(name) % owners)
    turns.join("x", 99)
    waited = 0
    while turns.first() != "x":
        turns.charge(turns.first())
        for name in "abcd":
            turns.join(name, ord(name) % owners)
        waited += 1
    assert waited <= 5
