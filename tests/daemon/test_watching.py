"""What goes wrong under a watcher: the daemon notices, logs it once, continues, and claims what was dropped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, stopped, until

from imagewatch.system.file_systems import Kinds, eventless, keeps_times, mount_of, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.sandbox import Sandbox

SELDOM = {"inbox__rescan_seconds": "3600"}
"""Nothing is found by regular scans: only by events, or because lost events were noticed."""

STARTED = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
{before}
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ{arguments}).run())
"""


@pytest.fixture
def scripted(run: Callable[..., LoggedDaemon], tmp_path: Path) -> Callable[..., LoggedDaemon]:
    """Start a daemon in whose process something is done before."""

    def starter(folders: Folders, before: str = "", arguments: str = "", **options: Any) -> LoggedDaemon:
        script = tmp_path / "started.py"
        script.write_text(STARTED.format(before=before, arguments=arguments))
        return run(folders, script=str(script), **options)

    return starter


def over(folders: Folders, *stems: str) -> None:
    until(lambda: set(folders.finished()) == set(stems), timeout=40)


def status(folders: Folders) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folders.state / "status.json").read_text())
    return {"mode": "", "polled": {"folders": {}}}


def asked(sandbox: Sandbox) -> list[str]:
    return sorted(call["prompt"] for call in sandbox.report()["calls"])


# Events that do not come


def test_after_an_overflow_of_the_kernels_queue_no_prompt_is_missed_and_none_sent_twice(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"the kernel holds {most} events")
    folders = Folders(tmp_path, sandbox.base_url, **SELDOM)
    daemon = run(folders)
    with stopped(daemon):
        for _ in range(most // 2 + 1):  # two in turns: the kernel holds the same event twice in a row only once
            for name in ("a.md", "b.md"):
                (folders.inbox / name).write_bytes(b"")
        for number in range(30):
            folders.prompt(f"{'sub/' * (number % 2)}p{number}", f"Number {number}")
    over(folders, *(f"p{number}" for number in range(30)))
    assert asked(sandbox) == sorted(f"Number {number}" for number in range(30))
    folders.prompt("later", "Later")
    until(lambda: "later" in folders.finished())
    assert daemon.stop() == 0


def test_a_watcher_that_dies_is_noticed_and_restarted(
    tmp_path: Path, sandbox: Sandbox, scripted: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, **SELDOM)
    daemon = scripted(
        folders,
        before="""
from imagewatch.inbox import events as watcher
handle = watcher._Folder.on_event
def on_event(self, event):
    if event.name == b"poison.md":
        raise RuntimeError("an event of an unknown kind")
    handle(self, event)
watcher._Folder.on_event = on_event
""",
    )
    (folders.inbox / "poison.md").write_text("x")
    died = daemon.wait_for("watcher_restarted")
    assert "an event of an unknown kind" in died["reason"]
    folders.prompt("cat", "A cat")
    over(folders, "cat")
    until(lambda: status(folders)["mode"] == "native")
    folders.prompt("dog", "A dog")
    over(folders, "cat", "dog")
    assert daemon.stop() == 0  # and all of its log is read
    assert [line["mode"] for line in daemon.events("watch_mode")] in ([], ["poll", "native"])


@pytest.mark.parametrize("most", [0, 3])
def test_folders_beyond_the_limit_of_watches_are_scanned_regularly(
    tmp_path: Path, sandbox: Sandbox, scripted: Callable[..., LoggedDaemon], most: int
) -> None:
    """A user namespace has limits of its own."""
    folders = Folders(tmp_path, sandbox.base_url, **SELDOM)
    for name in ("a", "b", "c"):
        (folders.inbox / name).mkdir()
    daemon = scripted(
        folders,
        watching=False,
        before=f"""
import ctypes
user, group = os.getuid(), os.getgid()
try:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"{{user}} {{user}} 1")
    open("/proc/self/gid_map", "w").write(f"{{group}} {{group}} 1")
    open("/proc/sys/user/max_inotify_watches", "w").write("{most}")
except (OSError, AssertionError):
    sys.exit(77)
""",
    )
    until(lambda: daemon.events("started") or daemon.process.poll() is not None)
    if daemon.process.poll() == 77:
        pytest.skip("no user namespace can be made here")
    for name in ("", "a/", "b/", "c/"):
        folders.prompt(f"{name}p{name.strip('/')}", "A prompt")
    over(folders, "p", "pa", "pb", "pc")
    daemon.wait_for("watch_mode")
    (event,) = daemon.events("watch_mode")
    assert (event["level"], event["mode"]) == ("warning", "mixed" if most else "poll")
    assert any("max_user_watches" in reason for reason in event["polled"].values())
    until(lambda: status(folders)["mode"] == event["mode"])


# Folders that come and go


@contextlib.contextmanager
def locking(lock: Path) -> Iterator[None]:
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@pytest.mark.parametrize("how", ["deleted and made again", "replaced by another folder"])
def test_an_inbox_that_was_replaced_is_watched_and_locked_like_the_first(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], how: str
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="1")
    daemon = run(folders)
    folders.prompt("one", "One")
    over(folders, "one")
    if how == "deleted and made again":
        folders.remove_inbox()
        daemon.wait_for("held")
        folders.inbox.mkdir()
    else:
        other = tmp_path / "other"
        (other / "sub").mkdir(parents=True)
        (other / "sub/three.prompt.txt").write_text("Three")
        folders.inbox.rename(tmp_path / "away")
        other.rename(folders.inbox)
    folders.prompt("two", "Two")
    over(folders, "one", "two", *(["three"] if "replaced" in how else []))
    with pytest.raises(BlockingIOError), locking(folders.inbox / ".imagewatch/lock"):
        pass
    second = Folders(tmp_path / "second", sandbox.base_url)
    second.environ["IMAGEWATCH_FOLDERS__INBOX"] = str(folders.inbox)
    assert run(second, watching=False).end() == 75
    assert daemon.stop() == 0
    with locking(folders.inbox / ".imagewatch/lock"):
        pass


def test_nothing_is_claimed_out_of_an_inbox_that_another_daemon_has_meanwhile(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    first = run(folders)
    other = Folders(tmp_path / "other", sandbox.base_url)
    second = run(other)
    with stopped(first):  # it must not scan while there is none
        folders.inbox.rename(tmp_path / "away")
        folders.inbox.symlink_to(other.inbox)
    other.prompt("cat", "A cat")
    over(other, "cat")
    assert "another" in first.wait_for("held")["reason"]
    assert folders.finished() == {}
    assert second.stop() == 0
    other.prompt("dog", "A dog")
    over(folders, "dog")
    first.wait_for("released")


UNPRIVILEGED_ID = 65534
UNPRIVILEGED = f"""
import encodings.idna, httpcore, imagewatch.endpoint.client  # the interpreter itself may be where only root may read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({UNPRIVILEGED_ID})
    os.setuid({UNPRIVILEGED_ID})
"""


@pytest.fixture
def shared(sandbox: Sandbox) -> Iterator[Folders]:
    """Folders of a daemon that is not root: permissions do not bind root."""
    with tempfile.TemporaryDirectory() as top:
        folders = Folders(Path(top), sandbox.base_url, inbox__rescan_seconds="0.5")
        folders.state.mkdir()
        (folders.inbox / "sub").mkdir()
        if os.geteuid() == 0:
            Path(top).chmod(0o755)
            for path in (folders.state, folders.root, *folders.root.rglob("*")):
                os.chown(path, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        yield folders


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_if_results_cannot_be_written_nothing_is_paid_for(
    shared: Folders, scripted: Callable[..., LoggedDaemon]
) -> None:
    (shared.outbox / "sub").mkdir()  # root's
    daemon = scripted(shared, UNPRIVILEGED)
    for stem in ("sub/one", "sub/two", "three"):
        shared.prompt(stem, "A prompt", 0o644)
    over(shared, "three")
    until(lambda: len(daemon.events("ignored")) == 2)
    for line in daemon.events("ignored"):
        assert f"may not write to {shared.outbox / 'sub'}" in line["reason"]
    (shared.outbox / "sub").chmod(0o777)
    over(shared, "one", "two", "three")
    assert daemon.stop() == 0


def test_an_inbox_out_of_which_nothing_can_be_claimed_any_more_holds_the_queue_once(
    shared: Folders, scripted: Callable[..., LoggedDaemon]
) -> None:
    daemon = scripted(shared, UNPRIVILEGED)
    shared.inbox.chmod(0o555)
    if os.geteuid() != 0:
        pytest.skip("only root may drop a prompt there")
    for number in range(5):
        shared.prompt(f"p{number}", "A prompt", 0o644)
    assert daemon.wait_for("held")["kind"] == "disk"
    until(lambda: (status(shared).get("holds") or [{}])[0].get("kind") == "disk")
    assert shared.finished() == {}
    shared.inbox.chmod(0o755)
    over(shared, *(f"p{number}" for number in range(5)))
    assert daemon.stop() == 0
    assert len(daemon.events("held")) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_prompt_that_the_sticky_bit_keeps_in_its_folder_is_named(
    shared: Folders, scripted: Callable[..., LoggedDaemon]
) -> None:
    sticky = shared.inbox / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    daemon = scripted(shared, UNPRIVILEGED)
    shared.prompt("sticky/theirs", "A prompt", 0o644)
    shared.prompt("mine", "A prompt", 0o644)
    over(shared, "mine")
    event = daemon.wait_for("ignored")
    assert (event["file"], "sticky bit" in event["reason"]) == ("sticky/theirs.prompt.txt", True)
    assert daemon.stop() == 0
    assert shared.leftovers() == []


def test_a_permission_that_is_lost_and_regained_is_logged_once_and_prompts_dropped_meanwhile_are_claimed(
    shared: Folders, scripted: Callable[..., LoggedDaemon]
) -> None:
    daemon = scripted(shared, UNPRIVILEGED)
    sub, root = shared.inbox / "sub", os.geteuid() == 0

    def drop(stem: str) -> None:
        shared.prompt(stem, "A prompt", 0o644)

    sub.chmod(0)
    drop("one")
    over(shared, "one")
    assert daemon.wait_for("ignored")["file"] == "sub"
    if root:
        drop("sub/two")
    sub.chmod(0o755)
    shared.inbox.chmod(0)
    assert "Permission denied" in daemon.wait_for("held")["reason"]
    if root:
        drop("three")
    shared.inbox.chmod(0o755)
    if not root:
        drop("sub/two")
        drop("three")
    over(shared, "one", "two", "three")
    assert (len(daemon.events("ignored")), len(daemon.events("held"))) == (1, 1)


def test_a_folder_that_is_moved_with_prompts_in_it_is_found_in_its_new_place(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="1", inbox__settle_seconds="0.5")
    sandbox.hold()
    folders.prompt("first", "First")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    for number in range(20):
        folders.prompt(f"a/b/p{number}", f"Number {number}")
    for number in range(5):
        folders.prompt(f"gone/q{number}", "Never")
    until(lambda: status(folders)["waiting"]["ready"] == 25)
    shutil.rmtree(folders.inbox / "gone")
    (folders.inbox / "a").rename(folders.inbox / "moved")
    sandbox.release()
    over(folders, "first", *(f"p{number}" for number in range(20)))
    assert daemon.stop() == 0
    assert sum(path.parent == folders.outbox / "moved/b" for path in folders.outbox.rglob("*.toml")) == 20
    assert asked(sandbox) == sorted(["First", *(f"Number {number}" for number in range(20))])


# Clocks


def test_a_wall_clock_that_jumps_delays_and_repeats_nothing(
    tmp_path: Path, sandbox: Sandbox, scripted: Callable[..., LoggedDaemon]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, inbox__settle_seconds="0.5")
    offset = tmp_path / "offset"
    offset.write_text("0")
    daemon = scripted(
        folders, f"import time\noffset = {str(offset)!r}", ", clock=lambda: time.time() + float(open(offset).read())"
    )
    done = []
    for number, jump in enumerate((0, 365 * 86_400, -365 * 86_400, 0)):
        (tmp_path / "next").write_text(str(jump))
        (tmp_path / "next").rename(offset)  # the daemon may read it at any moment
        for mtime in (0, 4_000_000_000):  # files of 1970 and of 2096
            path = folders.inbox / f"p{number}-{mtime}.prompt.txt"
            path.write_text(f"Number {number} of {mtime}")
            os.utime(path, (mtime, mtime))
            done.append(path.name.removesuffix(".prompt.txt"))
        over(folders, *done)
    assert daemon.stop() == 0
    assert len(asked(sandbox)) == len(set(asked(sandbox))) == 8


# File systems


TABLE = """\
22 1 0:20 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:41 / {top}/inbox rw - ext4 /dev/sdb1 rw
31 30 0:42 / {top}/inbox/nas rw,relatime shared:7 - nfs4 nas:/export rw
32 30 0:43 / {top}/inbox/shared\\040docs rw - cifs //nas/docs rw
33 30 0:44 / {top}/inbox/phone rw - fuse.sshfs me@phone:/ rw
34 30 0:45 / {top}/inbox/vault rw - fuse.gocryptfs /home/me/vault rw
35 30 0:46 / {top}/inbox/host rw - 9p host rw
36 31 0:47 / {top}/inbox/nas/fast rw - tmpfs tmpfs rw
"""


def test_each_folder_has_the_kind_of_the_mount_it_is_on(tmp_path: Path) -> None:
    (tmp_path / "table").write_text(TABLE.format(top=tmp_path))
    expected = {
        "inbox": ("ext4", False, True),
        "inbox/a": ("ext4", False, True),
        "inbox/nas": ("nfs4", True, True),
        "inbox/nas/deep": ("nfs4", True, True),
        "inbox/nasty": ("ext4", False, True),
        "inbox/shared docs": ("cifs", True, False),
        "inbox/phone": ("fuse.sshfs", True, False),
        "inbox/vault": ("fuse.gocryptfs", False, False),
        "inbox/host": ("9p", True, False),
        "inbox/nas/fast": ("tmpfs", False, True),
    }
    mounts = table(str(tmp_path / "table"))
    found = {name: mount_of(str(tmp_path / name), mounts) for name in expected}
    assert {name: (m.kind, eventless(m.kind), keeps_times(m.kind)) for name, m in found.items() if m} == expected


def test_a_mount_that_comes_later_is_noticed(tmp_path: Path) -> None:
    mounts = tmp_path / "table"
    mounts.write_text("22 1 0:20 / / rw - ext4 /dev/sda1 rw\n")
    kinds = Kinds(str(mounts))
    kinds.refresh()
    assert kinds.of(str(tmp_path)) == "ext4"
    mounts.write_text(f"22 1 0:20 / / rw - ext4 /dev/sda1 rw\n23 22 0:21 / {tmp_path} rw - nfs nas:/x rw\n")
    kinds.refresh()
    assert (kinds.of(str(tmp_path)), kinds.of(str(tmp_path / "gone"))) == ("nfs", "")


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Mount a folder elsewhere by FUSE: the kernel reports no change that is made behind it."""
    places: list[Path] = []

    def binder(place: Path) -> Path:
        if not shutil.which("bindfs"):
            pytest.skip("bindfs is not installed")
        behind = tmp_path / f"behind{len(places)}"
        behind.mkdir()
        place.mkdir(exist_ok=True)
        done = subprocess.run(["bindfs", str(behind), str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("FUSE cannot be used here")
        places.append(place)
        return behind

    yield binder
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


def test_another_file_system_inside_the_inbox_is_named_and_delays_no_other_folder(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], bound: Callable[[Path], Path]
) -> None:
    """A prompt is claimed by a rename, which is not possible from one file system to another."""
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    behind = bound(folders.inbox / "far")
    (behind / "far.prompt.txt").write_text("Far")
    daemon = run(folders)
    folders.prompt("near", "Near")
    over(folders, "near")
    ignored = daemon.wait_for("ignored")
    assert (ignored["file"], "an inbox of its own" in ignored["reason"]) == ("far", True)
    until(lambda: "far" in status(folders)["ignored"]["files"])  # it is written after the log
    unmount = ["umount", str(folders.inbox / "far")]
    until(lambda: subprocess.run(unmount, capture_output=True, check=False).returncode == 0)  # a scan may have it open
    folders.prompt("far/now", "Now")
    over(folders, "near", "now")
    assert (behind / "far.prompt.txt").exists()
    assert len(daemon.events("ignored")) == 1


def test_an_inbox_whose_changes_the_kernel_does_not_report_is_polled(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], bound: Callable[[Path], Path]
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, **SELDOM)
    behind = bound(folders.inbox)
    daemon = run(folders)
    assert daemon.events("started")[0]["mode"] == "poll"
    with (behind / "cat.prompt.txt").open("w") as file:
        file.write("A cat ")
        file.flush()
        (behind / "dog.prompt.txt").write_text("A dog")
        file.write("on a mat")
    over(folders, "cat", "dog")
    assert asked(sandbox) == ["A cat on a mat", "A dog"]


def test_native_and_poll_can_be_demanded(
    tmp_path: Path, sandbox: Sandbox, run: Callable[..., LoggedDaemon], bound: Callable[[Path], Path]
) -> None:
    native = Folders(tmp_path / "native", sandbox.base_url, inbox__watch="native", **SELDOM)
    bound(native.inbox)
    assert run(native).events("started")[0]["mode"] == "native"
    poll = Folders(tmp_path / "poll", sandbox.base_url, inbox__watch="poll")
    assert run(poll).events("started")[0]["mode"] == "poll"
