"""The simulated disk loses at a power cut what a real one may lose, and nothing else."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from support.losing import Losing, LosingDisk, PowerCut

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POWER = [losing for losing in Losing if losing is not Losing.KILLED]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A root with two folders and a file in the first, all durable."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "old").write_bytes(b"old")
    return tmp_path


def remaining(top: Path, losing: Losing, change: Callable[[LosingDisk, str], object]) -> dict[str, bytes]:
    """Return the files that remain after a power cut that follows a change."""
    disk = LosingDisk(str(top))
    change(disk, str(top))
    disk.restore(disk.image(losing))
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}


def put(disk: LosingDisk, path: str, content: bytes = b"content", *, sync: bool = True) -> None:
    with disk.create(path) as file:
        file.write(content)
        file.flush()
        if sync:
            disk.sync(file, path)


def test_files_from_before_the_start_stay(top: Path) -> None:
    for losing in Losing:
        assert remaining(top, losing, lambda *_: None) == {"a/old": b"old"}


def test_a_synced_file_in_a_synced_folder_stays(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        put(disk, f"{root}/a/new")
        disk.sync_folder(f"{root}/a")

    for losing in Losing:
        assert remaining(top, losing, change)["a/new"] == b"content"
        (top / "a" / "new").unlink()


@pytest.mark.parametrize(
    ("losing", "found"),
    [
        (Losing.KILLED, b"content"),
        (Losing.NOTHING, None),
        (Losing.TWINS, None),
        (Losing.NAMES, b"content"),
        (Losing.TORN, b"content"),
    ],
)
def test_a_name_whose_folder_was_not_synced_may_be_lost(top: Path, losing: Losing, found: bytes | None) -> None:
    assert remaining(top, losing, lambda disk, root: put(disk, f"{root}/a/new")).get("a/new") == found


@pytest.mark.parametrize(
    ("losing", "found"),
    [
        (Losing.KILLED, b"content"),
        (Losing.NOTHING, b""),
        (Losing.TWINS, b""),
        (Losing.NAMES, b""),
        (Losing.TORN, b"con"),
    ],
)
def test_content_that_was_not_synced_may_be_lost_while_its_name_stays(top: Path, losing: Losing, found: bytes) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        put(disk, f"{root}/a/new.tmp", sync=False)
        disk.rename(f"{root}/a/new.tmp", f"{root}/a/new")
        disk.sync_folder(f"{root}/a")

    assert remaining(top, losing, change)["a/new"] == found


def test_appended_content_may_be_lost_and_earlier_content_may_not(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        with disk.append(f"{root}/a/old") as file:
            file.write(b" and new")

    assert remaining(top, Losing.NAMES, change)["a/old"] == b"old"
    assert remaining(top, Losing.TORN, change)["a/old"] == b"old a"


def test_written_content_survives_the_end_of_the_process(top: Path) -> None:
    disk = LosingDisk(str(top), cut=2, losing=Losing.KILLED)
    with disk.create(f"{top}/a/new") as file:
        file.write(b"not synced")
        with pytest.raises(PowerCut):
            disk.unlink(f"{top}/a/old")
    disk.come_back()
    assert (top / "a" / "new").read_bytes() == b"not synced"
    assert (top / "a" / "old").read_bytes() == b"old"


def test_a_removal_that_was_not_synced_may_be_undone(top: Path) -> None:
    for losing in (Losing.NOTHING, Losing.TWINS):
        assert remaining(top, losing, lambda disk, root: disk.unlink(f"{root}/a/old")) == {"a/old": b"old"}
    assert remaining(top, Losing.NAMES, lambda disk, root: disk.unlink(f"{root}/a/old")) == {}


def test_a_replacement_that_was_not_synced_may_be_undone(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        put(disk, f"{root}/a/new")
        disk.replace(f"{root}/a/new", f"{root}/a/old")

    assert remaining(top, Losing.NOTHING, change) == {"a/old": b"old"}
    assert remaining(top, Losing.NAMES, change) == {"a/old": b"content"}


def test_a_synced_file_in_a_folder_without_a_durable_name_is_lost(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        disk.make_folder(f"{root}/c/d")
        put(disk, f"{root}/c/d/new")
        disk.sync_folder(f"{root}/c/d")
        disk.sync_folder(f"{root}/c")

    assert remaining(top, Losing.NOTHING, change) == {"a/old": b"old"}


def test_a_removed_folder_may_come_back_as_it_was_synced(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        disk.unlink(f"{root}/a/old")
        assert disk.remove_folder(f"{root}/a")

    assert remaining(top, Losing.NOTHING, change) == {"a/old": b"old"}
    assert remaining(top, Losing.NAMES, change) == {}
    assert not (top / "a").exists()


@pytest.mark.parametrize(
    ("synced", "losing", "names"),
    [
        ("", Losing.NOTHING, {"a/old"}),
        ("", Losing.TWINS, {"a/old"}),
        ("", Losing.NAMES, {"b/moved"}),
        ("b", Losing.NOTHING, {"b/moved"}),
        ("b", Losing.TWINS, {"a/old", "b/moved"}),
        ("a", Losing.NOTHING, {"b/moved"}),
        ("a", Losing.TWINS, {"b/moved"}),
        ("ab", Losing.TWINS, {"b/moved"}),
        ("ba", Losing.TWINS, {"b/moved"}),
    ],
)
def test_a_rename_between_folders_is_never_lost_on_both_sides(
    top: Path, synced: str, losing: Losing, names: set[str]
) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        disk.rename(f"{root}/a/old", f"{root}/b/moved")
        for folder in synced:
            disk.sync_folder(f"{root}/{folder}")

    assert remaining(top, losing, change) == dict.fromkeys(names, b"old")


def test_hard_links_are_one_file_with_two_names(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        disk.rename(f"{root}/a/old", f"{root}/b/moved")
        disk.sync_folder(f"{root}/b")

    remaining(top, Losing.TWINS, change)
    assert os.path.samefile(top / "a" / "old", top / "b" / "moved")


def test_a_rename_out_of_a_synced_folder_makes_the_new_folder_durable_too(top: Path) -> None:
    def change(disk: LosingDisk, root: str) -> None:
        disk.make_folder(f"{root}/c/d")
        disk.rename(f"{root}/a/old", f"{root}/c/d/moved")
        disk.sync_folder(f"{root}/a")

    assert remaining(top, Losing.NOTHING, change) == {"c/d/moved": b"old"}


def test_changes_of_a_killed_process_can_still_be_undone(top: Path) -> None:
    disk = LosingDisk(str(top))
    disk.rename(f"{top}/a/old", f"{top}/b/moved")
    disk.restore(disk.image(Losing.KILLED))
    assert (top / "b" / "moved").exists()
    disk.restore(disk.image(Losing.NOTHING))
    assert (top / "a" / "old").exists()


@pytest.mark.parametrize("losing", POWER)
def test_the_state_after_a_power_cut_is_durable(top: Path, losing: Losing) -> None:
    disk = LosingDisk(str(top))
    disk.rename(f"{top}/a/old", f"{top}/b/moved")
    put(disk, f"{top}/a/new", sync=False)
    disk.restore(disk.image(losing))
    assert all(disk.image(again) == disk.image(losing) for again in Losing)


def test_the_durable_write_is_all_or_nothing_at_each_step(top: Path) -> None:
    steps = LosingDisk(str(top))
    steps.write(f"{top}/a/old", b"new content")
    for losing in Losing:
        for cut in range(1, len(steps.steps) + 1):
            (top / "a" / "old").write_bytes(b"old")
            disk = LosingDisk(str(top), cut=cut, losing=losing)
            with pytest.raises(PowerCut):
                disk.write(f"{top}/a/old", b"new content")
            disk.come_back()
            assert (top / "a" / "old").read_bytes() in {b"old", b"new content"}
            disk.unlink(f"{top}/a/old.tmp")


@pytest.mark.parametrize("skipped", ["sync", "sync_folder"])
def test_a_write_that_skips_a_sync_is_caught(top: Path, monkeypatch: pytest.MonkeyPatch, skipped: str) -> None:
    monkeypatch.setattr(LosingDisk, skipped, lambda *_: None)
    found = remaining(top, Losing.NOTHING, lambda disk, root: disk.write(f"{root}/b/new", b"content"))
    assert found.get("b/new") != b"content"


def test_after_the_cut_nothing_works_until_the_power_is_back(top: Path) -> None:
    disk = LosingDisk(str(top), cut=1, after=True)
    with pytest.raises(PowerCut):
        disk.unlink(f"{top}/a/old")
    for work in (
        lambda: disk.make_folder(f"{top}/c"),
        lambda: disk.create(f"{top}/a/new"),
        lambda: disk.symlink("x", f"{top}/a/link"),
        lambda: disk.sync_folder(f"{top}/a"),
        lambda: disk.rename(f"{top}/b", f"{top}/c"),
        lambda: disk.remove_folder(f"{top}/b"),
    ):
        with pytest.raises(PowerCut):
            work()
    disk.come_back()
    assert sorted(path.name for path in top.rglob("*")) == ["a", "b", "old"]
    disk.unlink(f"{top}/a/old")


def test_between_mounts_nothing_is_renamed(top: Path) -> None:
    disk = LosingDisk(str(top), mounts=(f"{top}/b",))
    with pytest.raises(OSError, match="cross-device") as caught:
        disk.rename(f"{top}/a/old", f"{top}/b/old")
    assert caught.value.errno == errno.EXDEV
    disk.carry(f"{top}/a/old", f"{top}/b/old", f"{top}/b/.tmp")
    disk.restore(disk.image(Losing.NOTHING))
    assert (top / "b" / "old").read_bytes() == b"old"


def test_a_link_is_kept_as_a_link(top: Path) -> None:
    disk = LosingDisk(str(top))
    disk.symlink("nowhere", f"{top}/a/link")
    disk.sync_folder(f"{top}/a")
    disk.restore(disk.image(Losing.NOTHING))
    assert os.readlink(top / "a" / "link") == "nowhere"
