"""What a daemon is made of: the parts that live as long as it does, and those that each configuration makes again."""

from __future__ import annotations

from random import random
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from imagewatch.config.key import key_stamp, key_step, read_key
from imagewatch.daemon.admission import Admission
from imagewatch.daemon.caps import Caps
from imagewatch.daemon.descriptors import most_requests
from imagewatch.daemon.intake import Intake
from imagewatch.daemon.jobs import Jobs
from imagewatch.daemon.mailbox import Asked, DiskFailed, Mailbox, Notified, Offered, Saved
from imagewatch.daemon.status import Status
from imagewatch.daemon.systemd import Notify
from imagewatch.daemon.team import Team
from imagewatch.endpoint.client import Client
from imagewatch.job.spool import Spool
from imagewatch.job.worker import Worker
from imagewatch.journal import opening
from imagewatch.journal.control import Control
from imagewatch.journal.opening import open_journal
from imagewatch.notify.notifier import Notifier
from imagewatch.system.errors import MORE_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.job.sending import Fate
    from imagewatch.journal.holds import Holds
    from imagewatch.system.disk import Disk

_log = structlog.get_logger()


class Parts:
    """The parts of one daemon.

    Args:
        config: The configuration at the start.
        environ: Environment: key, systemd's socket.
        disk: The local disk.
        holds: Reasons to wait.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.

    Attributes:
        config: The configuration that is used.
        fates: What is known of requests beside what the disk shows, by job; the workers keep it.
        client: The endpoint as the configuration names it.
        worker: Carries jobs to their end as the configuration says.
    """

    client: Client
    worker: Worker

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        disk: Disk,
        holds: Holds,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.config, self._environ, self.disk = config, environ, disk
        self.clock, self.now = clock, monotonic
        self.mailbox = Mailbox()
        self.is_recovered = False  # whether all jobs that are not over are in the table of jobs
        self.jobs = Jobs()
        self.fates: dict[str, Fate] = {}
        self.notify = Notify(environ)
        self.journal = open_journal(config, clock, guarded=True, environ=environ)
        self.ledger = self.journal.ledger
        self.spool = Spool(config, disk, self.journal)
        self.control = Control(config.folders.state, disk, self.journal.requests)
        self.admission = Admission(
            self.spool,
            self.journal,
            self.control,
            holds,
            self._changed_hold,
            clock,
            monotonic,
            lambda job: job in self.jobs.at_work,
        )
        self.notifier = Notifier(self.journal.events, environ, lambda: self.mailbox.put(Notified()), monotonic)
        self.admission.announcements.on_written = self.notifier.wake
        self.admission.stores.on_database_back = self._recheck_jobs
        self.status = Status(config, disk, self.ledger, self.admission, clock, monotonic)
        self.status.events = self.journal.events
        tops = self.spool.tops
        self.intake = Intake(config.folders, self.control.folder, self.mailbox.hint, clock, monotonic, tops)
        self.team = Team(self)
        self.caps = Caps(self.journal, self.spool.inbox, self.intake.opener, monotonic)

    def begin(self) -> None:
        """Make sure that folders and journal can be used, and that no other daemon uses them.

        Raises:
            ImagewatchError: They cannot.
        """
        self.spool.prepare()
        opening.begin(self.config, self.journal, self.disk, replaces=self.control.accepts_ledger())

    def watch_account(self) -> None:
        """Report to a shared account that this daemon runs, and receive its notifications."""
        self.team.tick()
        opening.watch(
            self.journal,
            lambda: (self.status.summary, self.config.limits.concurrency),
            self.team.tick,
            lambda: self.mailbox.put(Asked()),
            lambda: self.mailbox.put(Offered()),
        )

    def _recheck_jobs(self) -> None:
        """Note that jobs that were over may be open again: a server that crashed loses commits that were not synced."""
        self.is_recovered = self.is_recovered and not self.journal.file.is_shared

    def _changed_hold(self, *, at_once: bool) -> None:
        self.status.change(at_once=at_once)

    def configure(self, config: Config) -> None:
        """Make the parts that a configuration changes.

        Raises:
            ConfigError: It cannot be used; then everything is as before.
        """
        config = _within_open_files(config)
        client = Client(config.endpoint, lambda: read_key(config.endpoint, self._environ), clock=self.clock)
        self.config = config
        self.client = client
        self.status.configure(config)
        self.journal.configure(config.limits, config.budgets)
        self.notifier.configure(config.notify, lambda: read_key(config.endpoint, self._environ))
        self.caps.configure(config)
        self.jobs.configure(config.limits.concurrency)
        self.worker = self._new_worker(config)
        self.intake.configure(config.inbox, config.limits.burst)
        self.admission.shared.configure(config.endpoint.deadline_seconds)
        self.admission.configure(
            config.limits,
            config.inbox.settle_seconds,
            lambda: key_stamp(config.endpoint, self._environ),
            lambda: key_step(config.endpoint, self._environ),
        )

    def _new_worker(self, config: Config) -> Worker:
        return Worker(
            self.spool,
            self.client,
            self.journal,
            config,
            may_report=self.admission.may_report,
            not_reported=self.admission.not_reported,
            on_paid=lambda job: self.mailbox.put(Saved(job)),
            fates=self.fates,
            leaving=self.admission.leaving,
            on_disk_error=lambda error: self.mailbox.put(DiskFailed(error)),
            clock=self.journal.clock,
            monotonic=self.now,
            jitter=random,
        )

    def close(self) -> None:
        """Stop watching and close what is open."""
        self.intake.stop()
        self.client.close()
        opening.end(self.journal)
        self.team.end()
        self.journal.close()


def _within_open_files(config: Config) -> Config:
    """Return a configuration with as many requests at the same time as this process has files for."""
    wanted = config.limits.concurrency
    most, files = most_requests(wanted)
    if most < wanted:
        reason = f"only {files} open files are allowed: limits.concurrency is {wanted}, and {most} is used"
        _log.warning("limited", reason=reason, next=MORE_FILES)
    return replace(config, limits=replace(config.limits, concurrency=most))
