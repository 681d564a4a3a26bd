"""Files that other people wrote are opened in one place, which opens plain files that are theirs to show."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.system.folders import Tops, is_private
from imagewatch.system.untrusted import RefusedError, open_file


def make_link(path: Path) -> None:
    (path.parent / "secret").write_text("secret")
    path.symlink_to("secret")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_link, "is a link"),
        (lambda path: path.symlink_to("nowhere"), "is a link"),
        (os.mkfifo, "is not a plain file"),
        (Path.mkdir, "is not a plain file"),
        (make_socket, "is not a plain file"),
        (lambda path: path.write_bytes(b"12345678901"), "is larger than 10 bytes"),
    ],
    ids=["link", "dangling", "pipe", "folder", "socket", "large"],
)
def test_what_is_no_plain_file_of_bounded_size_is_refused_without_waiting(tmp_path, monkeypatch, make, reason):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "cat.png")
    with pytest.raises(RefusedError, match=reason):
        open_file(str(tmp_path / "cat.png"), most_bytes=10)


def test_a_plain_file_is_opened_whole(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"1234567890")
    with open_file(str(tmp_path / "cat.png"), most_bytes=10) as file:
        assert file.read() == b"1234567890"
    with pytest.raises(FileNotFoundError):
        open_file(str(tmp_path / "dog.png"))


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path, other = tmp_path / "cat.png", tmp_path / "other"
    path.write_text("mine")
    other.write_text("another")
    really_open = os.open

    def opened(*arguments, **more):
        os.replace(other, path)
        return really_open(*arguments, **more)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(RefusedError, match="was replaced"):
        open_file(str(path))


@pytest.mark.parametrize(
    ("mode", "same_group", "folder", "refused"),
    [
        (0o644, False, 0o777, False),  # everybody may read it
        (0o604, False, 0o777, False),
        (0o640, True, 0o2770, False),  # all who may put a file there may read it
        (0o640, True, 0o2750, False),
        (0o640, True, 0o2777, True),  # others may put files there, too
        (0o640, False, 0o2770, True),  # it is for another group
        (0o600, True, 0o2770, True),
        (0o600, True, 0o700, True),
        (0o000, True, 0o770, True),
    ],
)
def test_a_hard_link_is_refused_unless_all_who_could_have_made_it_may_read_it(
    tmp_path, mode, same_group, folder, refused
):
    if os.geteuid() != 0:
        pytest.skip("only root may give a file to another group and read it then")
    place = tmp_path / "inbox"
    place.mkdir()
    (tmp_path / "private").write_text("secret")
    os.link(tmp_path / "private", place / "cat.png")
    os.chown(place, 0, 4321)
    os.chmod(place, folder)
    os.chown(place / "cat.png", 1234, 4321 if same_group else 4322)
    os.chmod(place / "cat.png", mode)
    tops = Tops.of(str(place))
    for opened in (tops, Tops()):
        if refused:
            with pytest.raises(RefusedError, match="is a hard link to a private file"):
                open_file(str(place / "cat.png"), opened)
        else:
            open_file(str(place / "cat.png"), opened).close()
    (tmp_path / "private").unlink()
    open_file(str(place / "cat.png"), tops).close()  # its only name


@given(st.integers(0, 0o7777), st.integers(0, 0o7777), st.booleans(), st.integers(1, 3))
def test_who_could_not_read_a_file_cannot_show_it_by_a_hard_link(mode, folder_mode, same_group, links):
    file = os.stat_result((stat.S_IFREG | mode, 1, 1, links, 1, 7, 0, 0, 0, 0))
    folder = os.stat_result((stat.S_IFDIR | folder_mode, 2, 1, 2, 1, 7 if same_group else 8, 0, 0, 0, 0))
    if links > 1 and not is_private(file, folder):
        is_for_all = bool(mode & 0o004)
        assert is_for_all or (same_group and mode & 0o040 and not folder_mode & 0o002)
    if links == 1:
        assert not is_private(file, folder)
