"""What the tests of senders share: a daemon that runs, something to send to it, and programs on a terminal."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pty
import random
import shutil
import subprocess
import termios
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest
from PIL import Image

from imagewatch.inbox.open_files import has_writer
from imagewatch.sandbox import Sandbox
from support.daemon import KEY, PATIENCE, Folders, LoggedDaemon, Running, below, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SETTLE = 1.0
"""The settle time of the daemon of these tests, seconds."""
PAUSE = SETTLE / 8
"""Seconds between two pieces of a slow sender that closes its file in between."""
_PARCELS = 150
"""More than the tests of one module send."""
_TRIES = 3
"""So many parcels are sent if the sender itself is too slow."""
SLOW = pytest.mark.skipif("IMAGEWATCH_ALL_SENDERS" not in os.environ, reason="slow: IMAGEWATCH_ALL_SENDERS=1 runs it")
DECLARES = '+++\ninput_images = ["cat.webp", "cat.1.png", "cat.2.jpg"]\n+++\n'
DECLARES_NOTHING = "+++\ninput_images = []\n+++\n"


def writers_are_seen(folder: Path) -> None:
    """Skip the test where the kernel does not show that a file is open for writing."""
    path = folder / "open"
    with path.open("w"):
        if not has_writer(str(path)):
            pytest.skip("this file system does not report writers")


def program(*names: str) -> str:
    """Return the path of the first of these programs that is installed, or skip the test."""
    for name in names:
        if path := shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            return path
    pytest.skip(f"{names[0]} is not installed")


def noise(seed: str, side: int, kind: str) -> bytes:
    """Return an image that cannot be compressed, and that no other seed has."""
    pixels = random.Random(seed).randbytes(side * side * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(out, kind, **({"lossless": True} if kind == "webp" else {}))
    return out.getvalue()


class Pace:
    """Measures how long a sender pauses: the longest time without a change of a folder that has a prompt already.

    Attributes:
        longest: That time, seconds. A change that was not noticed makes it longer than it was.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.longest = self._last = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pace", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self._look()

    def _look(self) -> None:
        found = [self._folder, *below(self._folder)]
        times = [self._last]
        for path in found:
            with contextlib.suppress(OSError):  # it is removed or renamed meanwhile
                times.append(path.lstat().st_ctime)
        if self._last:
            self.longest = max(self.longest, max(times) - self._last)
        if self._last or any(path.name.endswith(".prompt.txt") and path.name[0] != "." for path in found):
            self._last = max(times)


class Parcel:
    """A prompt with three images, ready to be sent into a sub-folder of an inbox.

    ``cat.webp`` is the first of the images, though a sender that sorts by name sends it last, after the prompt.

    Attributes:
        source: The folder it is sent from.
        target: The folder it is to be sent into.
        text: What is asked for.
        files: Name and bytes of each file, in the order of their names.
    """

    def __init__(self, service: Service, source: Path, name: str, head: str = "", side: int = 250) -> None:
        self.service = service
        self._folder, self._head, self._side = source, head, side
        self._prepared: list[Callable[[Parcel], object]] = []
        self._pack(name)

    def _pack(self, name: str) -> None:
        self.name = name
        self.source = self._folder / name
        self.target = self.service.folders.inbox / name
        self.source.mkdir()
        self.text = f"{name:.<60} " + "and more " * 3000 + "to the end."
        self.files = {
            "cat.1.png": noise(f"{name} 1", 200, "png"),
            "cat.2.jpg": noise(f"{name} 2", 200, "jpeg"),
            "cat.prompt.txt": (self._head + self.text).encode(),
            "cat.webp": noise(f"{name} 0", self._side, "webp"),
        }
        for file, content in self.files.items():
            (self.source / file).write_bytes(content)

    @property
    def prompt(self) -> Path:
        """The prompt in the inbox."""
        return self.target / "cat.prompt.txt"

    def prepare(self, act: Callable[[Parcel], object]) -> Self:
        """Do something with the files before they are sent, also with those of the next try."""
        self._prepared.append(act)
        act(self)
        return self

    def send(self, act: Callable[[], object]) -> None:
        """Send it. A sender that has paused for longer than the settle time shows nothing: another parcel is sent.

        What the daemon has done with the first one does not count, as it may have been right.
        """
        for _ in range(_TRIES):
            failure: Exception | None = None
            with Pace(self.target) as pace:
                try:
                    act()
                except (AssertionError, OSError) as error:  # the daemon may have claimed a file before its end
                    failure = error
            if pace.longest < SETTLE:
                if failure is not None:
                    raise failure
                return
            self._pack(self.service.free())
            for one in self._prepared:
                one(self)
        pytest.fail(f"the sender has paused for {pace.longest:.1f} s, {_TRIES} times")

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What the endpoint was asked for this parcel."""
        start = self.text[:60]
        return [call for call in self.service.sandbox.report()["calls"] if call["prompt"].startswith(start)]

    @property
    def over(self) -> bool:
        """Whether a receipt or an error file is there."""
        destinations = (self.service.folders.outbox, self.service.folders.errors)
        return any(list((destination / self.name).rglob("*.toml")) for destination in destinations)

    def is_completed(self, folder: str = "") -> None:
        """Wait for its receipt; then it must have been sent once, whole, with its images in their order."""
        until(lambda: self.over)
        self.is_sent_whole(folder)

    def is_sent_whole(self, folder: str = "") -> None:
        """It must have been sent once, with every byte, and be in the archive as it was dropped."""
        folders, name = self.service.folders, os.path.join(self.name, folder)
        assert [path.read_text() for path in (folders.errors / name).glob("*.toml")] == []
        assert (folders.outbox / name / "cat.receipt.toml").exists()
        order = ("cat.webp", "cat.1.png", "cat.2.jpg")
        inputs = [hashlib.sha256(self.files[file]).hexdigest() for file in order]
        assert [(call["prompt"], call["inputs"]) for call in self.calls] == [(self.text, inputs)]
        until(lambda: not any((folders.inbox / name / file).exists() for file in self.files))
        archive = folders.archive / name
        until(lambda: {path.name for path in archive.glob("*")} == set(self.files))
        assert {path.name: path.read_bytes() for path in archive.glob("*")} == self.files

    def is_not_claimed(self) -> None:
        """It must not be claimed though all of it is unchanged: a parcel that was dropped later is finished first."""
        later = self.service.parcel(self.source.parent)
        later.send(lambda: shutil.copytree(later.source, later.target, dirs_exist_ok=True))
        later.is_completed()
        assert self.calls == []
        assert not self.over


class Service:
    """A daemon with its folders and its endpoint."""

    def __init__(self, folders: Folders, sandbox: Sandbox, daemon: LoggedDaemon) -> None:
        self.folders = folders
        self.sandbox = sandbox
        self.daemon = daemon
        self._free = sorted(path.name for path in folders.inbox.iterdir() if path.name[0] != ".")

    def parcel(self, source: Path, **what: Any) -> Parcel:
        """Return something to send into a folder of its own, which is watched already."""
        return Parcel(self, source, self.free(), **what)

    def free(self) -> str:
        """Return the name of a folder that is watched already, and that nothing was sent into."""
        return self._free.pop(0)


@contextlib.contextmanager
def serving(root: Path, **settings: str) -> Iterator[Service]:
    """Run a daemon for as many tests as there are; at the end there must be no bug and no fault."""
    with Sandbox(key=KEY) as sandbox:
        folders = Folders(root, sandbox.base_url, inbox__settle_seconds=str(SETTLE), **settings)
        for number in range(_PARCELS):
            (folders.inbox / f"{number:03}").mkdir()
        running = Running(folders, "run")
        daemon = LoggedDaemon(running)
        try:
            daemon.wait_for("started")
            yield Service(folders, sandbox, daemon)
            assert daemon.stop() == 0
            assert folders.leftovers() == []
            assert sandbox.report()["faults"] == []
        finally:
            if running.process.poll() is None:
                running.process.kill()
            daemon.end()
            for pipe in (running.process.stdout, running.process.stderr):
                pipe.close()  # type: ignore[union-attr]


def pause(seconds: float = PAUSE) -> None:
    """Be as slow as a slow sender."""
    threading.Event().wait(seconds)


def pieces(content: bytes, count: int = 6) -> list[bytes]:
    """Cut something into pieces of one size."""
    size = len(content) // count + 1
    return [content[start : start + size] for start in range(0, len(content), size)]


def run(command: Sequence[str | Path], **options: Any) -> None:
    """Run a program to its end, which must be a good one."""
    done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE, **options)
    assert done.returncode == 0, done.stderr.decode(errors="replace")


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str | Path) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 160))
        environ = {**os.environ, "TERM": "linux", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env=environ
        )
        os.close(slave)
        self.screen = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how a terminal shows that no process is left on it
            while chunk := os.read(self._master, 65536):
                self.screen += chunk.decode(errors="replace")

    def shows(self, text: str) -> None:
        """Wait until the program has written something, then forget it."""
        until(lambda: text in self.screen)
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join(PATIENCE)
            os.close(self._master)
