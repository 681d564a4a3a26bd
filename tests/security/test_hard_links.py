"""A hard link to a private file of another user is opened nowhere, though the daemon itself could read it.

The links are made by root: most systems keep users from linking to files that they may not read.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
import tomli_w
from support.endpoint import unique_png

from security.people import DAEMON, HONEST, seen, walk
from security.world import MARK, PRIVATE_IMAGE, World, give, holds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OWNERS = {"the daemon": (DAEMON, DAEMON, 0o600), "another user": (HONEST, DAEMON, 0o640)}
"""Rights of the private file: owner, group and mode, so that the daemon can read it."""
GOOD = unique_png("good").decode("latin-1")
owners = pytest.mark.parametrize("owner", OWNERS)


class Secrets:
    """Private files of one owner, and the links to them.

    Args:
        world: Where.
        owner: Their rights, a key of ``OWNERS``.
    """

    def __init__(self, world: World, owner: str) -> None:
        self._world = world
        self._owner = owner
        self.folder = world.top / "private"
        self.folder.mkdir()
        self._before: dict[Path, os.stat_result] = {}

    def link(self, path: Path, text: str) -> Path:
        """Make a new private file, and a hard link to it; return the file itself."""
        file = self.folder / f"{len(self._before)}"
        file.write_bytes(text.encode("latin-1"))
        uid, gid, mode = OWNERS[self._owner]
        give(file, mode, uid, gid)
        path.hardlink_to(file)
        self._before[file] = file.stat()
        return file

    def are_kept(self) -> None:
        """Each is as it was, none was sent, and there is no copy of any."""
        self._world.nothing_private_was_sent()
        known = {(file.stat().st_dev, file.stat().st_ino) for file in self._before}
        for path in walk(self._world.top):
            status = seen(path)
            if status and stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in known:
                outside = self._world.home not in path.parents
                assert not (outside and holds(path, (MARK,))), f"{path} holds what is private"
        assert self._world.attacker.readable_with(str(self._world.top), [MARK]) == []
        assert MARK not in self._world.log()
        for file, before in self._before.items():
            now = file.stat()
            assert (now.st_mode, now.st_uid, now.st_gid, now.st_mtime_ns, now.st_size) == (
                *(before.st_mode, before.st_uid, before.st_gid),
                *(before.st_mtime_ns, before.st_size),
            ), "a private file was changed"


def drop_everywhere(world: World, secrets: Secrets) -> list[str]:
    """Drop prompts with hard links in each place where a file may be; return their paths below the inbox."""
    for folder in ("text", "image", "sibling", "named"):
        world.attacker.mkdir(world.inbox / folder)
    secrets.link(world.inbox / "text/cat.prompt.txt", f"a cat, {MARK}")
    secrets.link(world.inbox / "image/cat.png", PRIVATE_IMAGE)
    world.attacker.write(world.inbox / "sibling/cat.png", GOOD)
    secrets.link(world.inbox / "sibling/cat.1.png", PRIVATE_IMAGE)
    secrets.link(world.inbox / "named/other.png", PRIVATE_IMAGE)
    world.attacker.drop(world.inbox / "image/cat.prompt.txt", "make it night")
    world.attacker.drop(world.inbox / "sibling/cat.prompt.txt", "make it day")
    world.attacker.drop(world.inbox / "named/cat.prompt.txt", '+++\ninput_images = ["other.png"]\n+++\nmake it blue')
    return [f"{folder}/cat.prompt.txt" for folder in ("text", "image", "sibling", "named")]


@owners
def test_a_private_file_is_not_sent_as_prompt_or_image_through_a_hard_link(world: World, owner: str) -> None:
    secrets = Secrets(world, owner)
    sources = drop_everywhere(world, secrets)
    world.start()
    ends = {source: world.end(source) for source in sources}
    world.honest_prompt_is_completed()
    secrets.are_kept()
    assert set(ends.values()) <= {"errors", "waiting"}
    assert world.requests() == 1


def test_a_daemon_of_root_does_not_send_a_private_file_either(world: World) -> None:
    secrets = Secrets(world, "another user")
    for folder in (world.state, world.outbox, world.errors, world.archive):
        os.chown(folder, 0, 0)
    sources = drop_everywhere(world, secrets)
    for file in secrets.folder.iterdir():
        give(file, 0o600, HONEST)
    secrets._before = {file: file.stat() for file in secrets.folder.iterdir()}
    world.start(uid=0)
    ends = {source: world.end(source) for source in sources}
    secrets.are_kept()
    assert set(ends.values()) <= {"errors", "waiting"}
    assert world.requests() == 0


@owners
def test_a_private_file_in_the_place_of_a_failed_prompt_is_not_copied_to_a_readable_place(
    new_world: Callable[..., World], elsewhere: Path, owner: str
) -> None:
    os.chown(elsewhere, DAEMON, DAEMON)
    world = new_world(settings={"folders": {"errors": str(elsewhere)}})
    secrets = Secrets(world, owner)
    world.start()
    secrets.link(world.inbox / "cat.prompt.txt", f"+++\nunknown = 1\n+++\na cat, {MARK}")  # refused for its text
    world.wait(lambda: list(elsewhere.glob("*.toml")) or world.end("cat.prompt.txt"), "an end")
    world.honest_prompt_is_completed()
    for path in walk(elsewhere):
        if MARK.encode() in path.read_bytes():
            assert path.stat().st_mode & 0o007 == 0, f"{path} can be read by all"
    assert world.attacker.readable_with(str(elsewhere), [MARK]) == []
    assert world.requests() == 1


@owners
def test_retry_does_not_put_a_private_file_into_the_inbox(new_world: Callable[..., World], owner: str) -> None:
    world = new_world(open_to_all=("errors",))
    secrets = Secrets(world, owner)
    first = world.start()
    world.attacker.drop(world.inbox / "cat.prompt.txt", "a cat [sandbox: 400]")
    world.wait(lambda: world.destination("cat.prompt.txt"), "the error file")
    world.is_idle()
    world.attacker.unlink(world.errors / "cat.prompt.txt")
    secrets.link(world.errors / "cat.prompt.txt", f"a cat, {MARK}")
    done = world.command("retry", "cat")
    world.honest_prompt_is_completed()
    assert first.stop() == 0
    secrets.are_kept()
    assert world.requests() == 2
    assert done.returncode in {1, 74}, done.stdout + done.stderr
    assert MARK not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (world.inbox / "cat.prompt.txt").exists()
    assert (world.errors / "cat.prompt.txt").exists()


@owners
@pytest.mark.parametrize("how", ["image", "sibling"])
def test_submit_does_not_copy_a_private_file_into_the_inbox(world: World, how: str, owner: str) -> None:
    secrets = Secrets(world, owner)
    place = world.top / "shared"
    place.mkdir(mode=0o755)
    secrets.link(place / "cat.png", PRIVATE_IMAGE)
    (place / "cat.prompt.txt").write_text("make it night")
    chosen = ["make it night", "--image", "cat.png"] if how == "image" else ["--from", "cat.prompt.txt"]
    done = world.command("submit", *chosen, cwd=str(place))
    assert done.returncode == 64, done.stdout + done.stderr
    assert "cat.png" in done.stderr
    assert "Traceback" not in done.stderr
    secrets.are_kept()
    assert [path for path in walk(world.inbox) if path.name not in {"lock", ".imagewatch-claims"}] == []


@owners
def test_the_gallery_shows_nothing_of_a_private_file(new_world: Callable[..., World], owner: str) -> None:
    world = new_world(open_to_all=("outbox", "errors", "archive"))
    secrets = Secrets(world, owner)
    page = world.top / "page"
    page.mkdir()
    give(page, 0o755)
    secrets.link(world.outbox / "cat.png", PRIVATE_IMAGE)
    secrets.link(world.archive / "cat.in.png", PRIVATE_IMAGE)
    secrets.link(world.errors / "dog.prompt.txt", f"a dog, {MARK}")
    size = len(PRIVATE_IMAGE.encode("latin-1"))
    receipt = {"source": "cat.prompt.txt", "charged": "yes", "prompt": "a cat"}
    receipt |= {"images": [{"file": "cat.png", "bytes": size}], "inputs": [{"file": "cat.in.png", "bytes": size}]}
    world.attacker.write(world.outbox / "cat.receipt.toml", tomli_w.dumps(receipt))
    world.attacker.write(world.errors / "dog.error.toml", tomli_w.dumps({"source": "dog.prompt.txt", "charged": "no"}))
    world.attacker.write(world.outbox / "good.png", GOOD)
    good = {"source": "good.prompt.txt", "charged": "yes", "images": [{"file": "good.png", "bytes": len(GOOD)}]}
    world.attacker.write(world.outbox / "good.receipt.toml", tomli_w.dumps(good))
    done = world.command("gallery", "--output", str(page / "gallery.html"))
    assert done.returncode == 0, done.stderr
    secrets.are_kept()
    shown = (page / "gallery.html").read_text()
    assert (MARK in shown, "outbox/good.png" in shown, "outbox/cat.png" in shown) == (False, True, False)
    # That of the good image, where this user can start the program that makes it.
    assert len(list(page.glob("gallery_files/*.webp"))) <= 1, "thumbnails beside that of the good image"


@owners
def test_a_private_file_is_not_compared_with_prompts_from_before(world: World, owner: str) -> None:
    world.start()
    text = f"a cat, {MARK}"
    world.attacker.drop(world.inbox / "cat.prompt.txt", text)
    world.wait(lambda: world.destination("cat.prompt.txt"), "the receipt")
    world.is_idle()
    secrets = Secrets(world, owner)
    (row,) = world.rows("cat.prompt.txt")
    file = secrets.folder / "old"
    file.write_text(text)
    give(file, OWNERS[owner][2], *OWNERS[owner][:2])
    os.utime(file, ns=(row["source_mtime_ns"], row["source_mtime_ns"]))
    (world.inbox / "cat.prompt.txt").hardlink_to(file)
    world.honest_prompt_is_completed()
    assert world.end("cat.prompt.txt") in {"waiting", "outbox"}
    assert file.stat().st_nlink == 2, "the link was removed: who made it knows now what the private file says"
    assert world.status()["redelivered"] == 0
    assert world.requests(text) == 1


def test_a_hard_link_to_a_file_that_all_users_may_read_is_claimed(world: World) -> None:
    world.start()
    world.attacker.mkdir(world.inbox / "sub")
    copies = world.top / "copies"
    copies.mkdir()
    for name, text in (("cat.png", GOOD), ("cat.prompt.txt", "make it night")):
        (copies / name).write_bytes(text.encode("latin-1"))
        give(copies / name, 0o644, HONEST)
        (world.inbox / "sub" / name).hardlink_to(copies / name)
    assert world.end("sub/cat.prompt.txt") == "outbox"
    assert world.requests() == 1
