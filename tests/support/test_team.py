"""A daemon that a test pauses does not keep others from the database."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from support.common import is_stopped
from support.daemon import PATIENCE, until
from support.postgres import SUPERUSER
from support.team import Team

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox
    from support.postgres import Server

psycopg = pytest.importorskip("psycopg")


def test_a_daemon_is_paused_when_none_of_its_transactions_is_open(
    tmp_path: Path, postgres: Server, sandbox: Sandbox
) -> None:
    with Team(tmp_path, postgres, sandbox) as team:
        one = team.member("one")
        log = one.start()
        log.wait_for("started")
        until(team.leader)
        waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        uri = postgres.uri(team.database, SUPERUSER)
        with contextlib.closing(psycopg.connect(uri)) as other, ThreadPoolExecutor(1) as pool:
            other.execute("SELECT 1 FROM imagewatch.leaders FOR UPDATE")
            until(lambda: team.rows(waits))
            paused = pool.submit(one.pause)
            until(lambda: is_stopped(log.process.pid))
            other.rollback()
            paused.result(PATIENCE)
        assert is_stopped(log.process.pid)
        assert team.rows("SELECT holder FROM leaders FOR UPDATE NOWAIT") == [{"holder": "one"}]
