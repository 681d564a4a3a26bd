"""What commands show of all daemons of an account: real daemons, a real PostgreSQL, the real commands."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from support import noon
from support.daemon import command, until

from shared.test_account_holds import LONG, Account, account, rows, until_held, until_none_in_flight

if TYPE_CHECKING:
    from pathlib import Path

    from support.daemon import Folders
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

__all__ = ["account"]
SESSIONS_OF_THREE = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'imagewatch %three'"""
FRESH = {"inbox__rescan_seconds": "1"}
"""A daemon writes its status when something of its own changes, and with each scan: sums of others may be older."""


def _page(folders: Folders) -> tuple[int, dict[str, Any]]:
    done = command(folders, "status", "--all", "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_status_all_shows_running_stopped_and_killed_daemons_and_the_sums_of_the_account(
    account: Account, postgres: Server
) -> None:
    noon.day_lasts()
    for name in ("one", "two", "three"):
        account.member(name, **FRESH)
    account.start("one", "two", "three")
    account.prompts(2)
    until(lambda: account.completed() == 6, saw=account.log)
    account.daemons["two"].stop()
    account.daemons["three"].kill()
    until(lambda: rows(postgres, account, SESSIONS_OF_THREE) == [(0,)])  # the last that it has sent is done
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
    until(lambda: "6 completed" in command(account.folders["one"], "status").stdout)
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


def test_a_daemon_that_runs_or_is_not_known_is_not_forgotten(account: Account) -> None:
    account.start("one", "two")
    for options in ((), ("--yes",)):
        done = command(account.folders["two"], "hosts", "forget", "one", *options)
        assert (done.returncode, done.stdout) == (64, "")
        assert "may still send" in done.stderr
        assert "stop it first" in done.stderr
        done = command(account.folders["two"], "hosts", "forget", "three", *options)
        assert (done.returncode, done.stdout) == (64, "")
        assert "the account has no daemon three" in done.stderr
        assert "imagewatch status --all" in done.stderr
    assert [one["instance"] for one in _page(account.folders["one"])[1]["instances"]] == ["one", "two"]


OF_THE_ACCOUNT = {"period_jobs", "period_credits", "balance_credits", "budget_credits", "redelivered_prompts_total"}


def _metrics(folders: Folders) -> dict[str, str]:
    """The metrics that are the account's, by name and labels but the inbox."""
    done = command(folders, "status", "--prometheus")
    assert done.returncode == 0, done.stderr
    found = (line.rpartition(" ") for line in done.stdout.splitlines() if not line.startswith("#"))
    shown = {name.replace(f'inbox="{folders.inbox}"', ""): value for name, _, value in found}
    return {name: value for name, value in shown.items() if name[11:].partition("{")[0] in OF_THE_ACCOUNT}


def test_five_metrics_are_those_of_the_account_on_each_host(account: Account, postgres: Server) -> None:
    for name in ("one", "two"):
        account.member(name, budgets__anna__credits_per_month="3000", **FRESH)
    account.start("one", "two")
    one, two = account.folders.values()
    one.prompt("anna/cat", "a cat")
    until((one.outbox / "anna/cat.receipt.toml").exists, saw=account.log)
    rows(postgres, account, "UPDATE imagewatch.attempts SET new_credit_balance = 910")  # as in some responses
    two.prompt("dog", "a dog")
    until(lambda: account.completed() == 1, saw=account.log)
    path = two.prompt("cow", "a cow")
    status = path.stat()
    until(lambda: account.completed() == 2, saw=account.log)
    again = two.inbox / ".again"
    again.write_text("a cow")
    os.utime(again, ns=(status.st_mtime_ns, status.st_mtime_ns))
    again.rename(path)
    until(lambda: account.daemons["two"].events("redelivered"), saw=account.log)
    one.prompt("pig", "a pig")
    until(lambda: account.completed() == 3, saw=account.log)

    def agree() -> bool:
        """Whether both show the same, written after all of this."""
        found = _metrics(one)
        is_new = found.get("imagewatch_redelivered_prompts_total{}") == "1"
        return is_new and {name[11:].partition("{")[0] for name in found} == OF_THE_ACCOUNT and found == _metrics(two)

    until(agree, saw=lambda: f"{_metrics(one)}\n{_metrics(two)}")
    found = _metrics(one)
    assert found["imagewatch_balance_credits{}"] == "910"


RECEIVER = """
import sys
with open(sys.argv[1], "ab", 0) as file:
    file.write(sys.stdin.buffer.read().strip() + b"\\n")
"""


def _notified(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_hold_and_a_cap_of_the_account_are_notified_once_over_all_daemons(
    account: Account, sandbox: Sandbox, postgres: Server, tmp_path: Path
) -> None:
    receiver, path = tmp_path / "receiver.py", tmp_path / "received"
    receiver.write_text(RECEIVER)
    given, clock = json.dumps([sys.executable, str(receiver), str(path)]), noon.environ()
    limits = {"limits__credits_per_day": "100", "limits__assumed_credits": "30"}
    for name in ("one", "two", "three"):
        account.member(name, notify__command=given, **limits).environ |= clock
    account.start("one", "two", "three", first_seconds=LONG)
    sandbox.balance = 0
    account.prompts(1)
    until_held(account)
    until_none_in_flight(account, postgres)
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
