"""Holds that concern all daemons of an account: real daemons, a real PostgreSQL, an endpoint that refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, command, until

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

def configured():
    return load(os.environ.get("IMAGEWATCH_CONFIG"), os.environ)

log.configure("info", "json")
holds = Holds(first_seconds=float(sys.argv[1]), grace_seconds=float(sys.argv[2]))
sys.exit(Daemon(configured(), os.environ, reload=configured, holds=holds).run())
"""
"""A daemon whose holds last as long as a test likes; all else is as it is."""
LONG = 600.0


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
            "endpoint__deadline_seconds": "30",
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
    sandbox.balance = None
    until(lambda: account.completed() == 8, saw=account.log)
    assert len(account.errors()) == 1
    for daemon in account.daemons.values():
        until(lambda daemon=daemon: daemon.events("released"), saw=account.log)


def test_one_probe_is_in_flight_at_a_time_over_all_daemons(account: Account, sandbox: Sandbox) -> None:
    sandbox.balance = 0
    account.start("one", "two", "three")
    account.prompts(3)
    until_held(account)
    sandbox.hold()
    until(lambda: _in_flight(sandbox, account) == 1, saw=account.log)
    before = sandbox.report()["requests"]
    assert not sandbox.wait_for_requests(before + 1, 2.5)  # all others are due several times meanwhile
    sandbox.balance = None
    sandbox.release()
    until(lambda: account.completed() == 8, saw=account.log)


def _in_flight(sandbox: Sandbox, account: Account) -> int:
    """How many requests of the daemons have no response yet."""
    return sum(
        len(json.loads((folders.state / "status.json").read_text())["in_flight"])
        for folders in account.folders.values()
        if (folders.state / "status.json").exists()
    )
