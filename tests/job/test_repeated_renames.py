"""Renames that happened but reported an error, as on NFS when a request is repeated."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from support.station import Station

from imagewatch.system import disk_calls

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

RENAME = disk_calls.rename_new


@pytest.fixture(params=[errno.ENOENT, errno.EEXIST])
def repeated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let each rename happen, then report a failure."""

    def rename(source: disk_calls.Place, target: disk_calls.Place) -> None:
        RENAME(source, target)
        raise OSError(request.param, os.strerror(request.param), target.name)

    monkeypatch.setattr(disk_calls, "rename_new", rename)


@pytest.mark.usefixtures("repeated")
def test_a_prompt_and_its_image_are_claimed_completed_and_archived(station: Station, sandbox: Sandbox) -> None:
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    station.drop("cat.png", image.getvalue())
    station.prompt("cat", "A cat")
    (outcome,) = station.work()
    assert outcome.destination == "outbox", outcome.message
    assert station.names("inbox") == []
    assert station.names("archive") == ["cat.png", "cat.prompt.txt"]
    assert station.leftovers() == []
    assert sandbox.report()["requests"] == 1


@pytest.mark.usefixtures("repeated")
def test_a_refused_prompt_is_in_errors_with_its_reason(station: Station) -> None:
    station.prompt("cat", "[sandbox: 400] A cat")
    (outcome,) = station.work()
    assert outcome.destination == "errors"
    assert station.names("errors") == ["cat.error.toml", "cat.prompt.txt"]
    assert (station.names("inbox"), station.leftovers()) == ([], [])


@pytest.mark.usefixtures("repeated")
def test_a_prompt_that_is_given_back_is_in_the_inbox_again(tmp_path: Path) -> None:
    with contextlib.closing(Station(tmp_path, "http://127.0.0.1:9")) as station:
        station.prompt("cat", "A cat")
        station.work()
        assert station.names("inbox") == ["cat.prompt.txt"]
        assert station.leftovers() == []
