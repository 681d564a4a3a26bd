"""Synchronization tools put files into the inbox: rsync, rclone, Syncthing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from support.daemon import until
from support.senders import DECLARES, PATIENCE, SLOW, Parcel, Service, program, run, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOWLY = "--bwlimit=600"
"""In kB a second; a parcel has about 350."""
TO_BE_INTERRUPTED = "--bwlimit=100"
"""The last image of a large parcel takes a quarter of a minute."""


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("native")) as service:
        yield service


@pytest.fixture
def parcel(native, tmp_path) -> Parcel:
    return native.parcel(tmp_path)


@pytest.fixture
def large(native, tmp_path) -> Parcel:
    """A parcel whose last image takes some time."""
    return native.parcel(tmp_path, side=700)


@pytest.fixture
def rsync() -> str:
    return program("rsync")


def interrupted(command: list[str | Path], parcel: Parcel, folder: Path) -> None:
    """Run a transfer and stop it in the middle of the image that comes after the prompt."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as transfer:
        until(lambda: any(path.stat().st_size for path in folder.glob(".cat.webp.*")))
        transfer.send_signal(signal.SIGINT)
    assert transfer.returncode != 0
    assert (parcel.target / "cat.prompt.txt").exists()


def test_rsync(parcel, rsync):
    parcel.send(lambda: run([rsync, "-a", SLOWLY, f"{parcel.source}/", parcel.target]))
    parcel.is_completed()


def test_rsync_without_change_events(tmp_path, rsync):
    with serving(tmp_path / "polled", inbox__watch="poll", inbox__rescan_seconds="0.5") as polled:
        parcel = polled.parcel(tmp_path)
        parcel.send(lambda: run([rsync, "-a", SLOWLY, f"{parcel.source}/", parcel.target]))
        parcel.is_completed()


def test_rsync_in_place(parcel, rsync):
    parcel.send(lambda: run([rsync, "-a", "--inplace", SLOWLY, f"{parcel.source}/", parcel.target]))
    parcel.is_completed()


def test_rsync_that_delays_updates(parcel, rsync):
    parcel.send(lambda: run([rsync, "-a", "--delay-updates", SLOWLY, f"{parcel.source}/", parcel.target]))
    parcel.is_completed()


@SLOW
def test_rsync_that_keeps_partial_files_and_resumes_immediately(large, rsync):
    def interrupt(parcel: Parcel) -> None:
        command = [rsync, "-a", "--partial", TO_BE_INTERRUPTED, f"{parcel.source}/", parcel.target]
        interrupted(command, parcel, parcel.target)
        assert (parcel.target / "cat.webp").stat().st_size < len(parcel.files["cat.webp"])

    large.prepare(interrupt).send(lambda: run([rsync, "-a", "--partial", f"{large.source}/", large.target]))
    large.is_completed()


@SLOW
def test_rsync_that_leaves_a_partial_file_is_refused_unpaid_and_completed_when_it_runs_again(native, large, rsync):
    command = [rsync, "-a", "--partial", TO_BE_INTERRUPTED, f"{large.source}/", large.target]
    interrupted(command, large, large.target)
    refused = native.folders.errors / large.name
    until((refused / "cat.error.toml").exists)
    assert "cat.webp: it is not a whole image" in (refused / "cat.error.toml").read_text()
    assert large.calls == []
    (refused / "cat.error.toml").unlink()
    run([rsync, "-a", "--partial", f"{large.source}/", large.target])
    large.is_completed()


def test_rsync_that_is_interrupted_before_the_images_a_prompt_names(native, tmp_path, rsync):
    parcel = native.parcel(tmp_path, head=DECLARES, side=700)
    command = [rsync, "-a", TO_BE_INTERRUPTED, f"{parcel.source}/", parcel.target]
    interrupted(command, parcel, parcel.target)
    parcel.is_not_claimed()
    run([rsync, "-a", f"{parcel.source}/", parcel.target])
    parcel.is_completed()


def test_rsync_that_deletes_unknown_files_removes_nothing_that_is_paid_for(native, parcel, rsync):
    """``--delete`` also empties the folder of claimed originals; the source still has them."""
    native.sandbox.hold()
    try:
        parcel.send(lambda: run([rsync, "-a", f"{parcel.source}/", parcel.target]))
        until(lambda: parcel.calls)
        source = parcel.source.parent / "nothing but folders"
        for folder in native.folders.inbox.glob("[0-9]*"):
            (source / folder.name).mkdir(parents=True)
        run([rsync, "-a", "--delete", f"{source}/", native.folders.inbox])
        assert not any((native.folders.inbox / ".imagewatch").glob("*/*"))
    finally:
        native.sandbox.release()
    until(lambda: parcel.over)
    assert (native.folders.outbox / parcel.name / "cat.receipt.toml").exists()
    assert len(parcel.calls) == 1


def test_rclone(parcel):
    rclone = program("rclone")
    config = parcel.source.parent / "rclone.conf"
    config.touch()
    parcel.send(lambda: run([rclone, "--config", config, "copy", "--bwlimit", "600k", parcel.source, parcel.target]))
    parcel.is_completed()


# Syncthing

WITHOUT_NETWORK = {
    "globalAnnounceEnabled": "false",
    "localAnnounceEnabled": "false",
    "relaysEnabled": "false",
    "natEnabled": "false",
    "crashReportingEnabled": "false",
    "stunKeepaliveStartS": "0",
    "autoUpgradeIntervalH": "0",
    "urAccepted": "-1",
    "startBrowser": "false",
}
"""Settings that turn off connections to all but the other instance."""


class Syncthing:
    """One of two instances that are configured with each other's address on this machine."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home = home
        self.folder = folder
        self._program = program("syncthing")
        self._environ = {"PATH": os.environ["PATH"], "HOME": str(home), "STNOUPGRADE": "1"}
        run([self._program, "generate", "--home", home, "--no-default-folder"], env=self._environ)
        self.id = subprocess.check_output(
            [self._program, "--home", home, "--device-id"], env=self._environ, text=True
        ).strip()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def knows(self, other: Syncthing, kind: str, most: int) -> None:
        """Write the configuration: one folder, one other instance, a rate in KiB a second."""
        path = self.home / "config.xml"
        tree = ET.parse(path)
        root = tree.getroot()
        for old in (*root.findall("device"), *root.findall("folder")):
            root.remove(old)
        for each in (self, other):
            device = ET.SubElement(root, "device", id=each.id, name=each.id[:7])
            ET.SubElement(device, "address").text = each.address
        folder = ET.SubElement(
            root,
            "folder",
            id="prompts",
            path=str(self.folder),
            type=kind,
            rescanIntervalS="1",
            fsWatcherEnabled="false",
        )
        ET.SubElement(folder, "minDiskFree", unit="").text = "0"
        for each in (self, other):
            ET.SubElement(folder, "device", id=each.id)
        options = root.find("options")
        gui = root.find("gui")
        assert options is not None
        assert gui is not None
        gui.set("enabled", "false")
        wanted = {
            **WITHOUT_NETWORK,
            "listenAddress": self.address,
            "maxSendKbps": str(most),
            "limitBandwidthInLan": "true",
        }
        for name, value in wanted.items():
            for old in options.findall(name):
                options.remove(old)
            ET.SubElement(options, name).text = value
        tree.write(path)

    def start(self) -> subprocess.Popen[bytes]:
        command = [self._program, "serve", "--home", str(self.home), "--no-browser", "--no-restart"]
        return subprocess.Popen(command, env=self._environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@SLOW
def test_syncthing_over_a_slow_line(large, tmp_path):
    sender, receiver = Syncthing(tmp_path / "sender", large.source), Syncthing(tmp_path / "receiver", large.target)
    sender.knows(receiver, "sendonly", 300)
    receiver.knows(sender, "sendreceive", 300)
    running = [sender.start(), receiver.start()]
    try:
        large.is_completed()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(PATIENCE)
