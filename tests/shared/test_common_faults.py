"""A daemon of a common inbox stops, is killed, or is cut off at any step: never two charges, and nothing is lost."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.common import Inbox, initialize, wait_for_stop
from support.daemon import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

EVERY = int(os.environ.get("IMAGEWATCH_EVERY_STEP", "0") or "0")
"""1: each step is tried; otherwise some, spread over all."""
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


def stopped_at(world: Inbox, number: int, by: str, *, broken: str = "") -> tuple[str, str]:
    """Stop a daemon before a step, let another one finish, then let the first continue; return step and destination."""
    one = world.members["one"]
    prompt = f"a cat {number} {by}"
    one.prompt("cat", prompt)
    first = world.run(one, stop_before=number, by=by, broken=broken)
    if not wait_for_stop(first, lambda: is_over(world)):
        return "", world.check("cat", prompt)
    where = one.steps()[-1]
    world.run(world.member("two"), broken=broken)
    until(lambda: is_over(world) or world.calls(prompt) > 1, 40, saw=lambda: f"{where}\n{world.unfinished()}")
    if by == "kill":
        world.run(one, broken=broken)
    else:
        first.process.send_signal(signal.SIGCONT)
    try:
        world.settle()
        return where, world.check("cat", prompt)
    except AssertionError as error:
        raise AssertionError(f"stopped before step {number} ({by}): {where}\n{error}") from error


def count_steps(world: Inbox) -> list[str]:
    """Let a daemon process a prompt; return its steps."""
    one = world.members["one"]
    one.prompt("cat", "a cat, counted")
    world.run(one)
    until(lambda: is_over(world))
    world.settle()
    assert world.check("cat", "a cat, counted") == "outbox"
    return one.steps()


@pytest.mark.parametrize("by", ["kill", "stop"])
def test_a_daemon_that_ends_or_stops_at_any_step_is_replaced_without_a_second_charge(
    inbox: Callable[..., Inbox], by: str
) -> None:
    steps = count_steps(inbox("counted"))
    count = len(steps)
    chosen = range(1, count + 1) if EVERY else range(1 + count % 3, count + 1, max(count // TRIED, 1))
    worlds = {number: inbox(f"step{number}") for number in chosen}
    saved = next(number for number, step in enumerate(steps, 1) if step.endswith("answer.1") and "rename" in step)
    found, errors = {}, []
    with ThreadPoolExecutor(AT_THE_SAME_TIME) as pool:
        for number, result in [(n, pool.submit(tried, world, n, by)) for n, world in worlds.items()]:
            where, destination, error = result.result()
            print(number, by, where, destination, error[:3000])
            if error:
                errors.append(error)
            else:
                found[number] = destination
    assert not errors, "\n\n".join(errors)
    unpublished = [number for number, destination in found.items() if number > saved + 1 and destination != "outbox"]
    assert not unpublished, "every saved response is published"


def tried(world: Inbox, number: int, by: str) -> tuple[str, str, str]:
    try:
        return *stopped_at(world, number, by), ""
    except AssertionError as error:
        return "", "", str(error)
    finally:
        world.close()
