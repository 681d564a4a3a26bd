"""The claims folder is in a folder that other users may write: it is the daemon's own, or it is not used."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support import noon

from security.world import CLAIMS, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def replace_claims(world: World) -> None:
    """Put a folder of the attacker's in the place of the claims."""
    world.attacker.mkdir(world.inbox / ".old")
    world.attacker.exchange(world.inbox / CLAIMS, world.inbox / ".old")  # else the daemon may rename it back first


def put_back_claims(world: World) -> None:
    """Undo it."""
    world.attacker.rename(world.inbox / CLAIMS, world.inbox / ".fake")
    with contextlib.suppress(FileNotFoundError):  # the daemon has given it its name back
        world.attacker.rename(world.inbox / ".old", world.inbox / CLAIMS)


def replace_claim_by_link(world: World, target: Path) -> None:
    """Put a link in the place of what the daemon claimed in the attacker's folder."""
    claims = world.inbox / CLAIMS
    (job,) = (name for name in world.attacker.listdir(claims) if len(name) == 16)
    world.attacker.rename(claims / job, claims / ".taken")
    world.attacker.symlink(target, claims / job)


def is_held_until_it_is_put_back(world: World, text: str) -> None:
    """The queue is on hold because of the claims folder; when that is put back, everything is completed, once."""
    held_back = world.honest_prompt("held back", "waits for the end of the hold")
    world.held_for(CLAIMS)
    put_back_claims(world)
    world.release()
    world.wait(lambda: world.destination(held_back), "what was held back")
    world.wait(lambda: world.destination("cat.prompt.txt"), "the prompt of the attacker")
    assert world.destination(held_back) == world.destination("cat.prompt.txt") == "outbox"
    assert world.requests(text) == world.requests("waits for the end of the hold") == 1
    world.is_idle()
    assert (world.archive / "cat.prompt.txt").read_text() == text
    assert world.leftovers() == []
    world.state_is_whole()


@pytest.mark.parametrize("far", [False, True], ids=["same file system", "another file system"])
def test_a_claims_folder_of_the_attackers_with_a_link_to_the_key_does_not_give_the_key_away(
    new_world: Callable[..., World], request: pytest.FixtureRequest, far: bool
) -> None:
    world = new_world(key_folder=request.getfixturevalue("elsewhere") if far else None)
    world.start()
    replace_claims(world)
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    if world.asked():
        replace_claim_by_link(world, world.key_folder)
    world.sandbox.release()
    world.end("cat.prompt.txt")
    world.nothing_leaked()
    is_held_until_it_is_put_back(world, "a cat")
    world.nothing_leaked()


def test_a_claims_folder_of_the_attackers_with_a_link_to_the_state_leaves_ledger_lock_and_caps_as_they_are(
    new_world: Callable[..., World],
) -> None:
    noon.day_lasts()
    world = new_world(settings={"limits": {"credits_per_day": 100, "assumed_credits": 30}})  # an image costs 30
    first = world.start()
    world.honest_prompt_is_completed("before")
    replace_claims(world)
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    if world.asked(2):
        replace_claim_by_link(world, world.state)
    world.sandbox.release()
    world.end("cat.prompt.txt")
    world.state_is_whole(jobs=True)
    world.nothing_leaked()
    is_held_until_it_is_put_back(world, "a cat")
    assert first.stop() == 0
    world.start()
    world.honest_prompt("over the cap", "too much")
    world.held_for("credits_per_day")
    assert world.requests() == 3


def test_files_prepared_in_a_claims_folder_of_the_attackers_are_put_into_no_other_folder(world: World) -> None:
    world.start()
    replace_claims(world)
    world.attacker.mkdir(world.inbox / "sub")
    world.sandbox.hold()
    for name in ("cat", "dog"):
        world.attacker.drop(world.inbox / f"sub/{name}.prompt.txt", f"a {name} [sandbox: 402]")
    if world.asked(2):
        claims = world.inbox / CLAIMS
        for job in world.attacker.listdir(claims):
            if len(job) == 16:
                world.attacker.rename(claims / job, claims / f".{job}")
                world.attacker.mkdir(claims / job)
                world.attacker.write(claims / job / "evil.sh", "echo pwned")
        world.attacker.rename(world.inbox / "sub", world.inbox / ".sub")
        world.attacker.symlink(world.home, world.inbox / "sub")
    world.sandbox.release()
    world.end("sub/cat.prompt.txt")
    world.end("sub/dog.prompt.txt")
    world.nothing_leaked()
    world.state_is_whole(jobs=True)
    world.held_for(CLAIMS)


def test_a_claims_folder_that_is_replaced_during_a_request_loses_nothing(world: World) -> None:
    world.start()
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    assert world.asked()
    replace_claims(world)
    world.sandbox.release()
    assert world.end("cat.prompt.txt") in {"outbox", "held", "stuck"}
    world.nothing_leaked()
    is_held_until_it_is_put_back(world, "a cat")


def test_a_claims_folder_that_is_renamed_during_a_request_loses_nothing(world: World) -> None:
    world.start()
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    assert world.asked()
    world.attacker.rename(world.inbox / CLAIMS, world.inbox / ".away")
    world.sandbox.release()
    assert world.end("cat.prompt.txt") in {"outbox", "held", "stuck"}
    held_back = world.honest_prompt("other", "another prompt")
    world.wait(lambda: world.destination(held_back) or CLAIMS in world.holds(), "the other prompt, or a hold")
    if world.holds():
        world.attacker.rename(world.inbox / ".away", world.inbox / CLAIMS)
        world.release()
    world.wait(lambda: world.destination(held_back) == world.destination("cat.prompt.txt") == "outbox", "both prompts")
    assert world.requests("a cat") == world.requests("another prompt") == 1
    world.is_idle()
    assert (world.archive / "cat.prompt.txt").read_text() == "a cat"
    assert [path for path in world.inbox.glob(".away/*") if path.name not in {"lock", ".imagewatch-claims"}] == []


@pytest.mark.parametrize("replaced", [False, True], ids=["renamed", "replaced"])
def test_claimed_files_are_not_claimed_again_when_their_folder_gets_a_name_that_is_scanned(
    world: World, *, replaced: bool
) -> None:
    world.start()
    world.sandbox.hold()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    assert world.asked()
    if replaced:
        world.attacker.mkdir(world.inbox / "visible")
        world.attacker.exchange(world.inbox / CLAIMS, world.inbox / "visible")
    else:
        world.attacker.rename(world.inbox / CLAIMS, world.inbox / "visible")
    other = world.honest_prompt("other", "another prompt")
    world.wait(lambda: world.requests() > 1 or world.holds(), "another request, or a hold")
    world.sandbox.release()
    if world.holds():
        if replaced:
            world.attacker.rename(world.inbox / CLAIMS, world.inbox / ".fake")
        world.attacker.may("rename", world.inbox / "visible", world.inbox / CLAIMS)  # the daemon may be faster
        world.release()
    world.wait(lambda: world.destination(other) == world.destination("cat.prompt.txt") == "outbox", "both prompts")
    world.is_idle()
    assert world.requests("a cat") == world.requests("another prompt") == 1
    assert (world.archive / "cat.prompt.txt").read_text() == "a cat"


def test_an_empty_claims_folder_that_is_removed_is_created_again(world: World) -> None:
    first = world.start()
    world.honest_prompt_is_completed("before")
    world.is_idle()
    world.attacker.may("rmdir", world.inbox / CLAIMS)  # not if there is something in it
    source = world.honest_prompt("after", "an honest prompt of after")
    world.wait(lambda: world.destination(source) or world.holds(), "the prompt, or a hold")
    if world.holds():
        assert CLAIMS in world.holds()
        assert first.stop() == 0
        world.start()
    world.wait(lambda: world.destination(source) == "outbox", "the prompt")
    assert world.requests() == 2


def test_a_lock_in_a_claims_folder_of_the_attackers_is_not_taken_for_another_daemon(world: World) -> None:
    world.start()
    replace_claims(world)
    world.attacker.write(world.inbox / CLAIMS / "lock", "")
    world.attacker.lock(world.inbox / CLAIMS / "lock")
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat")
    world.held_for(CLAIMS)
    assert "another imagewatch" not in world.holds()
    is_held_until_it_is_put_back(world, "a cat")


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
def test_a_lock_of_another_user_on_the_inbox_does_not_prevent_the_start(world: World, kind: str) -> None:
    world.attacker.lock(world.inbox, kind)
    world.start()
    world.honest_prompt_is_completed()


def before_the_first_start(world: World, kind: str) -> None:
    """Put something of the attacker's where the claims folder will be."""
    claims, attacker = world.inbox / CLAIMS, world.attacker
    if kind == "file":
        attacker.write(claims, "")
    elif kind == "pipe":
        attacker.mkfifo(claims)
    elif kind == "link":
        attacker.symlink(world.home, claims)
    else:
        attacker.mkdir(claims)
    if kind == "folder with a lock":
        attacker.write(claims / "lock", "")
        attacker.lock(claims / "lock")
    if kind == "folder with links":
        attacker.symlink(world.key_folder, claims / "0123456789abcdef")
        attacker.symlink(world.home / ".profile", claims / ".iw-probe")


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "folder", "folder with a lock", "folder with links"])
def test_folders_of_another_owner_are_named_and_not_used_at_the_first_start(world: World, kind: str) -> None:
    claims = world.inbox / CLAIMS
    before_the_first_start(world, kind)
    first = world.start(running=False)
    source = world.honest_prompt("early", "an early prompt")
    world.wait(
        lambda: first.process.poll() is not None or world.holds() or world.destination(source), "an end or a hold"
    )
    assert world.requests() == 0
    assert world.destination(source) == ""
    if first.process.poll() is None:
        assert CLAIMS in world.holds()
        assert "another imagewatch" not in world.holds()
        first.stop()
    else:
        assert first.end() in {74, 78}, world.log()
        assert str(claims) in world.log()
        assert "Traceback" not in world.log()
    world.nothing_leaked()
    world.attacker.rename(claims, world.inbox / ".was here")
    world.start()
    world.wait(lambda: world.destination(source) == "outbox", "the prompt")
    assert world.requests() == 1
    world.nothing_leaked()
