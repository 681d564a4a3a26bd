"""How the scans share their time, and the prompts their turns: on real folders, by a clock that only the test moves."""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders

from imagewatch.daemon.intake import Intake
from imagewatch.inbox.schedule import Allowance
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.inbox.candidate import Candidate


class Ticking:
    """A clock that goes on by so many seconds each time it is read, on however slow a machine."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = 0.001

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Looking:
    """An inbox and what is to be taken of it; nothing tells of changes."""

    def __init__(self, root: Path, **settings: str) -> None:
        settings = {"inbox__watch": "poll", "inbox__settle_seconds": "0", **settings}
        self.folders = Folders(root, "http://127.0.0.1:9", **settings)
        self.inbox = self.folders.inbox
        self.clock = Ticking()
        config = self.folders.config()
        self.intake = Intake(
            config.folders, str(root), lambda: None, time.time, self.clock, Tops.of(config.folders.inbox)
        )
        self.intake.configure(config.inbox, config.limits.burst)

    def write(self, folder: str, *names: str, text: str = "A lighthouse") -> None:
        (self.inbox / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (self.inbox / folder / name).write_text(text)

    def look(self) -> None:
        """Look once, as long as one look takes."""
        self.clock.now = max(self.clock.now, self.intake.scanner.due)
        self.intake.scan(())

    def look_through(self) -> None:
        """Look until everything was looked at."""
        self.look()
        while self.intake.scanner.is_at_work():
            self.look()

    def take(self) -> Candidate | None:
        """Take what is next, as the daemon does."""
        while (name := self.intake.turns.first()) is not None:
            candidate = self.intake.next(name, ())
            self.intake.served(name)
            if candidate:
                (self.inbox / candidate.source).unlink()
                return candidate
        return None

    def take_all(self) -> list[str]:
        """Take everything; return the paths in order."""
        taken = []
        for _ in range(20_000):
            if candidate := self.take():
                taken.append(candidate.source)
            elif self.intake.any() or self.intake.scanner.pending:
                self.look()
            else:
                return taken
        raise AssertionError("it does not end")


@pytest.fixture
def looking(tmp_path: Path) -> Looking:
    return Looking(tmp_path)


def names(count: int, ending: str = "prompt.txt", stem: str = "p") -> list[str]:
    return [f"{stem}{number:05}.{ending}" for number in range(count)]


# Scanning


@pytest.mark.parametrize("where", ["mallory", ""])
@pytest.mark.parametrize("ending", ["prompt.txt.txt", "gif", "prompt.txt"])
def test_a_prompt_is_found_before_the_scan_of_a_folder_with_very_many_files_ends(looking, where, ending):
    looking.clock.step = 0.003
    looking.write(where, *names(3000, ending), text="" if ending == "prompt.txt" else "x")
    looking.write("colleague", "cat.prompt.txt")
    looks = 0
    while not looking.intake.is_ready("colleague"):
        looking.look()
        looks += 1
        assert not looking.intake.scanner.is_complete
    assert looks <= 3
    looking.look_through()
    kinds = [*looking.intake.seen.ignored.kinds.values(), *looking.intake.seen.waiting.kinds.values()]
    assert kinds == ([] if ending == "gif" else [3000])


def test_a_prompt_is_found_before_the_scans_of_very_many_folders_end(looking):
    for number in range(500):
        looking.write(f"mallory/{number}", "note.txt")
    looking.write("colleague", "cat.prompt.txt")
    while not looking.intake.is_ready("colleague"):
        looking.look()
        assert not looking.intake.scanner.is_complete
    looking.look_through()
    assert looking.intake.seen.ignored.total == 500


def test_a_folder_found_during_the_scan_of_the_one_above_is_scanned_immediately(looking):
    for number in range(3000):
        looking.write("", f"note{number}.txt")
        if number == 1500:
            looking.write("colleague", "cat.prompt.txt")
    while not looking.intake.is_ready("colleague"):
        looking.look()
    assert looking.take().source == "colleague/cat.prompt.txt"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_many_long_scans_do_not_delay_the_folder_of_another_owner(looking):
    for number in range(9):
        looking.write(f"m{number}", *names(400, "txt"))
        os.chown(looking.inbox / f"m{number}", 61235, 61235)
    looking.write("colleague")
    looking.look_through()
    looking.clock.step = 0.005
    for number in range(9):
        looking.write(f"m{number}", "one-more.txt")
        looking.intake.scanner.soon((f"m{number}", ""))
    looks = 0
    while len(looking.intake.scanner._running) < 8:
        looking.look()
        looks += 1
        assert looks < 100
    looking.write("colleague", "cat.prompt.txt")
    looking.intake.scanner.soon(("colleague", ""))
    looking.look()
    assert looking.intake.is_ready("colleague")


def test_what_happens_while_a_folder_is_being_scanned_is_not_missed(looking):
    """Prompts come, go and change between two pieces of the scan of their folder; in the end each is known as it is."""
    looking.clock.step = 0.005
    looking.write("a", *names(1800))
    looking.look()
    assert not looking.intake.scanner.is_complete
    for number in range(0, 1800, 3):
        (looking.inbox / f"a/p{number:05}.prompt.txt").unlink()
        looking.write("a", f"q{number:05}.prompt.txt")
    taken = []
    while not looking.intake.scanner.is_complete or looking.intake.scanner.pending:
        looking.look()
        if candidate := looking.take():
            taken.append(candidate.key[1])
    looking.intake.scanner.soon()
    looking.look_through()
    taken += [path.rpartition("/")[2].removesuffix(".prompt.txt") for path in looking.take_all()]
    left = [f"p{number:05}" for number in range(1800) if number % 3]
    assert sorted(taken) == sorted([*left, *(f"q{number:05}" for number in range(0, 1800, 3))])


def test_scans_take_a_tenth_of_a_core_at_most_and_delay_no_prompt(looking):
    """By real clocks: whatever is asked for, scanning rests, and a prompt is found all the same."""
    looking.intake._now = looking.intake.scanner._now = time.monotonic
    looking.write("mallory", *names(3000, "txt"))
    looking.intake.configure(looking.folders.config().inbox, 0)
    looking.intake.scanner._allowance = Allowance(time.monotonic())
    looking.intake.scanner._allowance.spend(10.0)  # what may be used up at the start
    began, busy, pause = time.monotonic(), time.thread_time(), threading.Event()
    while time.monotonic() < began + 4 or not looking.intake.scanner.is_complete:
        looking.intake.scanner.soon()
        pause.wait(max(looking.intake.scanner.due - time.monotonic(), 0.001))
        looking.write("mallory", "again.txt")
        looking.intake.scan(())
    share = (time.thread_time() - busy) / (time.monotonic() - began)
    assert share < 0.2
    looking.write("colleague", "cat.prompt.txt")
    began = time.monotonic()
    while not looking.intake.is_ready("colleague"):
        looking.intake.scanner.soon()
        pause.wait(max(looking.intake.scanner.due - time.monotonic(), 0.001))
        looking.intake.scan(())
    assert time.monotonic() < began + 5


# Turns


def test_first_level_folders_take_turns_and_in_each_the_oldest_comes_first(looking):
    looking.write("mallory", *names(20))
    looking.write("mallory/sub", *names(20, stem="s"))
    looking.write("colleague", "cat.prompt.txt", "dog.prompt.txt")
    looking.write("", "top.prompt.txt")
    looking.look_through()
    taken = looking.take_all()
    assert set(taken[:3]) == {"mallory/p00000.prompt.txt", "colleague/cat.prompt.txt", "top.prompt.txt"}
    assert taken.index("colleague/dog.prompt.txt") in {3, 4}
    mallory = [path for path in taken if path.startswith("mallory")]
    assert mallory == [f"mallory/{n}" for n in names(20)] + [f"mallory/sub/{n}" for n in names(20, stem="s")]


def test_a_prompt_that_comes_later_does_not_wait_for_the_thousands_of_another_folder(looking):
    looking.write("mallory", *names(3000))
    looking.look_through()
    for _ in range(10):
        assert looking.take().key[0] == "mallory"
    looking.write("colleague", "cat.prompt.txt")
    looking.intake.scanner.soon()
    looking.look_through()
    assert "colleague" in {looking.take().key[0] for _ in range(2)}
    left = looking.take_all()
    assert left == [f"mallory/{name}" for name in names(3000)[-len(left) :]]


def test_more_prompts_than_are_known_by_name_are_claimed_in_turns_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.daemon.intake._WINDOW", 100)
    looking = Looking(tmp_path)
    for folder in ("a", "b", "c/d", ""):
        looking.write(folder, *names(300))
    looking.look_through()
    taken = looking.take_all()
    assert len(taken) == len(set(taken)) == 1200
    for folder in ("a/", "b/", "c/d/", ""):
        mine = [path for path in taken if path.rpartition("p")[0].removesuffix(".prompt.txt")[: len(folder)] == folder]
        expected = [f"{folder}{name}" for name in names(300)]
        assert [path for path in mine if path in set(expected)] == expected
    ends = [max(place for place, path in enumerate(taken) if path.startswith(start)) for start in ("a/", "b/", "c/")]
    assert min(ends) > 1150, "all of them were served until the end"


def test_prompts_in_many_folders_of_one_first_level_folder_are_claimed_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.daemon.intake._WINDOW", 50)
    looking = Looking(tmp_path)
    written = []
    for number in range(600):
        folder = f"a/{number * 7 % 30}"
        looking.write(folder, f"p{number:05}.prompt.txt")
        path = looking.inbox / folder / f"p{number:05}.prompt.txt"
        written.append((path.stat().st_ctime, folder, path.name))
    looking.look_through()
    assert looking.take_all() == [f"{folder}/{name}" for _, folder, name in sorted(written)]


def test_prompts_that_cannot_be_claimed_delay_no_other_folder(looking):
    declares = '+++\ninput_images = ["missing.png"]\n+++\nA lighthouse'
    looking.write("mallory", *names(1500), text=declares)
    looking.write("colleague", "cat.prompt.txt")
    looks = 0
    while not looking.intake.is_ready("colleague"):
        looking.look()
        looks += 1
    assert looks <= 3
    looking.look_through()
    assert looking.take().source == "colleague/cat.prompt.txt"
    assert looking.intake.seen.waiting.kinds == {"images": 1500}


def test_a_prompt_whose_name_a_job_still_has_is_claimed_when_that_job_is_finished(looking):
    looking.write("a", "cat.prompt.txt")
    looking.look_through()
    key = ("a", "cat")
    assert looking.intake.next("a", {key}) is None
    looking.intake.over(key)
    looking.look_through()
    assert looking.take().key == key


def test_after_a_reload_everything_is_scanned_again(looking):
    looking.clock.step = 0.005
    looking.write("a", *names(100))
    looking.write("b", *names(2500, "txt"))
    looking.look()
    assert not looking.intake.scanner.is_complete
    looking.intake.configure(looking.folders.config().inbox, 0)
    looking.look_through()
    assert looking.intake.count() == 100
    assert looking.intake.seen.ignored.total == 2500
    assert looking.take_all() == [f"a/{name}" for name in names(100)]


def assert_taken_after_all_was_counted(looking: Looking) -> None:
    assert looking.intake.next("a", ()) is None
    looking.look_through()
    assert looking.intake.may_claim()
    assert len(looking.intake.arrived()) > 5


def test_with_a_burst_guard_nothing_is_claimed_before_everything_was_counted(tmp_path):
    looking = Looking(tmp_path, limits__burst="5")
    looking.clock.step = 0.005
    looking.write("a", *names(3))
    looking.write("b", *names(2500))
    looking.look()
    assert not looking.intake.scanner.is_complete
    assert looking.intake.any()
    assert_taken_after_all_was_counted(looking)


def test_with_a_burst_guard_prompts_in_several_folders_are_counted_before_any_is_claimed(tmp_path):
    looking = Looking(tmp_path, limits__burst="5")
    looking.look_through()
    looking.clock.step = 0.005
    looking.write("a", *names(3))
    looking.write("b", *names(2500))
    looking.intake.scanner.soon()
    while not looking.intake.is_ready("a"):
        looking.look()
    assert looking.intake.scanner.is_at_work()
    assert_taken_after_all_was_counted(looking)


def test_with_a_burst_guard_endless_scans_do_not_delay_prompts_for_ever(tmp_path):
    looking = Looking(tmp_path, limits__burst="5")
    looking.look_through()
    looking.clock.step = 0.01
    looking.write("a", "cat.prompt.txt")
    began = looking.clock.now
    while (candidate := looking.intake.next("a", ())) is None:
        looking.intake.scanner.soon(("mallory", "") if looking.clock.now > began + 1 else None)
        looking.write("mallory", *names(50, "txt"))
        looking.look()
        assert looking.clock.now < began + 20
    assert candidate.source == "a/cat.prompt.txt"


# What goes on while other things come and go


def test_a_scan_continues_though_a_folder_is_removed_meanwhile(looking):
    looking.write("a/x", "note.txt")
    looking.look_through()
    shutil.rmtree(looking.inbox / "a/x")
    looking.write("a", *names(600), text="")
    looking.clock.step = 0.005
    looking.intake.scanner.soon()
    began = looking.clock.now
    looking.look()
    assert looking.intake.scanner.is_at_work()
    while looking.intake.scanner.is_at_work():
        looking.look()
        assert looking.clock.now < began + 4, "what was begun goes on only when everything is scanned again"
    looking.look()
    assert looking.intake.seen.waiting.total == 600


def test_a_prompt_that_waits_for_images_is_not_forgotten_however_many_others_there_are(looking):
    looking.write("a", "a.prompt.txt", text='+++\ninput_images = ["missing.png"]\n+++\nA lighthouse')
    looking.write("a", *names(300))
    looking.clock.step = 0.003
    assert looking.take_all() == [*(f"a/{name}" for name in names(300)), "a/a.prompt.txt"]


def test_no_prompt_is_overlooked_however_long_the_scans_take(looking):
    looking.write("", *names(300, "txt"))
    for number in range(10):
        looking.write(f"{number}/inner", "cat.prompt.txt")
    looking.clock.step = 0.1
    assert len(looking.take_all()) == 10


# Naming


def test_some_files_of_every_folder_are_named_however_many_another_has(looking):
    looking.write("mallory", *names(5000, "txt"))
    for number in range(20):
        looking.write(f"colleague{number}", "note.txt")
    looking.look_through()
    ignored = looking.intake.seen.ignored
    assert (len(ignored), ignored.total) == (1000, 5020)
    named = {f"colleague{number}/note.txt" for number in range(20)}
    assert named <= ignored.keys()
    assert named <= ignored.some(100).keys()


def test_the_names_of_ignored_files_are_bounded_also_over_very_many_folders(looking):
    for number in range(600):
        looking.write(f"m{number}", *names(10, "txt"))
    looking.look_through()
    assert sum(folder.names for folder in looking.intake._sweep.folders) < 5500
    assert looking.intake.seen.ignored.total == 6000
