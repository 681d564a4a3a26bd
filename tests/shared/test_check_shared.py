"""``imagewatch check --shared``: two hosts that try out a common inbox together."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING

from support.daemon import Folders, command

from imagewatch.commands import check_shared
from imagewatch.config.load import load
from imagewatch.job.two_hosts import FOLDER, TwoHosts
from imagewatch.system.disk import Disk
from imagewatch.system.file_systems import Kinds
from shared.test_common_folder import Overwriting

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from imagewatch.job.two_hosts import Result


def started(folders: Folders) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "imagewatch", "check", "--shared"]
    return subprocess.Popen(command, env=folders.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class WithoutExclusive(TwoHosts):
    """A host that also gets files that the other one has created."""

    def _create(self, number: int) -> bool:
        super()._create(number)
        return True


class WithoutLocks(TwoHosts):
    """A host whose locks the other one does not notice."""

    def _locked(self, path: str, *, is_shared: bool) -> IO[bytes] | None:
        held = super()._locked(path, is_shared=is_shared)
        if held is not None:
            held.close()
        return held


class Silent(TwoHosts):
    """A host that ends after it was found."""

    def _new_files(self) -> list[Result]:  # type: ignore[override]
        raise SystemExit


class Lingering(Disk):
    """The disk of a host whose removed folders take files of the other one for some time."""

    def __init__(self) -> None:
        self._removed: set[str] = set()

    def remove_folder(self, path: str) -> bool:
        if path in self._removed or not os.path.basename(path).startswith("fence."):
            return super().remove_folder(path)
        self._removed.add(path)
        return True


def with_double(folders: Folders, kind: type[TwoHosts], disk: Disk | None = None) -> tuple[int, str]:
    disk, claims = disk or Disk(), folders.inbox / ".imagewatch"
    (claims / FOLDER).mkdir(parents=True, mode=0o700)
    claims.chmod(0o700)
    disk.tops.open(str(claims))
    thread = threading.Thread(target=lambda: list(kind(disk, str(claims / FOLDER)).run()))
    process = started(folders)
    thread.start()
    output, _ = process.communicate(timeout=100)
    thread.join()
    return process.returncode, output


def test_two_processes_find_each_other_and_everything_is_good_on_a_local_disk(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "http://127.0.0.1:9")
    both = [started(folders), started(folders)]
    outputs = [one.communicate(timeout=100)[0] for one in both]
    for one, output in zip(both, outputs, strict=True):
        assert one.returncode == 0, output
        lines = [line.split(None, 1) for line in output.splitlines()]
        assert [line[0] for line in lines] == ["ok"] * len(lines), output
        for what in ("other host", "O_EXCL", "rename", "clocks", "late rename", "exclusive lock", "shared lock"):
            assert what in output
    assert folders.names("inbox") == []
    assert list(folders.inbox.iterdir()) == []


def test_files_that_both_hosts_create_are_bad(tmp_path: Path) -> None:
    code, output = with_double(Folders(tmp_path, "http://127.0.0.1:9"), WithoutExclusive)
    assert code == 1, output
    assert "created by both hosts" in output


def test_locks_that_are_not_noticed_are_bad(tmp_path: Path) -> None:
    code, output = with_double(Folders(tmp_path, "http://127.0.0.1:9"), WithoutLocks)
    assert code == 1, output
    assert "this host got" in output


def test_a_late_rename_that_arrives_is_bad(tmp_path: Path) -> None:
    code, output = with_double(Folders(tmp_path, "http://127.0.0.1:9"), TwoHosts, Lingering())
    assert code == 1, output
    (bad,) = [line for line in output.splitlines() if line.startswith("bad")]
    assert "late rename" in bad
    assert "a file could be put into a folder that the other host had removed" in bad


def test_a_missing_inbox_is_bad_and_is_not_created(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "http://127.0.0.1:9")
    folders.inbox.rmdir()
    done = command(folders, "check", "--shared")
    assert done.returncode == 1, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("bad")
    assert "mount the shared file system" in line
    assert not folders.inbox.exists()


def test_a_file_system_that_is_bad_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_shared, "Disk", Overwriting)
    folders = Folders(tmp_path, "http://127.0.0.1:9")
    (line,) = check_shared.shared_lines(load(None, folders.environ))
    assert (line.verdict, line.what) == ("bad", "file system")
    assert list(folders.inbox.iterdir()) == []


def test_a_host_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    disk, results = Disk(), list[object]()
    disk.tops.open(str(tmp_path))
    folder = tmp_path / FOLDER
    folder.mkdir()
    results += TwoHosts(disk, str(folder), meet_seconds=0.2).run()
    assert [(one.verdict, one.what) for one in results] == [("bad", "other host")]  # type: ignore[attr-defined]
    folder.mkdir(exist_ok=True)

    def silent() -> None:
        with contextlib.suppress(SystemExit):
            list(Silent(disk, str(folder)).run())

    thread = threading.Thread(target=silent)
    thread.start()
    found = list(TwoHosts(disk, str(folder), step_seconds=0.3).run())
    thread.join()
    assert (found[-1].verdict, found[-1].what) == ("bad", "other host")
    assert "in time" in found[-1].why


class Smb(Kinds):
    """File systems as on a host whose inbox is on SMB."""

    def of(self, path: str) -> str:  # noqa: ARG002  as the real one
        return "cifs"


def test_smb_is_refused_with_one_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_shared, "Kinds", Smb)
    folders = Folders(tmp_path, "http://127.0.0.1:9")
    (line,) = check_shared.shared_lines(load(None, folders.environ))
    assert line.verdict == "bad"
    assert line.why.endswith("remove shared.inbox)")


def test_it_is_refused_together_with_balance() -> None:
    done = _command("check", "--shared", "--balance")
    assert (done.returncode, done.stdout) == (64, "")
    assert "--shared and --balance cannot be used together" in done.stderr


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imagewatch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
