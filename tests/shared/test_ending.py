"""Daemons of one inbox that end, come back, or lose the shared folder: who has which job meanwhile."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from support.daemon import PATIENCE, command, until
from support.proxy import Proxy

from shared.test_common_faults import count_steps, inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.common import Inbox, Member
    from support.daemon import LoggedDaemon

    from imagewatch.sandbox import Sandbox

__all__ = ["inbox"]
LONGER = 10.0
"""A lease that a daemon prolongs in time however busy the machine is, seconds."""


def lease_ends(world: Inbox) -> float:
    """When the lease of the only job that is not over ends, by the database's clock."""
    rows = world.rows(f"SELECT lease_ends_at FROM imagewatch.jobs WHERE inbox = '{world.name}' AND state <> 'done'")
    return rows[0][0] if rows else 0.0


def seen(world: Inbox, member: Member) -> float:
    """When a daemon has reported last that it runs, by the database's clock."""
    ((at,),) = world.rows(f"SELECT seen_at FROM imagewatch.instances WHERE name = '{member.name}'")
    return float(at)


def sent_by(world: Inbox, member: Member, sandbox: Sandbox) -> LoggedDaemon:
    """Start a daemon that sends a prompt, and waits for the response; it does not lose the job because it is slow."""
    sandbox.hold()
    member.environ["LEASE"] = str(LONGER)
    member.prompt("cat", "a cat")
    daemon = world.run(member)
    assert sandbox.wait_for_requests(1, PATIENCE)
    return daemon


def test_a_daemon_that_ends_keeps_the_job_whose_response_it_waits_for(
    inbox: Callable[..., Inbox], sandbox: Sandbox
) -> None:
    world = inbox()
    first = sent_by(world, world.members["one"], sandbox)
    two = world.member("two")
    second = world.run(two)
    second.wait_for("started")
    first.process.send_signal(signal.SIGTERM)
    first.wait_for("shutdown")
    ends = lease_ends(world)
    until(lambda: seen(world, two) > ends + 1, saw=second.log)
    assert lease_ends(world) > ends, "the first one prolongs it"
    sandbox.release()
    assert first.end() == 0
    assert second.events("taken_over") == []
    world.settle()
    assert world.check("cat", "a cat") == "outbox"


def test_a_daemon_takes_over_no_job_while_it_cannot_use_the_shared_folder(
    inbox: Callable[..., Inbox], sandbox: Sandbox, tmp_path: Path
) -> None:
    world = inbox()
    first = sent_by(world, world.members["one"], sandbox)
    two, mount = world.member("two"), tmp_path / "mount"
    mount.symlink_to(two.root)
    two.environ["IMAGEWATCH_FOLDERS__ROOT"] = str(mount)
    second = world.run(two)
    second.wait_for("started")
    mount.unlink()
    second.wait_for("held")
    first.kill()
    sandbox.release()
    ends = lease_ends(world)
    until(lambda: seen(world, two) > ends + 1)
    assert second.events("taken_over") == []
    mount.symlink_to(two.root)
    second.wait_for("taken_over")
    world.run(world.members["one"])
    world.settle()
    assert world.check("cat", "a cat") == "errors"


def test_a_daemon_does_not_take_over_a_job_that_its_own_worker_still_has(inbox: Callable[..., Inbox]) -> None:
    world = inbox()
    with Proxy(int(urlsplit(world.database).port or 0)) as proxy:
        one = world.member("one", database=proxy.through(world.database))
        one.prompt("cat", "a cat")
        first = world.run(one, stop_before="journal Journal.decide", by="pause")
        until(one.stopped)
        proxy.cut()
        second = world.run(world.member("two"), kill_before="journal JobRows.finish")
        until(lambda: second.process.poll() is not None)
        second.end()
        ends = lease_ends(world)
        proxy.restore()
        until(lambda: seen(world, one) > ends + 1)
        one.go()
        first.wait_for("job_lost")
        world.run(world.members["two"])
        world.settle()
        assert world.check("cat", "a cat") == "outbox"


def test_what_a_daemon_puts_back_into_the_inbox_as_it_ends_is_put_back_whole(inbox: Callable[..., Inbox]) -> None:
    world = inbox()
    count_steps(world)
    assert world.daemons[0].stop() == 0
    ((job, *_),) = world.attempts()
    two = world.member("two")
    late = two.inbox / ".imagewatch" / f"{job}.1"
    late.mkdir()
    for name in ("dog.png", "dog.prompt.txt"):
        (late / name).write_text("a dog of a daemon that was killed")
    daemon = world.run(two, stop_before="rename|/inbox/dog.prompt.txt", by="pause")
    until(two.stopped)
    daemon.process.send_signal(signal.SIGTERM)
    ended = f"SELECT 1 FROM imagewatch.instances WHERE name = '{two.name}' AND ended_at IS NOT NULL"
    until(lambda: world.rows(ended))
    two.go()
    assert daemon.end() == 0
    assert two.names("inbox") == ["dog.png", "dog.prompt.txt"]


def test_a_kept_response_is_read_again_although_its_claim_folder_cannot_be_changed_at_first(
    inbox: Callable[..., Inbox],
) -> None:
    world = inbox()
    one, two = world.members["one"], world.member("two")
    one.prompt("cat", "a cat [sandbox: url-404]")
    first = world.run(one)
    until(world.kept)
    assert first.stop() == 0
    second = world.run(two)
    second.wait_for("started")
    read_only = Path(two.environ["READ_ONLY_FILE"])
    read_only.touch()
    assert command(two, "retry", "cat").returncode == 0
    until(lambda: second.events("response_reread") or second.events("held") or second.events("stuck"))
    read_only.unlink()
    second.wait_for("failed")
    until(world.kept)
    assert world.calls("a cat [sandbox: url-404]") == 1
