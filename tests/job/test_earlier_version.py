"""Jobs in a state folder of an earlier version are finished."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from imagewatch.job.outcome import End
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from support.station import Station

    from imagewatch.sandbox import Sandbox


def job_of_an_earlier_version(station: Station) -> str:
    """Create a job whose decision is on disk as version 0.1.0 wrote it, with nothing published."""
    deliver, discard = station.spool.delivery.deliver, station.spool.originals.discard

    def fail(*_: object) -> None:
        raise SpoolError("no space left on device")

    station.spool.delivery.deliver = station.spool.originals.discard = fail
    with pytest.raises(SpoolError):
        station.work()
    station.spool.delivery.deliver, station.spool.originals.discard = deliver, discard
    (job,) = station.spool.unfinished()
    path = station.state / "jobs" / job / "decision.json"
    now = json.loads(path.read_text())
    destination = "away" if now["destination"] == "discarded" else now["destination"]
    then = {"door": destination, "document": now["result_file"]}
    then |= {name: value for name, value in now.items() if name not in {"destination", "result_file"}}
    path.write_text(json.dumps(then))
    return job


@pytest.mark.parametrize(("text", "folder"), [("a cat", "outbox"), ("[sandbox: 400] a cat", "errors")])
def test_a_decision_of_an_earlier_version_is_carried_out(
    station: Station, sandbox: Sandbox, text: str, folder: str
) -> None:
    station.prompt("cat", text)
    job_of_an_earlier_version(station)
    (outcome,) = station.recover()
    assert (outcome.end, outcome.destination) == (End.OVER, folder)
    assert station.finished() == {"cat": folder}
    assert sandbox.report()["requests"] == 1
    assert station.leftovers() == []


def test_a_redelivery_that_an_earlier_version_found_is_removed(station: Station, sandbox: Sandbox) -> None:
    path = station.prompt("cat", "a cat")
    status = path.stat()
    station.work()
    path.write_text("a cat")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    job_of_an_earlier_version(station)
    (outcome,) = station.recover()
    assert outcome.end is End.REDELIVERED
    assert sandbox.report()["requests"] == 1
    assert station.leftovers() == []
