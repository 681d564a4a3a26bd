"""The faults between a client and PostgreSQL are in force when the proxy says so."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.daemon import until
from support.ports import free_port
from support.proxy import Proxy

psycopg = pytest.importorskip("psycopg")

CREATE = "CREATE TABLE kept (number integer)"


def connected(uri, **more):
    return contextlib.closing(psycopg.connect(uri, connect_timeout=20, **more))


def kept(uri):
    with connected(uri) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM kept ORDER BY number").fetchall()]


@pytest.fixture
def table(database):
    with connected(database, autocommit=True) as connection:
        connection.execute(CREATE)
    return database


@pytest.fixture
def behind():
    """Do something in a thread while the test continues."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def test_without_a_fault_everything_passes(table, proxy):
    with connected(proxy.through(table)) as connection:
        connection.execute("INSERT INTO kept SELECT generate_series(1, 100000)")
        text = connection.execute("SELECT repeat('x', 3000000), %s", ["y" * 3_000_000]).fetchone()
        connection.commit()
    assert [len(one) for one in text] == [3_000_000, 3_000_000]
    assert len(kept(proxy.through(table))) == 100_000


def test_after_a_cut_connections_are_lost_and_refused_until_it_is_restored(table, proxy):
    uri = proxy.through(table)
    with connected(uri) as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(uri)
    proxy.restore()
    assert kept(uri) == []


def test_the_server_ends_the_transaction_of_a_connection_that_was_cut(postgres, table, proxy):
    with connected(proxy.through(table)) as connection:
        connection.execute("LOCK TABLE kept")
        proxy.cut()
        with connected(table) as other:
            other.execute("SET lock_timeout = '20s'")
            other.execute("INSERT INTO kept VALUES (1)")


def test_what_was_forwarded_before_a_cut_arrives(table, proxy):
    for number in range(20):
        with connected(proxy.through(table), autocommit=True) as connection:
            proxy.swallow_replies()
            connection.pgconn.send_query(b"INSERT INTO kept VALUES (%d)" % number)
            proxy.wait_for(b"INSERT")
            proxy.cut()
        proxy.restore()
    until(lambda: kept(table) == [*range(20)])


def test_while_it_hangs_nothing_passes_and_a_commit_that_waits_is_lost_by_a_cut(table, proxy, behind):
    with connected(proxy.through(table)) as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
        proxy.hang()
        commit = behind(connection.commit)
        proxy.wait_for(b"COMMIT")
        assert not commit.done()
        proxy.cut()
        assert isinstance(commit.exception(20), psycopg.OperationalError)
    proxy.restore()
    assert kept(table) == []


def test_after_it_hung_what_was_held_passes(table, proxy, behind):
    with connected(proxy.through(table)) as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
        proxy.hang()
        commit, new = behind(connection.commit), behind(psycopg.connect, proxy.through(table))
        proxy.wait_for(b"COMMIT")
        assert kept(table) == []
        proxy.restore()
        commit.result(20)
        new.result(20).close()
    assert kept(table) == [1]


def test_a_client_that_waits_for_a_hanging_connection_can_give_up(table, proxy):
    proxy.hang()
    with pytest.raises(psycopg.OperationalError, match="timeout"):
        psycopg.connect(proxy.through(table), connect_timeout=2)


def test_with_lost_replies_the_server_commits_and_the_client_waits_until_the_connection_is_closed(table, proxy, behind):
    with connected(proxy.through(table)) as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
        proxy.swallow_replies()
        commit = behind(connection.commit)
        until(lambda: kept(table) == [1])
        assert not commit.done()
        proxy.restore()
        assert isinstance(commit.exception(20), psycopg.OperationalError)
    assert kept(proxy.through(table)) == [1]


def test_the_reply_of_one_commit_is_lost_though_it_was_made(table, proxy):
    uri = proxy.through(table)
    with connected(uri) as other, connected(uri) as connection:
        proxy.swallow_reply_of(b"COMMIT")
        connection.execute("INSERT INTO kept VALUES (1)")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        assert kept(table) == [1]
        proxy.wait_for(b"COMMIT")
        other.execute("INSERT INTO kept VALUES (2)")
        other.commit()
    assert kept(uri) == [1, 2]


def test_a_server_that_ends_instead_of_a_lost_reply_closes_the_connection(own_postgres):
    with Proxy(own_postgres.port) as proxy, connected(proxy.through(own_postgres.database())) as connection:
        proxy.swallow_reply_of(b"pg_sleep")
        connection.pgconn.send_query(b"SELECT pg_sleep(600)")
        proxy.wait_for(b"pg_sleep")
        own_postgres.kill()
        assert connection.pgconn.get_result().status == psycopg.pq.ExecStatus.FATAL_ERROR


def test_a_delay_is_added_in_each_direction_until_it_is_restored(table, proxy, behind):
    with connected(proxy.through(table), autocommit=True) as connection:
        proxy.delay(0.3)
        begun = time.monotonic()
        connection.execute("SELECT 1")
        assert time.monotonic() - begun >= 0.6
        proxy.delay(100.0)
        late = behind(connection.execute, "INSERT INTO kept VALUES (1)")
        assert kept(table) == []
        assert not late.done()
        proxy.restore()
        late.result(20)
    assert kept(table) == [1]


def test_a_marker_of_before_the_last_change_does_not_count(table, proxy):
    with connected(proxy.through(table)) as connection:
        connection.execute("SELECT 1234")
        proxy.wait_for(b"1234")
        proxy.restore()
        with pytest.raises(AssertionError, match="clients sent"):
            proxy.wait_for(b"1234", 0.0)
        connection.execute("SELECT 12345")
    proxy.wait_for(b"12345")


def test_a_server_that_is_down_is_a_lost_connection():
    with Proxy(free_port()) as proxy, pytest.raises(psycopg.OperationalError):
        psycopg.connect(proxy.through("postgresql://imagewatch@127.0.0.1:1/test"))


def test_the_uri_of_the_proxy_keeps_user_password_and_options(proxy):
    given = "postgresql://me:se%40cret@127.0.0.1:5432/test?sslmode=disable"
    expected = f"postgresql://me:se%40cret@127.0.0.1:{proxy.port}/test?sslmode=disable"
    assert proxy.through(given) == expected
