"""Three daemons of one account; processes, networks and the database fail at random: nothing is lost or paid twice.

``IMAGEWATCH_CHAOS=1000 python -m pytest -n 0 -s --timeout 0 tests/shared/test_shared_chaos.py`` is the long run, with a
thousand prompts. ``IMAGEWATCH_CHAOS_SEED`` chooses another sequence of faults.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import pytest
from support.account import RUNNER, Account, Member
from support.daemon import KEY, LoggedDaemon, Running, until
from support.proxy import Proxy

from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.postgres import Server

PROMPTS = int(os.environ.get("IMAGEWATCH_CHAOS", "300"))
SEED = int(os.environ.get("IMAGEWATCH_CHAOS_SEED", "1"))
NAMES = ("one", "two", "three")
CONCURRENCY = 4
LATENCY = 0.15
LONGEST_FAULT = 2.5
LIMIT = 90 + PROMPTS / 3
FAULTS = ("kill", "kill", "stop", "cut", "hang", "swallow_replies", "lost commit", "endpoint", "both")
pause = threading.Event().wait


class Host:
    """A daemon with its networks to the database and to the endpoint."""

    def __init__(self, account: Account, name: str, sandbox: Sandbox, server: Server) -> None:
        self.to_database = Proxy(server.port)
        self.to_endpoint = Proxy(int(sandbox.base_url.rpartition(":")[2]))
        self.folders: Member = account.member(
            name,
            f"http://127.0.0.1:{self.to_endpoint.port}",
            self.to_database.through(account.uri),
            limits__concurrency=str(CONCURRENCY),
            shared__lease_seconds="10",
        )
        self.daemon: LoggedDaemon | None = None
        self.most_unknown = 0

    def start(self) -> None:
        self.daemon = LoggedDaemon(Running(self.folders, "none", "0", script=RUNNER))

    def fail(self, fault: str, seconds: float) -> None:
        """Let something fail for a time."""
        assert self.daemon is not None
        if fault == "kill":
            self.daemon.kill()
            self.most_unknown += CONCURRENCY
            pause(seconds / 4)
            self.start()
        elif fault == "stop":
            self.daemon.process.send_signal(signal.SIGSTOP)
            pause(seconds)
            self.daemon.process.send_signal(signal.SIGCONT)
        elif fault == "lost commit":
            self.to_database.swallow_reply_of(b"COMMIT")
            pause(seconds / 4)
        else:
            if fault in {"endpoint", "both"}:
                self.to_endpoint.cut()
                self.most_unknown += CONCURRENCY
            if fault != "endpoint":
                getattr(self.to_database, "cut" if fault == "both" else fault)()
            pause(seconds)
        self.restore()

    def restore(self) -> None:
        """Let everything work again. A daemon that could not start is started again, as the service manager does."""
        self.to_database.restore()
        self.to_endpoint.restore()
        if self.daemon is not None and self.daemon.process.poll() is not None:
            self.daemon.kill()
            self.start()

    def close(self) -> None:
        if self.daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                self.daemon.process.send_signal(signal.SIGCONT)
            self.daemon.kill()
        self.to_database.close()
        self.to_endpoint.close()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(key=KEY, latency_seconds=LATENCY) as endpoint:
        yield endpoint


@pytest.mark.timeout(LIMIT * 2)
def test_three_daemons_lose_nothing_and_pay_nothing_twice_whatever_fails(
    tmp_path: Path, sandbox: Sandbox, own_postgres: Server
) -> None:
    random = Random(SEED)
    account = Account(own_postgres, own_postgres.database(), tmp_path)
    with contextlib.ExitStack() as end:
        hosts = [Host(account, name, sandbox, own_postgres) for name in NAMES]
        for host in hosts:
            end.callback(host.close)
            host.start()
        sender = threading.Thread(target=send, args=(hosts, random.random()), daemon=True)
        sender.start()
        faults = disturb(account, hosts, random, own_postgres)
        for host in hosts:
            host.restore()
        sender.join()
        until(lambda: recovered(hosts) and account.is_over(PROMPTS), LIMIT, saw=lambda: state(account, hosts))
        until(lambda: not any(host.folders.holds() for host in hosts))
        report = sandbox.report()
        account.audit(report, {stem(number) for number in range(PROMPTS)}, sum(host.most_unknown for host in hosts))
        for host in hosts:
            assert host.daemon is not None
            assert host.daemon.stop() == 0
            assert host.daemon.events("internal_error") == []
        print(f"{PROMPTS} prompts, {report['requests']} requests, faults: {dict(faults)}")  # noqa: T201


def stem(number: int) -> str:
    return f"s{number:05}"


def send(hosts: list[Host], seed: float) -> None:
    """Drop the prompts, in turn into each inbox, over some time."""
    random = Random(seed)
    for number in range(PROMPTS):
        hosts[number % len(hosts)].folders.prompt(stem(number), stem(number))
        pause(random.random() * 0.12)


def disturb(account: Account, hosts: list[Host], random: Random, server: Server) -> Counter[str]:
    """Let things fail until most prompts are finished; the server crashes once in the middle."""
    faults: Counter[str] = Counter()
    while len(account.finished()) < PROMPTS * 0.9:
        fault, seconds = random.choice(FAULTS), 0.2 + random.random() * LONGEST_FAULT
        random.choice(hosts).fail(fault, seconds)
        faults[fault] += 1
        if not faults["crash"] and len(account.finished()) > PROMPTS * 0.4:
            server.restart("immediate")
            faults["crash"] += 1
        pause(random.random())
    assert faults["crash"]
    assert faults.total() > 5
    return faults


def recovered(hosts: list[Host]) -> bool:
    """Start daemons again that have ended; return whether all run."""
    for host in hosts:
        host.restore()
    return True


def state(account: Account, hosts: list[Host]) -> str:
    """For the report of a failure."""
    finished = account.finished()
    missing = [stem(number) for number in range(PROMPTS) if stem(number) not in finished]
    held = [host.folders.status().get("holds") for host in hosts]
    return f"missing: {missing}\nopen: {account.open()}\nholds: {held}\n{[h.folders.leftovers() for h in hosts]}"
