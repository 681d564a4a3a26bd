"""Nothing that is written can be read or changed by more people than it is meant for."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
from support.losing import SteppingDisk
from support.station import Station

from security.people import DAEMON, walk
from security.world import MARK, PRIVATE_IMAGE, World, give

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox import Sandbox

UNREADABLE = "a cat [sandbox: not-json]"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def open_to_others(top: Path) -> dict[str, str]:
    """Return what others than the owner have any right to, with its mode. A daemon may remove files meanwhile."""
    found = {}
    below = [Path(folder, name) for folder, inner, names in os.walk(top) for name in (*inner, *names)]
    for path in (top, *below):
        with contextlib.suppress(FileNotFoundError):
            if mode(path) & 0o077:
                found[str(path.relative_to(top))] = f"{mode(path):04o}"
    return found


@pytest.mark.parametrize("umask", [0o022, 0o000], ids=["umask 022", "umask 000"])
def test_nothing_in_the_state_folder_is_open_to_others(world: World, umask: int) -> None:
    first = world.start(umask=umask)
    for name, text in {"good": "a dog", "bad": "a cat [sandbox: 400]", "paid": UNREADABLE}.items():
        world.honest_prompt(name, text)
    for name in ("good", "bad", "paid"):
        world.wait(lambda source=f"theirs/{name}.prompt.txt": world.destination(source), "the end of all three")
    world.is_idle()
    world.sandbox.hold()
    world.honest_prompt("under way", "an elk")
    assert world.asked(4)
    assert world.command("hold", umask=umask).returncode == 0
    assert world.command("retry", "theirs/paid", umask=umask).returncode == 0
    world.held_for("manually")
    assert open_to_others(world.state) == {}
    names = {path.name for path in world.state.iterdir()}
    assert {"ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm"} <= names
    world.sandbox.release()
    world.release()
    world.wait(lambda: world.destination("theirs/under way.prompt.txt"), "the last one")
    assert first.stop() == 0
    assert open_to_others(world.state) == {}


def test_a_ledger_that_others_may_read_is_closed_to_them_at_the_next_start(world: World) -> None:
    first = world.start()
    world.honest_prompt_is_completed()
    assert first.stop() == 0
    (world.state / "ledger.sqlite3").chmod(0o644)
    world.start()
    world.honest_prompt_is_completed("second")
    assert open_to_others(world.state) == {}


@pytest.mark.parametrize("far", [False, True], ids=["same file system", "another file system"])
@pytest.mark.parametrize(
    ("file_mode", "umask", "expected"),
    [("0640", 0o022, 0o640), ("0664", 0o077, 0o664), (None, 0o027, 0o640), (None, 0o022, 0o644)],
)
def test_the_raw_response_beside_an_error_file_has_the_mode_of_published_files(
    new_world: Callable[..., World],
    request: pytest.FixtureRequest,
    file_mode: str | None,
    umask: int,
    expected: int,
    *,
    far: bool,
) -> None:
    folders = {}
    if far:
        elsewhere = request.getfixturevalue("elsewhere")
        os.chown(elsewhere, DAEMON, DAEMON)
        folders = {"errors": str(elsewhere)}
    world = new_world(settings={"folders": folders, "outbox": {"file_mode": file_mode} if file_mode else {}})
    errors = elsewhere if far else world.errors
    world.start(umask=umask)
    world.honest.drop(world.inbox / "cat.prompt.txt", UNREADABLE)
    world.wait((errors / "cat.error.toml").exists, "the error file")
    (raw,) = errors.glob("cat.answer.*")
    assert f"{mode(raw):04o}" == f"{expected:04o}"
    world.honest_prompt_is_completed()
    published = {f"{mode(path):04o}" for path in walk(world.outbox)}
    assert published == {f"{expected:04o}"}


MODES = (0o600, 0o640, 0o660, 0o644, 0o400)


@pytest.mark.parametrize("destination", ["errors", "archive"])
def test_a_copy_on_another_file_system_is_open_to_no_user_to_whom_the_file_was_not(
    new_world: Callable[..., World], elsewhere: Path, destination: str
) -> None:
    os.chown(elsewhere, DAEMON, DAEMON)
    world = new_world(settings={"folders": {destination: str(elsewhere)}})
    text = "a cat [sandbox: 400]" if destination == "errors" else "a cat"
    for number, bits in enumerate(MODES):
        for name, content in ((f"cat{number}.png", PRIVATE_IMAGE), (f"cat{number}.prompt.txt", text)):
            path = world.inbox / f".{name}"
            path.write_bytes(content.encode("latin-1"))
            give(path, bits)
            path.rename(world.inbox / name)
    first = world.start()
    for number, _ in enumerate(MODES):
        world.wait(lambda name=f"cat{number}.prompt.txt": (elsewhere / name).exists(), "all prompts")
    world.is_idle()
    for number, bits in enumerate(MODES):
        for name in (f"cat{number}.png", f"cat{number}.prompt.txt"):
            assert mode(elsewhere / name) & ~bits == 0, f"{name} was {bits:04o} and is {mode(elsewhere / name):04o}"
    assert first.stop() == 0
    if destination == "errors":
        done = world.command("retry", "cat0")
        assert done.returncode == 0, done.stdout + done.stderr
        assert mode(world.inbox / "cat0.prompt.txt") == mode(world.inbox / "cat0.png") == MODES[0]


class Watching(SteppingDisk):
    """A disk that checks at each moment whether other users can read a private file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: set[str] = set()

    def step(self, what: str, path: str) -> None:
        for file in walk(self._folder):
            if mode(file) & 0o077 and MARK.encode() in file.read_bytes():
                self.seen.add(f"before {what} {os.path.basename(path)}: {file.name} {mode(file):04o}")

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        file = super().create(path, mode)
        bits = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if bits & 0o077:  # what is written into it can be read immediately
            self.seen.add(f"created {os.path.basename(path)}: {bits:04o}")
        return file


@pytest.mark.parametrize("text", ["a cat", "a cat [sandbox: 400]"], ids=["archive", "errors"])
def test_a_copy_is_open_to_no_other_user_while_it_is_written(
    tmp_path: Path, elsewhere: Path, sandbox: Sandbox, text: str
) -> None:
    disk = Watching(elsewhere)
    (elsewhere / "archive").mkdir()
    (elsewhere / "errors").mkdir()
    settings = {"folders__archive": str(elsewhere / "archive"), "folders__errors": str(elsewhere / "errors")}
    with contextlib.closing(Station(tmp_path, sandbox.base_url, disk=disk, **settings)) as station:
        for name, content in (("cat.png", PRIVATE_IMAGE.encode("latin-1")), ("cat.prompt.txt", text.encode())):
            station.drop(name, content).chmod(0o600)
        station.work()
    assert [path.name for path in walk(elsewhere) if path.name == "cat.png"] == ["cat.png"]
    assert disk.seen == set()
