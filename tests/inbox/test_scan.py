"""Scans of real folders, with clocks that only the test moves."""

from __future__ import annotations

import errno
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
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Descriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.inbox.candidate import Candidate, ScanResult

_png = io.BytesIO()
Image.new("RGB", (16, 16), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
DECLARES = '+++\ninput_images = ["logo.png"]\n+++\nA lighthouse'


class Scanning:
    """A scan of one inbox whose monotonic clock is moved only by the test."""

    def __init__(self, inbox: Path, **settings: object) -> None:
        self.inbox = inbox
        self.now = 1000.0
        self.config = Inbox(**{"settle_seconds": 5.0, **settings})
        self.scan = InboxScan(str(inbox), self.config)
        self.wall = time.time()

    def scan_all(self, after: float = 0.0) -> ScanResult:
        self.now += after
        self.wall += after
        return self.scan.scan_all(self.now, self.wall)

    def ready(self, after: float = 0.0) -> list[str]:
        return [candidate.source for candidate in self.scan_all(after).ready]

    def write(self, name: str, content: str | bytes = "A lighthouse") -> Path:
        path = self.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.wall = path.stat().st_ctime  # it was written now, whatever hour the test has invented
        return path


@pytest.fixture
def scanning(tmp_path: Path) -> Scanning:
    return Scanning(tmp_path)


# Settling


def test_a_prompt_is_ready_after_it_was_unchanged_for_settle_seconds(scanning):
    scanning.write("cat.prompt.txt")
    first = scanning.scan_all()
    assert (first.ready, first.due) == ([], pytest.approx(5, abs=0.5))
    assert "if nothing changes" in first.waiting["cat.prompt.txt"]
    assert scanning.ready(after=4) == []
    assert scanning.ready(after=1.1) == ["cat.prompt.txt"]


def test_a_prompt_that_was_unchanged_before_the_first_scan_is_ready_immediately(scanning):
    scanning.write("cat.prompt.txt")
    scanning.wall += 60
    assert scanning.ready() == ["cat.prompt.txt"]


def test_an_old_modification_time_means_nothing(scanning):
    path = scanning.write("cat.prompt.txt")
    os.utime(path, (0, 0))
    assert scanning.ready() == []


def test_a_clock_that_was_set_back_makes_nothing_ready_early(scanning):
    scanning.write("cat.prompt.txt")
    scanning.wall -= 86_400
    assert scanning.ready() == []
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_prompt_that_came_before_the_clock_was_set_forward_has_to_settle(scanning):
    scanning.wall -= 5
    scanning.scan_all()
    scanning.write("cat.prompt.txt")  # five seconds later
    scanning.now += 5
    scanning.wall += 7200
    assert scanning.ready(after=1) == []
    assert scanning.ready(after=4.1) == ["cat.prompt.txt"]


@pytest.mark.parametrize("name", ["cat.prompt.txt", "cat.png", "cat.1.jpg"])
def test_a_change_of_the_prompt_or_of_one_of_its_images_starts_the_clock_again(scanning, name):
    for each in ("cat.prompt.txt", "cat.png", "cat.1.jpg"):
        scanning.write(each, "first")
    scanning.scan_all()
    scanning.scan_all(after=4)
    scanning.write(name, "longer than before")
    assert scanning.ready(after=1.1) == []
    assert scanning.ready(after=3) == []
    assert scanning.ready(after=2) == ["cat.prompt.txt"]


def test_an_image_that_appears_late_starts_the_clock_again_and_is_claimed(scanning):
    scanning.write("cat.prompt.txt")
    scanning.scan_all()
    scanning.write("cat.png", IMAGE)
    assert scanning.ready(after=4) == []
    (candidate,) = scanning.scan_all(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_a_change_of_another_stem_is_no_reason_to_wait(scanning):
    scanning.write("cat.prompt.txt")
    scanning.scan_all()
    scanning.scan_all(after=3)
    scanning.write("catalog.png", IMAGE)
    scanning.write("dog.prompt.txt")
    scanning.scan_all()
    assert scanning.ready(after=2.1) == ["cat.prompt.txt"]


def test_stems_of_the_same_name_in_two_folders_settle_apart(scanning):
    scanning.write("a/cat.prompt.txt")
    scanning.scan_all()
    scanning.scan_all(after=3)
    scanning.write("b/cat.prompt.txt")
    scanning.scan_all()
    assert scanning.ready(after=2.1) == ["a/cat.prompt.txt"]


def test_an_event_counts_even_if_the_file_is_the_same(scanning):
    scanning.write("cat.prompt.txt")
    scanning.scan_all()
    scanning.scan_all(after=4)
    scanning.scan.touch(("", "cat"), scanning.now)
    assert scanning.ready(after=1.1) == []
    assert scanning.ready(after=4) == ["cat.prompt.txt"]


def test_a_prompt_that_goes_away_and_comes_back_settles_again(scanning):
    path = scanning.write("cat.prompt.txt")
    scanning.scan_all()
    path.unlink()
    scanning.scan_all(after=4)
    scanning.write("cat.prompt.txt")
    assert scanning.ready(after=1.1) == []


def test_a_sibling_image_beside_a_renamed_prompt_does_not_make_it_settle_twice(scanning):
    scanning.write("cat.png", IMAGE)
    scanning.write("cat.prompt.txt")
    scanning.scan.arrived_whole(("", "cat"), scanning.now)
    assert scanning.scan.check_arrival(("", "cat"), scanning.now, scanning.wall) is None
    (candidate,) = scanning.scan_all(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_a_renamed_prompt_is_never_claimed_without_the_siblings_that_only_a_scan_sees(tmp_path):
    scanning = Scanning(tmp_path, settle_seconds=0.0)
    scanning.write("cat.png", IMAGE)
    scanning.write("cat.prompt.txt")
    scanning.scan.arrived_whole(("", "cat"), scanning.now)
    assert scanning.scan.check_arrival(("", "cat"), scanning.now, scanning.wall) is None
    (candidate,) = scanning.scan_all().ready
    assert candidate.images == ("cat.png",)


# Declared images


def arrive(scanning: Scanning, text: str) -> object:
    scanning.write("cat.prompt.txt", text)
    scanning.scan.arrived_whole(("", "cat"), scanning.now)
    return scanning.scan.check_arrival(("", "cat"), scanning.now, scanning.wall)


def test_a_renamed_prompt_whose_images_are_all_there_is_ready_immediately(scanning):
    scanning.write("logo.png", IMAGE)
    candidate = arrive(scanning, DECLARES)
    assert (candidate.images, candidate.declared) == (("logo.png",), True)


def test_a_renamed_prompt_that_declares_no_images_is_ready_immediately_and_leaves_its_sibling(scanning):
    scanning.write("cat.png", IMAGE)
    candidate = arrive(scanning, "+++\ninput_images = []\n+++\nA lighthouse")
    assert (candidate.images, candidate.declared) == ((), True)


@pytest.mark.parametrize("is_local", [True, False])
def test_it_is_known_of_a_prompt_whether_it_had_to_settle_and_whose_clock_its_dates_are_of(scanning, is_local):
    """By that the burst guard knows when it came."""
    scanning.scan = InboxScan(str(scanning.inbox), Inbox(), is_local=lambda _: is_local)
    scanning.scan_all()
    candidate = arrive(scanning, "+++\ninput_images = []\n+++\nA lighthouse")
    assert (candidate.was_unchanged, candidate.is_local) == (False, is_local)
    scanning.write("dog.prompt.txt")
    scanning.scan_all()
    found = {candidate.key[1]: candidate for candidate in scanning.scan_all(after=5.1).ready}
    assert (found["dog"].was_unchanged, found["dog"].is_local) == (True, is_local)


@pytest.mark.parametrize(("typed", "named"), [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png")])
def test_a_declared_image_is_found_however_its_accents_are_composed(scanning, typed, named):
    scanning.write(named, IMAGE)
    candidate = arrive(scanning, f'+++\ninput_images = ["{typed}"]\n+++\nA lighthouse')
    assert candidate.images == (named,)


def test_a_declared_image_that_is_still_being_written_is_waited_for(scanning):
    scanning.write("logo.png", IMAGE[:-20])
    assert arrive(scanning, DECLARES) is None
    assert "its images must not change" in scanning.scan_all(after=1).waiting["cat.prompt.txt"]
    scanning.write("logo.png", IMAGE)
    assert scanning.ready() == ["cat.prompt.txt"]


def test_a_declared_image_that_stays_broken_is_claimed_after_it_was_unchanged_so_that_its_sender_gets_an_error_file(
    scanning,
):
    scanning.write("logo.png", IMAGE[:-20])
    arrive(scanning, DECLARES)
    scanning.scan_all()
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_missing_declared_image_is_waited_for_and_claimed_as_soon_as_it_is_there(scanning):
    assert arrive(scanning, DECLARES) is None
    assert scanning.scan.waits_for_inputs()
    assert scanning.scan_all(after=20).waiting == {"cat.prompt.txt": "waits for logo.png"}
    scanning.write("logo.png", IMAGE)
    assert scanning.ready() == ["cat.prompt.txt"]


def test_a_declared_image_that_never_comes_is_waited_for_no_longer_than_configured(scanning):
    scanning.write("cat.prompt.txt", DECLARES)
    scanning.scan_all()
    seen = scanning.scan_all(after=5.1)
    assert (seen.ready, seen.due) == ([], pytest.approx(30))
    assert scanning.scan_all(after=50).due == pytest.approx(10)
    assert scanning.ready(after=10.1) == ["cat.prompt.txt"]


def test_a_prompt_that_is_written_again_waits_for_its_images_again(scanning):
    arrive(scanning, DECLARES)
    scanning.scan_all(after=59)
    arrive(scanning, DECLARES)
    assert scanning.ready(after=5) == []


def test_a_prompt_written_in_place_settles_first_and_then_its_declared_images_do(scanning):
    scanning.write("cat.prompt.txt", DECLARES)
    scanning.scan_all()
    scanning.scan_all(after=4)
    scanning.write("logo.png", IMAGE)
    assert scanning.ready(after=1.1) == []
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_prompt_with_mistakes_is_ready_so_that_its_sender_gets_an_error_file(scanning):
    scanning.write("cat.prompt.txt", "+++\nqualtiy = 1\n+++\nx")
    scanning.write("dog.prompt.txt", b"\xff\xfe\x00")
    scanning.scan_all()
    assert scanning.ready(after=5.1) == ["cat.prompt.txt", "dog.prompt.txt"]


# What is not claimed


@pytest.mark.parametrize(
    "mark", [".cat.prompt.txt.swp", "cat.prompt.txt.part", ".cat.png.a1B2c3", ".syncthing.cat.prompt.txt.tmp"]
)
def test_an_editor_or_a_transfer_at_work_on_the_stem_delays_it(scanning, mark):
    scanning.write("cat.prompt.txt")
    busy = scanning.write(mark)
    scanning.scan_all()
    assert mark in scanning.scan_all(after=60).waiting["cat.prompt.txt"]
    busy.unlink()
    scanning.scan_all(after=1)
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_mark_that_no_one_removed_for_an_hour_delays_nothing_any_more(scanning):
    scanning.write("cat.prompt.txt")
    scanning.write(".cat.prompt.txt.swp")
    scanning.wall += 3601
    assert scanning.ready() == ["cat.prompt.txt"]


def test_a_mark_that_goes_away_while_it_is_checked_is_checked_again(scanning, monkeypatch):
    """A rename between the list of names and the check of the mark: the image is there, the list does not have it."""
    scanning.write("cat.prompt.txt")
    mark = scanning.write(".cat.png.a1B2c3", IMAGE)
    scanning.wall += 60

    class Slowly(SiblingIndex):
        def of(self, stem):
            if mark.exists():
                mark.rename(scanning.inbox / "cat.png")
            return super().of(stem)

    monkeypatch.setattr("imagewatch.inbox.tree.SiblingIndex", Slowly)
    seen = scanning.scan_all()
    assert (seen.ready, seen.due) == ([], 5)
    scanning.scan_all()
    (candidate,) = scanning.scan_all(after=5.1).ready
    assert candidate.images == ("cat.png",)


def test_an_image_whose_transfer_died_is_asked_for_and_the_prompt_not_claimed_without_it(scanning):
    scanning.write("cat.prompt.txt")
    scanning.write("cat.1.png", IMAGE)
    scanning.write(".syncthing.cat.png.tmp", IMAGE[:-20])
    scanning.scan_all(after=3601)
    (candidate,) = scanning.scan_all(after=61).ready
    assert candidate.images == ("cat.1.png", "cat.png")
    assert scanning.scan.unchanged(candidate)


def test_a_prompt_that_comes_by_rename_while_an_editor_has_it_open_is_not_claimed_immediately(scanning):
    lock = scanning.write(".~lock.cat.prompt.txt#")
    scanning.write("logo.png", IMAGE)
    assert arrive(scanning, DECLARES) is None
    assert scanning.ready(after=6) == []
    lock.unlink()
    assert scanning.ready() == ["cat.prompt.txt"]


@pytest.mark.parametrize("name", ["cat.prompt.txt", "cat.png"])
def test_what_a_program_has_open_for_writing_is_not_claimed_however_long_it_is_unchanged(scanning, tmp_path, name):
    scanning.write("cat.prompt.txt")
    scanning.write("cat.png", IMAGE)
    with (scanning.inbox / name).open("ab") as file:
        if not has_writer(file.name):
            pytest.skip("this file system does not report writers")
        scanning.scan_all()
        seen = scanning.scan_all(after=600)
        assert (seen.ready, seen.waiting) == ([], {"cat.prompt.txt": f"{name} is open for writing"})
    (candidate,) = scanning.scan_all().ready
    with (scanning.inbox / name).open("ab"):
        assert not scanning.scan.unchanged(candidate)
        assert scanning.ready(after=3600) == ["cat.prompt.txt"], "no writer can delay it forever"


def test_what_a_program_has_open_for_writing_is_not_claimed_though_the_clock_was_set_forward(scanning):
    with scanning.write("cat.prompt.txt").open("ab") as file:
        if not has_writer(file.name):
            pytest.skip("this file system does not report writers")
        scanning.scan_all()
        assert scanning.ready(after=5.1) == []
        scanning.wall += 7200
        assert scanning.ready(after=0.1) == []
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_on_a_file_server_with_a_clock_of_its_own_a_new_file_settles_by_our_clock(scanning):
    scanning.scan = InboxScan(str(scanning.inbox), Inbox(), is_local=lambda _: False)
    scanning.write("cat.prompt.txt")
    scanning.wall += 30  # what its ctime is behind
    scanning.scan_all()
    assert scanning.ready(after=4) == []
    assert scanning.ready(after=1.1) == ["cat.prompt.txt"]
    scanning.scan = InboxScan(str(scanning.inbox), Inbox(), is_local=lambda _: False)
    scanning.wall += 3600
    assert scanning.ready() == ["cat.prompt.txt"]
    wall = scanning.wall
    scanning.write("dog.prompt.txt")
    scanning.wall = wall
    assert scanning.ready(after=5) == ["cat.prompt.txt", "dog.prompt.txt"]


def test_an_image_that_is_still_empty_is_waited_for_but_not_forever(scanning):
    scanning.write("cat.prompt.txt")
    scanning.write("cat.png", b"")
    scanning.write("dog.prompt.txt")
    scanning.write("dog.png", b"")
    scanning.scan_all()
    assert scanning.scan_all(after=6).waiting == {
        "cat.prompt.txt": "waits for cat.png",
        "dog.prompt.txt": "waits for dog.png",
    }
    scanning.write("cat.png", IMAGE)
    assert scanning.ready() == []
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]
    assert sorted(scanning.ready(after=60)) == ["cat.prompt.txt", "dog.prompt.txt"]


def test_an_empty_prompt_waits_and_is_claimed_once_it_is_filled(scanning):
    path = scanning.write("cat.prompt.txt", "")
    scanning.wall += 60
    seen = scanning.scan_all()
    assert (seen.ready, seen.ignored, seen.waiting) == ([], {}, {"cat.prompt.txt": "empty, so not ready yet"})
    scanning.write(path.name)
    assert scanning.ready() == []
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_what_is_no_plain_file_is_ignored_with_the_reason(scanning):
    scanning.write("real.md")
    (scanning.inbox / "link.prompt.txt").symlink_to(scanning.inbox / "real.md")
    (scanning.inbox / "dangling.prompt.txt").symlink_to("nowhere")
    os.mkfifo(scanning.inbox / "pipe.prompt.txt")
    (scanning.inbox / "folder.prompt.txt").mkdir()
    scanning.wall += 60
    seen = scanning.scan_all()
    assert seen.ready == []
    assert seen.ignored == dict.fromkeys(
        ["link.prompt.txt", "dangling.prompt.txt", "pipe.prompt.txt"], "not a plain file"
    )


def test_near_misses_are_ignored_with_the_rule(scanning):
    for name in ("cat.prompt.txt.txt", "cat.Prompt.TXT", "cat.txt", "#1.prompt.txt", "notes.md", ".hidden.prompt.txt"):
        scanning.write(name)
    scanning.wall += 60
    seen = scanning.scan_all()
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


def test_a_prompt_that_a_transfer_has_not_named_yet_is_waited_for_and_named_when_it_was_left_behind(scanning):
    scanning.write("cat.prompt.txt.part")
    seen = scanning.scan_all(after=60)
    assert (seen.ignored, list(seen.waiting)) == ({}, ["cat.prompt.txt.part"])
    seen = scanning.scan_all(after=3601)
    assert (list(seen.ignored), seen.waiting) == (["cat.prompt.txt.part"], {})
    assert "unfinished" in seen.ignored["cat.prompt.txt.part"]


def test_a_prompt_is_refused_beside_an_image_that_may_be_meant_and_both_are_named(scanning):
    scanning.write("cat.prompt.txt")
    scanning.write("cat-2.png", IMAGE)
    scanning.wall += 60
    seen = scanning.scan_all()
    assert [(candidate.images, candidate.unused) for candidate in seen.ready] == [((), ("cat-2.png",))]
    reason = "may be meant as an image of cat.prompt.txt, which does not name it and is therefore refused"
    assert seen.ignored == {"cat-2.png": reason}


def test_an_image_with_a_name_of_its_own_is_not_reported_if_the_prompt_names_its_images(scanning):
    scanning.write("cat.prompt.txt", '+++\ninput_images = ["cat-2.png"]\n+++\nA lighthouse')
    scanning.write("cat-2.png", IMAGE)
    scanning.wall += 60
    seen = scanning.scan_all()
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


def test_folders_of_the_system_are_never_entered_and_each_is_reported_with_the_reason(scanning):
    for folder in (*NOT_ENTERED, *ENTERED):
        scanning.write(f"{folder}/cat.prompt.txt")
        scanning.write(f"people/{folder}/deep/cat.prompt.txt")
    scanning.wall += 60
    seen = scanning.scan_all()
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
def test_prompts_in_a_folder_that_becomes_one_of_the_system_are_forgotten(scanning, name):
    for path in ("alice/cat.prompt.txt", "alice/deep/cat.prompt.txt"):
        scanning.write(path)
    scanning.wall += 60
    ready = scanning.scan_all().ready
    assert len(ready) == 2
    (scanning.inbox / "alice").rename(scanning.inbox / name)
    assert not any(scanning.scan.unchanged(candidate) for candidate in ready)
    assert scanning.ready(after=60) == []
    (scanning.inbox / name).rename(scanning.inbox / "bob")
    scanning.scan_all(after=60)
    assert scanning.ready(after=60) == ["bob/cat.prompt.txt", "bob/deep/cat.prompt.txt"]


def test_the_folder_of_claimed_files_is_not_reported(scanning):
    scanning.write(".imagewatch/job/cat.prompt.txt")
    scanning.wall += 60
    seen = scanning.scan_all()
    assert (seen.ready, seen.ignored) == ([], {})


def test_a_folder_may_be_scanned_before_the_inbox_that_it_is_in(scanning):
    scanning.write("people/ann/cat.prompt.txt")
    scanning.scan.moment.now, scanning.scan.moment.wall = scanning.now, scanning.wall + 60
    list(scanning.scan.scan_folder("people/ann"))
    assert scanning.scan.result().ignored == {}
    assert scanning.ready(after=60) == ["people/ann/cat.prompt.txt"]


def test_an_inbox_that_cannot_be_looked_at_during_a_scan_is_an_error_of_the_scan(scanning, monkeypatch):
    scanning.write("people/ann/cat.prompt.txt")
    scanning.scan_all()

    def fail(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Descriptor, "is_same_as", fail)
    with pytest.raises(SpoolError, match="Stale file handle"):
        scanning.scan_all()


def test_links_are_neither_followed_nor_passed_over_in_silence(scanning, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "cat.prompt.txt").write_text("x")
    (scanning.inbox / "link").symlink_to(elsewhere)
    (scanning.inbox / "loop").symlink_to("loop")
    (scanning.inbox / ".#cat").symlink_to("user@here")
    scanning.write("a/b/cat.prompt.txt")
    scanning.wall += 60
    seen = scanning.scan_all()
    assert [candidate.source for candidate in seen.ready] == ["a/b/cat.prompt.txt"]
    assert seen.folders == [str(scanning.inbox / folder) for folder in ("", "a", "a/b")]
    assert seen.ignored == dict.fromkeys(("link", "loop"), "a link, which is not followed")


def test_sub_folders_are_left_alone_if_that_is_asked_for(tmp_path):
    scanning = Scanning(tmp_path, recursive=False)
    scanning.write("a/cat.prompt.txt")
    scanning.write("dog.prompt.txt")
    scanning.wall += 60
    seen = scanning.scan_all()
    assert [candidate.source for candidate in seen.ready] == ["dog.prompt.txt"]
    assert seen.ignored == {"a": "a folder; inbox.recursive is off"}


def test_the_oldest_prompt_comes_first_whatever_its_name_or_folder(scanning):
    names = ["z.prompt.txt", "m/a.prompt.txt", "a.prompt.txt", "k.prompt.txt"]
    times = []
    for name in names:
        path = scanning.write(name)
        while times and path.stat().st_ctime_ns <= times[-1]:  # the kernel's clock ticks every few milliseconds
            path.touch()
        times.append(path.stat().st_ctime_ns)
    scanning.wall += 60
    assert scanning.ready() == names


# A huge inbox


def drained(scan: InboxScan, inbox: Path, scan_all: Callable[[], ScanResult], ahead: int) -> list[Candidate]:
    """Claim everything as the daemon does: the head of the queue, then more of it, then another scan."""
    claimed = []
    while ready := scan_all().ready:
        while ready:
            for candidate in ready:
                assert scan.unchanged(candidate)
                scan.claimed(candidate.key)
                for name in candidate.names:
                    (inbox / candidate.key[0] / name).unlink()
            claimed += ready
            ready = scan.more(0.0, 0.0, ahead)
    return claimed


def windowed(inbox: Path, **settings: object) -> Scanning:
    """A scan that keeps only sixteen prompts in order, and lists a folder only if it must."""
    scanning = Scanning(inbox, **settings)
    scanning.scan = InboxScan(str(inbox), scanning.config, keeps_times=lambda _: True, most_ordered=16, most_named=5)
    return scanning


@pytest.mark.parametrize("beside", [False, True])
def test_many_more_prompts_than_are_known_by_name_are_claimed_oldest_first_each_once_with_its_images(tmp_path, beside):
    scanning = windowed(tmp_path, settle_seconds=0.0)
    written = {"0": [], "1": [], "2": []}
    for number in range(200):
        name = f"{number % 3}/p{number * 37 % 200:03}"
        path = scanning.write(f"{name}.prompt.txt")
        if beside:
            path = scanning.write(f"{name}.png", IMAGE)
        written[name[0]].append((path.stat().st_ctime, name))
    claimed = drained(scanning.scan, tmp_path, lambda: scanning.scan.scan_all(scanning.now, scanning.wall, 5), 5)
    for folder, names in written.items():
        mine = [candidate.source for candidate in claimed if candidate.key[0] == folder]
        assert mine == [f"{name}.prompt.txt" for _, name in sorted(names)]
    assert all(len(candidate.images) == beside for candidate in claimed)


def test_prompts_that_cannot_be_claimed_delay_no_others_however_many_they_are(tmp_path):
    scanning = windowed(tmp_path, settle_seconds=0.0)
    for number in range(100):
        scanning.write(f"waits{number:03}.prompt.txt", DECLARES)
    for number in range(50):
        scanning.write(f"p{number:03}.prompt.txt")
    claimed = []
    for _ in range(20):
        seen = scanning.scan.scan_all(scanning.now, scanning.wall, 8)
        for candidate in seen.ready:
            scanning.scan.claimed(candidate.key)
            (tmp_path / candidate.source).unlink()
        claimed += [candidate.source for candidate in seen.ready]
    assert claimed == [f"p{number:03}.prompt.txt" for number in range(50)]
    assert (seen.waiting.total, len(seen.waiting), scanning.scan.count()) == (100, 5, 0)


def test_a_folder_that_stays_as_it_is_is_not_listed_again_and_a_new_name_in_it_is_seen(tmp_path):
    scanning = windowed(tmp_path)
    scanning.write("cat.prompt.txt")
    scanning.scan_all()
    scanning.scan_all(after=6)
    first = scanning.scan_all(after=6)
    assert scanning.scan_all(after=6) is first
    times = tmp_path.stat()
    scanning.write("dog.prompt.txt")
    os.utime(tmp_path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar do
    scanning.scan_all()
    assert scanning.ready(after=6) == ["cat.prompt.txt", "dog.prompt.txt"]
    (tmp_path / "cat.prompt.txt").unlink()
    assert scanning.ready() == ["dog.prompt.txt"]


def test_a_folder_is_listed_until_it_has_been_the_same_for_longer_than_its_file_system_counts(tmp_path):
    scanning = windowed(tmp_path, settle_seconds=0.0)
    scanning.write("cat.prompt.txt")
    seen = [scanning.scan_all(after) for after in (0, 1, 2, 0.1, 0.1)]
    assert [one is other for one, other in itertools.pairwise(seen)] == [False, False, True, True]


def test_a_new_prompt_does_not_overtake_those_that_are_not_known_by_name(tmp_path):
    scanning = windowed(tmp_path, settle_seconds=0.0)
    for number in range(60):
        scanning.write(f"a/old/p{number:02}.prompt.txt")
    for candidate in scanning.scan.scan_all(scanning.now, scanning.wall, 8).ready:
        scanning.scan.claimed(candidate.key)
        (tmp_path / candidate.source).unlink()
    while scanning.write("a/new.prompt.txt").stat().st_ctime <= (tmp_path / "a/old/p59.prompt.txt").stat().st_ctime:
        pass  # the kernel's clock ticks every few milliseconds
    claimed = drained(scanning.scan, tmp_path, lambda: scanning.scan.scan_all(scanning.now, scanning.wall, 5), 5)
    assert (len(claimed), claimed[-1].source) == (53, "a/new.prompt.txt")


def test_waiting_for_images_ends_although_nothing_changes_any_more(tmp_path):
    scanning = windowed(tmp_path)
    scanning.write("cat.prompt.txt", DECLARES)
    scanning.wall += 60
    for _ in range(5):
        assert scanning.ready(after=6) == []
    assert scanning.ready(after=61) == ["cat.prompt.txt"]


def test_a_prompt_rewritten_in_place_unnoticed_is_found_when_its_turn_comes_and_settles_again(tmp_path):
    scanning = windowed(tmp_path)
    path = scanning.write("cat.prompt.txt")
    scanning.wall += 60
    (candidate,) = scanning.scan_all().ready
    scanning.scan_all(after=6)
    scanning.scan_all(after=6)
    path.write_text("A lighthouse and half of")
    assert not scanning.scan.unchanged(candidate)
    scanning.wall = path.stat().st_ctime
    scanning.scan.touch(("", "dog"), scanning.now)  # so that there is a reason to check again
    seen = scanning.scan_all()
    assert (seen.ready, seen.waiting["cat.prompt.txt"]) == ([], "was changed, so it has to settle again")
    assert scanning.ready(after=4) == []
    assert scanning.ready(after=1.1) == ["cat.prompt.txt"]


def test_a_prompt_of_a_job_at_work_is_passed_over_and_found_when_the_job_is_over(tmp_path):
    scanning = windowed(tmp_path, settle_seconds=0.0)
    scanning.write("cat.prompt.txt")
    (candidate,) = scanning.scan_all().ready
    scanning.scan.claimed(candidate.key)
    for _ in range(3):
        scanning.now += 6
        seen = scanning.scan.scan_all(scanning.now, scanning.wall, None, {candidate.key})
        assert (seen.ready, seen.left_out) == ([], {candidate.key})
    assert scanning.ready() == ["cat.prompt.txt"]


def test_of_very_many_files_that_are_ignored_some_are_named_and_all_are_counted(tmp_path):
    scanning = windowed(tmp_path)
    for number in range(30):
        scanning.write(f"note{number}.txt")
        scanning.write(f"p{number}.prompt.txt")
    seen = scanning.scan_all()
    assert (len(seen.ignored), seen.ignored.total) == (5, 30)
    assert (len(seen.waiting), seen.waiting.total) == (5, 30)
    assert seen.waiting.kinds == {"settling": 30}


@pytest.mark.parametrize("others", [0, 50])
def test_more_new_prompts_than_are_held_by_name_are_seen_with_their_images_and_marks(tmp_path, monkeypatch, others):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    scanning = windowed(tmp_path)
    for number in range(50):
        scanning.write(f"p{number:03}.prompt.txt")
    for number in range(others):
        scanning.write(f"holiday{number:03}.png", IMAGE)
    while scanning.write("p007.png", IMAGE).stat().st_ctime <= (tmp_path / "p007.prompt.txt").stat().st_ctime:
        pass  # the image is newer than its prompt
    scanning.write("p008.1.png", IMAGE)
    scanning.write(".p009.prompt.txt.swp")
    scanning.write("~$10.prompt.txt")
    scanning.wall += 60
    claimed = drained(scanning.scan, tmp_path, lambda: scanning.scan.scan_all(scanning.now, scanning.wall, 5), 5)
    images = {candidate.key[1]: candidate.images for candidate in claimed}
    assert len(claimed) == len(images) == 48
    assert {stem: names for stem, names in images.items() if names} == {"p007": ("p007.png",), "p008": ("p008.1.png",)}
    assert not {"p009", "p010"} & images.keys()


def test_more_new_prompts_than_are_held_by_name_settle_separately_although_their_folder_stays_as_it_is(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    scanning = windowed(tmp_path)
    for number in range(50):
        scanning.write(f"p{number:03}.prompt.txt")
    scanning.write("p007.png", IMAGE)
    scanning.write("p040.png", IMAGE)
    assert scanning.scan_all().waiting.kinds == {Wait.SETTLING: 50}
    assert scanning.scan_all(after=3).waiting.kinds == {Wait.SETTLING: 50}
    (tmp_path / "p007.png").write_bytes(IMAGE * 2)
    (tmp_path / "p041.prompt.txt").write_text("Another lighthouse")
    assert scanning.scan_all(after=1).waiting.kinds == {Wait.SETTLING: 50}
    scanning.scan.touch(("", "p042"), scanning.now)
    late = {"p007.prompt.txt", "p041.prompt.txt", "p042.prompt.txt"}
    assert scanning.scan_all(after=2).waiting.keys() == late
    claimed = drained(scanning.scan, tmp_path, lambda: scanning.scan.scan_all(scanning.now, scanning.wall, 5), 5)
    assert len(claimed) == 47
    assert [candidate.key[1] for candidate in claimed if candidate.images] == ["p040"]
    assert {candidate.source for candidate in scanning.scan_all(after=3.1).ready} == late


def test_among_more_other_files_than_are_held_by_name_each_is_checked_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.listing.MANY", 10)
    scanning = windowed(tmp_path)
    for number in range(50):
        scanning.write(f"holiday{number:03}.png", IMAGE)
    scanning.write("cat.prompt.txt")
    scanning.write("cat.1.png", IMAGE)
    scanning.write("dog.prompt.txt.bak")
    (tmp_path / "link.txt").symlink_to("cat.prompt.txt")
    (tmp_path / "folder.png").mkdir()
    scanning.wall += 60
    seen = scanning.scan_all()
    assert [candidate.images for candidate in seen.ready] == [("cat.1.png",)]
    assert dict(seen.ignored) == {
        "dog.prompt.txt.bak": "not a prompt: the name must end in exactly .prompt.txt",
        "link.txt": "a link, which is not followed",
    }


def test_a_mark_with_a_date_in_the_future_does_not_delay_a_prompt_forever(scanning):
    scanning.write("cat.prompt.txt")
    scanning.write(".cat.prompt.txt.swp")
    scanning.wall -= 365 * 86_400  # the clock was set back
    scanning.scan_all()
    assert scanning.ready(after=3599) == []
    scanning.scan_all(after=2)
    assert scanning.ready(after=6) == ["cat.prompt.txt"]


# Between the scan and the claim


def test_a_candidate_whose_file_was_changed_or_removed_is_noticed(scanning):
    path = scanning.write("cat.prompt.txt")
    image = scanning.write("cat.png", IMAGE)
    scanning.wall += 60
    (candidate,) = scanning.scan_all().ready
    assert scanning.scan.unchanged(candidate)
    os.utime(image, (1, 1))
    assert not scanning.scan.unchanged(candidate)
    scanning.scan_all()
    (candidate,) = scanning.scan_all(after=60).ready
    path.write_text("another text of the same inode")
    assert not scanning.scan.unchanged(candidate)
    path.unlink()
    assert not scanning.scan.unchanged(candidate)


def test_a_claim_knows_what_the_prompt_file_was_like(scanning):
    path = scanning.write("a/cat.prompt.txt")
    scanning.wall += 60
    (candidate,) = scanning.scan_all().ready
    claim = candidate.claim("0123456789abcdef", 5.0)
    assert (claim.folder, claim.stem, claim.at) == ("a", "cat", 5.0)
    assert (claim.size, claim.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_names_that_are_no_text_are_seen(scanning):
    name = os.fsdecode(b"caf\xe9\x1b[31m.prompt.txt")
    scanning.write(name)
    scanning.wall += 60
    assert scanning.ready() == [name]


@pytest.mark.slow
def test_five_thousand_prompts_are_checked_alike_twice(scanning):
    for number in range(5000):
        scanning.write(f"{number % 10}/p{number:04}.prompt.txt")
    first = scanning.scan_all()
    assert len(first.ready) + len(first.waiting) == 5000
    second = scanning.scan_all(after=60)
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
    scanning = windowed(deep, settle_seconds=0.0)
    here = os.open(deep, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    seen = scanning.scan_all()
    assert 1000 < len(seen.folders) < 2000
    assert list(seen.ignored.values()) == ["a folder whose path is too long"]
    (deep / "d").rename(deep / ".hidden")
    scanning.write("cat.prompt.txt")
    seen = scanning.scan_all(after=6)
    assert (seen.folders, [candidate.source for candidate in seen.ready]) == ([str(deep)], ["cat.prompt.txt"])


def test_of_more_folders_of_one_owner_than_are_scanned_the_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.tree._MOST_FOLDERS", 10)
    scanning = windowed(tmp_path, settle_seconds=0.0)
    for number in range(8):
        scanning.write(f"a/{number}/p.prompt.txt")
        scanning.write(f"b{number}/p.prompt.txt")
    seen = scanning.scan_all()
    assert len(seen.folders) == 11
    assert set(seen.ignored.values()) == {"a folder that is not scanned, because its owner has more than 10 folders"}
    assert seen.ignored.total == 7
    for number in range(8):
        (tmp_path / f"b{number}/p.prompt.txt").unlink()
        (tmp_path / f"b{number}").rmdir()
    seen = scanning.scan_all(after=6)
    assert (len(seen.folders), seen.ignored.total) == (10, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_however_many_folders_one_owner_makes_those_of_another_are_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewatch.inbox.tree._MOST_FOLDERS", 10)
    scanning = windowed(tmp_path, settle_seconds=0.0)
    for number in range(30):
        (tmp_path / f"m{number}").mkdir()
        os.chown(tmp_path / f"m{number}", 61235, 61235)
    scanning.scan_all()
    scanning.write("colleague/sub/p.prompt.txt")
    assert scanning.ready(after=6) == ["colleague/sub/p.prompt.txt"]


# Files that may be meant and are not finished


def test_while_such_a_file_is_empty_the_prompt_waits_and_then_it_is_refused(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    scanning.write("cat.upload", b"")
    assert scanning.ready(after=6) == []
    (reason,) = scanning.scan_all(after=1).waiting.values()
    assert "cat.upload" in reason
    assert scanning.ready(after=50) == []
    (candidate,) = scanning.scan_all(after=10).ready
    assert candidate.unused == ("cat.upload",)


def test_while_such_a_file_changes_the_prompt_waits_and_its_reason_is_shown(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    scanning.scan_all()
    scanning.scan_all(after=60)
    growing = scanning.write("cat.upload", IMAGE[:100])
    waiting = scanning.scan_all().waiting
    assert re.search("cat.upload may be meant as an image, and must not change for", waiting["cat.prompt.txt"])
    growing.write_bytes(IMAGE)
    scanning.wall = growing.stat().st_ctime
    assert scanning.ready(after=3) == []
    growing.rename(growing.with_name("cat.jpg"))  # the last step of an uploader
    scanning.wall = (scanning.inbox / "cat.jpg").stat().st_ctime
    assert scanning.ready(after=3) == []
    (candidate,) = scanning.scan_all(after=6).ready
    assert (candidate.images, candidate.unused) == (("cat.jpg",), ())


def test_a_file_that_changes_without_end_delays_its_prompt_no_longer_than_a_missing_image(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    scanning.write("cat.upload", IMAGE)
    for size in range(1, 21):
        scanning.write("cat.upload", IMAGE + b"x" * size)
        assert scanning.ready(after=3) == []
    scanning.write("cat.upload", IMAGE)
    scanning.scan_all(after=3)
    scanning.write("cat.upload", IMAGE + b"y")
    (candidate,) = scanning.scan_all(after=3).ready
    assert candidate.unused == ("cat.upload",)


def test_a_plain_text_that_changes_without_end_delays_nothing(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    scanning.write("cat.log", "one line")
    scanning.scan_all()
    scanning.write("cat.log", "another line")
    assert scanning.ready(after=5.1) == ["cat.prompt.txt"]


def test_a_transfer_under_way_of_such_a_file_delays_the_prompt_until_it_has_its_name(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    part = scanning.write("cat-2.jpg.part", IMAGE[:50])
    scanning.scan_all()
    assert scanning.ready(after=60) == []
    assert "cat-2.jpg.part" in scanning.scan_all(after=1).waiting["cat.prompt.txt"]
    part.rename(scanning.inbox / "cat-2.jpg")
    scanning.scan_all(after=1)
    scanning.scan_all(after=6)
    (candidate,) = scanning.scan_all(after=6).ready
    assert candidate.unused == ("cat-2.jpg",)


def test_a_file_that_is_removed_before_the_claim_is_no_reason_to_refuse(scanning):
    scanning.write("cat.prompt.txt", "A cat")
    scanning.write("cat-2.jpg", IMAGE)
    (candidate,) = scanning.scan_all(after=60).ready
    assert candidate.unused == ("cat-2.jpg",)
    assert scanning.scan.unchanged(candidate)
    (scanning.inbox / "cat-2.jpg").unlink()
    assert not scanning.scan.unchanged(candidate)
    (candidate,) = scanning.scan_all(after=6).ready
    assert candidate.unused == ()


def test_nothing_of_a_folder_is_claimed_before_its_first_scan_has_seen_all_of_it(scanning):
    """The names of a folder come in no order, and a scan is made in pieces: the oldest prompt may come last."""
    for number in range(3000):
        scanning.write(f"sub/p{number:04}.prompt.txt")
    scanning.wall += 60
    scan, first = scanning.scan, []
    scan.moment.now, scan.moment.wall = scanning.now, scanning.wall
    for _ in scan.scan_folder(""):
        pass
    for _ in scan.scan_folder("sub"):
        for _ in scan.order.prepare("sub"):
            pass
        first += [candidate.source for candidate in [scan.order.take("sub")] if candidate]
    first += [candidate.source for candidate in [scan.order.take("sub")] if candidate]
    assert first[0] == "sub/p0000.prompt.txt"
