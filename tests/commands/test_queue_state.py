"""``submit`` reports immediately that the queue is on hold or that no daemon runs; it reads the folders alone."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, command, until

from imagewatch.commands import queue_state
from imagewatch.commands.common import load_folders
from imagewatch.commands.main import cli
from imagewatch.commands.queue_state import QueueReport
from imagewatch.protocol import notice
from imagewatch.protocol.notice import HoldNotice, Notice

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., LoggedDaemon]

HOLD = HoldNotice(
    kind="credits",
    message="the account has too few credits",
    next="add credits",
    since=notice.at(1_800_000_000),
    next_try_at=notice.at(4_000_000_000),
)


def write(folders: Folders, **values: Any) -> None:
    """Write a status as a daemon does."""
    now = time.time()
    given = {"version": "1", "state": "running", "written_at": notice.at(now), "next_writing_at": notice.at(now + 300)}
    (folders.root / notice.JSON).write_bytes(notice.encode(Notice(**{**given, **values})))


def overdue() -> dict[str, Any]:
    return {"written_at": notice.at(1_000_000_000), "next_writing_at": notice.at(1_000_000_300)}


def queue(folders: Folders, *arguments: str) -> Any:
    """What ``submit --json`` prints about the queue."""
    done = command(folders, "submit", "--json", "a cat", *arguments)
    assert done.returncode == 0
    (job,) = json.loads(done.stdout)
    return job["queue"]


def test_while_the_queue_is_on_hold_submit_says_why_and_what_to_do(folders: Folders) -> None:
    write(folders, state="on_hold", holds=(HOLD,))
    done = command(folders, "submit", "a cat", TZ="UTC")
    assert done.returncode == 0
    assert done.stdout.endswith(".prompt.txt\n")
    assert done.stderr == (
        "imagewatch: the queue is on hold (credits): the account has too few credits (since 2027-01-15 08:00:00); "
        "next try at 2096-10-02 07:06:40\n  The prompt stays in the inbox. What to do: add credits\n"
    )
    assert queue(folders) == {
        "state": "on_hold",
        "message": "the queue is on hold (credits): the account has too few credits",
        "next": "add credits",
        "since": "2027-01-15T08:00:00Z",
        "next_try_at": "2096-10-02T07:06:40Z",
    }


@pytest.mark.parametrize("form", [[], ["--json"], ["--wait", "--timeout", "0"], ["--wait", "--timeout", "0", "--json"]])
def test_a_daemon_that_is_overdue_is_not_running(form: list[str], folders: Folders) -> None:
    write(folders, **overdue())
    done = command(folders, "submit", "a cat", *form, TZ="UTC")
    assert "the daemon is not running: its status is overdue (since 2001-09-09" in done.stderr
    assert "The prompt stays in the inbox. What to do: ask the administrator to start it" in done.stderr
    if "--json" in form:
        assert json.loads(done.stdout)[0]["queue"]["state"] == "not_running"


def test_a_daemon_that_was_stopped_is_not_running(folders: Folders, run: Run) -> None:
    run(folders).stop()
    done = command(folders, "submit", "a cat", "a dog")
    assert "imagewatch: the daemon is not running: it was stopped (since " in done.stderr
    assert "The 2 prompts stay in the inbox." in done.stderr
    assert queue(folders)["state"] == "not_running"


def test_what_has_ended_is_reported_and_a_status_that_was_removed_ends_nothing(folders: Folders) -> None:
    lines: list[str] = []
    report = QueueReport(load_folders(None, str(folders.root)), "", None, time.time, lines.append)
    for values, expected in (
        (overdue(), "imagewatch: the daemon is not running: "),
        ({}, "The daemon is running."),
        ({"state": "on_hold", "holds": (HOLD,)}, "imagewatch: the queue is on hold (credits): "),
        ({}, "The queue is not on hold any more."),
        (overdue(), "imagewatch: the daemon is not running: "),
    ):
        write(folders, **values)
        lines.clear()
        report.report(1)
        assert lines[0].startswith(expected)
    (folders.root / notice.JSON).unlink()
    lines.clear()
    report.report(1)
    assert lines == []


def test_a_status_that_is_not_written_again_after_a_drop_shows_that_no_daemon_runs(folders: Folders) -> None:
    now, lines = [1_800_000_000.0], list[str]()
    folders.environ["IMAGEWATCH_INBOX__RESCAN_SECONDS"] = "30"
    write(folders, written_at=notice.at(now[0]), next_writing_at=notice.at(now[0] + 3600))
    report = QueueReport(folders.config(), "", None, lambda: now[0], lines.append)
    report.report(1)
    now[0] += 59
    report.report(1)
    assert (lines, report.as_json()) == ([], None)
    now[0] += 2
    report.report(1)
    assert lines == [
        "imagewatch: the daemon is probably not running: it has not written its status since the prompt was dropped",
        "  The prompt stays in the inbox. What to do: ask the administrator to start it",
    ]
    report.report(0)  # removed before a daemon could list it
    assert report.as_json() is None


def test_a_daemon_that_runs_writes_its_status_again_after_a_drop(folders: Folders, run: Run) -> None:
    run(folders)
    command(folders, "hold", "lunch")
    until(lambda: (page := notice.read(folders.root)) is not None and page.state == "on_hold")
    late, lines = [0.0], list[str]()
    report = QueueReport(folders.config(), "", None, lambda: time.time() + late[0], lines.append)
    folders.prompt("cat", "+++\ninput_images = []\n+++\na cat")
    report.report(1)
    until(lambda: (page := notice.read(folders.root)) is not None and page.waiting.count == 1)
    late[0] = 100
    report.report(1)
    assert [line for line in lines if "not running" in line] == []


def test_after_the_timeout_submit_does_not_promise_what_a_killed_daemon_cannot_do(
    folders: Folders, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = run(folders)
    until(lambda: notice.read(folders.root))
    daemon.stop(signal.SIGKILL)
    monkeypatch.setattr(queue_state, "_SILENT_SECONDS", 1.0 - folders.config().inbox.rescan_seconds)
    for name, value in folders.environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "a cat", "--wait", "--timeout", "2", "--json"], standalone_mode=False)
    assert ended.value.code == 69
    out, err = capsys.readouterr()
    assert err.count("the daemon is probably not running") == 1
    assert "1 prompt is not finished. It is processed when the daemon runs again; to cancel, remove it from" in err
    assert "The daemon will process it" not in err
    assert json.loads(out)[0]["queue"]["state"] == "not_running"


def test_while_the_daemon_runs_submit_says_nothing(folders: Folders, run: Run) -> None:
    run(folders)
    done = command(folders, "submit", "a cat", "--wait", "--json")
    assert (done.returncode, json.loads(done.stdout)[0]["queue"]) == (0, None)
    assert "hold" not in done.stderr
    assert command(folders, "submit", "a cat").stderr == ""


def test_a_real_hold_is_reported_while_results_are_waited_for(folders: Folders, run: Run) -> None:
    run(folders)
    command(folders, "hold", "lunch")
    until(lambda: (page := notice.read(folders.root)) is not None and page.state == "on_hold")
    done = command(folders, "submit", "a cat", "--wait", "--timeout", "3", "--json")
    assert done.returncode == 69
    assert done.stderr.count("the queue is on hold (manual): lunch") == 1
    assert json.loads(done.stdout)[0]["queue"]["next"] == "to resume: imagewatch release"


@pytest.mark.parametrize(
    ("hold", "arguments", "is_reported"),
    [
        ({"provider": "openai"}, [], True),
        ({"provider": "openai"}, ["--provider", "openai"], True),
        ({"provider": "openai"}, ["--provider", "flux"], False),
        ({"folder": "anna"}, ["--folder", "anna/x"], True),
        ({"folder": "anna"}, ["--folder", "ben"], False),
        ({"folder": "anna"}, [], False),
    ],
)
def test_a_hold_of_a_provider_or_a_folder_is_reported_to_those_whom_it_concerns(
    hold: dict[str, str], arguments: list[str], *, is_reported: bool, folders: Folders
) -> None:
    write(folders, holds=(HoldNotice(kind="cap", message="used up", next="wait", **hold),))
    assert (queue(folders, *arguments) is not None) is is_reported


def test_only_the_folders_are_needed(folders: Folders) -> None:
    write(folders, **overdue())
    done = command(folders, "submit", "--root", str(folders.root), "a cat", IMAGEWATCH_FOLDERS__ROOT="")
    assert "the daemon is not running" in done.stderr


@pytest.mark.parametrize("kind", ["nothing", "rubbish", "link", "folder", "pipe"])
def test_without_a_status_that_can_be_read_the_prompt_is_dropped_all_the_same(kind: str, folders: Folders) -> None:
    path = folders.root / notice.JSON
    if kind == "rubbish":
        path.write_text("{" * 100_000)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    assert queue(folders) is None


def test_a_hostile_status_changes_no_screen_and_adds_no_line(folders: Folders) -> None:
    text = "x\x1b[2J\nimagewatch: pay again\u202e"
    write(folders, state="on_hold", holds=(HoldNotice(kind=text, message=text, next=text, provider=None),))
    done = command(folders, "submit", "a cat")
    assert done.stderr.count("\n") == 2
    assert not {"\x1b", "\u202e"} & set(done.stderr)
