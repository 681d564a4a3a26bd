"""What concerns the SQLite file of the ledger: its formats, damage, and what is asked of it."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from imagewatch.config.schema import FolderBudget, Limits
from imagewatch.journal import sqlite as sqlite_module
from imagewatch.journal.books import SqlBooks
from imagewatch.journal.files import was_there
from imagewatch.journal.health import ledger_problem
from imagewatch.journal.journal import Journal
from imagewatch.journal.row import Row
from imagewatch.journal.schema import TRIGGERS, VERSION
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.protocol.values import Decision
from imagewatch.system.errors import SpoolError
from journal.makers import NOON, Clock, Maker, sqlite
from journal.test_folder_budgets import DAY, ODD, claim, pay, spend
from journal.test_folder_budgets import row as row_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

UPGRADE = """
import sys
from imagewatch.config.schema import Limits
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
print("go", flush=True)
Journal(SqliteDatabase(sys.argv[1]), Limits(), float).require()
"""


def row(job: str = "a" * 16, attempt: int = 1, **fields: Any) -> Row:
    given = {"outcome": "completed", "charged": "yes", "credits": 5.0, "claimed_at": 1.0, **fields}
    return Row(job=job, attempt=attempt, source="cat.prompt.txt", **given)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ledger.sqlite3")


def opened(path: str) -> Journal:
    journal = Journal(SqliteDatabase(path), Limits(), lambda: 1.0)
    journal.require()
    return journal


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    with contextlib.closing(opened(path)) as found:
        yield found


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    with contextlib.closing(Maker(sqlite(tmp_path), Clock())) as made:
        yield made


@pytest.mark.parametrize("case", ["of an earlier version", "accepted"])
def test_a_ledger_whose_note_could_not_be_written_is_still_the_one_of_the_daemon(
    path: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    with contextlib.closing(opened(path)) as journal:
        journal.record(row())
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        value = "'" + 32 * "0" + "'" if case == "accepted" else "NULL"
        database.execute("DELETE FROM meta WHERE name = 'id'")
        database.execute(f"INSERT INTO meta SELECT 'id', {value} WHERE {value} IS NOT NULL")

    def full(path: str, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = SqliteDatabase(path, guarded=True)
    with contextlib.closing(file):
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_module, "_write", full)
            with pytest.raises(SpoolError, match="No space left"):
                file.accept() if case == "accepted" else file.prove()
        assert ledger_problem(os.path.dirname(path)) is None
        file.prove()
    with contextlib.closing(sqlite3.connect(path)) as database:
        copy = f"{os.path.dirname(path)}/copy"
        os.mkdir(copy)
        database.execute("VACUUM INTO ?", (f"{copy}/ledger.sqlite3",))
    assert "was put here" in str(ledger_problem(copy)), "a copy is no ledger of a daemon"


def test_a_number_that_the_ledger_cannot_store_is_an_error_of_one_job_and_not_of_the_disk(journal: Journal) -> None:
    far = Journal(SqliteDatabase(journal._file.path), Limits(), lambda: 2**64)
    with contextlib.closing(far), pytest.raises(SpoolError, match="too large for the ledger") as caught:
        far.finish("a" * 16)
    assert caught.value.code == 0  # for any other error the queue is on hold until the disk works
    assert journal.ledger.redelivered() == 0


def test_a_ledger_of_a_newer_version_is_refused(path: str) -> None:
    opened(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(SpoolError, match="newer imagewatch") as caught:
        opened(path)
    assert caught.value.hint == "run the newer version"
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)


def test_a_file_that_is_not_a_ledger_is_refused_and_kept(path: str) -> None:
    content = b"this is not a database, but a person may need it " * 100
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(SpoolError, match="it is damaged") as caught:
        opened(path)
    assert "do not delete it" in caught.value.hint
    with open(path, "rb") as file:
        assert file.read() == content


def test_a_damaged_page_is_noticed_when_it_is_read(path: str) -> None:
    with contextlib.closing(opened(path)) as journal:
        for number in range(1, 400):
            journal.record(row(attempt=number, message="x" * 100))
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 8)
    with pytest.raises(SpoolError), contextlib.closing(opened(path)) as journal:
        journal.ledger.rows()


def test_a_missing_folder_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError):
        opened(str(tmp_path / "missing" / "ledger.sqlite3"))


# Ledgers of older versions


def tables(outcomes: str, added: str = "") -> str:
    """What versions before the sums created.

    Args:
        outcomes: Those that an attempt could have.
        added: Columns that it got after the first format.
    """
    return f"""
CREATE TABLE attempts (
    job TEXT NOT NULL, attempt INTEGER NOT NULL, source TEXT NOT NULL, source_size INTEGER NOT NULL,
    source_mtime_ns INTEGER NOT NULL, contents TEXT NOT NULL, prompt_sha256 TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ({outcomes})),
    charged TEXT NOT NULL CHECK (charged IN ('yes', 'no', 'unknown')),
    credits REAL, provider TEXT NOT NULL, model TEXT NOT NULL, fields TEXT NOT NULL, asked INTEGER NOT NULL,
    got INTEGER NOT NULL, status INTEGER NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL,
    request_id TEXT NOT NULL, endpoint TEXT NOT NULL, version TEXT NOT NULL, claimed_at REAL NOT NULL,
    sent_at REAL, answered_at REAL, {added}
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE INDEX attempts_by_time ON attempts (sent_at);
CREATE INDEX attempts_by_claim ON attempts (claimed_at);
CREATE INDEX attempts_by_source ON attempts (source);
CREATE TABLE redeliveries (job TEXT PRIMARY KEY, times INTEGER NOT NULL, last_at REAL NOT NULL) WITHOUT ROWID;
"""


FORMAT_1 = tables("'made', 'refused', 'busy', 'unknown', 'invalid'")
FORMAT_2 = (
    tables(
        "'sent', 'made', 'refused', 'busy', 'unknown', 'invalid'",
        """
    asked_provider TEXT NOT NULL DEFAULT '', price_kind TEXT NOT NULL DEFAULT '',
    transaction_id TEXT NOT NULL DEFAULT '', new_credit_balance REAL, owner TEXT NOT NULL DEFAULT '',
    placed_mtime_ns INTEGER NOT NULL DEFAULT 0,
""",
    )
    + """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX attempts_by_price ON attempts (asked_provider, sent_at, price_kind, credits, asked);
CREATE INDEX attempts_by_balance ON attempts (answered_at) WHERE new_credit_balance IS NOT NULL;
"""
)


@pytest.fixture
def old(path: str) -> str:
    """A ledger of format 1, with rows of all kinds."""
    fields = '{"provider": "openai", "quality": "low", "n": 2}'
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(FORMAT_1)
        database.execute("PRAGMA user_version = 1")
        for job, provider, asked, credits_, outcome in (
            ("a" * 16, "openai", fields, 24.0, "made"),
            ("b" * 16, "flux", "", 30.0, "made"),
            ("c" * 16, "google", '{"provider": "gemini"}', 134.0, "made"),
            ("d" * 16, "flux", "{damaged", 31.0, "made"),
            ("e" * 16, "", "", None, "invalid"),
        ):
            charged = "yes" if credits_ else "no"
            database.execute(
                "INSERT INTO attempts VALUES (?, 1, 's', 1, 1, '', '', ?, ?, ?, ?, 'm', ?, 2, 1, 200, "
                "'', '', '', '', '', 1.0, 2.0, 3.0)",
                (job, outcome, charged, credits_, provider, asked),
            )
        database.commit()
    return path


def test_a_ledger_of_format_1_is_upgraded_and_keeps_every_row(old: str) -> None:
    with contextlib.closing(opened(old)) as journal:
        rows = journal.ledger.rows()
        assert [found["job"][0] for found in rows] == ["a", "b", "c", "d", "e"]
        assert {name for found in rows for name in found} == set(Row.__struct_fields__)
        assert {(found["transaction_id"], found["new_credit_balance"], found["owner"]) for found in rows} == {
            ("", None, "")
        }
        assert journal.ledger.totals()["credits"] == 219
        assert sorted(SqlBooks(journal.ledger.ask).charges("flux", 0.0)[""]) == [15, 15.5]
        assert [*SqlBooks(journal.ledger.ask).charges("openai", 0.0).values()] == [[12]]
        assert [*SqlBooks(journal.ledger.ask).charges("gemini", 0.0).values()] == [[67]]
        journal.record(row(job="f" * 16, new_credit_balance=5.0, answered_at=9.0))
        assert journal.ledger.balance() == (5, 9)
    with contextlib.closing(opened(old)) as again:
        assert len(again.ledger.rows()) == 6


def test_an_upgrade_renames_the_outcome_of_earlier_formats(old: str) -> None:
    with contextlib.closing(opened(old)) as journal:
        assert [found["outcome"] for found in journal.ledger.rows()] == ["completed"] * 4 + ["invalid"]
        assert journal.ledger.totals()["completed"] == 4


def test_a_ledger_of_format_2_is_upgraded_with_its_indexes(path: str) -> None:
    def indexes() -> set[str]:
        with contextlib.closing(sqlite3.connect(path)) as database:
            return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}

    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(FORMAT_2)
        database.execute("PRAGMA user_version = 2")
        known = {name for _, name, *_ in database.execute("PRAGMA table_info(attempts)")}
        values = {name: value for name, value in msgspec.structs.asdict(row()).items() if name in known}
        values["outcome"], names = "made", ", ".join(values)
        marks = ", ".join("?" * len(values))
        database.execute(f"INSERT INTO attempts ({names}) VALUES ({marks})", [*values.values()])
        database.commit()
    with contextlib.closing(opened(path)) as journal:
        assert [(found["job"], found["outcome"], found["credits"]) for found in journal.ledger.rows()] == [
            (row().job, "completed", row().credits)
        ]
        journal.record(row(job="b" * 16))
    found = indexes()
    path += ".new"
    opened(path).close()
    assert found == indexes()


def test_an_attempt_that_only_a_ledger_of_format_2_recorded_is_still_known_as_lost(path: str) -> None:
    with contextlib.closing(opened(path)) as journal:
        journal.record(row(outcome="unknown"))
        assert not journal.ledger.is_lost(row().job)
    with contextlib.closing(sqlite3.connect(path)) as database:
        message = "nothing but the ledger knows of this request; it may have been charged"
        database.execute("UPDATE attempts SET message = ?", [message])
        database.execute("PRAGMA user_version = 2")
        database.commit()
    with contextlib.closing(opened(path)) as journal:
        assert journal.ledger.is_lost(row().job)


def test_several_processes_can_upgrade_a_ledger_at_the_same_time(old: str) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", UPGRADE, old]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    with contextlib.closing(opened(old)) as journal:
        assert len(journal.ledger.rows()) == 5


@pytest.mark.parametrize("content", ["", "{", '{"month": {"\udcff": 1}}', '{"month": {"completed": "\udcff"}}'])
def test_a_damaged_status_file_names_no_ledger(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content, "utf-8", "surrogateescape")
    assert not was_there(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15, 0.2, 0.25])
def test_a_ledger_whose_upgrade_was_killed_is_upgraded_by_the_next_start(old: str, seconds: float) -> None:
    with contextlib.closing(sqlite3.connect(old)) as database:
        database.executescript(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000) "
            "INSERT INTO attempts SELECT 'x' || i, 1, 's', 1, 1, '', '', 'made', 'yes', 1.0, 'flux', 'm', "
            "'', 1, 1, 200, '', '', '', '', '', 1.0, 2.0, 3.0 FROM n"
        )
    with subprocess.Popen([sys.executable, "-c", UPGRADE, old], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
    with contextlib.closing(opened(old)) as journal:
        assert len(SqlBooks(journal.ledger.ask).charges("flux", 0.0)[""]) == 30_002
        assert journal.ledger.balance() is None


def test_an_old_daemon_that_still_runs_can_write_to_an_upgraded_ledger(old: str) -> None:
    opened(old).close()
    names = "job, attempt, source, source_size, source_mtime_ns, contents, prompt_sha256, outcome, charged, credits, "
    names += "provider, model, fields, asked, got, status, code, message, request_id, endpoint, version, claimed_at"
    with contextlib.closing(sqlite3.connect(old)) as database:
        database.execute(
            f"INSERT INTO attempts ({names}) VALUES "
            "('z', 1, 's', 1, 1, '', '', 'completed', 'yes', 1.0, 'flux', 'm', '', 1, 1, 200, '', '', '', '', '', 1.0)"
        )
        database.commit()
    with contextlib.closing(opened(old)) as journal:
        assert journal.ledger.totals()["credits"] == 220


def test_a_result_is_in_the_file_that_replaced_the_ledger_while_it_was_written(path: str) -> None:
    with contextlib.closing(SqliteDatabase(path, guarded=True)) as database:
        database.change(lambda connection: connection.execute("INSERT INTO redeliveries VALUES ('a', 1, 0.0)"))
        with (
            contextlib.closing(sqlite3.connect(path)) as one,
            contextlib.closing(sqlite3.connect(f"{path}-copy")) as to,
        ):
            one.backup(to)

        def count(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE redeliveries SET times = 2")
            with contextlib.suppress(FileNotFoundError):
                pathlib.Path(f"{path}-copy").rename(path)

        database.change(count)
    with contextlib.closing(sqlite3.connect(path)) as found:
        assert found.execute("SELECT times FROM redeliveries").fetchall() == [(2,)]


def test_a_ledger_of_format_4_is_upgraded_and_counts_nothing_twice(path: str) -> None:
    def sums() -> list[tuple[object, ...]]:
        with contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT * FROM sums").fetchall()

    with contextlib.closing(opened(path)) as journal:
        journal.record(row(outcome="completed", charged="yes", credits=30.0, sent_at=1.0))
    before = sums()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("DROP TABLE events; DROP TABLE announced; PRAGMA user_version = 4;")
    with contextlib.closing(opened(path)) as journal:
        assert sums() == before != []
        journal.events.configure(["url"])
        assert journal.events.counts().pending == 0
        journal.record(row(job="c" * 16, outcome="completed", charged="yes", credits=12.0, sent_at=1.0))
    assert sum(float(str(one[3])) for one in sums()) == 42


# Budgets of folders


def test_a_job_without_a_budget_or_a_receiver_asks_the_journal_nothing_about_them(
    make: Callable[..., Journal],
) -> None:
    executed: list[str] = []

    def statements(journal: Journal, job: str) -> list[str]:
        """What one paid job makes SQLite do, without what its triggers do."""
        with journal._file.using() as connection:
            connection.set_trace_callback(executed.append)
        executed.clear()
        spend(journal, job, "anna")
        pay(journal, job, "anna")
        journal.decide(claim(job, "anna"), Decision(destination="outbox", facts={"charged": "yes"}), None)
        journal.finish(job)
        return [text for text in executed if not text.startswith("--")]

    plain = statements(make(), "a")
    assert not [text for text in plain if "events" in text or "announced" in text or "folder_sums" in text]
    other = make(bob=FolderBudget(credits_per_day=100, requests_per_minute=1))
    assert len(statements(other, "b")) == len(plain), "a budget of another folder"
    assert len(statements(make(anna=FolderBudget(credits_per_day=100)), "c")) > len(plain)
    notified = make()
    notified.events.configure(["url"])
    assert any("INTO events" in text for text in statements(notified, "d"))


def as_format_4(path: str) -> None:
    """Make a ledger what an earlier version wrote: without sums of folders."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        for name in ("sums_updated", "folder_sums_inserted", "folder_sums_updated", "attempts_updated"):
            database.execute(f"DROP TRIGGER {name}")
        added = TRIGGERS["sums_updated"].partition("BEGIN")[2]
        counted = TRIGGERS["attempts_updated"].rpartition("END")[0]
        database.execute(f"CREATE TRIGGER attempts_updated {counted} {added}")
        database.execute("DROP TABLE folder_sums")
        database.execute("PRAGMA user_version = 4")
        database.commit()


def contents(path: str) -> dict[str, Any]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        tables = ("attempts", "jobs", "sums", "folder_sums", "prices")
        found: dict[str, Any] = {
            name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall() for name in tables
        }
        found["schema"] = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
        found["version"] = database.execute("PRAGMA user_version").fetchone()
    return found


def test_a_ledger_of_format_4_is_updated_where_it_is_and_gets_the_sums_of_its_folders(
    make: Callable[..., Journal], tmp_path: Path
) -> None:
    path = str(tmp_path / "ledger.sqlite3")
    journal = make()
    for number, folder in enumerate(("", "anna", "anna/deep", "bob", ODD)):
        pay(journal, f"paid{number}", folder, NOON - number * DAY, 10.0 + number)
    pay(journal, "unknown_cost", "anna", credits_=None)
    journal.record(row_in("free", "anna", outcome="refused", charged="no"))
    assert spend(journal, "in flight", "anna") is None
    journal.close()
    before = contents(path)
    as_format_4(path)
    updated = make(anna=FolderBudget(credits_per_month=100))
    assert updated.budget().spent("anna")["budgets.anna.credits_per_month"][0] == 11 + 12 + 14
    assert contents(path) == before
    assert before["version"] == (VERSION,)
    pay(updated, "later", "anna")
    assert updated.budget().spent("anna")["budgets.anna.credits_per_month"][0] > 37


def test_an_update_from_format_4_that_is_killed_is_done_by_the_next_start(
    make: Callable[..., Journal], tmp_path: Path
) -> None:
    path = str(tmp_path / "ledger.sqlite3")
    journal = make()
    pay(journal, "a", "anna")
    journal.close()
    as_format_4(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE folder_sums (x)")  # what the update would make: it fails at it
    with pytest.raises(Exception, match="folder_sums"):
        make().ledger.rows()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (4,)
        database.execute("DROP TABLE folder_sums")
    assert make().ledger.ask("SELECT folder, credits FROM folder_sums")[0]["credits"] == 30
