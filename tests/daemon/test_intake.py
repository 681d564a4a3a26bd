"""How the scans share their time, and the prompts their turns: on real folders, by a clock that only the test moves."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders

from imagewatch.daemon.intake import Intake
from imagewatch.inbox import tree
from imagewatch.inbox.schedule import Allowance
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.inbox.candidate import Candidate


class Ticking:
    """A clock that advances by so many seconds each time it is read, on however slow a machine."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = 0.001

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Box:
    """An inbox and what is to be claimed out of it; there are no change events."""

    def __init__(self, root: Path, **settings: str) -> None:
        settings = {"inbox__watch": "poll", "inbox__settle_seconds": "0", **settings}
        self.folders = Folders(root, "http://127.0.0.1:9", **settings)
        self.inbox = self.folders.inbox
        self.clock = Ticking()
        self.stopped = 0.0
        config = self.folders.config()
        self.tops = Tops.of(config.folders.inbox)
        wall = lambda: time.time() + self.stopped  # noqa: E731
        self.intake = Intake(config.folders, str(root), lambda: None, wall, self.clock, self.tops)
        self.intake.configure(config.inbox, config.limits.burst)

    def write(self, folder: str, *names: str, text: str = "A lighthouse") -> None:
        (self.inbox / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (self.inbox / folder / name).write_text(text)

    def stop(self, seconds: float) -> None:
        """Let so much time pass by both clocks, as when the daemon is stopped."""
        self.clock.now += seconds
        self.stopped += seconds

    def watch(self) -> None:
        """Scan as where there are change events: only what is asked for, and everything in each round."""
        self.intake.scanner._watching._watch = "native"

    def scan(self) -> None:
        """Scan once, for as long as one scan may take."""
        self.clock.now = max(self.clock.now, self.intake.scanner.due)
        self.intake.scan(())

    def scan_all(self) -> None:
        """Scan until everything was scanned."""
        self.scan()
        while self.intake.scanner.is_at_work():
            self.scan()

    def take(self) -> Candidate | None:
        """Take what is next, as the daemon does."""
        while (name := self.intake.turns.first()) is not None:
            candidate = self.intake.next(name, ())
            self.intake.served(name)
            if candidate:
                (self.inbox / candidate.source).unlink()
                return candidate
        return None

    def claim_all(self) -> list[str]:
        """Take everything; return the paths in order."""
        claimed = []
        for _ in range(20_000):
            if candidate := self.take():
                claimed.append(candidate.source)
            elif self.intake.any() or self.intake.scanner.pending:
                self.scan()
            else:
                return claimed
        raise AssertionError("it does not end")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def names(count: int, ending: str = "prompt.txt", stem: str = "p") -> list[str]:
    return [f"{stem}{number:05}.{ending}" for number in range(count)]


# Scanning


def test_a_folder_of_which_a_job_is_over_may_be_scanned_before_the_inbox_was(box):
    box.write("people/ann", "cat.prompt.txt")
    box.write("", "dog.prompt.txt")
    box.intake.scanner.soon(("people/ann", "bird"))
    box.scan_all()
    assert box.intake.result.ignored == {}
    assert box.intake.is_ready("people")
    assert box.intake.is_ready("")


@pytest.mark.parametrize("where", ["mallory", ""])
@pytest.mark.parametrize("ending", ["prompt.txt.txt", "gif", "prompt.txt"])
def test_a_prompt_is_found_before_the_scan_of_a_folder_with_very_many_files_ends(box, where, ending):
    box.clock.step = 0.003
    box.write(where, *names(3000, ending), text="" if ending == "prompt.txt" else "x")
    box.write("colleague", "cat.prompt.txt")
    scans = 0
    while not box.intake.is_ready("colleague"):
        box.scan()
        scans += 1
        assert not box.intake.scanner.is_complete
    assert scans <= 3
    box.scan_all()
    kinds = [*box.intake.result.ignored.kinds.values(), *box.intake.result.waiting.kinds.values()]
    assert kinds == ([] if ending == "gif" else [3000])


def test_a_prompt_is_found_before_the_scans_of_very_many_folders_end(box):
    for number in range(500):
        box.write(f"mallory/{number}", "note.txt")
    box.write("colleague", "cat.prompt.txt")
    while not box.intake.is_ready("colleague"):
        box.scan()
        assert not box.intake.scanner.is_complete
    box.scan_all()
    assert box.intake.result.ignored.total == 500


def test_a_folder_found_during_the_scan_of_the_one_above_is_scanned_immediately(box):
    for number in range(3000):
        box.write("", f"note{number}.txt")
        if number == 1500:
            box.write("colleague", "cat.prompt.txt")
    while not box.intake.is_ready("colleague"):
        box.scan()
    assert box.take().source == "colleague/cat.prompt.txt"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_many_long_scans_do_not_delay_the_folder_of_another_owner(box):
    for number in range(9):
        box.write(f"m{number}", *names(400, "txt"))
        os.chown(box.inbox / f"m{number}", 61235, 61235)
    box.write("colleague")
    box.scan_all()
    box.clock.step = 0.005
    for number in range(9):
        box.write(f"m{number}", "one-more.txt")
        box.intake.scanner.soon((f"m{number}", ""))
    scans = 0
    while len(box.intake.scanner._running) < 8:
        box.scan()
        scans += 1
        assert scans < 100
    box.write("colleague", "cat.prompt.txt")
    box.intake.scanner.soon(("colleague", ""))
    box.scan()
    assert box.intake.is_ready("colleague")


def test_what_happens_while_a_folder_is_being_scanned_is_not_missed(box):
    """Prompts come, go and change between two pieces of the scan of their folder; in the end each is known as it is."""
    box.clock.step = 0.005
    box.write("a", *names(1800))
    box.scan()
    assert not box.intake.scanner.is_complete
    for number in range(0, 1800, 3):
        (box.inbox / f"a/p{number:05}.prompt.txt").unlink()
        box.write("a", f"q{number:05}.prompt.txt")
    claimed = []
    while not box.intake.scanner.is_complete or box.intake.scanner.pending:
        box.scan()
        if candidate := box.take():
            claimed.append(candidate.key[1])
    box.intake.scanner.soon()
    box.scan_all()
    claimed += [path.rpartition("/")[2].removesuffix(".prompt.txt") for path in box.claim_all()]
    left = [f"p{number:05}" for number in range(1800) if number % 3]
    assert sorted(claimed) == sorted([*left, *(f"q{number:05}" for number in range(0, 1800, 3))])


def test_scans_take_a_tenth_of_a_core_at_most_and_delay_no_prompt(box):
    """By real clocks: whatever is asked for, scanning rests, and a prompt is found all the same.

    The share is CPU time of this thread, so other load on the machine can only make it smaller.
    """
    box.intake._now = box.intake.scanner._now = time.monotonic
    box.write("mallory", *names(3000, "txt"))
    box.intake.configure(box.folders.config().inbox, 0)
    box.intake.scanner._allowance = Allowance(time.monotonic())
    box.intake.scanner._allowance.spend(10.0)  # what may be used at the start
    began, busy, pause = time.monotonic(), time.thread_time(), threading.Event()
    while time.monotonic() < began + 4 or not box.intake.scanner.is_complete:
        box.intake.scanner.soon()
        pause.wait(max(box.intake.scanner.due - time.monotonic(), 0.001))
        box.write("mallory", "again.txt")
        box.intake.scan(())
    share = (time.thread_time() - busy) / (time.monotonic() - began)
    assert share < 0.2
    box.write("colleague", "cat.prompt.txt")
    busy, rests = time.thread_time(), 0.0
    while not box.intake.is_ready("colleague"):
        box.intake.scanner.soon()
        rest = max(box.intake.scanner.due - time.monotonic(), 0.001)
        pause.wait(rest)
        rests += rest
        box.intake.scan(())
    assert rests + time.thread_time() - busy < 5  # without the time that other processes take


# Turns


def test_first_level_folders_take_turns_and_in_each_the_oldest_comes_first(box):
    box.write("mallory", *names(20))
    box.write("mallory/sub", *names(20, stem="s"))
    box.write("colleague", "cat.prompt.txt", "dog.prompt.txt")
    box.write("", "top.prompt.txt")
    box.scan_all()
    claimed = box.claim_all()
    assert set(claimed[:3]) == {"mallory/p00000.prompt.txt", "colleague/cat.prompt.txt", "top.prompt.txt"}
    assert claimed.index("colleague/dog.prompt.txt") in {3, 4}
    mallory = [path for path in claimed if path.startswith("mallory")]
    assert mallory == [f"mallory/{n}" for n in names(20)] + [f"mallory/sub/{n}" for n in names(20, stem="s")]


def test_a_prompt_that_comes_later_does_not_wait_for_the_thousands_of_another_folder(box):
    box.write("mallory", *names(3000))
    box.scan_all()
    for _ in range(10):
        assert box.take().key[0] == "mallory"
    box.write("colleague", "cat.prompt.txt")
    box.intake.scanner.soon()
    box.scan_all()
    assert "colleague" in {box.take().key[0] for _ in range(2)}
    left = box.claim_all()
    assert left == [f"mallory/{name}" for name in names(3000)[-len(left) :]]


def test_more_prompts_than_are_known_by_name_are_claimed_in_turns_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.daemon.intake._MOST_ORDERED", 100)
    box = Box(tmp_path)
    for folder in ("a", "b", "c/d", ""):
        box.write(folder, *names(300))
    box.scan_all()
    claimed = box.claim_all()
    assert len(claimed) == len(set(claimed)) == 1200
    for folder in ("a/", "b/", "c/d/", ""):
        mine = [
            path for path in claimed if path.rpartition("p")[0].removesuffix(".prompt.txt")[: len(folder)] == folder
        ]
        expected = [f"{folder}{name}" for name in names(300)]
        assert [path for path in mine if path in set(expected)] == expected
    ends = [max(place for place, path in enumerate(claimed) if path.startswith(start)) for start in ("a/", "b/", "c/")]
    assert min(ends) > 1150, "all of them were served until the end"


def test_prompts_in_many_folders_of_one_first_level_folder_are_claimed_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.daemon.intake._MOST_ORDERED", 50)
    box = Box(tmp_path)
    written = []
    for number in range(600):
        folder = f"a/{number * 7 % 30}"
        box.write(folder, f"p{number:05}.prompt.txt")
        path = box.inbox / folder / f"p{number:05}.prompt.txt"
        written.append((path.stat().st_ctime, folder, path.name))
    box.scan_all()
    assert box.claim_all() == [f"{folder}/{name}" for _, folder, name in sorted(written)]


def test_prompts_that_cannot_be_claimed_delay_no_other_folder(box):
    declares = '+++\ninput_images = ["missing.png"]\n+++\nA lighthouse'
    box.write("mallory", *names(1500), text=declares)
    box.write("colleague", "cat.prompt.txt")
    scans = 0
    while not box.intake.is_ready("colleague"):
        box.scan()
        scans += 1
    assert scans <= 3
    box.scan_all()
    assert box.take().source == "colleague/cat.prompt.txt"
    assert box.intake.result.waiting.kinds == {"images": 1500}


def test_a_prompt_whose_name_a_job_still_has_is_claimed_when_that_job_is_finished(box):
    box.write("a", "cat.prompt.txt")
    box.scan_all()
    key = ("a", "cat")
    assert box.intake.next("a", {key}) is None
    box.intake.over(key)
    box.scan_all()
    assert box.take().key == key


def test_after_a_reload_everything_is_scanned_again(box):
    box.clock.step = 0.005
    box.write("a", *names(100))
    box.write("b", *names(2500, "txt"))
    box.scan()
    assert not box.intake.scanner.is_complete
    box.intake.configure(box.folders.config().inbox, 0)
    box.scan_all()
    assert box.intake.count() == 100
    assert box.intake.result.ignored.total == 2500
    assert box.claim_all() == [f"a/{name}" for name in names(100)]


def assert_claimed_after_all_was_counted(box: Box) -> None:
    assert box.intake.next("a", ()) is None
    box.scan_all()
    assert box.intake.may_claim()
    assert len(box.intake.arrived()) > 5


def test_with_a_burst_guard_nothing_is_claimed_before_everything_was_counted(tmp_path):
    box = Box(tmp_path, limits__burst="5")
    box.clock.step = 0.005
    box.write("a", *names(3))
    box.write("b", *names(2500))
    box.scan()
    assert not box.intake.scanner.is_complete
    assert box.intake.any()
    assert_claimed_after_all_was_counted(box)


def test_with_a_burst_guard_prompts_in_several_folders_are_counted_before_any_is_claimed(tmp_path):
    box = Box(tmp_path, limits__burst="5")
    box.scan_all()
    box.clock.step = 0.005
    box.write("a", *names(3))
    box.write("b", *names(2500))
    box.intake.scanner.soon()
    while not box.intake.is_ready("a"):
        box.scan()
    assert box.intake.scanner.is_at_work()
    assert_claimed_after_all_was_counted(box)


def test_with_a_burst_guard_endless_scans_do_not_delay_prompts_for_ever(tmp_path):
    box = Box(tmp_path, limits__burst="5")
    box.scan_all()
    box.clock.step = 0.01
    box.write("a", "cat.prompt.txt")
    began = box.clock.now
    while (candidate := box.intake.next("a", ())) is None:
        box.intake.scanner.soon(("mallory", "") if box.clock.now > began + 1 else None)
        box.write("mallory", *names(50, "txt"))
        box.scan()
        assert box.clock.now < began + 20
    assert candidate.source == "a/cat.prompt.txt"


# What continues while other files come and go


def test_a_scan_continues_though_a_folder_is_removed_meanwhile(box):
    box.write("a/x", "note.txt")
    box.scan_all()
    shutil.rmtree(box.inbox / "a/x")
    box.write("a", *names(600), text="")
    box.clock.step = 0.005
    box.intake.scanner.soon()
    began = box.clock.now
    box.scan()
    assert box.intake.scanner.is_at_work()
    while box.intake.scanner.is_at_work():
        box.scan()
        assert box.clock.now < began + 4, "what was begun goes on only when everything is scanned again"
    box.scan()
    assert box.intake.result.waiting.total == 600


def test_a_prompt_that_waits_for_images_is_not_forgotten_however_many_others_there_are(box):
    box.write("a", "a.prompt.txt", text='+++\ninput_images = ["missing.png"]\n+++\nA lighthouse')
    box.write("a", *names(300))
    box.clock.step = 0.003
    assert box.claim_all() == [*(f"a/{name}" for name in names(300)), "a/a.prompt.txt"]


def test_no_prompt_is_overlooked_however_long_the_scans_take(box):
    box.write("", *names(300, "txt"))
    for number in range(10):
        box.write(f"{number}/inner", "cat.prompt.txt")
    box.clock.step = 0.1
    assert len(box.claim_all()) == 10


# Naming


def test_some_files_of_every_folder_are_named_however_many_another_has(box):
    box.write("mallory", *names(5000, "txt"))
    for number in range(20):
        box.write(f"colleague{number}", "note.txt")
    box.scan_all()
    ignored = box.intake.result.ignored
    assert (len(ignored), ignored.total) == (1000, 5020)
    named = {f"colleague{number}/note.txt" for number in range(20)}
    assert named <= ignored.keys()
    assert named <= ignored.some(100).keys()


def test_the_names_of_ignored_files_are_bounded_also_over_very_many_folders(box):
    for number in range(600):
        box.write(f"m{number}", *names(10, "txt"))
    box.scan_all()
    assert sum(folder.names for folder in box.intake._scan.folders) < 5500
    assert box.intake.result.ignored.total == 6000


# A daemon that is stopped between two steps


def test_a_prompt_that_was_changed_while_it_was_being_looked_at_settles_again(tmp_path, monkeypatch):
    """The daemon is stopped before it looks at the prompt, or its file server does not answer."""
    box = Box(tmp_path, inbox__settle_seconds="5")
    box.write("", "cat.prompt.txt", text="A light")
    lstat = os.lstat

    def slow(name, **options):
        if str(name).endswith("cat.prompt.txt") and not box.stopped:
            box.stop(10)
            box.write("", "cat.prompt.txt", text="A lighthouse at")
        return lstat(name, **options)

    monkeypatch.setattr(os, "lstat", slow)
    box.scan()
    box.stop(0.1)
    box.intake.scan(())
    assert box.take() is None, "it was changed 0.1 seconds ago"
    for _ in range(3):
        box.stop(3)
        box.intake.scanner.soon()
        box.scan_all()
    assert box.take().source == "cat.prompt.txt"


def test_two_prompts_of_the_same_second_are_found_though_the_daemon_was_stopped_before_it_looked(box, monkeypatch):
    """On a file system whose times are whole seconds."""
    fstat, changed, stop = os.fstat, [990], []

    def write(name):
        box.write("", name)
        changed[0] = int(box.clock.now)

    def coarse(descriptor):
        found = fstat(descriptor)
        if not os.path.samestat(found, os.stat(box.inbox)):
            return found
        if stop:
            box.stop(stop.pop())
            write("a.prompt.txt")
        times = dict.fromkeys(("st_mtime_ns", "st_ctime_ns"), changed[0] * 1_000_000_000)
        return types.SimpleNamespace(**{name: getattr(found, name) for name in dir(found) if name[:3] == "st_"} | times)

    def scan(at):
        box.clock.now = at
        box.intake.scanner.soon()
        box.intake.scan(())

    monkeypatch.setattr(tree.os, "fstat", coarse)
    for at in (1001, 1004, 1007):
        scan(at)
    stop.append(3.0)
    scan(1010)
    scan(1013.3)
    box.clock.now = 1013.6
    write("b.prompt.txt")
    for at in (1013.7, 1020, 1050, 5000):
        scan(at)
    assert set(box.claim_all()) == {"a.prompt.txt", "b.prompt.txt"}


class Taken(set[tuple[str, str]]):
    """Names of jobs that are not over; it notes whether a scan has passed over a prompt for one."""

    was_met = False

    def __contains__(self, key: object) -> bool:
        self.was_met |= super().__contains__(key)
        return super().__contains__(key)


def test_a_prompt_whose_name_becomes_free_while_its_folder_is_being_scanned_is_found_soon(tmp_path):
    box = Box(tmp_path, inbox__rescan_seconds="86400")
    box.watch()
    box.clock.step = 0.05  # each scan is only a few pieces
    box.write("", *names(1500, "txt"), "cat.prompt.txt")
    taken = Taken({("", "cat")})
    while not taken.was_met:
        box.clock.now = max(box.clock.now, box.intake.scanner.due)
        box.intake.scan(taken)
    assert box.intake.scanner._running
    box.intake.over(taken.pop())
    box.scan_all()
    began = box.clock.now
    while box.intake.scanner.due < began + 60:
        box.scan()
    assert box.intake.is_ready("")


def test_a_scan_that_was_asked_for_during_another_one_is_pending_until_it_is_done(tmp_path):
    box = Box(tmp_path, inbox__rescan_seconds="86400")
    box.watch()
    box.clock.step = 0.05
    box.write("", *names(300, "txt"))
    box.scan_all()
    box.intake.scanner.soon(("", "bird"))
    while not box.intake.scanner._running:
        box.scan()
    box.write("", "cat.prompt.txt")
    box.intake.scanner.soon(("", "cat"))
    for _ in range(400):
        if not box.intake.scanner.pending:
            break
        box.scan()
    assert not box.intake.scanner.is_at_work()
    assert box.take().source == "cat.prompt.txt"


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_folder_may_be_scanned_before_the_inbox_after_another_file_system_was_mounted(box, other_file_system):
    box.write("people/ann")
    box.scan_all()
    box.inbox.rename(box.inbox.with_name("before"))
    box.inbox.symlink_to(other_file_system)
    box.write("people/ann", "cat.prompt.txt")
    box.tops.open(str(box.inbox))
    box.intake.scanner.soon(("people/ann", "cat"))
    box.scan_all()
    assert box.intake.result.ignored == {}
    assert box.intake.is_ready("people")
