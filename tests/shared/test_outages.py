"""The shared database is out of reach while a daemon runs, starts or ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.account import RUNNER, TIMEOUTS, Account, Member
from support.daemon import PATIENCE, LoggedDaemon, command, until
from support.postgres import SUPERUSER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.postgres import Server
    from support.proxy import Proxy

    from imagewatch.sandbox import Sandbox

    Begin = Callable[[Member], LoggedDaemon]

pause = threading.Event().wait
LONGEST_END = 12.0
"""How long a daemon with the short waits of ``shared_runner`` takes to end at most, seconds."""


@pytest.fixture
def account(tmp_path: Path, postgres: Server, database: str) -> Account:
    return Account(postgres, database, tmp_path)


@pytest.fixture
def own_account(tmp_path: Path, own_postgres: Server) -> Account:
    """An account on a server that the test may stop."""
    return Account(own_postgres, own_postgres.database(), tmp_path)


@pytest.fixture
def member(account: Account, sandbox: Sandbox, proxy: Proxy) -> Member:
    """The folders of a daemon that connects through the proxy."""
    return account.member("one", sandbox.base_url, proxy.through(account.uri))


@pytest.fixture
def begin(run: Callable[..., LoggedDaemon]) -> Begin:
    """Start a daemon that does not wait for long."""
    return lambda member: run(member, "none", "0", script=RUNNER)


@pytest.mark.parametrize("fault", ["cut", "hang", "swallow_replies"])
def test_a_hold_begins_while_the_database_is_out_of_reach_and_ends_when_it_is_back(
    account: Account, member: Member, proxy: Proxy, sandbox: Sandbox, begin: Begin, fault: str
) -> None:
    daemon = begin(member)
    member.prompt("before", "before")
    until(lambda: account.is_over(1))
    getattr(proxy, fault)()
    member.prompt("cat", "cat")
    until(lambda: "database" in member.holds(), saw=daemon.log)
    assert sandbox.report()["requests"] == 1
    proxy.restore()
    until(lambda: account.is_over(2), saw=daemon.log)
    until(lambda: member.holds() == [])
    assert {line["kind"] for line in daemon.events("held")} == {"database"}
    assert daemon.wait_for("released")["kind"] == "database"
    assert sandbox.report()["requests"] == 2
    assert daemon.stop() == 0


@pytest.mark.parametrize("fault", ["cut", "hang"])
def test_a_daemon_ends_soon_while_the_database_hangs_and_publishes_the_response_at_the_next_start(
    account: Account, member: Member, proxy: Proxy, sandbox: Sandbox, begin: Begin, fault: str
) -> None:
    daemon = begin(member)
    sandbox.hold()
    member.prompt("cat", "cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    getattr(proxy, fault)()
    sandbox.release()
    until(lambda: any(path.name.endswith(".answer.1") for path in member.answers()), saw=daemon.log)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < LONGEST_END
    assert member.finished() == {}

    proxy.restore()
    daemon = begin(member)
    until(lambda: account.is_over(1))
    assert member.receipt("cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 1
    account.audit(sandbox.report(), {"cat"})


def test_a_response_that_arrives_while_the_database_is_out_of_reach_is_published_later(
    account: Account, member: Member, proxy: Proxy, sandbox: Sandbox, begin: Begin
) -> None:
    begin(member)
    sandbox.hold()
    for stem in ("cat", "dog"):
        member.prompt(stem, stem)
    assert sandbox.wait_for_requests(2, PATIENCE)
    proxy.hang()
    sandbox.release()
    until(lambda: "database" in member.holds())
    proxy.restore()
    until(lambda: account.is_over(2))
    account.audit(sandbox.report(), {"cat", "dog"})


@pytest.mark.parametrize("fault", ["cut", "hang"])
def test_once_ends_soon_without_a_database_and_sends_nothing(
    member: Member, proxy: Proxy, sandbox: Sandbox, fault: str
) -> None:
    member.prompt("cat", "cat")
    getattr(proxy, fault)()
    done = command(member, "once")
    assert done.returncode == 69, done.stderr
    assert "shared database" in done.stderr
    assert (member.inbox / "cat.prompt.txt").exists()
    assert sandbox.report()["requests"] == 0


def test_a_lost_acknowledgement_of_a_reservation_does_not_keep_the_name(
    account: Account, proxy: Proxy, sandbox: Sandbox, begin: Begin
) -> None:
    """With a cap, the job is recorded before it is given to a worker."""
    capped = account.member("one", sandbox.base_url, proxy.through(account.uri), limits__credits_per_day="900")
    daemon = begin(capped)
    until(lambda: capped.status() != {})
    proxy.swallow_reply_of(b"COMMIT")
    capped.prompt("cat", "cat")
    until(lambda: account.is_over(1), saw=lambda: f"{account.open()}\n{daemon.log()}")
    account.audit(sandbox.report(), {"cat"})


def test_no_connections_are_left_over(account: Account, member: Member, proxy: Proxy, begin: Begin) -> None:
    question = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'imagewatch %'"
    daemon = begin(member)
    for number in range(3):
        member.prompt(f"cat{number}", f"cat{number}")
        until(lambda number=number: account.is_over(number + 1))
        proxy.cut()
        proxy.restore()
    until(lambda: account.rows(question) <= [(3,)])
    assert daemon.stop() == 0
    until(lambda: account.rows(question) == [(0,)])


def test_a_server_that_crashes_while_requests_are_in_flight_loses_nothing(
    own_account: Account, own_postgres: Server, sandbox: Sandbox, begin: Begin
) -> None:
    member = own_account.member("one", sandbox.base_url)
    begin(member)
    sandbox.hold()
    stems = {f"cat{number}" for number in range(4)}
    for stem in stems:
        member.prompt(stem, stem)
    assert sandbox.wait_for_requests(4, PATIENCE)
    own_postgres.kill()
    sandbox.release()
    until(lambda: "database" in member.holds())
    own_postgres.start()
    until(lambda: own_account.is_over(4))
    own_account.audit(sandbox.report(), stems)


def test_a_daemon_continues_on_the_synchronous_standby(
    own_account: Account, own_postgres: Server, sandbox: Sandbox, begin: Begin
) -> None:
    standby = own_postgres.standby(synchronous=True)
    daemon = begin(replicated(own_account, standby, sandbox))
    sandbox.hold()
    (member,) = own_account.members
    stems = {"cat", "dog", "later"}
    for stem in ("cat", "dog"):
        member.prompt(stem, stem)
    assert sandbox.wait_for_requests(2, PATIENCE)
    own_postgres.kill()
    sandbox.release()
    until(lambda: "database" in member.holds())
    standby.promote()
    standby.set(synchronous_standby_names="*")  # an administrator has made another standby
    other = standby.standby(synchronous=True)
    assert other.is_running
    own_account.server = standby
    member.prompt("later", "later")
    until(lambda: own_account.is_over(3), saw=daemon.log)
    own_account.audit(sandbox.report(), stems)


def replicated(account: Account, standby: Server, sandbox: Sandbox, durability: str = "replicated") -> Member:
    """The folders of a daemon that uses whichever of two servers can be written."""
    name = account.uri.rpartition("/")[2]
    both = f"postgresql://imagewatch@127.0.0.1:{account.server.port},127.0.0.1:{standby.port}/{name}"
    return account.member("one", sandbox.base_url, both, shared__durability=durability)


def test_a_standby_that_lacks_commits_is_refused_and_nothing_is_sent(
    own_account: Account, own_postgres: Server, sandbox: Sandbox, begin: Begin
) -> None:
    standby = own_postgres.standby(synchronous=False)
    member = replicated(own_account, standby, sandbox, "single")
    daemon = begin(member)
    member.prompt("first", "first")
    until(lambda: own_account.is_over(1))
    (newest,) = own_postgres.psql("SELECT pg_current_wal_lsn()")
    until(lambda: standby.psql("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", parameters=newest) == [(True,)])
    standby.stop()
    deliver(member)
    until(lambda: own_account.is_over(2))
    own_postgres.kill()
    standby.start()
    standby.promote()
    (member.archive / "cat.prompt.txt").unlink(missing_ok=True)
    deliver(member)  # a sync tool brings it again
    member.prompt("dog", "dog")
    lacks = "lacks the newest requests"  # at first the reason may be that no server can be reached
    until(lambda: any(lacks in hold["reason"] for hold in member.status()["holds"]), saw=daemon.log)
    own_account.server = standby
    assert own_account.rows("SELECT count(*) FROM imagewatch.attempts") == [(1,)]
    pause(TIMEOUTS)
    assert member.holds() == ["database"]
    assert lacks in member.status()["holds"][0]["reason"]
    assert sandbox.report()["requests"] == 2, "neither the same one again nor another one"


def deliver(member: Member) -> None:
    """Put the same prompt into the inbox."""
    outside = member.root / "outside"
    outside.write_text("cat")
    os.utime(outside, ns=(10**18, 10**18))
    outside.rename(member.inbox / "cat.prompt.txt")


def test_a_daemon_that_was_stopped_for_long_in_flight_continues(
    account: Account, member: Member, sandbox: Sandbox, begin: Begin
) -> None:
    daemon = begin(member)
    sandbox.hold()
    member.prompt("cat", "cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    daemon.process.send_signal(signal.SIGSTOP)
    sandbox.release()
    pause(TIMEOUTS)
    daemon.process.send_signal(signal.SIGCONT)
    until(lambda: account.is_over(1))
    account.audit(sandbox.report(), {"cat"})


def test_what_a_crash_of_the_server_has_undone_is_done_again(
    own_account: Account, own_postgres: Server, sandbox: Sandbox, begin: Begin
) -> None:
    """The end of a job is committed without a wait for the disk."""
    member = own_account.member("one", sandbox.base_url)
    daemon = begin(member)
    own_postgres.set(bgwriter_lru_maxpages=0)
    ((writer,),) = own_postgres.psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
    os.kill(writer, signal.SIGSTOP)
    sandbox.hold()
    member.prompt("cat", "cat")
    assert sandbox.wait_for_requests(1, PATIENCE)
    with no_signs_of_life(own_account):
        sandbox.release()
        until(lambda: "cat" in member.finished() and set(member.job_states().values()) == {"done"})
        own_postgres.kill()
    own_postgres.start()
    assert "done" not in member.job_states().values()
    until(lambda: own_account.is_over(1), saw=daemon.log)
    own_account.audit(sandbox.report(), {"cat"})


@contextlib.contextmanager
def no_signs_of_life(account: Account) -> Iterator[None]:
    """Let no daemon record that it runs: that commit would wait for the disk, and with it all earlier ones."""
    import psycopg  # noqa: PLC0415  not installed everywhere

    uri = account.server.uri(account.uri.rpartition("/")[2], SUPERUSER)
    with contextlib.closing(psycopg.connect(uri)) as connection:
        connection.execute("SELECT 1 FROM imagewatch.instances FOR UPDATE")
        yield
