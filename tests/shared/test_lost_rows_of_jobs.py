"""A database has lost the row of a job, or who took it over: what was paid for is published all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.losing import PowerCut
from support.peers import Peers

from imagewatch.job.lost_jobs import LostJobs
from imagewatch.job.outcome import End
from imagewatch.system.errors import ChargeUnknown, Withdrawn

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.peers import Peer
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

LATE = 120.0
"""So much later, no daemon waits for the response of another one any more, seconds."""
EVERYTHING = ("DELETE FROM imagewatch.attempts", "DELETE FROM imagewatch.jobs")


@pytest.fixture
def peers(tmp_path: Path, sandbox: Sandbox, postgres: Server, database: str) -> Iterator[Peers]:
    made = Peers(tmp_path, sandbox.base_url, postgres, database)
    yield made
    made.close()


def once(peer: Peer, before: str, act: Callable[[], object]) -> None:
    """Let something happen before the first change of the disk with these parts."""

    def first() -> None:
        del peer.disk.before[before]
        act()

    peer.disk.before[before] = first


def recover(peer: Peer) -> None:
    """Do what ``db recover`` does, in a process of its own."""
    peer.restart()
    lost = LostJobs(peer.spool)
    for found in list(lost.find()):
        assert lost.carry_out(found) == ""
    peer.restart()


def test_a_paid_response_whose_result_is_recorded_after_its_job_was_lost_is_published(
    peers: Peers, sandbox: Sandbox
) -> None:
    one = peers.add("one")
    one.prompt("cat", "a cat [sandbox: url]")
    once(one, "replace|answer.1", lambda: peers.lose(*EVERYTHING))
    one.killed(one.start, "/answers/|.fetched.")
    assert peers.outcomes() == ["completed"]
    job = one.answers()[0].name.partition(".")[0]
    one.finish(job)
    assert one.answers(), "the response is there until it is published"
    recover(one)
    peers.let_take_over(one)
    assert one.finish(job).destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert sandbox.report()["requests"] == 1


def test_a_job_of_a_busy_endpoint_that_the_database_has_lost_is_continued(peers: Peers, sandbox: Sandbox) -> None:
    one = peers.add("one")
    one.prompt("cat", "a cat [sandbox: once 429-plain]")
    once(one, "replace|answer.1", lambda: peers.lose(*EVERYTHING))
    assert one.start().end is End.DEFERRED
    job = one.answers()[0].name.partition(".")[0]
    one.restart()
    recover(one)
    peers.let_take_over(one)
    assert one.finish(job).destination == "outbox"
    assert one.finished() == {"cat": "outbox"}


@pytest.mark.parametrize("was_taken", [True, False])
def test_a_response_is_published_if_the_database_has_lost_who_took_its_job_over(
    peers: Peers, sandbox: Sandbox, was_taken: bool
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    one.killed(one.start, "create|answer.1")
    job = peers.let_take_over(two)
    two.killed(lambda: two.process(job), "/.imagewatch/|answer.1")
    assert two.answers()
    before = "holder = 'one', epoch = 1" if was_taken else "holder = '', epoch = 0"
    peers.lose("DELETE FROM imagewatch.attempts", f"UPDATE imagewatch.jobs SET {before}, state = 'open', decision = ''")
    if was_taken:
        assert list(one.common.own()) == [job]
        one.process(job)
    else:
        (taken,) = one.common.take(1)
        assert taken.claim is not None
        one.worker.start(taken.claim)
    two.process(job)
    assert one.finish(job).destination == "outbox"
    assert two.finish(job).end is End.NOTHING
    assert one.finished() == {"cat": "outbox"}
    assert (two.answers(), one.leftovers()) == ([], [])
    assert sandbox.report()["requests"] == 1


# A response of a job that had ended before


@pytest.fixture
def late(peers: Peers) -> tuple[Peer, Peer, str]:
    """A daemon with the response of a job, another one that has declared an unknown charge, and the job."""
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    one.killed(one.start, "/.imagewatch/|answer.1")
    two.later = LATE
    job = peers.let_take_over(two)
    two.finish(job)
    assert (two.error("cat")["charged"], peers.state()) == ("unknown", "done")
    return one, two, job


@pytest.fixture(params=["one", "two"])
def first(request: pytest.FixtureRequest) -> str:
    """The daemon that continues first after the recovery."""
    return str(request.param)


def is_published(peers: Peers, late: tuple[Peer, Peer, str], first: str) -> None:
    """Let both daemons continue, and check that the response is published."""
    one, two, job = late
    for peer in (one, two, one) if first == "one" else (two, one):
        peers.rows("UPDATE imagewatch.jobs SET lease_ends_at = 0")
        peer.common.take_over(5)
        peer.finish(job)
    assert one.finished() == {"cat": "outbox"}
    assert (one.names("errors"), one.names("archive")) == ([], ["cat.prompt.txt"])
    assert (peers.state(), peers.outcomes()) == ("done", ["completed"])
    assert (one.answers(), two.answers(), one.leftovers()) == ([], [], [])


def test_the_response_of_a_job_that_is_read_again_is_not_removed(
    tmp_path: Path, sandbox: Sandbox, postgres: Server, database: str
) -> None:
    peers = Peers(tmp_path, sandbox.base_url, postgres, database, inbox="")
    one = peers.add("one")
    one.prompt("cat", "a cat [sandbox: no-images]")
    assert one.worker.start(one.found()[0]).charged == "yes"
    job, answers = peers.job(), one.answers()
    assert one.journal.reopen(job)
    recover(one)
    assert one.spool.take_over() == [job]
    assert one.answers() == answers
    one.finish(job)
    assert (peers.state(), one.answers()) == ("kept", answers)
    assert one.error("cat")["charged"] == "yes"
    peers.close()


def test_a_response_that_came_after_an_unknown_charge_is_published_after_recovery(
    peers: Peers, late: tuple[Peer, Peer, str], first: str
) -> None:
    one, two, job = late
    one.process(job)
    assert peers.state() == "reopened"
    recover(one)
    recover(two)
    is_published(peers, late, first)


@pytest.mark.parametrize("before", ["rename|/.imagewatch/|cat.prompt.txt", "unlink|cat.error.toml"])
@pytest.mark.parametrize("changes", [(), EVERYTHING])
def test_it_is_published_if_its_daemon_was_killed_while_it_withdrew_the_unknown_charge(
    peers: Peers, late: tuple[Peer, Peer, str], first: str, before: str, changes: tuple[str, ...]
) -> None:
    one, two, job = late
    one.process(job)
    one.killed(lambda: one.process(job), before)
    if changes:
        peers.lose(*changes)
    recover(one)
    recover(two)
    is_published(peers, late, first)


def test_it_is_published_if_the_database_has_lost_that_the_charge_was_unknown(
    peers: Peers, late: tuple[Peer, Peer, str], first: str
) -> None:
    one, two, _ = late
    peers.lose(
        "UPDATE imagewatch.jobs SET state = 'open', decision = ''",
        "UPDATE imagewatch.attempts SET outcome = 'sent', charged = 'unknown'",
    )
    recover(one)
    recover(two)
    is_published(peers, late, first)


@pytest.mark.parametrize("number", [0, 1])
def test_it_is_published_if_the_database_has_lost_the_job(
    peers: Peers, late: tuple[Peer, Peer, str], first: str, number: int
) -> None:
    peers.lose(*EVERYTHING)
    recover(late[number])  # type: ignore[arg-type]
    recover(late[1 - number])  # type: ignore[arg-type]
    is_published(peers, late, first)


# A charge that is not known, with free attempts before it


@pytest.fixture
def own(tmp_path: Path, sandbox: Sandbox, postgres: Server, database: str) -> Iterator[Peers]:
    """Daemons with inboxes of their own."""
    made = Peers(tmp_path, sandbox.base_url, postgres, database, inbox="")
    yield made
    made.close()


def without_response(peer: Peer, error: BaseException) -> None:
    """Let the next requests of a daemon be sent, and end so before anything of a response arrives."""

    def send(
        _job: str, _body: object, on_send: Callable[[], contextlib.AbstractContextManager[object]], _: object
    ) -> None:
        with on_send():
            raise error

    peer.client.send = send  # type: ignore[method-assign, assignment]


def withdrawn(peer: Peer, job: str) -> None:
    """Let a daemon record an attempt, and send nothing of it."""
    send = peer.client.send

    def withdraw(_job: str, _body: object, on_send: Callable[[], object], _: object) -> None:
        on_send()
        raise Withdrawn("the daemon is ending")

    peer.client.send = withdraw  # type: ignore[method-assign, assignment]
    assert peer.process(job).end is End.DEFERRED
    peer.client.send = send  # type: ignore[method-assign]


def test_a_request_after_a_free_one_whose_row_is_lost_is_an_unknown_charge(own: Peers, sandbox: Sandbox) -> None:
    one = own.add("one")
    one.prompt("cat", "a cat [sandbox: once 429-plain]")
    (claim,) = one.found()
    assert one.worker.start(claim).end is End.DEFERRED
    without_response(one, PowerCut())
    with pytest.raises(PowerCut):
        one.process(claim.job)
    own.lose("DELETE FROM imagewatch.attempts WHERE attempt = 2")
    recover(one)
    assert one.process(claim.job).charged == "unknown"
    assert own.outcomes() == ["busy", "unknown"]
    assert sandbox.report()["requests"] == 1, "the other one did not reach the sandbox, and is not sent again"


def test_an_unknown_charge_whose_row_is_lost_is_not_ended_by_an_earlier_free_response(
    own: Peers, sandbox: Sandbox
) -> None:
    one = own.add("one")
    one.prompt("cat", "a cat [sandbox: 429-plain]")
    (claim,) = one.found()
    assert one.worker.start(claim).end is End.DEFERRED
    withdrawn(one, claim.job)
    assert one.process(claim.job).end is End.DEFERRED
    without_response(one, ChargeUnknown("no response came"))
    one.killed(lambda: one.process(claim.job), "remove_folder")
    own.lose(*EVERYTHING)
    recover(one)
    one.finish(claim.job)
    assert one.finished() == {"cat": "errors"}
    assert (own.outcomes(), one.names("inbox")) == (["unknown"], [])
    assert sandbox.report()["requests"] == 2


def test_a_late_response_is_published_though_its_number_was_not_known_where_its_row_was_written_again(
    peers: Peers, sandbox: Sandbox
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    one.killed(one.start, "/.imagewatch/|answer.1")
    # As if an attempt before it had been recorded and not sent: an error file does not count that one.
    peers.rows("UPDATE imagewatch.attempts SET attempt = 2")
    for path in one.answers():
        path.rename(path.with_name(path.name.replace("answer.1", "answer.2")))
    for path in one.inbox.glob(".imagewatch/*/sent.1"):
        path.unlink()
    two.later = LATE
    job = peers.let_take_over(two)
    assert two.finish(job).charged == "unknown"
    two.later = 0.0
    peers.lose(*EVERYTHING)
    recover(two)  # this host does not have the response
    assert peers.rows("SELECT attempt, outcome FROM imagewatch.attempts") == [(1, "unknown")]
    recover(one)
    assert one.finish(job).destination == "outbox"
    assert peers.rows("SELECT attempt, outcome FROM imagewatch.attempts") == [(2, "completed")]
    assert (one.finished(), one.answers()) == ({"cat": "outbox"}, [])
    assert sandbox.report()["requests"] == 1
