"""The disk, on real disks: what is written is whole, what exists stays, and every failure has a name."""

from __future__ import annotations

import base64
import contextlib
import errno
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from imagewatch.endpoint.saved_answer import Answer, Sink
from imagewatch.protocol.values import Head, Tail
from imagewatch.system import kernel
from imagewatch.system.disk import Disk
from imagewatch.system.errors import AlreadyRunning, SpoolError
from imagewatch.system.folders import Tops
from imagewatch.system.locks import lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DISK = Disk()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a(folder: Path, name: str, content: bytes = b"content") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount file systems of our own."""
    mounted: list[Path] = []

    def mounter(options: str, kind: str = "tmpfs") -> Path:
        place = tmp_path / f"mount-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", kind, "-o", options, kind, str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount")
        mounted.append(place)
        return place

    yield mounter
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def elsewhere(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on another file system."""
    if os.geteuid() == 0:
        yield request.getfixturevalue("mount")("size=4m")
        return
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=shm))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["renameat2", "link", "neither"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways in which a file gets a name without replacing another."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if request.param != "renameat2":
        monkeypatch.setattr(kernel, "_renameat2", lambda: None)
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refused)
    return str(request.param)


class TestWriting:
    def test_a_file_appears_whole_and_nothing_is_left_beside_it(self, tmp_path: Path) -> None:
        DISK.write(str(tmp_path / "record"), b"content")
        assert (tmp_path / "record").read_bytes() == b"content"
        assert names(tmp_path) == ["record"]

    def test_it_is_not_there_before_the_block_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        with DISK.writing(str(path)) as file:
            file.write(b"content")
            assert not path.exists()
        assert path.exists()

    def test_a_file_of_our_own_is_replaced(self, tmp_path: Path) -> None:
        path = in_a(tmp_path, "record", b"old")
        DISK.write(path, b"new")
        assert Path(path).read_bytes() == b"new"

    def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = in_a(tmp_path, "record", b"old")

        def fail() -> None:
            with DISK.writing(path) as file:
                file.write(b"half of the n")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert Path(path).read_bytes() == b"old"
        assert names(tmp_path) == ["record"]

    def test_the_leftover_of_an_earlier_crash_is_replaced(self, tmp_path: Path) -> None:
        in_a(tmp_path, "record.tmp", b"left over and longer than the new one")
        DISK.write(str(tmp_path / "record"), b"new")
        assert (tmp_path / "record").read_bytes() == b"new"
        assert names(tmp_path) == ["record"]

    def test_a_link_at_the_temporary_name_is_not_followed(self, tmp_path: Path) -> None:
        victim = in_a(tmp_path, "victim", b"precious")
        os.symlink(victim, tmp_path / "record.tmp")
        DISK.write(str(tmp_path / "record"), b"new")
        assert Path(victim).read_bytes() == b"precious"
        assert not (tmp_path / "record").is_symlink()

    def test_only_we_may_read_it(self, tmp_path: Path) -> None:
        DISK.write(str(tmp_path / "record"), b"")
        assert (tmp_path / "record").stat().st_mode & 0o777 == 0o600

    def test_nothing_that_exists_is_created(self, tmp_path: Path) -> None:
        with pytest.raises(SpoolError) as caught:
            DISK.create(in_a(tmp_path, "there"))
        assert caught.value.code == errno.EEXIST

    def test_what_is_appended_comes_after_what_is_there(self, tmp_path: Path) -> None:
        path = in_a(tmp_path, "part", b"head")
        with DISK.append(path) as file:
            file.write(b" tail")
        assert Path(path).read_bytes() == b"head tail"

    def test_nothing_is_appended_through_a_link(self, tmp_path: Path) -> None:
        os.symlink(in_a(tmp_path, "victim"), tmp_path / "part")
        with pytest.raises(SpoolError):
            DISK.append(str(tmp_path / "part"))


class TestRename:
    def test_a_file_gets_a_name_that_is_free(self, tmp_path: Path, renaming: str) -> None:
        DISK.rename(in_a(tmp_path, "old"), str(tmp_path / "new"))
        assert names(tmp_path) == ["new"], renaming

    def test_a_name_that_exists_is_never_replaced(self, tmp_path: Path, renaming: str) -> None:
        source, target = in_a(tmp_path, "old", b"mine"), in_a(tmp_path, "new", b"theirs")
        with pytest.raises(FileExistsError):
            DISK.rename(source, target)
        assert Path(source).read_bytes() == b"mine", renaming
        assert Path(target).read_bytes() == b"theirs"

    def test_not_even_by_a_dangling_link(self, tmp_path: Path, renaming: str) -> None:
        source = in_a(tmp_path, "old")
        os.symlink("nowhere", tmp_path / "new")
        with pytest.raises(FileExistsError):
            DISK.rename(source, str(tmp_path / "new"))
        assert names(tmp_path) == ["new", "old"], renaming

    def test_what_is_missing_raises_file_not_found(self, tmp_path: Path, renaming: str) -> None:
        with pytest.raises(FileNotFoundError):
            DISK.rename(str(tmp_path / "gone"), str(tmp_path / "new"))
        assert names(tmp_path) == [], renaming

    def test_another_file_system_raises_exdev(self, tmp_path: Path, elsewhere: Path) -> None:
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)) as caught:
            DISK.rename(in_a(tmp_path, "old"), str(elsewhere / "new"))
        assert caught.value.errno == errno.EXDEV

    def test_a_link_is_renamed_and_not_what_it_leads_to(self, tmp_path: Path, renaming: str) -> None:
        os.symlink("nowhere", tmp_path / "old")
        DISK.rename(str(tmp_path / "old"), str(tmp_path / "new"))
        assert os.readlink(tmp_path / "new") == "nowhere", renaming
        assert names(tmp_path) == ["new"]

    def test_any_other_failure_is_our_disks(self, tmp_path: Path) -> None:
        path = in_a(tmp_path, "file")
        with pytest.raises(SpoolError) as caught:
            DISK.rename(path, f"{path}/inside")
        assert caught.value.code == errno.ENOTDIR


@pytest.fixture(params=["the same file system", "another file system"])
def target(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where a file is carried to."""
    if request.param == "another file system":
        return Path(request.getfixturevalue("elsewhere")) / "new"
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "new"


def carry(source: str | Path, target: Path, finish: Callable[[int], None] | None = None) -> None:
    DISK.carry(str(source), str(target), str(target.parent / ".iw-1.tmp"), finish)


class TestCarry:
    def test_a_file_is_moved(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old", b"x" * 3_000_000)
        carry(source, target)
        assert target.read_bytes() == b"x" * 3_000_000
        assert names(target.parent) == ["new"]
        assert not os.path.exists(source)

    def test_mode_is_set_before_the_name_appears(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old")

        def finish(descriptor: int) -> None:
            assert not target.exists()
            os.fchmod(descriptor, 0o640)

        carry(source, target, finish)
        assert target.stat().st_mode & 0o777 == 0o640

    def test_carried_again_after_a_crash_it_is_done(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old")
        target.write_bytes(b"content")
        in_a(target.parent, ".iw-1.tmp", b"half a co")
        carry(source, target)
        assert not os.path.exists(source)
        assert target.read_bytes() == b"content"
        carry(source, target)  # again: the source is missing
        target.unlink()
        carry(source, target)  # and now a reader has it
        assert not target.exists()

    @pytest.mark.parametrize("theirs", [b"another", b"other content of another length", b""])
    def test_another_users_file_is_not_replaced(self, tmp_path: Path, target: Path, theirs: bytes) -> None:
        source = in_a(tmp_path, "old")
        target.write_bytes(theirs)
        with pytest.raises(FileExistsError):
            carry(source, target)
        assert target.read_bytes() == theirs
        assert Path(source).read_bytes() == b"content"
        assert ".iw-1.tmp" not in names(target.parent)

    def test_nor_a_folder_or_a_link(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old")
        os.symlink(source, target)
        with pytest.raises(FileExistsError):
            carry(source, target)
        target.unlink()
        target.mkdir()
        with pytest.raises(FileExistsError):
            carry(source, target)
        assert Path(source).read_bytes() == b"content"

    def test_an_empty_file_is_not_mistaken_for_a_pipe_of_its_name(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old", b"")
        os.mkfifo(target)
        with pytest.raises(FileExistsError):
            carry(source, target)
        assert os.path.exists(source)

    def test_a_link_at_the_temporary_name_is_not_followed(self, tmp_path: Path, target: Path) -> None:
        victim = in_a(tmp_path, "victim", b"precious")
        os.symlink(victim, target.parent / ".iw-1.tmp")
        carry(in_a(tmp_path, "old"), target)
        assert Path(victim).read_bytes() == b"precious"
        assert target.read_bytes() == b"content"

    def test_a_link_stays_a_link(self, tmp_path: Path, target: Path) -> None:
        source = tmp_path / "old"
        for _ in range(2):  # the second time as after a crash, with both there
            os.symlink("nowhere", source)
            carry(source, target)
            assert os.readlink(target) == "nowhere"
            assert not source.is_symlink()

    def test_a_link_does_not_replace_anything(self, tmp_path: Path, target: Path) -> None:
        source = tmp_path / "old"
        os.symlink("nowhere", source)
        target.write_bytes(b"theirs")
        with pytest.raises(FileExistsError):
            carry(source, target)
        assert source.is_symlink()

    def test_a_fifo_is_moved_or_dropped_but_never_read(self, tmp_path: Path, target: Path) -> None:
        os.mkfifo(tmp_path / "old")
        carry(tmp_path / "old", target)
        assert not (tmp_path / "old").exists()

    def test_a_target_folder_that_is_missing_is_our_disks_fault(self, tmp_path: Path, target: Path) -> None:
        source = in_a(tmp_path, "old")
        with pytest.raises(SpoolError) as caught:
            carry(source, target.parent / "gone" / "new")
        assert caught.value.code == errno.ENOENT
        assert Path(source).read_bytes() == b"content"

    def test_without_renameat2_it_works_the_same(self, tmp_path: Path, renaming: str) -> None:
        source, target = in_a(tmp_path, "old"), tmp_path / "new"
        carry(source, target)
        carry(in_a(tmp_path, "old"), target)
        with pytest.raises(FileExistsError):
            carry(in_a(tmp_path, "old", b"other"), target)
        assert names(tmp_path) == ["new", "old"], renaming


def publish(target: Path, content: bytes = b"receipt") -> None:
    DISK.publish(str(target), str(target.parent / ".iw-1.d.tmp"), content, lambda _: None)


class TestPublish:
    def test_a_result_file_appears_whole(self, tmp_path: Path, renaming: str) -> None:
        publish(tmp_path / "new")
        assert (tmp_path / "new").read_bytes() == b"receipt"
        assert names(tmp_path) == ["new"], renaming

    def test_published_again_it_is_done(self, tmp_path: Path, renaming: str) -> None:
        in_a(tmp_path, ".iw-1.d.tmp", b"rece")
        for _ in range(2):
            publish(tmp_path / "new")
        assert names(tmp_path) == ["new"], renaming

    def test_another_result_file_is_not_replaced(self, tmp_path: Path, renaming: str) -> None:
        theirs = in_a(tmp_path, "new", b"receipt of another")
        with pytest.raises(FileExistsError):
            publish(tmp_path / "new")
        assert Path(theirs).read_bytes() == b"receipt of another"
        assert names(tmp_path) == ["new"], renaming

    def test_a_link_at_either_name_is_not_followed(self, tmp_path: Path) -> None:
        victim = in_a(tmp_path, "victim", b"precious")
        os.symlink(victim, tmp_path / ".iw-1.d.tmp")
        publish(tmp_path / "new")
        os.symlink(victim, tmp_path / "link")
        with pytest.raises(FileExistsError):
            publish(tmp_path / "link")
        assert Path(victim).read_bytes() == b"precious"


class TestProbe:
    def test_it_leaves_nothing(self, tmp_path: Path) -> None:
        in_a(tmp_path, ".iw-probe", b"of an earlier crash")
        DISK.probe(str(tmp_path), ".iw-probe")
        assert names(tmp_path) == []

    def test_a_folder_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SpoolError) as caught:
            DISK.probe(str(tmp_path / "gone"), ".iw-probe")
        assert str(tmp_path / "gone") in str(caught.value)
        assert caught.value.code == errno.ENOENT
        assert "restore the folder" in caught.value.hint


class TestFolders:
    def test_a_folder_is_made_with_its_parents_and_again(self, tmp_path: Path) -> None:
        for _ in range(2):
            DISK.make_folder(str(tmp_path / "a" / "b"))
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700

    def test_a_file_in_its_place_is_our_disks_fault(self, tmp_path: Path) -> None:
        with pytest.raises(SpoolError):
            DISK.make_folder(in_a(tmp_path, "a"))

    def test_only_an_empty_folder_is_removed(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        assert DISK.remove_folder(str(folder))
        folder.mkdir()
        in_a(folder, "theirs")
        assert not DISK.remove_folder(str(folder))
        (folder / "theirs").unlink()
        assert DISK.remove_folder(str(folder))
        assert names(tmp_path) == []

    def test_removing_what_is_missing_is_fine(self, tmp_path: Path) -> None:
        DISK.unlink(str(tmp_path / "gone"))

    def test_a_folder_that_is_missing_cannot_be_synced(self, tmp_path: Path) -> None:
        with pytest.raises(SpoolError):
            DISK.sync_folder(str(tmp_path / "gone"))


class TestAFullDisk:
    @pytest.fixture
    def small(self, mount: Callable[[str], Path]) -> Path:
        """A disk with room for a hundred kilobytes."""
        return mount("size=100k")

    def test_a_write_that_does_not_fit_leaves_nothing(self, small: Path) -> None:
        with pytest.raises(SpoolError) as caught:
            DISK.write(str(small / "record"), b"x" * 200_000)
        assert caught.value.code == errno.ENOSPC
        assert "free some space" in caught.value.hint
        assert names(small) == []

    def test_nor_does_it_touch_what_was_there(self, small: Path) -> None:
        path = in_a(small, "record", b"old")
        with pytest.raises(SpoolError):
            DISK.write(path, b"x" * 200_000)
        assert Path(path).read_bytes() == b"old"

    def test_a_copy_that_does_not_fit_keeps_its_source(self, tmp_path: Path, small: Path) -> None:
        source = in_a(tmp_path, "old", b"x" * 200_000)
        with pytest.raises(SpoolError) as caught:
            carry(source, small / "new")
        assert caught.value.code == errno.ENOSPC
        assert os.path.getsize(source) == 200_000
        assert names(small) == []

    def test_a_result_file_that_does_not_fit_does_not_appear(self, small: Path) -> None:
        with pytest.raises(SpoolError):
            publish(small / "new", b"x" * 200_000)
        assert names(small) == []

    def test_a_probe_notices(self, small: Path) -> None:
        DISK.probe(str(small), ".iw-probe")
        with open(small / "big", "wb", buffering=0) as file:
            file.write(b"x" * 200_000)
        with pytest.raises(SpoolError) as caught:
            DISK.probe(str(small), ".iw-probe")
        assert caught.value.code == errno.ENOSPC
        assert names(small) == ["big"]


class TestAReadOnlyDisk:
    @pytest.fixture
    def locked(self, mount: Callable[[str], Path]) -> Path:
        """A disk that was mounted read-only after a file was written to it."""
        place = mount("size=100k")
        in_a(place, "old")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        return place

    @pytest.mark.parametrize(
        "work",
        [
            lambda folder: DISK.write(f"{folder}/new", b""),
            lambda folder: DISK.probe(str(folder), ".iw-probe"),
            lambda folder: DISK.unlink(f"{folder}/old"),
            lambda folder: DISK.rename(f"{folder}/old", f"{folder}/new"),
            lambda folder: DISK.replace(f"{folder}/old", f"{folder}/new"),
            lambda folder: DISK.make_folder(f"{folder}/inner"),
            lambda folder: DISK.symlink("x", f"{folder}/link"),
            lambda folder: DISK.append(f"{folder}/old"),
            lambda folder: publish(folder / "new"),
        ],
    )
    def test_every_change_is_reported(self, locked: Path, work: Callable[[Path], object]) -> None:
        with pytest.raises(SpoolError) as caught:
            work(locked)
        assert caught.value.code == errno.EROFS
        assert "BindPaths=" in caught.value.hint

    def test_what_is_carried_there_stays_where_it_is(self, tmp_path: Path, locked: Path) -> None:
        source = in_a(tmp_path, "mine")
        with pytest.raises(SpoolError):
            carry(source, locked / "new")
        assert Path(source).read_bytes() == b"content"


HOLD = """
import sys
from imagewatch.system.folders import Tops
from imagewatch.system.locks import lock
file = lock(sys.argv[1], Tops())
print("held", flush=True)
sys.stdin.read()
"""


class TestLock:
    @pytest.fixture
    def held(self, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        """A lock that another process has."""
        path = str(tmp_path / "lock")
        command = [sys.executable, "-c", HOLD, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield path, process
            process.kill()

    def test_another_process_has_it(self, held: tuple[str, subprocess.Popen[str]]) -> None:
        with pytest.raises(AlreadyRunning, match="another imagewatch"):
            lock(held[0], Tops())

    def test_it_ends_with_the_process_whatever_ends_that(self, held: tuple[str, subprocess.Popen[str]]) -> None:
        path, process = held
        process.kill()
        process.wait()
        lock(path, Tops()).close()

    def test_it_ends_with_the_file(self, tmp_path: Path) -> None:
        path = str(tmp_path / "lock")
        first: IO[bytes] = lock(path, Tops())
        with pytest.raises(AlreadyRunning):
            lock(path, Tops())
        first.close()
        lock(path, Tops()).close()

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        os.symlink(in_a(tmp_path, "victim"), tmp_path / "lock")
        with pytest.raises(SpoolError):
            lock(str(tmp_path / "lock"), Tops())


def waiting_sink(place: Path, wait: Callable[[float], object], seconds: float = math.inf) -> Sink:
    """A sink whose call has so many seconds left; time passes only while it waits."""
    passed: list[float] = []

    def noted(pause: float) -> None:
        passed.append(pause)
        wait(pause)

    sink = Sink(Disk(), str(place / "answer.1"), wait=noted, now=lambda: sum(passed))
    sink.until = seconds
    return sink


def test_a_paid_response_that_finds_the_disk_full_waits_for_room_and_comes_whole(mount):
    place = mount("size=256k")
    filler = place / "filler"
    filler.write_bytes(b"x" * 200_000)
    waits: list[float] = []

    def make_room(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            filler.unlink()

    answer = bytes(range(256)) * 600
    sink = waiting_sink(place, make_room)
    sink.start(Head(status=200))
    sink.write(answer)
    sink.finish(Tail(complete=True))
    assert len(waits) == 3
    assert b"".join(Answer(str(place / "answer.1")).chunks(1000)) == answer


def test_no_room_for_another_file_costs_nothing_as_the_file_is_made_before_the_request_leaves(mount):
    place = mount("size=256k,nr_inodes=3")
    fillers = [place / name for name in "ab"]
    for filler in fillers:
        filler.touch()
    waits: list[float] = []
    with pytest.raises(SpoolError, match="No space left"):
        waiting_sink(place, waits.append).open(1000)
    fillers[0].unlink()
    sink = waiting_sink(place, waits.append)
    sink.open(1000)
    sink.start(Head(status=200))
    sink.write(b"paid for")
    sink.finish(Tail(complete=True))
    assert waits == []
    assert b"".join(Answer(str(place / "answer.1")).chunks()) == b"paid for"


def test_a_disk_that_stays_full_is_waited_for_until_the_deadline_and_what_came_is_kept(mount):
    place = mount("size=64k")
    waits: list[float] = []
    with contextlib.closing(waiting_sink(place, waits.append, 700.5)) as sink:
        sink.start(Head(status=200))
        with pytest.raises(SpoolError, match="No space left"):
            sink.write(b"x" * 200_000)
    assert (sum(waits), sink.status) == (700.5, 200)
    assert names(place) == ["answer.1.part"]


def test_the_room_of_a_response_is_reserved_before_it_comes_and_what_is_not_used_is_given_back(mount):
    place = mount("size=1m")
    answer = bytes(range(256)) * 2000

    def free() -> int:
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize

    with contextlib.closing(waiting_sink(place, pytest.fail)) as sink:
        sink.open(900_000)
        assert free() < 200_000
        filler = place / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(1 << 20))
        assert free() == 0
        sink.start(Head(status=200))
        sink.write(answer)
        sink.finish(Tail(complete=True))
    assert free() > 300_000
    assert b"".join(Answer(str(place / "answer.1")).chunks()) == answer


def test_more_room_than_there_is_cannot_be_reserved_and_is_an_error_that_names_how_much(mount):
    place = mount("size=1m")
    with (
        contextlib.closing(waiting_sink(place, pytest.fail)) as sink,
        pytest.raises(SpoolError, match="cannot reserve 2,000,000 bytes: No space left"),
    ):
        sink.open(2_000_000)


def test_a_file_system_that_cannot_reserve_room_is_used_all_the_same(mount):
    place = mount("mode=700", "ramfs")
    with contextlib.closing(waiting_sink(place, pytest.fail)) as sink:
        sink.open(1 << 40)
        assert (place / "answer.1.part").read_bytes() == b""
        sink.start(Head(status=200))
        sink.finish(Tail(complete=True))
    assert names(place) == ["answer.1"]


@pytest.mark.parametrize("change", ["removed", "replaced", "moved away"])
def test_a_response_is_saved_though_its_folder_is_not_there_any_more_when_it_comes(tmp_path, change):
    place = tmp_path / "jobs"
    place.mkdir()

    def restore() -> None:
        place.mkdir(exist_ok=True)

    sink = Sink(Disk(), str(place / "answer.1"), restore)
    sink.open(1000)
    sink.start(Head(status=200))
    sink.write(b"paid ")
    if change == "removed":
        shutil.rmtree(place)
    else:
        place.rename(tmp_path / "aside")
    if change == "replaced":
        place.mkdir()
    sink.write(b"for")
    sink.finish(Tail(complete=True))
    assert b"".join(Answer(str(place / "answer.1")).chunks()) == b"paid for"


class Unsynced(Disk):
    """A disk on which the first fsync of each file fails, after which a second one would succeed."""

    def __init__(self) -> None:
        self.synced: list[int] = []

    def sync(self, file: IO[bytes], path: str) -> None:
        number = os.fstat(file.fileno()).st_ino
        self.synced.append(number)
        if len(self.synced) == 1:
            raise SpoolError(f"{path}: cannot write to disk: Input/output error", path=path, code=errno.EIO)
        super().sync(file, path)


def test_a_response_whose_sync_failed_is_written_to_another_file_and_never_synced_again(tmp_path):
    disk = Unsynced()
    waits: list[float] = []
    sink = Sink(disk, str(tmp_path / "answer.1"), wait=waits.append, now=lambda: 0.0)
    sink.until = 1.0
    sink.start(Head(status=200))
    sink.write(b"paid for")
    sink.finish(Tail(complete=True))
    first, second = disk.synced
    assert (first != second, len(waits)) == (True, 1)
    assert b"".join(Answer(str(tmp_path / "answer.1")).chunks()) == b"paid for"


# Images that are decoded while their response arrives

PICTURE = bytes(range(256)) * 300
ITS_RESPONSE = b'{"images":[{"b64_json":"' + base64.b64encode(PICTURE) + b'"}],"cost":1}'


def save_with_images(place: Path, images: Path, half_way: Callable[[], object], disk: Disk | None = None) -> Answer:
    """Save a response with an image whose file is in another folder; something happens half way."""

    def image_path(number: int) -> str:
        return str(images / f"image.{number}")

    waits: list[float] = []
    sink = Sink(
        disk or Disk(),
        str(place / "answer.1"),
        lambda: place.mkdir(exist_ok=True),
        wait=waits.append,
        now=lambda: 0.0,
        image_path=image_path,
        defers_sync=True,
    )
    sink.until = 1.0
    with contextlib.closing(sink):
        sink.open(1000)
        sink.start(Head(status=200))
        sink.write(ITS_RESPONSE[:50_001])
        half_way()
        sink.write(ITS_RESPONSE[50_001:])
        sink.finish(Tail(complete=True))
    assert len(waits) == (disk is not None)
    return Answer(str(place / "answer.1"), image_path=image_path)


def test_what_an_image_file_cannot_take_goes_into_the_file_of_the_response(mount, tmp_path):
    images = mount("size=64k")
    answer = save_with_images(tmp_path, images, lambda: None)
    assert b"".join(answer.chunks()) == ITS_RESPONSE
    assert 0 < (images / "image.0").stat().st_size <= 65_536
    assert (tmp_path / "answer.1").stat().st_size < len(ITS_RESPONSE)


def test_nothing_is_written_to_an_image_before_the_response_says_where_it_belongs(mount, tmp_path):
    place = mount("size=64k")
    sink = Sink(Disk(), str(place / "answer.1"), image_path=lambda number: str(tmp_path / f"image.{number}"))
    with contextlib.closing(sink):
        sink.start(Head(status=200))
        with pytest.raises(SpoolError, match="No space left"):
            sink.write(b" " * 70_000 + ITS_RESPONSE)
    assert (tmp_path / "image.0").read_bytes() == b""


def test_images_whose_files_cannot_be_made_are_saved_as_they_came(tmp_path):
    answer = save_with_images(tmp_path, tmp_path / "missing", lambda: None)
    assert b"".join(answer.chunks()) == ITS_RESPONSE
    assert ITS_RESPONSE[60_000:] in (tmp_path / "answer.1").read_bytes()


@pytest.mark.parametrize("change", ["removed", "replaced", "its folder removed", "its folder moved away"])
def test_an_image_that_loses_its_name_while_the_response_arrives_is_saved_in_the_response(tmp_path, change):
    images = tmp_path / "images"
    images.mkdir()

    def lose() -> None:
        if change == "its folder removed":
            shutil.rmtree(images)
        elif change == "its folder moved away":
            images.rename(tmp_path / "aside")
        else:
            (images / "image.0").unlink()
        if change == "replaced":
            (images / "image.0").write_bytes(b"of another program")

    answer = save_with_images(tmp_path, images, lose)
    assert b"".join(answer.chunks()) == ITS_RESPONSE
    assert not answer.head.framed
    if change == "replaced":
        assert (images / "image.0").read_bytes() == b"of another program"


def test_a_response_and_its_images_are_saved_though_their_folder_is_removed(tmp_path):
    place = tmp_path / "jobs"
    place.mkdir()
    answer = save_with_images(place, place, lambda: shutil.rmtree(place))
    assert b"".join(answer.chunks()) == ITS_RESPONSE
    assert names(place) == ["answer.1"]


def test_an_image_whose_sync_failed_is_saved_in_the_response_and_never_synced_again(tmp_path):
    disk = Unsynced()
    answer = save_with_images(tmp_path, tmp_path, lambda: None, disk)
    image, response = disk.synced
    assert image != response
    assert b"".join(answer.chunks()) == ITS_RESPONSE
    assert names(tmp_path) == ["answer.1"]


class Overtaken(Disk):
    """A disk on which another process makes a folder at the last moment, or a file."""

    def __init__(self, make: Callable[[str], object]) -> None:
        super().__init__()
        self._make = make

    def rename(self, source: str, target: str) -> None:
        self._make(target)
        super().rename(source, target)


def test_a_folder_that_another_process_makes_meanwhile_is_used(tmp_path: Path) -> None:
    Overtaken(os.mkdir).make_inner(str(tmp_path), "inner", mode=0o750)
    assert names(tmp_path) == ["inner"]


def test_a_file_that_another_process_makes_meanwhile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="inner"):
        Overtaken(lambda _: in_a(tmp_path, "inner")).make_inner(str(tmp_path), "inner", mode=0o750)
    assert names(tmp_path) == ["inner"]
