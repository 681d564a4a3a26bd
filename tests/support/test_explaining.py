"""A helper that waits reports what it waited for, and what there is instead."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from support.daemon import until
from support.explaining import seen, wanted

NAMES = ["cat", "dog"]


def failing(condition, **more):
    with pytest.raises(AssertionError) as error:
        until(condition, 0.0, **more)
    return str(error.value).splitlines()


def test_a_lambda_is_shown_as_it_is_written_with_the_values_in_it():
    count = 3
    assert failing(lambda: len(NAMES) == count) == [
        "waited 0 s for: len(NAMES) == count",
        "but there is:",
        "  len(NAMES) = 2",
        "  count = 3",
        "  NAMES = ['cat', 'dog']",
    ]


def test_what_varies_inside_of_a_condition_is_left_out():
    assert seen(lambda: all(name == "owl" for name in NAMES)) == {
        "all((name == 'owl' for name in NAMES))": "False",
        "NAMES": "['cat', 'dog']",
    }


def test_of_two_lambdas_in_one_line_the_right_one_is_shown():
    first, second = (lambda: NAMES == []), (lambda: NAMES == ["owl"])
    assert (wanted(first), wanted(second)) == ("NAMES == []", "NAMES == ['owl']")


def test_an_error_is_a_value_too():
    assert seen(lambda: Path("/nowhere").read_text() == "")["Path('/nowhere').read_text()"].startswith("FileNotFound")


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (Path("/nowhere").exists, "PosixPath('/nowhere').exists()"),
        (functools.partial(failing, 1), "failing(1,)"),
        (failing, "def failing(condition, **more):"),
    ],
)
def test_any_other_condition_is_named(condition, text):
    assert wanted(condition).startswith(text)


def test_words_take_the_place_of_the_source_where_they_are_given():
    lines = failing(lambda: False, what="the end of the world", saw=lambda: "the world")
    assert lines == ["waited 0 s for: the end of the world", "but there is:", "the world"]
