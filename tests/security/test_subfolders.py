"""A sub-folder of the inbox becomes a link: the daemon reads nothing through it, and writes nothing through it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from support.endpoint import unique_png

from security.world import PRIVATE_IMAGE, World, give

if TYPE_CHECKING:
    from pathlib import Path

FREE = 1_000.0
"""Credits enough for every test."""
EVIL = unique_png("evil").decode("latin-1")


def target_of(world: World, name: str) -> Path:
    """Return a folder that the attacker may not write, by a short name."""
    if name == "their":  # of another sender
        world.honest_prompt("first", "the first prompt")
        return world.inbox / "theirs"
    return {"outbox": world.outbox, "home": world.home, "state": world.state, "answers": world.state / "answers"}[name]


@pytest.mark.parametrize("target", ["outbox", "home", "state", "answers", "their"])
def test_files_that_return_to_a_sub_folder_that_became_a_link_go_nowhere_else(world: World, target: str) -> None:
    first_daemon = world.start()
    give(world.outbox, 0o700)
    place = target_of(world, target)
    world.wait(
        lambda: target != "their" or world.destination("theirs/first.prompt.txt"), "the folder of another sender"
    )
    world.is_idle()
    before = {path.name for path in place.iterdir()}
    world.sandbox.hold()
    world.sandbox.balance = 0
    world.attacker.mkdir(world.inbox / "sub")
    first = world.requests()
    for name in ("dog", "elk"):
        world.attacker.drop(world.inbox / f"sub/{name}.png", EVIL)
        world.attacker.drop(world.inbox / f"sub/{name}.prompt.txt", f"a {name}")
    assert world.asked(first + 2)
    world.attacker.rename(world.inbox / "sub", world.inbox / ".sub")
    world.attacker.symlink(place, world.inbox / "sub")
    world.sandbox.release()
    ends = sorted(world.end(f"sub/{name}.prompt.txt") for name in ("dog", "elk"))
    mine = {f"{name}.{ending}" for name in ("dog", "elk") for ending in ("png", "prompt.txt")}
    assert {path.name for path in place.iterdir()} & mine <= before, "the attacker's files are in a folder of others"
    world.nothing_leaked()
    world.state_is_whole(jobs=True)
    assert "gone" not in ends
    assert "errors" in ends  # the first of them shows why nothing is sent
    world.attacker.unlink(world.inbox / "sub")
    world.attacker.rename(world.inbox / ".sub", world.inbox / "sub")
    world.sandbox.balance = FREE
    if target != "outbox":  # there it continues automatically; a start is only sooner
        assert first_daemon.stop() == 0
        world.start()
    world.release()
    for name in ("dog", "elk"):
        world.wait(lambda source=f"sub/{name}.prompt.txt": world.destination(source), "both prompts of the sub-folder")
        assert world.requests(f"a {name}") <= 2  # refused for too few credits, and then completed
    world.honest_prompt_is_completed()
    charged = [call["prompt"] for call in world.sandbox.report()["calls"] if call["credits"]]
    assert len(charged) == len(set(charged))


def test_an_image_is_not_read_through_a_link_that_takes_turns_with_its_folder(world: World) -> None:
    names = [f"cat{number}" for number in range(40)]
    give(world.outbox, 0o700)
    world.attacker.mkdir(world.inbox / ".sub")
    for name in names:
        secret = world.outbox / f"{name}.png"
        secret.write_bytes(PRIVATE_IMAGE.encode("latin-1"))
        give(secret, 0o600)
        world.attacker.write(world.inbox / f".sub/{name}.png", EVIL)
        world.attacker.write(world.inbox / f".sub/{name}.prompt.txt", f"a {name}")
    secrets = {path.name: path.stat().st_ino for path in world.outbox.glob("*.png")}
    world.attacker.symlink(world.outbox, world.inbox / "sub")
    world.start()
    world.attacker.race(world.inbox / "sub", world.inbox / ".sub")
    for number in range(20):  # for each of them the daemon scans everything
        world.honest_prompt_is_completed(f"honest{number}")
    assert world.attacker.stop_racing() > 0
    world.attacker.unlink(world.inbox / "sub")
    world.attacker.rename(world.inbox / ".sub", world.inbox / "sub")
    for name in names:
        world.wait(lambda source=f"sub/{name}.prompt.txt": world.destination(source), "all prompts of the sub-folder")
    world.is_idle()
    found = {path.name: path.stat().st_ino for path in world.outbox.glob("*.png") if path.name in secrets}
    assert found == secrets, "private images were moved out of their folder"
    world.nothing_private_was_sent()
    only = [hashlib.sha256(EVIL.encode("latin-1")).hexdigest()]
    calls = {call["prompt"]: call["inputs"] for call in world.sandbox.report()["calls"]}
    assert all(calls.get(f"a {name}", only) == only for name in names)
    assert len(calls) == world.requests(), "something was sent twice"
