"""Changes that wait until the main loop takes them."""

from __future__ import annotations

from imagewatch.inbox.events import Change, Hints


def all_of(hints: Hints) -> list[Change]:
    changes = []
    while some := hints.take():
        changes += some
    return changes


def test_a_storm_in_one_folder_hides_no_change_in_another():
    hints = Hints(lambda: None)
    for number in range(100_000):
        hints.add(Change("/inbox/mallory", f"n{number}"))
    hints.add(Change("/inbox/colleague", "cat.prompt.txt", renamed=True))
    assert Change("/inbox/colleague", "cat.prompt.txt", renamed=True) in hints.take()


def test_a_storm_in_very_many_folders_hides_no_change_in_another():
    hints = Hints(lambda: None)
    for number in range(100_000):
        hints.add(Change(f"/inbox/m{number % 3000}", f"n{number}"))
    hints.add(Change("/inbox/colleague", "cat.prompt.txt", renamed=True))
    changes = all_of(hints)
    assert Change("/inbox/colleague", "cat.prompt.txt", renamed=True) in changes
    assert len(changes) < 100_000
    assert {change.folder for change in changes} == {*(f"/inbox/m{n}" for n in range(3000)), "/inbox/colleague"}


def test_too_many_changes_in_a_folder_are_reported_as_lost():
    hints = Hints(lambda: None)
    for number in range(5000):
        hints.add(Change("/inbox", f"n{number}"))
    changes = all_of(hints)
    assert Change("/inbox") in changes
    assert len(changes) < 2000


def test_of_each_name_the_last_change_counts():
    hints = Hints(lambda: None)
    hints.add(Change("/inbox", "a.prompt.txt", renamed=True))
    hints.add(Change("/inbox", "a.prompt.txt"))
    hints.add(Change("/inbox", "b.prompt.txt"))
    hints.add(Change("/inbox", "b.prompt.txt", renamed=True))
    assert all_of(hints) == [Change("/inbox", "a.prompt.txt"), Change("/inbox", "b.prompt.txt", renamed=True)]


def test_a_new_folder_is_still_reported_as_new_after_a_change_of_its_mode():
    hints = Hints(lambda: None)
    hints.add(Change("/inbox", "new", is_folder=True))
    hints.add(Change("/inbox", "new"))
    hints.add(Change("/inbox", "other"))
    assert all_of(hints) == [Change("/inbox", "new", is_folder=True), Change("/inbox", "other")]


def test_the_watcher_signals_once_until_all_changes_were_taken():
    rings: list[int] = []
    hints = Hints(lambda: rings.append(1))
    for number in range(1000):
        hints.add(Change("/inbox", f"n{number}"))
    assert len(rings) == 1
    taken = 0
    while some := hints.take():
        taken += 1
        assert len(some) <= 256
    assert len(rings) == taken
    hints.add(Change("/inbox", "cat.prompt.txt"))
    assert len(rings) == taken + 1
    assert all_of(hints) == [Change("/inbox", "cat.prompt.txt")]


def test_lost_changes_are_reported_once():
    rings: list[int] = []
    hints = Hints(lambda: rings.append(1))
    for _ in range(3000):  # one for each folder that is watched
        hints.lose()
    assert (len(rings), hints.has_lost(), hints.has_lost()) == (1, True, False)


def test_changes_lost_just_before_the_others_are_taken_are_reported_again():
    rings: list[int] = []
    hints = Hints(lambda: rings.append(1))
    hints.add(Change("/inbox", "cat.prompt.txt"))
    assert not hints.has_lost()
    hints.lose()
    hints.take()
    assert len(rings) == 2
    assert hints.has_lost()
