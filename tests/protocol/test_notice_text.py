"""The status file for people: it shows every kind of content, and no name can add a line of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewatch.protocol import notice
from imagewatch.protocol.notice import Notice
from imagewatch.protocol.notice_text import as_text
from imagewatch.system.text import printable

WRITTEN = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
BERLIN = timezone(timedelta(hours=1))


def page(text: str = "x", **values: object) -> Notice:
    """A status that has one of everything."""
    made = Notice(
        version="1",
        state="on_hold",
        written_at=WRITTEN,
        next_writing_at=WRITTEN + timedelta(minutes=5),
        holds=(
            notice.HoldNotice(kind="key", message=text, next=text, since=WRITTEN, next_try_at=WRITTEN),
            notice.HoldNotice(kind="cap", message=text, next=text, provider=text),
            notice.HoldNotice(kind="cap", message=text, next=text, folder=text),
        ),
        waiting=notice.Waiting(
            count=9,
            oldest_since=WRITTEN,
            files=(
                notice.WaitingFile(name=text, why="ready", message="waits for its turn", next="no action needed"),
                notice.WaitingFile(name=text, why="empty", message=text, next=text, since=WRITTEN),
            ),
        ),
        in_flight=notice.InFlight(count=1, files=(notice.FileInFlight(name=text),)),
        ignored=notice.Ignored(count=1, files=(notice.IgnoredFile(name=text, message=text, next=text),)),
        redelivered=notice.Redelivered(count=1, files=(notice.RedeliveredFile(name=text, at=WRITTEN),)),
        stuck=notice.Stuck(count=1, files=(notice.StuckFile(name=text, message=text),)),
        folders=(notice.FolderNotice(folder="", waiting=1), notice.FolderNotice(folder=text, waiting=8)),
    )
    return type(made)(**{name: getattr(made, name) for name in made.__struct_fields__} | values)


def test_it_says_everything_with_the_times_of_the_zone() -> None:
    text = as_text(page("cat"), BERLIN)
    for line in (
        "imagewatch is ON HOLD: at the moment it sends no prompts. They stay in the inbox.",
        "As of 2026-11-29 13:00:00 (UTC+01:00).",
        "This file is written again by 2026-11-29 13:05:00. If it is later than that now,",
        "On hold since 2026-11-29 13:00:00 (key):",
        "  Next try at 2026-11-29 13:00:00.",
        "  It lasts until the administrator ends it.",
        "On hold (cap, only prompts for cat):",
        "On hold (cap, only prompts in the folder cat):",
        "Ignored: 1 file or folder in the inbox.",
        "Cannot finish: 1 job. Ask the administrator.",
        "Waiting: 9 prompts, the oldest since 2026-11-29 13:00:00.",
        "  directly in the inbox: 1",
        "Being processed: 1 prompt.",
        "  cat (at 2026-11-29 13:00:00)",
    ):
        assert f"{line}\n" in text


def test_what_needs_no_action_has_no_step() -> None:
    assert "no action needed" not in as_text(page("cat"), BERLIN)


def test_a_long_list_ends_with_how_many_more_there_are() -> None:
    files = tuple(notice.IgnoredFile(name=f"{n}.txt", message="x") for n in range(100))
    text = as_text(page(ignored=notice.Ignored(count=1234, files=files)), BERLIN)
    assert "Ignored: 1,234 files or folders in the inbox." in text
    assert "  … and 1,214 more\n" in text


def waiting(why: str, count: int, named: int) -> notice.Waiting:
    files = (notice.WaitingFile(name=f"anna/{n}", why=why, message="waits for its turn") for n in range(named))
    return notice.Waiting(count=count, files=tuple(files))


@pytest.mark.parametrize("why", ["ready", "cap", "empty"])
def test_a_list_of_waiting_prompts_that_is_cut_off_says_so(why: str) -> None:
    assert "  anna/19\n  … and more\n" in as_text(page(waiting=waiting(why, 5000, 100)), BERLIN).replace(
        "    waits for its turn\n", ""
    )
    assert "  … and 3 more\n" in as_text(page(waiting=waiting(why, 23, 23)), BERLIN)
    assert "more" not in as_text(page(waiting=waiting(why, 20, 20)), BERLIN)


def test_prompts_at_a_limit_do_not_hide_a_file_that_is_not_ready() -> None:
    empty = notice.WaitingFile(name="bert/mine.prompt.txt", why="empty", message="empty", next="write the prompt")
    made = waiting("cap", 5000, 99)
    text = as_text(page(waiting=notice.Waiting(count=5000, files=(*made.files, empty))), BERLIN)
    assert "Not ready yet:\n  bert/mine.prompt.txt\n    empty\n    What to do: write the prompt\n\n" in text
    assert "At a limit, the oldest first (sent when the limit allows it):\n  anna/0\n" in text


@pytest.mark.parametrize("state", ["running", "on_hold", "stopped"])
def test_the_first_line_says_the_state(state: str) -> None:
    words = {"running": "running", "on_hold": "ON HOLD", "stopped": "STOPPED"}
    assert as_text(page(state=state), BERLIN).startswith(f"imagewatch is {words[state]}")


def test_a_stopped_daemon_promises_no_next_try() -> None:
    text = as_text(page(state="stopped", next_writing_at=None, stopped_at=WRITTEN), BERLIN)
    assert "On hold since 2026-11-29 13:00:00 (key):\n" in text
    assert "Next try" not in text


@given(st.text())
def test_no_text_adds_a_line_or_changes_a_screen(text: str) -> None:
    plain, hostile = as_text(page("cat"), BERLIN), as_text(page(text), BERLIN)
    assert hostile.count("\n") == plain.count("\n") or not text
    assert [line for line in hostile.split("\n") if printable(line) != line] == []
