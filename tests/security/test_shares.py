"""An inbox on a file system that keeps no owners and no modes: all may touch what is claimed, and nothing else.

The mount is made by bindfs, which shows every file as the daemon's own and open to all, as SMB shares do.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.daemon import until

from security.people import DAEMON
from security.world import CLAIMS, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def shared(new_world: Callable[..., World]) -> Iterator[World]:
    """A world with such an inbox."""
    if not shutil.which("bindfs"):
        pytest.skip("bindfs is not installed")
    world = new_world(settings={"inbox": {"watch": "poll"}})
    behind = world.top / "behind"
    behind.mkdir()
    options = [f"--force-user={DAEMON}", f"--force-group={DAEMON}", "--perms=a+rwX", "--chmod-ignore", "--chown-ignore"]
    command = ["bindfs", *options, "-o", "allow_other", str(behind), str(world.inbox)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"bindfs cannot mount here: {done.stderr.strip()}")
    yield world
    world.leave()
    until(lambda: not subprocess.run(["umount", str(world.inbox)], capture_output=True, check=False).returncode)


def claimed(world: World) -> list[Path]:
    """Return the folders of the jobs in the claims folder."""
    folder = world.inbox / CLAIMS
    return [folder / name for name in world.attacker.listdir(folder) if len(name) == 16]


def wait_for_one(world: World, text: str) -> None:
    """Have one prompt of the attacker's under way."""
    world.start()
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", text)
    assert world.asked()


def is_safe(world: World, asked: int) -> None:
    """Key, state and the other folders are as they were, and every request is in the ledger."""
    world.nothing_leaked()
    world.state_is_whole(jobs=True)
    assert world.requests() == asked
    assert len(world.rows("cat.prompt.txt")) == 1


@pytest.mark.parametrize("target", ["key_folder", "state", "home"])
def test_a_claim_that_becomes_a_link_gives_away_neither_key_nor_state(shared: World, target: str) -> None:
    wait_for_one(shared, "a cat")
    (claim,) = claimed(shared)
    shared.attacker.rename(claim, claim.with_name(".taken"))
    shared.attacker.symlink(getattr(shared, target), claim)
    shared.sandbox.release()
    shared.end("cat.prompt.txt")
    is_safe(shared, asked=1)
    if not shared.holds():
        shared.honest_prompt_is_completed()
        is_safe(shared, asked=2)


@pytest.mark.parametrize("target", ["key_folder", "state"])
def test_a_claimed_file_that_becomes_a_link_gives_away_neither_key_nor_state(shared: World, target: str) -> None:
    wait_for_one(shared, "a cat")
    (claim,) = claimed(shared)
    name = {"key_folder": "letta_api_key", "state": "ledger.sqlite3"}[target]
    shared.attacker.unlink(claim / "cat.prompt.txt")
    shared.attacker.symlink(getattr(shared, target) / name, claim / "cat.prompt.txt")
    shared.attacker.symlink(getattr(shared, target), claim / "more")
    shared.sandbox.release()
    shared.end("cat.prompt.txt")
    is_safe(shared, asked=1)
    shared.honest_prompt_is_completed()
    is_safe(shared, asked=2)


def test_a_claims_folder_that_is_replaced_by_one_with_links_gives_away_neither_key_nor_state(shared: World) -> None:
    wait_for_one(shared, "a cat")
    (claim,) = claimed(shared)
    shared.attacker.rename(shared.inbox / CLAIMS, shared.inbox / ".old")
    shared.attacker.mkdir(shared.inbox / CLAIMS)
    shared.attacker.symlink(shared.key_folder, claim)
    shared.attacker.symlink(shared.state, claim.with_name("0123456789abcdef"))
    shared.sandbox.release()
    shared.end("cat.prompt.txt")
    is_safe(shared, asked=1)


def test_files_put_into_a_claim_are_put_into_no_folder_that_became_a_link(shared: World) -> None:
    shared.start()
    shared.sandbox.hold()
    shared.attacker.mkdir(shared.inbox / "sub")
    for name in ("cat", "dog"):
        shared.attacker.drop(shared.inbox / f"sub/{name}.prompt.txt", f"a {name} [sandbox: 402]")
    assert shared.asked(2)
    for claim in claimed(shared):
        shared.attacker.write(claim / "evil.sh", "echo pwned")
    shared.attacker.rename(shared.inbox / "sub", shared.inbox / ".sub")
    shared.attacker.symlink(shared.home, shared.inbox / "sub")
    shared.sandbox.release()
    shared.end("sub/cat.prompt.txt")
    shared.end("sub/dog.prompt.txt")
    shared.nothing_leaked()
    shared.state_is_whole(jobs=True)
    assert shared.requests() == 2


def test_check_reports_that_others_can_change_claimed_files(shared: World) -> None:
    assert shared.start().stop() == 0  # the claims folder is there: its mode shows what the mount keeps
    done = shared.command("check")
    assert "other users" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
