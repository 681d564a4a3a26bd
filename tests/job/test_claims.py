"""The folder of claimed files is the daemon's own, identified by owner, mode and inode under any name."""

from __future__ import annotations

import json
import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from imagewatch.inbox.claimed import MARK
from imagewatch.job.claims import Claims, NotOursError
from imagewatch.system.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODE = 0o700


class Slow(Disk):
    """The disk of a daemon at whose first name of a file another daemon is faster."""

    faster: Callable[[], None] | None = None

    def rename(self, source: str, target: str) -> None:
        faster, self.faster = self.faster, None
        if faster:
            faster()
        super().rename(source, target)


class Place:
    """An inbox and a state folder, and starts that use them."""

    def __init__(self, root: Path, state: str = "state") -> None:
        self.inbox, self.state = root / "inbox", root / state
        self.inbox.mkdir(exist_ok=True)
        self.state.mkdir(mode=0o700)
        self.folder = self.inbox / ".imagewatch"

    def start(self, disk: Disk | None = None) -> Claims:
        disk = disk or Disk()
        disk.tops.open(str(self.inbox))
        disk.tops.open(str(self.state), is_private=True)
        self.disk = disk
        return Claims(str(self.inbox), str(self.state), disk)

    def names(self) -> list[str]:
        return sorted(set(self.disk.tops.names(str(self.folder))) - {MARK})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def used(place: Place) -> Place:
    """A folder of claims that was used before."""
    place.start().require()
    (place.folder / "job").mkdir()
    return place


def test_the_folder_is_created_for_the_daemon_alone_and_its_identity_is_saved(place: Place) -> None:
    place.start().require()
    status = place.folder.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (MODE, os.geteuid())
    assert json.loads((place.state / "claims.json").read_bytes())["inode"] == status.st_ino


def test_two_daemons_that_start_at_the_same_time_agree_on_its_identity(place: Place) -> None:
    disk, other = Slow(), Place(place.inbox.parent, "other")
    disk.faster = lambda: other.start().require()
    place.start(disk).require()
    known = [json.loads((state / "claims.json").read_bytes()) for state in (place.state, other.state)]
    assert known[0] == known[1]
    assert known[0]["mark"] == (place.folder / MARK).read_text()
    assert place.names() == []


def test_a_check_creates_nothing(place: Place) -> None:
    claims = place.start()
    claims.check()
    assert not place.folder.exists()
    assert not claims.is_open()


@pytest.mark.parametrize("running", [True, False], ids=["while running", "before a start"])
def test_a_renamed_folder_gets_its_name_back(used: Place, *, running: bool) -> None:
    claims = used.start()
    if running:
        claims.require()
    used.folder.rename(used.inbox / "visible")
    claims.require()
    assert (used.folder / "job").is_dir()
    assert used.names() == ["job"]


@pytest.mark.parametrize("running", [True, False], ids=["while running", "before a start"])
@pytest.mark.parametrize(
    "strange",
    [
        lambda folder: folder.mkdir(mode=0o755),
        lambda folder: folder.mkdir(mode=0o700),
        lambda folder: folder.symlink_to(folder.parent),
        lambda folder: folder.write_text(""),
        os.mkfifo,
    ],
    ids=["folder", "private folder", "link", "file", "pipe"],
)
def test_the_daemons_folder_stays_open_while_something_else_has_its_name(
    used: Place, strange, *, running: bool
) -> None:
    claims = used.start()
    if running:
        claims.require()
    used.folder.rename(used.inbox / ".old")
    strange(used.folder)
    with pytest.raises(NotOursError, match=r"that is now .*/inbox/\.old\)") as caught:
        claims.require()
    assert (caught.value.path, "remove or rename" in caught.value.hint) == (str(used.folder), True)
    assert used.names() == ["job"]
    used.folder.rename(used.inbox / ".strange")
    claims.require()
    assert (used.folder / "job").is_dir()


@pytest.mark.parametrize(
    ("strange", "reason"),
    [
        (lambda folder: folder.mkdir(mode=0o750), r"it has the mode 0750, not 0700"),
        (lambda folder: folder.symlink_to(folder.parent), "it is not a folder"),
        (lambda folder: folder.write_text(""), "it is not a folder"),
    ],
    ids=["mode", "link", "file"],
)
def test_at_the_first_start_a_folder_that_is_not_the_daemons_own_is_not_used(
    place: Place, strange, reason: str
) -> None:
    strange(place.folder)
    claims = place.start()
    with pytest.raises(NotOursError, match=reason):
        claims.require()
    assert not claims.is_open()
    with pytest.raises(OSError, match="another folder has the name"):
        place.disk.tops.names(str(place.folder))
    assert not (place.state / "claims.json").exists()


def test_a_folder_of_another_user_is_not_used(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a folder to another user")
    place.folder.mkdir(mode=0o700)
    os.chown(place.folder, 61235, 61235)
    with pytest.raises(NotOursError, match=r"it belongs to another user \(61235\)"):
        place.start().require()


def test_a_mode_that_the_owner_changed_is_corrected_at_the_next_start(used: Place) -> None:
    used.folder.chmod(0o775)
    used.start().require()
    assert stat.S_IMODE(used.folder.stat().st_mode) == MODE


def test_the_folder_of_an_inbox_that_was_restored_from_a_backup_is_used_again(used: Place, tmp_path: Path) -> None:
    shutil.copytree(used.inbox, tmp_path / "backup", copy_function=shutil.copy2)
    shutil.rmtree(used.inbox)
    (tmp_path / "backup").rename(used.inbox)
    used.start().require()
    assert used.names() == ["job"]
    assert json.loads((used.state / "claims.json").read_bytes())["inode"] == used.folder.stat().st_ino


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"inode": "x"}', b"\xff"])
def test_a_damaged_saved_identity_is_written_again(used: Place, content: bytes) -> None:
    (used.state / "claims.json").write_bytes(content)
    used.start().require()
    assert json.loads((used.state / "claims.json").read_bytes())["inode"] == used.folder.stat().st_ino


def test_an_empty_folder_that_is_removed_is_created_again(place: Place) -> None:
    claims = place.start()
    claims.require()
    (place.folder / MARK).unlink()
    place.folder.rmdir()
    claims.check()
    assert not claims.is_open()
    claims.require()
    assert place.names() == []


def test_a_copied_inbox_whose_folder_of_claims_was_renamed_has_it_again(used: Place, tmp_path: Path) -> None:
    shutil.copytree(used.inbox, tmp_path / "copy", copy_function=shutil.copy2)
    shutil.rmtree(used.inbox)
    (tmp_path / "copy").rename(used.inbox)
    used.folder.rename(used.inbox / "visible")
    used.start().require()
    assert used.names() == ["job"]


def test_a_mode_that_is_changed_while_the_folder_is_in_use_is_corrected_immediately(used: Place) -> None:
    claims = used.start()
    claims.require()
    used.folder.chmod(0o777)
    claims.check()
    assert stat.S_IMODE(used.folder.stat().st_mode) == MODE


def test_a_folder_that_was_given_to_another_user_has_to_be_given_back_and_is_not_removed(used: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a folder to another user")
    os.chown(used.folder, 61235, -1)
    with pytest.raises(NotOursError, match="is the daemon's folder of claimed files, but it belongs") as caught:
        used.start().require()
    assert caught.value.hint.startswith("do not remove or rename it: give it back")
