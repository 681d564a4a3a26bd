"""Jobs that are given back to the inbox, and jobs that continue after a wait."""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from support.endpoint import unique_png
from support.inotify import Events
from support.losing import PowerCut
from support.peers import HookedDisk
from support.station import Distrustful, Station

from imagewatch.job.outcome import End
from imagewatch.protocol.values import dump
from imagewatch.system.errors import Withdrawn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

FRONT = '+++\ninput_images = ["a.png", "zebra.png"]\n+++\nBoth'


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_a_prompt_goes_back_into_the_inbox_after_its_images(tmp_path: Path) -> None:
    """Otherwise a scan at that moment could claim the prompt and pay for an image from its text alone."""
    with closing(Station(tmp_path, "http://127.0.0.1:9")) as station:  # no server listens there, so nothing was sent
        for name in ("a.png", "zebra.png"):
            station.drop(name, unique_png(name))
        station.prompt("middle", FRONT)
        events = Events(station.inbox)
        (outcome,) = station.work()
        names = [name for _, name in events.read() if not name.startswith(".")]
        events.close()
    assert outcome.end is End.RETURNED
    assert names == ["a.png", "zebra.png", "middle.prompt.txt"]
    assert station.names("inbox") == ["a.png", "middle.prompt.txt", "zebra.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_a_failed_prompt_is_moved_to_errors_after_its_images_and_before_its_error_file(station: Station) -> None:
    for name in ("a.png", "zebra.png"):
        station.drop(name, unique_png(name))
    station.prompt("middle", f"{FRONT} [sandbox: 400]")
    events = Events(station.errors)
    station.work()
    names = [name for _, name in events.read() if not name.startswith(".")]
    events.close()
    assert list(dict.fromkeys(names)) == ["a.png", "zebra.png", "middle.prompt.txt", "middle.error.toml"]


def claimed(station: Station) -> Any:
    """The only prompt that is ready, as a claim."""
    (candidate,) = station.scan.scan_all(0.0, 1e12).ready
    return candidate.claim(station.spool.new_job(), 1e9)


def test_a_refusal_from_before_a_wait_is_not_reported_again(station: Station, sandbox: Sandbox) -> None:
    """The job waits for its name. Credits were added meanwhile, so the old refusal must delay no other prompt."""
    asked = []

    def another_job_shows_it(kind: str) -> bool:
        asked.append(kind)
        station.prompt("cat", "a newer prompt of this name")  # so this prompt cannot go back yet
        return False

    worker = Distrustful(
        station.spool, station.client, station.journal, station.config(), may_report=another_job_shows_it
    )
    station.prompt("cat", "a cat [sandbox: 402]")
    first = worker.start(claimed(station))
    assert (first.end, first.awaits_name, first.reason.kind) == (End.DEFERRED, True, "credits")
    second = worker.process(first.job, is_resumed=True)
    assert (second.end, second.awaits_name, second.reason) == (End.DEFERRED, True, None)
    (station.inbox / "cat.prompt.txt").unlink()
    third = worker.process(first.job, is_resumed=True)
    assert (third.end, third.reason) == (End.RETURNED, None)
    assert asked == ["credits"], "it is shown, or not shown, once"
    assert (station.inbox / "cat.prompt.txt").read_text() == "a cat [sandbox: 402]"
    assert (station.names("errors"), sandbox.report()["requests"]) == ([], 1)


@pytest.mark.parametrize("image", [False, True])
def test_a_prompt_that_was_withdrawn_while_a_newer_one_came_goes_back_when_its_name_is_free(
    station: Station, sandbox: Sandbox, image: bool
) -> None:
    asked = []

    @contextmanager
    def leaving() -> Iterator[None]:
        asked.append(station.names("inbox"))
        if any(name.startswith(".imagewatch/") for name in asked[-1]):  # it is claimed
            station.prompt("cat", "a newer prompt of this name")
            raise Withdrawn("the queue was put on hold")
        yield

    worker = Distrustful(station.spool, station.client, station.journal, station.config(), leaving=leaving)
    if image:
        station.drop("cat.png", unique_png("cat"))
    station.prompt("cat", "a cat")
    first = worker.start(claimed(station))
    assert (first.end, first.awaits_name) == (End.DEFERRED, True)
    second = station.worker.process(first.job, is_resumed=True)
    assert (second.end, second.awaits_name) == (End.DEFERRED, True)
    (station.inbox / "cat.prompt.txt").unlink()
    third = station.worker.process(first.job, is_resumed=True)
    assert third.end is End.RETURNED
    assert sandbox.report()["requests"] == 0
    station.work()
    assert station.finished() == {"cat": "outbox"}
    assert [call["prompt"] for call in sandbox.report()["calls"]] == ["a cat"]
    assert station.leftovers() == []


def test_an_api_that_was_busy_before_a_wait_delays_no_other_prompt_now(station: Station, sandbox: Sandbox) -> None:
    station.prompt("cat", "a cat [sandbox: 429]")
    first = station.worker.start(claimed(station))
    assert (first.end, first.reason.kind) == (End.DEFERRED, "busy")
    station.environ["IMAGEWATCH_RETRY__ATTEMPTS"] = "1"
    worker = Distrustful(station.spool, station.client, station.journal, station.config())
    second = worker.process(first.job, is_resumed=True)
    assert (second.end, second.reason, second.answered) == (End.OVER, None, False)
    assert station.error("cat")["charged"] == "no"
    assert sandbox.report()["requests"] == 1


def kill() -> None:
    raise PowerCut


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_prompt_that_a_person_has_put_back_is_sent_if_its_first_job_was_not_over(
    tmp_path: Path, sandbox: Sandbox, is_removed: bool
) -> None:
    disk = HookedDisk()
    with closing(Station(tmp_path, sandbox.base_url, disk)) as station:
        station.prompt("cat", "a cat [sandbox: 400]")
        disk.before["remove_folder|/.imagewatch/"] = kill
        with pytest.raises(PowerCut):
            station.work()
        (job,) = station.spool.unfinished()
        assert station.names("errors") == ["cat.error.toml", "cat.prompt.txt"]
        disk.before.clear()
        (station.errors / "cat.prompt.txt").rename(station.inbox / "cat.prompt.txt")
        if is_removed:
            (station.errors / "cat.error.toml").unlink()
        assert station.spool.take_over() == [job]  # the next start
        station.recover()
        assert station.names("inbox") == ["cat.prompt.txt"]
        (outcome,) = station.work()
        assert outcome.job != job
    assert sandbox.report()["requests"] == 2


def test_a_newer_prompt_of_the_name_of_a_job_that_is_read_again_stays_in_the_inbox(
    station: Station, sandbox: Sandbox
) -> None:
    station.prompt("cat", "a cat [sandbox: no-images]")
    (outcome,) = station.work()
    row = station.journal.kept(outcome.job)
    assert row is not None
    restored = replace(row.claim, files={})  # as it is written again from its error file
    station.journal.file.change(
        lambda one: one.execute("UPDATE jobs SET claim = ? WHERE id = ?", (dump(restored).decode(), outcome.job))
    )
    assert station.journal.reopen(outcome.job)
    station.prompt("cat", "another cat")
    assert station.spool.take_over() == [outcome.job]
    assert station.names("inbox") == ["cat.prompt.txt"]


def test_a_response_that_is_read_again_waits_for_the_newer_job_of_its_name(station: Station, sandbox: Sandbox) -> None:
    station.prompt("cat", "a cat [sandbox: no-images]")
    (first,) = station.work()
    assert first.charged == "yes"
    station.prompt("cat", "another cat [sandbox: once 429-plain]")
    newer = station.worker.start(claimed(station))
    assert newer.end is End.DEFERRED
    assert station.journal.reopen(first.job)
    waits = station.worker.process(first.job)
    assert (waits.end, waits.awaits_name) == (End.DEFERRED, True)
    assert station.worker.process(newer.job, is_resumed=True).destination == "outbox"
    assert station.worker.process(first.job).charged == "yes"
    assert station.journal.kept(first.job) is not None
    assert sandbox.report()["requests"] == 3
