"""A decision with the names of version 0.1.0 is carried out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from imagewatch.job.outcome import End
from imagewatch.protocol.values import Claim, dump

if TYPE_CHECKING:
    from support.station import Station

JOB = "0123456789abcdef"


def job_of_an_earlier_version(station: Station, decision: dict[str, object]) -> None:
    """Leave a claimed prompt with its record, as version 0.1.0 did."""
    record, claimed = station.state / "jobs" / JOB, station.inbox / ".imagewatch" / JOB
    for folder in (record, claimed):
        folder.mkdir(parents=True)
    (claimed / "cat.prompt.txt").write_text("a cat")
    (record / "claim.json").write_bytes(dump(Claim(job=JOB, folder="", stem="cat", at=1.0)))
    (record / "decision.json").write_text(json.dumps(decision))
    station.spool.take_over()


@pytest.mark.parametrize(("destination", "name"), [("outbox", "cat.receipt.toml"), ("errors", "cat.error.toml")])
def test_a_decision_of_an_earlier_version_is_carried_out(station: Station, destination: str, name: str) -> None:
    facts = {"charged": "no", "answered": True, "images": [], "attempts": 1}
    moves = [{"source": "claim/cat.prompt.txt", "name": "cat.prompt.txt"}]
    decision = {"door": destination, "document": 'charged = "no"\n', "name": name, "facts": facts}
    job_of_an_earlier_version(station, decision | {"keep" if destination == "outbox" else "moves": moves})
    (outcome,) = station.recover()
    assert (outcome.end, outcome.destination) == (End.OVER, destination)
    assert (station.root / destination / name).read_text() == 'charged = "no"\n'
    assert station.leftovers() == []


def test_a_redelivery_that_an_earlier_version_found_is_removed(station: Station) -> None:
    job_of_an_earlier_version(station, {"door": "away"})
    (outcome,) = station.recover()
    assert outcome.end is End.REDELIVERED
    assert station.leftovers() == []
