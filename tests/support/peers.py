"""The parts of daemons of one common inbox in this process, without their loops: each does one thing at a time."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from imagewatch.config.key import Key
from imagewatch.config.load import load
from imagewatch.endpoint.client import Client
from imagewatch.inbox.scan import InboxScan
from imagewatch.job.outcome import End
from imagewatch.job.sending import Fate
from imagewatch.job.spool import Spool
from imagewatch.job.worker import Worker
from imagewatch.journal.journal import Journal
from imagewatch.journal.row import OVER_SECONDS
from support.daemon import KEY, Folders, until
from support.losing import PowerCut, SteppingDisk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.job.outcome import Outcome
    from imagewatch.protocol.values import Claim
    from support.postgres import Server

PATIENCE = 20.0
"""How long a commit is waited for, seconds."""
DEADLINE = "30"
"""How long a response is waited for, seconds: none of the requests takes as long, however busy the machine is."""


class HookedDisk(SteppingDisk):
    """A real disk that does something before a change.

    Attributes:
        before: What to do, by parts of the change with | between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], object]] = {}

    def step(self, what: str, path: str) -> None:
        for parts, act in list(self.before.items()):
            if all(part in f"{what} {path}" for part in parts.split("|")):
                act()


class Peer(Folders):
    """What one daemon of the inbox has.

    Args:
        root: Where the folders of all daemons are made.
        name: Its instance.
        base_url: Of the endpoint.
        database: How to connect to the database.
        inbox: Name of the common inbox; empty: it has its inbox alone.
        settings: More of the configuration.

    Attributes:
        later: How much later it is for this daemon, seconds: a response is waited for until a deadline.
    """

    def __init__(self, root: Path, name: str, base_url: str, database: str, inbox: str, **settings: str) -> None:
        from imagewatch.journal.postgres.place import Place  # noqa: PLC0415  psycopg may be missing
        from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415

        super().__init__(root / name, base_url, **settings)
        self.name, self.root = name, root / "one/watched"
        self.environ["IMAGEWATCH_FOLDERS__ROOT"] = str(self.root)
        self._place = Place(
            database, "main", inbox=inbox or name, instance=name, is_replicated=False, is_common=bool(inbox)
        )
        initialize(self._place)
        self.later = 0.0
        self.state.mkdir()
        self._begin()

    def _begin(self) -> None:
        from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415

        loaded, fates = load(None, self.environ), dict[str, Fate]()
        self.loaded = loaded
        self.disk = HookedDisk()
        self.journal = Journal(PostgresDatabase(self._place, patience=PATIENCE), loaded.limits, self._clock)
        self.common = self.journal.common
        self.spool = Spool(loaded, self.disk, self.journal)
        self.spool.prepare()
        self.client = Client(loaded.endpoint, lambda: Key(KEY))
        given: dict[str, Any] = {"fates": fates, "wait": lambda _: None, "clock": self._clock}
        self.worker = Worker(self.spool, self.client, self.journal, loaded, **given)
        self._scan = InboxScan(self.spool.inbox, loaded.inbox)

    def _clock(self) -> float:
        return time.time() + self.later

    def close(self) -> None:
        self.client.close()
        self.journal.close()

    def restart(self) -> None:
        """Forget what only a process knows."""
        self.close()
        self._begin()

    def found(self) -> list[Claim]:
        """Return what can be claimed in the inbox, each as a new job."""
        ready = self._scan.scan_all(time.monotonic(), time.time()).ready
        return [one.claim(self.spool.new_job(), time.time()) for one in ready]

    def start(self) -> Outcome:
        """Offer what is in the inbox, take it, and process one of the prompts."""
        self.common.offer_all(self.found())
        taken = self.common.take(1)[0]
        assert taken.claim is not None
        return self.worker.start(taken.claim)

    def process(self, job: str) -> Outcome:
        """Process a job."""
        return self.worker.process(job, is_resumed=True)

    def finish(self, job: str) -> Outcome:
        """Process a job until it waits for nothing, or for a time."""
        while (outcome := self.process(job)).end is End.DEFERRED and not outcome.delay:
            pass
        return outcome

    def killed(self, act: Callable[[], object], before: str) -> None:
        """Let a daemon do something, and end before a change of the disk as a process does that is killed."""
        self.disk.before[before] = _kill
        with pytest.raises(PowerCut):
            act()
        self.restart()


def _kill() -> None:
    raise PowerCut


class Peers:
    """Daemons of one inbox, and their database.

    Args:
        root: Where their folders are made.
        base_url: Of the endpoint.
        server: The server of the database.
        database: How to connect to it.
        inbox: Name of the common inbox; empty: each daemon has one of its own.
    """

    def __init__(self, root: Path, base_url: str, server: Server, database: str, inbox: str = "common") -> None:
        self._root, self._base_url, self._server, self._database = root, base_url, server, database
        self._inbox = inbox
        self._end = contextlib.ExitStack()
        self._peers: list[Peer] = []

    def add(self, name: str, database: str = "", **settings: str) -> Peer:
        """Make another daemon; the first one is called ``one``."""
        given = {"endpoint__connect_timeout_seconds": "2", "endpoint__deadline_seconds": DEADLINE, **settings}
        peer = Peer(self._root, name, self._base_url, database or self._database, self._inbox, **given)
        self._end.callback(peer.close)
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        """Close all daemons."""
        self._end.close()

    def rows(self, question: str) -> list[Any]:
        """Ask or change the database directly."""
        return self._server.psql(question, self._database.rpartition("/")[2])

    def job(self) -> str:
        """The id of the only job."""
        ((job,),) = self.rows("SELECT id FROM imagewatch.jobs")
        return str(job)

    def state(self) -> str:
        """The state of the only job."""
        ((state,),) = self.rows("SELECT state FROM imagewatch.jobs")
        return str(state)

    def outcomes(self) -> list[str]:
        """The results of all attempts."""
        return [one for (one,) in self.rows("SELECT outcome FROM imagewatch.attempts ORDER BY attempt")]

    def lose(self, *changes: str) -> None:
        """Change rows as a database does that loses commits: no trigger concerns that."""
        self.rows("; ".join(("SET session_replication_role = replica", *changes)))

    def forget_jobs(self) -> None:
        """Delete the rows of all jobs, as it is done some days after they are over: their attempts stay."""
        days = f"{OVER_SECONDS + 1}"
        self.lose(
            f"UPDATE imagewatch.attempts SET claimed_at = claimed_at - {days}, sent_at = sent_at - {days}, "
            f"answered_at = answered_at - {days}",
            "DELETE FROM imagewatch.jobs",
        )

    def let_take_over(self, peer: Peer) -> str:
        """Let all leases end, and a daemon take over the only job; return its id."""
        self.rows("UPDATE imagewatch.jobs SET lease_ends_at = 0")
        for one in self._peers:
            one.common._renewed.clear()
        taken: list[str] = []
        # The server may still find out that a connection that has locked the row has ended.
        until(lambda: taken.extend(one.job for one in peer.common.take_over(5)) or taken)
        (job,) = taken
        return job
