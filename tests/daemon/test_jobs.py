"""The table of jobs: what may be sent, what may be delivered, and which names are taken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.daemon.jobs import Job, Jobs, Need, State
from imagewatch.inbox.candidate import ANYWHERE

if TYPE_CHECKING:
    from imagewatch.inbox.candidate import Key


def jobs(concurrency: int = 2) -> Jobs:
    table = Jobs()
    table.configure(concurrency)
    return table


def started(table: Jobs, job: str, key: Key | None = None) -> Job:
    one = Job(job, key or ("", job))
    table.start(one)
    return one


# What may be sent and delivered


def test_no_more_requests_are_sent_at_the_same_time_than_there_are_slots():
    table = jobs(2)
    assert table.may_send(2)
    started(table, "a")
    assert table.may_send(2)
    started(table, "b")
    assert not table.may_send(2)


def test_nothing_is_sent_during_a_hold_and_only_one_request_as_a_probe():
    table = jobs(4)
    assert not table.may_send(0)
    assert table.may_send(1)
    started(table, "probe")
    assert not table.may_send(1)


def test_a_job_that_is_only_delivered_uses_no_slot_but_half_as_many_more_may_be_at_work():
    table = jobs(2)
    for job in ("a", "b"):
        started(table, job)
        table.deliver(job)
    assert table.may_send(2)
    started(table, "c")
    assert not table.may_send(2)


def test_what_was_paid_for_is_delivered_during_a_hold_unless_the_disk_fails():
    table = jobs(1)
    assert table.may_deliver(stores_work=True)
    assert not table.may_deliver(stores_work=False)
    started(table, "a")
    assert not table.may_deliver(stores_work=True)


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 96), st.integers(0, 96))
def test_neither_the_slots_nor_the_workers_are_ever_exceeded(concurrency, slots, sending, delivering):
    table = jobs(concurrency)
    for number in range(sending + delivering):
        started(table, f"{number}")
    for number in range(delivering):
        table.deliver(f"{number}")
    most_workers = concurrency + concurrency // 2
    assert table.may_send(slots) == (sending < slots and sending + delivering < most_workers)
    assert table.may_deliver(stores_work=True) == table.may_send(concurrency)


# Which names are taken


def test_a_name_is_taken_while_its_job_is_at_work_deferred_or_left_to_a_person():
    table = jobs()
    started(table, "a", ("sub", "cat"))
    table.defer(Job("b", ("", "dog")), 5.0)
    table.leave(Job("c", ("", "owl")))
    taken = table.taken()
    assert all(key in taken for key in [("sub", "cat"), ("", "dog"), ("", "owl")])
    assert ("", "cat") not in taken
    table.take("a")
    assert ("sub", "cat") not in table.taken()


def test_a_job_that_waits_for_its_name_does_not_keep_the_newer_file_from_being_claimed():
    table = jobs()
    table.defer(Job("a", ("", "cat")), 5.0, Need.NAME)
    assert ("", "cat") not in table.taken()


def test_a_job_of_an_unknown_folder_takes_its_name_in_every_folder():
    table = jobs()
    table.leave(Job("a", (ANYWHERE, "cat")))
    assert ("any/where", "cat") in table.taken()
    assert ("any/where", "dog") not in table.taken()


# Deferred jobs


def test_deferred_jobs_are_carried_on_when_they_are_due_the_oldest_first():
    table = jobs()
    for job, at in (("late", 9.0), ("second", 2.0), ("first", 1.0)):
        table.defer(Job(job), at)
    assert [job.id for job in table.due(2.0, is_held=False)] == ["first", "second"]
    assert table.next_due(may_send=True, may_deliver=False) == 1.0


def test_during_a_hold_a_job_that_waits_for_its_turn_is_carried_on_immediately():
    table = jobs()
    table.defer(Job("turn"), 60.0, Need.TURN)
    table.defer(Job("request"), 60.0, Need.REQUEST)
    assert table.due(0.0, is_held=False) == []
    assert [job.id for job in table.due(0.0, is_held=True)] == ["turn"]


@pytest.mark.parametrize("need", list(Need))
def test_a_job_that_needs_a_request_is_not_waited_for_while_nothing_may_be_sent(need):
    table = jobs()
    table.defer(Job("a"), 7.0, need)
    assert table.next_due(may_send=True, may_deliver=True) == 7.0
    assert table.next_due(may_send=False, may_deliver=True) == (math.inf if need is Need.REQUEST else 7.0)
    assert table.next_due(may_send=False, may_deliver=False) == math.inf


@pytest.mark.parametrize(
    ("need", "may_continue"), [(Need.NOTHING, True), (Need.TURN, True), (Need.NAME, False), (Need.REQUEST, False)]
)
def test_once_waits_behind_a_hold_only_for_jobs_that_need_no_request(need, may_continue):
    table = jobs()
    table.defer(Job("a"), 7.0, need)
    assert table.any_may_continue() == may_continue


def test_once_does_not_wait_for_a_stuck_job_or_one_whose_name_is_not_free():
    table = jobs()
    table.retry_stuck(Job("fails"), 0.0)
    table.defer(Job("name", ("", "cat")), 7.0, Need.NAME)
    assert not table.any_is_awaited(0.0)
    table.free_name(("", "dog"), 0.0)
    assert not table.any_is_awaited(0.0)
    table.free_name(("", "cat"), 0.0)
    assert table.any_is_awaited(0.0)


# Stuck jobs that are retried automatically


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (("", "cat"), {"job": "a", "source": "cat.prompt.txt"}),
        (("sub/deep", "cat"), {"job": "a", "source": "sub/deep/cat.prompt.txt"}),
        ((ANYWHERE, "cat"), {"job": "a"}),
        (None, {"job": "a"}),
    ],
)
def test_a_log_event_about_a_job_has_its_path_if_that_is_known(key, names):
    assert Job("a", key).names == names


def test_a_stuck_job_waits_for_twice_as_long_each_time_and_at_most_five_minutes():
    table, job = jobs(), Job("a", ("sub", "a"))
    waits = []
    for _ in range(8):
        table.retry_stuck(table.take("a") if "a" in table else job, 100.0)
        waits.append(job.at - 100.0)
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    assert table.stuck == {"a": ("sub", "a")}
    assert table.clear_failure(job)
    assert not table.clear_failure(job)
    assert table.stuck == {}


def test_a_folder_is_closed_while_a_job_from_it_fails_and_the_inbox_itself_only_for_two():
    table = jobs()
    table.retry_stuck(Job("a", ("sub/deep", "a")), 0.0)
    table.retry_stuck(Job("b", ("", "b")), 0.0)
    table.retry_stuck(Job("unknown"), 0.0)
    assert table.closed_folders() == {"sub/deep"}
    table.retry_stuck(Job("c", ("", "c")), 0.0)
    assert table.closed_folders() == {"sub/deep", ""}


def test_a_job_that_fails_again_and_again_is_shown_as_stuck_while_it_is_retried():
    table = jobs()
    job = Job("a", ("", "a"))
    table.retry_stuck(job, 0.0)
    table.start(job)
    assert (table.stuck, table.at_work, table.any_fails) == ({"a": ("", "a")}, {"a": ("", "a")}, True)


# All states together

MOVES = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["start", "deliver", "defer", "leave", "take"])))


@given(MOVES)
def test_each_job_is_in_one_state_and_the_questions_agree(moves):
    table, expected = jobs(3), dict[str, State]()
    for job, move in moves:
        if move == "deliver":
            if expected.get(job) is not State.AT_WORK:
                continue  # only a worker saves a response
            table.deliver(job)
            expected[job] = State.DELIVERING
            continue
        one = table.take(job)
        expected.pop(job, None)
        if move == "start":
            started(table, job)
            expected[job] = State.AT_WORK
        elif move == "defer":
            table.defer(one, 1.0)
            expected[job] = State.DEFERRED
        elif move == "leave":
            table.leave(one)
            expected[job] = State.LEFT
    at_work = {job for job, state in expected.items() if state in {State.AT_WORK, State.DELIVERING}}
    left = {job for job, state in expected.items() if state is State.LEFT}
    assert (set(table.at_work), set(table.left)) == (at_work, left)
    assert set(table) == set(expected) - left
    assert [job in table for job in "abc"] == [job in expected and job not in left for job in "abc"]
    assert table.any_at_work == bool(at_work)
    assert table.any_deferred == (State.DEFERRED in expected.values())
