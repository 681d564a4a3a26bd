"""A real PostgreSQL on this machine: started, stopped, killed, copied to a standby."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 60.0
_ROOM_BYTES = 2 << 30
SUPERUSER = "postgres"
OWNER = "imagewatch"
"""An ordinary user that owns the databases of the tests."""
_NEEDED = ("postgres", "initdb", "pg_basebackup")
_SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
shared_buffers = '16MB'
dynamic_shared_memory_type = mmap
huge_pages = off
fsync = on
full_page_writes = on
wal_keep_size = '64MB'
autovacuum = off
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
log_min_messages = warning
"""
_ACCESS = """
host all all 127.0.0.1/32 trust
host replication all 127.0.0.1/32 trust
"""
_templates: list[Path] = []
"""A cluster to copy, when this process has made one."""
_WATCH = """
read -r line && exit 0
tr '\\0' '\\n' < "/proc/$1/cmdline" | grep -qxF "$2/data" && kill -QUIT "$1"
while kill -0 "$1" 2>/dev/null && [ "$(cut -d ')' -f 2 "/proc/$1/stat" | cut -c 2)" != Z ]; do sleep 0.1; done
rm -rf "$2"
"""
"""Wait for the end of the test process. If it was killed, end the server and remove its files."""


def binaries() -> Path | None:
    """The folder with the programs of the newest PostgreSQL on this machine."""
    packaged = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal()]
    folders = sorted(packaged, key=lambda path: int(path.parent.name), reverse=True)
    if found := shutil.which("postgres"):
        folders.append(Path(found).resolve().parent)
    return next((path for path in folders if all((path / name).is_file() for name in _NEEDED)), None)


def missing() -> str:
    """Why no PostgreSQL can be used here; empty if one can."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    return "" if binaries() else "there is no PostgreSQL server: install the package postgresql"


def _new_folder(*, in_memory: bool = True) -> Path:
    """A folder for the files of a server: in memory if there is room, which makes it several times faster.

    The end of a process loses nothing there. No test cuts the power of PostgreSQL.
    """
    shared = "/dev/shm"
    has_room = in_memory and os.path.isdir(shared) and shutil.disk_usage(shared).free > _ROOM_BYTES
    folder = tempfile.mkdtemp(prefix="iw-pg-", dir=shared if has_room else None)
    if ids := _ids():
        os.chown(folder, *ids)
    return Path(folder)


def _watch(pid: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends a server and removes a folder if this process ends without ``_end_watch``."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "sh", pid, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end_watch(watch: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        watch.communicate(b"ended\n", timeout=PATIENCE)


def _ids() -> tuple[int, int] | None:
    """The user and the group of a server, which refuses to run as root; None for those of this process."""
    if os.geteuid() != 0:
        return None
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        return 65534, 65534
    return user.pw_uid, user.pw_gid


class Server:
    """A PostgreSQL of its own, with its files in a folder of its own, on a port that stays the same.

    Attributes:
        name: Its ``application_name`` as a standby.
        port: Where it listens on 127.0.0.1.
        folder: All its files; ``folder / "log"`` is what it has logged.
    """

    def __init__(self, name: str = "primary", *, in_memory: bool = True) -> None:
        found = binaries()
        assert found is not None, missing()
        self._binaries = found
        self._ids = _ids()
        self.name, self.port = name, free_port()
        self.folder = _new_folder(in_memory=in_memory)
        self._folder_watch = _watch("none", self.folder)  # also while the server is stopped
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._standbys: list[Server] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether its main process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The number of its main process."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What it and its tools have written."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it, with a new cluster the first time, and wait until it accepts connections."""
        assert not self.is_running
        if not (self.folder / "data").exists():
            self._create()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", str(self.folder / "data"), "-c", f"port={self.port}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                **self._as_user(),
            )
        self._watch = _watch(str(self._process.pid), self.folder)
        self._until(self._is_ready, "it accepts connections")

    def stop(self, mode: str = "fast") -> None:
        """End it as an administrator does: ``fast`` ends transactions first, ``immediate`` is like a crash."""
        assert self._process is not None
        self._process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"PostgreSQL did not end:\n{self.log()}") from None
        self._forget()

    def kill(self) -> None:
        """End all its processes with SIGKILL, as a crash of the machine would."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(
                signal.SIGSTOP
            )  # It starts no more processes, and the numbers of those stay theirs.
            children = _children(self._process.pid)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(PATIENCE)
            self._until(lambda: not any(map(_is_alive, children)), "its processes end")
        self._forget()

    def restart(self, mode: str = "fast") -> None:
        """Stop it, if it runs, and start it again."""
        if self.is_running:
            self.stop(mode)
        self.start()

    def close(self) -> None:
        """End it and its standbys, and remove their files."""
        while self._standbys:
            self._standbys.pop().close()
        if self.is_running:
            self.stop("immediate")
        self._forget()
        self._remove_shared_memory()
        _end_watch(self._folder_watch)
        shutil.rmtree(self.folder, ignore_errors=True)

    def uri(self, database: str = "postgres", user: str = OWNER, password: str = "") -> str:
        """How to connect to a database on it."""
        secret = f":{quote(password, safe='')}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}"

    def database(self, name: str = "") -> str:
        """Create an empty database that belongs to ``OWNER``, and return how to connect to it."""
        name = name or f"test_{next(self._numbers)}"
        self.psql(f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
        return self.uri(name)

    def drop(self, name: str) -> None:
        """Remove a database, also if there are connections to it."""
        self.psql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def replace_by_earlier(self, uri: str, act: Callable[[], None]) -> None:
        """Copy a database, let something happen, then put the copy in its place, as a restored backup."""
        name = uri.rpartition("/")[2]
        self._disconnect(name)
        self.psql(f"CREATE DATABASE {name}_copy TEMPLATE {name} OWNER {OWNER}")
        self.psql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        act()
        self._disconnect(name)
        self.psql(f"ALTER DATABASE {name} RENAME TO {name}_newer")
        self.psql(f"ALTER DATABASE {name}_copy RENAME TO {name}")

    def _disconnect(self, name: str) -> None:
        """End all connections to a database, and allow no new ones."""
        self.psql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        self.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def psql(self, sql: str, database: str = "postgres", parameters: Sequence[Any] | None = None) -> list[Any]:
        """Execute SQL as the superuser, outside of a transaction, and return the rows."""
        import psycopg  # noqa: PLC0415  not installed everywhere

        with contextlib.closing(psycopg.connect(self.uri(database, SUPERUSER), autocommit=True)) as connection:
            cursor = connection.execute(sql.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def set(self, **settings: object) -> None:
        """Change settings of the server; None restores the default. New connections have them afterwards."""
        import psycopg  # noqa: PLC0415
        from psycopg import sql  # noqa: PLC0415

        with contextlib.closing(psycopg.connect(self.uri(user=SUPERUSER), autocommit=True)) as connection:
            for name, value in settings.items():
                to = sql.SQL("DEFAULT") if value is None else sql.Literal(str(value))
                connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), to))
        self._reload()

    def user(self, name: str, password: str) -> str:
        """Create a user that must give its password (SCRAM), and return how it connects, without the password."""
        from psycopg import sql  # noqa: PLC0415

        created = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))
        self.psql(created.as_string())
        access = self.folder / "data/pg_hba.conf"
        access.write_text(f"host all {name} 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
        self._reload()
        return self.uri(user=name)

    def standby(self, *, synchronous: bool, name: str = "") -> Server:
        """Start a copy that follows this server.

        Args:
            synchronous: Each commit here waits for the disk of the copy.
            name: Its ``application_name``.
        """
        made = Server(name or f"standby_{len(self._standbys) + 1}")
        made._numbers = self._numbers  # It has the same databases.
        self._standbys.append(made)
        source = f"host=127.0.0.1 port={self.port} user={SUPERUSER} application_name={made.name}"
        made._tool("pg_basebackup", "-D", "data", "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source)
        with (made.folder / "data/postgresql.auto.conf").open("a") as settings:
            settings.write("synchronous_standby_names = ''\n")
        made.start()
        if synchronous:
            names = ", ".join(one.name for one in self._standbys if one is made or one.name in self._synchronous())
            self.set(synchronous_standby_names=f"ANY 1 ({names})")
        wanted = ("sync", "quorum") if synchronous else ("async", "potential", "sync", "quorum")
        self._until(lambda: self.followers().get(made.name) in wanted, f"{made.name} follows")
        return made

    def followers(self) -> dict[str, str]:
        """The standbys that follow now, and how (``sync_state``)."""
        rows = self.psql("SELECT application_name, sync_state FROM pg_stat_replication WHERE state = 'streaming'")
        return dict(rows)

    def promote(self) -> None:
        """Make this standby a server that writes, and wait until it is one."""
        (promoted,) = self.psql("SELECT pg_promote(true, 60)")
        assert promoted == (True,), self.log()

    def _synchronous(self) -> str:
        ((names,),) = self.psql("SHOW synchronous_standby_names")
        return names

    def _create(self) -> None:
        options = ("-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "--wal-segsize=1")
        if _templates:
            self._tool("/bin/cp", "-a", str(_templates[0]), "data")
            return
        self._tool("initdb", "-D", "data", "--no-sync", "--no-instructions", *options)
        with (self.folder / "data/postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS)
        (self.folder / "data/pg_hba.conf").write_text(_ACCESS)
        # One process that writes straight into the files: faster than a start only for this.
        create = f"CREATE ROLE {OWNER} LOGIN"
        single = ("--single", "-D", "data", "-c", "fsync=off", "postgres")
        self._tool("postgres", *single, given=create)
        self._keep_as_template()

    def _keep_as_template(self) -> None:
        """Keep a copy of the new cluster for the later servers of this process: a copy takes less time than initdb."""
        folder = _new_folder()
        watch = _watch("none", folder)
        self._tool("/bin/cp", "-a", "data", str(folder / "data"))
        _templates.append(folder / "data")

        def remove() -> None:
            _end_watch(watch)
            shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)

    def _tool(self, name: str, *arguments: str, given: str = "") -> None:
        command = [str(self._binaries / name), *arguments]  # or an absolute path
        with (self.folder / "log").open("ab") as log:
            done = subprocess.run(
                command, input=given.encode(), stdout=log, stderr=log, timeout=PATIENCE, check=False, **self._as_user()
            )
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{self.log()}"

    def _as_user(self) -> dict[str, Any]:
        """For a process: another user if this one is root, and nothing from the environment of the tests."""
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "HOME": str(self.folder)}
        ids = {"user": self._ids[0], "group": self._ids[1], "extra_groups": []} if self._ids else {}
        return {"cwd": self.folder, "env": environment, "umask": 0o077, **ids}

    def _is_ready(self) -> bool:
        """Whether it accepts connections, as ``pg_ctl`` asks it.

        Raises:
            AssertionError: It has ended.
        """
        assert self._process is not None
        assert self._process.poll() is None, f"PostgreSQL did not start:\n{self.log()}"
        try:
            lines = (self.folder / "data/postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(self._process.pid)] and len(lines) > 7 and lines[7].strip() == "ready"

    def _until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"PostgreSQL: not within {PATIENCE:.0f} s: {what}:\n{self.log()}"
            threading.Event().wait(0.02)

    def _reload(self) -> None:
        """Read the settings again, and wait until new connections and the synchronous replication have them."""
        ((before,),) = self.psql("SELECT pg_conf_load_time()")
        self.psql("SELECT pg_reload_conf()")
        self._until(lambda: self.psql("SELECT pg_conf_load_time()") != [(before,)], "it has read its settings")
        # The checkpointer announces the synchronous standbys, and reads the settings before it serves a request.
        self.psql("CHECKPOINT")

    def _forget(self) -> None:
        """The main process has ended: end the process that watches for the end of the tests."""
        if self._watch is not None:
            _end_watch(self._watch)
        self._process = self._watch = None

    def _remove_shared_memory(self) -> None:
        """Remove the small segment that a killed server has left; one that was stopped has left none."""
        with contextlib.suppress(OSError, IndexError):
            number = (self.folder / "data/postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", number], capture_output=True, check=False)


def _stat(pid: int) -> list[str]:
    """The state, the parent and so on of a process; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children(parent: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if _stat(pid)[1:2] == [str(parent)]]


def _is_alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])
