"""What a common inbox needs of its file system, and whose inbox it is."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

import pytest
from support.daemon import Folders, LoggedDaemon, Running

from imagewatch.job.common_folder import FolderProbes, Whose, claim_inbox, require_tried
from imagewatch.system.disk import Disk
from imagewatch.system.errors import AlreadyRunning, ConfigError, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class WithoutExclusive(Disk):
    """A file system on which O_EXCL means nothing."""

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        return open(path, "w+b", buffering=0, opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, mode))


class Overwriting(Disk):
    """One that renames over what is there."""

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)


class Lenient(Disk):
    """One on which files can be put into a folder that was removed."""

    def rename(self, source: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        super().rename(source, target)


class Copying(Disk):
    """One that gives a renamed file another inode."""

    def rename(self, source: str, target: str) -> None:
        if os.path.isfile(source) and not os.path.exists(target):
            with open(f"{target}.new", "wb") as file:
                file.write(b"the same")
            os.rename(f"{target}.new", target)
            os.unlink(source)
        else:
            super().rename(source, target)


class WithoutLocks(FolderProbes):
    """On a file system on which another process does not notice a lock."""

    def _locks_of_another(self, path: str) -> str:
        assert path
        return "11"


def folder_on(disk: Disk, path: Path) -> str:
    folder = path / "claims"
    folder.mkdir()
    disk.tops.open(str(folder))
    return str(folder)


def test_a_local_disk_has_what_a_common_inbox_needs_and_nothing_is_left(tmp_path: Path) -> None:
    disk = Disk()
    folder = folder_on(disk, tmp_path)
    FolderProbes(disk, folder).run()
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("disk", "what"),
    [
        (WithoutExclusive(), "O_EXCL"),
        (Overwriting(), "rename a file over another one"),
        (Lenient(), "a folder that was removed"),
        (Copying(), "keep the inode"),
    ],
)
def test_a_file_system_without_it_is_refused_by_name(tmp_path: Path, disk: Disk, what: str) -> None:
    folder = folder_on(disk, tmp_path)
    with pytest.raises(SpoolError) as caught:
        FolderProbes(disk, folder).run()
    assert what in str(caught.value)
    assert folder in str(caught.value)
    assert "remove shared.inbox" in caught.value.hint


def test_a_lock_that_another_process_does_not_notice_is_refused(tmp_path: Path) -> None:
    disk = Disk()
    with pytest.raises(SpoolError, match="flock"):
        WithoutLocks(disk, folder_on(disk, tmp_path)).run()


@pytest.mark.parametrize("kind", ["cifs", "smb3"])
def test_smb_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="SMB"):
        require_tried("/srv/inbox", kind)
    require_tried("/srv/inbox", "nfs4")


def claimed(path: Path, whose: Whose, *, is_common: bool = True) -> IO[bytes]:
    return claim_inbox(str(path / "lock"), Disk(), whose, is_common=is_common, is_alone=not is_common)


def test_daemons_of_one_inbox_share_its_lock_and_others_are_refused(tmp_path: Path) -> None:
    ours = Whose("main", "common")
    with claimed(tmp_path, ours), claimed(tmp_path, ours):
        with pytest.raises(AlreadyRunning, match='account "main"'):
            claimed(tmp_path, Whose("other", "common"))
        with pytest.raises(AlreadyRunning, match='common inbox "common"'):
            claimed(tmp_path, Whose("main", "another"))
        with pytest.raises(AlreadyRunning):
            claimed(tmp_path, Whose("", ""), is_common=False)
    with pytest.raises(AlreadyRunning) as caught:
        claimed(tmp_path, Whose("", ""), is_common=False)
    assert "set shared.inbox" in caught.value.hint
    (tmp_path / "lock").write_bytes(b"")
    with claimed(tmp_path, Whose("", ""), is_common=False), pytest.raises(AlreadyRunning):
        claimed(tmp_path, ours)


def test_a_daemon_without_the_name_of_the_inbox_is_refused_also_when_no_other_one_runs(
    team: Callable[..., Folders], run: Callable[..., LoggedDaemon]
) -> None:
    one = team("one")
    alone = team("two", shared__inbox="")
    other = team("three", shared__account="other")
    daemon = run(one)
    for is_running in (True, False):
        if not is_running:
            assert daemon.stop() == 0
        for folders in (alone, other):
            refused = Running(folders, "run")
            assert refused.wait() == 75, refused.output


def test_a_daemon_of_another_user_is_refused(team: Callable[..., Folders]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    one = team("one")
    claims = one.inbox / ".imagewatch"
    claims.mkdir(mode=0o700)
    os.chown(claims, 12345, 12345)
    refused = Running(one, "run")
    assert refused.wait() == 74, refused.output
    assert "the same user" in refused.output


def test_an_inbox_with_jobs_of_a_daemon_that_had_it_alone_is_refused(team: Callable[..., Folders]) -> None:
    one = team("one")
    (one.inbox / ".imagewatch" / ("0" * 16)).mkdir(parents=True, mode=0o700)
    refused = Running(one, "run")
    assert refused.wait() == 74, refused.output
    assert "1 job in" in refused.output


def test_what_another_daemon_tries_out_now_is_not_removed_and_what_was_left_is(
    team: Callable[..., Folders], run: Callable[..., LoggedDaemon]
) -> None:
    one = team("one")
    assert run(one).stop() == 0
    claims = one.inbox / ".imagewatch"
    for name in ("old", "new"):
        (claims / f".iw-probe.{name}.d").mkdir()
        (claims / f".iw-probe.{name}.d" / "file").touch()
    os.utime(claims / ".iw-probe.old.d", (1, 1))
    run(one)
    assert [path.name for path in claims.glob(".iw-probe.*")] == [".iw-probe.new.d"]
