"""Holds that concern all daemons of an account: real daemons, a real PostgreSQL, an endpoint that refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import PATIENCE, Folders, LoggedDaemon, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

SCRIPT = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.journal.holds import Holds
from support import noon

def configured():
    return load(os.environ.get("IMAGEWATCH_CONFIG"), os.environ)

log.configure("info", "json")
noon.apply()
holds = Holds(first_seconds=float(sys.argv[1]), grace_seconds=float(sys.argv[2]))
sys.exit(Daemon(configured(), os.environ, reload=configured, holds=holds).run())
"""
"""A daemon whose holds last as long as a test likes; all else is as it is."""
LONG = 600.0
DEADLINE = 60.0
PROBE_SECONDS = 2.5
"""After so many seconds another daemon sends a probe instead of one that was killed, if a test says so."""
IN_FLIGHT = "SELECT count(*) FROM imagewatch.attempts WHERE outcome = 'sent'"


class Account:
    """The daemons of one account."""

    def __init__(self, path: Path, base_url: str, database: str, run: Callable[..., LoggedDaemon]) -> None:
        self._path, self._base_url, self.database, self._run = path, base_url, database, run
        self.folders: dict[str, Folders] = {}
        self.daemons: dict[str, LoggedDaemon] = {}
        self.script = path / "patient.py"
        self.script.write_text(SCRIPT)

    def member(self, name: str, **settings: Any) -> Folders:
        given = {
            "shared__database": self.database,
            "shared__durability": "single",
            "shared__instance": name,
            "shared__lease_seconds": "10",
            "endpoint__connect_timeout_seconds": "1",
            "endpoint__deadline_seconds": str(DEADLINE),
            **settings,
        }
        self.folders[name] = Folders(self._path / name, self._base_url, **given)
        if len(self.folders) == 1:
            assert command(self.folders[name], "db", "init").returncode == 0
        return self.folders[name]

    def start(self, *names: str, first_seconds: float = 0.3, grace_seconds: float = 60.0) -> list[LoggedDaemon]:
        for name in names:
            if name not in self.folders:
                self.member(name)
            arguments = str(first_seconds), str(grace_seconds)
            self.daemons[name] = self._run(self.folders[name], *arguments, script=str(self.script))
        return [self.daemons[name] for name in names]

    def errors(self) -> list[str]:
        """The error files of all daemons."""
        return [
            f"{name}/{path}"
            for name, folders in self.folders.items()
            for path in folders.names("errors")
            if path.endswith(".error.toml")
        ]

    def completed(self) -> int:
        return sum(len(list(folders.outbox.glob("*.receipt.toml"))) for folders in self.folders.values())

    def prompts(self, count: int) -> None:
        for name, folders in self.folders.items():
            for number in range(count):
                folders.prompt(f"{name}-{number}", f"a cat of {name}, {number}")

    def log(self) -> str:
        return "\n".join(f"{name}:\n{daemon.log()}" for name, daemon in self.daemons.items())


@pytest.fixture
def account(tmp_path: Path, sandbox: Sandbox, database: str, run: Callable[..., LoggedDaemon]) -> Account:
    return Account(tmp_path, sandbox.base_url, database, run)


def rows(postgres: Server, account: Account, question: str) -> list[Any]:
    return postgres.psql(question, account.database.rpartition("/")[2])


def interval(postgres: Server, account: Account) -> float:
    """How many seconds the daemons wait after the last refusal, 0 without a hold."""
    return sum(seconds for (seconds,) in rows(postgres, account, "SELECT seconds FROM imagewatch.holds"))


def until_held(account: Account, kind: str = "credits") -> None:
    """Wait until all daemons are on hold for a reason of the account."""
    for daemon in account.daemons.values():
        until(lambda daemon=daemon: kind in [one["kind"] for one in daemon.events("held")], saw=account.log)


def until_none_in_flight(account: Account, postgres: Server) -> None:
    """Wait until no request is in flight: a refusal that is noted after the end of its hold begins another one."""
    until(lambda: rows(postgres, account, IN_FLIGHT) == [(0,)], saw=account.log)


def hold_the_next_probe(account: Account, sandbox: Sandbox, postgres: Server) -> int:
    """Let the endpoint have a probe that it does not answer; return how many requests it had got before."""
    until_none_in_flight(account, postgres)
    before: int = sandbox.report()["requests"]
    sandbox.hold()
    assert command(account.folders["one"], "release").returncode == 0
    assert sandbox.wait_for_requests(before + 1, PATIENCE), account.log()
    return before


def test_a_refusal_of_the_account_is_reported_once_over_all_daemons_and_all_resume_together(
    account: Account, sandbox: Sandbox, postgres: Server
) -> None:
    sandbox.balance = 0
    account.start("one", "two", "three")
    account.prompts(3)
    until_held(account)
    until(lambda: interval(postgres, account) > 1, saw=account.log)  # probes were refused, too: 0.3, 0.6, 1.2 s
    until(account.errors, saw=account.log)
    assert len(account.errors()) == 1, account.log()
    assert [len(daemon.events("held")) for daemon in account.daemons.values()] == [1, 1, 1], account.log()
    until_none_in_flight(account, postgres)
    sandbox.balance = None
    until(lambda: account.completed() == 8, saw=account.log)
    assert len(account.errors()) == 1
    for daemon in account.daemons.values():
        until(lambda daemon=daemon: daemon.events("released"), saw=account.log)


def test_one_probe_is_in_flight_at_a_time_over_all_daemons(
    account: Account, sandbox: Sandbox, postgres: Server
) -> None:
    sandbox.balance = 0
    account.start("one", "two", "three", first_seconds=LONG)
    account.prompts(3)
    until_held(account)
    before = hold_the_next_probe(account, sandbox, postgres)
    assert not sandbox.wait_for_requests(before + 2, 2.5)  # all others are due meanwhile
    sandbox.balance = None
    sandbox.release()  # the probe was refused when it came
    until_none_in_flight(account, postgres)
    assert command(account.folders["one"], "release").returncode == 0
    until(lambda: account.completed() == 8, saw=account.log)


def test_a_daemon_that_starts_during_a_hold_of_the_account_sends_nothing_and_reports_no_prompt(
    account: Account, sandbox: Sandbox
) -> None:
    sandbox.balance = 0
    account.start("one", first_seconds=LONG)
    account.prompts(1)
    until(account.errors, saw=account.log)
    account.member("two")
    account.prompts(1)
    (late,) = account.start("two", first_seconds=LONG)
    assert late.wait_for("held")["kind"] == "credits"
    assert late.events("held")[0]["seconds"] > LONG / 2
    assert (sandbox.report()["requests"], len(account.errors())) == (1, 1)


def test_another_daemon_probes_after_the_one_that_probed_was_killed(
    account: Account, sandbox: Sandbox, postgres: Server
) -> None:
    sandbox.balance = 0
    account.start("one", first_seconds=LONG, grace_seconds=PROBE_SECONDS - DEADLINE)
    account.folders["one"].prompt("first", "a cat")
    account.folders["one"].prompt("second", "a dog")
    until(account.errors, saw=account.log)
    before = hold_the_next_probe(account, sandbox, postgres)
    account.daemons["one"].kill()
    sandbox.balance = None
    sandbox.release()
    account.member("two")
    account.folders["two"].prompt("third", "a bird")
    account.start("two")
    assert sandbox.wait_for_requests(before + 2, PATIENCE), account.log()
    until((account.folders["two"].outbox / "third.receipt.toml").exists, saw=account.log)
    assert account.daemons["two"].wait_for("released")["kind"] == "credits"


def test_release_on_one_host_sends_the_next_probe_immediately(
    account: Account, sandbox: Sandbox, postgres: Server
) -> None:
    sandbox.balance = 0
    account.start("one", "two", first_seconds=LONG)
    account.prompts(2)
    until_held(account)
    until(account.errors, saw=account.log)
    until_none_in_flight(account, postgres)
    sandbox.balance = None
    assert command(account.folders["one"], "release").returncode == 0
    until(lambda: account.completed() == 3, saw=account.log)


def test_no_daemon_of_the_account_records_an_attempt_after_hold_account_returned(
    account: Account, sandbox: Sandbox, postgres: Server
) -> None:
    account.start("one", "two")
    sandbox.hold()
    account.prompts(60)
    assert sandbox.wait_for_requests(4, PATIENCE), account.log()
    held = command(account.folders["one"], "hold", "--account", "the invoice is checked")
    attempts = rows(postgres, account, "SELECT count(*) FROM imagewatch.attempts")
    assert held.returncode == 0, held.stderr
    sandbox.release()  # a daemon that had not noticed the hold could send now
    until_held(account, "manual_account")
    account.member("three")
    account.folders["three"].prompt("late", "a late cat")
    account.start("three")
    until_held(account, "manual_account")
    assert command(account.folders["two"], "release").stdout.startswith("Released; but the account is on hold: the inv")
    until(lambda: not any(json.loads(_status(one))["in_flight"] for one in account.folders.values()), saw=account.log)
    assert rows(postgres, account, "SELECT count(*) FROM imagewatch.attempts") == attempts
    assert attempts < [(120,)]
    assert command(account.folders["two"], "status").returncode == 69
    assert command(account.folders["two"], "release", "--account").returncode == 0
    until(lambda: account.completed() == 121, saw=account.log)


def test_hold_and_release_with_account_work_while_the_daemon_of_this_host_is_down(
    account: Account, sandbox: Sandbox
) -> None:
    account.start("one", "two")
    account.daemons["one"].stop()
    assert command(account.folders["one"], "hold", "--account").returncode == 0
    held = account.daemons["two"].wait_for("held")
    assert (held["kind"], held["reason"]) == ("manual_account", "put on hold manually, with all daemons of the account")
    shown = command(account.folders["one"], "status", "--json")
    assert (shown.returncode, [one["kind"] for one in json.loads(shown.stdout)["holds"]]) == (69, ["manual_account"])
    account.folders["two"].prompt("cat", "a cat")
    assert command(account.folders["one"], "release", "--account").returncode == 0
    until(lambda: account.completed() == 1, saw=account.log)
    assert command(account.folders["one"], "status").returncode == 0


def test_a_manual_hold_of_one_host_outlasts_release_account_on_another(account: Account, sandbox: Sandbox) -> None:
    account.start("one", "two")
    assert command(account.folders["two"], "hold", "only here").returncode == 0
    account.prompts(1)
    until(lambda: account.completed() == 1, saw=account.log)
    assert command(account.folders["one"], "release", "--account").returncode == 0
    assert command(account.folders["two"], "status").returncode == 69
    assert (sandbox.report()["requests"], account.completed()) == (1, 1)


def test_without_a_shared_database_account_is_a_usage_error_that_says_why(folders: Folders) -> None:
    assert command(folders, "once").returncode == 0
    for name in ("hold", "release"):
        done = command(folders, name, "--account")
        assert done.returncode == 64
        assert "[shared] database is not set" in done.stderr


def test_a_wrong_key_of_one_host_does_not_stop_the_others(account: Account, sandbox: Sandbox) -> None:
    wrong = account.member("one")
    wrong.environ["LETTA_API_KEY"] = "sk-let-wrong-0123456789"
    account.start("one", "two")
    account.prompts(2)
    until(lambda: account.completed() == 2, saw=account.log)
    assert account.daemons["one"].wait_for("held")["kind"] == "key"
    assert {one["kind"] for one in account.daemons["one"].events("held")} == {"key"}
    assert account.daemons["two"].events("held") == []


def _status(folders: Folders) -> str:
    return (folders.state / "status.json").read_text()
