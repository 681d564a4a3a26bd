"""Names are renamed, swapped, linked and closed at random beside honest prompts: those are completed, once."""

from __future__ import annotations

import contextlib
import os
import tomllib
from typing import TYPE_CHECKING

import pytest
from support.endpoint import unique_png

from security.people import DAEMON, HONEST, walk
from security.puppet import exchange
from security.world import CLAIMS, World, give

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

    from support.daemon import LoggedDaemon

HONEST_PROMPTS = 20
ROUNDS, ACTS = 10, 150
"""Rounds of the storm, and things that are done in each."""
EVIL = unique_png("evil").decode("latin-1")


def storm(world: World, number: int, seed: int, tops: list[Path], spared: tuple[str, ...]) -> int:
    """Let the attacker change names for a round beside prompts of all users; return how many calls succeeded."""
    wild = [top / f"wild{number}" for top in tops]
    for place in wild:
        world.attacker.may("mkdir", place)
    for name in ("cat", "dog", "elk"):
        world.attacker.may("drop", world.inbox / f"wild{number}/{name}.png", EVIL)
        world.attacker.may("drop", world.inbox / f"wild{number}/{name}.prompt.txt", f"a wild {name} {number}")
    targets = [world.home, world.key_folder, world.state, world.state / "answers", world.inbox / "theirs"]
    places = [str(place) for place in (*tops, *wild)]
    return int(world.attacker.storm(1000 * seed + number, ACTS, places, [str(one) for one in targets], spared))


def receipts(world: World) -> list[str]:
    """Return the prompt of each receipt, wherever it is in the outbox."""
    found = []
    for path in walk(world.outbox):
        if path.name.endswith(".receipt.toml") and not path.is_symlink():
            try:
                found.append(tomllib.loads(path.read_text())["prompt"])
            except FileNotFoundError:  # renamed at this moment
                continue
    return found


def all_honest_are_completed_once(world: World) -> None:
    wanted = [f"honest prompt {number}" for number in range(HONEST_PROMPTS)]
    world.wait(lambda: set(wanted) <= set(receipts(world)), "the receipts of all honest prompts")
    assert {text: count for text in wanted if (count := world.requests(text)) != 1} == {}, "not sent once"
    made = receipts(world)
    assert {text: count for text in wanted if (count := made.count(text)) != 1} == {}, "not made once"


def books_agree(world: World, daemon: LoggedDaemon) -> None:
    """Each job was sent once, and the ledger has it. The attacker's may have the same words: there are hard links."""
    world.wait(lambda: set(sent(world)) <= {row["job"] for row in attempts(world)}, "the rows of what was sent")
    assert daemon.stop() == 0  # what is sent is finished, and nothing new is claimed
    assert sorted(sent(world)) == sorted(row["job"] for row in attempts(world))
    assert sum(row["credits"] or 0 for row in attempts(world)) == world.sandbox.report()["credits"]


def sent(world: World) -> list[str]:
    """Return the job of each request."""
    return [call["idempotency_key"] for call in world.sandbox.report()["calls"]]


def attempts(world: World) -> list[sqlite3.Row]:
    return [row for row in world.rows() if row["attempt"] and row["outcome"] != "unsent"]


def their_folder(world: World) -> None:
    (world.inbox / "theirs").mkdir()
    give(world.inbox / "theirs", 0o2775, HONEST, DAEMON)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_beside_the_folders_of_an_honest_user_stops_none_of_their_prompts(
    new_world: Callable[..., World], seed: int
) -> None:
    world = new_world(open_to_all=("outbox", "errors", "archive"))
    their_folder(world)
    daemon = world.start()
    tops, done = [world.inbox, world.outbox, world.errors, world.archive], 0
    for number in range(ROUNDS):
        for one in (2 * number, 2 * number + 1):
            world.honest.drop(world.inbox / "theirs" / f"h{one}.prompt.txt", f"honest prompt {one}")
        done += storm(world, number, seed, tops, (CLAIMS, "theirs"))
    assert done > ROUNDS * ACTS // 4
    all_honest_are_completed_once(world)
    world.nothing_leaked()
    world.state_is_whole(jobs=True)
    books_agree(world, daemon)


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_storm_in_the_whole_inbox_all_honest_prompts_are_completed(world: World, seed: int) -> None:
    their_folder(world)
    daemon = world.start()
    own = {name: (world.inbox / name).stat().st_ino for name in (CLAIMS, "theirs")}
    for number in range(ROUNDS):
        put_in_order(world, {"theirs": own["theirs"]})
        for one in (2 * number, 2 * number + 1):
            world.honest.drop(world.inbox / "theirs" / f"h{one}.prompt.txt", f"honest prompt {one}")
        storm(world, number, seed, [world.inbox], ())
    put_in_order(world, own)
    assert daemon.stop() == 0  # what waits for the folders continues automatically; a start is only sooner
    daemon = world.start()
    all_honest_are_completed_once(world)
    world.nothing_leaked()
    world.state_is_whole(jobs=True)
    books_agree(world, daemon)


def put_in_order(world: World, own: dict[str, int]) -> None:
    """Give folders of the inbox their names again, as their owner would."""
    for name, number in own.items():
        world.wait(lambda name=name, number=number: _put_back(world.inbox, name, number), f"{name} at its place")


def _put_back(inbox: Path, name: str, number: int) -> bool:
    """Try to give a folder its name again; return whether it has it."""
    place = inbox / name
    with contextlib.suppress(OSError):  # the daemon may have created or renamed something there in this moment
        (found,) = (path for path in inbox.iterdir() if path.lstat().st_ino == number)
        if found != place:
            (exchange if os.path.lexists(place) else os.rename)(str(found), str(place))
        return place.lstat().st_ino == number
    return False
