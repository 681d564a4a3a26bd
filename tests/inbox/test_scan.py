"""Scans of real folders, with clocks that only the test moves."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from imagewatch.config.schema import Inbox
from imagewatch.inbox.candidate import Wait
from imagewatch.inbox.open_files import has_writer
from imagewatch.inbox.scan import InboxScan
from imagewatch.protocol.names import SiblingIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.inbox.candidate import Candidate, ScanResult

_png = io.BytesIO()
Image.new("RGB", (16, 16), (58, 110, 150)).save(_png, "png")
PICTURE = _png.getvalue()
DECLARES = '+++\ninput_images = ["logo.png"]\n+++\nA lighthouse'


class Looking:
    """A scan of one inbox whose monotonic clock moves only by hand."""

    def __init__(self, inbox: Path, **settings: object) -> None:
        self.inbox = inbox
        self.now = 1000.0
        self.config = Inbox(**{"settle_seconds": 5.0, **settings})
        self.scan = InboxScan(str(inbox), self.config)
        self.wall = time.time()

    def look(self, after: float = 0.0) -> ScanResult:
        self.now += after
        self.wall += after
        return self.scan.scan_all(self.now, self.wall)

    def ready(self, after: float = 0.0) -> list[str]:
        return [candidate.source for candidate in self.look(after).ready]

    def write(self, name: str, content: str | bytes = "A lighthouse") -> Path:
        path = self.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.wall = path.stat().st_ctime  # it was written now, whatever hour the test has invented
        return path


@pytest.fixture
def looking(tmp_path: Path) -> Looking:
    return Looking(tmp_path)


# Settling


def test_a_prompt_is_ready_after_it_was_unchanged_for_settle_seconds(looking):
    looking.write("cat.prompt.txt")
    first = looking.look()
    assert (first.ready, first.due) == ([], pytest.approx(5, abs=0.5))
    assert "if nothing changes" in first.waiting["cat.prompt.txt"]
    assert looking.ready(after=4) == []
    assert looking.ready(after=1.1) == ["cat.prompt.txt"]


def test_a_prompt_that_was_unchanged_before_the_first_scan_is_ready_immediately(looking):
    looking.write("cat.prompt.txt")
    looking.wall += 60
    assert looking.ready() == ["cat.prompt.txt"]


def test_an_old_modification_time_means_nothing(looking):
    path = looking.write("cat.prompt.txt")
    os.utime(path, (0, 0))
    assert looking.ready() == []


def test_a_clock_that_was_set_back_makes_nothing_ready_early(looking):
    looking.write("cat.prompt.txt")
    looking.wall -= 86_400
    assert looking.ready() == []
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


@pytest.mark.parametrize("name", ["cat.prompt.txt", "cat.png", "cat.1.jpg"])
def test_a_change_of_the_prompt_or_of_one_of_its_images_starts_the_clock_again(looking, name):
    for each in ("cat.prompt.txt", "cat.png", "cat.1.jpg"):
        looking.write(each, "first")
    looking.look()
    looking.look(after=4)
    looking.write(name, "longer than before")
    assert looking.ready(after=1.1) == []
    assert looking.ready(after=3) == []
    assert looking.ready(after=2) == ["cat.prompt.txt"]


def test_an_image_that_appears_late_starts_the_clock_again_and_is_claimed(looking):
    looking.write("cat.prompt.txt")
    looking.look()
    looking.write("cat.png", PICTURE)
    assert looking.ready(after=4) == []
    (candidate,) = looking.look(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_a_change_of_another_stem_is_no_reason_to_wait(looking):
    looking.write("cat.prompt.txt")
    looking.look()
    looking.look(after=3)
    looking.write("catalog.png", PICTURE)
    looking.write("dog.prompt.txt")
    looking.look()
    assert looking.ready(after=2.1) == ["cat.prompt.txt"]


def test_stems_of_the_same_name_in_two_folders_settle_apart(looking):
    looking.write("a/cat.prompt.txt")
    looking.look()
    looking.look(after=3)
    looking.write("b/cat.prompt.txt")
    looking.look()
    assert looking.ready(after=2.1) == ["a/cat.prompt.txt"]


def test_an_event_counts_even_if_the_file_is_the_same(looking):
    looking.write("cat.prompt.txt")
    looking.look()
    looking.look(after=4)
    looking.scan.touch(("", "cat"), looking.now)
    assert looking.ready(after=1.1) == []
    assert looking.ready(after=4) == ["cat.prompt.txt"]


def test_a_prompt_that_goes_away_and_comes_back_settles_again(looking):
    path = looking.write("cat.prompt.txt")
    looking.look()
    path.unlink()
    looking.look(after=4)
    looking.write("cat.prompt.txt")
    assert looking.ready(after=1.1) == []


def test_a_sibling_image_beside_a_renamed_prompt_does_not_make_it_settle_twice(looking):
    looking.write("cat.png", PICTURE)
    looking.write("cat.prompt.txt")
    looking.scan.arrived_whole(("", "cat"), looking.now)
    assert looking.scan.check_arrival(("", "cat"), looking.now, looking.wall) is None
    (candidate,) = looking.look(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_a_renamed_prompt_is_never_claimed_without_the_siblings_that_only_a_scan_sees(tmp_path):
    looking = Looking(tmp_path, settle_seconds=0.0)
    looking.write("cat.png", PICTURE)
    looking.write("cat.prompt.txt")
    looking.scan.arrived_whole(("", "cat"), looking.now)
    assert looking.scan.check_arrival(("", "cat"), looking.now, looking.wall) is None
    (candidate,) = looking.look().ready
    assert candidate.images == ("cat.png",)


# Declared images


def arrive(looking: Looking, text: str) -> object:
    looking.write("cat.prompt.txt", text)
    looking.scan.arrived_whole(("", "cat"), looking.now)
    return looking.scan.check_arrival(("", "cat"), looking.now, looking.wall)


def test_a_renamed_prompt_whose_images_are_all_there_is_ready_immediately(looking):
    looking.write("logo.png", PICTURE)
    candidate = arrive(looking, DECLARES)
    assert (candidate.images, candidate.declared) == (("logo.png",), True)


def test_a_renamed_prompt_that_declares_no_images_is_ready_immediately_and_leaves_its_sibling(looking):
    looking.write("cat.png", PICTURE)
    candidate = arrive(looking, "+++\ninput_images = []\n+++\nA lighthouse")
    assert (candidate.images, candidate.declared) == ((), True)


@pytest.mark.parametrize("is_local", [True, False])
def test_it_is_known_of_a_prompt_whether_it_had_to_settle_and_whose_clock_its_dates_are_of(looking, is_local):
    """By that the burst guard knows when it came."""
    looking.scan = InboxScan(str(looking.inbox), Inbox(), is_local=lambda _: is_local)
    looking.look()
    candidate = arrive(looking, "+++\ninput_images = []\n+++\nA lighthouse")
    assert (candidate.was_unchanged, candidate.is_local) == (False, is_local)
    looking.write("dog.prompt.txt")
    looking.look()
    found = {candidate.key[1]: candidate for candidate in looking.look(after=5.1).ready}
    assert (found["dog"].was_unchanged, found["dog"].is_local) == (True, is_local)


@pytest.mark.parametrize(("typed", "named"), [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png")])
def test_a_declared_image_is_found_however_its_accents_are_composed(looking, typed, named):
    looking.write(named, PICTURE)
    candidate = arrive(looking, f'+++\ninput_images = ["{typed}"]\n+++\nA lighthouse')
    assert candidate.images == (named,)


def test_a_declared_image_that_is_still_being_written_is_waited_for(looking):
    looking.write("logo.png", PICTURE[:-20])
    assert arrive(looking, DECLARES) is None
    assert "its images must not change" in looking.look(after=1).waiting["cat.prompt.txt"]
    looking.write("logo.png", PICTURE)
    assert looking.ready() == ["cat.prompt.txt"]


def test_a_declared_image_that_stays_broken_is_claimed_after_it_was_unchanged_so_that_its_sender_gets_an_error_file(
    looking,
):
    looking.write("logo.png", PICTURE[:-20])
    arrive(looking, DECLARES)
    looking.look()
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_missing_declared_image_is_waited_for_and_claimed_as_soon_as_it_is_there(looking):
    assert arrive(looking, DECLARES) is None
    assert looking.scan.waits_for_inputs()
    assert looking.look(after=20).waiting == {"cat.prompt.txt": "waits for logo.png"}
    looking.write("logo.png", PICTURE)
    assert looking.ready() == ["cat.prompt.txt"]


def test_a_declared_image_that_never_comes_is_waited_for_no_longer_than_said(looking):
    looking.write("cat.prompt.txt", DECLARES)
    looking.look()
    seen = looking.look(after=5.1)
    assert (seen.ready, seen.due) == ([], pytest.approx(30))
    assert looking.look(after=50).due == pytest.approx(10)
    assert looking.ready(after=10.1) == ["cat.prompt.txt"]


def test_a_prompt_that_is_written_again_waits_for_its_images_again(looking):
    arrive(looking, DECLARES)
    looking.look(after=59)
    arrive(looking, DECLARES)
    assert looking.ready(after=5) == []


def test_a_prompt_written_in_place_settles_first_and_then_its_declared_images_do(looking):
    looking.write("cat.prompt.txt", DECLARES)
    looking.look()
    looking.look(after=4)
    looking.write("logo.png", PICTURE)
    assert looking.ready(after=1.1) == []
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_prompt_with_mistakes_is_ready_so_that_its_sender_gets_an_error_file(looking):
    looking.write("cat.prompt.txt", "+++\nqualtiy = 1\n+++\nx")
    looking.write("dog.prompt.txt", b"\xff\xfe\x00")
    looking.look()
    assert looking.ready(after=5.1) == ["cat.prompt.txt", "dog.prompt.txt"]


# What is not taken


@pytest.mark.parametrize(
    "mark", [".cat.prompt.txt.swp", "cat.prompt.txt.part", ".cat.png.a1B2c3", ".syncthing.cat.prompt.txt.tmp"]
)
def test_an_editor_or_a_transfer_at_work_on_the_stem_holds_it(looking, mark):
    looking.write("cat.prompt.txt")
    busy = looking.write(mark)
    looking.look()
    assert mark in looking.look(after=60).waiting["cat.prompt.txt"]
    busy.unlink()
    looking.look(after=1)
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_mark_that_no_one_removed_for_an_hour_holds_nothing_any_more(looking):
    looking.write("cat.prompt.txt")
    looking.write(".cat.prompt.txt.swp")
    looking.wall += 3601
    assert looking.ready() == ["cat.prompt.txt"]


def test_a_mark_that_goes_away_while_it_is_checked_is_checked_again(looking, monkeypatch):
    """A rename between the list of names and the check of the mark: the image is there, the list does not have it."""
    looking.write("cat.prompt.txt")
    mark = looking.write(".cat.png.a1B2c3", PICTURE)
    looking.wall += 60

    class Slowly(SiblingIndex):
        def of(self, stem):
            if mark.exists():
                mark.rename(looking.inbox / "cat.png")
            return super().of(stem)

    monkeypatch.setattr("imagewatch.inbox.tree.SiblingIndex", Slowly)
    seen = looking.look()
    assert (seen.ready, seen.due) == ([], 5)
    looking.look()
    (candidate,) = looking.look(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_an_image_whose_transfer_died_is_asked_for_and_the_prompt_not_claimed_without_it(looking):
    looking.write("cat.prompt.txt")
    looking.write("cat.1.png", PICTURE)
    looking.write(".syncthing.cat.png.tmp", PICTURE[:-20])
    looking.look(after=3601)
    (candidate,) = looking.look(after=61).ready
    assert candidate.images == ("cat.1.png", "cat.png")
    assert looking.scan.unchanged(candidate)


def test_a_prompt_that_comes_by_rename_while_an_editor_has_it_open_is_not_claimed_immediately(looking):
    lock = looking.write(".~lock.cat.prompt.txt#")
    looking.write("logo.png", PICTURE)
    assert arrive(looking, DECLARES) is None
    assert looking.ready(after=6) == []
    lock.unlink()
    assert looking.ready() == ["cat.prompt.txt"]


@pytest.mark.parametrize("name", ["cat.prompt.txt", "cat.png"])
def test_what_a_program_has_open_for_writing_is_not_claimed_however_long_it_is_unchanged(looking, tmp_path, name):
    looking.write("cat.prompt.txt")
    looking.write("cat.png", PICTURE)
    with (looking.inbox / name).open("ab") as file:
        if not has_writer(file.name):
            pytest.skip("this file system does not tell who writes")
        looking.look()
        seen = looking.look(after=600)
        assert (seen.ready, seen.waiting) == ([], {"cat.prompt.txt": f"{name} is open for writing"})
    (candidate,) = looking.look().ready
    with (looking.inbox / name).open("ab"):
        assert not looking.scan.unchanged(candidate)
        assert looking.ready(after=3600) == ["cat.prompt.txt"], "nobody can hold it for ever"


def test_on_a_file_server_with_a_clock_of_its_own_a_new_file_settles_by_our_clock(looking):
    looking.scan = InboxScan(str(looking.inbox), Inbox(), is_local=lambda _: False)
    looking.write("cat.prompt.txt")
    looking.wall += 30  # what its ctime is behind
    looking.look()
    assert looking.ready(after=4) == []
    assert looking.ready(after=1.1) == ["cat.prompt.txt"]
    looking.write("dog.prompt.txt")
    looking.wall += 3600
    assert looking.ready(after=5) == ["cat.prompt.txt", "dog.prompt.txt"]


def test_an_image_that_is_still_empty_is_waited_for_but_not_for_ever(looking):
    looking.write("cat.prompt.txt")
    looking.write("cat.png", b"")
    looking.write("dog.prompt.txt")
    looking.write("dog.png", b"")
    looking.look()
    assert looking.look(after=6).waiting == {
        "cat.prompt.txt": "waits for cat.png",
        "dog.prompt.txt": "waits for dog.png",
    }
    looking.write("cat.png", PICTURE)
    assert looking.ready() == []
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]
    assert sorted(looking.ready(after=60)) == ["cat.prompt.txt", "dog.prompt.txt"]


def test_an_empty_prompt_waits_and_is_claimed_once_it_is_filled(looking):
    path = looking.write("cat.prompt.txt", "")
    looking.wall += 60
    seen = looking.look()
    assert (seen.ready, seen.ignored, seen.waiting) == ([], {}, {"cat.prompt.txt": "empty, so not ready yet"})
    looking.write(path.name)
    assert looking.ready() == []
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


def test_what_is_no_plain_file_is_ignored_with_the_reason(looking):
    looking.write("real.md")
    (looking.inbox / "link.prompt.txt").symlink_to(looking.inbox / "real.md")
    (looking.inbox / "dangling.prompt.txt").symlink_to("nowhere")
    os.mkfifo(looking.inbox / "pipe.prompt.txt")
    (looking.inbox / "folder.prompt.txt").mkdir()
    looking.wall += 60
    seen = looking.look()
    assert seen.ready == []
    assert seen.ignored == dict.fromkeys(
        ["link.prompt.txt", "dangling.prompt.txt", "pipe.prompt.txt"], "not a plain file"
    )


def test_near_misses_are_ignored_with_the_rule(looking):
    for name in ("cat.prompt.txt.txt", "cat.Prompt.TXT", "cat.txt", "#1.prompt.txt", "notes.md", ".hidden.prompt.txt"):
        looking.write(name)
    looking.wall += 60
    seen = looking.look()
    exactly = "not a prompt: the name must end in exactly .prompt.txt"
    assert (seen.ready, seen.ignored) == (
        [],
        {
            "cat.prompt.txt.txt": exactly,
            "cat.Prompt.TXT": exactly,
            "cat.txt": exactly,
            "#1.prompt.txt": "not a prompt: the name must not begin with ., ~ or #",
        },
    )


def test_a_prompt_that_a_transfer_has_not_named_yet_is_waited_for_and_named_when_it_was_left_behind(looking):
    looking.write("cat.prompt.txt.part")
    seen = looking.look(after=60)
    assert (seen.ignored, list(seen.waiting)) == ({}, ["cat.prompt.txt.part"])
    seen = looking.look(after=3601)
    assert (list(seen.ignored), seen.waiting) == (["cat.prompt.txt.part"], {})
    assert "unfinished" in seen.ignored["cat.prompt.txt.part"]


def test_a_prompt_is_refused_beside_an_image_that_may_be_meant_and_both_are_named(looking):
    looking.write("cat.prompt.txt")
    looking.write("cat-2.png", PICTURE)
    looking.wall += 60
    seen = looking.look()
    assert [(candidate.images, candidate.unused) for candidate in seen.ready] == [((), ("cat-2.png",))]
    reason = "may be meant as an image of cat.prompt.txt, which does not name it and is therefore refused"
    assert seen.ignored == {"cat-2.png": reason}


def test_an_image_with_a_name_of_its_own_is_not_doubted_if_the_prompt_names_its_images(looking):
    looking.write("cat.prompt.txt", '+++\ninput_images = ["cat-2.png"]\n+++\nA lighthouse')
    looking.write("cat-2.png", PICTURE)
    looking.wall += 60
    seen = looking.look()
    assert [candidate.images for candidate in seen.ready] == [("cat-2.png",)]
    assert seen.ignored == {}


SYSTEM = "recycle bin, snapshots or metadata"
NOT_ENTERED = {
    # Synology, QNAP, NetApp, Samba's shadow copies.
    **dict.fromkeys(("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot"), SYSTEM),
    **dict.fromkeys(("@GMT-2026.01.01-00.00.00", "@eadir", "#RECYCLE"), SYSTEM),
    # Windows, macOS, archives made by it.
    **dict.fromkeys(("$RECYCLE.BIN", "$Recycle.Bin", "RECYCLER", "Recycled", "System Volume Information"), SYSTEM),
    **dict.fromkeys(("Network Trash Folder", "Temporary Items", "__MACOSX", "__macosx", "FOUND.000"), SYSTEM),
    # Bins of shares and of other systems, Nextcloud.
    **dict.fromkeys(("Recycle Bin", "recycle bin ", "recycle", "Network Recycle Bin 1", "lost+found"), SYSTEM),
    **dict.fromkeys(("Trash", "trashbox", "files_trashbin", "files_versions", "LOST+FOUND"), SYSTEM),
    # Samba's vfs_recycle, file managers, macOS, ZFS, Syncthing, rsync, Dropbox, Resilio, git.
    **dict.fromkeys((".recycle", ".Trash-1000", ".Trashes", ".zfs", ".stversions", ".stfolder", ".~tmp~"), "hidden"),
    **dict.fromkeys((".rsync-partial", ".dropbox.cache", ".sync", ".git", ".snapshot"), "hidden"),
    **dict.fromkeys(("#1", "~old", "@home", "$projects", "@", "#", "~", "$"), "whose name begins with @, #, ~ or $"),
}
ENTERED = ("recycling", "lost and found", "trash can art", "a@b", "c#", "cash$", "old~", "Recycle Bins", "found", "bin")


def test_folders_of_the_system_are_never_entered_and_each_is_said_why(looking):
    for folder in (*NOT_ENTERED, *ENTERED):
        looking.write(f"{folder}/cat.prompt.txt")
        looking.write(f"people/{folder}/deep/cat.prompt.txt")
    looking.wall += 60
    seen = looking.look()
    entered = {f"{folder}/cat.prompt.txt" for folder in ENTERED}
    assert {candidate.source for candidate in seen.ready} == entered | {
        f"people/{folder}/deep/cat.prompt.txt" for folder in ENTERED
    }
    for folder, words in NOT_ENTERED.items():
        for path in (folder, f"people/{folder}"):
            assert words in seen.ignored[path], path
            assert "never entered" in seen.ignored[path]
    assert len(seen.ignored) == 2 * len(NOT_ENTERED)


@pytest.mark.parametrize("name", ["@Recycle", ".trash", "$old", "Recycled"])
def test_prompts_in_a_folder_that_becomes_one_of_the_system_are_forgotten(looking, name):
    for path in ("alice/cat.prompt.txt", "alice/deep/cat.prompt.txt"):
        looking.write(path)
    looking.wall += 60
    ready = looking.look().ready
    assert len(ready) == 2
    (looking.inbox / "alice").rename(looking.inbox / name)
    assert not any(looking.scan.unchanged(candidate) for candidate in ready)
    assert looking.ready(after=60) == []
    (looking.inbox / name).rename(looking.inbox / "bob")
    looking.look(after=60)
    assert looking.ready(after=60) == ["bob/cat.prompt.txt", "bob/deep/cat.prompt.txt"]


def test_the_folder_of_claimed_files_is_not_worth_a_word(looking):
    looking.write(".imagewatch/job/cat.prompt.txt")
    looking.wall += 60
    seen = looking.look()
    assert (seen.ready, seen.ignored) == ([], {})


def test_links_are_neither_followed_nor_passed_over_in_silence(looking, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "cat.prompt.txt").write_text("x")
    (looking.inbox / "link").symlink_to(elsewhere)
    (looking.inbox / "loop").symlink_to("loop")
    (looking.inbox / ".#cat").symlink_to("somebody@here")
    looking.write("a/b/cat.prompt.txt")
    looking.wall += 60
    seen = looking.look()
    assert [candidate.source for candidate in seen.ready] == ["a/b/cat.prompt.txt"]
    assert seen.folders == [str(looking.inbox / folder) for folder in ("", "a", "a/b")]
    assert seen.ignored == dict.fromkeys(("link", "loop"), "a link, which is not followed")


def test_sub_folders_are_left_alone_if_that_is_asked_for(tmp_path):
    looking = Looking(tmp_path, recursive=False)
    looking.write("a/cat.prompt.txt")
    looking.write("dog.prompt.txt")
    looking.wall += 60
    seen = looking.look()
    assert [candidate.source for candidate in seen.ready] == ["dog.prompt.txt"]
    assert seen.ignored == {"a": "a folder; inbox.recursive is off"}


def test_the_oldest_prompt_comes_first_whatever_its_name_or_folder(looking):
    names = ["z.prompt.txt", "m/a.prompt.txt", "a.prompt.txt", "k.prompt.txt"]
    times = []
    for name in names:
        path = looking.write(name)
        while times and path.stat().st_ctime_ns <= times[-1]:  # the kernel's clock ticks every few milliseconds
            path.touch()
        times.append(path.stat().st_ctime_ns)
    looking.wall += 60
    assert looking.ready() == names


# A huge inbox


def drained(scan: InboxScan, inbox: Path, look: Callable[[], ScanResult], ahead: int) -> list[Candidate]:
    """Take everything as the daemon does: the head of the queue, then more of it, then another scan."""
    took = []
    while ready := look().ready:
        while ready:
            for candidate in ready:
                assert scan.unchanged(candidate)
                scan.claimed(candidate.key)
                for name in candidate.names:
                    (inbox / candidate.key[0] / name).unlink()
            took += ready
            ready = scan.more(0.0, 0.0, ahead)
    return took


def windowed(inbox: Path, **settings: object) -> Looking:
    """A scan that keeps only sixteen prompts in order, and lists a folder only if it must."""
    looking = Looking(inbox, **settings)
    looking.scan = InboxScan(str(inbox), looking.config, keeps_times=lambda _: True, most_ordered=16, most_named=5)
    return looking


@pytest.mark.parametrize("beside", [False, True])
def test_many_more_prompts_than_are_known_by_name_are_claimed_oldest_first_each_once_with_its_images(tmp_path, beside):
    looking = windowed(tmp_path, settle_seconds=0.0)
    written = {"0": [], "1": [], "2": []}
    for number in range(200):
        name = f"{number % 3}/p{number * 37 % 200:03}"
        path = looking.write(f"{name}.prompt.txt")
        if beside:
            path = looking.write(f"{name}.png", PICTURE)
        written[name[0]].append((path.stat().st_ctime, name))
    took = drained(looking.scan, tmp_path, lambda: looking.scan.scan_all(looking.now, looking.wall, 5), 5)
    for folder, names in written.items():
        mine = [candidate.source for candidate in took if candidate.key[0] == folder]
        assert mine == [f"{name}.prompt.txt" for _, name in sorted(names)]
    assert all(len(candidate.images) == beside for candidate in took)


def test_prompts_that_cannot_be_claimed_delay_no_others_however_many_they_are(tmp_path):
    looking = windowed(tmp_path, settle_seconds=0.0)
    for number in range(100):
        looking.write(f"waits{number:03}.prompt.txt", DECLARES)
    for number in range(50):
        looking.write(f"p{number:03}.prompt.txt")
    took = []
    for _ in range(20):
        seen = looking.scan.scan_all(looking.now, looking.wall, 8)
        for candidate in seen.ready:
            looking.scan.claimed(candidate.key)
            (tmp_path / candidate.source).unlink()
        took += [candidate.source for candidate in seen.ready]
    assert took == [f"p{number:03}.prompt.txt" for number in range(50)]
    assert (seen.waiting.total, len(seen.waiting), looking.scan.count()) == (100, 5, 0)


def test_a_folder_that_stays_as_it_is_is_not_listed_again_and_a_new_name_in_it_is_seen(tmp_path):
    looking = windowed(tmp_path)
    looking.write("cat.prompt.txt")
    looking.look()
    looking.look(after=6)
    first = looking.look(after=6)
    assert looking.look(after=6) is first
    times = tmp_path.stat()
    looking.write("dog.prompt.txt")
    os.utime(tmp_path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar do
    looking.look()
    assert looking.ready(after=6) == ["cat.prompt.txt", "dog.prompt.txt"]
    (tmp_path / "cat.prompt.txt").unlink()
    assert looking.ready() == ["dog.prompt.txt"]


def test_a_folder_is_listed_until_it_has_been_the_same_for_longer_than_its_file_system_counts(tmp_path):
    looking = windowed(tmp_path, settle_seconds=0.0)
    looking.write("cat.prompt.txt")
    seen = [looking.look(after) for after in (0, 1, 2, 0.1, 0.1)]
    assert [one is other for one, other in itertools.pairwise(seen)] == [False, False, True, True]


def test_a_new_prompt_does_not_overtake_those_that_are_not_known_by_name(tmp_path):
    looking = windowed(tmp_path, settle_seconds=0.0)
    for number in range(60):
        looking.write(f"a/old/p{number:02}.prompt.txt")
    for candidate in looking.scan.scan_all(looking.now, looking.wall, 8).ready:
        looking.scan.claimed(candidate.key)
        (tmp_path / candidate.source).unlink()
    while looking.write("a/new.prompt.txt").stat().st_ctime <= (tmp_path / "a/old/p59.prompt.txt").stat().st_ctime:
        pass  # the kernel's clock ticks every few milliseconds
    took = drained(looking.scan, tmp_path, lambda: looking.scan.scan_all(looking.now, looking.wall, 5), 5)
    assert (len(took), took[-1].source) == (53, "a/new.prompt.txt")


def test_waiting_for_images_ends_although_nothing_changes_any_more(tmp_path):
    looking = windowed(tmp_path)
    looking.write("cat.prompt.txt", DECLARES)
    looking.wall += 60
    for _ in range(5):
        assert looking.ready(after=6) == []
    assert looking.ready(after=61) == ["cat.prompt.txt"]


def test_a_prompt_rewritten_in_place_unnoticed_is_found_when_its_turn_comes_and_settles_again(tmp_path):
    looking = windowed(tmp_path)
    path = looking.write("cat.prompt.txt")
    looking.wall += 60
    (candidate,) = looking.look().ready
    looking.look(after=6)
    looking.look(after=6)
    path.write_text("A lighthouse and half of")
    assert not looking.scan.unchanged(candidate)
    looking.wall = path.stat().st_ctime
    looking.scan.touch(("", "dog"), looking.now)  # so that there is a reason to check again
    seen = looking.look()
    assert (seen.ready, seen.waiting["cat.prompt.txt"]) == ([], "was changed, so it has to settle again")
    assert looking.ready(after=4) == []
    assert looking.ready(after=1.1) == ["cat.prompt.txt"]


def test_a_prompt_of_a_job_at_work_is_passed_over_and_found_when_the_job_is_over(tmp_path):
    looking = windowed(tmp_path, settle_seconds=0.0)
    looking.write("cat.prompt.txt")
    (candidate,) = looking.look().ready
    looking.scan.claimed(candidate.key)
    for _ in range(3):
        looking.now += 6
        seen = looking.scan.scan_all(looking.now, looking.wall, None, {candidate.key})
        assert (seen.ready, seen.left_out) == ([], {candidate.key})
    assert looking.ready() == ["cat.prompt.txt"]


def test_of_very_many_files_that_are_ignored_some_are_named_and_all_are_counted(tmp_path):
    looking = windowed(tmp_path)
    for number in range(30):
        looking.write(f"note{number}.txt")
        looking.write(f"p{number}.prompt.txt")
    seen = looking.look()
    assert (len(seen.ignored), seen.ignored.total) == (5, 30)
    assert (len(seen.waiting), seen.waiting.total) == (5, 30)
    assert seen.waiting.kinds == {"settling": 30}


@pytest.mark.parametrize("others", [0, 50])
def test_more_new_prompts_than_are_held_by_name_are_seen_with_their_images_and_marks(tmp_path, monkeypatch, others):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    looking = windowed(tmp_path)
    for number in range(50):
        looking.write(f"p{number:03}.prompt.txt")
    for number in range(others):
        looking.write(f"holiday{number:03}.png", PICTURE)
    while looking.write("p007.png", PICTURE).stat().st_ctime <= (tmp_path / "p007.prompt.txt").stat().st_ctime:
        pass  # the image is newer than its prompt
    looking.write("p008.1.png", PICTURE)
    looking.write(".p009.prompt.txt.swp")
    looking.write("~$10.prompt.txt")
    looking.wall += 60
    took = drained(looking.scan, tmp_path, lambda: looking.scan.scan_all(looking.now, looking.wall, 5), 5)
    images = {candidate.key[1]: candidate.images for candidate in took}
    assert len(took) == len(images) == 48
    assert {stem: names for stem, names in images.items() if names} == {"p007": ("p007.png",), "p008": ("p008.1.png",)}
    assert not {"p009", "p010"} & images.keys()


def test_more_new_prompts_than_are_held_by_name_settle_separately_although_their_folder_stays_as_it_is(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    looking = windowed(tmp_path)
    for number in range(50):
        looking.write(f"p{number:03}.prompt.txt")
    looking.write("p007.png", PICTURE)
    looking.write("p040.png", PICTURE)
    assert looking.look().waiting.kinds == {Wait.SETTLING: 50}
    assert looking.look(after=3).waiting.kinds == {Wait.SETTLING: 50}
    (tmp_path / "p007.png").write_bytes(PICTURE * 2)
    (tmp_path / "p041.prompt.txt").write_text("Another lighthouse")
    assert looking.look(after=1).waiting.kinds == {Wait.SETTLING: 50}
    looking.scan.touch(("", "p042"), looking.now)
    late = {"p007.prompt.txt", "p041.prompt.txt", "p042.prompt.txt"}
    assert looking.look(after=2).waiting.keys() == late
    took = drained(looking.scan, tmp_path, lambda: looking.scan.scan_all(looking.now, looking.wall, 5), 5)
    assert len(took) == 47
    assert [candidate.key[1] for candidate in took if candidate.images] == ["p040"]
    assert {candidate.source for candidate in looking.look(after=3.1).ready} == late


def test_among_more_other_files_than_are_held_by_name_each_is_checked_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    looking = windowed(tmp_path)
    for number in range(50):
        looking.write(f"holiday{number:03}.png", PICTURE)
    looking.write("cat.prompt.txt")
    looking.write("cat.1.png", PICTURE)
    looking.write("dog.prompt.txt.bak")
    (tmp_path / "link.txt").symlink_to("cat.prompt.txt")
    (tmp_path / "folder.png").mkdir()
    looking.wall += 60
    seen = looking.look()
    assert [candidate.images for candidate in seen.ready] == [("cat.1.png",)]
    assert dict(seen.ignored) == {
        "dog.prompt.txt.bak": "not a prompt: the name must end in exactly .prompt.txt",
        "link.txt": "a link, which is not followed",
    }


def test_a_mark_with_a_date_in_the_future_does_not_hold_a_prompt_for_ever(looking):
    looking.write("cat.prompt.txt")
    looking.write(".cat.prompt.txt.swp")
    looking.wall -= 365 * 86_400  # the clock was set back
    looking.look()
    assert looking.ready(after=3599) == []
    looking.look(after=2)
    assert looking.ready(after=6) == ["cat.prompt.txt"]


# Between the scan and the claim


def test_a_candidate_whose_file_was_changed_or_removed_is_noticed(looking):
    path = looking.write("cat.prompt.txt")
    image = looking.write("cat.png", PICTURE)
    looking.wall += 60
    (candidate,) = looking.look().ready
    assert looking.scan.unchanged(candidate)
    os.utime(image, (1, 1))
    assert not looking.scan.unchanged(candidate)
    looking.look()
    (candidate,) = looking.look(after=60).ready
    path.write_text("another text of the same inode")
    assert not looking.scan.unchanged(candidate)
    path.unlink()
    assert not looking.scan.unchanged(candidate)


def test_a_claim_knows_what_the_prompt_file_was_like(looking):
    path = looking.write("a/cat.prompt.txt")
    looking.wall += 60
    (candidate,) = looking.look().ready
    claim = candidate.claim("0123456789abcdef", 5.0)
    assert (claim.folder, claim.stem, claim.at) == ("a", "cat", 5.0)
    assert (claim.size, claim.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_names_that_are_no_text_are_seen(looking):
    name = os.fsdecode(b"caf\xe9\x1b[31m.prompt.txt")
    looking.write(name)
    looking.wall += 60
    assert looking.ready() == [name]


@pytest.mark.slow
def test_five_thousand_prompts_are_checked_alike_twice(looking):
    for number in range(5000):
        looking.write(f"{number % 10}/p{number:04}.prompt.txt")
    first = looking.look()
    assert len(first.ready) + len(first.waiting) == 5000
    second = looking.look(after=60)
    assert len({candidate.key for candidate in second.ready}) == 5000


@pytest.fixture
def deep() -> Iterator[Path]:
    """A folder in which others can be nested: neither Python nor pytest can remove a thousand of them."""
    path = Path(tempfile.mkdtemp())
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


@pytest.mark.slow
def test_thousands_of_folders_each_in_the_one_before_come_and_go(deep):
    """Their paths are longer than those the kernel takes."""
    looking = windowed(deep, settle_seconds=0.0)
    here = os.open(deep, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    seen = looking.look()
    assert 1000 < len(seen.folders) < 2000
    assert list(seen.ignored.values()) == ["a folder whose path is too long"]
    (deep / "d").rename(deep / ".hidden")
    looking.write("cat.prompt.txt")
    seen = looking.look(after=6)
    assert (seen.folders, [candidate.source for candidate in seen.ready]) == ([str(deep)], ["cat.prompt.txt"])


def test_of_more_folders_of_one_owner_than_are_scanned_the_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.tree._MOST_FOLDERS", 10)
    looking = windowed(tmp_path, settle_seconds=0.0)
    for number in range(8):
        looking.write(f"a/{number}/p.prompt.txt")
        looking.write(f"b{number}/p.prompt.txt")
    seen = looking.look()
    assert len(seen.folders) == 11
    assert set(seen.ignored.values()) == {"a folder that is not scanned, because its owner has more than 10 folders"}
    assert seen.ignored.total == 7
    for number in range(8):
        (tmp_path / f"b{number}/p.prompt.txt").unlink()
        (tmp_path / f"b{number}").rmdir()
    seen = looking.look(after=6)
    assert (len(seen.folders), seen.ignored.total) == (10, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_however_many_folders_one_owner_makes_those_of_another_are_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.tree._MOST_FOLDERS", 10)
    looking = windowed(tmp_path, settle_seconds=0.0)
    for number in range(30):
        (tmp_path / f"m{number}").mkdir()
        os.chown(tmp_path / f"m{number}", 61235, 61235)
    looking.look()
    looking.write("colleague/sub/p.prompt.txt")
    assert looking.ready(after=6) == ["colleague/sub/p.prompt.txt"]


# Files that may be meant and are not finished


def test_while_such_a_file_is_empty_the_prompt_waits_and_then_it_is_refused(looking):
    looking.write("cat.prompt.txt", "A cat")
    looking.write("cat.upload", b"")
    assert looking.ready(after=6) == []
    (reason,) = looking.look(after=1).waiting.values()
    assert "cat.upload" in reason
    assert looking.ready(after=50) == []
    (candidate,) = looking.look(after=10).ready
    assert candidate.unused == ("cat.upload",)


def test_while_such_a_file_changes_the_prompt_waits_and_its_reason_is_shown(looking):
    looking.write("cat.prompt.txt", "A cat")
    looking.look()
    looking.look(after=60)
    growing = looking.write("cat.upload", PICTURE[:100])
    waiting = looking.look().waiting
    assert re.search("cat.upload may be meant as an image, and must not change for", waiting["cat.prompt.txt"])
    growing.write_bytes(PICTURE)
    looking.wall = growing.stat().st_ctime
    assert looking.ready(after=3) == []
    growing.rename(growing.with_name("cat.jpg"))  # the last step of an uploader
    looking.wall = (looking.inbox / "cat.jpg").stat().st_ctime
    assert looking.ready(after=3) == []
    (candidate,) = looking.look(after=6).ready
    assert (candidate.images, candidate.unused) == (("cat.jpg",), ())


def test_a_file_that_changes_without_end_delays_its_prompt_no_longer_than_a_missing_image(looking):
    looking.write("cat.prompt.txt", "A cat")
    looking.write("cat.upload", PICTURE)
    for size in range(1, 21):
        looking.write("cat.upload", PICTURE + b"x" * size)
        assert looking.ready(after=3) == []
    looking.write("cat.upload", PICTURE)
    looking.look(after=3)
    looking.write("cat.upload", PICTURE + b"y")
    (candidate,) = looking.look(after=3).ready
    assert candidate.unused == ("cat.upload",)


def test_a_plain_text_that_changes_without_end_delays_nothing(looking):
    looking.write("cat.prompt.txt", "A cat")
    looking.write("cat.log", "one line")
    looking.look()
    looking.write("cat.log", "another line")
    assert looking.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_transfer_under_way_of_such_a_file_holds_the_prompt_until_it_has_its_name(looking):
    looking.write("cat.prompt.txt", "A cat")
    part = looking.write("cat-2.jpg.part", PICTURE[:50])
    looking.look()
    assert looking.ready(after=60) == []
    assert "cat-2.jpg.part" in looking.look(after=1).waiting["cat.prompt.txt"]
    part.rename(looking.inbox / "cat-2.jpg")
    looking.look(after=1)
    looking.look(after=6)
    (candidate,) = looking.look(after=6).ready
    assert candidate.unused == ("cat-2.jpg",)


def test_a_file_that_is_removed_before_the_claim_is_no_reason_to_refuse(looking):
    looking.write("cat.prompt.txt", "A cat")
    looking.write("cat-2.jpg", PICTURE)
    (candidate,) = looking.look(after=60).ready
    assert candidate.unused == ("cat-2.jpg",)
    assert looking.scan.unchanged(candidate)
    (looking.inbox / "cat-2.jpg").unlink()
    assert not looking.scan.unchanged(candidate)
    (candidate,) = looking.look(after=6).ready
    assert candidate.unused == ()


def test_nothing_of_a_folder_is_claimed_before_its_first_scan_has_seen_all_of_it(looking):
    """The names of a folder come in no order, and a scan is made in pieces: the oldest prompt may come last."""
    for number in range(3000):
        looking.write(f"sub/p{number:04}.prompt.txt")
    looking.wall += 60
    scan, first = looking.scan, []
    scan.moment.now, scan.moment.wall = looking.now, looking.wall
    for _ in scan.scan_folder(""):
        pass
    for _ in scan.scan_folder("sub"):
        for _ in scan.order.prepare("sub"):
            pass
        first += [candidate.source for candidate in [scan.order.take("sub")] if candidate]
    first += [candidate.source for candidate in [scan.order.take("sub")] if candidate]
    assert first[0] == "sub/p0000.prompt.txt"
