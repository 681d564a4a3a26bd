"""What several threads want at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagewatch.system import shared
from imagewatch.system.shared import Together

LONG = 60.0
"""As long as others are waited for where they come, or are not to be waited for, seconds."""


def together(act, *items, expected=None):
    """Let a thread for each item want it done; return what became of each."""
    one = Together(act)
    with ThreadPoolExecutor(len(items)) as pool:
        done = [pool.submit(one.do, item, lambda: expected or len(items)) for item in items]
        return [future.exception() for future in done]


def test_what_threads_want_together_is_done_once_in_one_of_them(monkeypatch):
    monkeypatch.setattr(shared, "_PATIENCE", LONG)
    batches = []

    def act(items):
        batches.append((sorted(items), threading.get_ident()))
        return {}

    assert together(act, 1, 2, 3) == [None, None, None]
    assert [items for items, _ in batches] == [[1, 2, 3]]


def test_one_thread_alone_waits_for_no_other(monkeypatch):
    monkeypatch.setattr(shared, "_PATIENCE", LONG)
    began = time.monotonic()
    assert together(lambda _: {}, 1) == [None]
    assert time.monotonic() - began < LONG * 0.9  # as long as others are waited for


def test_others_that_do_not_come_are_not_waited_for_long():
    batches = []
    began = time.monotonic()
    assert together(lambda items: batches.append(items) or {}, 1, expected=2) == [None]
    assert batches == [[1]]
    assert time.monotonic() - began < 5


def test_an_error_is_that_of_its_item_alone():
    def act(items):
        return {number: ValueError(item) for number, item in enumerate(items) if item == "bad"}

    first, second, third = together(act, "good", "bad", "fine")
    assert (first, str(second), third) == (None, "bad", None)


def test_an_error_of_the_whole_is_that_of_all():
    def act(_):
        raise OSError("the disk is full")

    assert [str(error) for error in together(act, 1, 2)] == ["the disk is full"] * 2


def test_after_an_error_the_next_is_done():
    acts = [OSError("once"), None]

    def act(_):
        if error := acts.pop(0):
            raise error
        return {}

    one = Together(act)
    with pytest.raises(OSError, match="once"):
        one.do(1, lambda: 1)
    one.do(2, lambda: 1)
    assert acts == []
