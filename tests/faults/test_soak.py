"""Mixed senders and a daemon that is killed repeatedly: nothing is lost and nothing is paid twice.

``IMAGEWATCH_SOAK=10000 python -m pytest -n 0 -s --timeout 0 tests/faults/test_soak.py`` is the long run, with
ten thousand prompts. ``IMAGEWATCH_SOAK_SEED`` chooses another sequence of events.
"""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from PIL import Image
from support.daemon import PATIENCE, Folders, LoggedDaemon, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

PROMPTS = int(os.environ.get("IMAGEWATCH_SOAK", "300"))
SEED = int(os.environ.get("IMAGEWATCH_SOAK_SEED", "1"))
SENDERS, CONCURRENCY = 4, 4
_png = io.BytesIO()
Image.new("RGB", (16, 16), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
pause = threading.Event().wait


class Sender(threading.Thread):
    """Drops its share of the prompts, each in a different way; the second half after the daemon was killed often."""

    def __init__(self, inbox: Path, outside: Path, numbers: range, seed: int, disturbed: threading.Event) -> None:
        super().__init__(daemon=True)
        self._disturbed = disturbed
        self._inbox = inbox
        self._outside = outside
        self._numbers = numbers
        self._random = Random(seed)

    def run(self) -> None:
        ways = (self.copy, self.rename, self.like_rsync, self.slowly, self.with_image, self.in_a_folder, self.linked)
        for number in self._numbers:
            if number >= PROMPTS / 2:
                self._disturbed.wait(PATIENCE)
            folder = self._inbox / self._random.choice(("", "", "a", "a/b", f"c{number % 5}"))
            folder.mkdir(parents=True, exist_ok=True)
            self._random.choice(ways)(folder, f"s{number:05}")
            pause(self._random.random() * 0.05)

    def copy(self, folder: Path, stem: str) -> None:
        (folder / f"{stem}.prompt.txt").write_text(stem)

    def rename(self, folder: Path, stem: str, text: str | None = None) -> None:
        outside = self._outside / stem
        outside.write_text(text or stem)
        outside.rename(folder / f"{stem}.prompt.txt")

    def like_rsync(self, folder: Path, stem: str) -> None:
        temporary = folder / f".{stem}.prompt.txt.{self._random.randrange(10**5, 10**6)}"
        temporary.write_text(stem)
        os.utime(temporary, (1, 1))
        temporary.rename(folder / f"{stem}.prompt.txt")

    def slowly(self, folder: Path, stem: str) -> None:
        with (folder / f"{stem}.prompt.txt").open("w") as file:
            for letter in stem:
                file.write(letter)
                file.flush()
                pause(self._random.random() * 0.1)

    def with_image(self, folder: Path, stem: str) -> None:
        (folder / f"{stem}.png").write_bytes(IMAGE)
        if self._random.random() < 0.5:
            self.copy(folder, stem)
        else:
            self.rename(folder, stem, f'+++\ninput_images = ["{stem}.png"]\n+++\n{stem}')

    def in_a_folder(self, folder: Path, stem: str) -> None:
        outside = self._outside / f"{stem}.d"
        (outside / "inner").mkdir(parents=True)
        (outside / "inner" / f"{stem}.prompt.txt").write_text(stem)
        outside.rename(folder / f"{stem}.d")

    def linked(self, folder: Path, stem: str) -> None:
        outside = self._outside / stem
        outside.write_text(stem)
        (folder / f"{stem}.prompt.txt").hardlink_to(outside)
        outside.unlink()


def test_nothing_is_lost_or_paid_twice_with_any_sender_and_kills_at_any_time(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__settle_seconds="0.5", limits__concurrency=str(CONCURRENCY))
    outside = tmp_path / "outside"
    outside.mkdir()
    random, disturbed = Random(SEED), threading.Event()
    senders = [
        Sender(folders.inbox, outside, range(first, PROMPTS, SENDERS), random.random(), disturbed)
        for first in range(SENDERS)
    ]
    for sender in senders:
        sender.start()
    kills, limit = 0, 120 + PROMPTS / 4
    # Not more kills than that: a busy machine may need longer for a start than the daemon has here.
    while len(folders.finished()) < PROMPTS * 0.9 and kills < PROMPTS / 8:
        daemon = run(folders, watching=False)
        pause(0.4 + random.random() * 2)  # before, while and after it begins to watch
        daemon.process.kill()
        daemon.end()
        kills += 1
        if kills > 2:
            disturbed.set()
    daemon = run(folders)
    for sender in senders:
        sender.join()
    until(lambda: len(folders.finished()) >= PROMPTS, timeout=limit)
    until(lambda: folders.leftovers() == [], timeout=limit)
    assert daemon.stop() == 0

    stems = {f"s{number:05}" for number in range(PROMPTS)}
    finished = folders.finished()
    asked = Counter(call["prompt"] for call in sandbox.report()["calls"])
    unknown = {stem for stem, destination in finished.items() if destination == "errors"}
    print(f"{PROMPTS} prompts, {kills} kills, {len(unknown)} in flight at a kill")  # noqa: T201
    assert finished.keys() == stems, "each is over, under its own name"
    assert set(asked) <= stems, "none was sent in part"
    assert max(asked.values()) == 1, "none was sent twice"
    charged = {charge(folders, stem) for stem in unknown}
    assert charged <= {"unknown", "yes"}, "yes: the beginning of its answer had come when the daemon died"
    assert len(unknown) <= kills * CONCURRENCY
    assert kills > 2
    assert [name for name in folders.names("inbox") if not name.startswith(".")] == []


def charge(folders: Folders, stem: str) -> str:
    (path,) = folders.errors.rglob(f"{stem}.error.toml")
    return folders.error(path.relative_to(folders.errors).as_posix().removesuffix(".error.toml"))["charged"]
