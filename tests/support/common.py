"""Daemons of one inbox, each with a state folder of its own, and what must be true of the inbox in the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemon import PATIENCE, TESTS, Folders, LoggedDaemon, Running, below, command, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox import Sandbox
    from support.postgres import Server

LEASE = 3.0
RUNNER = str(TESTS / "support/common_runner.py")
DEADLINE = 60
"""How long a request of a daemon may take, seconds: no request of a daemon that runs is given up."""
GIVEN_UP = 5.0
"""After so many seconds, the charge for a request of a daemon that was killed is unknown to another one."""


class Member(Folders):
    """What one daemon of the inbox has."""

    def __init__(self, root: Path, name: str, base_url: str, database: str, inbox: str, **settings: str) -> None:
        if not (root / "watched").exists():
            super().__init__(root, base_url, **settings)
        given = {
            "IMAGEWATCH_SHARED__DATABASE": database,
            "IMAGEWATCH_SHARED__DURABILITY": "single",
            "IMAGEWATCH_SHARED__INSTANCE": f"{inbox}-{name}",
            "IMAGEWATCH_SHARED__INBOX": inbox,
            "IMAGEWATCH_SHARED__ACCOUNT": inbox,  # its holds concern no other test
            "IMAGEWATCH_SHARED__LEASE_SECONDS": "10",
            "IMAGEWATCH_ENDPOINT__CONNECT_TIMEOUT_SECONDS": "2",
            "IMAGEWATCH_ENDPOINT__TIMEOUT_SECONDS": str(DEADLINE),
            "IMAGEWATCH_ENDPOINT__DEADLINE_SECONDS": str(DEADLINE),
            "IMAGEWATCH_INBOX__RESCAN_SECONDS": "1",
            "LEASE": str(LEASE),
            "GIVEN_UP": str(GIVEN_UP),
            "READ_ONLY_FILE": str(root / f"read-only-{name}"),
        }
        spare = Folders.__new__(Folders)
        if not hasattr(self, "environ"):
            Folders.__init__(spare, root / f"spare-{name}", base_url, **settings)
            self.environ = {**spare.environ, "IMAGEWATCH_FOLDERS__ROOT": str(root / "watched")}
            self.root = root / "watched"
        self.name, self.steps_file = f"{inbox}-{name}", root / f"steps-{name}"
        self.state = root / f"state-{name}"
        self.environ |= {**given, "IMAGEWATCH_FOLDERS__STATE": str(self.state), "STEPS_FILE": str(self.steps_file)}

    def go(self) -> None:
        """Let a thread that waits before a step continue."""
        Path(f"{self.steps_file}.go").touch()

    def stopped(self) -> int:
        """The number of the step before which its daemon has stopped; 0: it has not."""
        path = Path(f"{self.steps_file}.stopped")
        return int((path.read_text() if path.exists() else "") or 0)

    def steps(self) -> list[str]:
        """What its daemon has done so far."""
        return self.steps_file.read_text().splitlines() if self.steps_file.exists() else []


class Inbox:
    """One inbox, and its daemons.

    Args:
        root: Where its folders are made.
        sandbox: The endpoint.
        postgres: The server of the database.
        database: How to connect to it.
        name: The name of the inbox.
        settings: Of the daemons.
    """

    def __init__(
        self, root: Path, sandbox: Sandbox, postgres: Server, database: str, name: str = "common", **settings: str
    ) -> None:
        self.root, self.sandbox, self.name, self.settings = root, sandbox, name, settings
        self.postgres, self.database = postgres, database
        self.members: dict[str, Member] = {}
        self.daemons: list[LoggedDaemon] = []
        root.mkdir(exist_ok=True, parents=True)

    def member(self, name: str, **settings: str) -> Member:
        """Make another daemon's folders; ``database`` may be the way through a proxy."""
        given = {**self.settings, **settings}
        uri = given.pop("database", self.database)
        base = given.pop("base_url", self.sandbox.base_url)
        self.members[name] = made = Member(self.root, name, base, uri, self.name, **given)
        return made

    def run(self, member: Member, *, stop_before: str = "", by: str = "kill", kill_before: str = "") -> LoggedDaemon:
        """Start the daemon of a member."""
        member.environ |= {"STOP_BEFORE": stop_before, "STOP_BY": by, "KILL_BEFORE": kill_before}
        for path in self.root.glob(f"{member.steps_file.name}*"):
            path.unlink()
        self.daemons.append(LoggedDaemon(Running(member, script=RUNNER)))
        return self.daemons[-1]

    def close(self) -> None:
        """End all daemons."""
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGCONT)
            daemon.kill()

    # What there is

    def rows(self, question: str) -> list[Any]:
        """Ask the database, about this inbox."""
        return self.postgres.psql(question, self.database.rpartition("/")[2])

    def open_jobs(self) -> list[Any]:
        question = "SELECT id, state, holder, epoch FROM imagewatch.jobs WHERE state NOT IN ('done', 'kept') "
        return self.rows(f"{question} AND inbox = '{self.name}'")

    def kept(self) -> set[str]:
        """The jobs that were paid for and gave no image: their responses stay for ``imagewatch retry``."""
        return {
            job
            for (job,) in self.rows(f"SELECT id FROM imagewatch.jobs WHERE state = 'kept' AND inbox = '{self.name}'")
        }

    def attempts(self) -> list[Any]:
        question = "SELECT a.job, a.attempt, a.outcome, a.charged FROM imagewatch.attempts AS a "
        return self.rows(f"{question} WHERE a.inbox = '{self.name}' ORDER BY a.claimed_at, a.job, a.attempt")

    def calls(self, prompt: str) -> int:
        """How many requests the endpoint has got for a prompt."""
        return sum(call["prompt"] == prompt for call in self.sandbox.report()["calls"])

    def folders(self) -> Folders:
        return next(iter(self.members.values()))

    def local(self) -> list[str]:
        """What is in the folders of responses of all daemons."""
        return [str(path) for member in self.members.values() for path in member.answers()]

    def unfinished(self) -> list[str]:
        """What is not over yet."""
        folders = self.folders()
        left = [f"job {job}" for job in self.open_jobs()]
        left += [name for name in folders.names("inbox") if not name.startswith(".imagewatch/")]
        claimed = os.listdir(folders.inbox / ".imagewatch")
        left += [name for name in claimed if name not in {"lock", ".imagewatch-claims"} and ".iw-probe" not in name]
        temporary = [path for path in below(folders.root) if path.name.startswith(".iw-")]
        left += [str(path) for path in temporary if not path.name.startswith((".iw-status", ".iw-probe"))]
        kept = self.kept()
        return [one for one in left + self.local() if not any(job in one for job in kept)]

    def settle(self, timeout: float = PATIENCE) -> None:
        """Wait until nothing is left to do, for some time."""
        seen: list[float] = []

        def is_quiet() -> bool:
            if self.unfinished():
                seen.clear()
                return False
            seen.append(time.monotonic())
            return seen[-1] - seen[0] > 0.3

        until(is_quiet, timeout, saw=lambda: "\n".join(self.unfinished()), what="nothing is left to do")

    def check(self, stem: str, prompt: str, *, most: int = 1) -> str:
        """Compare result files, ledger and endpoint; return the destination of the prompt."""
        folders = self.folders()
        requests = self.calls(prompt)
        assert requests <= most, f"{requests} requests for one prompt"
        receipts = [name for name in folders.names("outbox") if name.endswith(".receipt.toml")]
        errors = [name for name in folders.names("errors") if name.endswith(".error.toml")]
        attempts = self.attempts()
        outcomes = [outcome for _, _, outcome, _ in attempts]
        assert len(receipts) + len(errors) == 1, (receipts, errors, attempts)
        assert "sent" not in outcomes, attempts
        if receipts:
            receipt = folders.receipt(stem)
            images = {one["file"] for one in receipt["images"]}
            there = set(folders.names("outbox")) - set(receipts)
            assert there == images, "each image once, and no receipt without its images"
            assert outcomes.count("completed") == requests == 1, attempts
            assert "unknown" not in outcomes, attempts
            assert folders.names("errors") == []
            assert folders.names("archive") == [f"{stem}.prompt.txt"]
            return "outbox"
        assert folders.names("outbox") == []
        if self.kept():  # a part of the response had arrived
            assert folders.error(stem)["charged"] == "yes"
            assert outcomes == ["completed"]
            return "errors"
        assert folders.error(stem)["charged"] == "unknown"
        assert "completed" not in outcomes
        assert outcomes.count("unknown") == 1, attempts
        assert folders.names("errors") == [f"{stem}.error.toml", f"{stem}.prompt.txt"]
        return "errors"


def wait_for_stop(daemon: LoggedDaemon, is_over: Callable[[], bool]) -> bool:
    """Wait until a process has stopped or was killed; return whether it has, and did not finish its job before."""
    stopped: list[bool] = []

    def is_there() -> bool:
        if daemon.process.poll() is not None or is_stopped(daemon.process.pid):
            stopped.append(True)
        return bool(stopped) or is_over()

    until(is_there)
    assert daemon.process.poll() in {None, -signal.SIGKILL}, f"it has ended\n{daemon.log()}"
    return bool(stopped)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal, or is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return True


def initialize(member: Member) -> None:
    """Make the tables of the database."""
    done = command(member, "db", "init")
    assert done.returncode == 0, done.stderr
