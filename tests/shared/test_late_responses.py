"""A daemon knows what came of its request only after another one has declared an unknown charge: nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from imagewatch.job.outcome import End
from shared import test_handing_over as handing

if TYPE_CHECKING:
    from support.peers import Peer, Peers

    from imagewatch.sandbox import Sandbox

peers = handing.peers
LATE = handing.LATE
BEFORE_THE_ERROR_FILE, AFTER_IT = "rename|/errors/|.error.toml", "unlink|/claim.json"


def killed_before_it_shares(one: Peer, prompt: str = "a cat") -> None:
    """Let a daemon send a prompt, save the response in its state folder, and be killed then."""
    one.prompt("cat", prompt)
    one.killed(one.start, "/.imagewatch/|answer.1")
    assert [path.suffix for path in one.answers() if ".answer." in path.name]


def declared_unknown(peers: Peers, two: Peer, before: str = "") -> str:
    """Let another daemon take the job over and declare an unknown charge; return its id.

    Args:
        peers: All daemons.
        two: The other daemon.
        before: The change before which it is killed; empty: it ends the job.
    """
    two.later = LATE
    job = peers.let_take_over(two)
    if before:
        two.killed(lambda: two.process(job), before)
    else:
        assert two.finish(job).charged == "unknown"
    two.later = 0.0
    assert peers.outcomes() == ["unknown"]
    return job


# A job that another daemon has decided, and not ended


@pytest.mark.parametrize("before", [BEFORE_THE_ERROR_FILE, AFTER_IT])
def test_a_daemon_that_gets_its_job_back_as_an_unknown_charge_publishes_the_response_that_only_it_has(
    peers: Peers, sandbox: Sandbox, before: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two, before)
    peers.let_take_over(one)
    assert one.finish(job).destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert (peers.state(), peers.outcomes()) == ("done", ["completed"])
    assert (one.names("errors"), one.names("archive"), one.answers()) == ([], ["cat.prompt.txt"], [])
    assert list(one.inbox.glob(".imagewatch/*.[0-9]*")) == []
    assert sandbox.report()["requests"] == 1


def test_the_last_copy_of_a_response_is_published_by_the_daemon_that_takes_over_the_unknown_charge(
    peers: Peers,
) -> None:
    one, two, three = peers.add("one"), peers.add("two"), peers.add("three")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two, BEFORE_THE_ERROR_FILE)
    assert one.process(job).end is End.DEFERRED, "it hands the response over"
    for path in one.answers():
        path.unlink()
    peers.let_take_over(three)
    assert three.finish(job).destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert list(one.inbox.glob(".imagewatch/*.[0-9]*")) == []


def test_a_response_stays_in_the_claim_folder_until_the_unknown_charge_is_withdrawn(peers: Peers) -> None:
    one, two, three = peers.add("one"), peers.add("two"), peers.add("three")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two, BEFORE_THE_ERROR_FILE)
    assert one.process(job).end is End.DEFERRED, "it hands the response over"
    peers.let_take_over(three)
    three.killed(lambda: three.finish(job), "rename|/.imagewatch/|cat.prompt.txt")
    for path in (*one.answers(), *three.answers()):
        path.unlink()
    peers.let_take_over(two)
    assert two.finish(job).destination == "outbox"


def test_a_prompt_is_back_in_the_claim_folder_only_beside_its_late_response(peers: Peers) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two)

    def come_back() -> None:
        for _ in range(4):
            one.process(job)

    one.killed(come_back, "rename|/.imagewatch/|cat.prompt.txt")
    assert len(list(one.inbox.glob(".imagewatch/*/answer.1"))) == 1
    for path in one.answers():
        path.unlink()
    peers.let_take_over(two)
    assert two.finish(job).destination == "outbox"


def test_a_daemon_that_gets_its_job_back_as_an_unknown_charge_reports_that_it_has_not_sent_it(
    peers: Peers, sandbox: Sandbox
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")

    def take_over() -> None:
        one.disk.before.clear()
        declared_unknown(peers, two, BEFORE_THE_ERROR_FILE)

    one.disk.before["create|sent.1"] = take_over
    assert one.start().end is End.DEFERRED
    job = peers.let_take_over(one)
    assert one.finish(job).end is End.RETURNED
    assert peers.outcomes() == ["unsent"]
    assert (one.names("errors"), one.names("inbox")) == ([], ["cat.prompt.txt"])
    assert one.start().destination == "outbox"
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("before", [BEFORE_THE_ERROR_FILE, ""])
@pytest.mark.parametrize(("prompt", "charged"), [("a cat [sandbox: 502]", "unknown"), ("a cat [sandbox: 400]", "no")])
def test_a_late_response_without_an_image_ends_the_job_and_nothing_is_sent_again(
    peers: Peers, before: str, prompt: str, charged: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one, prompt)
    job = declared_unknown(peers, two, before)
    if before:
        peers.let_take_over(one)
    assert one.finish(job).end is End.OVER
    error = one.error("cat")
    assert (error["status"], error["charged"]) == (int(prompt[-4:-1]), charged)
    assert (peers.state(), one.answers()) == ("done", [])
    assert one.names("inbox") == []
    assert list(one.inbox.glob(".imagewatch/*.[0-9]*")) == []


# A job that another daemon has ended


def test_a_response_is_published_although_another_daemon_ends_the_job_while_this_one_begins_to_continue_it(
    peers: Peers,
) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one)
    job, fence = peers.job(), one.spool.handover.fence

    def late(job: str) -> None:
        one.spool.handover.fence = fence  # type: ignore[method-assign]
        declared_unknown(peers, two)
        fence(job)

    assert list(one.common.own()) == [job]
    one.spool.handover.fence = late  # type: ignore[method-assign]
    assert one.finish(job).destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert (peers.state(), peers.outcomes(), one.answers()) == ("done", ["completed"], [])


# A second prompt of the same name


def pay_again(one: Peer, prompt: str) -> None:
    """Do what a person does that accepts a second charge, as ``retry --pay-again`` does."""
    path = one.root / "errors/cat.prompt.txt"
    path.write_text(prompt)
    path.rename(one.inbox / "cat.prompt.txt")
    (one.root / "errors/cat.error.toml").unlink()


def test_a_late_response_leaves_the_files_of_a_later_prompt_of_that_name_in_the_errors_folder(
    peers: Peers, sandbox: Sandbox
) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two)
    pay_again(one, "another cat [sandbox: 502]")
    assert two.start().charged == "unknown"
    there = {path.name: path.read_bytes() for path in (one.root / "errors").iterdir()}
    assert sorted(there) == ["cat.error.toml", "cat.prompt.txt"]
    assert one.finish(job).destination == "outbox"
    assert {path.name: path.read_bytes() for path in (one.root / "errors").iterdir()} == there
    assert (one.names("inbox"), one.names("archive")) == ([], [])
    assert sandbox.report()["requests"] == 2


def test_a_prompt_that_was_paid_for_again_is_not_sent_a_third_time_if_the_first_request_was_not_sent(
    peers: Peers, sandbox: Sandbox
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    jobs: list[str] = []

    def take_over() -> None:
        one.disk.before.clear()
        jobs.append(declared_unknown(peers, two))
        pay_again(one, "a cat [sandbox: 502]")
        assert two.start().charged == "unknown"

    one.disk.before["create|sent.1"] = take_over
    one.start()
    assert one.finish(jobs[0]).end is End.NOTHING
    assert (one.names("inbox"), one.names("errors")) == ([], ["cat.error.toml", "cat.prompt.txt"])
    assert one.found() == []
    assert sandbox.report()["requests"] == 1


def test_a_late_response_withdraws_its_error_file_although_a_person_has_written_into_it(peers: Peers) -> None:
    one, two = peers.add("one"), peers.add("two")
    killed_before_it_shares(one)
    job = declared_unknown(peers, two)
    with (one.root / "errors/cat.error.toml").open("a") as file:
        file.write("# I have asked for my credits back.\n")
    assert one.finish(job).destination == "outbox"
    assert (one.names("errors"), one.names("archive")) == ([], ["cat.prompt.txt"])
