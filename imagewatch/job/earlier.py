"""The state folder of an earlier version: its job records become rows of the journal, their responses move.

::

    state/jobs/ID/claim.json      what was claimed
                  sent.N          attempt N: it was written before the first byte left
                  answer.N        its response; answer.N.part while it arrived
                  image.K, fetched.K, raw
                  decision.json   how the job ends
                  over            its result file is published
                  reopened.json   the decision that was withdrawn
    state/paid/ID                 the same of a job that was paid for and gave no image

It is done before anything else at each start, and can be interrupted at any time.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, TypeVar

import structlog

from imagewatch.protocol.values import Claim, Decision, Sent, load, load_decision
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.job.folders import JobFolders

T = TypeVar("T")
JOBS, PAID = "jobs", "paid"
_FILES = re.compile(r"answer\.[0-9]{1,4}(\.part)?|image\.[0-9]{1,4}|fetched\.[0-9]{1,4}|raw")
_SENT = re.compile(r"sent\.([0-9]{1,4})")
_log = structlog.get_logger()


class Earlier:
    """Imports the job records of an earlier version.

    Args:
        folders: All folders.
    """

    def __init__(self, folders: JobFolders) -> None:
        self._folders = folders
        self._disk = folders.disk
        self._tops = [os.path.join(folders.state, name) for name in (JOBS, PAID)]

    def left(self) -> list[str]:
        """Return the jobs whose record could not be read."""
        return [job for top in self._tops for job in self._names(top)]

    def adopt(self) -> None:
        """Import everything that can be read.

        Raises:
            SpoolError: The disk failed.
        """
        if any(self._folders.tops.exists(top) for top in self._tops):
            self._adopt_all()
        if lost := self._folders.journal.close_lost(self.left()):
            _log.warning("results_lost", requests=lost, reason="the requests may have been charged")

    def _adopt_all(self) -> None:
        for top in self._tops:
            for job in self._names(top):
                with contextlib.suppress(_UnreadableError):
                    self._adopt(top, job)
        for top in self._tops:
            if not self._names(top):
                self._disk.remove_folder(top)
        self._disk.sync_folder(self._folders.state)

    def _names(self, top: str) -> list[str]:
        with disk_errors(top, "list the folder"), contextlib.suppress(FileNotFoundError):
            return sorted(self._folders.tops.names(top, folders=True))
        return []

    def _adopt(self, top: str, job: str) -> None:
        folder = os.path.join(top, job)
        names = self._folders.tops.names(folder)
        if "claim.json" in names:
            claim = self._read(folder, "claim.json", lambda raw: load(raw, Claim))
            self._write(top, folder, claim, names)
        elif self._folders.tops.is_folder(self._folders.claim_folder(job)) and self._folders.tops.names(
            self._folders.claim_folder(job), folders=False
        ):
            return  # its originals are claimed, and nothing says where they belong
        for name in filter(_FILES.fullmatch, names):
            self._disk.replace(os.path.join(folder, name), os.path.join(self._folders.answers, f"{job}.{name}"))
        self._disk.sync_folder(self._folders.answers)
        for name in self._folders.tops.names(folder):
            self._disk.unlink(os.path.join(folder, name))
        self._disk.remove_folder(folder)
        self._disk.sync_folder(top)

    def _write(self, top: str, folder: str, claim: Claim, names: list[str]) -> None:
        decision, sent = self._decision(folder, "decision.json", names), {}
        for name in names:
            # Once it is decided how the job ends, a damaged record of a request is not needed any more.
            with contextlib.suppress(*[_UnreadableError] if decision else []):
                if found := _SENT.fullmatch(name):
                    sent[int(found[1])] = self._read(folder, name, lambda raw: load(raw, Sent))
        withdrawn = self._decision(folder, "reopened.json", names)
        state = "open"
        if withdrawn is not None and decision is None:
            state, decision = "reopened", withdrawn
        elif decision is not None and os.path.basename(top) == PAID:
            state = "kept"
        elif decision is not None:
            state = "published" if "over" in names else "decided"
        self._folders.journal.adopt(claim, state, decision, dict(sorted(sent.items())))

    def _decision(self, folder: str, name: str, names: list[str]) -> Decision | None:
        return self._read(folder, name, load_decision) if name in names else None

    def _read(self, folder: str, name: str, read: Callable[[bytes], T]) -> T:
        path = os.path.join(folder, name)
        with disk_errors(path, "read"), open(self._folders.tops.open_file(path, os.O_RDONLY), "rb") as file:
            raw = file.read()
        try:
            return read(raw)
        except ValueError as error:
            raise _UnreadableError(str(error)) from error


class _UnreadableError(Exception):
    """A record is damaged."""


def unreadable(folders: JobFolders, job: str) -> SpoolError | None:
    """Return the error for a job whose record of an earlier version could not be imported, or None."""
    for name in (JOBS, PAID):
        path = os.path.join(folders.state, name, job)
        if folders.tops.is_folder(path):
            return SpoolError(
                f"the job record of an earlier version cannot be read: {path}",
                path=path,
                hint="do not remove it before you have read it: it may be the only proof of a charge",
            )
    return None
