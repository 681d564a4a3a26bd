"""A job goes from one daemon of an inbox to another and back, act by act: it is paid for once, and nothing is lost."""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs
from support.peers import Peers

from imagewatch.job.lost_jobs import LostJobs
from imagewatch.job.outcome import End
from imagewatch.system.errors import Broken, SpoolError
from shared.test_lost_commits import hang_at_commit

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import Any

    from support.peers import Peer
    from support.postgres import Server
    from support.proxy import Proxy

    from imagewatch.sandbox import Sandbox

LATE = 120.0
"""So much later, no daemon waits for the response of another one any more, seconds."""


@pytest.fixture
def peers(tmp_path: Path, sandbox: Sandbox, postgres: Server, database: str) -> Iterator[Peers]:
    made = Peers(tmp_path, sandbox.base_url, postgres, database)
    yield made
    made.close()


@pytest.fixture
def logged() -> Iterator[Callable[[str], list[Any]]]:
    """Return the events of a name that were logged."""
    with capture_logs() as events:
        yield lambda name: [event for event in events if event["event"] == name]


@pytest.fixture
def completed(peers: Peers) -> tuple[Peer, str]:
    """A daemon that has completed a prompt of a sub-folder, and a copy of the claim folder that it had."""
    one = peers.add("one")
    one.prompt("anna/cat", "a cat")
    copied: list[Path] = []

    def copy() -> None:
        if not copied:
            (folder,) = one.inbox.glob(".imagewatch/*.1")
            copied.append(folder)
            shutil.copytree(folder, one.root.parent / "copy")

    one.disk.before["unlink|sent.1"] = copy
    assert one.start().destination == "outbox"
    return one, copied[0].name


def put_back(one: Peer, name: str, *, only: str = "*") -> Path:
    """Put back the claim folder of a job that is over, as a power cut of the file server may."""
    folder = one.inbox / ".imagewatch" / name
    folder.mkdir()
    for path in (one.root.parent / "copy").glob(only):
        shutil.copy(path, folder)
    one.restart()
    return folder


# What a daemon knows of a request


def test_what_a_daemon_knows_of_its_request_does_not_concern_the_one_that_another_has_sent_with_the_same_number(
    peers: Peers, database: str, proxy: Proxy, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = peers.add("one", proxy.through(database)), peers.add("two")
    one.prompt("cat", "a cat")
    hung: Queue[threading.Event] = Queue()
    one.disk.before["create|answer.1"] = lambda: hung.put(hang_at_commit(proxy, monkeypatch))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(one.start)
        assert hung.get(timeout=20).wait(20)
        proxy.wait_for(b"COMMIT")
        proxy.cut()
        with pytest.raises(SpoolError):
            result.result(20)
    assert (peers.outcomes(), sandbox.report()["requests"]) == ([], 0)
    job = peers.let_take_over(two)
    two.killed(lambda: two.process(job), "replace|answer.1")
    assert (peers.outcomes(), sandbox.report()["requests"]) == (["sent"], 1)
    proxy.restore()
    peers.let_take_over(one)
    assert one.finish(job).end is End.DEFERRED, "the other one may have its response"
    assert not (one.inbox / "cat.prompt.txt").exists()
    one.later = LATE
    one.finish(job)
    assert one.error("cat")["charged"] == "unknown"
    assert peers.outcomes() == ["unknown"]


def test_an_unsent_request_is_reported_when_the_unknown_charge_that_another_declares_is_over(
    peers: Peers, sandbox: Sandbox, logged: Callable[[str], list[Any]]
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")

    def take_over() -> None:
        one.disk.before.clear()
        two.later = LATE
        job = peers.let_take_over(two)
        two.killed(lambda: two.process(job), "rename|/errors/|.error.toml")

    one.disk.before["create|sent.1"] = take_over
    assert one.start().end is End.DEFERRED
    assert logged("job_lost")
    job = peers.job()
    assert (peers.state(), peers.outcomes()) == ("decided", ["unknown"])
    peers.let_take_over(two)
    two.finish(job)
    assert (peers.state(), two.error("cat")["charged"]) == ("done", "unknown")
    assert one.finish(job).end is End.RETURNED
    assert logged("late_result")
    assert peers.outcomes() == ["unsent"]
    assert one.start().destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert sandbox.report()["requests"] == 1


def test_an_unsent_request_ends_the_unknown_charge_of_a_job_with_an_earlier_free_attempt(
    peers: Peers, sandbox: Sandbox
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat [sandbox: once 429-plain]")
    assert one.start().end is End.DEFERRED
    job = peers.job()

    def take_over() -> None:
        one.disk.before.clear()
        two.later = LATE
        two.finish(peers.let_take_over(two))
        assert two.error("cat")["charged"] == "unknown"

    one.disk.before["create|sent.2"] = take_over
    assert one.finish(job).end is End.RETURNED
    assert (one.names("errors"), one.names("inbox")) == ([], ["cat.prompt.txt"])
    assert peers.outcomes() == ["busy", "unsent"]
    assert sandbox.report()["requests"] == 1


def test_a_charge_that_only_the_process_knows_is_reported_if_it_has_the_job_again(peers: Peers) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")

    def refuse() -> None:
        raise SpoolError("no space left on device", code=errno.ENOSPC)

    one.disk.before["replace|answer.1"] = refuse
    with pytest.raises(SpoolError):
        one.start()
    one.disk.before.clear()
    for path in one.answers():
        path.unlink()
    job = peers.let_take_over(two)
    one.finish(job)
    peers.let_take_over(one)
    one.finish(job)
    assert one.error("cat")["charged"] == "yes"


def break_upload(one: Peer, *, is_large: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let the connection break before the whole request has left."""

    def send(_job: str, _body: object, begin: Callable[[], AbstractContextManager[object]], _sink: object) -> None:
        with begin():
            pass
        meanwhile()
        raise Broken("the connection broke", is_own=is_large)

    one.client.send = send  # type: ignore[method-assign,assignment]


def test_a_prompt_whose_upload_broke_is_sent_by_the_daemon_that_takes_it_over(peers: Peers, sandbox: Sandbox) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    break_upload(one)
    assert one.start().reason is not None
    shutil.rmtree(one.state)
    job = peers.let_take_over(two)
    assert two.finish(job).destination == "outbox"
    assert two.receipt("cat")["attempts"] == 2
    assert peers.outcomes() == ["busy", "completed"]
    assert sandbox.report()["requests"] == 1


def test_an_unknown_charge_is_withdrawn_if_the_upload_had_broken(peers: Peers, sandbox: Sandbox) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")

    def take_over() -> None:
        two.later = LATE
        two.finish(peers.let_take_over(two))
        assert two.error("cat")["charged"] == "unknown"

    break_upload(one, is_large=False, meanwhile=take_over)
    one.start()
    one.restart()
    assert one.finish(peers.job()).end is End.RETURNED
    assert (one.names("errors"), peers.outcomes()) == ([], ["busy"])
    assert one.start().destination == "outbox"
    assert one.finished() == {"cat": "outbox"}
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize(("attempts", "is_broken"), [("1", True), ("4", True), ("4", False)])
def test_a_free_response_that_only_a_lost_host_had_delays_no_prompt(
    peers: Peers, sandbox: Sandbox, attempts: str, is_broken: bool
) -> None:
    one, two = peers.add("one"), peers.add("two", retry__attempts=attempts)
    one.prompt("cat", "a cat" if is_broken else "a cat [sandbox: once 429-plain]")

    def refuse() -> None:
        raise SpoolError("no space left on device", code=errno.ENOSPC)

    one.disk.before["create|/.imagewatch/|answer.1"] = refuse
    if is_broken:
        break_upload(one, is_large=False)
        one.killed(one.start, "rename|/inbox/cat.prompt.txt")
    else:
        one.start()
    assert peers.outcomes() == ["busy"]
    shutil.rmtree(one.state)
    job = peers.let_take_over(two)
    outcome = two.worker.process(job)
    assert outcome.reason is None, "what it said of the account is not known"
    assert outcome.end is (End.DEFERRED if attempts == "4" else End.RETURNED)
    assert (two.finish(job) if attempts == "4" else two.start()).destination == "outbox"
    assert sandbox.report()["requests"] == (1 if is_broken else 2)


@pytest.mark.parametrize("tag", ["", " [sandbox: url]"])
def test_a_late_response_is_published_when_the_newer_job_of_its_name_is_over(
    peers: Peers, sandbox: Sandbox, tag: str
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", f"a cat{tag}")
    one.killed(one.start, "/.imagewatch/|answer.1")
    job = peers.job()
    two.later = LATE
    two.finish(peers.let_take_over(two))
    for path in one.errors.iterdir():
        path.unlink()
    one.prompt("cat", "another cat [sandbox: once 429-plain]")
    newer = two.start().job
    outcome = one.finish(job)
    assert (outcome.end, outcome.awaits_name, bool(outcome.delay)) == (End.DEFERRED, True, True)
    assert one.answers()
    assert two.finish(newer).destination == "outbox"
    assert one.finish(job).destination == "outbox"
    assert len([name for name in one.names("outbox") if name.endswith(".receipt.toml")]) == 2
    assert peers.outcomes().count("completed") == 2
    assert sandbox.report()["requests"] == 3


# A database that has lost commits


def test_an_attempt_that_the_database_has_lost_is_written_again_from_its_witness_and_not_sent(
    peers: Peers, sandbox: Sandbox, logged: Callable[[str], list[Any]]
) -> None:
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    one.killed(one.start, "replace|answer.1")
    peers.lose("DELETE FROM imagewatch.attempts")
    job = peers.let_take_over(two)
    assert two.finish(job).end is End.DEFERRED, "the other one may have its response"
    two.later = LATE
    two.finish(job)
    (event,) = logged("attempt_restored")
    assert (event["attempt"], "db recover" in event["next"]) == (1, True)
    assert two.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("has_old", [False, True])
def test_images_that_are_published_are_not_published_again_if_the_database_has_lost_the_decision(
    peers: Peers, has_old: bool
) -> None:
    one, two = peers.add("one"), peers.add("two")
    if has_old:
        one.outbox.joinpath("cat.receipt.toml").write_text("of an earlier prompt of this name")
    one.prompt("cat", "a cat")
    one.killed(one.start, "rename|/archive/")
    published = one.names("outbox")
    assert len(published) == 2 + has_old
    peers.lose(
        "UPDATE imagewatch.jobs SET state = 'open', decision = ''",
        "UPDATE imagewatch.attempts SET outcome = 'sent', charged = 'unknown', credits = NULL",
    )
    job = peers.let_take_over(two)
    assert two.finish(job).destination == "outbox"
    assert one.names("outbox") == published
    assert (peers.state(), peers.outcomes()) == ("done", ["completed"])
    assert one.names("archive") == ["cat.prompt.txt"]
    assert (two.answers(), one.names("inbox")) == ([], [])


def test_a_response_of_a_job_that_was_forgotten_with_its_result_is_removed(
    peers: Peers, completed: tuple[Peer, str]
) -> None:
    one, name = completed
    job = name.partition(".")[0]
    left = one.state / "answers" / f"{job}.answer.1"
    left.write_text("a response")
    peers.forget_jobs()
    one.restart()
    assert one.finish(job).end is End.NOTHING
    assert not left.exists()


def test_a_response_of_a_job_that_the_database_does_not_have_stays(
    peers: Peers, completed: tuple[Peer, str], logged: Callable[[str], list[Any]]
) -> None:
    one, name = completed
    job = name.partition(".")[0]
    left = one.state / "answers" / f"{job}.answer.2"
    left.write_text("a response")
    peers.lose("DELETE FROM imagewatch.jobs")
    one.restart()
    assert one.finish(job).end is End.DEFERRED
    assert logged("stuck")
    assert left.exists()


# Claim folders that are left


def test_what_is_left_of_a_job_that_was_forgotten_with_its_result_is_not_processed_again(
    peers: Peers, completed: tuple[Peer, str], logged: Callable[[str], list[Any]]
) -> None:
    one, name = completed
    peers.forget_jobs()
    (one.outbox / "anna/cat.receipt.toml").unlink()
    put_back(one, name)
    one.worker.tidy()
    assert peers.rows("SELECT id FROM imagewatch.jobs") == []
    (event,) = logged("stuck")
    assert "left of a job that is over" in event["reason"]
    assert "db recover" not in event["next"]
    assert list(LostJobs(one.spool).find()) == []


def test_a_claim_folder_without_originals_is_removed_and_its_sub_folder_is_not_made_again(
    completed: tuple[Peer, str],
) -> None:
    one, name = completed
    folder = put_back(one, name, only="claim.json")
    (one.inbox / "anna").rmdir()
    one.worker.tidy()
    assert not folder.exists()
    assert not (one.inbox / "anna").exists()


def test_nothing_more_is_tidied_up_when_the_daemon_ends(completed: tuple[Peer, str]) -> None:
    one, name = completed
    folder = put_back(one, name, only="claim.json")
    one.worker.tidy(lambda: True)
    assert folder.exists()
    one.worker.tidy(lambda: False)
    assert not folder.exists()


@pytest.mark.parametrize("stem", ["answer", "image", "fetched"])
def test_a_prompt_whose_name_begins_like_a_file_of_a_daemon_goes_back_into_the_inbox(peers: Peers, stem: str) -> None:
    one = peers.add("one")
    one.prompt(stem, "a cat")
    one.killed(one.start, "create|answer.1")
    next(one.inbox.glob(".imagewatch/*/claim.json")).unlink()
    peers.lose("DELETE FROM imagewatch.jobs")
    lost = LostJobs(one.spool)
    (found,) = lost.find()
    assert found.goes_back
    assert lost.carry_out(found) == ""
    assert one.names("inbox") == [f"{stem}.prompt.txt"]
