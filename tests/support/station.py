"""The parts of the daemon in this process, without its loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from imagewatch.config.key import Key
from imagewatch.endpoint.client import Client
from imagewatch.inbox.scan import InboxScan
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.spool import Spool
from imagewatch.job.worker import Worker
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system.disk import Disk
from support.daemon import KEY, Folders

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.job.running import RunningJob


class Distrustful(Worker):
    """A worker that trusts no step: where one reports what the disk shows now, the disk is read as well."""

    def _read_state(self, job: RunningJob) -> None:
        if job.is_foreseen:
            assert job.shown == self._spool.job_state(job.claim, self._spool.record(job.id))
        super()._read_state(job)


class Station(Folders):
    """The real parts in this process, without the daemon's loop: one call carries one prompt to its end."""

    def __init__(self, root: Path, base_url: str, disk: Disk | None = None, **settings: str) -> None:
        super().__init__(root, base_url, **settings)
        loaded = self.config()
        self.state.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(SqliteDatabase(str(self.state / "ledger.sqlite3")), loaded.limits, time.time)
        self.ledger = self.journal.ledger
        self.spool = Spool(loaded, disk or Disk(), self.journal)
        self.spool.prepare()
        self.spool.take_over()
        self.client = Client(loaded.endpoint, lambda: Key(KEY))
        self.worker = Distrustful(self.spool, self.client, self.journal, loaded, wait=lambda _: None)
        self.scan = InboxScan(self.spool.inbox, loaded.inbox)

    def close(self) -> None:
        self.client.close()
        self.journal.close()

    def work(self) -> list[Outcome]:
        """Claim everything that is ready and carry it to its end; waits that a retry asks for are skipped."""
        outcomes = []
        for candidate in self.scan.scan_all(time.monotonic(), time.time()).ready:
            outcome = self.worker.start(candidate.claim(self.spool.new_job(), time.time()))
            while outcome.end is End.DEFERRED:
                outcome = self.worker.process(outcome.job, is_resumed=True)
            outcomes.append(outcome)
        return outcomes

    def recover(self) -> list[Outcome]:
        """Do what a start does: carry on every job that left something behind."""
        return [self.worker.process(job, is_resumed=True) for job in self.spool.unfinished()]
