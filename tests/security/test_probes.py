"""Files in the way of the daemon's own short-lived files stop no prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from security.world import World

DESTINATIONS = ("inbox", "outbox", "errors", "archive")


def put_in_the_way(world: World, name: str, kind: str) -> None:
    """Put something of the attacker's under a name in each folder that all may write."""
    for destination in DESTINATIONS:
        path = world.root / destination / name
        if kind == "folder":
            world.attacker.mkdir(path)
            world.attacker.write(path / "file", "")
        elif kind == "link":
            world.attacker.symlink(world.home, path)
        else:
            world.attacker.mkfifo(path)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
@pytest.mark.parametrize("name", [".iw-probe", ".iw-probe.d"])
def test_a_foreign_file_under_the_name_of_a_write_probe_does_not_prevent_the_start(
    new_world: Callable[..., World], name: str, kind: str
) -> None:
    world = new_world(open_to_all=DESTINATIONS, settings={"outbox": {"folder_mode": "2755"}})
    put_in_the_way(world, name, kind)
    world.start()
    world.honest_prompt_is_completed()
    world.nothing_leaked()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_foreign_file_under_the_name_of_a_write_probe_does_not_hold_the_queue(
    new_world: Callable[..., World], kind: str
) -> None:
    world = new_world(open_to_all=DESTINATIONS)
    world.start()
    world.attacker.mkdir(world.inbox / "sub")
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "sub/cat.prompt.txt", "a cat")
    assert world.asked()
    put_in_the_way(world, ".iw-probe", kind)
    world.attacker.write(world.outbox / "sub", "in the way")  # the job cannot end, and the daemon probes its folders
    world.sandbox.release()
    assert world.end("sub/cat.prompt.txt") == "stuck"
    world.honest_prompt_is_completed()
    world.nothing_leaked()
