"""Those who may write the folder of the status files cannot have the daemon write or show anything else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from imagewatch.protocol import notice
from security.world import give

if TYPE_CHECKING:
    from security.world import World

NAMES = (notice.TEXT, notice.JSON)


def opened(world: World, mode: int) -> None:
    """Allow all users to write the folder of the status files."""
    give(world.root, mode)


def is_written(world: World) -> None:
    """Wait until the daemon itself has written both files."""

    def mine(name: str) -> bool:
        path = world.root / name
        return not path.is_symlink() and path.is_file() and path.stat().st_uid == world.state.stat().st_uid

    world.wait(lambda: all(mine(name) for name in NAMES), "the status files")


@pytest.mark.parametrize("mode", [0o2777, 0o3777])
def test_links_to_private_files_are_replaced_and_never_followed(world: World, mode: int) -> None:
    opened(world, mode)
    for name, target in zip(NAMES, (world.home / ".profile", world.state / "ledger.sqlite3"), strict=True):
        world.attacker.symlink(target, world.root / name)
    world.start()
    is_written(world)
    world.honest_prompt_is_completed()
    world.is_idle()
    world.nothing_leaked()
    world.state_is_whole()


def test_a_folder_of_a_user_in_the_place_of_the_files_stops_nothing(world: World) -> None:
    opened(world, 0o2777)
    for name in NAMES:
        world.attacker.mkdir(world.root / name)
    daemon = world.start()
    world.honest_prompt_is_completed()
    daemon.wait_for("status_failed")
    assert len(daemon.events("status_failed")) == 1
    for name in NAMES:
        world.attacker.rmdir(world.root / name)
    world.honest_prompt_is_completed("again")
    is_written(world)
    world.nothing_leaked()


def test_a_daemon_that_may_not_write_there_logs_it_once_and_continues(world: World) -> None:
    give(world.root, 0o755, 0)
    daemon = world.start()
    world.honest_prompt_is_completed()
    daemon.wait_for("status_failed")
    assert len(daemon.events("status_failed")) == 1
    assert not any((world.root / name).exists() for name in NAMES)


def test_another_user_may_read_them_and_they_name_no_private_thing(world: World) -> None:
    opened(world, 0o2755)
    world.start()
    is_written(world)
    world.attacker.drop(world.inbox / "cat.prompt.txt.txt", "a cat")
    world.wait(lambda: "cat.prompt.txt.txt" in (world.root / notice.TEXT).read_text(), "the mistyped name")
    assert (world.root / notice.TEXT).stat().st_mode & 0o777 == 0o644
    assert json.loads((world.root / notice.JSON).read_bytes())["ignored"]["count"] == 1
    world.nothing_leaked()
