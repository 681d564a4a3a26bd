"""Which prompts have been unchanged for long enough. Pure; every clock is an argument.

A stem is settled when the prompt and all its candidate images have not changed for ``settle_seconds``, by our
own observation on the monotonic clock. For a file seen for the first time, its *ctime* counts, which no program can
set. Its mtime is ignored: copies preserve it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

_Quiet = tuple[float, int | None]
"""Since when a prompt is unchanged, and its fingerprint if nothing happened to it since."""


class Settling:
    """Remembers since when each prompt is unchanged.

    Args:
        settle_seconds: How long a prompt must be unchanged.
        scanned_at: Monotonic time at which the last complete scan began, seconds.
    """

    __slots__ = ("_before", "_now", "_scanned_at", "settle_seconds")

    def __init__(self, settle_seconds: float, scanned_at: float = -math.inf) -> None:
        self.settle_seconds = settle_seconds
        self._before: dict[Hashable, _Quiet] = {}  # as of the last scan
        self._now: dict[Hashable, _Quiet] = {}  # what was noted since
        self._scanned_at = scanned_at

    def __len__(self) -> int:
        """Return of how many stems something was noted by the last scan or since."""
        return len(self._before) + len(self._now)

    def touch(self, key: Hashable, now: float) -> None:
        """Note that something happened to a stem: its clock starts again.

        Args:
            key: The stem, with its folder.
            now: Monotonic time, seconds.
        """
        self._now[key] = now, None

    def observe(
        self,
        key: Hashable,
        fingerprint: Hashable,
        *,
        changed_at: float,
        now: float,
        wall: float,
        seen: float | None = None,
    ) -> float:
        """Note the fingerprint of a prompt.

        Args:
            key: The stem, with its folder.
            fingerprint: Anything that differs when any of its files differs.
            changed_at: The newest ctime of its files, seconds since the epoch.
            now: Monotonic time before its files were looked at, seconds.
            wall: Wall-clock time, seconds since the epoch.
            seen: Monotonic time after that, seconds; ``now`` without.

        Returns:
            Seconds until it is settled if nothing else happens; 0 when it is. Then it is forgotten here: the caller
            remembers it.
        """
        state = hash(fingerprint)
        late = 0.0 if seen is None else max(seen - now, 0.0)  # so long after ``now`` it may have changed
        since, known = self._now.get(key) or self._before.get(key) or (None, None)
        if since is None or known is None:
            # A ctime in the future (a clock that was set back) counts as now.
            unchanged_before = min(max(wall - changed_at, 0.0), self.settle_seconds)
            # What an earlier scan did not find is not older than that scan, whatever a server's clock shows.
            since = max(now - unchanged_before, self._scanned_at, -math.inf if since is None else since)
        elif known != state:
            since = now
        else:
            late = 0.0
        left = max(0.0, since + self.settle_seconds - now)
        if left:
            self._now[key] = since + late, state
        return left

    def forget_others(self, scanned_at: float = -math.inf) -> None:
        """Forget the stems of which nothing was noted since this was called before: they were removed.

        Args:
            scanned_at: Monotonic time at which the scan began that ends now, if it was complete.
        """
        self._scanned_at = scanned_at
        self._before, self._now = self._now, {}
