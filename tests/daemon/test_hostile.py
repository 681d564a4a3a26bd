"""A folder that all users can write to: one clear line or error file for each attempt, and no other user is harmed.

Hostile names are in ``test_cli.py``, hostile responses in ``test_responses.py``, and refusals of a single request
are in ``test_requests.py``. Here a whole daemon gets everything at the same time, or files that change while it works.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import stat
import struct
import subprocess
import sys
import tomllib
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from support.daemon import KEY, Folders, LoggedDaemon, until
from support.station import Station

from imagewatch.job.outcome import End
from imagewatch.protocol.prompt import parse
from imagewatch.system.disk import Disk
from imagewatch.system.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox import Sandbox

_png = io.BytesIO()
Image.new("RGB", (16, 16), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
MB = 1_000_000


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claims_to_be(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims a large image."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def sparse(path: Path, beginning: bytes = b"") -> None:
    """Create a file of a terabyte that takes no space."""
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(1 << 40)


def memory(daemon: LoggedDaemon, name: str) -> float:
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 / MB for line in text.splitlines() if line.startswith(name + ":"))


def test_whatever_is_in_the_inbox_good_prompts_are_completed_and_each_bad_one_is_reported_once(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2", inbox__input_wait_seconds="0.1")
    inbox = folders.inbox
    secret = tmp_path / "secret"
    secret.write_bytes(IMAGE)
    folders.prompt("good", "A good one")
    daemon = run(folders)
    until(lambda: "good" in folders.finished())
    before = memory(daemon, "VmRSS")

    ignored = {"link.prompt.txt", "pipe.prompt.txt", "bound.prompt.txt", "elsewhere", "far.png"}
    (inbox / "link.prompt.txt").symlink_to(secret)
    (inbox / "elsewhere").symlink_to(tmp_path)
    (inbox / "far.png").symlink_to(secret)
    os.mkfifo(inbox / "pipe.prompt.txt")
    monkeypatch.chdir(inbox)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("bound.prompt.txt")
    if os.geteuid() == 0:
        os.mknod(inbox / "device.prompt.txt", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        ignored.add("device.prompt.txt")

    refused = {
        "huge": "larger than 256 KiB",
        "nul": "NUL",
        "bomb": "pixels",
        "hole": "max_input_bytes",
        "wide": "is a link",
        "outside": "not the name of a file in the prompt's own folder",
        "deep": "too many dots and brackets",
    }
    sparse(inbox / "huge.prompt.txt")
    folders.prompt("nul", b"A cat\0" * 100)
    folders.drop("bomb.png", claims_to_be(100_000, 100_000))
    folders.prompt("bomb", "Make it night")
    sparse(inbox / "hole.jpg", b"\xff\xd8\xff\xe0")
    folders.prompt("hole", "Make it night")
    (inbox / "wide.1.png").symlink_to(secret)
    folders.prompt("wide", "Make it night")
    folders.prompt("outside", f'+++\ninput_images = ["../../etc/passwd.png", "{secret}.png", ".."]\n+++\nMake it night')
    folders.prompt("deep", "+++\n" + ".".join(["a"] * 8000) + " = 1\n+++\nA cat")
    for number in range(20):
        folders.prompt(f"more{number}", f"Number {number}")

    until(lambda: len(folders.finished()) == 21 + len(refused), timeout=60)
    assert {stem for stem, destination in folders.finished().items() if destination == "errors"} == set(refused)
    for stem, words in refused.items():
        assert words in folders.error(stem)["message"], stem
        assert folders.error(stem)["charged"] == "no"
    until(lambda: {line["file"] for line in daemon.events("ignored")} >= ignored)
    peak = memory(daemon, "VmHWM")
    assert daemon.stop() == 0
    named = [line["file"] for line in daemon.events("ignored")]
    assert sorted(named) == sorted({*ignored, "wide.1.png"})
    assert sandbox.report()["requests"] == 21
    assert peak - before < 30
    assert secret.read_bytes() == IMAGE
    assert KEY not in str(daemon.lines)


def test_an_image_with_an_impossible_name_is_invalid_and_delays_no_other_prompt(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2", inbox__input_wait_seconds="0.1")
    daemon = run(folders)
    folders.prompt("long", f'+++\ninput_images = ["{"x" * 252}.png"]\n+++\nMake it night')
    until(lambda: "long" in folders.finished())
    folders.prompt("good", "A good one")
    until(lambda: "good" in folders.finished())
    assert daemon.stop() == 0
    assert daemon.events("held") == []
    assert folders.finished() == {"long": "errors", "good": "outbox"}
    error = folders.error("long")
    assert (error["charged"], "longer than 255 bytes" in error["message"]) == ("no", True)
    assert [call["prompt"] for call in sandbox.report()["calls"]] == ["A good one"]


def test_five_thousand_files_of_junk_are_counted_some_are_named_and_good_prompts_are_completed(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    for number in range(5000):
        (folders.inbox / f"junk{number}.{('txt', 'png', 'prompt.txt.bak', 'tmp')[number % 4]}").touch()
    folders.prompt("cat", "A cat")
    daemon = run(folders)
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.stop() == 0
    ignored = daemon.events("ignored")
    assert len([line for line in ignored if "file" in line]) == 1000
    assert [line["count"] for line in ignored if "file" not in line] == [2500]
    assert len(folders.names("inbox")) == 5000


FLOOD = """
import os, sys
os.chdir(sys.argv[1])
with open("a.prompt.txt", "w") as file:
    file.write("never quiet")
while True:
    os.rename("a.prompt.txt", "b.prompt.txt")
    os.rename("b.prompt.txt", "a.prompt.txt")
"""


def test_a_flood_of_events_delays_no_other_prompt(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    daemon = run(folders)
    with subprocess.Popen([sys.executable, "-c", FLOOD, folders.inbox]) as flood:
        try:
            until(lambda: any(name.startswith(("a.", "b.")) for name in folders.names("inbox")))
            for stem in ("cat", "dog", "elk"):
                folders.prompt(stem, f"A {stem}")
                until(functools.partial(is_over, folders, stem), timeout=40)
        finally:
            flood.kill()
    assert daemon.stop() == 0
    asked = Counter(call["prompt"] for call in sandbox.report()["calls"])
    assert asked - Counter(["never quiet"]) == Counter(["A cat", "A dog", "A elk"])


def is_over(folders: Folders, stem: str) -> bool:
    return stem in folders.finished()


# Under our hands

LINKED = "os.link({secret!r}, {victim!r})"
CHANGED = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.inbox.scan import InboxScan

original = InboxScan.unchanged
def unchanged(self, candidate):
    was = original(self, candidate)
    if was and not os.path.lexists({secret!r} + ".done"):
        os.close(os.open({secret!r} + ".done", os.O_CREAT))
        os.unlink({victim!r})
        {how}
    return was
InboxScan.unchanged = unchanged
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ).run())
"""
"""A daemon beside which another process changes a file between the last scan and the claim."""


@pytest.mark.parametrize("victim", ["cat.prompt.txt", "cat.png"])
@pytest.mark.parametrize(
    "how", ["os.symlink({secret!r}, {victim!r})", "os.mkfifo({victim!r})", "os.link({secret!r}, {victim!r})"]
)
def test_a_file_that_is_replaced_between_the_scan_and_the_claim_is_never_sent(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], victim: str, how: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    secret = tmp_path / "secret"
    secret.write_bytes(IMAGE if victim.endswith("png") else b"The password is 12345")
    secret.chmod(0o600)
    names = {"secret": str(secret), "victim": str(folders.inbox / victim)}
    script = tmp_path / "changed.py"
    script.write_text(CHANGED.format(**names, how=how.format(**names)))
    folders.drop("cat.png", IMAGE)
    folders.prompt("cat", "Make it night")
    daemon = run(folders, script=str(script))
    ignored = lambda: "cat.prompt.txt" in {one["file"] for one in daemon.events("ignored")}  # noqa: E731
    until(lambda: ignored() or "cat" in folders.finished())
    folders.prompt("dog", "A dog")
    until(lambda: "dog" in folders.finished())
    assert daemon.stop() == 0
    ends = folders.finished()
    assert ends.pop("dog") == "outbox"
    if ends:  # it was claimed with what was there then
        assert (ends, folders.error("cat")["charged"]) == ({"cat": "errors"}, "no")
    else:
        assert os.path.lexists(folders.inbox / "cat.prompt.txt")
    assert [call["prompt"] for call in sandbox.report()["calls"]] == ["A dog"]
    assert "12345" not in "".join(path.read_text() for path in folders.errors.glob("*.toml"))


class InTheWay(Disk):
    """A disk on which something is put in the place of a result file after its name was decided."""

    def __init__(self, plant: Callable[[], None]) -> None:
        self._plant = plant

    def carry(self, *args: Any, **more: Any) -> None:
        self._put()
        super().carry(*args, **more)

    def publish(self, *args: Any, **more: Any) -> None:
        self._put()
        super().publish(*args, **more)

    def _put(self) -> None:
        self._plant()
        self._plant = lambda: None


@pytest.mark.timeout(20)  # a process that opens it waits for a writer
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("destination", "name"), [("outbox", "cat.receipt.toml"), ("errors", "cat.error.toml")])
def test_a_pipe_in_the_place_of_a_result_file_delays_nothing_and_the_file_goes_beside_it(
    tmp_path: Path, sandbox: Sandbox, destination: str, name: str, linked: bool
) -> None:
    pipe, place = tmp_path / "pipe", tmp_path / "watched" / destination / name
    os.mkfifo(pipe)
    plant = functools.partial(os.symlink, pipe, place) if linked else functools.partial(os.mkfifo, place)
    with contextlib.closing(Station(tmp_path, sandbox.base_url, disk=InTheWay(plant))) as station:
        station.prompt("cat", "A cat" if destination == "outbox" else "[sandbox: 400] A cat")
        (outcome,) = station.work()
        assert (outcome.end, outcome.destination) == (End.OVER, destination)
        assert station.leftovers() == []
    result_files = [path for path in place.parent.glob("*.toml") if path.name != name]
    assert [tomllib.loads(path.read_text())["job"] for path in result_files] == [outcome.job]
    assert place.is_symlink() if linked else place.is_fifo()
    assert sandbox.report()["requests"] == 1


def test_a_folder_that_was_replaced_by_a_link_is_not_followed(
    station: Station, tmp_path: Path, sandbox: Sandbox
) -> None:
    station.prompt("sub/inner/cat", "A cat")
    (candidate,) = station.scan.scan_all(0, 0).ready
    (station.inbox / "sub").rename(tmp_path / "away")
    (station.inbox / "sub").symlink_to(tmp_path / "away")
    assert not station.scan.unchanged(candidate)
    assert station.work() == []
    assert (tmp_path / "away/inner/cat.prompt.txt").exists()
    assert sandbox.report()["requests"] == 0


def test_a_hard_link_to_a_file_that_only_the_daemon_may_read_stays_and_is_named(
    station: Station, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    (station.inbox / "cat.prompt.txt").hardlink_to(key)
    station.prompt("dog", "Make it night")
    (tmp_path / "private").write_bytes(IMAGE)
    (tmp_path / "private").chmod(0o600)
    (station.inbox / "dog.png").hardlink_to(tmp_path / "private")
    seen = station.scan.scan_all(0, 0)
    assert seen.ready == []
    assert set(seen.ignored) == {"cat.prompt.txt", "dog.prompt.txt"}
    assert all("hard link" in reason for reason in seen.ignored.values())


@pytest.mark.parametrize(
    "front",
    [
        ".".join(["a"] * 8000) + " = 1",
        ".".join(['"a"'] * 4000) + " = 1",
        "[" + ".".join(["a"] * 8000) + "]",
        "x = " + "[" * 8000,
        "x = {" + ".".join(["a"] * 8000) + " = 1}",
        "\n".join("[[a]]\nb.c.d = 1" for _ in range(900)),
    ],
)
def test_front_matter_that_would_take_the_reader_seconds_is_refused_unread(front: str) -> None:
    with pytest.raises(BadRequest, match="too many dots and brackets"):
        parse(f"+++\n{front}\n+++\nA cat".encode())


def test_front_matter_with_dots_inside_of_strings_is_read() -> None:
    names = ", ".join(f'"v1.2.3.4.5.6.7.8.9-{number}.png"' for number in range(14))
    assert len(parse(f"+++\ninput_images = [{names}]\n+++\nA cat".encode()).front.input_images or ()) == 14
