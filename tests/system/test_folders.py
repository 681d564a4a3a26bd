"""Folders are open descriptors: what has their names later is not used."""

from __future__ import annotations

import ast
import gc
import os
from pathlib import Path

import pytest

import imagewatch
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import NotAFolderError, Tops

PACKAGE = Path(imagewatch.__file__).parent


@pytest.fixture
def top(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/cat.txt").write_text("A cat")
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "secret"
    (folder / "b").mkdir(parents=True)
    for where in (folder, folder / "b"):
        (where / "cat.txt").write_text("the key")
    return folder


@pytest.fixture
def disk(top: Path) -> Disk:
    made = Disk()
    made.tops.open(str(top))
    return made


def swap(folder: Path, target: Path) -> None:
    """Put a link in the place of a folder."""
    folder.rename(folder.with_name(f".{folder.name}"))
    folder.symlink_to(target)


def contents(disk: Disk, path: Path) -> bytes:
    with open(disk.tops.open_file(str(path), os.O_RDONLY), "rb") as file:
        return file.read()


@pytest.mark.parametrize("part", ["a", "a/b"])
@pytest.mark.parametrize(
    "act",
    [
        contents,
        lambda disk, path: disk.unlink(str(path)),
        lambda disk, path: disk.create(str(path) + ".new"),
        lambda disk, path: disk.replace(str(path), str(path) + ".new"),
        lambda disk, path: disk.make_folder(str(path) + ".d"),
        lambda disk, path: disk.symlink("x", str(path) + ".link"),
        lambda disk, path: disk.touch(str(path)),
        lambda disk, path: disk.sync_folder(str(path.parent)),
        lambda disk, path: disk.set_mode(str(path.parent), 0o777),
        lambda disk, path: disk.write(str(path) + ".new", b""),
        lambda disk, path: disk.make_inner(str(path.parents[2]), "a/b/c"),
    ],
    ids=["read", "unlink", "create", "replace", "mkdir", "symlink", "touch", "sync", "chmod", "write", "mirror"],
)
def test_a_link_in_the_place_of_a_folder_leads_nowhere(top: Path, secret: Path, disk: Disk, part: str, act) -> None:
    swap(top / part, secret / "b" if part == "a/b" else secret)
    before = sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_mode) for path in secret.rglob("*"))
    with pytest.raises((SpoolError, NotAFolderError), match="a symbolic link is where a folder should be"):
        act(disk, top / "a/b/cat.txt")
    assert sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_mode) for path in secret.rglob("*")) == before


@pytest.mark.parametrize("act", ["exists", "is_folder"])
def test_nothing_is_seen_through_a_link(top: Path, secret: Path, disk: Disk, act: str) -> None:
    (secret / "b/more").mkdir()
    assert getattr(disk.tops, act)(str(top / "a/b"))
    swap(top / "a", secret)
    assert not getattr(disk.tops, act)(str(top / "a/b/more"))


def test_a_file_in_the_place_of_a_folder_is_reported_as_one(top: Path, disk: Disk) -> None:
    (top / "a").rename(top / ".a")
    (top / "a").write_text("")
    with pytest.raises(SpoolError, match="a file is where a folder should be") as caught:
        disk.unlink(str(top / "a/b/cat.txt"))
    assert (caught.value.path, caught.value.hint != "") == (str(top / "a/b/cat.txt"), True)


def test_a_top_is_used_whatever_has_its_name_now(top: Path, secret: Path, disk: Disk) -> None:
    swap(top, secret)
    assert contents(disk, top / "a/b/cat.txt") == b"A cat"
    disk.unlink(str(top / "a/b/cat.txt"))
    assert not list(top.with_name(".inbox").rglob("cat.txt"))
    assert (secret / "cat.txt").exists()


def test_a_folder_that_is_held_is_used_whatever_has_its_name_now(top: Path, secret: Path, disk: Disk) -> None:
    with disk.tops.held(str(top / "a")):
        swap(top / "a", secret)
        disk.rename(str(top / "a/b/cat.txt"), str(top / "a/b/dog.txt"))
        disk.sync_folder(str(top / "a"))
        assert disk.tops.names(str(top / "a")) == ["b"]
    assert (top / ".a/b/dog.txt").exists()
    with pytest.raises(SpoolError, match="a symbolic link is where a folder should be"):
        disk.unlink(str(top / "a/b/dog.txt"))


def test_a_folder_is_not_held_in_the_place_of_another(top: Path, disk: Disk) -> None:
    inode = (top / "a").stat().st_ino
    (top / "a").rename(top / ".a")
    (top / "a").mkdir()
    with pytest.raises(FileNotFoundError), disk.tops.held(str(top / "a"), inode):
        pass


@pytest.mark.parametrize("name", ["..", ".", "", "../secret", "a/../../secret"])
def test_no_path_leads_out_of_a_top(top: Path, secret: Path, disk: Disk, name: str) -> None:
    with pytest.raises(NotAFolderError):
        disk.tops.lstat(f"{top}/{name}/cat.txt")


def test_a_folder_that_is_closed_is_not_entered(top: Path, disk: Disk) -> None:
    disk.tops.know(str(top / "a"), None)
    with pytest.raises(SpoolError, match="another folder has the name"):
        disk.unlink(str(top / "a/b/cat.txt"))
    disk.tops.drop(str(top / "a"))
    disk.unlink(str(top / "a/b/cat.txt"))


def test_a_folder_that_is_used_no_more_is_closed(top: Path, tmp_path: Path, disk: Disk) -> None:
    gc.collect()  # what earlier tests left open in a circle would be closed while this one counts
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        disk.tops.open(str(top))
        disk.tops.lstat(str(top / "a/b/cat.txt"))
        with disk.tops.held(str(top / "a")):
            disk.tops.names(str(top / "a/b"))
        with pytest.raises(NotAFolderError):
            disk.tops.lstat(str(top / "a/b/cat.txt/dog"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_replaced_top_is_noticed(top: Path, disk: Disk) -> None:
    assert not disk.tops.is_replaced(str(top))
    top.rename(top.with_name("old"))
    with pytest.raises(FileNotFoundError):
        disk.tops.is_replaced(str(top))
    top.mkdir()
    assert disk.tops.is_replaced(str(top))


def test_without_a_top_paths_are_those_of_the_caller(top: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(top)
    assert Tops().exists(str(tmp_path / "link/a/b/cat.txt"))


_RESOLVING = {"stat", "lstat", "open", "listdir", "scandir", "readlink", "access", "mkdir", "rename", "replace", "link"}
_RESOLVING |= {"unlink", "rmdir", "utime", "chmod", "chown", "truncate", "makedirs", "walk", "remove", "symlink"}
_RESOLVING_PATHS = {"exists", "lexists", "isdir", "isfile", "islink", "getsize", "getmtime", "samefile"}


@pytest.mark.parametrize(
    "module",
    [
        *(
            f"{path.parent.name}/{path.stem}"
            for package in ("inbox", "job")
            for path in (PACKAGE / package).glob("*.py")
            if path.stem not in {"events", "open_files", "watching"}
        ),  # they read /proc and watch paths
        "journal/control",
        "endpoint/pictures",
        "endpoint/saved_answer",
        "protocol/request",
    ],
)
def test_what_handles_files_of_jobs_resolves_no_path_itself(module: str) -> None:
    """Only ``folders``, ``durable`` and ``untrusted`` turn a path into a file."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if not isinstance(node, ast.Call) or any(keyword.arg == "dir_fd" for keyword in node.keywords):
            continue
        if node.args and any(way in ast.unparse(node.args[0]) for way in ("open_file", "descriptor", "/proc/self")):
            continue
        name = ast.unparse(node.func)
        if name in {f"os.{one}" for one in _RESOLVING} | {f"os.path.{one}" for one in _RESOLVING_PATHS} | {"open"}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert found == []
