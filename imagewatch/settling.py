"""Which stems are quiet enough to be taken. Pure; every clock is an argument.

A stem is settled when the prompt and all its candidate images have not changed for ``settle_seconds``, by our
own observation on the monotonic clock. A file seen for the first time brings its own history: its *ctime*,
which nobody can set, unlike mtime, which copies preserve and which is never looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from imagewatch.compact import Numbers

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


class Settling:
    """Remembers since when each stem is quiet.

    Args:
        settle_seconds: How long a stem must be quiet.
    """

    def __init__(self, settle_seconds: float) -> None:
        self.settle_seconds = settle_seconds
        # Thousands may have come within these seconds; as objects they would take a multiple, and for good.
        self._since = Numbers[float]("d")
        self._looks = Numbers[int]("q")  # of those that were observed since something happened to them
        self._looked = -math.inf

    def touch(self, key: Hashable, now: float) -> None:
        """Note that something happened to a stem: its clock starts again.

        Args:
            key: The stem, with its folder.
            now: Monotonic time, seconds.
        """
        self._looks.discard(key)
        self._since.set(key, now)

    def observe(self, key: Hashable, fingerprint: Hashable, *, changed_at: float, now: float, wall: float) -> float:
        """Note what a stem looks like.

        Args:
            key: The stem, with its folder.
            fingerprint: Anything that differs when any of its files differs.
            changed_at: The newest ctime of its files, seconds since the epoch.
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.

        Returns:
            Seconds until it is settled if nothing else happens; 0 when it is.
        """
        look, known, since = hash(fingerprint), self._looks.get(key), self._since.get(key)
        if since is None:
            since = -math.inf
        if known is None:
            # A ctime in the future (a clock that was set back) counts as now.
            quiet_before = min(max(wall - changed_at, 0.0), self.settle_seconds)
            # What an earlier look did not see is not older than that look, whatever a server's clock says.
            since = max(now - quiet_before, self._looked, since)
        elif known != look:
            since = now
        self._looks.set(key, look)
        self._since.set(key, since)
        return max(0.0, since + self.settle_seconds - now)

    def forget(self, key: Hashable) -> None:
        """Forget a stem: whoever asks remembers himself that it is settled."""
        self._looks.discard(key)
        self._since.discard(key)

    def keep_only(self, keys: Iterable[Hashable], looked: float = -math.inf) -> None:
        """Forget the stems that are gone.

        Args:
            keys: Those that are still there.
            looked: Monotonic time at which the look that saw them began, if it saw everything.
        """
        self._looked = looked
        self._looks.begin()
        self._since.begin()
        for key in keys:
            self._looks.find(key)
            self._since.find(key)
        self._looks.end()
        self._since.end()
