"""Several threads write in one transaction: what one of them meets concerns the others only if it is the file."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

THREADS, ROUNDS = 8, 60


def test_what_a_thread_was_told_is_written_is_there_whatever_ends_another_thread(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.sqlite3")
    barrier, written = threading.Barrier(THREADS), []

    def change(thread: int, number: int) -> None:
        barrier.wait()
        name = f"{thread}-{number}"

        def act(connection: sqlite3.Connection) -> str:
            if thread == 0:
                raise KeyboardInterrupt
            connection.execute("INSERT INTO meta VALUES (?, '')", (name,))
            return name

        with contextlib.suppress(KeyboardInterrupt):
            database.change(act)
            written.append(name)

    with contextlib.closing(SqliteDatabase(path, synchronous="OFF")) as database:
        with ThreadPoolExecutor(THREADS) as pool:
            for number in range(ROUNDS):
                list(pool.map(change, range(THREADS), [number] * THREADS))
        with database.using() as connection:
            there = [row["name"] for row in connection.execute("SELECT name FROM meta WHERE name LIKE '%-%'")]
    assert sorted(there) == sorted(written)


def test_a_damaged_page_that_is_met_while_writing_is_named_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    with contextlib.closing(SqliteDatabase(str(path))) as database:
        with database.using() as connection:
            page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'attempts'").fetchone()[0]
            size = connection.execute("PRAGMA page_size").fetchone()[0]
        database.close()
        with path.open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xff" * size)
        with pytest.raises(SpoolError, match="it is damaged"):
            database.change(lambda connection: connection.execute("SELECT * FROM attempts").fetchall())
