"""Output on a terminal: colors if wanted, aligned columns; and the same content for programs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
import structlog
from support.daemon import KEY, Folders, command

from commands.test_cli import on_a_terminal
from imagewatch.commands import terminal
from imagewatch.system import log

COLOR = re.compile(rb"\x1b\[[0-9;]*m")


def once(folders: Folders, code: int) -> None:
    done = command(folders, "once")
    assert done.returncode == code, done.stderr


@pytest.fixture
def mixed(folders: Folders) -> Folders:
    """One completed job, one refused job, and a prompt that waits."""
    folders.prompt("cat", "A cat")
    folders.prompt("dog", "A dog [sandbox: 400]")
    once(folders, 1)
    folders.prompt("owl", "An owl")
    return folders


@pytest.mark.parametrize("arguments", [("check",), ("history",), ("history", "--by", "day"), ("estimate",), ("once",)])
def test_colors_are_used_only_on_a_terminal_and_can_be_turned_off(mixed: Folders, arguments: tuple[str, ...]):
    environ = {**mixed.environ, "NO_COLOR": ""}  # empty counts as unset
    if arguments != ("once",):  # its progress bar has no colors
        assert COLOR.search(on_a_terminal(*arguments, environ=environ)[1])
    code, shown = on_a_terminal(*arguments, environ={**environ, "NO_COLOR": "1"})
    assert code == 0
    assert not COLOR.search(shown)
    assert "\x1b" not in command(mixed, *arguments).stdout


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("wanted", "colored"), [("", True), ("1", False)])
def test_the_colors_of_the_log_on_a_console_can_be_turned_off(wanted: str, colored: bool):
    out = Screen()
    log.configure("info", "auto", out, environ={"NO_COLOR": wanted})
    structlog.get_logger().info("watching")
    assert bool(COLOR.search(out.getvalue().encode())) == colored


def test_columns_are_aligned_whatever_script_a_name_uses(folders: Folders):
    names = {"cat": 3, "灯台": 4, "cafe\u0301": 4, "кот": 3, "e\u0301t" + "e\u0301": 3}
    for name in names:
        folders.prompt(name, "An image")
    for arguments in (("estimate",), ("check",)):
        result = [line for line in command(folders, *arguments).stdout.splitlines() if ".prompt.txt" in line]
        assert len(result) == len(names)
        begins = set()
        for line in result:
            before = unicodedata.normalize("NFC", line[: line.index("flux")])
            begins.add(len(before) + sum("\u4e00" <= letter <= "\u9fff" for letter in before))
        assert len(begins) == 1, result


def test_a_table_aligns_numbers_to_the_right():
    assert list(terminal.lines(("name", "credits"), [("cat", "30"), ("elephant", "5"), ("owl", "")])) == [
        "name      credits",
        "cat            30",
        "elephant        5",
        "owl",
    ]
    assert list(terminal.lines(("name", "credits"), [])) == ["name  credits"]


def test_history_shows_the_message_of_the_api_below_its_job(mixed: Folders):
    result = command(mixed, "history").stdout.splitlines()
    (at,) = [number for number, line in enumerate(result) if line.endswith("  dog")]
    assert "refused" in result[at]
    assert result[at + 1] == "    Your request was rejected by the safety system"


def test_check_reports_the_same_to_programs(mixed: Folders):
    result = command(mixed, "check", "--json")
    found = json.loads(result.stdout)
    assert (result.returncode, found["files"]) == (0, [{"verdict": "take", "what": "owl.prompt.txt", "why": "flux"}])
    assert {line["what"]: line["verdict"] for line in found["settings"]}["key"] == "ok"
    assert KEY not in result.stdout
    result = command(mixed, "check", "--json", LETTA_API_KEY="")
    assert result.returncode == 78
    assert "bad" in {line["verdict"] for line in json.loads(result.stdout)["settings"]}


def test_check_reports_a_hold(mixed: Folders):
    assert not re.search("^wait +queue", command(mixed, "check").stdout, re.MULTILINE)
    command(mixed, "hold", "lunch")
    assert re.search(
        r"^wait +queue +on hold \(manual\): lunch; .*imagewatch release", command(mixed, "check").stdout, re.MULTILINE
    )


def test_retry_reports_the_same_to_programs(folders: Folders):
    folders.prompt("free", "A cat [sandbox: 400]")
    folders.prompt("lost", "A cat [sandbox: drop]")
    once(folders, 1)
    (folders.errors / "foreign.error.toml").write_text("hello")
    result = command(folders, "retry", "--all", "--json")
    found = {os.path.basename(one["result_file"]).partition(".")[0]: one for one in json.loads(result.stdout)}
    assert (result.returncode, result.stderr) == (1, "")
    assert {name: (one["name"], one["charged"], one["retried"]) for name, one in found.items()} == {
        "free": ("free", "no", True),
        "lost": ("lost", "unknown", False),
        "foreign": (None, None, False),
    }
    assert "may have been charged" in found["lost"]["message"]
    assert folders.names("inbox") == ["free.prompt.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", ["check", "history", "submit hello --name full"])
def test_output_that_cannot_be_written_is_reported_in_one_line(mixed: Folders, arguments: str):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "imagewatch", *arguments.split()],
            env={"PATH": os.environ["PATH"], "HOME": str(mixed.root), **mixed.environ},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=40,
            check=False,
        )
    dropped = arguments.startswith("submit")
    assert done.returncode == (69 if dropped else 74)
    assert "imagewatch: cannot write the output: No space left on device\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("full.prompt.txt" in mixed.names("inbox")) == dropped
    assert (f"  {mixed.inbox}/full.prompt.txt\n" in done.stderr) == dropped


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("how", ["a full disk", "a reader that has ended"])
@pytest.mark.parametrize("wait", [(), ("--wait", "--timeout", "0")])
def test_the_exit_code_of_submit_shows_what_was_dropped_if_its_output_is_not_read(
    folders: Folders, how: str, wait: tuple[str, ...]
):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if how == "a full disk" else os.fdopen(write, "w", closefd=True) as nowhere:
        done = subprocess.run(
            [sys.executable, "-m", "imagewatch", "submit", "A cat", *wait],
            env={"PATH": os.environ["PATH"], "HOME": str(folders.root), **folders.environ},
            stdout=nowhere,
            stderr=nowhere,
            timeout=40,
            check=False,
        )
    if how == "a full disk":
        os.close(write)
    assert done.returncode == 69
    assert len(folders.names("inbox")) == 1
