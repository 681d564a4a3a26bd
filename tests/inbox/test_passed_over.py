"""Prompts that are passed over for now: a number of them, which folders share."""

from __future__ import annotations

from imagewatch.inbox.passed_over import PassedOver


def test_what_was_passed_over_is_there_until_it_is_removed():
    aside = PassedOver()
    for key in (("", "a"), ("x", "a"), ("x/y", "b"), ("x", "a")):
        aside.add(key, 1.0)
    assert (len(aside), ("x", "a") in aside, ("x", "b") in aside) == (3, True, False)
    assert sorted(aside) == [(("", "a"), 1.0), (("x", "a"), 1.0), (("x/y", "b"), 1.0)]
    assert (aside.stems("x"), aside.stems("z"), sorted(aside.names())) == ({"a"}, set(), ["", "x"])
    aside.discard(("x", "a"))
    aside.discard(("x", "a"))
    aside.discard(("x/y", "b"))
    assert (len(aside), aside.names(), list(aside)) == (1, [""], [(("", "a"), 1.0)])


def test_a_folder_is_full_by_its_own_prompts_and_not_by_those_of_others():
    aside = PassedOver(most=10, most_each=2)
    aside.add(("x", "a"), 1.0)
    assert not aside.is_full("x")
    aside.add(("x/deep", "b"), 1.0)
    assert (aside.is_full("x"), aside.is_full("y"), aside.is_full("")) == (True, False, False)
    aside.discard(("x", "a"))
    assert not aside.is_full("x")


def test_when_there_are_too_many_in_all_every_folder_that_has_one_is_full():
    aside = PassedOver(most=3, most_each=3)
    for number, folder in enumerate("xyz"):
        aside.add((folder, str(number)), 1.0)
    assert [aside.is_full(folder) for folder in "wxyz"] == [False, True, True, True]
    aside.discard(("x", "0"))
    assert [aside.is_full(folder) for folder in "wxyz"] == [False] * 4
