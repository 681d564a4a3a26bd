"""The code that moves the files of jobs. Nothing else knows which folder is which; it reads no responses.

Its order of operations is the protocol (``docs/contributing/architecture.md``). Each public method can be run again
after a crash and then finishes what was begun.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import ANYWHERE
from imagewatch.inbox.claimed import JOB
from imagewatch.job.delivery import Delivery
from imagewatch.job.earlier import Earlier, unreadable
from imagewatch.job.folders import JobFolders
from imagewatch.job.handover import Handover
from imagewatch.job.originals import Originals
from imagewatch.job.rules import State
from imagewatch.protocol.names import SUFFIX
from imagewatch.system import leftovers
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import DamagedJobError, LostJobError, SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.config.schema import Config
    from imagewatch.job.record import Record
    from imagewatch.journal.journal import Journal
    from imagewatch.journal.row import JobRow
    from imagewatch.protocol.values import Claim
    from imagewatch.system.disk import Disk


class Spool(JobFolders):
    """The folders and the files of all jobs.

    Args:
        config: Where the folders are, and the permissions of what is published.
        disk: The local disk.
        journal: What is recorded of jobs.
    """

    def __init__(self, config: Config, disk: Disk, journal: Journal) -> None:
        super().__init__(config, disk, journal)
        self.originals = Originals(self)
        self.delivery = Delivery(self, self.originals)
        self.handover = Handover(self)
        self._earlier = Earlier(self)

    def take_over(self) -> list[str]:
        """Import what an earlier version has left, and tidy up; before the first prompt is claimed.

        Returns:
            The ids of all jobs that are not over, as of ``unfinished``.

        Raises:
            SpoolError: The journal cannot be used, or the disk failed.
        """
        if self.journal.common.is_on:
            return self._take_over_common()
        self._earlier.adopt()
        unfinished = self.unfinished()
        self._remove_responses()
        self._remove_temporaries(unfinished)
        self._drop_twins(unfinished)
        self._take_again(unfinished)
        return unfinished

    def _take_over_common(self) -> list[str]:
        """The same for an inbox that other daemons process, too: only what this daemon has, or alone has."""
        own = list(self.journal.common.own())
        for job in own:
            with contextlib.suppress(LostJobError):  # its worker finds that out, too
                self.handover.fence(job)
        with disk_errors(self.answers, "list the folder"):
            answered = {name.partition(".")[0] for name in self.tops.names(self.answers)}
        self._remove_temporaries(own)
        self.journal.forget_old()
        self._drop_twins(own)
        self._take_again(own)
        # Of the others, a response may be known only here.
        return [*own, *(job for job in sorted(answered.difference(own)) if not self.journal.common.keeps(job))]

    def _take_again(self, unfinished: list[str]) -> None:
        """Move originals that a power cut has put back to where they belong, and remove those of jobs that are over."""
        for job in unfinished:
            try:
                row = self.record(job).row
            except DamagedJobError:
                continue  # a person decides about it
            if row is not None and _may_be_back(row):
                self.originals.take_again(row.claim)
            elif row is None and self.journal.is_over(job):
                for name in self.orphans(job):  # it is where it was moved, too
                    self.disk.unlink(os.path.join(self.claim_folder(job), name))

    def _remove_responses(self) -> None:
        """Remove the responses of jobs that are over. One of a job that is not known stays: it may be paid for.

        If nothing is in its file, there is none: the process ended before, perhaps before it recorded the attempt.
        """
        with disk_errors(self.answers, "list the folder"):
            names = self.tops.names(self.answers)
        for job in {name.partition(".")[0] for name in names}:
            is_over = self.journal.is_over(job)
            for name in (name for name in names if name.startswith(f"{job}.")):
                path = os.path.join(self.answers, name)
                if is_over or (name.endswith(".part") and self._is_empty(path)):
                    self.disk.unlink(path)
        self.journal.forget_old()

    def _is_empty(self, path: str) -> bool:
        with disk_errors(path, "check the file"):
            return self.tops.lstat(path).st_size == 0

    def _remove_temporaries(self, unfinished: list[str]) -> None:
        """Remove what was about to be published when the daemon was killed."""
        keys = {job: key for job in unfinished if (key := self.key(job))}
        leftovers.remove(self.disk, self.destinations(), {job: folder for job, (folder, _) in keys.items()})

    def _drop_twins(self, unfinished: list[str]) -> None:
        """Remove from the inbox what is claimed already, before the first scan.

        After a power cut a file that was renamed into a claim may have its old name, too (btrfs, when only the claim
        folder was synced); so may one that was given back. A second claim of it would be paid for again.
        """
        for job in unfinished:
            with contextlib.suppress(SpoolError):
                if claim := self.record(job).claim():
                    self.originals.drop_twins(claim)

    def unfinished(self) -> list[str]:
        """Return the ids of all jobs that are not over, the oldest first, then those of which only files are left."""
        if self.journal.common.is_on:
            own = self.journal.common.own()  # also those of which it was not known that they were taken
            return [job for job in self.journal.unfinished() if job in own]
        known, claimed = self.journal.unfinished(), set(self._earlier.left())
        with disk_errors(self.claims, "list the folder"):
            if self.has_claims():
                # Where a file system keeps no owners, others can create folders here.
                claimed.update(filter(JOB.fullmatch, self.tops.names(self.claims, folders=True)))
        return [*known, *sorted(claimed.difference(known))]

    def key(self, job: str) -> tuple[str, str] | None:
        """Return folder and stem of a job; None if they are not known.

        If the journal does not know it, the claimed prompt has the stem; the folder is not known.
        """
        with contextlib.suppress(SpoolError):
            if claim := self.record(job).claim():
                return claim.folder, claim.stem
        with contextlib.suppress(SpoolError):
            for name in self.orphans(job):
                if name.endswith(SUFFIX):
                    return ANYWHERE, name.removesuffix(SUFFIX)
        return None

    def is_in_inbox(self, key: tuple[str, str]) -> bool:
        """Return whether there is a prompt of this folder and stem."""
        folder, stem = key
        return self.tops.exists(os.path.join(self.inbox, folder, stem + SUFFIX))

    def is_left(self, job: str) -> bool:
        """Return whether a job is not over, or a file of it is left."""
        if self.originals.claimed(job) or unreadable(self, job):
            return True
        with contextlib.suppress(SpoolError):  # while the journal cannot be used, it is not known
            try:
                return self.record(job).row is not None
            except DamagedJobError:
                self.journal.abandon(job)
                return False
        return True

    def orphans(self, job: str) -> list[str]:
        """Return the originals of a claim that the journal does not know: only a lost one leaves them behind."""
        return sorted(self.originals.claimed(job))

    @contextlib.contextmanager
    def working_on(self, job: str) -> Iterator[Callable[[], None]]:
        """Reach the claim of a job by one descriptor during the block, if it is there; else call what is returned."""
        with contextlib.ExitStack() as stack:

            def hold() -> None:
                if self.handover.is_on:  # a folder that another daemon has renamed must not be reached any more
                    return
                with contextlib.suppress(OSError):  # each step reports what is in its place
                    stack.enter_context(self.tops.held(self.claim_folder(job)))

            hold()
            yield hold

    def make_durable(self, claim: Claim) -> None:
        """Make durable what a process that died, or a call that failed, has left of a job.

        What can be seen may not be durable yet, and what comes next is decided by what is seen.
        """
        self.originals.drop_twins(claim)
        for folder in (self.answers, self.claims, self.claim_folder(claim.job)):
            if self.tops.is_folder(folder):
                self.disk.sync_folder(folder)
        if self.tops.is_folder(self.inbox_folder(claim)):
            self.disk.sync_folder(self.inbox_folder(claim))
        for folder in self.destinations():
            self._sync_inner(folder, claim.folder)

    def job_state(self, claim: Claim, record: Record) -> State:
        """Return what the disk shows of a job; what only the process knows is left at its default.

        Each folder is listed once, and only what is there is read.

        Args:
            claim: What was claimed.
            record: The job's record.
        """
        row = record.row
        if row is None:
            return State(leftovers=self.tops.exists(self.claim_folder(claim.job)))
        originals = set(self.originals.present(claim))
        (sent, answered), decision = record.attempts(), row.decision
        return State(
            recorded=True,
            claimed=claim.prompt in originals,
            originals=bool(originals),
            missing=any(
                name not in originals and self.originals.may_be_claimed(os.path.join(self.inbox_folder(claim), name))
                for name in claim.images
            ),
            sent=sent,
            answered=answered,
            begun=sent > answered and record.partial(sent) is not None,
            decided=decision.destination if decision else None,
            reopened=row.state == "reopened",
            returning=row.state == "returning",
            over=row.state == "published" or (decision is not None and self.delivery.is_published(claim, decision)),
        )

    def forget(self, record: Record, *, keep: bool = False, is_unknown: bool = False, is_late: bool = False) -> None:
        """Remove the claim folder, then end the record, then remove the responses: this order only.

        The originals were moved before; what other users put beside them stays.

        Args:
            record: Of the job.
            keep: Keep the record: its response was paid for, and an image may still be read from it.
            is_unknown: Whether another daemon may still find out how it ended.
            is_late: Whether a response came after that was decided: the responses stay.
        """
        self.ensure_claims()
        if self.handover.is_on:
            self.handover.clear(record.job, keep=keep or is_late)
        self.disk.remove_folder(self.claim_folder(record.job))  # not synced: see take_over
        if keep:
            record.keep()
        else:
            record.remove(is_unknown=is_unknown, is_late=is_late)
        self.journal.common.forget(record.job)


def _may_be_back(row: JobRow) -> bool:
    """Return whether a power cut may have put originals of a job back into the inbox.

    Before they go to ``errors`` it is made durable that they have left the inbox. Once the error file is published,
    what has the name there was put back by a person.
    """
    if row.state == "reopened":
        return False
    if row.decision is not None and row.decision.destination == "errors":
        return row.state != "published"
    return bool(row.attempts) or row.decision is not None
