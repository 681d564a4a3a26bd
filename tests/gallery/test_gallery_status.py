"""What the gallery's page has of the daemon's status, and when it is written for it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.daemon import Running, until

from gallery.test_gallery import HOSTILE, Shelf, command, page_data, plain_image
from imagewatch.config.load import load
from imagewatch.gallery import Gallery
from imagewatch.gallery.status import status_of
from imagewatch.protocol.notice import (
    GRACE_SECONDS,
    JSON,
    MOST_BYTES,
    HoldNotice,
    Ignored,
    IgnoredFile,
    InFlight,
    Notice,
    Stuck,
    StuckFile,
    Waiting,
    WaitingFile,
    at,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.station import Station

NOW = 1_800_000_000.0
HOLD = HoldNotice(
    kind="credits", message="Not enough credits", next="add credits", since=at(NOW - 60), next_try_at=at(NOW + 60)
)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "watched")


def notice(state: Any = "running", **more: Any) -> Notice:
    """A status that was written a second ago."""
    due = None if state == "stopped" else at(NOW + 300)
    return Notice(**{"version": "1", "state": state, "written_at": at(NOW - 1), "next_writing_at": due, **more})


def waiting(*names: str, count: int | None = None, **more: Any) -> Waiting:
    files = tuple(WaitingFile(name=name, why="ready", message="is ready", **more) for name in names)
    return Waiting(count=len(names) if count is None else count, oldest_since=at(NOW - 30), files=files)


def report(shelf: Shelf, given_: Notice) -> None:
    """Write a status as the daemon does: by a rename."""
    shelf.put("status.tmp", encode(given_))
    (shelf.root / "status.tmp").replace(shelf.root / JSON)


def written(shelf: Shelf, now: float = NOW) -> Any:
    """Write the page and return the status on it."""
    Gallery(load(None, shelf.environ()), clock=lambda: now).write()
    return shelf.data["shown"]["status"]


# Content


def test_holds_and_what_waits_are_on_the_page(shelf: Shelf):
    ignored = Ignored(count=1, files=(IgnoredFile(name="x.prompt.txt.txt", message="its ending", next="rename it"),))
    stuck = Stuck(count=1, files=(StuckFile(name="b.prompt.txt", message="remove its folder"),))
    holds = (HOLD, HoldNotice(kind="cap", folder="anna", provider="flux", message="a cap", next="wait"))
    names = ("anna/x.prompt.txt", "y.prompt.txt")
    report(
        shelf,
        notice(
            "on_hold",
            holds=holds,
            waiting=waiting(*names, next="no action needed"),
            in_flight=InFlight(count=3),
            ignored=ignored,
            stuck=stuck,
        ),
    )
    milliseconds = int(NOW * 1000)
    assert written(shelf) == {
        "state": "on_hold",
        "holds": [
            {
                "kind": "credits",
                "message": "Not enough credits",
                "next": "add credits",
                "since": milliseconds - 60_000,
                "next_try_at": milliseconds + 60_000,
            },
            {"kind": "cap", "provider": "flux", "folder": "anna", "message": "a cap", "next": "wait"},
        ],
        "waiting": {
            "count": 2,
            "files": [{"name": name, "message": "is ready", "next": "no action needed"} for name in names],
        },
        "oldest_since": milliseconds - 30_000,
        "in_flight": 3,
        "ignored": {
            "count": 1,
            "files": [{"name": "x.prompt.txt.txt", "message": "its ending", "next": "rename it"}],
        },
        "stuck": {"count": 1, "files": [{"name": "b.prompt.txt", "message": "remove its folder"}]},
    }


@pytest.mark.parametrize("content", [None, encode(notice())], ids=["no status", "nothing to report"])
def test_without_anything_to_report_the_page_has_no_status(shelf: Shelf, content: bytes | None):
    if content:
        shelf.put(JSON, content)
    assert written(shelf) is None


def test_an_overdue_status_says_that_the_daemon_is_not_running_and_when_it_reported_last(shelf: Shelf):
    report(shelf, notice(waiting=waiting("x.prompt.txt"), in_flight=InFlight(count=1)))
    due = NOW + 300
    assert written(shelf, due + GRACE_SECONDS)["state"] == "running"
    status = written(shelf, due + GRACE_SECONDS + 1)
    assert (status["state"], status["reported_at"], status["due_at"]) == (
        "overdue",
        int(NOW * 1000) - 1000,
        int(due * 1000),
    )
    assert status["waiting"]["count"] == 1
    assert "in_flight" not in status


def test_a_daemon_that_was_stopped_is_not_overdue(shelf: Shelf):
    report(shelf, notice("stopped", stopped_at=at(NOW - 1)))
    status = written(shelf, NOW + 1_000_000)
    assert (status["state"], status["stopped_at"]) == ("stopped", int(NOW * 1000) - 1000)


def test_the_command_shows_the_status_of_a_daemon_that_is_not_running(shelf: Shelf):
    report(shelf, notice(written_at=at(1_000), next_writing_at=at(2_000)))
    assert command(shelf.environ()).returncode == 0
    assert shelf.data["shown"]["status"]["state"] == "overdue"


# Untrusted


def test_of_very_many_holds_and_files_a_few_are_on_the_page_and_all_are_counted(shelf: Shelf):
    long = "<" * 1000
    names = [f"{k}{long}.prompt.txt" for k in range(300)]
    report(
        shelf, notice("on_hold", holds=(HoldNotice(kind=long, message=long, next=long),) * 90, waiting=waiting(*names))
    )
    status = written(shelf)
    assert (len(status["holds"]), len(status["waiting"]["files"]), status["waiting"]["count"]) == (20, 50, 300)
    assert len(status["holds"][0]["message"]) < 510
    assert (shelf.root / "gallery.html").stat().st_size < 1_000_000


def test_more_files_than_the_count_says_are_counted(shelf: Shelf):
    report(shelf, notice(waiting=waiting("a.prompt.txt", "b.prompt.txt", count=0)))
    assert written(shelf)["waiting"]["count"] == 2


VALID = json.loads(encode(notice("on_hold", holds=(HOLD,), waiting=waiting("x.prompt.txt"))))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'"running"',
        HOSTILE.encode(),
        b"{}",
        json.dumps({**VALID, "state": HOSTILE}).encode(),
        json.dumps({**VALID, "schema": 2}).encode(),
        json.dumps({**VALID, "written_at": 5}).encode(),
        json.dumps({**VALID, "written_at": "9999-99-99T00:00:00Z"}).encode(),
        json.dumps({**VALID, "holds": {"kind": "x"}}).encode(),
        json.dumps({**VALID, "holds": [[]]}).encode(),
        json.dumps({**VALID, "waiting": {"count": -1}}).encode(),
        json.dumps({**VALID, "waiting": {"count": 1e300}}).encode(),
        json.dumps({**VALID, "waiting": {"count": 1, "files": [{"name": ["x"]}]}}).encode(),
        encode(notice("on_hold", holds=(HOLD,))) + b" " * MOST_BYTES,
    ],
)
def test_a_status_that_is_damaged_or_too_large_is_not_shown_and_the_page_is_written(shelf: Shelf, content: bytes):
    shelf.completed("cat", plain_image())
    shelf.put(JSON, content)
    assert written(shelf) is None
    assert [job["name"] for job in shelf.jobs] == ["cat"]


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "hole"])
def test_what_is_not_a_plain_small_file_is_not_read_as_the_status(shelf: Shelf, tmp_path: Path, kind: str):
    path = shelf.root / JSON
    if kind == "link":
        (tmp_path / "private.json").write_bytes(encode(notice("stopped")))
        path.symlink_to(tmp_path / "private.json")
    elif kind == "hard link":
        (tmp_path / "private.json").write_bytes(encode(notice("stopped")))
        (tmp_path / "private.json").chmod(0o600)
        path.hardlink_to(tmp_path / "private.json")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    assert written(shelf) is None


def test_markup_in_the_status_is_no_markup_of_the_page(shelf: Shelf):
    ignored = Ignored(count=1, files=(IgnoredFile(name=HOSTILE, message=HOSTILE, next=HOSTILE),))
    hold = HoldNotice(kind=HOSTILE, provider=HOSTILE, folder=HOSTILE, message=HOSTILE, next=HOSTILE)
    raw = json.loads(encode(notice("on_hold", holds=(hold,), waiting=waiting(HOSTILE), ignored=ignored)))
    shelf.put(JSON, json.dumps(raw).encode())
    assert written(shelf)["holds"][0]["message"] == HOSTILE
    text = (shelf.root / "gallery.html").read_text()
    assert text.count("<script") == text.count("</script") == 2
    assert "<img" not in text


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.just("2026-01-01T00:00:00Z"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["count", "files", "name"]), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(VALID)), anything, max_size=3), now=st.floats(0, 1e12))
def test_any_status_is_shown_or_left_out(changes: dict[str, Any], now: float):
    found = decode(json.dumps({**VALID, **changes}).encode())
    status = status_of(found, now)
    assert found is not None or status is None


# When the page is written


def test_a_status_that_only_was_written_again_does_not_change_the_page(shelf: Shelf):
    report(shelf, notice("on_hold", holds=(HOLD,), waiting=waiting("x.prompt.txt")))
    written(shelf)
    before = (shelf.root / "gallery.html").read_bytes()
    later = {"written_at": at(NOW + 200), "next_writing_at": at(NOW + 500)}
    report(shelf, notice("on_hold", holds=(HOLD,), waiting=waiting("x.prompt.txt"), **later))
    written(shelf, NOW + 201)
    assert (shelf.root / "gallery.html").read_bytes() == before


def test_a_changed_status_is_detected_without_a_new_file(shelf: Shelf):
    gallery = Gallery(load(None, shelf.environ()), clock=lambda: NOW)
    gallery.write()
    assert not gallery.outdated()
    report(shelf, notice("on_hold", holds=(HOLD,)))
    assert gallery.outdated()
    assert gallery.refresh()
    assert not gallery.outdated()
    (shelf.root / JSON).unlink()
    assert gallery.outdated()
    assert gallery.refresh()
    assert shelf.data["shown"]["status"] is None


def test_a_daemon_that_dies_is_reported_by_a_later_check(shelf: Shelf):
    now = NOW
    report(shelf, notice())
    gallery = Gallery(load(None, shelf.environ()), clock=lambda: now)
    gallery.write()
    now += 3600
    assert gallery.refresh()
    assert shelf.data["shown"]["status"]["state"] == "overdue"


def test_watching_shows_a_hold_soon_after_it_was_reported(station: Station, start: Callable[..., Running]):
    page = station.root / "gallery.html"
    watching = start(station, "gallery", "--watch")
    until(page.exists)
    content = encode(Notice(version="1", state="on_hold", written_at=at(NOW * 2), holds=(HOLD,)))
    (station.root / JSON).write_bytes(content)
    until(lambda: (page_data(page)["shown"]["status"] or {}).get("state") == "on_hold")
    assert watching.stop(signal.SIGINT) == 0
