"""Paid for, and not deliverable: what was paid for survives, and is delivered automatically when the cause has ended.

Real file systems of our own, tiny or unmounted; only root can mount them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

SLACK = 200_000
"""Bytes that a folder needs for anything but an image."""


def mounted(place: Path, options: str = "size=1m") -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")


def unmounted(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # the daemon has it open


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mount a tiny file system; at the end all are unmounted."""
    places: list[Path] = []

    def mounter(place: Path, options: str = "size=1m") -> None:
        mounted(place, options)
        places.append(place)

    yield mounter
    for place in places:
        while os.path.ismount(place):
            unmounted(place)


@pytest.fixture
def tight(tmp_path: Path, sandbox: Sandbox) -> Folders:
    """Folders whose daemon asks for no more free space than it needs, so that the disk becomes full while it works."""
    return Folders(tmp_path, sandbox.base_url, limits__min_free_bytes="0", log__format="json")


def fill(place: Path, leave: int = 0) -> Path:
    """Fill a file system but for some bytes."""
    filler = place / ".filler"
    status = os.statvfs(place)
    with filler.open("wb", buffering=0) as file:
        try:
            file.write(bytes(max(status.f_bavail * status.f_frsize - leave, 0)))
        except OSError:
            return filler
    return filler


def held(folders: Folders) -> list[dict[str, Any]]:
    """The holds in the status file."""
    try:
        return json.loads((folders.state / "status.json").read_text())["holds"]
    except (OSError, ValueError):
        return []


def held_by_disk(folders: Folders) -> str:
    return " ".join(hold["reason"] for hold in held(folders) if hold["kind"] == "disk")


def delivered(folders: Folders, sandbox: Sandbox, stem: str = "cat") -> None:
    """The image that was served, once, and a receipt; nothing is left over and no other request was sent."""
    until(lambda: folders.finished().get(stem) == "outbox", timeout=40)
    until(lambda: folders.leftovers() == [])
    (image,) = folders.receipt(stem)["images"]
    served = [call["images"] for call in sandbox.report()["calls"] if call["prompt"].startswith(f"a {stem}")]
    assert served == [[image["sha256"]]]
    assert (folders.outbox / image["file"]).stat().st_size == image["bytes"]


@pytest.mark.parametrize("destination", ["outbox", "state"])
def test_after_a_full_disk_the_image_is_delivered_without_another_request(
    tight: Folders, sandbox: Sandbox, mount: Any, run: Callable[..., LoggedDaemon], destination: str
) -> None:
    place = tight.outbox if destination == "outbox" else tight.state
    place.mkdir(exist_ok=True)
    mount(place, "size=8m")
    # As much is reserved for a response, and then there is room for this one whatever happens.
    tight.environ["IMAGEWATCH_LIMITS__MIN_FREE_BYTES"] = "3000000" if destination == "outbox" else "1000000"
    sandbox.hold()
    tight.prompt("cat", "a cat [sandbox: big 2]")
    daemon = run(tight)
    assert sandbox.wait_for_requests(1, timeout=20)
    filler = fill(place, SLACK)
    sandbox.release()
    assert f"/{place.name}" in daemon.wait_for("held")["reason"]
    tight.prompt("later", "a later one")
    if destination == "outbox":  # with the state folder full there is no status file
        until(lambda: "outbox" in held_by_disk(tight))
    assert not sandbox.wait_for_requests(2, timeout=2)
    assert tight.finished() == {}
    assert sandbox.report()["requests"] == 1
    filler.unlink()
    delivered(tight, sandbox)
    delivered(tight, sandbox, "later")
    assert daemon.stop() == 0
    assert [line["kind"] for line in daemon.events("held")] == ["disk"]


@pytest.mark.parametrize("destination", ["outbox", "errors", "archive"])
def test_a_folder_that_is_read_only_for_a_while_delays_and_loses_nothing(
    tight: Folders, sandbox: Sandbox, mount: Any, start: Any, destination: str
) -> None:
    place = tight.root / destination
    mount(place)
    sandbox.hold()
    tight.prompt("cat", "a cat [sandbox: 400]" if destination == "errors" else "a cat")
    start(tight, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    sandbox.release()
    until(lambda: destination in held_by_disk(tight))
    assert "Read-only" in held_by_disk(tight)
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    if destination == "errors":
        until(lambda: tight.finished() == {"cat": "errors"}, timeout=40)
    else:
        delivered(tight, sandbox)
    until(lambda: tight.leftovers() == [])
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("destination", ["outbox", "errors", "archive"])
def test_nothing_is_written_under_a_file_system_that_was_unmounted(
    tight: Folders, sandbox: Sandbox, mount: Any, start: Any, destination: str
) -> None:
    """The empty folder below the mount point would swallow what was paid for as soon as it is mounted again."""
    place = tight.root / destination
    mount(place)
    sandbox.hold()
    tight.prompt("cat", "a cat [sandbox: 400]" if destination == "errors" else "a cat")
    start(tight, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    unmounted(place)
    sandbox.release()
    until(lambda: "not mounted any more" in held_by_disk(tight))
    tight.prompt("later", "a later one")
    assert not sandbox.wait_for_requests(2, timeout=2)
    assert list(place.iterdir()) == []
    mounted(place)
    if destination == "errors":
        until(lambda: tight.finished().get("cat") == "errors", timeout=40)
    else:
        delivered(tight, sandbox)
    delivered(tight, sandbox, "later")


def test_an_empty_mount_point_is_not_an_empty_inbox(tight: Folders, sandbox: Sandbox, mount: Any, start: Any) -> None:
    mount(tight.inbox)
    tight.environ["IMAGEWATCH_INBOX__RESCAN_SECONDS"] = "5"
    daemon = start(tight, "run")
    until((tight.state / "status.json").exists)
    subprocess.run(["umount", "--lazy", str(tight.inbox)], check=True)
    (tight.inbox / "wrong.prompt.txt").write_text("dropped below the mount point")
    until(lambda: "not mounted any more" in held_by_disk(tight), timeout=40)
    assert sandbox.report()["requests"] == 0
    mounted(tight.inbox)
    tight.prompt("cat", "a cat")
    delivered(tight, sandbox)
    assert daemon.stop() == 0  # its lock is on the new file system
    unmounted(tight.inbox)
    assert (tight.inbox / "wrong.prompt.txt").exists()


def test_an_outbox_that_was_removed_is_not_created_again(tight: Folders, sandbox: Sandbox, start: Any) -> None:
    sandbox.hold()
    tight.prompt("cat", "a cat")
    start(tight, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    tight.outbox.rmdir()
    sandbox.release()
    until(lambda: "No such file" in held_by_disk(tight))
    tight.outbox.mkdir()
    delivered(tight, sandbox)


def test_a_full_disk_below_the_ledger_holds_the_queue_before_anything_is_sent(
    tight: Folders, sandbox: Sandbox, mount: Any, run: Callable[..., LoggedDaemon]
) -> None:
    tight.state.mkdir(exist_ok=True)
    mount(tight.state, "size=4m")
    tight.environ["IMAGEWATCH_LIMITS__MIN_FREE_BYTES"] = "0"
    daemon = run(tight)
    tight.prompt("first", "a first one")
    delivered(tight, sandbox, "first")
    filler = fill(tight.state, 0)
    tight.prompt("cat", "a cat")
    assert "the ledger cannot be written: database or disk is full" in daemon.wait_for("held")["reason"]
    assert daemon.events("held")[0]["next"].startswith("free some space")
    assert sandbox.report()["requests"] == 1
    filler.unlink()
    delivered(tight, sandbox)
    assert sandbox.report()["requests"] == 2
    assert daemon.stop() == 0


@pytest.mark.parametrize("destination", ["outbox", "archive"])
def test_a_permission_that_is_lost_and_regained_delays_and_loses_nothing(
    open_path: Path, sandbox: Sandbox, destination: str
) -> None:
    folders = Folders(open_path, sandbox.base_url, limits__min_free_bytes="0", log__format="json")
    place = folders.root / destination
    sandbox.hold()
    folders.prompt("cat", "a cat")
    with unprivileged(open_path, folders) as process:
        assert sandbox.wait_for_requests(1, timeout=20)
        place.chmod(0o555)
        sandbox.release()
        until(lambda: "Permission denied" in held_by_disk(folders))
        assert "let the daemon's user write there" in (folders.state / "status.json").read_text()
        assert folders.finished() == ({} if destination == "outbox" else {"cat": "outbox"})
        place.chmod(0o755)
        delivered(folders, sandbox)
        assert process.poll() is None


class unprivileged:  # noqa: N801  reads as a function
    """A daemon that is not root: root may write everywhere."""

    def __init__(self, path: Path, folders: Folders) -> None:
        self._environ = {"PATH": os.environ["PATH"], "HOME": str(path), **folders.environ}
        self._command = [sys.executable, "-m", "imagewatch", "run"]
        if os.geteuid() == 0:
            self._command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *self._command]
            for place in (path, *path.rglob("*")):
                os.chown(place, 12345, 12345)

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(self._command, env=self._environ, stderr=subprocess.DEVNULL)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def test_a_response_saved_before_the_disk_failed_survives_a_kill_too(
    tight: Folders, sandbox: Sandbox, mount: Any, start: Any
) -> None:
    mount(tight.outbox, "size=4m")
    sandbox.hold()
    tight.prompt("cat", "a cat [sandbox: big 2]")
    daemon = start(tight, "run")
    assert sandbox.wait_for_requests(1, timeout=20)
    filler = fill(tight.outbox, SLACK)
    sandbox.release()
    until(lambda: "outbox" in held_by_disk(tight))
    daemon.process.kill()
    daemon.wait()
    again = start(tight, "once")
    assert again.wait() == 74, again.output
    assert "outbox" in again.output
    filler.unlink()
    assert start(tight, "once").wait() == 0
    delivered(tight, sandbox)
