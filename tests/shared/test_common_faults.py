"""A daemon of a common inbox stops, is killed, or is cut off at any step: never two charges, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from support.common import DEADLINE, GIVEN_UP, Inbox, initialize, wait_for_stop
from support.daemon import LoggedDaemon, command, until
from support.proxy import Proxy

from imagewatch.protocol.values import Decision
from imagewatch.system.errors import LostJobError, SpoolError
from shared.test_lost_commits import FLUX, claim, member, outcomes, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.common import Member
    from support.postgres import Server

    from imagewatch.journal.journal import Journal
    from imagewatch.sandbox import Sandbox

__all__ = ["member"]
STEPS = os.environ.get("IMAGEWATCH_STEPS", "")
"""``all``: each step is tried; or the numbers of some; otherwise some, spread over all."""
SLOW = pytest.mark.skipif("IMAGEWATCH_ALL_SHARED" not in os.environ, reason="slow: IMAGEWATCH_ALL_SHARED=1 runs it")
LONG = pytest.mark.timeout(900 if STEPS else 300)
AT_THE_SAME_TIME = 4
TRIED = 10


@pytest.fixture
def inbox(tmp_path: Path, sandbox: Sandbox, postgres: Server, database: str) -> Iterator[Callable[..., Inbox]]:
    """Return a function that makes an inbox of the database."""
    made: list[Inbox] = []

    def new(name: str = "common", **settings: str) -> Inbox:
        made.append(Inbox(tmp_path / name, sandbox, postgres, database, name, **settings))
        first = made[-1].member("one")
        if len(made) == 1:
            initialize(first)
        return made[-1]

    yield new
    for one in made:
        one.close()


def is_over(world: Inbox) -> bool:
    return not world.open_jobs() and bool(world.folders().finished())


def start(world: Inbox, member: Member) -> None:
    """Start a daemon as a service manager does: again, while one that is stopped has locked what a start needs."""
    daemon = world.run(member)
    until(lambda: daemon.events("started") or daemon.process.poll() is not None)
    if daemon.process.poll() is not None:
        daemon.end()
        assert "locked by another program" in daemon.log()
        start(world, member)


def stopped_at(world: Inbox, before: str, by: str) -> str:
    """Stop a daemon before a step, let another one finish, then let the first continue; return the destination."""
    one = world.members["one"]
    prompt = f"a cat {before} {by}"
    one.prompt("cat", prompt)
    first = world.run(one, stop_before=before, by=by)
    if not wait_for_stop(first, lambda: is_over(world)):
        return world.check("cat", prompt)
    done, where = one.steps()[: one.stopped() - 1], one.steps()[one.stopped() - 1]
    start(world, world.member("two"))
    until(lambda: is_over(world) or world.calls(prompt) > 1, saw=lambda: f"{where}\n{world.unfinished()}")
    if by == "kill":
        world.run(one)
    else:
        first.process.send_signal(signal.SIGCONT)
    try:
        world.settle()
        destination = world.check("cat", prompt)
        # In how many pieces a response comes, and so the number of a step, is not the same each time.
        is_saved = any(step.endswith(".answer.1") for step in done[:-1])
        assert destination == "outbox" or not is_saved, "every saved response is published"
    except AssertionError as error:
        raise AssertionError(f"stopped before step {before} ({by}): {where}\n{error}") from error
    return destination


def test_a_daemon_that_continues_late_and_has_not_sent_sends_nothing_and_another_one_sends_it(
    inbox: Callable[..., Inbox],
) -> None:
    world, prompt = inbox(), "a cat, later"
    one, two = world.members["one"], world.member("two")
    two.environ["GIVEN_UP"] = str(DEADLINE)  # longer than the first one is stopped
    one.prompt("cat", prompt)
    first = world.run(one, stop_before="create|sent.1", by="stop")
    assert wait_for_stop(first, lambda: False)
    second = world.run(two)
    second.wait_for("taken_over")
    claims = one.inbox / ".imagewatch"
    until(lambda: [path.suffix for path in claims.iterdir() if path.is_dir()] == [".2"])
    assert world.calls(prompt) == 0
    first.process.send_signal(signal.SIGCONT)
    world.settle()
    assert world.check("cat", prompt) == "outbox"
    assert [outcome for _, _, outcome, _ in world.attempts()] == ["unsent", "completed"]


@pytest.mark.parametrize(
    "before", ["journal Journal.decide", "rename|/outbox/|.receipt.toml", "rename|/outbox/|cat.jpg"]
)
def test_a_daemon_that_continues_after_another_one_has_published_publishes_nothing(
    inbox: Callable[..., Inbox], before: str
) -> None:
    assert stopped_at(inbox(), before, "stop") == "outbox"


def test_what_was_claimed_when_its_job_was_over_goes_back_into_the_inbox(inbox: Callable[..., Inbox]) -> None:
    world = inbox()
    count_steps(world)
    ((job, *_),) = world.attempts()
    folders = world.folders()
    outside = folders.root / "outside"
    outside.mkdir()
    (outside / "dog.prompt.txt").write_text("a dog that a daemon claimed before it was killed")
    outside.rename(folders.inbox / ".imagewatch" / f"{job}.1")  # an empty folder would be removed
    world.settle()
    until(lambda: folders.finished() == {"cat": "outbox", "dog": "outbox"})
    assert world.calls("a dog that a daemon claimed before it was killed") == 1


def count_steps(world: Inbox) -> list[str]:
    """Let a daemon process a prompt; return its steps."""
    one = world.members["one"]
    one.prompt("cat", "a cat, counted")
    world.run(one)
    until(lambda: is_over(world))
    world.settle()
    assert world.check("cat", "a cat, counted") == "outbox"
    return one.steps()


@LONG
@pytest.mark.parametrize("by", ["kill", "stop"])
def test_a_daemon_that_ends_or_stops_at_any_step_is_replaced_without_a_second_charge(
    inbox: Callable[..., Inbox], by: str
) -> None:
    count = len(count_steps(inbox("counted")))
    spread = range(1 + count % 3, count + 1, max(count // TRIED, 1))
    chosen = range(1, count + 1) if STEPS == "all" else map(int, STEPS.split()) if STEPS else spread
    worlds = {number: inbox(f"step{number}") for number in chosen}
    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:
        results = [pool.submit(tried, world, number, by) for number, world in worlds.items()]
        errors = [error for result in results if (error := result.result())]
    assert not errors, "\n\n".join(errors)


def tried(world: Inbox, number: int, by: str) -> str:
    """Try one step; return what is wrong."""
    try:
        stopped_at(world, str(number), by)
    except AssertionError as error:
        return str(error)
    finally:
        world.close()
    return ""


# Cut off


POINTS = {
    "take": "after journal Common._taken",
    "claim": "replace|/.imagewatch/|.prompt.txt",
    "spend": "after journal Journal.spend",
    "first byte": "first byte",
    "response": "response",
    "saved": "replace|.answer.1",
    "shared": "create|/.imagewatch/|/answer.1",
    "decide": "after journal Journal.decide",
    "receipt": "rename|/outbox/|.receipt.toml",
    "published": "after journal JobRows.set_state",
}


@LONG
@pytest.mark.parametrize("which", ["database", pytest.param("endpoint", marks=SLOW), pytest.param("both", marks=SLOW)])
def test_a_daemon_that_is_cut_off_at_any_step_sends_nothing_new_and_loses_nothing(
    inbox: Callable[..., Inbox], which: str
) -> None:
    worlds = {name: inbox(f"cut{number}") for number, name in enumerate(POINTS)}
    errors = []
    first = next(iter(worlds.values()))
    ports = [int(urlsplit(uri).port or 0) for uri in (first.database, first.sandbox.base_url)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:
        # All of them before the first one is cut: the port of that is free meanwhile.
        ways = {name: [stack.enter_context(Proxy(port)) for port in ports] for name in worlds}
        results = [
            (name, pool.submit(cut_off, world, POINTS[name], which, *ways[name])) for name, world in worlds.items()
        ]
        for name, result in results:
            try:
                result.result()
            except AssertionError as error:
                errors.append(f"cut off from {which} before: {name}\n{error}")
    assert not errors, "\n\n".join(errors)


def cut_off(world: Inbox, before: str, which: str, to_database: Proxy, to_endpoint: Proxy) -> None:
    """Cut a daemon off before a step, and let another one run; then let the first have its connections again."""
    prompt = f"a cat {before} cut off from {which}"
    with contextlib.closing(world):
        way = f"http://127.0.0.1:{to_endpoint.port}"
        one = world.member("one", database=to_database.through(world.database), base_url=way)
        one.prompt("cat", prompt)
        first = world.run(one, stop_before=before, by="pause")
        until(one.stopped)
        sent = world.calls(prompt)
        cut = [
            proxy for proxy, name in ((to_database, "database"), (to_endpoint, "endpoint")) if which in {name, "both"}
        ]
        for proxy in cut:
            proxy.cut()
        one.go()
        world.run(world.member("two"))
        if which == "endpoint":
            until(lambda: is_over(world) or bool(first.events("held") or first.events("not_sent")))
        else:
            until(lambda: is_over(world), saw=lambda: f"{world.unfinished()}")
            assert world.calls(prompt) <= max(sent, 1)
        for proxy in cut:
            proxy.restore()
        world.settle()
        destination = world.check("cat", prompt)
        if any(step.endswith(".answer.1") for step in one.steps()[: one.stopped() - 1]):
            assert destination == "outbox"


# A folder of claimed files that cannot be written


def alone(world: Inbox, prompt: str) -> tuple[LoggedDaemon, Path]:
    """Let a daemon have a response that it cannot share; return it, and the file that makes the folder read-only."""
    member = world.members["one"]
    read_only = Path(member.environ["READ_ONLY_FILE"])
    member.prompt("cat", prompt)
    first = world.run(member, stop_before="create|/.imagewatch/|/answer.", by="pause")
    until(member.stopped)
    read_only.touch()
    member.go()
    first.wait_for("response_not_shared")
    return first, read_only


def test_a_response_that_cannot_be_shared_is_published_when_the_folder_can_be_written_again(
    inbox: Callable[..., Inbox],
) -> None:
    world = inbox()
    _, read_only = alone(world, "a cat, alone")
    assert world.folders().finished() == {}
    read_only.unlink()
    world.settle()
    assert world.folders().finished() == {"cat": "outbox"}
    assert world.calls("a cat, alone") == 1


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_no_daemon_declares_an_unknown_charge_while_another_one_alone_has_the_response(
    inbox: Callable[..., Inbox], is_forgotten: bool
) -> None:
    world, prompt = inbox(), "a cat, alone"
    first, read_only = alone(world, prompt)
    first.kill()
    read_only.unlink()
    one, two = world.members["one"], world.member("two")
    second = world.run(two)
    second.wait_for("taken_over")
    threading.Event().wait(GIVEN_UP + 3)
    assert world.folders().finished() == {}, "an unknown charge would be declared by now"
    if is_forgotten:
        named = command(two, "hosts", "forget", one.name)
        assert "Only in its state folder: 1 response. These prompts would end in the errors folder, as unknown" in (
            named.stdout
        ), named.stdout + named.stderr
        assert command(two, "hosts", "forget", one.name, "--yes").returncode == 0
        until(lambda: world.folders().finished() == {"cat": "errors"})
        assert world.folders().error("cat")["charged"] in {"unknown", "yes"}, "it may have recorded that it has it"
    world.run(one)
    world.settle()
    assert world.folders().finished() == {"cat": "outbox"}
    assert world.calls(prompt) == 1


# A database that has lost its last commits


@pytest.mark.parametrize("point", ["journal Common._taken", "journal Journal.spend"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_database_that_has_lost_its_last_commits_does_not_lead_to_a_second_payment(
    inbox: Callable[..., Inbox],
    sandbox: Sandbox,
    replace_by_earlier: Callable[[Callable[[], None]], None],
    point: str,
    is_saved: bool,
) -> None:
    world, prompt = inbox(), "a cat, twice?"
    one = world.members["one"]
    one.prompt("cat", prompt)
    kill_before = "journal Journal.decide" if is_saved else ""
    first = world.run(one, stop_before=point, by="pause", kill_before=kill_before)
    until(one.stopped)
    if not is_saved:
        sandbox.hold()

    def send() -> None:
        one.go()
        until(lambda: world.calls(prompt) == 1)
        if is_saved:
            first.end()
        first.kill()
        sandbox.release()

    replace_by_earlier(send)
    world.run(world.member("two"))
    if not is_saved:
        until(lambda: is_over(world), saw=lambda: f"{world.unfinished()}")
    assert command(one, "release", "--accept-new-ledger").returncode == 0
    world.run(one)
    world.settle()
    assert world.check("cat", prompt) == ("outbox" if is_saved else "errors")


# The journal alone


@pytest.fixture
def replaced(database: str, member: Callable[..., Journal]) -> tuple[Journal, Journal]:
    """The journal of a daemon that has taken a job, and that of the one which has taken it over."""
    one, two = member(database, "one", common="inbox"), member(database, "two", common="inbox")
    one.common.offer_all([claim()])
    assert [taken.epoch for taken in one.common.take(5)] == [1]
    one.common.let_go()
    assert [taken.epoch for taken in two.common.take_over(5)] == [2]
    return one, two


def test_the_right_to_send_is_not_spent_by_a_daemon_whose_job_was_taken_over(
    replaced: tuple[Journal, Journal],
) -> None:
    one, two = replaced
    with pytest.raises(LostJobError):
        one.spend(row(nonce="one"), FLUX, skip_repeated=False)
    assert two.spend(row(nonce="two"), FLUX, skip_repeated=False) is None


def test_only_its_own_process_can_say_that_an_attempt_was_not_sent(
    replaced: tuple[Journal, Journal], database: str, postgres: Server
) -> None:
    one, two = replaced
    assert two.spend(row(nonce="two"), FLUX, skip_repeated=False) is None
    one.unsent("a", 1, "one")
    one.common.unsent("a", 1, "one")
    assert outcomes(postgres, database) == {("a", 1): "sent"}
    with pytest.raises(SpoolError, match="must not be sent"):
        two.spend(row(attempt=2, nonce="two again"), FLUX, skip_repeated=False)
    two.common.unsent("a", 1, "two")
    assert two.spend(row(attempt=2, nonce="two again"), FLUX, skip_repeated=False) is None


def test_an_attempt_that_another_process_has_recorded_means_that_the_job_is_lost(
    replaced: tuple[Journal, Journal],
) -> None:
    _, two = replaced
    assert two.spend(row(nonce="two"), FLUX, skip_repeated=False) is None
    with pytest.raises(LostJobError):
        two.spend(row(nonce="another"), FLUX, skip_repeated=False)


def test_a_job_that_the_database_has_lost_gets_the_epoch_of_its_claim_folder_again(
    replaced: tuple[Journal, Journal], database: str, postgres: Server
) -> None:
    _, two = replaced
    postgres.psql("DELETE FROM imagewatch.jobs", database.rpartition("/")[2])
    two.decide(claim(), Decision(destination="discarded"), None)
    assert two.common.where("a") == ("two", 2, "decided")


def test_a_job_that_was_taken_once_more_keeps_the_epoch_with_which_a_worker_has_it(
    replaced: tuple[Journal, Journal], database: str, postgres: Server
) -> None:
    _, two = replaced
    postgres.psql("UPDATE imagewatch.jobs SET epoch = 3", database.rpartition("/")[2])  # that it was is not known
    two.common._renewed.clear()
    assert two.common.own() == {"a": 3}
    assert two.common.epoch("a") == 2
    assert not two.common.is_sure("a")


def test_how_a_job_ends_is_not_decided_by_a_daemon_that_another_one_has_replaced(
    replaced: tuple[Journal, Journal],
) -> None:
    one, two = replaced
    with pytest.raises(LostJobError):
        one.decide(claim(), Decision(destination="discarded"), None)
    two.decide(claim(), Decision(destination="discarded"), None)
    two.finish("a")
    with pytest.raises(LostJobError):
        one.decide(claim(), Decision(destination="discarded"), None)
    assert two.is_over("a")
