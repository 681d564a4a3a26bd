"""Two daemons of an inbox write the same file at the same time: what appears under its name is whole."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from support.losing import PowerCut

from imagewatch.job.outcome import End
from imagewatch.system.disk_moves import Moves
from shared import test_handing_over as handing

if TYPE_CHECKING:
    from pathlib import Path

    from support.peers import Peer, Peers

peers = handing.peers


@pytest.fixture
def other_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox is on another file system than the state folders: images are copied."""
    moved = Moves._moved

    def act(self: Moves, file: Any, source: str, target: str) -> bool:
        return "/outbox/" not in target and moved(self, file, source, target)

    monkeypatch.setattr(Moves, "_moved", act)


def end_without_tidying(peer: Peer) -> None:
    """End a daemon as SIGKILL does: what it was writing stays."""
    peer.disk.unlink = lambda _: None  # type: ignore[method-assign]
    raise PowerCut


def killed_while_it_publishes(one: Peer, before: str) -> list[Path]:
    """Let a daemon be killed while it publishes; return what it was writing."""
    left: list[Path] = []

    def end() -> None:
        left.extend(one.outbox.glob(".iw-*"))
        end_without_tidying(one)

    one.disk.before[before] = end
    one.prompt("cat", "a cat")
    with pytest.raises(PowerCut):
        one.start()
    one.restart()
    return left


def published(one: Peer) -> tuple[int, int]:
    """Return the size of the only image, and what its receipt says of that."""
    (image,) = one.outbox.glob("cat.*[!l]")
    return image.stat().st_size, one.receipt("cat")["images"][0]["bytes"]


@pytest.mark.usefixtures("other_file_system")
def test_an_image_is_whole_although_a_daemon_that_lost_the_job_copies_it_too_and_is_killed(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_while_it_publishes(one, "create|/outbox/.iw-")
    job = peers.job()
    row = one.journal.job(job)
    assert row is not None
    assert row.decision is not None
    claim, decision = row.claim, row.decision

    def half(source: Any, copy: Any, _: int) -> None:
        copy.write(source.read()[:1000])
        end_without_tidying(one)

    def late() -> None:
        two.disk.before.clear()
        one.common.set_epoch(job, 1)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", half)
            with pytest.raises(PowerCut):
                one.spool.delivery.deliver(claim, decision, lambda: None)

    peers.let_take_over(two)
    two.disk.before["rename|/outbox/cat.j"] = late
    assert two.finish(job).destination == "outbox"
    size, said = published(one)
    assert size == said > 1000


@pytest.mark.usefixtures("other_file_system")
@pytest.mark.parametrize("before", ["sync|/outbox/cat.j", "sync|/outbox/cat.receipt.toml"])
def test_what_a_killed_daemon_was_publishing_is_removed_by_the_one_that_takes_the_job_over(
    peers: Peers, before: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    assert len(killed_while_it_publishes(one, before)) == 1
    assert two.finish(peers.let_take_over(two)).destination == "outbox"
    assert list(one.outbox.glob(".iw-*")) == []
    size, said = published(one)
    assert size == said


MOMENTS = ("create|/outbox/.iw-", "sync|/outbox/cat.j", "rename|/outbox/cat.j")
RECEIPT_MOMENTS = ("sync|/outbox/cat.receipt.toml", "rename|/outbox/cat.receipt.toml")


@pytest.mark.usefixtures("other_file_system")
@pytest.mark.parametrize("clock", ["its clock went on", "its clock stood still"])
@pytest.mark.parametrize("moment", MOMENTS + RECEIPT_MOMENTS)
def test_what_a_daemon_was_publishing_when_it_was_stopped_does_not_appear_after_a_reader_took_what_another_published(
    peers: Peers, moment: str, clock: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    read: list[str] = []

    def stopped_meanwhile() -> None:
        one.disk.before.clear()
        renewed = dict(one.common._renewed)
        assert two.finish(peers.let_take_over(two)).destination == "outbox"
        if clock == "its clock stood still":  # that of a virtual machine that was paused
            one.common._renewed |= renewed
        for path in one.outbox.glob("cat.*"):
            read.append(path.suffix)
            path.unlink()

    one.disk.before[moment] = stopped_meanwhile
    one.prompt("cat", "a cat")
    assert one.start().end is End.NOTHING
    assert sorted(read) == [".jpg", ".toml"]
    assert one.names("outbox") == []
    assert peers.outcomes() == ["completed"]


@pytest.mark.parametrize("moment", ["create|/errors/.iw-", "rename|/errors/cat.error.toml"])
def test_an_error_file_of_an_unknown_charge_does_not_appear_again_for_the_response_that_it_is_about(
    peers: Peers, moment: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    read: list[str] = []

    def stopped_meanwhile() -> None:
        one.disk.before.clear()
        assert two.finish(peers.let_take_over(two)).charged == "unknown"
        for path in one.errors.glob("cat.*"):
            read.append(path.name)
            path.unlink()

    one.disk.before[moment] = stopped_meanwhile
    one.prompt("cat", "[sandbox: 502] A cat")
    one.finish(one.start().job)
    assert read
    assert (one.names("errors"), one.answers()) == ([], [])
    assert peers.outcomes() == ["unknown"]


def test_a_lease_that_could_not_be_renewed_is_not_relied_on(peers: Peers) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    seen: list[bool] = []

    def meanwhile() -> None:
        one.disk.before.clear()
        renewed = dict(one.common._renewed)
        job = peers.let_take_over(two)
        one.common._renewed |= renewed
        one.common.renew()
        seen.append(one.common.is_sure(job))

    one.disk.before["/outbox/"] = meanwhile
    one.start()
    assert seen == [False]


def test_a_response_that_two_daemons_hand_over_is_whole_although_one_of_them_is_killed(peers: Peers) -> None:
    one, two, three = peers.add("one"), peers.add("two"), peers.add("three")
    one.prompt("cat", "a cat")
    one.killed(one.start, "/.imagewatch/|answer.1")
    for path in one.answers():  # the third one had the job meanwhile
        shutil.copy(path, three.state / "answers")
    job = peers.let_take_over(two)
    two.spool.handover.fence(job)
    there: list[Path] = []

    def being_written() -> list[Path]:
        return list(one.inbox.glob(".imagewatch/*/answer.1*tmp"))

    def cut_short() -> None:
        (path,) = [path for path in being_written() if path not in there] or there
        os.truncate(path, path.stat().st_size // 2)
        end_without_tidying(three)

    def hand_over() -> None:
        one.disk.before.clear()
        there.extend(being_written())
        three.disk.before["sync|/.imagewatch/|/answer.1"] = cut_short
        with pytest.raises(PowerCut):
            three.process(job)

    one.disk.before["replace|/.imagewatch/|/answer.1"] = hand_over
    one.process(job)
    outcome = two.finish(job)
    assert (outcome.destination, outcome.problems) == ("outbox", ())
    assert list(one.inbox.glob(".imagewatch/*.[0-9]*")) == []
