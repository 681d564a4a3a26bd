"""What tests of several modules need of daemons with one database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import PATIENCE, Folders, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.daemon import LoggedDaemon
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

LEASE = 10


@pytest.fixture
def alone(tmp_path: Path, sandbox: Sandbox, database: str) -> Callable[..., Folders]:
    """Return a function that makes the folders of a daemon of the account, which has its inbox alone."""

    def made(name: str, **settings: Any) -> Folders:
        given = {"shared__database": database, "shared__durability": "single", "shared__instance": name, **settings}
        folders = Folders(tmp_path / name, sandbox.base_url, **given)
        command(folders, "db", "init")
        return folders

    return made


@pytest.fixture
def team(tmp_path: Path, sandbox: Sandbox, database: str) -> Callable[..., Folders]:
    """Return a function that makes another daemon of the same inbox, with a state folder of its own."""
    first: list[Folders] = []

    def made(name: str, **settings: Any) -> Folders:
        given = {
            "shared__database": database,
            "shared__durability": "single",
            "shared__instance": name,
            "shared__inbox": "common",
            "shared__lease_seconds": str(LEASE),
            "endpoint__connect_timeout_seconds": "2",
            "endpoint__timeout_seconds": str(PATIENCE),
            "endpoint__deadline_seconds": str(PATIENCE),
            **settings,
        }
        if first:
            folders = Folders.__new__(Folders)
            folders.root = first[0].root
            environ = {f"IMAGEWATCH_{key.upper()}": value for key, value in given.items()}
            folders.environ = {**first[0].environ, **environ}
        else:
            folders = Folders(tmp_path, sandbox.base_url, **given)
        folders.state = tmp_path / f"state-{name}"
        folders.environ["IMAGEWATCH_FOLDERS__STATE"] = str(folders.state)
        if not first:
            first.append(folders)
            command(folders, "db", "init")
        return folders

    return made


@pytest.fixture
def kill_in_flight(sandbox: Sandbox, run: Callable[..., LoggedDaemon]) -> Callable[..., None]:
    """Return a function that starts a daemon, waits until it has sent a request, and kills it before the response."""

    def act(folders: Folders, script: str | None = None) -> None:
        before = sandbox.report()["requests"]
        sandbox.hold()
        daemon = run(folders, script=script)
        assert sandbox.wait_for_requests(before + 1, PATIENCE)
        daemon.kill()
        sandbox.release()

    return act


@pytest.fixture
def replace_by_earlier(postgres: Server, database: str) -> Callable[[Callable[[], None]], None]:
    """Return a function that lets something happen, and then replaces the database by a copy from before."""
    return lambda act: postgres.replace_by_earlier(database, act)
