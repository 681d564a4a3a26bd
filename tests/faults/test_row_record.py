"""``submit --table`` when the power fails: after the next run each row is in the inbox exactly once, and whole."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from support.losing import Losing, LosingDisk, PowerCut

from imagewatch.commands import drop
from imagewatch.commands.main import cli
from imagewatch.commands.row_record import FILE, STAGED
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("a", "b")


def submit(root: Path, here: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    monkeypatch.setattr(drop, "Disk", lambda: disk)
    given = ["submit", "--root", str(root), "--table", str(here / "x.csv"), "--image", str(here / "logo.png")]
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with contextlib.suppress(SystemExit), out, err:
        cli.main(given, standalone_mode=False)


def prepared(top: Path) -> Path:
    """The folders, with a record: the model has only files that a disk has created, or that were there."""
    for name in ("inbox", "outbox", "errors", "archive"):
        (top / name).mkdir(parents=True)
    (top / "inbox" / FILE).touch()
    return top


@pytest.fixture
def here(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "logo.png")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "prompt"], *((name, f"Text {name}") for name in NAMES)])
    return tmp_path


def contents(inbox: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in inbox.iterdir() if path.name != FILE}


@pytest.mark.parametrize("losing", Losing)
def test_after_a_power_cut_at_any_step_the_same_command_drops_each_row_exactly_once(here, monkeypatch, losing):
    whole = prepared(here / "whole")
    counting = LosingDisk(str(whole))
    submit(whole, here, monkeypatch, counting)
    expected = contents(whole / "inbox")
    assert len(expected) == 2 * len(NAMES)
    assert len(counting.steps) > 12
    for number in range(1, len(counting.steps) + 1):
        for after in (False, True):
            root = prepared(here / f"{number}-{after}")
            disk = LosingDisk(str(root), cut=number, after=after, losing=losing)
            with pytest.raises(PowerCut):
                submit(root, here, monkeypatch, disk)
            disk.come_back()
            submit(root, here, monkeypatch, Disk())
            assert contents(root / "inbox") == expected, f"{disk.steps[-1]}, {'after' if after else 'before'} it"


def test_a_row_is_durable_in_the_record_before_it_has_its_name(here, monkeypatch):
    root = prepared(here / "root")
    disk = LosingDisk(str(root))
    submit(root, here, monkeypatch, disk)
    recorded = disk.steps.index(f"sync inbox/{FILE}")
    renames = [at for at, step in enumerate(disk.steps) if step.startswith("rename inbox/")]
    assert recorded < min(renames)
    assert disk.steps[recorded - 1] == "sync_folder inbox", "the hidden names are durable before the record"
    assert all(f"/{STAGED}" not in disk.steps[at] for at in renames)


def test_rows_whose_record_can_neither_be_made_durable_nor_cut_off_are_dropped_by_the_next_run(here, monkeypatch):
    root = prepared(here / "root")

    class Failing(Disk):
        def sync(self, file: Any, path: str) -> None:
            if path.endswith(FILE):
                raise SpoolError(f"cannot write: Input/output error: {path}", path=path, code=5)
            super().sync(file, path)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with contextlib.suppress(SpoolError):
            submit(root, here, monkeypatch, Failing())
    assert not [name for name in contents(root / "inbox") if not name.startswith(".")]
    submit(root, here, monkeypatch, Disk())
    assert {f"{name}.prompt.txt" for name in NAMES} <= set(contents(root / "inbox"))


def test_an_image_of_another_sender_stays_if_a_row_cannot_be_dropped_because_of_it_and_that_cannot_be_recorded(
    here, monkeypatch
):
    root = prepared(here / "root")
    theirs = root / "inbox/a.in1.png"
    theirs.write_bytes(b"another sender's")

    class Failing(Disk):
        syncs = 0

        def sync(self, file: Any, path: str) -> None:
            self.syncs += path.endswith(FILE)
            if path.endswith(FILE) and self.syncs > 1:
                raise SpoolError(f"cannot write: No space left on device: {path}", path=path, code=28)
            super().sync(file, path)

    submit(root, here, monkeypatch, Failing())
    submit(root, here, monkeypatch, Disk())
    assert theirs.read_bytes() == b"another sender's"
