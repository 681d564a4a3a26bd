"""A daemon that notifies is killed before each of its changes: no event is lost, and repeated ones have the same id.

``IMAGEWATCH_ALL_KILLS=1`` tries every change; otherwise some of them, evenly spread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.audit import ORDERS, Audit, Order, drop
from support.daemon import KEY, TESTS, Folders, Running
from support.receiver import Receiver, as_json

from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RUNNER = str(TESTS / "support/kill_runner.py")
KILLS = 14
SOME = {name: ORDERS[name] for name in ("text", "wrong", "bad", "busy")}
BROKE = {"broke": Order("a boat [sandbox: 402]", destination="errors", charged="no")}


def run_killed(root: Path, orders: dict[str, Order], number: int, check: Callable[..., None]) -> tuple[int, int]:
    """Kill before a change, start again, check; return how the first process ended, and how many changes it made."""
    root.mkdir()
    with Sandbox(key=KEY) as sandbox, Receiver() as receiver:
        folders = Folders(root, sandbox.base_url, notify__url=receiver.url, limits__concurrency="2")
        drop(folders, orders)
        first = Running(folders, str(number), script=RUNNER)
        code = first.wait()
        again = Running(folders, "once")
        assert again.wait() in {0, 1, 69}, again.output
        try:
            assert code in {-signal.SIGKILL, 0}, first.output
            check(folders, sandbox, receiver)
        except Exception as error:
            error.add_note(f"killed before change {number}\n{first.output}\n{again.output}\n{receiver.pages()}")
            raise
    return code, int(first.output.split()[0]) if code == 0 else 0


def check_jobs(folders: Folders, sandbox: Sandbox, receiver: Receiver) -> None:
    """Each job has one event, with the result file that is in the folders."""
    Audit(folders, sandbox.report(), SOME, 2).check()
    ids = receiver.ids()
    assert sorted(name.split(".")[0] for name in ids) == sorted(SOME)
    assert all(len(found) == 1 for found in ids.values()), ids
    for page in receiver.pages():
        part = "receipt" if page["event"] == "completed" else "error"
        stem = page[part]["source"].split(".")[0]
        file = folders.outbox / f"{stem}.receipt.toml" if part == "receipt" else folders.errors / f"{stem}.error.toml"
        assert page[part] == as_json(file.read_text())
    assert left(folders) == []


def check_hold(folders: Folders, _: Sandbox, receiver: Receiver) -> None:
    """A hold that the journal has was reported, once."""
    held = {page["event_id"] for page in receiver.pages() if page["event"] == "held"}
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        holds = database.execute("SELECT kind FROM holds").fetchall()
        announced = database.execute("SELECT subject FROM announced").fetchall()
    assert len(held) == len(holds) == len(announced)
    assert [len(found) for found in receiver.ids().values()] == [1]
    assert left(folders) == []


def left(folders: Folders) -> list[str]:
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        return [json.dumps(row) for row in database.execute("SELECT * FROM events").fetchall()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("orders", "check"), [(SOME, check_jobs), (BROKE, check_hold)], ids=["jobs", "a hold"])
def test_a_process_killed_at_any_change_loses_no_event_and_repeats_it_only_with_its_id(
    tmp_path: Path, orders: dict[str, Order], check: Callable[..., None]
) -> None:
    code, changes = run_killed(tmp_path / "count", orders, 0, check)
    assert code == 0
    every = 1 if os.environ.get("IMAGEWATCH_ALL_KILLS") == "1" else max(1, changes // KILLS)
    numbers = range(1, changes + 1, every)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda number: run_killed(tmp_path / str(number), orders, number, check)[0], numbers))
    assert ends.count(-signal.SIGKILL) >= len(ends) * 0.9
