"""Those who may write outbox, errors or archive cannot have the daemon write anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from security.world import World

DESTINATIONS = ("outbox", "errors", "archive")
TEXTS = {"outbox": "a cat", "errors": "a cat [sandbox: 400]", "archive": "a cat"}


def target_of(world: World, name: str) -> Path:
    return {"state": world.state, "answers": world.state / "answers", "home": world.home, "key": world.key_folder}[name]


def nothing_came_of_it(world: World, place: Path, before: set[str]) -> None:
    """Nothing was put where the link leads to."""
    new = {path.name for path in place.iterdir() if path.name.startswith(("cat.", ".iw-"))} - before
    assert new == set(), f"{place}: files of a job"
    world.nothing_leaked()
    world.state_is_whole(jobs=True)


def is_completed_when_the_link_is_removed(world: World, destination: str, source: str) -> None:
    """The job of the attacker continues when they undo what they did, and was sent at most once."""
    where = "errors" if destination == "errors" else "outbox"
    world.wait(lambda: world.destination(source) == where, "the prompt")
    world.is_idle()
    assert world.requests(TEXTS[destination]) == 1
    kept = world.root / ("errors" if destination == "errors" else "archive")
    assert [path.read_text() for path in kept.rglob("cat.prompt.txt")] == [TEXTS[destination]]
    assert world.leftovers() == []
    world.state_is_whole()


@pytest.mark.parametrize("target", ["state", "home"])
@pytest.mark.parametrize("destination", DESTINATIONS)
def test_a_link_that_waits_for_results_is_not_followed(
    new_world: Callable[..., World], destination: str, target: str
) -> None:
    world = new_world(open_to_all=(destination,))
    world.start()
    place = target_of(world, target)
    before = {path.name for path in place.iterdir()}
    world.attacker.symlink(place, world.root / destination / "sub")
    world.attacker.mkdir(world.inbox / "sub")
    world.attacker.drop(world.inbox / "sub/cat.prompt.txt", TEXTS[destination])
    end = world.end("sub/cat.prompt.txt")
    nothing_came_of_it(world, place, before)
    assert end in {"errors", "stuck", "waiting", "outbox"}
    world.honest_prompt_is_completed()
    if end in {"stuck", "waiting"}:
        world.attacker.unlink(world.root / destination / "sub")
        is_completed_when_the_link_is_removed(world, destination, "sub/cat.prompt.txt")


@pytest.mark.parametrize(("inner", "target"), [(False, "answers"), (True, "key")], ids=["sub-folder", "inner folder"])
@pytest.mark.parametrize("destination", DESTINATIONS)
def test_a_folder_of_results_that_becomes_a_link_during_a_request_is_not_followed(
    new_world: Callable[..., World], destination: str, target: str, *, inner: bool
) -> None:
    world = new_world(open_to_all=(destination,), settings={"outbox": {"folder_mode": "2777"}})
    first = world.start()
    world.attacker.mkdir(world.inbox / "sub")
    folder = "sub"
    if inner:
        world.attacker.mkdir(world.root / destination / "sub")
        world.attacker.mkdir(world.inbox / "sub/inner")
        folder = "sub/inner"
    world.attacker.drop(world.inbox / folder / "first.prompt.txt", TEXTS[destination].replace("cat", "first cat"))
    world.wait(lambda: world.destination(f"{folder}/first.prompt.txt"), "the first prompt")
    world.is_idle()
    place = target_of(world, target)
    before = {path.name for path in place.iterdir()}
    world.sandbox.hold()
    world.attacker.drop(world.inbox / folder / "cat.prompt.txt", TEXTS[destination])
    assert world.asked(2)
    real = world.root / destination / folder
    world.attacker.rename(real, real.with_name(".old"))
    world.attacker.symlink(place, real)
    world.sandbox.release()
    end = world.end(f"{folder}/cat.prompt.txt")
    nothing_came_of_it(world, place, before)
    assert end in {"errors", "stuck", "outbox"}
    world.honest_prompt_is_completed()
    world.attacker.unlink(real)
    world.attacker.rename(real.with_name(".old"), real)
    if end == "stuck":
        if inner or destination != "outbox":  # else it continues automatically; a start is only sooner
            assert first.stop() == 0
            world.start()
        is_completed_when_the_link_is_removed(world, destination, f"{folder}/cat.prompt.txt")
