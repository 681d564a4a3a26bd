"""While the shared database cannot be used, the queue is on hold (``database``), apart from the local disk (``disk``).

The journal of these daemons is in the state folder. Each access to it fails as one to a database that is out of reach,
as long as a file exists.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import HURRIED, Folders, LoggedDaemon, until

from imagewatch.daemon.admission import Admission
from imagewatch.journal.control import Control
from imagewatch.journal.holds import Holds
from imagewatch.protocol.reasons import failure
from imagewatch.system.errors import DatabaseError, SpoolError, UncertainError, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.station import Station

    from imagewatch.sandbox import Sandbox

MANY = 5
HINT = "start the server of the database"
CUT_OFF = f"""
import os
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system.errors import DatabaseError

def cut_off(real):
    def reach(self, *arguments, **options):
        if os.path.exists(os.environ["GATE"]):
            raise DatabaseError("the shared database cannot be reached: connection refused", hint={HINT!r})
        return real(self, *arguments, **options)
    return reach

for name in ("using", "change", "prove"):
    setattr(SqliteDatabase, name, cut_off(getattr(SqliteDatabase, name)))
"""
COMMAND = CUT_OFF + "from imagewatch.commands.main import main\nmain()\n"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file exists, the database is out of reach."""
    return tmp_path / "gate"


@pytest.fixture
def folders(tmp_path: Path, sandbox: Sandbox, gate: Path) -> Folders:
    made = Folders(tmp_path, sandbox.base_url)
    made.environ["GATE"] = str(gate)
    return made


@pytest.fixture
def daemon(folders: Folders, run: Callable[..., LoggedDaemon], tmp_path: Path) -> LoggedDaemon:
    script = tmp_path / "cut_off.py"
    script.write_text(CUT_OFF + HURRIED)
    return run(folders, "0.3", script=str(script))


def holds(folders: Folders) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return {hold["kind"]: hold for hold in json.loads((folders.state / "status.json").read_text())["holds"]}
    return {}


def drop(folders: Folders) -> None:
    for number in range(MANY):
        folders.prompt(f"p{number}", f"Number {number}")


def paid_once(folders: Folders, sandbox: Sandbox) -> None:
    until(lambda: set(folders.finished()) == {f"p{number}" for number in range(MANY)}, 60)
    assert set(folders.finished().values()) == {"outbox"}
    until(lambda: holds(folders) == {})
    report = sandbox.report()
    assert report["requests"] == report["charged"] == MANY


def test_nothing_is_sent_until_the_database_can_be_used_again(
    folders: Folders, sandbox: Sandbox, daemon: LoggedDaemon, gate: Path
) -> None:
    gate.touch()
    drop(folders)
    until(lambda: holds(folders).keys() == {"database"})
    (hold,) = holds(folders).values()
    assert (hold["reason"], hold["next"]) == ("the shared database cannot be reached: connection refused", HINT)
    assert hold["next_try_at"]
    event = daemon.wait_for("held")
    assert (event["kind"], event["level"], event["next"]) == ("database", "error", HINT)
    until(lambda: "the shared database cannot be used" in (folders.root / "imagewatch-status.txt").read_text())
    assert "connection refused" not in (folders.root / "imagewatch-status.txt").read_text()
    assert sandbox.report()["requests"] == 0
    gate.unlink()
    paid_once(folders, sandbox)
    assert daemon.wait_for("released")["kind"] == "database"
    assert [len(daemon.events(name)) for name in ("held", "released")] == [1, 1]
    assert daemon.stop() == 0


def test_what_was_sent_before_is_kept_and_finished_without_another_request(
    folders: Folders, sandbox: Sandbox, daemon: LoggedDaemon, gate: Path
) -> None:
    sandbox.hold()
    drop(folders)
    assert sandbox.wait_for_requests(4, 20)  # as many as limits.concurrency
    gate.touch()
    sandbox.release()
    until(lambda: holds(folders).keys() == {"database"})
    until(lambda: len(daemon.events("stuck")) > 0)
    assert {one["retried"] for one in daemon.events("stuck")} == {"automatically"}
    assert (folders.finished(), sandbox.report()["requests"]) == ({}, 4)
    gate.unlink()
    paid_once(folders, sandbox)
    assert daemon.stop() == 0


def test_disk_and_database_have_a_hold_each_that_its_own_test_ends(
    folders: Folders, sandbox: Sandbox, daemon: LoggedDaemon, gate: Path
) -> None:
    aside = folders.root / "aside"
    gate.touch()
    drop(folders)
    until(lambda: holds(folders).keys() == {"database"})
    folders.outbox.rename(aside)
    until(lambda: holds(folders).keys() == {"database", "disk"}, 30)
    gate.unlink()
    until(lambda: holds(folders).keys() == {"disk"}, 30)
    gate.touch()
    aside.rename(folders.outbox)
    until(lambda: holds(folders).keys() == {"database"}, 30)
    assert sandbox.report()["requests"] == 0
    gate.unlink()
    paid_once(folders, sandbox)
    assert daemon.stop() == 0


def test_a_daemon_that_starts_while_the_database_is_out_of_reach_waits_for_it(
    folders: Folders, sandbox: Sandbox, daemon: LoggedDaemon, gate: Path, run: Callable[..., LoggedDaemon]
) -> None:
    assert daemon.stop() == 0
    gate.touch()
    drop(folders)
    again = run(folders, "0.3", script=str(gate.parent / "cut_off.py"))
    until(lambda: holds(folders).keys() == {"database"})
    gate.unlink()
    paid_once(folders, sandbox)
    assert again.stop() == 0


def test_once_reports_the_database_and_exits_with_the_code_of_a_hold(
    folders: Folders, sandbox: Sandbox, start: Callable[..., Any], gate: Path
) -> None:
    script = gate.parent / "once.py"
    script.write_text(COMMAND)
    drop(folders)
    assert start(folders, "once", script=str(script)).wait() == 0
    gate.touch()
    assert start(folders, "once", script=str(script)).wait() == 69, "also if nothing waits"
    folders.prompt("late", "Late")
    held = start(folders, "once", script=str(script))
    assert held.wait() == 69
    assert "on hold (database: the shared database cannot be reached" in held.output
    assert sandbox.report()["requests"] == MANY


# With the clock of a test


class Gate:
    """The admission of a station whose journal fails as the test says."""

    def __init__(self, station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.station, self.holds = 100.0, station, Holds()
        self.fault: SpoolError | None = None
        self.tests = 0
        control = Control(str(station.state), station.spool.disk, station.journal.requests)
        clock = lambda: self.now  # noqa: E731
        self.admission = Admission(station.spool, station.journal, control, self.holds, lambda **_: None, clock, clock)
        self.admission.configure(station.config().limits, 0.0, lambda: None, str)
        monkeypatch.setattr(station.journal, "require", self._require)

    def _require(self, *, prove: bool) -> None:
        self.tests += 1
        if self.fault is not None and prove:
            raise self.fault

    def kinds(self) -> set[str]:
        return {hold.kind for hold in self.holds.all()}

    def later(self) -> None:
        """Let the daemon probe what is due a while later."""
        self.now += 60.0
        self.admission.probe_stores()

    @contextlib.contextmanager
    def without_outbox(self) -> Iterator[None]:
        aside = self.station.root / "aside"
        self.station.outbox.rename(aside)
        yield
        aside.rename(self.station.outbox)


@pytest.fixture
def gated(station: Station, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(station, monkeypatch)


def test_a_failure_of_the_database_is_not_one_of_the_disk() -> None:
    assert [failure(error("x")).kind for error in (SpoolError, DatabaseError, UncertainError)] == [
        "disk",
        "database",
        "database",
    ]
    assert failure(DatabaseError("x")).next.startswith("to see the cause, run: imagewatch check")
    assert DatabaseError("x").code, "with 0, a job that fails would wait for a person"


def test_a_hold_of_the_disk_ends_while_a_job_still_waits_for_the_database(gated: Gate) -> None:
    gated.admission.hold_for("job", DatabaseError("unreachable"))
    with gated.without_outbox():
        gated.admission.failed(SpoolError("missing", path=str(gated.station.outbox), code=2))
        gated.later()
        assert gated.kinds() == {"disk", "database"}
    gated.later()
    assert gated.kinds() == {"database"}
    assert gated.admission.slots() == 0
    with pytest.raises(Withdrawn, match=r"on hold \(database\)"), gated.admission.leaving():
        pass
    gated.admission.continues("job")
    gated.later()
    assert gated.kinds() == set()
    assert gated.admission.stores_work()


def test_a_hold_of_the_database_ends_while_a_job_still_waits_for_the_disk(gated: Gate) -> None:
    gated.fault = DatabaseError("unreachable")
    gated.admission.hold_for("job", SpoolError("full", code=28))
    gated.admission.failed(gated.fault)
    gated.later()
    assert gated.kinds() == {"disk", "database"}
    gated.fault = None
    gated.later()
    assert gated.kinds() == {"disk"}


def test_while_one_of_them_waits_for_its_next_test_nothing_is_delivered(gated: Gate) -> None:
    for error in (DatabaseError("unreachable"), SpoolError("full")):
        assert gated.admission.stores_work()
        gated.admission.failed(error)
        assert not gated.admission.stores_work()
        gated.later()


@pytest.mark.parametrize("error", [DatabaseError("unreachable"), SpoolError("full", code=28)], ids=["database", "disk"])
def test_a_job_that_holds_the_queue_still_has_its_turn_to_continue(gated: Gate, error: SpoolError) -> None:
    gated.admission.hold_for("job", error)
    gated.later()
    assert gated.admission.stores_work()
    assert gated.kinds() == {failure(error).kind}


def test_a_broken_disk_does_not_let_the_journal_be_tested(gated: Gate) -> None:
    with gated.without_outbox():
        gated.admission.failed(SpoolError("missing", path=str(gated.station.outbox), code=2))
        gated.later()
    assert gated.tests == 0, "of a journal on that disk it could create files in a folder that is not ours"


@pytest.mark.parametrize("error", [DatabaseError("unreachable"), SpoolError("full", code=28)], ids=["database", "disk"])
def test_no_first_byte_is_sent_before_a_test_has_ended_the_hold_whose_time_is_over(
    gated: Gate, error: SpoolError
) -> None:
    gated.admission.failed(error)
    gated.now += 60.0  # a worker waited for the disk, or the daemon was stopped
    with pytest.raises(Withdrawn), gated.admission.leaving():
        pass
    gated.admission.probe_stores()
    with gated.admission.leaving():
        pass
