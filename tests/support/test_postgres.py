"""The PostgreSQL of the tests does what tests rely on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import until

psycopg = pytest.importorskip("psycopg")


def connected(uri, **more):
    return contextlib.closing(psycopg.connect(uri, autocommit=True, **more))


def test_a_test_has_an_empty_database_of_an_ordinary_user(database):
    with connected(database) as connection:
        row = connection.execute(
            "SELECT current_user, usesuper, datcollate, pg_encoding_to_char(encoding), current_setting('fsync')"
            " FROM pg_user, pg_database WHERE usename = current_user AND datname = current_database()"
        ).fetchone()
        tables = connection.execute("SELECT * FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert row == ("imagewatch", False, "C", "UTF8", "on")
    assert tables == []


def test_what_is_committed_is_there_after_each_kind_of_end(own_postgres):
    uri = own_postgres.database()
    with connected(uri) as connection:
        connection.execute("CREATE TABLE kept (number integer)")
    ends = (own_postgres.stop, lambda: own_postgres.stop("immediate"), own_postgres.kill)
    for number, end in enumerate(ends):
        with connected(uri) as connection:
            connection.execute("INSERT INTO kept VALUES (%s)", [number])
            end()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="refused"):
            psycopg.connect(uri)
        own_postgres.restart()
    with connected(uri) as connection:
        assert connection.execute("SELECT number FROM kept ORDER BY number").fetchall() == [(0,), (1,), (2,)]


def test_a_kill_ends_also_a_session_that_works(own_postgres):
    with connected(own_postgres.database()) as connection:
        pid = connection.info.backend_pid
        connection.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000)")
        own_postgres.kill()
        assert not Path(f"/proc/{pid}/cmdline").exists() or Path(f"/proc/{pid}/cmdline").read_bytes() == b""


def test_a_user_with_a_password_must_give_it(own_postgres):
    uri = own_postgres.user("guarded", "it's / secret")
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(uri, passfile="/nonexistent")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(uri, password="wrong")
    with connected(uri, password="it's / secret") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("guarded",)
    with connected(own_postgres.uri(user="guarded", password="it's / secret")) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("guarded",)


def test_changed_settings_are_in_force(own_postgres):
    own_postgres.set(lock_timeout="123ms", work_mem="1MB")
    own_postgres.set(work_mem=None)
    rows = own_postgres.psql("SELECT current_setting('lock_timeout'), current_setting('work_mem')")
    assert rows == [("123ms", "4MB")]


def test_a_synchronous_standby_has_what_is_committed_and_continues_after_a_crash(own_postgres):
    standby = own_postgres.standby(synchronous=True)
    name = own_postgres.database().rpartition("/")[2]
    with connected(own_postgres.uri(name)) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    own_postgres.kill()
    standby.promote()
    with connected(standby.uri(name)) as connection:
        connection.execute("INSERT INTO kept VALUES (2)")
        assert connection.execute("SELECT number FROM kept ORDER BY number").fetchall() == [(1,), (2,)]
    assert standby.database() != own_postgres.uri(name)


def test_without_its_synchronous_standby_a_commit_waits(own_postgres):
    uri = own_postgres.database()
    standby = own_postgres.standby(synchronous=True)
    standby.stop()
    with connected(uri) as connection:
        connection.pgconn.send_query(b"CREATE TABLE late (number integer)")
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: own_postgres.psql(waiting) == [(1,)])
        standby.start()
        assert connection.pgconn.get_result().status == psycopg.pq.ExecStatus.COMMAND_OK


def test_a_standby_that_is_not_synchronous_delays_no_commit(own_postgres):
    standby = own_postgres.standby(synchronous=False, name="far")
    assert own_postgres.followers() == {"far": "async"}
    standby.stop()
    own_postgres.database()


def test_a_server_that_cannot_start_shows_its_log(own_postgres):
    own_postgres.stop()
    with (own_postgres.folder / "data/postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    with pytest.raises(AssertionError, match="unrecognized configuration parameter"):
        own_postgres.start()


def state_of(pid: str) -> str:
    """Return the state of a process as the kernel has it; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_when_the_test_process_is_killed_its_server_ends_and_leaves_no_files(postgres):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from support.postgres import Server\n"
        "with Server() as server:\n"
        "    print(server._process.pid, server.folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    tests = str(Path(__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, tests], env=os.environ.copy(), **pipes) as process:
        assert process.stdout is not None
        pid, folder = process.stdout.readline().split()
        assert Path(folder, "data", "postmaster.pid").exists()
        process.kill()
    until(lambda: not Path(folder).exists())
    until(lambda: state_of(pid) in {"", "Z"}, saw=lambda: state_of(pid))  # it removes its files before it ends
