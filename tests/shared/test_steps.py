"""At every step of a job something fails: the process, the database, the endpoint.

``IMAGEWATCH_ALL_SHARED=1`` tries every step with every fault; otherwise some of them, evenly spread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import pytest
from support.account import RUNNER, TIMEOUTS, Account, wait_until_stopped
from support.daemon import KEY, LoggedDaemon, Running, until
from support.endpoint import unique_png
from support.proxy import Proxy

from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.account import Member
    from support.postgres import Server

ALL = os.environ.get("IMAGEWATCH_ALL_SHARED") == "1"
SLOW = pytest.mark.skipif(not ALL, reason="slow: IMAGEWATCH_ALL_SHARED=1 runs it")
STEMS = {"text", "edit", "bad"}
KILLS, STOPS, CUTS = 16, 5, 4
pause = threading.Event().wait


class World:
    """A daemon, its database and its endpoint, with a network between them that fails when a test says so."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server = root, server
        self.sandbox = Sandbox(key=KEY)
        self._end = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.root.mkdir(exist_ok=True)
        self._end.enter_context(self.sandbox)
        self.to_database = self._end.enter_context(Proxy(self.server.port))
        self.to_endpoint = self._end.enter_context(Proxy(int(self.sandbox.base_url.rpartition(":")[2])))
        uri = self.server.database()
        self._end.callback(self.server.drop, uri.rpartition("/")[2])
        self.account = Account(self.server, uri, self.root)
        self.folders: Member = self.account.member(
            "one",
            f"http://127.0.0.1:{self.to_endpoint.port}",
            self.to_database.through(uri),
            limits__concurrency="1",
            endpoint__deadline_seconds="20",
        )
        self.folders.environ["RESUME"] = str(self.root / "resume")
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def drop(self) -> None:
        self.folders.drop("edit.png", unique_png("edit.png"))
        for stem, tag in {"text": "", "edit": "", "bad": " [sandbox: 400]"}.items():
            self.folders.prompt(stem, stem + tag)

    def start(self, action: str, number: int) -> LoggedDaemon:
        running = Running(self.folders, action, str(number), script=RUNNER)
        daemon = LoggedDaemon(running)
        self._end.callback(daemon.kill)
        return daemon

    def finish(self, daemon: LoggedDaemon, most_unknown: int) -> None:
        """Let the daemon continue, end it, and check everything."""
        until(lambda: daemon.events("started") or daemon.process.poll() is not None)
        if daemon.process.poll() is not None:  # it could not start, and the service manager starts it again
            daemon = self.start("none", 0)
            daemon.wait_for("started")
        until(lambda: self.account.is_over(len(STEMS)), saw=lambda: f"{self.account.open()}\n{daemon.log()}")
        until(lambda: self.folders.holds() == [], saw=lambda: str(self.folders.status().get("holds")))
        assert daemon.stop() == 0
        assert daemon.events("internal_error") == []
        self.account.audit(self.sandbox.report(), STEMS, most_unknown)


def steps(count: int, total: int) -> list[int]:
    """Return so many steps, evenly spread, or all."""
    return list(range(1, total + 1, 1 if ALL else max(1, total // count)))


@pytest.fixture(scope="module")
def total(tmp_path_factory: pytest.TempPathFactory, postgres: Server) -> int:
    """How many steps there are when nothing fails."""
    with World(tmp_path_factory.mktemp("count"), postgres) as world:
        world.drop()
        daemon = world.start("none", 0)
        world.finish(daemon, 0)
        assert daemon.process.stdout is not None
        return int(daemon.process.stdout.read())


def each(numbers: list[int], act: Callable[[int], None]) -> None:
    """Do something for each number, two at the same time."""

    def one(number: int) -> None:
        try:
            act(number)
        except BaseException as error:
            error.add_note(f"at step {number}")
            raise

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, numbers))


@pytest.mark.timeout(1800)
def test_a_daemon_that_is_killed_at_any_step_pays_nothing_twice_and_loses_nothing(
    total: int, tmp_path: Path, postgres: Server
) -> None:
    def kill(number: int) -> None:
        with World(tmp_path / str(number), postgres) as world:
            world.drop()
            killed = world.start("kill", number)
            until(lambda: killed.process.poll() is not None or world.account.is_over(len(STEMS)))
            killed.kill()
            world.finish(world.start("none", 0), 1)

    each(steps(KILLS, total), kill)


@SLOW
@pytest.mark.timeout(1800)
def test_a_daemon_that_is_stopped_at_any_step_for_longer_than_all_waits_sends_nothing_twice(
    total: int, tmp_path: Path, postgres: Server
) -> None:
    def stop(number: int) -> None:
        with World(tmp_path / str(number), postgres) as world:
            world.drop()
            daemon = world.start("stop", number)
            if wait_until_stopped(daemon.process.pid):
                pause(TIMEOUTS)
                daemon.process.send_signal(signal.SIGCONT)
            world.finish(daemon, 0)

    each(steps(STOPS, total), stop)


@contextlib.contextmanager
def _paused(world: World, number: int) -> Iterator[LoggedDaemon]:
    """Start a daemon whose thread waits at a step during the block, and then continues."""
    world.drop()
    daemon = world.start("pause", number)
    until(lambda: daemon.events("step") or world.account.is_over(len(STEMS)))
    yield daemon
    (world.root / "resume").touch()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "fault", ["cut", pytest.param("hang", marks=SLOW), pytest.param("swallow_replies", marks=SLOW)]
)
def test_a_database_that_fails_at_any_step_only_delays(
    total: int, tmp_path: Path, postgres: Server, fault: str
) -> None:
    def fail(number: int) -> None:
        with World(tmp_path / str(number), postgres) as world:
            with _paused(world, number) as daemon:
                getattr(world.to_database, fault)()
            pause(TIMEOUTS)
            world.to_database.restore()
            world.finish(daemon, 0)

    each(steps(CUTS, total), fail)


@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", ["endpoint", "both"])
def test_a_network_that_fails_at_any_step_leaves_at_most_the_request_in_flight_unknown(
    total: int, tmp_path: Path, postgres: Server, fault: str
) -> None:
    def fail(number: int) -> None:
        with World(tmp_path / str(number), postgres) as world:
            with _paused(world, number) as daemon:
                world.to_endpoint.cut()
                if fault == "both":
                    world.to_database.cut()
            pause(TIMEOUTS)
            world.to_endpoint.restore()
            world.to_database.restore()
            world.finish(daemon, 1)

    each(steps(CUTS, total), fail)
