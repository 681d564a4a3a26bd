"""A daemon that ends at a step of a job, and a database that loses its last commits at the same time."""

from __future__ import annotations

import collections
import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagewatch.job.lost_jobs import LostJobs
from imagewatch.journal.counted import Counted
from imagewatch.journal.lost_rows import LostRows
from imagewatch.journal.opening import begin
from imagewatch.system.errors import DatabaseError, SpoolError
from support.losing import PowerCut
from support.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox
    from support.peers import Peer
    from support.postgres import Server

MOST_LOST = 3
"""So many of the last commits are lost at most."""
LATE = 120.0
"""So much later, no daemon waits for the response of another one any more, seconds."""
ROUNDS = 12


class Snapshots:
    """The content of all tables before each of the last commits.

    Args:
        server: The server of the database.
        database: Its name.
    """

    def __init__(self, server: Server, database: str) -> None:
        import psycopg  # noqa: PLC0415  not installed everywhere

        self._connection = psycopg.connect(server.uri(database, "postgres"), autocommit=True)
        found = self._connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'imagewatch'")
        self._tables = sorted(name for (name,) in found.fetchall())
        self._kept: collections.deque[dict[str, bytes]] = collections.deque(maxlen=MOST_LOST)

    def close(self) -> None:
        self._connection.close()

    def keep(self) -> None:
        """Keep what all tables have now, as one transaction sees it."""
        kept = {}
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for name in self._tables:
                with self._connection.cursor().copy(f"COPY imagewatch.{name} TO STDOUT".encode()) as copy:
                    kept[name] = b"".join(bytes(piece) for piece in copy)
        self._kept.append(kept)

    def lose(self, commits: int) -> None:
        """Restore what the tables had before the last commits. No trigger concerns that."""
        kept = self._kept[-commits]
        with self._connection.transaction():
            self._connection.execute("SET LOCAL session_replication_role = replica")
            for name in self._tables:
                self._connection.execute(f"DELETE FROM imagewatch.{name}".encode())
                with self._connection.cursor().copy(f"COPY imagewatch.{name} FROM STDIN".encode()) as copy:
                    copy.write(kept[name])


@dataclass
class Played:
    """What there was when a daemon ended.

    Attributes:
        steps: Its steps: the changes of the disk, and the commits.
        requests: So many the endpoint got.
        is_saved: Whether a whole response was in the state folder, or in the claim folder.
    """

    steps: list[str] = field(default_factory=list)
    requests: int = 0
    is_saved: bool = False

    @property
    def commits(self) -> int:
        return self.steps.count(COMMIT)


COMMIT = "commit"


class World:
    """An inbox, its daemons, and a database that loses commits.

    Args:
        root: For all folders.
        server: The server of the database.
        database: How to connect to it.
        sandbox: The endpoint.
        is_common: Whether several daemons process the inbox.
        text: Of the only prompt. No other world has the same.
    """

    def __init__(
        self, root: Path, server: Server, database: str, sandbox: Sandbox, *, is_common: bool, text: str
    ) -> None:
        self.is_common, self.text = is_common, text
        self._sandbox, self._database = sandbox, database
        self.peers = Peers(root, sandbox.base_url, server, database, "common" if is_common else "")
        self.one = self.add("one")
        self.troubles: list[str] = []
        self._snapshots = Snapshots(server, database.rpartition("/")[2])

    def close(self) -> None:
        self.peers.close()
        self._snapshots.close()

    def add(self, name: str) -> Peer:
        """Make the folders of another daemon."""
        shared = {"database": self._database, "durability": "single", "instance": name}
        shared |= {"inbox": "common"} if self.is_common else {}
        return self.peers.add(name, **{f"shared__{key}": value for key, value in shared.items()})

    def calls(self) -> list[dict[str, Any]]:
        """The requests for the prompt that the endpoint got."""
        return [call for call in self._sandbox.report()["calls"] if call["prompt"] == self.text]

    # Until the end of the daemon

    def play(self, before: int = 0, lost: int = 0) -> Played:
        """Let a daemon start and process the prompt, and end before a step; then lose commits.

        Args:
            before: The step, from 1; 0: it does not end early.
            lost: How many of the last commits.
        """
        one, played = self.one, Played()
        begin(one.loaded, one.journal, one.disk)  # so that it is not the first start that is lost
        one.restart()
        one.prompt("cat", self.text)
        self._watch(one, played, before)
        with contextlib.suppress(PowerCut):
            begin(one.loaded, one.journal, one.disk)
            self._first(one)
            while self.is_open():
                self._round(one, {self.peers.job()})
        played.requests, played.is_saved = len(self.calls()), self._is_saved()
        one.close()
        if lost:
            self._snapshots.lose(lost)
        one._begin()
        return played

    def _watch(self, one: Peer, played: Played, before: int) -> None:
        """Let each change of the disk, and each commit, be a step; after the end there is none."""

        def step(what: str) -> None:
            if 0 < before <= len(played.steps) + 1:
                raise PowerCut
            if what == COMMIT:
                self._snapshots.keep()
            played.steps.append(what)

        change = one.journal.file.change

        def counted(act: Callable[[Any], Any], **options: bool) -> Any:
            step(COMMIT)
            return change(act, **options)

        one.journal.file.change = counted  # type: ignore[method-assign,assignment]
        one.disk.step = lambda what, path: step(f"{what} {os.path.basename(path)}")  # type: ignore[method-assign]

    def _first(self, one: Peer) -> None:
        """Process the prompt as far as that goes without a wait."""
        if self.is_common:
            one.start()
        else:
            (found,) = one.found()
            one.worker.start(found)

    def _is_saved(self) -> bool:
        names = [path.name for path in self.one.answers()] + self.one.names("inbox")
        return any(name.endswith("answer.1") for name in names)

    # Afterwards

    def begin(self, peer: Peer, *, always_recover: bool = False) -> bool:
        """Start a daemon; if it refuses the database, do what the documentation says. Return whether it did."""
        hint = "" if always_recover else self._refused(peer)
        if always_recover or hint:
            assert always_recover or "db recover" in hint, hint
            self._recover(peer)
            begin(peer.loaded, peer.journal, peer.disk)
        return bool(hint)

    def _refused(self, peer: Peer) -> str:
        """Start a daemon; return the next step if it refuses the database, or an empty string."""
        try:
            begin(peer.loaded, peer.journal, peer.disk)
        except DatabaseError as error:
            return error.hint
        return ""

    def _recover(self, peer: Peer) -> None:
        """Do what ``imagewatch db recover --yes`` does, in a process of its own."""
        peer.restart()
        lost = LostJobs(peer.spool)
        for found in list(lost.find()):
            why = lost.carry_out(found)
            self.troubles += [why] if why else []
        Counted(peer.loaded.folders.state).write(LostRows(peer.journal.file).recorded())
        peer.restart()

    def go_on(self, peer: Peer) -> None:
        """Let a daemon run until nothing more changes."""
        jobs: set[str] = set()
        for number in range(ROUNDS):
            if number == ROUNDS // 2:
                peer.later = LATE
            with self._noted():
                jobs |= set(peer.spool.unfinished() if number else peer.spool.take_over())
            self._round(peer, jobs)
            if number > 2 and not self.is_open() and not peer.found():
                return

    def _round(self, peer: Peer, jobs: set[str]) -> None:
        for job in sorted(jobs):
            with self._noted():
                peer.process(job)
        with self._noted():
            self._claim(peer, jobs)

    def _claim(self, peer: Peer, jobs: set[str]) -> None:
        found = peer.found()
        if not self.is_common:
            taken = {row[0] for row in self.peers.rows("SELECT id FROM imagewatch.jobs WHERE state <> 'done'")}
            for claim in [] if taken else found:
                peer.worker.start(claim)
            return
        if found:
            peer.common.offer_all(found)
        for one in peer.common.take(1):
            jobs.add(one.job)
            if one.claim is not None:
                peer.worker.start(one.claim)
        self.peers.rows("UPDATE imagewatch.jobs SET lease_ends_at = 0")
        for one in peer.common.take_over(5):
            jobs.add(one.job)
        peer.common.renew()
        peer.worker.tidy()

    @contextlib.contextmanager
    def _noted(self) -> Any:
        try:
            yield
        except SpoolError as error:
            self.troubles.append(f"{error} ({error.hint})")

    def is_open(self) -> bool:
        """Whether a job is not over."""
        return bool(self.open())

    def open(self) -> list[Any]:
        """Jobs that are not over, and attempts without a result."""
        return self.peers.rows(
            "SELECT id, state FROM imagewatch.jobs WHERE state NOT IN ('done', 'kept') "
            "UNION ALL SELECT job, outcome FROM imagewatch.attempts WHERE outcome = 'sent'"
        )
