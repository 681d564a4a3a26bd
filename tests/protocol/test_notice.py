"""The status file for programs: what its reader accepts, from a folder that other people may write."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.protocol import notice
from imagewatch.protocol.notice import HoldNotice, IgnoredFile, Notice, Waiting, WaitingFile
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from pathlib import Path

WRITTEN = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
NOW = WRITTEN.timestamp()


def running(**values: Any) -> Notice:
    given = {"version": "1.0", "state": "running", "written_at": WRITTEN, **values}
    return Notice(**{"next_writing_at": WRITTEN + timedelta(minutes=5), **given})


def written(folder: Path, content: bytes) -> None:
    (folder / notice.JSON).write_bytes(content)


def changed(**values: object) -> bytes:
    page = json.loads(notice.encode(running()))
    return json.dumps({**page, **values}).encode()


def test_what_the_daemon_writes_is_read_back(tmp_path: Path) -> None:
    hold = HoldNotice(kind="credits", message="not enough credits", next="buy credits", since=WRITTEN)
    file = WaitingFile(name="anna/ü <b>.prompt.txt", why="empty", message="empty", next="write the prompt")
    page = running(state="on_hold", holds=(hold,), waiting=Waiting(count=1, oldest_since=WRITTEN, files=(file,)))
    written(tmp_path, notice.encode(page))
    assert notice.read(tmp_path) == page
    assert notice.read(str(tmp_path)) == page


def test_times_are_utc_with_z() -> None:
    page = json.loads(notice.encode(running()))
    assert (page["written_at"], page["next_writing_at"]) == ("2026-11-29T12:00:00Z", "2026-11-29T12:05:00Z")
    assert page["stopped_at"] is None
    assert notice.at(NOW + 0.9) == WRITTEN


def test_the_json_has_nothing_that_ends_a_script_in_a_page() -> None:
    raw = notice.encode(running(version="</script>&<!--"))
    assert not set(b"<>&") & set(raw)
    assert json.loads(raw)["version"] == "</script>&<!--"


@pytest.mark.parametrize(("seconds", "is_overdue"), [(0, False), (360, False), (361, True)])
def test_a_status_is_overdue_a_minute_after_it_should_have_been_written_again(
    seconds: float, *, is_overdue: bool
) -> None:
    assert running().is_overdue(NOW + seconds) is is_overdue
    assert running().is_running(NOW + seconds) is not is_overdue


def test_a_stopped_daemon_is_not_overdue_and_does_not_run() -> None:
    page = running(state="stopped", stopped_at=WRITTEN, next_writing_at=None)
    assert not page.is_overdue(NOW + 10**6)
    assert not page.is_running(NOW)


def test_a_status_that_runs_and_announces_no_writing_is_overdue() -> None:
    assert running(next_writing_at=None).is_overdue(NOW + 61)


def test_no_status_is_none(tmp_path: Path) -> None:
    assert notice.read(tmp_path) is None
    assert notice.read(tmp_path / "missing") is None
    assert notice.read("a\0b") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x":' + b"[" * 100_000,
        changed(schema=2),
        changed(schema="1"),
        changed(state="fine"),
        changed(written_at="yesterday"),
        changed(written_at="2026-11-29T12:00:00"),
        changed(next_writing_at=7),
        changed(waiting={"count": -1}),
        changed(waiting={"count": 10**400}),
        changed(waiting=None),
        changed(holds={}),
        changed(holds=[{"kind": "key"}]),
    ],
)
def test_content_that_is_no_status_is_none(content: bytes, tmp_path: Path) -> None:
    written(tmp_path, content)
    assert notice.read(tmp_path) is None


def test_a_status_of_a_later_version_with_more_keys_is_read(tmp_path: Path) -> None:
    written(tmp_path, changed(more={"x": [1]}))
    assert notice.read(tmp_path) == running()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    written(tmp_path, changed(version="x" * notice.MOST_BYTES))
    assert notice.read(tmp_path) is None
    os.truncate(tmp_path / notice.JSON, 10**12)
    began = time.process_time()
    assert notice.read(tmp_path) is None
    assert time.process_time() - began < 5


def test_a_link_a_folder_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(notice.encode(running()))
    path = tmp_path / notice.JSON
    path.symlink_to("elsewhere")
    assert notice.read(tmp_path) is None
    path.unlink()
    os.mkfifo(path)
    assert notice.read(tmp_path) is None
    path.unlink()
    path.mkdir()
    assert notice.read(tmp_path) is None


@given(st.text())
def test_no_text_of_it_can_change_a_screen(text: str) -> None:
    ignored = {"count": 1, "files": [{"name": text, "message": text, "next": text}]}
    page = notice.decode(changed(ignored=ignored))
    if page is None:  # not text at all
        assert "\\ud" in ascii(text)
        return
    assert page.ignored.files == (IgnoredFile(name=printable(text), message=printable(text), next=printable(text)),)
    assert notice.decode(notice.encode(page)) == page


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_any_value_in_any_place_is_read_or_refused(value: object) -> None:
    for name in Notice.__struct_fields__:
        page = notice.decode(changed(**{name: value}))
        assert page is None or isinstance(page, Notice)


@given(st.binary())
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    assert notice.decode(raw) is None or msgspec.json.decode(raw) is not None
