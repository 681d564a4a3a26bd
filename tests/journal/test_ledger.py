"""The ledger: one row for each attempt, whenever a process is killed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from imagewatch.journal.row import Row
from imagewatch.system.errors import SpoolError
from journal.makers import STORES, Maker, postgres, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.journal.journal import Journal

WRITER = """
import pathlib, sys
from imagewatch.journal.row import Row
from journal.makers import Maker, postgres, sqlite
store, place = sys.argv[1:]
journal = Maker(sqlite(pathlib.Path(place)) if store == "sqlite" else postgres(place), lambda: 1.0)()
for number in range(1, 100_000):
    journal.record(Row(job="a", attempt=number, source="cat.prompt.txt", outcome="busy", charged="no", claimed_at=1.0))
    print(number, flush=True)
"""


@pytest.fixture
def journal(make: Callable[..., Journal]) -> Journal:
    return make()


def row(job: str = "a" * 16, attempt: int = 1, **fields: Any) -> Row:
    given = {"outcome": "completed", "charged": "yes", "credits": 5.0, "claimed_at": 1.0, **fields}
    return Row(job=job, attempt=attempt, source="cat.prompt.txt", **given)


def test_a_row_is_read_as_it_was_written(journal: Journal) -> None:
    written = row(message="naïve", sent_at=2.5, provider="flux", got=1, asked_provider="flux", owner="ada")
    journal.record(written)
    (found,) = journal.ledger.rows()
    fields = [name for name in Row.__struct_fields__ if name != "counted_at"]
    assert {name: found[name] for name in fields} == {name: getattr(written, name) for name in fields}


def test_the_same_attempt_again_replaces_its_row(journal: Journal) -> None:
    journal.record(row(got=0))
    journal.record(row(got=1))
    assert [found["got"] for found in journal.ledger.rows()] == [1]
    assert journal.ledger.totals() == {"completed": 1, "refused": 0, "unknown": 0, "credits": 5.0}


def test_another_attempt_and_another_job_have_rows_of_their_own(journal: Journal) -> None:
    journal.record(row(attempt=1, outcome="busy", charged="no", credits=None))
    journal.record(row(attempt=2))
    journal.record(row(job="b" * 16, outcome="unknown", charged="unknown", credits=None))
    assert [(found["job"][0], found["attempt"]) for found in journal.ledger.rows()] == [("a", 1), ("a", 2), ("b", 1)]
    assert journal.ledger.totals() == {"completed": 1, "refused": 0, "unknown": 1, "credits": 5.0}


def test_a_name_that_is_not_text_can_be_in_a_row(journal: Journal) -> None:
    journal.record(row(message="caf\udce9"))
    assert "caf" in journal.ledger.rows()[0]["message"]


@pytest.mark.parametrize("mtime_ns", [2**63 - 1, 2**63, 2**65, -(2**63), -(2**63) - 1, -(2**65)])
def test_a_file_of_any_year_is_recorded_and_recognized(journal: Journal, mtime_ns: int) -> None:
    written = row(source_size=5, source_mtime_ns=mtime_ns, contents="{}")
    journal.record(written)
    assert journal.ledger.finished("b" * 16, written.source, 5, mtime_ns) == [(written.job, "{}")]
    assert journal.ledger.finished("b" * 16, written.source, 5, 0) == []


@pytest.mark.parametrize("wrong", [{"outcome": "guessed"}, {"charged": "maybe"}])
def test_outcomes_that_the_ledger_does_not_define_are_refused(journal: Journal, wrong: dict[str, str]) -> None:
    with pytest.raises(SpoolError):
        journal.record(row(**wrong))
    assert journal.ledger.rows() == []


def test_written_rows_are_there_at_the_next_start(make: Callable[..., Journal]) -> None:
    with contextlib.closing(make()) as first:
        first.record(row())
    assert len(make().ledger.rows()) == 1


def test_several_threads_can_write_at_the_same_time(journal: Journal) -> None:
    def write(letter: str) -> None:
        for number in range(1, 26):
            journal.record(row(job=letter * 16, attempt=number))

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.ledger.rows()) == 100


@pytest.mark.parametrize("name", STORES)
def test_a_killed_process_loses_no_row_it_had_written(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    place = str(tmp_path) if name == "sqlite" else request.getfixturevalue("database")
    new = sqlite(tmp_path) if name == "sqlite" else postgres(place)
    command = [sys.executable, "-c", WRITER, name, place]
    environ = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        printed = 50 + len(process.stdout.read().split())
    with contextlib.closing(Maker(new, lambda: 1.0)) as make:
        attempts = [found["attempt"] for found in make().ledger.rows()]
        assert attempts == list(range(1, len(attempts) + 1))
        assert len(attempts) >= printed - 1  # of the last number perhaps only some digits were printed
        make().record(row(job="b" * 16))
