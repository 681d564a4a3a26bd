"""When prompts came, for the burst guard: how many came at the same time."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from imagewatch.protocol.names import stem_of
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from imagewatch.daemon.parts import Parts
    from imagewatch.inbox.candidate import Candidate


class Arrivals:
    """Counts the prompts that came.

    Args:
        parts: The daemon's parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._are_counted = True

    def changed(self) -> None:
        """Note that a prompt came: all are counted before another one is claimed."""
        self._are_counted = False

    def count_new(self) -> None:
        """Count how many prompts came at the same time, if any came since this was done last."""
        if not self._are_counted:
            self.count()

    def count(self) -> None:
        """Count how many prompts came at the same time; if they are too many, the queue is put on hold."""
        self._are_counted = True
        self._parts.admission.count(self.times(), self.is_finished)

    def times(self) -> dict[str, float]:
        """Return when each prompt in the inbox came, also of those that may change still; seconds since the epoch."""
        if not self._parts.config.limits.burst:
            return {}
        intake, spool = self._parts.intake, self._parts.spool
        found, taken = intake.arrived(), self._parts.team.taken()
        for path in intake.result.waiting:
            folder, _, name = path.rpartition("/")
            if (folder, stem_of(name)) in taken:
                continue  # it waited when its folder was scanned last, and is being claimed since
            with contextlib.suppress(OSError):
                changed = spool.tops.lstat(os.path.join(spool.inbox, path)).st_ctime
                found[path] = max(changed, intake.came(folder))
        return found

    def is_finished(self, source: str) -> bool:
        """Return whether a prompt in the inbox has path, size and mtime of one that is over."""
        if self._parts.config.inbox.redelivery != "skip":
            return False
        spool = self._parts.spool
        with contextlib.suppress(OSError, SpoolError):
            status = spool.tops.lstat(os.path.join(spool.inbox, source))
            return bool(self._parts.ledger.finished("", source, status.st_size, status.st_mtime_ns))
        return False

    def claimed(self, candidate: Candidate) -> None:
        """Count a prompt that is claimed: others that came at the same time may follow."""
        # What was unchanged for long enough was counted together with all that had come until then.
        may_count = candidate.is_local or not candidate.was_unchanged
        if self._parts.config.limits.burst and may_count and not self.is_finished(candidate.source):
            came = max(candidate.changed_at, self._parts.intake.came(candidate.key[0]))
            self._parts.admission.burst.claimed(candidate.source, came, is_dated=candidate.is_local)
