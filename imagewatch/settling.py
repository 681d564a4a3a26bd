"""Which stems are quiet enough to be taken. Pure; every clock is an argument.

A stem is settled when the prompt and all its candidate images have not changed for ``settle_seconds``, by our
own observation on the monotonic clock. A file seen for the first time brings its own history: its *ctime*,
which nobody can set, unlike mtime, which copies preserve and which is never looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable


@dataclass(slots=True)
class _Watched:
    fingerprint: Hashable
    since: float


class Settling:
    """Remembers since when each stem is quiet.

    Args:
        settle_seconds: How long a stem must be quiet.
    """

    def __init__(self, settle_seconds: float) -> None:
        self.settle_seconds = settle_seconds
        self._watched: dict[Hashable, _Watched] = {}
        self._looked = -math.inf

    def touch(self, key: Hashable, now: float) -> None:
        """Note that something happened to a stem: its clock starts again.

        Args:
            key: The stem, with its folder.
            now: Monotonic time, seconds.
        """
        self._watched[key] = _Watched(None, now)

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
        known = self._watched.get(key)
        if known is not None and known.fingerprint is not None:
            since = known.since if known.fingerprint == fingerprint else now
        else:
            # A ctime in the future (a clock that was set back) counts as now.
            quiet_before = min(max(wall - changed_at, 0.0), self.settle_seconds)
            # What an earlier look did not see is not older than that look, whatever a server's clock says.
            since = max(now - quiet_before, self._looked)
            if known is not None:
                since = max(since, known.since)
        self._watched[key] = _Watched(fingerprint, since)
        return max(0.0, since + self.settle_seconds - now)

    def forget(self, key: Hashable) -> None:
        """Forget a stem: whoever asks remembers himself that it is settled."""
        self._watched.pop(key, None)

    def keep_only(self, keys: Collection[Hashable], looked: float = -math.inf) -> None:
        """Forget the stems that are gone.

        Args:
            keys: Those that are still there.
            looked: Monotonic time at which the look that saw them began, if it saw everything.
        """
        self._looked = looked
        self._watched = {key: seen for key, seen in self._watched.items() if key in keys}
