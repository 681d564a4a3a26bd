"""The commands from outside: output, side effects and exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from typing import TYPE_CHECKING

import click
import pytest
from PIL import Image
from support.daemon import KEY, Folders, report_output, run_reported, until
from support.scripted import Scripted, responding

from imagewatch import __version__
from imagewatch.commands.main import COMMANDS, cli, load_command
from imagewatch.config.load import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_png = io.BytesIO()
Image.new("RGB", (64, 64), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
HOSTILE = os.fsdecode(b"x\x1b[31m\n\r\x07\xe2\x80\xae\xc2\x9b\xff")
"""ESC, line ends, a bell, a bidirectional override, a C1 control and a byte that is not UTF-8."""
RAW = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xe2\x80\xae|\xc2\x9b|\xff")
"""The characters that must not reach a terminal, except our own line ends and tabs."""
COLORS = re.compile(rb"\x1b\[[0-9;?]*[mKlhJ]")


def imagewatch(
    *arguments: str, environ: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for its end."""
    return run_reported(
        [sys.executable, "-m", "imagewatch", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "80", **(environ or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="surrogateescape",
    )


def on_a_terminal(*arguments: str, environ: dict[str, str]) -> tuple[int, bytes]:
    """Run a command whose output is a terminal; return its exit code and output."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "imagewatch", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TERM": "xterm", **environ},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    written = b""
    try:
        while piece := os.read(master, 65536):
            written += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(master)
    code = process.wait(30)
    report_output(process.args, code, written)
    return code, written


def lines(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def tree(top: Path) -> dict[str, object]:
    """All files below a folder: names, contents, times."""
    found: dict[str, object] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found


# Help and messages


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_describes_its_command_and_all_options(name):
    arguments = [name] if name else []
    done = imagewatch(*arguments, "--help")
    command = load_command(name) if name else cli
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == imagewatch(*arguments, "-h").stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "..." not in done.stdout.split("\n", 1)[1], "no sentence is cut"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in done.stdout
            assert parameter.help
            assert parameter.help[0].isupper()
            assert not parameter.help.endswith(".")
        else:
            assert parameter.human_readable_name.strip("[]….") in command.help, "arguments are described only here"
    assert not re.search(r"\b(TEXT|INTEGER|FLOAT)\b", done.stdout), "a newcomer thinks of a key, not of a type"


def test_the_main_help_names_every_command_and_every_exit_code():
    done = imagewatch("--help")
    for name in COMMANDS:
        assert re.search(
            rf"^  {name} +{re.escape(load_command(name).get_short_help_str(100))}$", done.stdout, re.MULTILINE
        )
    for code in (0, 1, 64, 69, 74, 75, 78):
        assert re.search(rf"^    {code} ", done.stdout, re.MULTILINE)


def test_the_version_is_printed():
    assert imagewatch("--version").stdout == f"imagewatch {__version__}\n"


def test_help_and_version_load_nothing_heavy():
    loaded = """
import contextlib, sys
from imagewatch.commands.main import cli
for option in ("--help", "--version"):
    cli.main([option], standalone_mode=False)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    commands = {f"imagewatch.commands.{module}" for module, _ in COMMANDS.values()}
    modules = set(done.stdout.splitlines()[-1].split())
    assert "imagewatch.commands.main" in modules
    assert not modules & {*commands, "httpx", "PIL", "structlog", "sqlite3", "psycopg"}


@pytest.mark.parametrize("command", ["--version", "check", "once"])
def test_without_the_extra_for_postgresql_commands_work_as_before(folders, command):
    folders.prompt("cat", "A cat")
    script = "import sys; sys.modules['psycopg'] = None; from imagewatch.__main__ import main; main()"
    environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), **folders.environ}
    done = subprocess.run(
        [sys.executable, "-c", script, command],
        env=environ,
        cwd=folders.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_commands_has_the_help_of_each_command(name):
    assert COMMANDS[name][1] == load_command(name).get_short_help_str(100)
    assert load_command(name).name == name


# Exit codes


def test_once_exits_with_0_if_every_prompt_was_completed(folders):
    folders.prompt("cat", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert (done.returncode, folders.finished()) == (0, {"cat": "outbox"})


def test_once_exits_with_0_if_there_is_nothing_to_do(folders):
    assert imagewatch("once", environ=folders.environ).returncode == 0


def test_once_exits_with_1_if_one_prompt_failed_and_completes_the_others(folders):
    folders.prompt("bad", "+++\nn = 9\n+++\nx")
    folders.prompt("good", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert (done.returncode, folders.finished()) == (1, {"bad": "errors", "good": "outbox"})


@pytest.mark.parametrize(
    "wrong",
    [
        ["frobnicate"],
        ["run", "--frobnicate"],
        ["check", "one"],
        ["run", "--config"],
        [],
        ["sandbox", "--port", "many"],
        ["sandbox", "--port", "65536"],
        ["sandbox", "--latency", "nan"],
        ["sandbox", "--latency", "1e300"],
        ["sandbox", "--latency", "-1"],
        ["submit", "A cat", "--wait", "--timeout", "nan"],
        ["history", "--limit", "99999999999999999999"],
        ["history", "--days", "99999999999999999999"],
    ],
)
def test_a_wrong_command_line_exits_with_64_and_names_the_help(wrong):
    done = imagewatch(*wrong)
    assert (done.returncode, done.stdout) == (64, "")
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("count", [1, 3])
def test_once_exits_with_69_if_the_api_is_unreachable_and_all_prompts_stay(tmp_path, count):
    folders = Folders(tmp_path, "http://127.0.0.1:9", inbox__settle_seconds="0.1")
    for number in range(count):
        folders.prompt(f"p{number}", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert done.returncode == 69
    assert "on hold (unreachable" in done.stderr
    assert f"{count} prompt" in done.stderr.splitlines()[-2]
    assert "check the network" in done.stderr.splitlines()[-1]
    assert len(folders.names("inbox")) == count
    assert folders.leftovers() == []


def test_once_exits_with_69_without_credits_if_prompts_remain(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="2")
    sandbox.balance = 0
    for number in range(6):
        folders.prompt(f"p{number}", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert (done.returncode, list(folders.finished().values())) == (69, ["errors"])
    assert "Not enough credits" in done.stderr
    assert "5 prompts left in the inbox" in done.stderr


def test_once_exits_with_74_without_disk_space_and_claims_nothing(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__min_free_bytes=str(1 << 60))
    folders.prompt("cat", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert (done.returncode, folders.names("inbox")) == (74, ["cat.prompt.txt"])
    assert "min_free_bytes" in done.stderr


def test_a_folder_that_cannot_be_created_exits_with_74(folders, tmp_path):
    (tmp_path / "file").write_text("")
    folders.environ["IMAGEWATCH_FOLDERS__OUTBOX"] = str(tmp_path / "file/outbox")
    done = imagewatch("run", environ=folders.environ)
    assert done.returncode == 74
    assert "file/outbox" in done.stderr
    assert "Traceback" not in done.stderr


def test_once_beside_a_running_daemon_exits_with_75(folders, start):
    start(folders, "run")
    until((folders.state / "status.json").exists)
    assert imagewatch("once", environ=folders.environ).returncode == 75


def test_a_wrong_configuration_exits_with_78_and_names_all_problems(folders, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[inbox]\nsettle_secnds = 1\n[limits]\nconcurrency = "many"\n')
    for command in ("run", "once", "check"):
        done = imagewatch(command, "--config", str(config), environ=folders.environ)
        assert done.returncode == 78
        assert "settle_seconds" in done.stderr, "the nearest key"
        assert "limits.concurrency" in done.stderr
        assert str(config) in done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_configuration_the_message_says_what_to_do(tmp_path):
    done = imagewatch("run", cwd=tmp_path, environ={"HOME": str(tmp_path / "home")})
    assert done.returncode == 78
    assert "no configuration file was found" in done.stderr
    for place in (tmp_path / "imagewatch.toml", tmp_path / "home/.config/imagewatch/config.toml"):
        assert str(place) in done.stderr, "where it was looked for"
    for way in ("imagewatch init", "--config", "IMAGEWATCH_FOLDERS__ROOT"):
        assert way in done.stderr
    assert len(done.stderr.splitlines()) == 2, "its consequences are not reported, too"


def from_nowhere(folders: Folders, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose current folder was removed."""
    folder = folders.root / "ended"
    folder.mkdir()
    script = f'cd {folder} && rmdir {folder} && exec {sys.executable} -m imagewatch "$@"'
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **folders.environ}
    command = ["sh", "-c", script, "sh", *arguments]
    return run_reported(command, env=environ, text=True)


def test_if_the_current_folder_was_removed_a_configuration_with_an_absolute_path_works(folders, tmp_path):
    folders.prompt("cat", "A cat")
    file = tmp_path / "config.toml"
    file.touch()
    done = from_nowhere(folders, "once", "--config", str(file))
    assert (done.returncode, folders.finished()) == (0, {"cat": "outbox"}), done.stderr
    assert from_nowhere(folders, "status", "--config", str(file)).returncode == 0
    assert from_nowhere(folders, "submit", "A dog", "--root", str(folders.root)).returncode == 0
    for wrong in (["status"], ["check", "--config", "config.toml"], ["gallery"]):
        done = from_nowhere(folders, *wrong)
        assert (done.returncode, "the current folder was removed" in done.stderr) == (78, True), done.stderr
        assert "by its whole path" in done.stderr
    for wrong in (
        ["demo"],
        ["submit", "A dog", "--root", "."],
        ["gallery", "--config", str(file), "--output", "x.html"],
    ):
        done = from_nowhere(folders, *wrong)
        assert (done.returncode, "the current folder was removed" in done.stderr) == (64, True), done.stderr


@pytest.mark.parametrize("key_file", ["", "/nowhere/key"])
def test_a_start_without_a_key_immediately_says_so_and_what_to_do(folders, run, key_file):
    del folders.environ["LETTA_API_KEY"]
    if key_file:
        folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_FILE"] = key_file
    daemon = run(folders)
    (line,) = daemon.events("key_missing")
    assert line["level"] == "warning"
    assert (key_file or "no API key is set") in line["reason"]
    assert line["next"]


def test_a_command_for_the_key_is_not_run_before_the_key_is_needed(folders, run, tmp_path):
    del folders.environ["LETTA_API_KEY"]
    folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_COMMAND"] = f"sh -c 'touch {tmp_path}/asked; echo {KEY}'"
    daemon = run(folders)
    assert not (tmp_path / "asked").exists()
    folders.prompt("cat", "A cat")
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert (tmp_path / "asked").exists()
    assert daemon.stop() == 0
    assert [line["event"] for line in daemon.lines if line["level"] == "warning"] == []


def test_commands_work_on_a_terminal_that_is_not_utf_8(folders):
    folders.prompt("käse…", "A cat")
    environ = folders.environ | {"PYTHONIOENCODING": "latin-1:strict"}
    done = imagewatch("check", environ=environ)
    assert (done.returncode, "se\\u2026" in done.stdout) == (0, True)


@pytest.fixture(params=["ASCII", "ISO-8859-1"])
def strange_locale(request, tmp_path) -> dict[str, str]:
    """The environment of a user whose file names are not in UTF-8."""
    if request.param == "ASCII":
        return {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    made = ["localedef", "-i", "en_US", "-f", request.param, str(tmp_path / "en_US.latin1")]
    if not shutil.which("localedef") or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("no such locale can be created here")
    return {"LC_ALL": "en_US.latin1", "LOCPATH": str(tmp_path)}


@pytest.mark.parametrize("program", [[sys.executable, "-m", "imagewatch"], [f"{sys.prefix}/bin/imagewatch"]])
def test_a_prompt_can_name_any_image_in_a_locale_that_is_not_utf_8(folders, strange_locale, program):
    folders.drop("猫.png", IMAGE)
    folders.prompt("käse", '+++\ninput_images = ["猫.png"]\n+++\nA cat')
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **folders.environ, **strange_locale}
    done = run_reported([*program, "once"], env=environ, text=True)
    assert (done.returncode, folders.finished()) == (0, {"käse": "outbox"}), done.stderr
    assert "猫.png" in folders.names("archive")
    folders.prompt("späte", "A cat")
    check = run_reported([*program, "check"], env=environ)
    spelt = "späte".encode("latin-1" if "latin1" in strange_locale["LC_ALL"] else "utf-8")  # click writes no ASCII
    assert spelt in check.stdout, "the terminal is what it was"


# check


def row(output: str, name: str) -> str:
    (found,) = [line for line in output.splitlines() if line.split()[1:2] == [name]]
    return found


def test_check_says_what_will_happen_to_each_file_and_changes_nothing(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url)
    folders.prompt("plain", "A cat")
    folders.prompt("edit", "Make it night")
    folders.drop("edit.png", IMAGE)
    folders.drop("edit.1.png", IMAGE)
    folders.prompt("poster", '+++\nsize = "1024x1536"\nn = 2\n+++\nA poster')
    folders.prompt("typo", '+++\nqualtiy = "high"\nn = 9\n+++\nx')
    folders.prompt("yaml", "---\nn: 2\n---\nx")
    folders.prompt("binary", b"\x00\x01\x02")
    folders.prompt("foreign", "x")
    folders.drop("foreign.gif", b"GIF89a")
    folders.prompt("broken", "x")
    folders.drop("broken.png", IMAGE[:-20])
    folders.prompt("empty", "")
    folders.prompt("waiting", '+++\ninput_images = ["later.png"]\n+++\nx')
    folders.prompt("busy", "x")
    folders.drop(".busy.prompt.txt.swp", "x")
    folders.drop("miss.prompt.txt.txt", "x")
    (folders.inbox / "link.prompt.txt").symlink_to("plain.prompt.txt")
    folders.prompt("sub/deep", "A dog")
    before = tree(tmp_path)
    done = imagewatch("check", environ=folders.environ)
    assert tree(tmp_path) == before
    assert (done.returncode, done.stderr, sandbox.report()["requests"]) == (0, "", 0)

    def result(name: str) -> str:
        return row(done.stdout, f"{name}.prompt.txt")

    expected = {
        "plain": "take .*flux",
        "edit": r"take .*gemini.*edit\.png, edit\.1\.png",
        "poster": "take .*openai.*1024x1536",
        "typo": 'refuse .*qualtiy.*did you mean "quality".*n:',
        "yaml": "refuse .*YAML",
        "binary": "refuse .*NUL",
        "foreign": r"refuse .*foreign\.gif.*png",
        "broken": r"refuse .*broken\.png",
        "empty": "wait .*empty",
        "waiting": r"wait .*waits for later\.png",
        "busy": r"wait .*\.busy\.prompt\.txt\.swp",
        "link": "ignore .*not a plain file",
        "sub/deep": "take .*flux",
    }
    for name, pattern in expected.items():
        assert re.match(pattern, result(name)), result(name)
    assert row(done.stdout, "miss.prompt.txt.txt").startswith("ignore")


def test_check_explains_every_other_file_and_folder_too(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url)
    folders.prompt("cat", '+++\ninput_images = ["logo.png"]\n+++\nMake it night')
    folders.prompt("dog", '+++\ninput_images = ["bone.png", "later.png"]\n+++\nMake it night')
    for name in ("logo.png", "bone.png", "sub/orphan.png", "sub/song.mp3", ".hidden", "cat.png", ".git/config"):
        folders.drop(name, IMAGE)
    (folders.inbox / "notes.md.part").write_text("x")
    (folders.inbox / "#1").mkdir()
    folders.prompt("@Recycle/deleted", "A cat")
    (folders.inbox / "link").symlink_to(tmp_path)
    done = imagewatch("check", environ=folders.environ)
    expected = {
        "cat.prompt.txt": r"take .*gemini.*logo\.png",
        "dog.prompt.txt": r"wait .*waits for later\.png",
        "bone.png": "wait .*an image that a prompt names",
        "sub/orphan.png": "ignore .*an image without a matching prompt",
        "sub/song.mp3": "ignore .*not a prompt",
        ".hidden": "ignore .*hidden",
        ".git": "ignore .*a hidden folder, which is never entered",
        "@Recycle": r"ignore .*recycle bin.*never entered",
        "notes.md.part": "ignore .*a temporary file",
        "#1": "ignore .*a folder whose name begins with",
        "link": "ignore .*a link",
        "watch": r"ok .*(change events, and )?a scan every \d+ s",
    }
    for name, pattern in expected.items():
        assert re.match(pattern, row(done.stdout, name)), row(done.stdout, name)


def test_check_says_how_long_a_new_prompt_has_to_settle(folders):
    folders.environ["IMAGEWATCH_INBOX__SETTLE_SECONDS"] = "3600"
    folders.prompt("cat", "A cat")
    assert re.match(
        "wait .*will be claimed in 3[56].* s if nothing changes",
        row(imagewatch("check", environ=folders.environ).stdout, "cat.prompt.txt"),
    )


def test_check_reports_an_empty_inbox(folders):
    done = imagewatch("check", environ=folders.environ)
    assert "no prompt in the inbox" in done.stdout


def test_check_creates_no_folder_and_says_that_they_will_be_created(tmp_path):
    environ = {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path / "new"), "LETTA_API_KEY": KEY}
    environ["IMAGEWATCH_FOLDERS__STATE"] = str(tmp_path / "state")
    done = imagewatch("check", environ=environ)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    for name in ("inbox", "outbox", "errors", "archive", "state"):
        assert row(done.stdout, name).endswith("(will be created)")


def test_check_exits_with_78_and_names_what_is_wrong(tmp_path, folders):
    for name in ("file", "other"):
        (tmp_path / name).write_text("")
    folders.environ["IMAGEWATCH_FOLDERS__OUTBOX"] = str(tmp_path / "file")
    folders.environ["IMAGEWATCH_FOLDERS__ERRORS"] = str(tmp_path / "other/errors")
    del folders.environ["LETTA_API_KEY"]
    done = imagewatch("check", environ=folders.environ)
    assert done.returncode == 78
    assert "not a folder" in row(done.stdout, "outbox")
    for name in ("outbox", "errors", "key"):
        assert row(done.stdout, name).startswith("bad")
    assert "LETTA_API_KEY" in row(done.stdout, "key")


REFUSED = {
    "a group that is not there": ("OUTBOX__GROUP", "nobody-knows-it", "outbox.group", 'no group "nobody-knows-it"', 78),
    "certificates that are not there": ("ENDPOINT__CA_FILE", "/nowhere.pem", "endpoint.ca_file", "/nowhere.pem", 78),
    "certificates that are none": ("ENDPOINT__CA_FILE", __file__, "endpoint.ca_file", "PEM certificates", 78),
    "a root where no folder can be made": ("FOLDERS__OUTBOX", "/proc/x", "outbox", "use a folder on a disk", 74),
    "too little room": ("LIMITS__MIN_FREE_BYTES", str(1 << 60), "disk", "or lower limits.min_free_bytes", 74),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_finds_everything_that_prevents_or_holds_a_start_and_changes_nothing(folders, tmp_path, case):
    key, value, name, words, code = REFUSED[case]
    folders.environ[f"IMAGEWATCH_{key}"] = value
    folders.prompt("cat", "A cat")
    before = tree(tmp_path)
    done = imagewatch("check", environ=folders.environ)
    assert (done.returncode, tree(tmp_path) == before) == (78, True)
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    assert bad == [row(done.stdout, name)]
    assert words in bad[0]
    started = imagewatch("once", environ=folders.environ)
    assert (started.returncode, folders.names("inbox")) == (code, ["cat.prompt.txt"])


def test_check_checks_disk_space_where_the_folders_will_be_created(tmp_path):
    environ = {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path / "new/root"), "LETTA_API_KEY": KEY}
    environ |= {"IMAGEWATCH_FOLDERS__STATE": str(tmp_path / "state"), "IMAGEWATCH_LIMITS__MIN_FREE_BYTES": str(1 << 60)}
    done = imagewatch("check", environ=environ)
    assert (done.returncode, list(tmp_path.iterdir())) == (78, [])
    assert f": {tmp_path}" in row(done.stdout, "disk")


@pytest.mark.parametrize("name", ["run", "once"])
def test_a_section_that_is_refused_at_the_start_is_reported_with_its_file(tmp_path, name):
    config = tmp_path / "mine.toml"
    config.write_text('[folders]\nroot = "root"\nstate = "state"\n[outbox]\ngroup = "nobody-knows-it"\n')
    done = imagewatch(name, "--config", str(config), environ={"LETTA_API_KEY": KEY})
    assert done.returncode == 78
    assert f"the configuration cannot be used: {config}\n" in done.stderr
    assert 'outbox.group: there is no group "nobody-knows-it" (create it' in done.stderr


@pytest.mark.parametrize("source", ["environment", "file", "command"])
def test_check_says_where_the_key_comes_from_and_never_shows_it(folders, tmp_path, source):
    if source != "environment":
        del folders.environ["LETTA_API_KEY"]
    if source == "file":
        (tmp_path / "key").write_text(KEY)
        folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_FILE"] = str(tmp_path / "key")
    if source == "command":
        config = tmp_path / "config.toml"
        config.write_text(f'[endpoint]\napi_key_command = ["echo", "{KEY}"]\n')
    arguments = ["--config", str(tmp_path / "config.toml")] if source == "command" else []
    done = imagewatch("check", *arguments, environ=folders.environ)
    assert done.returncode == 0, done
    assert row(done.stdout, "key").startswith("ok")
    assert KEY not in done.stdout + done.stderr


def test_check_warns_of_a_key_file_that_others_may_read(folders, tmp_path):
    del folders.environ["LETTA_API_KEY"]
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_FILE"] = str(tmp_path / "key")
    assert "; but " in row(imagewatch("check", environ=folders.environ).stdout, "key")


def test_check_works_beside_a_running_daemon(folders, start):
    daemon = start(folders, "run")
    until((folders.state / "status.json").exists)
    assert imagewatch("check", environ=folders.environ).returncode == 0
    assert daemon.stop() == 0


# init


def test_init_writes_a_configuration_that_names_no_folder_and_overwrites_nothing(tmp_path):
    done = imagewatch("init", cwd=tmp_path)
    path = tmp_path / "imagewatch.toml"
    assert (done.returncode, "imagewatch check --config imagewatch.toml" in done.stdout) == (0, True)
    for step in ("Set root, the folder to watch,", "export LETTA_API_KEY=", "api_key_file", "api_key_command"):
        assert step in done.stdout, "a key in the file itself would be refused"
    assert load(str(path), {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path / "root")}).limits.concurrency == 4
    path.write_text("mine")
    again = imagewatch("init", "--root", "watched", cwd=tmp_path)
    assert (again.returncode, path.read_text()) == (64, "mine")
    assert "the file already exists" in again.stderr
    other = imagewatch("init", "other.toml", cwd=tmp_path)
    assert (other.returncode, tomllib.loads((tmp_path / "other.toml").read_text()) is not None) == (0, True)


@pytest.mark.parametrize("command", ["run", "once", "check"])
def test_nothing_starts_without_a_configured_folder(tmp_path, command):
    imagewatch("init", cwd=tmp_path)
    done = imagewatch(command, environ={"LETTA_API_KEY": KEY, "HOME": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 78
    assert "folders.root: is not set" in done.stderr
    assert 'set root = "' in done.stderr
    assert len(done.stderr.splitlines()) == 2, "one fault, one line"
    assert [path.name for path in tmp_path.iterdir()] == ["imagewatch.toml"]


@pytest.mark.parametrize("root", ["watched", "../Fotos \"A\" 'b' \\c ü", "~/Pictures/imagewatch"])
def test_the_folder_that_is_passed_to_init_is_watched(tmp_path, root):
    here = tmp_path / "here"
    here.mkdir()
    done = imagewatch("init", "--root", root, "sub.toml", cwd=here)
    assert (done.returncode, "Set root" in done.stdout) == (0, False), done.stderr
    text = (here / "sub.toml").read_text()
    folders = load(str(here / "sub.toml"), {"HOME": str(tmp_path / "home")}).folders
    expected = os.path.normpath(here / root) if root[0] != "~" else f"{tmp_path}/home/Pictures/imagewatch"
    assert (folders.root, folders.inbox) == (expected, f"{expected}/inbox")
    assert "/srv/imagewatch" not in text
    uncommented = tomllib.loads(re.sub(r"^# (inbox|outbox|errors|archive) = ", r"\1 = ", text, flags=re.MULTILINE))
    assert uncommented["folders"]["errors"] == uncommented["folders"]["root"] + "/errors"


@pytest.mark.parametrize("root", ["", " ", "a\nb", "\x1b[31m"])
def test_a_folder_name_that_toml_cannot_contain_is_refused_and_nothing_is_written(tmp_path, root):
    done = imagewatch("init", "--root", root, cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (64, [])
    assert "--root FOLDER" in done.stderr


def test_init_asks_for_the_folder_on_a_terminal(tmp_path):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "imagewatch", "init"],
        cwd=tmp_path,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(slave)
    os.write(master, b"watched\n")
    out, err = process.communicate(timeout=30)
    report_output(process.args, process.returncode, out, err)
    os.close(master)
    assert (process.returncode, "Folder to watch" in err, "Set root" in out) == (0, True, False)
    assert load(str(tmp_path / "imagewatch.toml"), {}).folders.root == str(tmp_path / "watched")


def test_the_file_that_init_wrote_works_after_its_folder_is_set(tmp_path, sandbox):
    imagewatch("init", "--root", "root", cwd=tmp_path)
    environ = {
        "LETTA_BASE_URL": sandbox.base_url,
        "LETTA_API_KEY": KEY,
        "IMAGEWATCH_FOLDERS__STATE": str(tmp_path / "state"),
    }
    done = imagewatch("check", environ=environ, cwd=tmp_path)
    assert done.returncode == 0, done
    assert str(tmp_path / "imagewatch.toml") in done.stdout


def test_init_reports_a_folder_that_cannot_be_written(tmp_path):
    done = imagewatch("init", str(tmp_path / "no/such/folder.toml"))
    assert (done.returncode, "Traceback" in done.stderr) == (74, False)
    assert "create its folder first" in done.stderr


# once


def test_once_shows_a_progress_bar_and_then_the_failures_on_a_terminal(folders):
    for number in range(4):
        folders.prompt(f"p{number}", "A cat")
    folders.prompt("typo", "+++\nqualtiy = 1\n+++\nx")
    code, shown = on_a_terminal("once", environ=folders.environ)
    text = COLORS.sub(b"", shown).decode()
    assert code == 1
    assert "[####" in text
    assert "5/5" in text
    assert "4 completed for 120 credits, 1 failed." in text
    assert "typo.prompt.txt: qualtiy: unknown key" in text
    assert f"    {folders.errors}/typo.error.toml" in text
    assert not lines(text)


def test_once_prints_every_problem_of_a_prompt_on_a_terminal(folders):
    folders.prompt("typo", "+++\nqualtiy = 1\nn = 9\n+++\nx")
    code, shown = on_a_terminal("once", environ=folders.environ)
    text = COLORS.sub(b"", shown).decode().replace("\r", "")
    assert code == 1
    assert "  typo.prompt.txt: 2 problems\n" in text
    for problem in folders.error("typo")["problems"]:
        assert f"    {problem}\n" in text


def test_once_writes_json_lines_without_a_terminal(folders):
    folders.prompt("cat", "A cat")
    done = imagewatch("once", environ=folders.environ)
    assert done.stdout == ""
    assert all(line.startswith("{") for line in done.stderr.splitlines())
    assert [line["event"] for line in lines(done.stderr)] == ["started", "completed"]


def test_once_reports_to_programs_the_result_of_each_prompt_and_what_remains(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="1")
    folders.prompt("a", "+++\nqualtiy = 1\nn = 9\n+++\nx")
    folders.prompt("b", "[sandbox: 402] A cat")
    folders.prompt("c", "A cat")
    done = imagewatch("once", "--json", environ=folders.environ)
    result = json.loads(done.stdout)
    by_source = {job["source"]: job for job in result["jobs"]}
    assert done.returncode == 69
    assert by_source["a.prompt.txt"]["problems"] == folders.error("a")["problems"]
    assert by_source["a.prompt.txt"]["result_file"] == str(folders.errors / "a.error.toml")
    assert (by_source["b.prompt.txt"]["destination"], by_source["b.prompt.txt"]["charged"]) == ("errors", "no")
    assert (result["left"], result["hold"]["kind"]) == (1, "credits")
    assert "The queue is held" not in done.stderr
    sandbox.balance = 1000
    done = imagewatch("once", "--json", environ=folders.environ)
    (job,) = json.loads(done.stdout)["jobs"]
    assert done.returncode == 0
    assert (job["destination"], job["credits_charged"], job["job"]) == ("outbox", 30, folders.receipt("c")["job"])
    assert job["result_file"] == str(folders.outbox / "c.receipt.toml")
    assert json.loads(imagewatch("once", "--json", environ=folders.environ).stdout) == {
        "jobs": [],
        "left": 0,
        "hold": None,
    }


def test_once_on_a_terminal_prints_a_hold_once_and_in_local_time(tmp_path, sandbox):
    folders = Folders(tmp_path, "http://127.0.0.1:9")
    folders.prompt("cat", "A cat")
    code, shown = on_a_terminal("once", environ=folders.environ)
    text = COLORS.sub(b"", shown).decode()
    assert code == 69
    assert "1 prompt left in the inbox." in text
    assert "was ready" not in text
    assert re.search(r"; next try at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\r?\n", text)


def test_once_completes_a_prompt_that_is_dropped_while_the_last_one_runs(folders, sandbox, start):
    sandbox.hold()
    folders.prompt("cat", "The first")
    running = start(folders, "once")
    assert sandbox.wait_for_requests(1, 20)
    folders.prompt("cat", "The second")
    later = folders.drop("later.txt", "")  # once it is known, the daemon has noticed what came before it
    until(lambda: json.loads((folders.state / "status.json").read_text())["ignored"]["count"] == 1)
    later.unlink()
    sandbox.release()
    assert running.wait() == 0
    assert sorted(folders.finished().values()) == ["outbox", "outbox"]
    assert folders.names("inbox") == []


# demo and sandbox


def test_the_demo_ends_soon_its_figures_agree_and_a_second_one_uses_another_folder(tmp_path):
    first = imagewatch("demo", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    second = imagewatch("demo", cwd=tmp_path)
    assert second.returncode == 0
    for done, name in ((first, "imagewatch-demo"), (second, "imagewatch-demo-2")):
        receipts = [tomllib.loads(path.read_text()) for path in (tmp_path / name / "outbox").glob("*.receipt.toml")]
        spent = sum(receipt["credits_charged"] for receipt in receipts)
        assert (
            f"Receipts: {spent:g} credits. The endpoint counted {spent:g} for {len(receipts)} requests." in done.stdout
        )
        for receipt in receipts:
            for image in receipt["images"]:
                assert f"outbox/{image['file']}" in done.stdout
                assert (tmp_path / name / "outbox" / image["file"]).stat().st_size == image["bytes"]
        assert len(list((tmp_path / name / "errors").glob("*.error.toml"))) == 2
        assert str(tmp_path / name / "outbox") in done.stdout
        assert (tmp_path / name / "gallery.html").as_uri() in done.stdout
        assert "chamber music festival" in (tmp_path / name / "gallery.html").read_text()
        assert list((tmp_path / name / "inbox").glob("*")) == [tmp_path / name / "inbox/.imagewatch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagewatch-demo", "imagewatch-demo-2"]
    steps = ("imagewatch init --root FOLDER", "export LETTA_API_KEY=", "imagewatch check", "imagewatch run")
    assert [first.stdout.index(step) for step in steps] == sorted(first.stdout.index(step) for step in steps)


def test_the_demo_says_why_it_cannot_create_its_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = imagewatch("demo", str(tmp_path / "file/demo"))
    assert (done.returncode, "cannot create the folder" in done.stderr) == (74, True)


def test_the_sandbox_serves_until_ctrl_c(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "imagewatch", "sandbox", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    result = ""
    assert process.stdout is not None
    while "LETTA_BASE_URL=" not in result:
        result += process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", result)[0]
    with urllib.request.urlopen(f"{address}/sandbox/report", timeout=20) as answer:
        assert json.load(answer)["requests"] == 0
    folders = Folders(tmp_path, address)
    folders.prompt("cat", "A cat")
    assert imagewatch("once", environ=folders.environ).returncode == 0
    process.send_signal(signal.SIGINT)
    out, requests = process.communicate(timeout=20)
    report_output(process.args, process.returncode, result, out, requests)
    assert process.returncode == 0
    assert "POST /v1/images/generations 200 30 credits 'A cat'" in requests
    assert "Traceback" not in requests


@pytest.mark.parametrize("options", [[], ["--key", "$let-a-key-of-our-own"]])
def test_the_sandbox_proposes_a_key_that_it_accepts_and_that_is_part_of_no_word(tmp_path, options):
    program = [sys.executable, "-u", "-m", "imagewatch", "sandbox", "--port", "0", *options]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        result = ""
        while "LETTA_API_KEY=" not in result:
            result = process.stdout.readline()
        words = [word.partition("=") for word in shlex.split(result)]
        environ = {name: value for name, sign, value in words if sign}
        folders = Folders(tmp_path, environ["LETTA_BASE_URL"], retry__attempts="1")
        folders.prompt("cat", "A cat [sandbox: 429]")
        imagewatch("once", environ={**folders.environ, **environ})
        process.kill()
    assert folders.error("cat")["message"] == "Too many requests"
    assert options or len(environ["LETTA_API_KEY"]) >= 40


def test_the_sandbox_lists_its_tags_and_reports_a_port_in_use(sandbox):
    assert "402" in imagewatch("sandbox", "--tags").stdout
    done = imagewatch("sandbox", "--port", sandbox.base_url.rpartition(":")[2])
    assert (done.returncode, "cannot listen" in done.stderr, "Traceback" in done.stderr) == (64, True, False)
    assert "--port" in done.stderr
    assert "configuration" not in done.stderr


# Log lines, and text from other people


@contextlib.contextmanager
def failing_stream(fault: str) -> Iterator[int]:
    """A stream that accepts nothing: its disk is full, or its reader has ended."""
    if fault == "full":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stream = os.pipe()
        os.close(reader)
    yield stream
    os.close(stream)


@pytest.mark.parametrize("fault", ["full", "ended"])
def test_a_log_that_cannot_be_written_stops_nothing_and_does_not_change_the_exit_code(tmp_path, sandbox, fault):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="1")
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **folders.environ}
    once = [sys.executable, "-m", "imagewatch", "once"]

    def code(*command: str) -> int:
        with failing_stream(fault) as stream:
            return subprocess.run(command, env=environ, stderr=stream, timeout=40, check=False).returncode

    for stem in ("a", "b"):
        folders.prompt(stem, "A cat")
    assert (code(*once), folders.finished()) == (0, {"a": "outbox", "b": "outbox"})
    folders.prompt("c", "[sandbox: 402] A cat")
    folders.prompt("d", "A cat")
    assert code(*once) == 69, "what it says at the end is lost as well, its code is not"
    assert code(*once[:-1], "no-such-command") == 64
    assert code("sh", "-c", f"exec {' '.join(once)} 2>&-") == 0, "it has no standard error at all"


@pytest.mark.parametrize("fault", ["full", "ended"])
def test_a_daemon_continues_after_the_reader_of_its_log_ended(folders, fault):
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **folders.environ}
    with failing_stream(fault) as stream:
        process = subprocess.Popen([sys.executable, "-m", "imagewatch", "run"], env=environ, stderr=stream)
    try:
        for stem in ("a", "b"):
            folders.prompt(stem, "A cat")
            until(lambda stem=stem: stem in folders.finished() or process.poll() is not None)
        process.terminate()
        assert (process.wait(30), folders.finished()) == (0, {"a": "outbox", "b": "outbox"})
    finally:
        process.kill()
        process.wait(30)


def test_each_finished_job_has_one_complete_line_in_the_log(folders, sandbox):
    folders.prompt("a/cat", "A cat")
    folders.prompt("dog", "[sandbox: 422] A dog")
    folders.prompt("lost", "[sandbox: 502] A lost one")
    folders.prompt("paid", "[sandbox: not-json] A paid one")
    done = imagewatch("once", environ=folders.environ)
    result = {str(line["source"]): line for line in lines(done.stderr) if "charged" in line}
    assert len([line for line in lines(done.stderr) if "charged" in line]) == 4
    assert {source: line["event"] for source, line in result.items()} == {
        "a/cat.prompt.txt": "completed",
        "dog.prompt.txt": "failed",
        "lost.prompt.txt": "unknown",
        "paid.prompt.txt": "failed",
    }
    made = result["a/cat.prompt.txt"]
    assert [*made][:3] == ["timestamp", "level", "event"]
    assert (made["charged"], made["credits"], made["provider"], made["attempts"]) == ("yes", 30, "flux", 1)
    assert made["images"] == ["cat.jpg"]
    assert re.fullmatch("[0-9a-f]{16}", str(made["job"]))
    assert (result["dog.prompt.txt"]["status"], result["dog.prompt.txt"]["charged"]) == (422, "no")
    assert KEY not in done.stderr


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_hostile_file_name_or_response_never_reaches_the_log_raw(tmp_path, form):
    body = json.dumps({"message": f"no: {HOSTILE[:-1]}\x1b]0;owned\x07"}).encode()
    with Scripted(responding(body, b"Content-Type: application/json", status=b"400 Bad Request")) as endpoint:
        folders = Folders(tmp_path, endpoint.base_url, log__format=form)
        folders.prompt(f"good{HOSTILE}", "A cat")
        folders.prompt(f"bad{HOSTILE}", '+++\nprovider = "\\u001b[31m\\u202e"\n+++\nx')
        folders.drop(f"miss{HOSTILE}.prompt.txt.txt", "x")
        (folders.inbox / f"link{HOSTILE}.prompt.txt").symlink_to("nowhere")
        (folders.inbox / f"sub{HOSTILE}").mkdir()
        done = imagewatch("once", environ=folders.environ)
    output = os.fsencode(done.stdout + done.stderr)
    assert done.returncode == 1
    assert not RAW.search(output), RAW.search(output)
    for name in ("good", "bad", "miss", "link"):
        assert name.encode() in output
    error_files = [*folders.errors.glob("*.error.toml")]
    assert len(error_files) == 2
    for path in error_files:
        message = tomllib.loads(path.read_text())["message"]
        assert not RAW.search(os.fsencode(message)), message


def test_a_hostile_file_name_never_reaches_a_terminal_raw(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url)
    folders.prompt(f"good{HOSTILE}", "A cat")
    folders.prompt(f"bad{HOSTILE}", f"+++\n{json.dumps(HOSTILE[:-1])} = 1\n+++\nx")
    folders.prompt(f"sub{HOSTILE}/deep", "A dog")
    folders.drop(f"miss{HOSTILE}.prompt.txt.txt", "x")
    code, shown = on_a_terminal("check", environ=folders.environ)
    assert code == 0
    raw = COLORS.sub(b"", shown).replace(b"\r\n", b"\n")
    assert not RAW.search(raw), raw
    code, shown = on_a_terminal("once", environ=folders.environ)
    assert code == 1
    # Only a progress bar returns to the beginning of its line.
    raw = COLORS.sub(b"", shown).replace(b"\r", b"")
    assert not RAW.search(raw), raw
    for text in (b"\x1b[31m", b"\xe2\x80\xae"):
        assert text not in shown.replace(b"\x1b[31m\xe2\x9c\x97", b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--config", f"/tmp/{HOSTILE}.toml"],
        ["init", f"/nonexistent/{HOSTILE}"],
        ["demo", f"/dev/null/{HOSTILE}"],
        ["check", HOSTILE],
        [HOSTILE],
        ["run", f"--{HOSTILE}"],
    ],
)
def test_a_hostile_argument_is_reported_escaped_and_never_raw(arguments):
    done = imagewatch(*arguments)
    assert done.returncode in {64, 74, 78}
    assert "Traceback" not in done.stderr
    assert not RAW.search(os.fsencode(done.stdout + done.stderr)), done.stderr


# Bugs, and dependencies that are not as expected


def with_modules(folder: Path, **modules: str) -> dict[str, str]:
    """An environment in which Python finds these modules first."""
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def test_a_bug_after_the_work_does_not_look_like_a_failed_job(folders, sandbox, tmp_path):
    folders.prompt("cat", "A cat")
    other = "import click.exceptions\ndel click.exceptions.NoArgsIsHelpError\n"
    done = imagewatch("once", environ={**folders.environ, **with_modules(tmp_path / "other", sitecustomize=other)})
    assert (done.returncode, folders.finished()) == (70, {"cat": "outbox"})
    assert "Traceback" in done.stderr
    *_, what, then = done.stderr.splitlines()
    assert what.startswith("imagewatch: internal error: AttributeError: ")
    assert "check the folders" in then
    assert sandbox.report()["requests"] == 1


def test_a_bug_in_a_paid_job_does_not_look_like_a_failed_job_and_the_next_start_finishes_it(folders, sandbox, tmp_path):
    folders.prompt("cat", "A cat")
    folders.prompt("dog", "[sandbox: 422] A dog")
    other = "def dumps():\n    pass\n"
    done = imagewatch("once", environ={**folders.environ, **with_modules(tmp_path / "other", tomli_w=other)})
    assert (done.returncode, folders.finished()) == (70, {})
    assert "a bug in imagewatch" in done.stderr
    done = imagewatch("once", environ=folders.environ)
    assert (done.returncode, folders.finished()) == (1, {"cat": "outbox", "dog": "errors"})
    assert sandbox.report()["requests"] == 2


@pytest.mark.parametrize(
    "program", [[sys.executable, "-m", "imagewatch"], [sys.executable.rpartition("/")[0] + "/imagewatch"]]
)
def test_a_program_that_cannot_be_loaded_does_not_look_like_a_failed_job(folders, tmp_path, program):
    folders.prompt("cat", "A cat")
    environ = {"PATH": os.environ["PATH"], **folders.environ}
    environ |= with_modules(tmp_path / "other", click="raise ImportError('built for another Python')\n")
    done = run_reported([*program, "once"], env=environ, text=True)
    assert (done.returncode, folders.names("inbox")) == (70, ["cat.prompt.txt"])
    assert "built for another Python" in done.stderr
    assert done.stderr.endswith("imagewatch: the program cannot be loaded\n  install it again, with its dependencies\n")


def test_the_message_of_a_bug_never_reaches_a_terminal_raw(folders, tmp_path):
    other = (
        "import structlog\n"
        "def configure(**_): raise TypeError('\\x1b[31m an end \\u202e\\nand more')\n"
        "structlog.configure = configure\n"
    )
    done = imagewatch("once", environ={**folders.environ, **with_modules(tmp_path / "other", sitecustomize=other)})
    assert (done.returncode, "an end" in done.stderr) == (70, True)
    assert not RAW.search(os.fsencode(done.stdout + done.stderr)), done.stderr


@pytest.mark.parametrize("text", ["A cat", "[sandbox: 422] A cat"])
def test_once_whose_reader_has_ended_does_not_look_like_a_failed_job(folders, text):
    folders.prompt("cat", text)
    environ = {"PATH": os.environ["PATH"], **folders.environ}
    with failing_stream("ended") as stream:
        command = [sys.executable, "-m", "imagewatch", "once", "--json"]
        done = subprocess.run(command, env=environ, stdout=stream, stderr=subprocess.PIPE, timeout=40, check=False)
        report_output(command, done.returncode, done.stderr)
    assert (done.returncode, list(folders.finished())) == (74, ["cat"])
    assert b"Traceback" not in done.stderr


def test_a_bug_is_logged_with_the_end_of_its_traceback_and_without_control_characters():
    script = (
        "import structlog; from imagewatch.system import log\n"
        "def deep(n):\n"
        "    if n: deep(n - 1)\n"
        "    raise ValueError('\\x1b[31m the very end \\u202e')\n"
        "for form in ('json', 'console'):\n"
        "    log.configure('info', form)\n"
        "    try: deep(60)\n"
        "    except ValueError: structlog.get_logger().exception('a bug')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr.count(b"the very end") == 2
    assert not RAW.search(done.stderr)
