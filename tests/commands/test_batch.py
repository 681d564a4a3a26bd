"""``submit --table`` from outside: the real command, a real daemon, a real endpoint on the loopback, real folders."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import TESTS, Folders, until
from support.daemon import command as command_of

from commands.test_submit import IMAGE, Sender, plain_image
from imagewatch.system.folders import Tops
from imagewatch.system.locks import lock

if TYPE_CHECKING:
    from pathlib import Path

RUNNER = str(TESTS / "support/submit_runner.py")
INTERRUPTER = str(TESTS / "support/interrupt_runner.py")
RECORD = ".table-rows.jsonl"
TEMPLATE = "A poster for {product}\n"


@pytest.fixture
def sender(folders: Folders, tmp_path: Path) -> Sender:
    return Sender(folders, tmp_path / "home")


@pytest.fixture
def watched(folders: Folders, start: Any) -> Any:
    """A daemon that is watching."""
    running = start(folders, "run")
    until((folders.state / "status.json").exists)
    return running


def table(sender: Sender, *rows: list[str], name: str = "x.csv", separator: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows(rows)
    return sender.file(name, file.getvalue())


def arguments(sender: Sender, *more: str) -> list[str]:
    return ["--table", "x.csv", "--template", sender.file("x.txt", TEMPLATE), *more]


def prompts(sender: Sender) -> list[str]:
    """The prompts in the inbox, by base name; anything else there is a mistake, except the record."""
    names = [name for name in sender.dropped() if os.path.basename(name) != RECORD]
    assert all(name.endswith(".prompt.txt") and not os.path.basename(name).startswith(".") for name in names), names
    return [name.removesuffix(".prompt.txt") for name in names]


# Dropping


def test_each_row_becomes_a_prompt_and_count_and_cost_are_printed_first(sender, sandbox, watched):
    table(sender, ["name", "product", "n"], ["chair", 'Chair "Oslo"', "2"], ["", "Lamp, dark", ""], separator=";")
    done = sender.submit(*arguments(sender, "--wait", "--json"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:2] == [
        "2 rows: 2 new prompts for 3 images.",
        "The cost is not known: no similar request was charged lately.",
    ]
    first, second = json.loads(done.stdout)
    assert (first["line"], first["source"], first["state"], len(first["images"])) == (
        2,
        "chair.prompt.txt",
        "dropped",
        2,
    )
    assert (second["line"], second["state"], second["prompt"]) == (3, "dropped", "A poster for Lamp, dark")
    assert second["source"].startswith("lamp-dark-")
    assert {call["prompt"] for call in sandbox.report()["calls"]} == {first["prompt"], second["prompt"]}
    assert first["prompt"] == 'A poster for Chair "Oslo"'
    table(sender, ["product"], ["Sofa"], ["Desk"])
    done = sender.submit(*arguments(sender, "--root", str(sender.folders.root), "--dry-run", "--json"))
    usual = first["credits_charged"] / 2
    assert [one["expected_credits"]["usual"] for one in json.loads(done.stdout)] == [usual, usual]
    assert f"Expected cost: {usual * 2:g} credits.\n" in done.stderr, "from receipts: there is no ledger here"


def test_the_ledger_estimates_if_it_can_be_read(sender, folders, watched):
    table(sender, ["product"], ["Sofa"])
    assert command_of(folders, "submit", "A cat", "--wait").returncode == 0
    for path in folders.outbox.glob("*.receipt.toml"):
        path.unlink()
    environ = {**sender.environ, **folders.environ}
    done = sender.submit(*arguments(sender, "--dry-run"), environ=environ)
    assert "\nExpected cost: " in done.stderr


def test_a_dry_run_prints_every_row_and_changes_nothing(sender):
    table(sender, ["name", "product"], ["chair", "Chair"], ["lamp", "Lamp"])
    done = sender.submit(*arguments(sender, "--dry-run", "--folder", "new"))
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["line", "prompt", "state", "credits"],
        ["2", "chair", "new", "unknown"],
        ["3", "lamp", "new", "unknown"],
    ]
    assert sender.dropped() == []
    assert not (sender.folders.inbox / "new").exists()


def test_a_problem_in_any_row_drops_nothing(sender):
    table(sender, ["product", "n"], ["Chair", "1"], ["Lamp", "7"], ["", "2"])
    done = sender.submit(*arguments(sender))
    assert (done.returncode, done.stdout, sender.dropped()) == (64, "", [])
    assert done.stderr.splitlines() == [
        "imagewatch: x.csv line 3: n: must be a whole number of at most 4, not 7",
        "imagewatch: x.csv line 4: product: the cell is empty (write a value, or remove the field from the template)",
        "  Nothing was dropped.",
    ]


def test_limits_and_presets_of_the_configuration_are_checked_and_without_one_the_daemon_checks_presets(sender):
    table(sender, ["product", "preset"], ["Chair", "poster"], ["Lamp", "postr"])
    done = sender.submit(*arguments(sender))
    assert done.returncode == 64
    assert "x.csv line 3: preset: " in done.stderr
    assert sender.dropped() == []
    done = sender.submit(*arguments(sender, "--root", str(sender.folders.root)), environ=sender.environ)
    assert (done.returncode, len(prompts(sender))) == (0, 2)


def test_the_text_may_be_in_a_column_and_the_table_on_standard_input(sender):
    done = sender.submit("--table", "-", stdin='\ufeffprompt;n\r\n"A cat,\r\na dog";2\r\n'.encode())
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    with open(path, encoding="utf-8") as file:
        assert file.read() == "+++\nn = 2\ninput_images = []\n+++\nA cat,\na dog\n"
    assert "imagewatch: standard input line 2: n: " in sender.submit("--table", "-", stdin=b"prompt,n\na,9\n").stderr


def test_images_of_the_command_line_are_for_each_row_that_names_none(sender, sandbox, watched):
    sender.file("logo.png")
    sender.file("more/boat.png", plain_image(color=(1, 2, 3)))
    sender.file("more/quay.jpg", plain_image("JPEG"))
    table(
        sender,
        ["name", "product", "input_images"],
        ["a", "A", ""],
        ["b", "B", "boat.png, quay.jpg"],
        ["c", "C", '["quay.jpg"]'],
        ["d", "D", "[]"],
        name="more/x.csv",
    )
    given = ["--table", "more/x.csv", "--template", sender.file("x.txt", TEMPLATE), "--image", "logo.png", "--wait"]
    done = sender.submit(*given)
    assert done.returncode == 0, done.stderr
    inputs = {name: sender.folders.receipt(name).get("inputs", []) for name in "abcd"}
    assert {name: [one["file"] for one in some] for name, some in inputs.items()} == {
        "a": ["a.in1.png"],
        "b": ["b.in1.png", "b.in2.jpeg"],
        "c": ["c.in1.jpeg"],
        "d": [],
    }
    assert sandbox.report()["requests"] == 4


def test_many_new_prompts_need_yes(sender):
    table(sender, ["product"], *([f"Chair {number}"] for number in range(101)))
    done = sender.submit(*arguments(sender))
    assert done.returncode == 64
    assert done.stderr.splitlines() == [
        "101 rows: 101 new prompts for 101 images.",
        "The cost is not known: no similar request was charged lately.",
        "imagewatch: 101 new prompts are more than 100",
        "  nothing was dropped; to drop all of them, add --yes",
    ]
    assert prompts(sender) == []
    environ = {**sender.known, "IMAGEWATCH_LIMITS__BURST": "2"}
    table(sender, ["product"], *([f"Chair {number}"] for number in range(3)))
    done = sender.submit(*arguments(sender), environ=environ)
    assert (done.returncode, prompts(sender)) == (64, [])
    assert "3 new prompts are more than limits.burst (2)\n" in done.stderr
    done = sender.submit(*arguments(sender, "--yes"), environ=environ)
    assert (done.returncode, len(prompts(sender))) == (0, 3)
    assert "The daemon puts the queue on hold for that.\n  to continue, run: imagewatch release\n" in done.stderr


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["A cat", "--table", "x.csv"], "--table cannot be used together with PROMPT or --from"),
        (["--table", "x.csv", "--name", "a"], "add a column name to the table"),
        (["--table", "x.csv", "--dry-run", "--wait"], "--dry-run and --wait cannot be used together"),
        (["A cat", "--template", "x.txt"], "--template needs --table"),
        (["A cat", "--dry-run"], "--dry-run needs --table"),
        (["A cat", "--yes"], "--yes needs --table"),
        (["--table", "none.csv"], "none.csv: No such file or directory"),
    ],
)
def test_options_that_do_not_go_together_are_refused(sender, given, text):
    done = sender.submit(*given)
    assert (done.returncode, sender.dropped()) == (64, [])
    assert text in done.stderr


# A second run


def test_a_second_run_drops_only_what_is_new_and_names_what_it_skips(sender, sandbox, watched):
    table(sender, ["name", "product"], ["good", "Chair"], ["bad", "Lamp [sandbox: 400]"])
    assert sender.submit(*arguments(sender, "--wait")).returncode == 1
    table(
        sender,
        ["name", "product"],
        ["good", "Chair"],
        ["bad", "Lamp [sandbox: 400]"],
        ["new", "Sofa"],
        ["also", "Desk"],
    )
    done = sender.submit(*arguments(sender, "--wait", "--json"))
    assert done.returncode == 0, done.stderr
    result = {one["source"].split(".")[0]: (one["state"], one["destination"]) for one in json.loads(done.stdout)}
    assert result == {
        "good": ("completed", "outbox"),
        "bad": ("failed", "errors"),
        "new": ("dropped", "outbox"),
        "also": ("dropped", "outbox"),
    }
    lines = done.stderr.splitlines()
    assert lines[0] == "4 rows: 2 new prompts for 2 images."
    assert "Skipped 1 row (completed before): line 2" in lines
    error = sender.folders.errors / "bad.error.toml"
    assert any(one.startswith("Skipped line 3: bad: failed before, not charged: ") for one in lines)
    assert any(one.endswith(f"; what to do: {error}") for one in lines)
    assert sandbox.report()["requests"] == 4


def test_a_row_in_flight_is_not_dropped_again(sender, sandbox, watched):
    sandbox.hold()
    table(sender, ["product"], ["Chair"])
    try:
        assert sender.submit(*arguments(sender)).returncode == 0
        assert sandbox.wait_for_requests(1, 20)
        assert prompts(sender) == []
        done = sender.submit(*arguments(sender))
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == "1 row: no new prompt."
        assert "in flight, or its files were moved): line 2\n" in done.stderr
    finally:
        sandbox.release()
    until(lambda: len(sender.folders.finished()) == 1)
    assert sandbox.report()["requests"] == 1


def test_a_row_whose_name_another_sender_has_in_flight_is_not_dropped(sender, sandbox, watched):
    sandbox.hold()
    status = sender.folders.root / "imagewatch-status.json"
    try:
        assert sender.submit("a chair", "--name", "chair").returncode == 0
        until(status.exists)  # it is written after that of the state folder
        until(lambda: [one["name"] for one in json.loads(status.read_bytes())["in_flight"]["files"]])
        table(sender, ["name", "prompt"], ["chair", "a chair"])
        done = sender.submit("--table", "x.csv")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == "1 row: no new prompt."
        assert "in flight, or its files were moved): line 2\n" in done.stderr
    finally:
        sandbox.release()
    until(lambda: len(sender.folders.finished()) == 1)
    assert sandbox.report()["requests"] == 1


def test_a_row_whose_files_were_all_moved_away_is_not_dropped_again(sender, sandbox, watched):
    table(sender, ["product"], ["Chair"])
    assert sender.submit(*arguments(sender, "--wait")).returncode == 0
    until(lambda: len(sender.folders.names("archive")) == 1)
    for name in ("outbox", "archive"):
        for path in (sender.folders.root / name).iterdir():
            path.unlink()
    done = sender.submit(*arguments(sender, "--json"))
    assert [one["state"] for one in json.loads(done.stdout)] == ["recorded"]
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("left", ["outbox", "archive", "inbox"])
def test_without_the_record_each_folder_shows_that_a_row_was_dropped(sender, start, left):
    table(sender, ["name", "product"], ["chair", "Chair"])
    assert sender.submit(*arguments(sender)).returncode == 0
    if left != "inbox":
        assert command_of(sender.folders, "once").returncode == 0
    for path in [sender.folders.inbox / RECORD, *sender.folders.outbox.iterdir(), *sender.folders.archive.iterdir()]:
        if path.parent.name != left:
            path.unlink()
    done = sender.submit(*arguments(sender, "--json"))
    state = "waiting" if left == "inbox" else "completed"
    assert [(one["state"], one["is_changed"]) for one in json.loads(done.stdout)] == [(state, False)]


def test_a_changed_row_of_the_same_name_is_skipped_unless_it_failed_and_was_not_charged(sender, sandbox, watched):
    table(sender, ["name", "product"], ["good", "Chair"], ["bad", "Lamp [sandbox: 400]"], ["lost", "[sandbox: 504]"])
    assert sender.submit(*arguments(sender, "--wait")).returncode == 1
    rows = [["good", "Table"], ["bad", "Lamp"], ["lost", "Desk"]]
    table(sender, ["name", "product"], *rows)
    done = sender.submit(*arguments(sender, "--wait", "--json"))
    assert done.returncode == 0, done.stderr
    result = [(one["state"], one["is_changed"]) for one in json.loads(done.stdout)]
    assert result == [("completed", True), ("dropped", False), ("failed", True)]
    assert done.stderr.count("it asked for something else than this row: to request this one, change its name") == 2
    done = sender.submit(*arguments(sender, "--wait", "--json"))
    assert [one["state"] for one in json.loads(done.stdout)] == ["completed", "completed", "failed"]
    prompts_ = Counter(call["prompt"] for call in sandbox.report()["calls"])
    assert prompts_["A poster for Lamp"] == 1
    assert sandbox.report()["requests"] == 4


def test_a_changed_row_without_a_name_is_another_one(sender):
    table(sender, ["product"], ["Chair"])
    assert sender.submit(*arguments(sender)).returncode == 0
    table(sender, ["product"], ["Chair"], ["Chair!"])
    done = sender.submit(*arguments(sender, "--json"))
    assert [one["state"] for one in json.loads(done.stdout)] == ["waiting", "dropped"]


def test_each_folder_of_the_inbox_has_its_own_rows(sender):
    table(sender, ["product"], ["Chair"])
    for folder in ("", "a", "a/b"):
        assert sender.submit(*arguments(sender, "--folder", folder)).returncode == 0
        assert sender.submit(*arguments(sender, "--folder", folder)).stdout == ""
    assert len(prompts(sender)) == 3


def test_a_stopped_daemon_is_reported_also_when_all_rows_wait_already(sender, folders):
    status = {"schema": 1, "version": "1", "state": "stopped", "written_at": "2026-11-29T12:00:00Z"}
    status |= {"next_writing_at": None, "stopped_at": "2026-11-29T12:00:00Z", "holds": []}
    (folders.root / "imagewatch-status.json").write_text(json.dumps(status))
    table(sender, ["product"], ["Chair"])
    for state in ("dropped", "waiting"):
        done = sender.submit(*arguments(sender, "--json"))
        assert "imagewatch: the daemon is not running: it was stopped" in done.stderr
        (row,) = json.loads(done.stdout)
        assert (row["state"], row["queue"]["state"]) == (state, "not_running")


# Interrupted runs


def exactly_once(sender: Sender, names: set[str]) -> None:
    """Each row is in the inbox once, with its image, and nothing else is there but the record."""
    expected = {f"{name}{ending}" for name in names for ending in (".prompt.txt", ".in1.png")}
    found = [name for name in sender.dropped() if os.path.basename(name) != RECORD]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ending", ["b.in1.png", "b.prompt.txt", "c.in1.png"])
def test_after_a_signal_the_same_command_drops_the_other_rows(sender, number, ending):
    sender.file("logo.png")
    table(sender, ["name", "product"], *([name, name] for name in "abcd"))
    given = arguments(sender, "--image", "logo.png")
    done = subprocess.run(
        [sys.executable, INTERRUPTER, str(int(number)), ending, "submit", *given],
        env={**sender.known, "PYTHONPATH": str(TESTS)},
        cwd=sender.home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69, done.stderr
    count = len(done.stdout.splitlines())
    assert 0 < count < 4
    assert f"{count} of 4 prompts" in done.stderr
    assert "run the same command again: it skips the rows that were dropped." in done.stderr
    assert "Do not run the command again" not in done.stderr
    exactly_once(sender, set("abcd"[:count]))
    done = sender.submit(*given)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 - count
    exactly_once(sender, set("abcd"))


def killed(sender: Sender, step: int, *given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUNNER, str(step), "submit", *given],
        env={**sender.known, "PYTHONPATH": str(TESTS)},
        cwd=sender.home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_after_a_kill_at_any_moment_the_same_command_drops_each_row_exactly_once(sender, sandbox, folders):
    sender.file("logo.png")
    table(sender, ["name", "product"], ["a", "A"], ["b", "B"])
    given = arguments(sender, "--image", "logo.png", "--folder")
    steps = int(killed(sender, 0, *given, "0").stderr.splitlines()[-1])
    assert steps > 15
    for step in range(1, steps + 1):
        assert killed(sender, step, *given, str(step)).returncode == -signal.SIGKILL
        done = sender.submit(*given, str(step))
        assert done.returncode == 0, done.stderr
        assert sender.submit(*given, str(step)).stdout == ""
    exactly_once(sender, {f"{step}/{name}" for step in range(steps + 1) for name in "ab"})
    assert command_of(folders, "once").returncode == 0
    assert sandbox.report()["requests"] == 2 * (steps + 1)


def test_a_row_that_was_claimed_after_the_kill_is_not_dropped_again(sender, sandbox, folders):
    table(sender, ["name", "product"], ["a", "A"], ["b", "B"])
    given = arguments(sender)
    steps = int(killed(sender, 0, *given, "--folder", "x").stderr.splitlines()[-1])
    for step in range(1, steps + 1):
        folder = f"{step}"
        killed(sender, step, *given, "--folder", folder)
        assert command_of(folders, "once").returncode == 0
        for path in (folders.outbox / folder, folders.archive / folder):
            for name in path.iterdir() if path.exists() else ():
                name.unlink()
        assert sender.submit(*given, "--folder", folder).returncode == 0
    assert command_of(folders, "once").returncode == 0
    assert sandbox.report()["requests"] == 2 * (steps + 1)


def test_if_the_inbox_has_a_file_of_a_rows_image_the_row_is_not_recorded_as_dropped(sender):
    sender.file("logo.png")
    table(sender, ["name", "product"], *([name, name] for name in "abc"))
    (sender.folders.inbox / "b.in1.png").write_bytes(IMAGE)
    given = arguments(sender, "--image", "logo.png")
    done = sender.submit(*given)
    assert done.returncode == 69, done.stderr
    assert "b.in1.png: the inbox has a file of this name" in done.stderr
    assert prompts_only(sender) == ["a"]
    (sender.folders.inbox / "b.in1.png").unlink()
    assert sender.submit(*given).returncode == 0
    exactly_once(sender, set("abc"))


def prompts_only(sender: Sender) -> list[str]:
    return [name.removesuffix(".prompt.txt") for name in sender.dropped() if name.endswith(".prompt.txt")]


# The record


def test_two_runs_at_the_same_time_are_refused(sender):
    table(sender, ["product"], ["Chair"])
    tops = Tops()
    tops.open(str(sender.folders.inbox))
    with lock(str(sender.folders.inbox / RECORD), tops):
        done = sender.submit(*arguments(sender))
    assert (done.returncode, prompts(sender)) == (75, [])
    assert "another imagewatch submit --table is dropping rows into" in done.stderr
    assert sender.submit(*arguments(sender)).returncode == 0


def test_everyone_who_may_write_the_folder_may_write_the_record(sender):
    sender.folders.inbox.chmod(0o3770)
    table(sender, ["product"], ["Chair"])
    assert sender.submit(*arguments(sender)).returncode == 0
    assert stat.S_IMODE((sender.folders.inbox / RECORD).stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "content", [b"\xff\n[]\n{}\n1\nnull\n", b'{"name": 1', b'{"withdrawn": []}\n' + b"[" * 100_000]
)
def test_a_damaged_record_is_read_as_far_as_possible(sender, content):
    (sender.folders.inbox / RECORD).write_bytes(content)
    table(sender, ["product"], ["Chair"])
    assert sender.submit(*arguments(sender)).returncode == 0
    done = sender.submit(*arguments(sender, "--json"))
    assert [one["state"] for one in json.loads(done.stdout)] == ["waiting"]
    for path in sender.folders.inbox.glob("*.prompt.txt"):
        path.unlink()
    done = sender.submit(*arguments(sender, "--json"))
    assert [one["state"] for one in json.loads(done.stdout)] == ["recorded"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_that_is_no_plain_file_is_refused(sender, kind):
    path, outside = sender.folders.inbox / RECORD, sender.home / "outside"
    outside.write_text("secret")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    table(sender, ["product"], ["Chair"])
    done = sender.submit(*arguments(sender))
    assert done.returncode == 74, done.stderr
    assert outside.read_text() == "secret"
    assert not list(sender.folders.inbox.glob("*.prompt.txt"))


def test_a_hostile_record_removes_no_file_outside_of_what_a_run_stages(sender):
    kept = {"victim.prompt.txt", "chair.in1.png", "day.indoors.prompt.txt", "day.in1.png"}
    for name in kept:
        (sender.folders.inbox / name).write_bytes(IMAGE)
    (sender.folders.inbox / ".row-1.prompt.txt").write_text("x")
    lines = [
        {
            "name": "chair",
            "content": "0",
            "staged": [".row-0.png", ".row-1.prompt.txt"],
            "images": ["../victim.prompt.txt"],
        },
        {"name": "v", "content": "0", "staged": ["victim.prompt.txt"], "images": []},
        {
            "name": "day",
            "content": "0",
            "staged": [".row-2.png", ".row-1.prompt.txt"],
            "images": ["day.indoors.prompt.txt"],
        },
    ]
    (sender.folders.inbox / RECORD).write_text("".join(json.dumps(line) + "\n" for line in lines))
    table(sender, ["product"], ["Chair"])
    assert sender.submit(*arguments(sender)).returncode == 0
    assert kept <= set(sender.dropped())
