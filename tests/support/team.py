"""Daemons with one inbox: each has a state folder, a way to the database and a way to the endpoint of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

from support.daemon import PATIENCE, TESTS, Folders, LoggedDaemon, Running, command, until
from support.postgres import SUPERUSER
from support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox
    from support.postgres import Server

    Ask = Callable[..., list[dict[str, Any]]]

LEASE = 10
"""The shortest lease that may be configured, seconds."""
LONG_LEASE = 600
"""So long that no daemon continues the work of another one because of the end of a lease, seconds."""
SHORT_LEASE = {"shared__lease_seconds": str(LEASE)}
"""For daemons of which one is killed or paused, and another one continues when its lease has ended."""
SHORT_DEADLINE = {"endpoint__timeout_seconds": "4", "endpoint__deadline_seconds": "4"}
"""For daemons that wait for the response of a killed one, and give up soon; they may give up their own, too."""
RUNNER = str(TESTS / "support/chaos_runner.py")


class Member:
    """One daemon of an inbox.

    Attributes:
        name: Its ``shared.instance``.
        folders: Its folders; only the state folder is its own.
        database: Its way to the database.
        endpoint: Its way to the endpoint.
        log: What the process that runs, or ran last, has logged.
        logs: The same of all its processes.
    """

    def __init__(self, name: str, folders: Folders, database: Proxy, endpoint: Proxy, ask: Ask) -> None:
        self.name, self.folders, self.database, self.endpoint = name, folders, database, endpoint
        self._ask = ask
        self.log: LoggedDaemon | None = None
        self.logs: list[LoggedDaemon] = []

    def start(self) -> LoggedDaemon:
        """Start it; it need not be able to reach anything yet."""
        self.log = LoggedDaemon(Running(self.folders, script=RUNNER))
        self.logs.append(self.log)
        return self.log

    @property
    def is_running(self) -> bool:
        """Whether its process runs, or is stopped."""
        return self.log is not None and self.log.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.log is not None
        self.log.process.send_signal(number)

    def pause(self) -> None:
        """Stop it by SIGSTOP, at a time when no transaction of it is open: others would wait for what that has locked.

        If one is open, it continues for a moment, and is stopped again.
        """

        def is_paused() -> bool:
            self.signal(signal.SIGSTOP)
            if self._is_idle():
                return True
            self.signal(signal.SIGCONT)
            return False

        until(is_paused, what=f"{self.name} is stopped outside of a transaction")

    def resume(self) -> None:
        """Let it continue."""
        self.signal(signal.SIGCONT)

    def _is_idle(self) -> bool:
        """Whether no session of this daemon, which is stopped, is in a transaction, also a moment later.

        What it has sent may still be on the way at the first look.
        """
        looks = []
        for _ in range(2):
            until(lambda: "active" not in self._states())
            looks.append(self._states())
            threading.Event().wait(0.2)
        return all(look <= {"idle"} for look in looks)

    def _states(self) -> set[str]:
        """The states of its sessions in the database."""
        question = "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE %s"
        return {row["state"] for row in self._ask(question, f"imagewatch % {self.name}")}

    def kill(self) -> None:
        """End it with SIGKILL, also while it is stopped."""
        self.signal(signal.SIGKILL)
        assert self.log is not None
        self.log.process.wait(30)

    def stop(self) -> int:
        """End it as systemd does; return the exit code."""
        assert self.log is not None
        return self.log.stop()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name of all its processes."""
        return [event for log in self.logs for event in log.events(name)]


class Team:
    """Some daemons with one inbox, on a PostgreSQL and a sandbox.

    Args:
        root: For all folders.
        server: The PostgreSQL.
        sandbox: The endpoint.
        settings: Of all daemons, as for ``Folders``.

    Attributes:
        database: The name of the database.
    """

    def __init__(self, root: Path, server: Server, sandbox: Sandbox, **settings: str) -> None:
        self.server, self.sandbox = server, sandbox
        self._root = root
        self._uri = server.database()
        self.database = self._uri.rpartition("/")[2]
        given = {
            "shared__database": self._uri,
            "shared__durability": "single",
            "shared__inbox": "common",
            "shared__lease_seconds": str(LONG_LEASE),
            "endpoint__connect_timeout_seconds": "2",
            "endpoint__timeout_seconds": str(PATIENCE),
            "endpoint__deadline_seconds": str(PATIENCE),
            **settings,
        }
        self.folders = Folders(root, sandbox.base_url, **given)
        self.folders.environ["IMAGEWATCH_SHARED__INSTANCE"] = "first"
        done = command(self.folders, "db", "init")
        assert done.returncode == 0, done.stderr
        self.members: dict[str, Member] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members.values():
            for log in member.logs:
                log.kill()
            member.database.close()
            member.endpoint.close()

    def member(self, name: str, **settings: str) -> Member:
        """Make another daemon; it is not started yet."""
        endpoint = Proxy(int(self.sandbox.base_url.rpartition(":")[2]))
        database = Proxy(self.server.port)
        folders = Folders.__new__(Folders)
        folders.root, folders.state = self.folders.root, self._root / f"state-{name}"
        folders.environ = {
            **self.folders.environ,
            "LETTA_BASE_URL": f"http://127.0.0.1:{endpoint.port}",
            "IMAGEWATCH_SHARED__DATABASE": database.through(self._uri),
            "IMAGEWATCH_SHARED__INSTANCE": name,
            "IMAGEWATCH_FOLDERS__STATE": str(folders.state),
            **{f"IMAGEWATCH_{key.upper()}": value for key, value in settings.items()},
        }
        self.members[name] = Member(name, folders, database, endpoint, self.rows)
        return self.members[name]

    def rows(self, question: str, *values: object) -> list[dict[str, Any]]:
        """Ask the database directly, whatever daemons can reach."""
        import psycopg  # noqa: PLC0415  not installed everywhere

        uri = self.server.uri(self.database, SUPERUSER)
        with contextlib.closing(psycopg.connect(uri, autocommit=True)) as connection:
            connection.execute("SET search_path = imagewatch")
            cursor = connection.execute(question.encode(), values or None)
            names = [column.name for column in cursor.description or ()]
            rows = cursor.fetchall() if names else []
            return [dict(zip(names, row, strict=True)) for row in rows]

    def in_flight(self, name: str = "") -> set[str]:
        """Return the jobs with an attempt that has no result: those of a daemon, or all."""
        rows = self.rows("SELECT job, instance FROM attempts WHERE outcome = 'sent'")
        return {row["job"] for row in rows if name in {"", row["instance"]}}

    def leader(self) -> str:
        """Return the daemon that scans the inbox; empty: none."""
        question = "SELECT holder FROM leaders WHERE lease_ends_at > extract(epoch FROM clock_timestamp())"
        return next((row["holder"] for row in self.rows(question)), "")

    def leftovers(self) -> list[str]:
        """Return what no job may leave behind when all are over, in the inbox and in the state folders.

        The test file of a daemon that was killed meanwhile is removed an hour later. A charged response without a
        readable image is kept for ``imagewatch retry``.
        """
        open_jobs = self.rows("SELECT id, state, holder FROM jobs WHERE state <> 'done'")
        kept = [row["id"] for row in open_jobs if row["state"] == "kept"]
        shown = [f"inbox/{name}" for name in self.folders.names("inbox") if "/.iw-probe." not in f"/{name}"]
        for member in self.members.values():
            shown += [f"{member.name}: answers/{path.name}" for path in member.folders.answers()]
        shown = [name for name in shown if not any(f"/{job}." in name and "answer." in name for job in kept)]
        shown += [
            f"job {row['id']}: {row['state']} of {row['holder'] or 'no daemon'}"
            for row in open_jobs
            if row["state"] != "kept"
        ]
        return shown
