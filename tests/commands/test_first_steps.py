"""The first problems of new users: a check by root, an inbox of a group, a preset that does not exist."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, command, until
from support.station import Station

from imagewatch.commands import check_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.sandbox import Sandbox

OTHER_USER = 12346
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
as_user = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user, by setpriv"
)


def key_line(folders: Folders) -> tuple[int, dict[str, str]]:
    """The key's line in ``check`` without a key of its own, and the exit code."""
    result = command(folders, "check", "--json", LETTA_API_KEY="")
    (line,) = (line for line in json.loads(result.stdout)["settings"] if line["what"] == "key")
    return result.returncode, line


# The key of the service


@pytest.mark.usefixtures("sandbox")
def test_a_check_beside_a_running_daemon_does_not_report_its_key_as_bad(
    folders: Folders, run: Callable[..., Any]
) -> None:
    run(folders)
    code, line = key_line(folders)
    assert (code, line["verdict"]) == (0, "warn")
    assert "a daemon is running and may have its own systemd credential" in line["why"]


@as_root
def test_a_check_by_root_says_how_to_check_the_key_of_the_services_user(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.state.mkdir()
    os.chown(folders.state, 2, 2)
    name = pwd.getpwuid(2).pw_name
    monkeypatch.setattr(check_settings, "_CREDENTIALS", str(tmp_path))
    (line,) = (line for line in check_settings.settings(folders.config(), {}) if line.what == "key")
    assert line.verdict == "warn"
    assert f"the daemon runs as {name} " in line.why
    assert f"runuser -u {name} -- env CREDENTIALS_DIRECTORY={tmp_path} imagewatch check" in line.why


@pytest.mark.skipif(os.path.lexists("/run/credentials/imagewatch.service"), reason="there is a service")
def test_a_check_beside_a_daemon_that_is_no_service_recommends_its_variables(
    folders: Folders, run: Callable[..., Any]
) -> None:
    run(folders)
    _, line = key_line(folders)
    assert "run this command with the variables that the daemon was started with" in line["why"]
    assert "runuser" not in line["why"]


def test_without_a_daemon_a_check_reports_a_missing_key_as_bad(folders: Folders) -> None:
    assert key_line(folders)[0] == 78
    folders.state.mkdir()
    code, line = key_line(folders)
    assert (code, line["verdict"]) == (78, "bad")


def test_a_configured_key_that_cannot_be_read_is_bad_even_beside_a_running_daemon(
    folders: Folders, run: Callable[..., Any]
) -> None:
    run(folders)
    result = command(folders, "check", LETTA_API_KEY="", IMAGEWATCH_ENDPOINT__API_KEY_FILE="/nonexistent/key")
    assert result.returncode == 78
    assert "/nonexistent/key" in result.stdout


# A folder of a group


@pytest.fixture
def shared(sandbox: Sandbox) -> Iterator[Folders]:
    """Folders that only a group may enter, in a folder that all users may enter."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        made = Folders(Path(top), sandbox.base_url)
        os.chown(made.root, 0, 2)
        made.root.chmod(0o750)
        for path in made.root.iterdir():
            os.chown(path, 0, 2)
            path.chmod(0o2770)
        yield made


def by_other_user(folders: Folders, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ["setpriv", "--reuid", str(OTHER_USER), "--regid", str(OTHER_USER), "--clear-groups", sys.executable]
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
def test_a_user_outside_the_group_gets_the_name_of_the_group(shared: Folders, more: tuple[str, ...]) -> None:
    result = by_other_user(shared, "submit", "A cat", *more)
    assert (result.returncode, result.stdout) == (74, "")
    group = grp.getgrgid(2).gr_name
    assert (
        result.stderr.splitlines()[1] == f"  ask the administrator to add you to the group {group}, then log in again"
    )
    assert "ermission denied" in result.stderr
    assert "no such inbox" not in result.stderr
    assert shared.names("inbox") == []


@as_user
def test_a_folder_on_the_command_line_that_the_user_may_not_enter_is_no_usage_error(shared: Folders) -> None:
    shared.environ = {}
    result = by_other_user(shared, "submit", "--root", str(shared.root), "A cat")
    assert result.returncode == 74
    assert f"permission denied: {shared.inbox}" in result.stderr
    assert f"to the group {grp.getgrgid(2).gr_name}, then log in again" in result.stderr


@as_user
@pytest.mark.parametrize("name", ["check", "submit", "status"])
def test_a_configuration_that_may_not_be_read_is_no_usage_error(shared: Folders, name: str) -> None:
    path = shared.root.parent / "imagewatch.toml"
    path.write_text("")
    path.chmod(0o600)
    result = by_other_user(shared, name, "--config", str(path), *(["A cat"] if name == "submit" else []))
    assert result.returncode == 78
    assert f": {path}\n" in result.stderr
    assert "ermission denied" in result.stderr
    assert "--help" not in result.stderr


@as_user
def test_history_does_not_report_an_inaccessible_ledger_as_empty(shared: Folders) -> None:
    shared.state.mkdir(mode=0o700)
    result = by_other_user(shared, "history")
    assert result.returncode == 74
    assert f"permission denied: {shared.state}" in result.stderr
    assert "nothing was made" not in result.stderr


def test_a_check_before_the_first_start_does_not_ignore_files_that_will_be_claimed(folders: Folders) -> None:
    folders.outbox.rmdir()
    folders.prompt("poster/cat", "A cat")
    lines = {line["what"]: line["verdict"] for line in json.loads(command(folders, "check", "--json").stdout)["files"]}
    assert lines["poster/cat.prompt.txt"] in {"take", "wait"}


@as_user
def test_a_user_who_may_enter_but_not_write_gets_the_same_message(shared: Folders) -> None:
    shared.root.chmod(0o755)
    result = by_other_user(shared, "submit", "A cat")
    assert f"permission denied: {shared.inbox}" in result.stderr
    assert f"to the group {grp.getgrgid(2).gr_name}," in result.stderr
    shared.inbox.chmod(0o755)  # not even the group may write
    result = by_other_user(shared, "submit", "A cat")
    assert "ask the administrator to give you access to this folder" in result.stderr


@as_user
def test_check_and_estimate_do_not_report_an_inaccessible_folder_as_missing(shared: Folders) -> None:
    result = by_other_user(shared, "check")
    lines = {line.split()[1]: line for line in result.stdout.splitlines()}
    assert f"{shared.inbox}: permission denied (ask the administrator to add you to the group" in lines["inbox"]
    result = by_other_user(shared, "estimate")
    assert (result.returncode, "permission denied" in result.stderr) == (74, True)


@as_user
def test_folders_that_a_user_cannot_create_are_reported_with_the_key_to_set(shared: Folders) -> None:
    shared.environ |= {
        "IMAGEWATCH_FOLDERS__ROOT": "/srv/not-created",
        "IMAGEWATCH_FOLDERS__STATE": "/srv/nor-this",
    }
    result = by_other_user(shared, "check")
    assert result.returncode == 78
    assert "set root in the configuration to a folder of yours" in result.stdout


# Presets


def test_a_preset_that_does_not_exist_is_reported_with_those_that_do(tmp_path: Path, sandbox: Sandbox) -> None:
    sizes = {"presets__poster__size": "1024x1536", "presets__banner__size": "1536x1024"}
    station = Station(tmp_path, sandbox.base_url, **sizes)
    station.prompt("cat", "+++\npreset = 'x'\n+++\nA cat")
    station.work()
    station.close()
    (problem,) = station.error("cat")["problems"]
    reload = "reload or restart the daemon if you have just added it"
    assert problem == f'preset: there is no preset "x" (known presets: banner, poster; {reload})'


def test_a_command_that_reads_the_presets_itself_does_not_recommend_a_reload(tmp_path: Path, sandbox: Sandbox) -> None:
    folders = Folders(tmp_path, sandbox.base_url, presets__poster__size="1024x1536")
    done = command(folders, "submit", "--preset", "poter", "A cat")
    assert done.returncode == 64
    assert 'there is no preset "poter" (did you mean "poster"?)' in done.stderr


def test_check_says_if_the_configuration_is_newer_than_the_daemon(
    folders: Folders, run: Callable[..., Any], tmp_path: Path
) -> None:
    def line() -> dict[str, str]:
        (found,) = (
            one
            for one in json.loads(command(folders, "check", "--json").stdout)["settings"]
            if one["what"] == "configuration"
        )
        return found

    file = tmp_path / "imagewatch.toml"
    file.write_text("[presets.poster]\nn = 2\n")
    folders.environ["IMAGEWATCH_CONFIG"] = str(file)
    at = time.time()
    os.utime(file, (at - 60, at - 60))
    daemon = run(folders)
    until((folders.state / "status.json").exists)
    assert line() == {"verdict": "ok", "what": "configuration", "why": str(file)}
    os.utime(file, (at + 60, at + 60))
    assert "after the daemon started; unless it was reloaded since, it is not in use yet" in line()["why"]
    daemon.stop()
    assert line()["why"] == str(file)


# Missing files


def test_no_message_recommends_pay_again_for_a_missing_prompt(folders: Folders, run: Callable[..., Any]) -> None:
    folders.prompt("cat", "a cat [sandbox: drop]")
    assert command(folders, "once").returncode == 1
    assert folders.error("cat")["charged"] == "unknown"
    result = command(folders, "retry", "cat")
    assert "then use --pay-again" in result.stderr
    (folders.errors / "cat.prompt.txt").unlink()
    result = command(folders, "retry", "cat")
    assert result.returncode == 1
    assert "--pay-again" not in result.stderr
    assert "its prompt is missing, so it cannot be sent again" in result.stderr
    result = command(folders, "retry", "cat", "--pay-again")
    assert (result.returncode, "the prompt of this error file is missing" in result.stderr) == (1, True)


def test_an_error_file_without_its_prompt_does_not_recommend_pay_again(
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
        result = command(folders, *arguments)
        assert (result.returncode, "not an error file of ours" in result.stderr) == (1, False)
