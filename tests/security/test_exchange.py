"""A folder is exchanged with a link at every moment of a job: nothing private leaves, nothing is written elsewhere.

The real parts work in this process, as root, so that no permission stops them. Their disk calls the attacker before
and after each change. ``IMAGEWATCH_ALL_ATTACKS=1`` tries every moment; otherwise some of them, evenly spread.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from support.endpoint import Books, PaidEndpoint, Reply, unique_png
from support.station import Station

from imagewatch.commands.retry import Retry
from imagewatch.inbox.scan import InboxScan
from imagewatch.job.worker import Worker
from imagewatch.journal.control import Control
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from security.people import snapshot, walk
from security.puppet import exchange
from security.world import CLAIMS, MARK, PRIVATE_IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.endpoint.body import Body
    from imagewatch.endpoint.saved_answer import Sink
    from imagewatch.job.outcome import Outcome

ALL = os.environ.get("IMAGEWATCH_ALL_ATTACKS") == "1"
MOMENTS = 24
"""So many moments of each job are tried ordinarily."""
DROPPED = {
    "cat.prompt.txt": b"a cat",
    "cat.png": unique_png("cat"),
    "cat.1.png": unique_png("another cat"),
}
TARGETS = {
    "completed": ("inbox/sub", "outbox/sub free", "archive/sub free", f"inbox/{CLAIMS}", "the claim", "the claim free"),
    "refused": ("inbox/sub", "errors/sub free", f"inbox/{CLAIMS} free", "the claim"),
    "not readable": ("errors/sub free", f"inbox/{CLAIMS} free", "the claim free"),
    "given back": ("inbox/sub", "inbox/sub free", f"inbox/{CLAIMS}", "the claim free"),
    "put back by retry": ("inbox/sub free", "errors/sub"),
    "read again for retry": ("errors/sub", f"inbox/{CLAIMS}", "the claim free"),
}
"""Folders that are exchanged, by scene; ``free`` if the private folder has none of the names that were dropped. In the
claims folder only those can who share a file system without owners."""
SCENES = {
    "completed": ([Reply()], True),
    "refused": ([Reply(400, b'{"message": "no cats"}', paid=False)], True),
    "not readable": ([Reply(body=b"<html>thank you")], True),
    "given back": ([Reply(402, b'{"message": "pay"}', paid=False), Reply()], False),
    "put back by retry": ([Reply(400, b'{"message": "no cats"}', paid=False), Reply()], True),
    "read again for retry": ([Reply(body=b"<html>thank you")], True),
}
"""The response of the endpoint, and whether the job may report a refusal of the account. In the last two cases the
attacker sees only what follows after the prompt failed."""


class AttackedDisk(Disk):
    """A disk that reports each moment: before and after all that it does.

    Attributes:
        moment: Called at each.
    """

    def __init__(self, moment: Callable[[], None]) -> None:
        self.moment = moment


def _reported(act: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(act)
    def acting(self: AttackedDisk, *arguments: Any, **named: Any) -> Any:
        self.moment()
        try:
            return act(self, *arguments, **named)
        finally:
            self.moment()

    return acting


for _name in dir(Disk):  # what it inherits, too
    if callable(_act := getattr(Disk, _name)) and not _name.startswith("_"):
        setattr(AttackedDisk, _name, _reported(_act))


class SeeingEndpoint(PaidEndpoint):
    """An endpoint that keeps what it was sent."""

    def __init__(self, replies: dict[str, list[Reply]], books: Books, moment: Callable[[str], None]) -> None:
        super().__init__(replies, books, moment)
        self.bodies: list[dict[str, Any]] = []

    def send(self, job: str, body: Body, on_send: Callable[[], AbstractContextManager[object]], sink: Sink) -> None:
        seen = _Seen(body)
        try:
            super().send(job, seen, on_send, sink)  # type: ignore[arg-type]  # as much of a body as it needs
        finally:
            with contextlib.suppress(ValueError):  # not sent whole
                self.bodies.append(json.loads(seen.content))


class _Seen:
    """A body that remembers what was read of it."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self.length = body.length
        self.content = b""

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._body:
            self.content += bytes(piece)
            yield piece


@dataclass
class Attack:
    """An exchange of a folder with a link.

    Attributes:
        target: The folder, one of ``TARGETS``: below the root, or ``the claim``, that of the job in the claims folder.
        at: The moment, from 1, at which it happens; 0 is never.
        lasts: Whether it is undone only when the job cannot continue, and not at the next moment.
        moments: How many there were so far.
    """

    target: str
    at: int
    lasts: bool
    moments: int = 0
    done: tuple[Path, Path] | None = None


class Scene:
    """One prompt with two images in a sub-folder, a private folder that has names like theirs, and an attacker.

    Args:
        top: An empty folder.
        name: Which of ``SCENES``.
        attack: What the attacker does.
    """

    def __init__(self, top: Path, name: str, attack: Attack) -> None:
        replies, may_report = SCENES[name]
        self._name = name
        self.attack, self.over = attack, False
        self.private = top / "private"
        self.private.mkdir(mode=0o700)
        for file in ("other.png", "other.txt") if attack.target.endswith(" free") else DROPPED:
            text = PRIVATE_IMAGE.encode("latin-1") if file.endswith("png") else MARK.encode()
            (self.private / file).write_bytes(text)
            (self.private / file).chmod(0o600)
        self.disk = AttackedDisk(lambda: None)
        more = {"outbox__folder_mode": "2750", "inbox__redelivery": "run"}
        self.station = station = Station(top, "http://127.0.0.1:9", disk=self.disk, **more)
        self.books = Books()
        self.endpoint = SeeingEndpoint({"a cat": replies}, self.books, lambda _: self.disk.moment())
        self.worker = Worker(
            station.spool,
            self.endpoint,  # type: ignore[arg-type]
            station.journal,
            station.config(),
            may_report=lambda _: may_report,
            wait=lambda _: None,
        )
        if attack.lasts:
            for destination in ("outbox", "errors", "archive"):
                (station.root / destination / "sub").mkdir()
        for file, content in sorted(DROPPED.items(), reverse=True):
            station.drop(f"sub/{file}", content)
        self.before = snapshot(self.private)

    def _moment(self) -> None:
        attack = self.attack
        attack.moments += 1
        if attack.moments == attack.at:
            self._strike()
        elif not attack.lasts:
            self.undo()

    def _strike(self) -> None:
        target = self.attack.target.removesuffix(" free")
        place = self.station.root / target
        if target == "the claim":
            claims = self.station.inbox / CLAIMS
            place = next((path for path in claims.iterdir() if len(path.name) == 16), claims / "none")
        trap = place.with_name(".trap")
        if place.exists():
            trap.symlink_to(self.private)
            exchange(str(place), str(trap))
            self.attack.done = (place, trap)

    def undo(self) -> None:
        """Put the folder back."""
        if self.attack.done:
            place, trap = self.attack.done
            self.attack.done = None
            place.unlink(missing_ok=True)
            if trap.exists():  # an empty one may have been removed meanwhile
                trap.rename(place)

    def work(self) -> None:
        """Do the job under attack as far as it goes, then without."""
        act = self._start
        if self._name == "put back by retry":
            self._start()
            act = self._put_back
        elif self._name == "read again for retry":
            self._start()
            (job,) = (job for job, state in self.station.job_states().items() if state == "kept")
            assert self.station.journal.reopen(job)
            act = self._again
        self.disk.moment = self._moment
        for _ in range(4):
            with contextlib.suppress(SpoolError):
                if act() == []:
                    break
                act = self._again
        self.disk.moment = lambda: None
        self.undo()
        for _ in range(8):
            with contextlib.suppress(SpoolError):
                if self._name == "put back by retry":
                    self._put_back()
                if self._again() == []:
                    break

    def _failed(self) -> list[Path]:
        return list((self.station.errors / "sub").glob("*.error.toml"))

    def _put_back(self) -> list[Outcome]:
        station = self.station
        config = station.config()
        again = Retry(
            config.folders,
            self.disk,
            station.journal,
            Control(config.folders.state, self.disk, station.journal.requests),
        )
        for path in self._failed():
            again.put_back(again.read(str(path)))
        return []

    def _start(self) -> list[Outcome]:
        scan = InboxScan(self.station.spool.inbox, self.station.config().inbox)
        ready = scan.scan_all(time.monotonic(), time.time()).ready
        return [self.worker.start(one.claim(self.station.spool.new_job(), time.time())) for one in ready]

    def _again(self) -> list[Outcome]:
        outcomes = [self.worker.process(job, is_resumed=True) for job in self.station.spool.unfinished()]
        return outcomes + self._start()

    def check(self) -> None:
        """Check everything from outside."""
        station, tried = self.station, f"{self.attack}"
        assert snapshot(self.private) == self.before, f"the private folder was changed: {tried}"
        for path in walk(station.root.parent):
            if self.private not in path.parents and path.is_file() and not path.is_symlink():
                assert MARK.encode() not in path.read_bytes(), f"{path} holds what is private: {tried}"
        for body in self.endpoint.bodies:
            images = [base64.b64decode(url.partition(",")[2]) for url in body.get("input_images", [])]
            assert not any(MARK.encode() in image for image in images), f"a private image was sent: {tried}"
            assert MARK not in body["prompt"], f"a private text was sent: {tried}"
            assert images == [DROPPED["cat.png"], DROPPED["cat.1.png"]], f"sent without its images: {tried}"
        assert self.books.paid.get("a cat", 0) <= 1, f"paid twice: {tried}"
        found = [path.read_bytes() for path in walk(station.root) if path.is_file() and not path.is_symlink()]
        for name, content in DROPPED.items():
            assert found.count(content) == 1, f"{name} is there {found.count(content)} times: {tried}"
        files = [path for path in station.root.rglob("*.toml") if not path.is_symlink()]
        assert len(files) <= 1, f"{files}: {tried}"
        assert not any("a bug" in path.read_text() for path in files), f"reported as a bug: {tried}"

    def is_over(self) -> bool:
        """Return whether the job has its result file and left nothing behind."""
        return self.station.leftovers() == [] and len(list(self.station.root.rglob("*.toml"))) == 1


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


@pytest.fixture
def playing(tmp_path: Path) -> Iterator[Callable[[str, Attack], Scene]]:
    """Play scenes, where the disk is quick."""
    shm = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shm)) if os.access(shm, os.W_OK) else tmp_path

    def play(name: str, attack: Attack) -> Scene:
        top = Path(tempfile.mkdtemp(dir=place))
        scene = Scene(top, name, attack)
        try:
            with contextlib.closing(scene.station):
                scene.work()
                scene.check()
                scene.over = scene.is_over()
        finally:
            shutil.rmtree(top)
        return scene

    yield play
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in SCENES for target in TARGETS[name]])
def test_a_folder_that_is_exchanged_at_any_moment_neither_leaks_nor_takes_foreign_files(
    playing: Callable[[str, Attack], Scene], name: str, target: str
) -> None:
    undisturbed = playing(name, Attack(target, at=0, lasts=False))
    assert undisturbed.over
    moments = undisturbed.attack.moments
    assert moments > 10
    # One claim is attacked at every moment: at one of them the prompt seemed to have been removed.
    every = 1 if ALL or (name, target) == ("made", "the claim") else max(1, moments // MOMENTS)
    problems = []
    for lasts in (False, True):
        for at in range(1, moments + 1, every):
            try:
                scene = playing(name, Attack(target, at=at, lasts=lasts))
                assert scene.over, f"not over after the attack: {scene.attack}"
            except AssertionError as error:
                problems.append(str(error).partition("\n")[0])
            except OSError as error:  # the daemon would take it for a bug
                problems.append(f"{error!r}: {at}, {lasts}")
    assert problems == []
