"""Which folder is scanned next? Every clock is invented."""

from __future__ import annotations

import math

import pytest

from imagewatch.inbox.schedule import AHEAD, Allowance, Schedule


def everything(schedule: Schedule, seconds: float = 0.001) -> list[str]:
    """Do all that waits, one thing a turn."""
    done = []
    while (name := schedule.turn()) is not None:
        what = schedule.take(name)
        assert what is not None
        done.append(what)
        schedule.charge(name, seconds, more=False)
    return done


@pytest.fixture
def schedule() -> Schedule:
    return Schedule(lambda _: 0)


def test_a_folder_with_very_many_in_it_lets_the_others_in_between(schedule):
    schedule.soon_all([f"mallory/d{number}" for number in range(1000)])
    schedule.soon_all(["", "a", "b/c"])
    done = everything(schedule)
    assert len(done) == 1003
    assert max(done.index(path) for path in ("", "a", "b/c")) <= 4


def test_a_folder_that_takes_long_does_not_keep_back_one_that_comes_meanwhile(schedule):
    schedule.soon("mallory")
    assert schedule.take("mallory") == "mallory"
    schedule.charge("mallory", 0.01, more=True)
    schedule.soon("a")
    assert schedule.turn() == "a"


def test_what_is_begun_goes_on_when_nothing_else_waits(schedule):
    schedule.soon("mallory")
    schedule.take("mallory")
    schedule.charge("mallory", 0.01, more=True)
    assert (schedule.turn(), schedule.take("mallory"), len(schedule)) == ("mallory", None, 1)
    schedule.charge("mallory", 0.01, more=False)
    assert (schedule.turn(), len(schedule)) == (None, 0)


def test_a_folder_with_few_files_goes_before_thousands_with_many(schedule):
    names = [f"m{number}" for number in range(3000)]
    for name in names:
        schedule.soon(name)
        schedule.take(name)
        schedule.charge(name, 0.005, more=False)
    schedule.soon("colleague")
    schedule.take("colleague")
    schedule.charge("colleague", 0.0001, more=False)
    schedule.soon_all(names)
    schedule.soon("colleague")
    assert everything(schedule).index("colleague") <= 1


def test_each_folder_is_scanned_when_its_time_has_come_and_once(schedule):
    schedule.later("a", 10.0)
    schedule.later("b", 5.0)
    schedule.later("a", 7.0)
    schedule.later("a", 30.0)
    assert schedule.due == 5.0
    schedule.wake(6.9)
    assert (everything(schedule), schedule.due) == (["b"], 7.0)
    schedule.wake(100.0)
    assert (everything(schedule), schedule.due) == (["a"], math.inf)


def test_who_is_scanned_anyway_is_not_scanned_again_for_an_earlier_request(schedule):
    schedule.later("a", 5.0)
    schedule.soon("a")
    schedule.soon("a")
    schedule.later("a", 3.0)
    assert (everything(schedule), schedule.due) == (["a"], math.inf)


def test_a_folder_that_is_missing_is_forgotten(schedule):
    schedule.soon_all(["a", "a/b"])
    schedule.later("a/c", 5.0)
    for path in ("a", "a/b", "a/c"):
        schedule.forget(path)
    assert (everything(schedule), schedule.due) == ([], math.inf)


@pytest.mark.parametrize("others", [[], ["mallory/gone"]])
def test_what_is_begun_continues_although_a_folder_beside_it_is_missing(schedule, others):
    schedule.soon_all(["mallory", *others])
    schedule.take("mallory")
    schedule.charge("mallory", 0.01, more=True)
    schedule.forget("mallory/gone")
    assert schedule.turn() == "mallory"


def test_folders_that_come_and_go_without_end_leave_nothing_behind_in_the_schedule(schedule):
    for number in range(1000):
        schedule.soon_all([f"d{number}", f"d{number + 1}"])
        name = schedule.turn()
        schedule.take(name)
        schedule.charge(name, 0.01, more=False)
        schedule.ahead(name)
        schedule.forget(name)
    assert schedule.turn() == "d1000"
    assert len(schedule) == len(schedule._waiting) == len(schedule._turns) == 1
    assert len(schedule._seconds) <= 1


def test_a_storm_of_requests_takes_no_memory(schedule):
    for number in range(10_000):
        schedule.later(f"m{number % 10}", 1e9 - number)
    assert len(schedule._later) < 200


def test_checking_ahead_takes_turns_with_scanning(schedule):
    schedule.soon("a")
    schedule.ahead("a")
    schedule.ahead("b")
    assert sorted(everything(schedule)) == sorted(["a", AHEAD, AHEAD])


def test_scanning_may_take_much_at_first_and_a_tenth_in_the_long_run():
    allowance, now, busy = Allowance(0.0), 0.0, 0.0
    marks = []
    while now < 1000:
        allowance.refill(now)
        if allowance.may_go_on(0.0):
            allowance.spend(0.01)
            now, busy = now + 0.01, busy + 0.01
        now += allowance.rest()
        marks.append((now, busy))
    assert next(at for at, used in marks if used >= 10) == pytest.approx(10, rel=0.2)
    assert busy == pytest.approx(10 + 1000 / 10, rel=0.1)


def test_however_long_one_step_took_scanning_goes_on_soon():
    allowance = Allowance(0.0)
    allowance.spend(1000.0)
    assert allowance.rest() < 3
    allowance.refill(3.0)
    assert allowance.may_go_on(0.0)


def test_other_work_has_its_turn_though_much_time_was_saved():
    allowance = Allowance(0.0)
    assert allowance.may_go_on(0.0)
    assert not allowance.may_go_on(0.2)
