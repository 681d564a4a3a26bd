"""Attacks that an audit found, on claims, copies, descriptors and submit."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.daemon import until

from imagewatch.commands.retry import Retry
from imagewatch.inbox.scan import InboxScan
from imagewatch.job.worker import Worker
from imagewatch.journal.control import Control
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops
from imagewatch.system.untrusted import open_file
from security.people import ATTACKER, Person
from security.puppet import exchange
from security.test_shares import shared  # noqa: F401
from security.world import CLAIMS, MARK, World, give

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.station import Station


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("tag", ["", "[sandbox: 429-plain]", "[sandbox: 402]"])
def test_a_prompt_on_a_share_that_grows_after_its_claim_does_not_disappear(shared: World, tag: str) -> None:  # noqa: F811
    world = shared
    world.start()
    world.sandbox.hold()
    path = world.inbox / "cat.prompt.txt"
    world.honest.drop(path, f"a cat {tag}")
    assert world.asked()
    (claim,) = [world.inbox / CLAIMS / n for n in world.attacker.listdir(world.inbox / CLAIMS) if len(n) == 16]
    with open(claim / "cat.prompt.txt", "a") as late:  # the sender's editor had it open
        late.write(" with a hat")
    world.sandbox.release()
    world.is_idle()
    world.status()
    lost = world.attacker.listdir(world.inbox / CLAIMS)
    assert [n for n in lost if len(n) == 16] == [], "the prompt is in the folder of claimed files, and no job has it"
    assert world.destination("cat.prompt.txt")


def killed_during_a_request(world: World) -> None:
    """Start a daemon, and kill it when it has sent an honest prompt."""
    running = world.start()
    world.sandbox.hold()
    world.honest_prompt("honest", "an honest prompt")
    assert world.asked()
    running.process.kill()
    running.process.wait()
    world.sandbox.release()


@pytest.mark.parametrize("how", ["no claims.json", "inode changed"])
def test_a_claims_folder_renamed_while_the_daemon_was_down_is_not_an_inbox(world: World, how: str) -> None:
    killed_during_a_request(world)
    memory = world.state / "claims.json"
    if how == "no claims.json":  # a version before this one
        memory.unlink()
    else:  # the inbox was copied to another disk, owners and modes kept
        copy = world.top / "copy"
        subprocess.run(["cp", "-a", str(world.inbox), str(copy)], check=True)
        shutil.rmtree(world.inbox)
        copy.rename(world.inbox)

    with Person(world._interpreter, ATTACKER, "/") as again:
        again.rename(world.inbox / CLAIMS, world.inbox / "visible")
    world.start()
    world.honest_prompt_is_completed("another")
    world.is_idle()
    assert world.requests("an honest prompt") == 1, "the same prompt was sent, and paid for, twice"


def test_the_hint_about_a_claims_folder_of_another_owner_causes_no_second_payment(world: World) -> None:
    killed_during_a_request(world)
    subprocess.run(["chown", "-R", "61236:61234", str(world.inbox)], check=True)
    subprocess.run(["chmod", "-R", "g+rwX", str(world.inbox)], check=True)
    world.start()
    world.held_for(CLAIMS)
    (world.inbox / CLAIMS).rename(world.inbox / "old-claims")  # "remove or rename what has this name"
    world.honest_prompt_is_completed("another")
    world.is_idle()
    assert world.requests("an honest prompt") == 1, "the same prompt was sent, and paid for, twice"


@pytest.mark.parametrize("mode", [0o700, 0o000, 0o711])
def test_a_claims_folder_that_the_daemon_may_not_open_does_not_prevent_the_start(world: World, mode: int) -> None:
    world.attacker.mkdir(world.inbox / CLAIMS, mode)
    world.attacker.chmod(world.inbox / CLAIMS, mode)
    world.start()
    world.held_for(CLAIMS)


@pytest.mark.parametrize("names", [[".imagewatch-claims"], ["lock", "0123456789abcdef"]], ids=["mark", "lock"])
def test_a_folder_that_looks_like_claims_is_named_and_is_scanned_when_it_no_longer_does(
    world: World, names: list[str]
) -> None:
    (world.inbox / "sub").mkdir()
    give(world.inbox / "sub", 0o2777)
    for name in names:
        world.attacker.write(world.inbox / "sub" / name, "")
    world.honest.drop(world.inbox / "sub/cat.prompt.txt", "an honest prompt")
    world.start()
    world.wait(lambda: "sub" in world.status()["ignored"]["files"], "the folder among what is ignored")
    assert "sub: it looks like a folder of claimed files" in world.command("status").stdout
    assert "it looks like a folder of claimed files" in world.command("check").stdout
    assert world.requests() == 0
    world.attacker.unlink(world.inbox / "sub" / names[0])
    world.wait(lambda: world.destination("sub/cat.prompt.txt") == "outbox", "the prompt")


def test_submit_of_a_prompt_in_a_strangers_folder_follows_no_link_of_theirs(world: World) -> None:
    strange = world.inbox.parent.parent / "strange"
    strange.mkdir()
    give(strange, 0o777)
    world.attacker.write(strange / "cat.prompt.txt", '+++\ninput_images = ["cat.png"]\n+++\na cat')
    world.attacker.symlink(world.home / "cat.png", strange / "cat.png")
    world.command("submit", "--from", str(strange / "cat.prompt.txt"))
    found = [p for p in world.inbox.iterdir() if p.is_file() and MARK.encode() in p.read_bytes()]
    assert found == []


def test_submit_of_a_prompt_that_is_a_link_in_a_strangers_folder(world: World) -> None:
    strange = world.inbox.parent.parent / "strange"
    strange.mkdir()
    give(strange, 0o777)
    world.attacker.symlink(world.home / ".profile", strange / "cat.prompt.txt")
    world.command("submit", "--from", str(strange / "cat.prompt.txt"))
    found = [p for p in world.inbox.iterdir() if p.is_file() and MARK.encode() in p.read_bytes()]
    assert found == []


def test_open_file_leaks_nothing_when_a_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    real = os.open

    def swapped(name, flags, *more, **named):  # type: ignore[no-untyped-def]
        if str(name).endswith("x"):
            path.unlink(missing_ok=True)
            path.mkdir()
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match=r"not a plain file|replaced"):
        open_file(str(path), Tops())
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_prompt_on_a_share_that_grows_between_two_tries_gets_a_receipt_or_an_error_file(shared: World) -> None:  # noqa: F811
    world = shared
    text = (
        world.configuration.read_text()
        .replace("initial_seconds = 0.01", "initial_seconds = 4.0")
        .replace("max_seconds = 0.02", "max_seconds = 4.0")
    )
    world.configuration.write_text(text)
    world.start()
    world.honest.drop(world.inbox / "cat.prompt.txt", "a cat [sandbox: 429-plain]")
    assert world.asked()
    (claim,) = [world.inbox / CLAIMS / n for n in world.attacker.listdir(world.inbox / CLAIMS) if len(n) == 16]
    with open(claim / "cat.prompt.txt", "a") as late:
        late.write(" with a hat")
    world.is_idle()
    there = world.destination("cat.prompt.txt") or (world.inbox / "cat.prompt.txt").exists()
    assert there, "the prompt was removed without a receipt and without an error file"


def test_submit_reads_no_prompt_that_is_a_hard_link_to_a_private_file(world: World) -> None:
    strange = world.top / "strange"
    strange.mkdir()
    give(strange, 0o777)
    os.link(world.home / ".profile", strange / "cat.prompt.txt")
    world.command("submit", "--from", str(strange / "cat.prompt.txt"))
    found = [p for p in world.inbox.iterdir() if p.is_file() and MARK.encode() in p.read_bytes()]
    assert found == []


def test_a_claims_folder_whose_mode_is_changed_while_the_daemon_runs_is_closed_again(world: World) -> None:
    world.start()
    world.honest_prompt_is_completed("first")
    world.is_idle()
    (world.inbox / CLAIMS).chmod(0o777)  # chmod -R of the administrator
    world.honest_prompt_is_completed("second")
    world.is_idle()
    assert (world.inbox / CLAIMS).stat().st_mode & 0o777 == 0o700


def test_an_honest_folder_that_takes_the_place_of_a_prompt_is_put_back(tmp_path: Path, station: Station) -> None:
    """A folder takes the place of a prompt in the moment of its claim: what is in it is not lost."""

    class Swapping(type(station.spool.disk)):  # type: ignore[misc]
        def rename(self, source: str, target: str) -> None:
            if source.endswith("x.prompt.txt") and CLAIMS in target:
                exchange(source, str(station.inbox / "theirs"))
            super().rename(source, target)

    station.inbox.mkdir(exist_ok=True)
    (station.inbox / "theirs").mkdir()
    (station.inbox / "theirs" / "honest.prompt.txt").write_text("an honest prompt")
    (station.inbox / "x.prompt.txt").write_text("an x")
    station.spool.disk.__class__ = Swapping
    scan = InboxScan(str(station.inbox), station.config().inbox)
    ready = [c for c in scan.scan_all(1e6, 1e12).ready if c.key[1] == "x"]
    worker = Worker(station.spool, station.client, station.journal, station.config())
    worker.start(ready[0].claim(station.spool.new_job(), 0.0))
    found = list((station.inbox / CLAIMS).rglob("honest.prompt.txt"))
    assert found == [], "the folder of another user is in the folder of claimed files, and no job has it"


def test_retry_copies_no_private_file_that_takes_the_place_of_a_failed_prompt(station: Station, tmp_path: Path) -> None:

    private = tmp_path / "private"
    private.write_text(MARK)
    private.chmod(0o600)
    station.prompt("cat", "a cat [sandbox: 400]")
    station.work()
    failed = station.errors / "cat.prompt.txt"

    class Swapping(Disk):
        def carry(self, source: str, *more, **named) -> None:  # type: ignore[no-untyped-def]
            failed.unlink()
            os.link(private, failed)
            super().carry(source, *more, **named)

    disk = Swapping()
    retry = Retry(
        station.config().folders, disk, station.journal, Control(str(station.state), disk, station.journal.requests)
    )
    with contextlib.suppress(SpoolError):
        retry.put_back(retry.read(retry.find("cat")))
    copies = [p for p in station.inbox.rglob("*") if p.is_file() and MARK in p.read_text() and p.stat().st_nlink == 1]
    assert copies == [], "a copy of a private file that cannot be distinguished from an honest prompt"


def test_a_job_copies_no_private_file_that_was_claimed_in_the_place_of_a_prompt(
    station: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where inode and times are the same: a hard link of the same size, put there between the scan and the claim."""
    private = tmp_path / "private"
    private.write_text(MARK)
    private.chmod(0o600)
    monkeypatch.setattr(station.spool, "keeps_times", lambda: False)
    path = station.prompt("cat", "x" * len(MARK))
    (candidate,) = station.scan.scan_all(1e6, 1e12).ready
    path.unlink()
    os.link(private, path)
    worker = Worker(station.spool, station.client, station.journal, station.config())
    worker.start(candidate.claim(station.spool.new_job(), 0.0))
    copies = [p for p in station.errors.rglob("*") if p.is_file() and MARK in p.read_text() and p.stat().st_nlink == 1]
    assert copies == [], "retry would have it sent"


def test_no_folder_of_another_user_gets_the_mode_of_a_new_folder_of_ours(station: Station, tmp_path: Path) -> None:

    (station.outbox / "private").mkdir(mode=0o700)

    class Swapping(Disk):
        def set_mode(self, path: str, mode: int) -> None:
            if (station.outbox / "sub").exists():  # by a user who may write the outbox and waits for that name
                exchange(path, str(station.outbox / "private"))
            super().set_mode(path, mode)

    disk = Swapping()
    disk.tops.open(str(station.outbox))
    disk.make_inner(str(station.outbox), "sub", 0o755)
    modes = {name: (station.outbox / name).stat().st_mode & 0o777 for name in ("private", "sub")}
    assert modes == {"private": 0o700, "sub": 0o755}


def test_prompts_that_take_turns_with_folders_leave_no_descriptor_open(new_world: Callable[..., World]) -> None:
    world = new_world(settings={"inbox": {"input_wait_seconds": 3600}})
    pid = world.start().process.pid
    world.honest_prompt_is_completed("first")
    before = descriptors(pid)
    for n in range(4):
        world.attacker.write(world.inbox / f"x{n}.prompt.txt", '+++\ninput_images = ["never.png"]\n+++\nan x')
        world.attacker.mkdir(world.inbox / f"x{n}.d")
        world.attacker.race(str(world.inbox / f"x{n}.prompt.txt"), str(world.inbox / f"x{n}.d"))
    scans = set()

    def scanned() -> bool:
        scans.add(world.status().get("last_scan"))
        return len(scans) > 12 or descriptors(pid) > before + 20

    until(scanned, 60)
    world.attacker.stop_racing()
    world.honest_prompt_is_completed("last")
    assert descriptors(pid) < before + 20
