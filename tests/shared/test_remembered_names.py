"""A common inbox where the kernel of a host remembers names that another host has changed: NFS.

For up to a minute a client of NFS finds a folder under its earlier name, and does not find a new file.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from imagewatch.job.handover import Handover
from imagewatch.job.two_hosts import FOLDER, TwoHosts
from imagewatch.system import disk_calls
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.job.two_hosts import Result
    from imagewatch.system.folders import Place

JOB = "0123456789abcdef"


class Epoch:
    """What a journal has of the only job: its epoch."""

    is_on = True

    def __init__(self, number: int) -> None:
        self.number = number

    def epoch(self, job: str) -> int:
        assert job == JOB
        return self.number


class OneFolder:
    """The folder of claimed files as one daemon has it."""

    def __init__(self, claims: Path, epoch: int) -> None:
        self.claims = str(claims)
        self.disk = Disk()
        self.tops = self.disk.tops
        self.tops.open(self.claims)
        self.journal = self
        self.common = Epoch(epoch)
        self.handover = Handover(self)  # type: ignore[arg-type]

    def claim_folder(self, job: str) -> str:
        return os.path.join(self.claims, f"{job}.{self.common.epoch(job)}")

    def ensure_claims(self) -> None:
        assert os.path.isdir(self.claims)


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    """Return the folder of claimed files, with one job."""
    folder = tmp_path / "claims" / f"{JOB}.1"
    folder.mkdir(parents=True)
    for name in ("claim.json", "cat.prompt.txt", "sent.1"):
        (folder / name).write_text(name)
    return folder.parent


def test_a_daemon_that_has_the_folder_of_a_lost_job_open_can_do_nothing_with_it(claims: Path) -> None:
    late, other = OneFolder(claims, 1), OneFolder(claims, 2)
    folder = late.claim_folder(JOB)
    (claims / "late").touch()
    with late.tops.held(folder):
        other.handover.fence(JOB)
        with pytest.raises(FileNotFoundError):
            late.disk.rename(str(claims / "late"), os.path.join(folder, "late"))
        with pytest.raises(FileNotFoundError):
            late.disk.rename(os.path.join(folder, "cat.prompt.txt"), str(claims / "cat.prompt.txt"))
        with pytest.raises(SpoolError, match="No such file"):
            late.disk.create(os.path.join(folder, "sent.2"))
    assert sorted(os.listdir(claims)) == [f"{JOB}.2", "late"]
    assert sorted(os.listdir(claims / f"{JOB}.2")) == ["cat.prompt.txt", "claim.json", "sent.1"]


def test_what_an_earlier_daemon_claims_while_its_folder_is_emptied_is_moved_too(claims: Path) -> None:
    other = OneFolder(claims, 2)
    removed = other.disk.remove_folder

    def once(path: str) -> bool:
        other.disk.remove_folder = removed  # type: ignore[method-assign]
        (claims / f"{JOB}.1" / "dog.png").touch()
        return removed(path)

    other.disk.remove_folder = once  # type: ignore[method-assign]
    other.handover.fence(JOB)
    assert os.listdir(claims) == [f"{JOB}.2"]
    assert (claims / f"{JOB}.2" / "dog.png").exists()


def test_a_file_that_a_client_of_nfs_had_open_when_it_was_removed_does_not_keep_the_folder(claims: Path) -> None:
    (claims / f"{JOB}.1" / ".nfs000000000001234500000001").touch()
    OneFolder(claims, 2).handover.fence(JOB)
    assert sorted(os.listdir(claims / f"{JOB}.2")) == ["cat.prompt.txt", "claim.json", "sent.1"]


def test_a_response_that_its_daemon_hands_over_while_its_folder_is_emptied_does_not_keep_the_folder(
    claims: Path,
) -> None:
    for epoch in (1, 2):
        (claims / f"{JOB}.{epoch}").mkdir(exist_ok=True)
        for name in ("claim.json", "answer.1", "answer.image.0"):
            (claims / f"{JOB}.{epoch}" / name).write_text("the same")
    (claims / f"{JOB}.1" / "answer.2.tmp").write_text("a part")
    OneFolder(claims, 2).handover.fence(JOB)
    assert os.listdir(claims) == [f"{JOB}.2"]
    wanted = ["answer.1", "answer.image.0", "cat.prompt.txt", "claim.json", "sent.1"]
    assert sorted(os.listdir(claims / f"{JOB}.2")) == wanted


def test_no_witness_and_no_original_is_given_up_for_another_one_of_its_name(claims: Path) -> None:
    (claims / f"{JOB}.2").mkdir()
    for name in ("cat.prompt.txt", "sent.1"):
        (claims / f"{JOB}.2" / name).write_text("another one")
    with pytest.raises(SpoolError, match="File exists"):
        OneFolder(claims, 2).handover.fence(JOB)
    assert {"cat.prompt.txt", "sent.1"} <= set(os.listdir(claims / f"{JOB}.1"))


class Remembering(Tops):
    """Names that were missing once stay missing until their folder is listed."""

    def __init__(self) -> None:
        super().__init__()
        self._missing: set[str] = set()

    def exists(self, path: str) -> bool:
        if path not in self._missing and super().exists(path):
            return True
        self._missing.add(path)
        return False

    def names(self, path: str, *, folders: bool | None = None) -> list[str]:
        self._missing = {one for one in self._missing if os.path.dirname(one) != path}
        return super().names(path, folders=folders)


def test_two_hosts_that_remember_missing_names_find_each_other(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    found: list[list[Result]] = []

    def host() -> None:
        disk = Disk()
        disk.tops = Remembering()  # type: ignore[misc]
        disk.tops.open(str(tmp_path))
        found.append(list(TwoHosts(disk, str(tmp_path / FOLDER), step_seconds=5).run()))

    threads = [threading.Thread(target=host) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(lines) for lines in found] == [7, 7]
    assert {line.verdict for lines in found for line in lines} == {"ok"}


class StaleUntilListed(Tops):
    """A folder that was removed on another host is ``ESTALE`` until the one above it is listed."""

    is_stale = True

    def listable(self, path: str):  # type: ignore[no-untyped-def]
        self.is_stale = False
        return super().listable(path)

    def at(self, path: str) -> Place:
        if self.is_stale and "removed" in path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return super().at(path)


@pytest.mark.parametrize("call", ["create", "unlink", "remove_folder", "rename to", "rename from"])
def test_a_folder_that_was_removed_on_another_host_is_missing(tmp_path: Path, call: str) -> None:
    disk = Disk()
    disk.tops = StaleUntilListed()  # type: ignore[misc]
    disk.tops.open(str(tmp_path))
    (tmp_path / "file").touch()
    inner, file = str(tmp_path / "removed" / "inner"), str(tmp_path / "file")
    if call == "create":
        with pytest.raises(SpoolError) as caught:
            disk.create(inner)
        assert caught.value.code == errno.ENOENT
    elif call == "unlink":
        disk.unlink(inner)
    elif call == "remove_folder":
        assert disk.remove_folder(inner)
    else:
        names = (file, inner) if call == "rename to" else (inner, file)
        with pytest.raises(FileNotFoundError):
            disk.rename(*names)


def test_a_rename_that_stays_stale_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(source: Place, target: Place) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), f"{source.name} {target.name}")

    monkeypatch.setattr(disk_calls, "rename_new", stale)
    disk = Disk()
    disk.tops.open(str(tmp_path))
    with pytest.raises(SpoolError) as caught:
        disk.rename(str(tmp_path / "one"), str(tmp_path / "two"))
    assert caught.value.code == errno.ESTALE
