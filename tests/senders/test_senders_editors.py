"""Prompts that are written in the inbox itself, with an editor that saves half of them on the way."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from support.daemon import until
from support.senders import DECLARES, SLOW, Parcel, Service, Terminal, pause, pieces, program, run, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("native")) as service:
        yield service


@pytest.fixture
def parcel(native, tmp_path) -> Parcel:
    """Images that are in the inbox already, and the text of their prompt."""

    def place(parcel: Parcel) -> None:
        for name in ("cat.webp", "cat.1.png", "cat.2.jpg"):
            shutil.copy(parcel.source / name, parcel.target)

    return native.parcel(tmp_path).prepare(place)


@pytest.fixture
def prompt(parcel) -> Path:
    return parcel.target / "cat.prompt.txt"


def typed(parcel: Parcel) -> tuple[str, str]:
    """The text in two parts, short enough to be typed, and recorded in the parcel."""
    parcel.text = parcel.text[:60] + " a house, and a garden"
    parcel.files["cat.prompt.txt"] = f"{parcel.text}\n".encode()
    return parcel.text[:65], parcel.text[65:]


def saved(prompt: Path, text: str) -> None:
    def has_text() -> bool:
        with contextlib.suppress(FileNotFoundError):  # some editors move the old file away first
            return prompt.read_text() == text
        return False

    until(has_text)


# Real editors on a terminal


def test_vim_that_saves_twice_and_stays_open(parcel, prompt):
    vim = program("vim.tiny", "vim", "vi")
    first, rest = typed(parcel)
    with Terminal(vim, "-N", "-u", "NONE", "-i", "NONE", prompt) as editor:
        until((parcel.target / ".cat.prompt.txt.swp").exists)
        editor.type(f"i{first}\x1b:w\r")
        saved(prompt, first + "\n")
        parcel.is_not_claimed()
        editor.type(f"A{rest}\x1b:set backupcopy=no\r:w\r")  # a new file under the name, the old one beside it
        saved(prompt, first + rest + "\n")
        editor.type(":q\r")
    parcel.is_completed()


def test_nano_that_saves_and_stays_open_with_its_lock_file(parcel, prompt):
    nano = program("nano")
    first, rest = typed(parcel)
    with Terminal(nano, "--ignorercfiles", "--locking", prompt) as editor:
        until((parcel.target / ".cat.prompt.txt.swp").exists)
        editor.type(first + "\x0f\r")
        saved(prompt, first + "\n")
        parcel.is_not_claimed()
        editor.type(f"{rest}\x0f\r")
        saved(prompt, first + rest + "\n")
        editor.type("\x18")
    parcel.is_completed()


def test_nano_without_a_lock_file(parcel, prompt):
    nano = program("nano")
    first, rest = typed(parcel)
    with Terminal(nano, "--ignorercfiles", prompt) as editor:
        editor.shows("cat.prompt.txt")
        editor.type(f"{first}{rest}\x0f\r\x18")
    parcel.is_completed()


@SLOW
def test_emacs_that_saves_and_continues_typing(parcel, prompt):
    emacs = program("emacs")
    first, rest = typed(parcel)
    lock = parcel.target / ".#cat.prompt.txt"
    with Terminal(emacs, "-Q", "-nw", prompt) as editor:
        editor.shows("cat.prompt.txt")
        editor.type(first)
        until(lambda: os.path.lexists(lock))
        editor.type("\r\x18\x13\x7f.")  # saved, and typing continues: the file is locked again
        saved(prompt, first + "\n")
        until(lambda: os.path.lexists(lock))
        parcel.is_not_claimed()
        editor.type(f"\x7f{rest}\r\x18\x13")
        saved(prompt, first + rest + "\n")
        editor.type("\x18\x03")
    parcel.is_completed()


def test_sed_that_edits_in_place(parcel):
    def edit() -> None:
        parcel.prompt.write_bytes(parcel.files["cat.prompt.txt"].replace(b"and more", b"and less"))
        run(["sed", "-i", "s/and less/and more/g", parcel.prompt])

    parcel.send(edit)
    parcel.is_completed()


# What other editors do, step by step


def test_an_editor_that_truncates_the_file_and_writes_it_again_while_a_person_types(parcel):
    """What VS Code does with auto-save, and nano without it."""

    def edit() -> None:
        written = b""
        for piece in pieces(parcel.files["cat.prompt.txt"]):
            written += piece
            with parcel.prompt.open("wb", buffering=0) as file:
                pause()
                file.write(written)
            pause()

    parcel.send(edit)
    parcel.is_completed()


def test_an_editor_that_writes_another_file_and_renames_it(parcel):
    """What gedit does; Kate, Sublime and many scripts do the same with other names."""

    def edit() -> None:
        written = b""
        for piece in pieces(parcel.files["cat.prompt.txt"]):
            written += piece
            temporary = parcel.target / ".goutputstream-A1B2C3"
            temporary.write_bytes(written)
            temporary.rename(parcel.prompt)
            pause()

    parcel.send(edit)
    parcel.is_completed()


@SLOW
def test_an_editor_that_moves_the_old_file_away_first(parcel):
    """What JetBrains does."""

    def begin() -> None:
        nonlocal prompt, new, old
        prompt = parcel.prompt
        prompt.write_bytes(parcel.files["cat.prompt.txt"][:500])
        new, old = (prompt.with_name(f"{prompt.name}___jb_{word}___") for word in ("tmp", "old"))
        new.write_bytes(parcel.files["cat.prompt.txt"][:1000])

    prompt: Path
    new: Path
    old: Path
    parcel.send(begin)
    parcel.is_not_claimed()
    new.write_bytes(parcel.files["cat.prompt.txt"])
    prompt.rename(old)
    new.rename(prompt)
    old.unlink()
    parcel.is_completed()


LOCKS = {
    "LibreOffice": ".~lock.cat.prompt.txt#",
    "Word": "~$t.prompt.txt",
    "Kate": ".cat.prompt.txt.kate-swp",
    "Emacs": ".#cat.prompt.txt",
    "nano": ".cat.prompt.txt.swp",
}


def test_a_lock_file_delays_the_prompt_until_it_is_removed(native, tmp_path):
    parcels = [native.parcel(tmp_path) for _ in LOCKS]
    for parcel, lock in zip(parcels, LOCKS.values(), strict=True):
        (parcel.target / lock).symlink_to("sender@here.1234")
        shutil.copytree(parcel.source, parcel.target, dirs_exist_ok=True)
        (parcel.target / "cat.prompt.txt").write_bytes(parcel.files["cat.prompt.txt"][:500])
    parcels[0].is_not_claimed()
    assert [parcel.calls for parcel in parcels] == [[] for _ in LOCKS]
    for parcel, lock in zip(parcels, LOCKS.values(), strict=True):
        (parcel.target / "cat.prompt.txt").write_bytes(parcel.files["cat.prompt.txt"])
        (parcel.target / lock).unlink()
    for parcel in parcels:
        parcel.is_completed()


def test_a_prompt_that_names_its_images_is_not_claimed_immediately_while_it_is_open_in_an_editor(native, tmp_path):
    parcel = native.parcel(tmp_path, head=DECLARES)
    shutil.copytree(parcel.source, parcel.target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.txt"))
    lock, temporary = parcel.target / ".cat.prompt.txt.kate-swp", parcel.target / ".new"
    lock.touch()
    temporary.write_bytes(parcel.files["cat.prompt.txt"][:500])
    temporary.rename(parcel.target / "cat.prompt.txt")
    parcel.is_not_claimed()
    temporary.write_bytes(parcel.files["cat.prompt.txt"])
    temporary.rename(parcel.target / "cat.prompt.txt")
    lock.unlink()
    parcel.is_completed()
