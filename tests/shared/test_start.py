"""A daemon that starts with a shared database: which servers it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, Running, command, until
from support.ports import free_port
from support.postgres import OWNER, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
UNPRIVILEGED = 65534
"""A user and a group without any rights."""
BOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@pytest.fixture
def daemon(tmp_path: Path, sandbox: Sandbox) -> Callable[..., Folders]:
    def made(uri: str, name: str = "one", *, place: str = "", durability: str = "single") -> Folders:
        settings = {"database": uri, "instance": name, "durability": durability}
        return Folders(
            tmp_path / (place or name), sandbox.base_url, **{f"shared__{key}": value for key, value in settings.items()}
        )

    return made


def refused(folders: Folders, code: int) -> str:
    """Start a daemon that must not start, and check the database; return what the daemon has written."""
    running = Running(folders, "run")
    assert running.wait(60) == code, running.output
    if code == 78:
        assert command(folders, "db", "check").returncode == 78
    return running.output


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fsync", "off", "has fsync off"),
        ("full_page_writes", "off", "has full_page_writes off"),
        ("synchronous_commit", "off", "has synchronous_commit = off"),
    ],
)
def test_a_server_that_may_lose_what_was_paid_is_refused(
    daemon: Callable[..., Folders], own_postgres: Server, setting: str, value: str, message: str
) -> None:
    folders = daemon(own_postgres.database())
    assert command(folders, "db", "init").returncode == 0
    own_postgres.set(**{setting: value})
    assert message in refused(folders, 78)
    own_postgres.set(**{setting: None})
    running = Running(folders, "once")
    assert running.wait() == 0, running.output


def test_without_a_synchronous_standby_a_replicated_account_is_refused(
    daemon: Callable[..., Folders], own_postgres: Server
) -> None:
    uri = own_postgres.database()
    folders = daemon(uri, durability="replicated")
    assert command(folders, "db", "init").returncode == 0
    output = refused(folders, 78)
    assert "has no synchronous standby" in output
    assert 'shared.durability = "single"' in output
    own_postgres.standby(synchronous=True)
    running = Running(folders, "once")
    assert running.wait() == 0, running.output


def test_a_standby_is_refused_until_it_is_the_primary(daemon: Callable[..., Folders], own_postgres: Server) -> None:
    uri = own_postgres.database()
    assert command(daemon(uri, "any"), "db", "init").returncode == 0
    standby = own_postgres.standby(synchronous=False)
    folders = daemon(standby.uri(uri.rpartition("/")[2]))
    assert "is a standby" in refused(folders, 69)
    own_postgres.kill()
    standby.promote()
    running = Running(folders, "once")
    assert running.wait() == 0, running.output


def test_missing_and_newer_tables_are_refused(daemon: Callable[..., Folders], database: str, postgres: Server) -> None:
    folders = daemon(database)
    output = refused(folders, 78)
    assert "has no tables of imagewatch" in output
    assert "imagewatch db init" in output
    assert not (folders.state / "shared").exists()
    assert command(folders, "db", "init").returncode == 0
    postgres.psql("UPDATE imagewatch.about SET version = version + 1", database.rpartition("/")[2])
    assert "has tables of a newer version" in refused(folders, 78)


def test_tables_of_this_version_are_not_updated_and_others_are_refused(
    daemon: Callable[..., Folders], database: str, postgres: Server
) -> None:
    folders = daemon(database)
    without = command(folders, "db", "upgrade")
    assert without.returncode == 69, without.stderr
    assert "imagewatch db init" in without.stderr
    assert command(folders, "db", "init").returncode == 0
    done = command(folders, "db", "upgrade")
    assert (done.returncode, done.stdout) == (0, "The tables are those of version 1.\n")
    postgres.psql("UPDATE imagewatch.about SET version = version + 1", database.rpartition("/")[2])
    newer = command(folders, "db", "upgrade")
    assert newer.returncode == 69, newer.stderr
    assert "run the newer version of imagewatch" in newer.stderr


def test_a_database_with_another_encoding_is_refused(daemon: Callable[..., Folders], postgres: Server) -> None:
    name = "latin"
    postgres.psql(f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        assert "has the encoding LATIN1" in refused(daemon(postgres.uri(name)), 78)
    finally:
        postgres.drop(name)


def test_a_server_that_cannot_be_reached_is_another_exit_code(daemon: Callable[..., Folders]) -> None:
    output = refused(daemon(f"postgresql://127.0.0.1:{free_port()}/none"), 69)
    assert "the shared database cannot be reached" in output
    assert "ledger.sqlite3" not in output


def test_a_name_that_a_running_daemon_has_is_refused(daemon: Callable[..., Folders], database: str) -> None:
    first, second = daemon(database), daemon(database, place="two")
    assert command(first, "db", "init").returncode == 0
    running = Running(first, "run")
    try:
        until(lambda: json.loads(command(first, "status", "--json").stdout or "{}").get("state") == "running")
        output = refused(second, 75)
        assert "is running with the instance name one" in output
        assert "set shared.instance" in output
    finally:
        assert running.stop() == 0, running.output
    assert "with another state folder" in refused(second, 74)
    assert Running(first, "once").wait() == 0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[[Folders], socket.socket]]:
    """Return a function that makes a daemon report to systemd, as a service; what it reports can be received."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)

        def made(folders: Folders) -> socket.socket:
            folders.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            return manager

        yield made


def test_a_service_waits_at_its_start_for_a_database_that_is_down(
    daemon: Callable[..., Folders], own_postgres: Server, service: Callable[[Folders], socket.socket]
) -> None:
    folders = daemon(own_postgres.database())
    assert command(folders, "db", "init").returncode == 0
    own_postgres.stop()
    manager = service(folders)
    running = Running(folders, "run")
    try:
        assert b"STATUS=waiting: the shared database cannot be reached" in manager.recv(4096)
        own_postgres.start()
        while b"READY=1" not in manager.recv(4096):
            pass
    finally:
        assert running.stop() == 0, running.output


def test_a_service_that_waits_for_its_database_is_stopped_by_a_signal(
    daemon: Callable[..., Folders], service: Callable[[Folders], socket.socket]
) -> None:
    folders = daemon(f"postgresql://127.0.0.1:{free_port()}/none")
    manager = service(folders)
    running = Running(folders, "run")
    assert b"STATUS=waiting" in manager.recv(4096)
    assert running.stop() == 0, running.output


class Bouncer:
    """A PgBouncer in front of a server."""

    def __init__(self, server: Server, mode: str, size: int) -> None:
        assert BOUNCER is not None
        self.port, self.folder = free_port(), Path(tempfile.mkdtemp(prefix="iw-bouncer-"))
        settings = self.folder / "settings.ini"
        settings.write_text(
            # With auth_type "any" each client is the user of the database.
            f"[databases]\n* = host=127.0.0.1 port={server.port} user={OWNER} pool_size={size}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"auth_file = {self.folder}/users\nlogfile = {self.folder}/log\npool_mode = {mode}\n"
        )
        (self.folder / "users").write_text(f'"{OWNER}" ""\n')
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # it refuses to run as root
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
            as_user = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []}
        self.process = subprocess.Popen(
            [BOUNCER, "-q", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user
        )

    def uri(self, database: str) -> str:
        return f"postgresql://{OWNER}@127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


@pytest.fixture
def bouncer(postgres: Server) -> Iterator[Callable[[str, int], Bouncer]]:
    if BOUNCER is None:
        pytest.skip("there is no PgBouncer: install the package pgbouncer")
    started: list[Bouncer] = []

    def made(mode: str, size: int) -> Bouncer:
        started.append(Bouncer(postgres, mode, size))
        return started[-1]

    yield made
    for one in started:
        one.close()


@pytest.mark.parametrize("size", [20, 1])
def test_a_pooler_that_shares_connections_between_transactions_is_refused(
    daemon: Callable[..., Folders], bouncer: Callable[[str, int], Bouncer], database: str, size: int
) -> None:
    name = database.rpartition("/")[2]
    assert command(daemon(database, "direct"), "db", "init").returncode == 0
    pooler = bouncer("transaction", size)
    folders = daemon(pooler.uri(name))
    until(lambda: "cannot be reached" not in command(folders, "db", "check").stderr)
    output = refused(folders, 78)
    assert "is behind a pooler that shares its connections between transactions" in output
    assert "pool_mode = session" in output


def test_a_pooler_that_gives_each_session_a_connection_is_accepted(
    daemon: Callable[..., Folders], bouncer: Callable[[str, int], Bouncer], database: str
) -> None:
    pooler = bouncer("session", 20)
    folders = daemon(pooler.uri(database.rpartition("/")[2]))
    until(lambda: command(folders, "db", "init").returncode == 0)
    folders.prompt("cat", "a cat")
    running = Running(folders, "once")
    assert running.wait() == 0, running.output
    assert command(folders, "db", "check").returncode == 0
