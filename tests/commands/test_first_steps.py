"""What people meet first: a check by root, an inbox of a group, a preset that does not exist."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, command, until
from support.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.sandbox import Sandbox

STRANGER = 12346
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
as_user = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be somebody else, by setpriv"
)


def key_line(folders: Folders) -> tuple[int, dict[str, str]]:
    """What ``check`` without a key of its own says of the key, and its exit code."""
    told = command(folders, "check", "--json", LETTA_API_KEY="")
    (line,) = (line for line in json.loads(told.stdout)["settings"] if line["what"] == "key")
    return told.returncode, line


# The key of the service


@pytest.mark.usefixtures("sandbox")
def test_a_check_beside_a_running_daemon_does_not_call_its_key_bad(folders: Folders, run: Callable[..., Any]) -> None:
    run(folders)
    code, line = key_line(folders)
    assert (code, line["verdict"]) == (0, "warn")
    assert "a daemon is running and may have its own systemd credential" in line["why"]


@as_root
def test_a_check_by_root_says_how_to_check_the_key_of_the_services_user(folders: Folders) -> None:
    folders.state.mkdir()
    os.chown(folders.state, 2, 2)
    name = pwd.getpwuid(2).pw_name
    code, line = key_line(folders)
    assert (code, line["verdict"]) == (0, "warn")
    assert f"the daemon runs as {name} " in line["why"]
    assert f"runuser -u {name} -- env CREDENTIALS_DIRECTORY=/run/credentials/imagewatch.service" in line["why"]


def test_without_a_daemon_a_check_without_a_key_is_bad(folders: Folders) -> None:
    assert key_line(folders)[0] == 78
    folders.state.mkdir()
    code, line = key_line(folders)
    assert (code, line["verdict"]) == (78, "bad")


def test_a_key_that_is_set_and_cannot_be_read_is_bad_beside_a_running_daemon_too(
    folders: Folders, run: Callable[..., Any]
) -> None:
    run(folders)
    told = command(folders, "check", LETTA_API_KEY="", IMAGEWATCH_ENDPOINT__API_KEY_FILE="/nonexistent/key")
    assert told.returncode == 78
    assert "/nonexistent/key" in told.stdout


# A folder of a group


@pytest.fixture
def shared(sandbox: Sandbox) -> Iterator[Folders]:
    """Folders that only a group may enter, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        made = Folders(Path(top), sandbox.base_url)
        os.chown(made.root, 0, 2)
        made.root.chmod(0o750)
        for path in made.root.iterdir():
            os.chown(path, 0, 2)
            path.chmod(0o2770)
        yield made


def by_stranger(folders: Folders, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ["setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups", sys.executable]
    return subprocess.run(
        [*program, "-m", "imagewatch", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "200", **folders.environ},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


@as_user
@pytest.mark.parametrize("more", [(), ("--wait",), ("--folder", "new")])
def test_a_user_outside_the_group_is_told_which_group_it_is(shared: Folders, more: tuple[str, ...]) -> None:
    told = by_stranger(shared, "submit", "A cat", *more)
    assert (told.returncode, told.stdout) == (74, "")
    group = grp.getgrgid(2).gr_name
    assert told.stderr.splitlines()[1] == f"  ask the administrator to add you to the group {group}, then log in again"
    assert "ermission denied" in told.stderr
    assert "no such inbox" not in told.stderr
    assert shared.names("inbox") == []


@as_user
def test_a_folder_that_is_named_on_the_command_line_is_no_usage_error_for_who_may_not_enter_it(shared: Folders) -> None:
    shared.environ = {}
    told = by_stranger(shared, "submit", "--root", str(shared.root), "A cat")
    assert told.returncode == 74
    assert f"permission denied: {shared.inbox}" in told.stderr
    assert f"to the group {grp.getgrgid(2).gr_name}, then log in again" in told.stderr


@as_user
@pytest.mark.parametrize("name", ["check", "submit", "status"])
def test_a_configuration_that_may_not_be_read_is_no_usage_error(shared: Folders, name: str) -> None:
    path = shared.root.parent / "imagewatch.toml"
    path.write_text("")
    path.chmod(0o600)
    told = by_stranger(shared, name, "--config", str(path), *(["A cat"] if name == "submit" else []))
    assert told.returncode == 78
    assert f": {path}\n" in told.stderr
    assert "ermission denied" in told.stderr
    assert "--help" not in told.stderr


@as_user
def test_history_does_not_say_of_a_hidden_ledger_that_nothing_was_made(shared: Folders) -> None:
    shared.state.mkdir(mode=0o700)
    told = by_stranger(shared, "history")
    assert told.returncode == 74
    assert f"permission denied: {shared.state}" in told.stderr
    assert "nothing was made" not in told.stderr


def test_a_check_before_the_first_start_does_not_ignore_what_will_be_taken(folders: Folders) -> None:
    folders.outbox.rmdir()
    folders.prompt("poster/cat", "A cat")
    lines = {line["what"]: line["verdict"] for line in json.loads(command(folders, "check", "--json").stdout)["files"]}
    assert lines["poster/cat.prompt.txt"] in {"take", "wait"}


@as_user
def test_one_who_may_enter_and_not_write_is_told_the_same(shared: Folders) -> None:
    shared.root.chmod(0o755)
    told = by_stranger(shared, "submit", "A cat")
    assert f"permission denied: {shared.inbox}" in told.stderr
    assert f"to the group {grp.getgrgid(2).gr_name}," in told.stderr
    shared.inbox.chmod(0o755)  # not even the group may write
    told = by_stranger(shared, "submit", "A cat")
    assert "ask the administrator to give you access to this folder" in told.stderr


@as_user
def test_check_and_estimate_do_not_say_that_a_hidden_folder_is_not_there(shared: Folders) -> None:
    told = by_stranger(shared, "check")
    lines = {line.split()[1]: line for line in told.stdout.splitlines()}
    assert f"{shared.inbox}: permission denied (ask the administrator to add you to the group" in lines["inbox"]
    told = by_stranger(shared, "estimate")
    assert (told.returncode, "permission denied" in told.stderr) == (74, True)


@as_user
def test_folders_that_a_user_cannot_make_are_told_with_the_key_to_set(shared: Folders) -> None:
    shared.environ |= {
        "IMAGEWATCH_FOLDERS__ROOT": "/srv/nobody-made-this",
        "IMAGEWATCH_FOLDERS__STATE": "/srv/nor-this",
    }
    told = by_stranger(shared, "check")
    assert told.returncode == 78
    assert "set root in the configuration to a folder of yours" in told.stdout


# Presets


def test_a_preset_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path, sandbox: Sandbox) -> None:
    sizes = {"presets__poster__size": "1024x1536", "presets__banner__size": "1536x1024"}
    station = Station(tmp_path, sandbox.base_url, **sizes)
    station.prompt("cat", "+++\npreset = 'x'\n+++\nA cat")
    station.work()
    station.close()
    (problem,) = station.error("cat")["problems"]
    assert problem == 'preset: there is no preset "x" (known presets: banner, poster)'


# What is not there any more


def test_nothing_recommends_to_pay_again_for_a_prompt_that_is_missing(
    folders: Folders, run: Callable[..., Any]
) -> None:
    folders.prompt("cat", "a cat [sandbox: drop]")
    assert command(folders, "once").returncode == 1
    assert folders.error("cat")["charged"] == "unknown"
    told = command(folders, "retry", "cat")
    assert "then use --pay-again" in told.stderr
    (folders.errors / "cat.prompt.txt").unlink()
    told = command(folders, "retry", "cat")
    assert told.returncode == 1
    assert "--pay-again" not in told.stderr
    assert "its prompt is missing, so it cannot be sent again" in told.stderr
    told = command(folders, "retry", "cat", "--pay-again")
    assert (told.returncode, "the prompt of this error file is missing" in told.stderr) == (1, True)


def test_an_error_file_without_its_prompt_does_not_say_to_pay_again(
    folders: Folders, sandbox: Sandbox, run: Callable[..., Any]
) -> None:
    sandbox.hold()
    folders.prompt("cat", "a cat [sandbox: drop]")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, timeout=20)
    (claimed,) = (folders.inbox / ".imagewatch").glob("*/cat.prompt.txt")
    claimed.unlink()
    sandbox.release()
    until(lambda: folders.finished() == {"cat": "errors"})
    assert daemon.stop() == 0
    error = folders.error("cat")
    assert (error["charged"], "originals" in error) == ("unknown", False)
    assert "pay-again" not in error["next"]
    assert "nothing can be sent again" in error["next"]
    for arguments in (("retry", "cat"), ("retry", "cat", "--pay-again")):
        told = command(folders, *arguments)
        assert (told.returncode, "not an error file of ours" in told.stderr) == (1, False)
