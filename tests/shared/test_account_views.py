"""What commands show of all daemons of an account: real daemons, a real PostgreSQL, the real commands."""

from __future__ import annotations

import csv
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from support.daemon import command, until

from shared.test_account_holds import LONG, Account, account, rows, until_held

if TYPE_CHECKING:
    from pathlib import Path

    from support.daemon import Folders
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

__all__ = ["account"]


def _page(folders: Folders) -> tuple[int, dict[str, Any]]:
    done = command(folders, "status", "--all", "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_status_all_shows_running_stopped_and_killed_daemons_and_the_sums_of_the_account(
    account: Account, postgres: Server
) -> None:
    account.start("one", "two", "three")
    account.prompts(2)
    until(lambda: account.completed() == 6, saw=account.log)
    account.daemons["two"].stop()
    account.daemons["three"].kill()
    rows(postgres, account, "UPDATE imagewatch.instances SET seen_at = seen_at - 11 WHERE name = 'three'")
    code, page = _page(account.folders["one"])
    assert (code, page["account"], page["today"]["completed"]) == (0, "main", 6)
    found = {one["instance"]: one for one in page["instances"]}
    assert {name: one["state"] for name, one in found.items()} == {
        "one": "running",
        "two": "stopped",
        "three": "not_seen",
    }
    assert found["two"]["inbox"] == str(account.folders["two"].inbox)
    assert found["two"]["stopped"]
    text = command(account.folders["two"], "status", "--all").stdout
    assert "account main: 3 daemons" in text
    assert "three: not seen since " in text
    assert "two: stopped since " in text
    assert "one: running" in text
    assert "6 completed" in command(account.folders["one"], "status").stdout
    assert ", account main)" in command(account.folders["one"], "status").stdout


def test_status_all_exits_with_69_while_the_account_or_one_daemon_is_on_hold(
    account: Account, sandbox: Sandbox
) -> None:
    account.start("one", "two")
    assert _page(account.folders["one"])[0] == 0
    assert command(account.folders["two"], "hold", "only here").returncode == 0

    def reported() -> bool:
        code, page = _page(account.folders["one"])
        kinds = {one["instance"]: [hold["kind"] for hold in one["holds"]] for one in page["instances"]}
        return code == 69 and kinds == {"one": [], "two": ["manual"]}

    until(reported, saw=account.log)  # a daemon reports itself every 2.5 seconds here
    assert command(account.folders["two"], "release").returncode == 0
    until(lambda: _page(account.folders["one"])[0] == 0, saw=account.log)
    sandbox.balance = 0
    account.folders["one"].prompt("cat", "a cat")
    until(lambda: account.daemons["two"].events("held")[1:], saw=account.log)
    code, page = _page(account.folders["two"])
    assert (code, [one["kind"] for one in page["holds"]]) == (69, ["credits"])
    assert page["holds"][0]["next_try_at"]
    sandbox.balance = None
    assert command(account.folders["two"], "release", "--account").returncode == 0
    assert _page(account.folders["two"])[0] == 0  # whatever the daemons reported last


def test_the_history_is_that_of_all_daemons_with_the_instance_of_each_job(account: Account) -> None:
    account.start("one", "two")
    account.prompts(2)
    until(lambda: account.completed() == 4, saw=account.log)
    here = account.folders["one"]
    jobs = json.loads(command(here, "history", "--json").stdout)
    assert sorted((job["instance"], job["source"]) for job in jobs) == [
        ("one", "one-0.prompt.txt"),
        ("one", "one-1.prompt.txt"),
        ("two", "two-0.prompt.txt"),
        ("two", "two-1.prompt.txt"),
    ]
    table = list(csv.DictReader(io.StringIO(command(here, "history", "--csv").stdout)))
    assert sorted(row["instance"] for row in table) == ["one", "one", "two", "two"]
    sums = json.loads(command(here, "history", "--by", "instance", "--json").stdout)
    assert [(one["instance"], one["completed"]) for one in sums] == [("one", 2), ("two", 2)]
    assert "instance" in command(here, "history").stdout.splitlines()[0]


def test_without_a_shared_database_all_and_instance_are_usage_errors_that_say_why(folders: Folders) -> None:
    folders.prompt("cat", "a cat")
    assert command(folders, "once").returncode == 0
    for arguments in (("status", "--all"), ("history", "--by", "instance")):
        done = command(folders, *arguments)
        assert (done.returncode, "[shared] database is not set" in done.stderr) == (64, True)
    assert all("instance" not in job for job in json.loads(command(folders, "history", "--json").stdout))


RECEIVER = """
import sys
with open(sys.argv[1], "ab", 0) as file:
    file.write(sys.stdin.buffer.read().strip() + b"\\n")
"""


def _notified(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_hold_and_a_cap_of_the_account_are_notified_once_over_all_daemons(
    account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    receiver, path = tmp_path / "receiver.py", tmp_path / "received"
    receiver.write_text(RECEIVER)
    given = json.dumps([sys.executable, str(receiver), str(path)])
    for name in ("one", "two", "three"):
        account.member(name, notify__command=given, limits__credits_per_day="100", limits__assumed_credits="30")
    account.start("one", "two", "three", first_seconds=LONG)
    sandbox.balance = 0
    account.prompts(1)
    until_held(account)
    sandbox.balance = None
    assert command(account.folders["two"], "release").returncode == 0

    def names() -> list[str]:
        return sorted(one["event"] for one in _notified(path) if one["event"] in {"held", "released", "cap"})

    for daemon in account.daemons.values():
        until(lambda daemon=daemon: "credits" in [one["kind"] for one in daemon.events("released")], saw=account.log)
    until(lambda: account.completed() == 2, saw=account.log)
    account.folders["one"].prompt("third", "a third cat")
    until(lambda: account.completed() == 3, saw=account.log)
    until(lambda: len(names()) >= 3, saw=account.log)
    for name in ("two", "three"):  # each records something while the cap is nearly spent
        account.folders[name].prompt("invalid", "+++\nnonsense = 1\n+++\nA cat")
        until((account.folders[name].errors / "invalid.error.toml").exists, saw=account.log)
    for name in ("one", "two", "three"):  # they deliver what is left
        account.daemons[name].stop()
    assert names() == ["cap", "held", "released"]
