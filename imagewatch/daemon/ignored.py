"""Says of each file that will not be taken why, once; of very many not of all, so that no user can fill the log."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog

from imagewatch.inbox.candidate import first_level
from imagewatch.inbox.system_folders import HIDDEN, SYSTEM

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.inbox.candidate import Reasons

_HOUR = 3600.0
_MOST_OF_FOLDER, _MOST = 1000, 5000
"""How many lines there are in an hour: about the files of one first-level folder, and in all."""
_REMEMBERED = 10_000
_NOT_LOGGED = {HIDDEN, SYSTEM}
"""Such folders belong there, and some systems make one in each other folder. ``check`` and ``status`` name them."""
_log = structlog.get_logger()


class Ignored:
    """What the log has said about files that are not taken.

    Args:
        monotonic: Monotonic clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._now = monotonic
        self._told: set[tuple[str, str]] = set()
        self._lines: Counter[str] = Counter()
        self._since = monotonic()
        self._has_more = False

    def tell(self, ignored: Reasons) -> None:
        """Say of each file that was not named before why it is not taken."""
        if self._now() - self._since >= _HOUR:
            self._lines.clear()
            self._since, self._has_more = self._now(), False
        now = {(path, reason) for path, reason in ignored.items() if reason not in _NOT_LOGGED}
        is_more = ignored.total > len(ignored)
        for path, reason in sorted(now - self._told):
            folder = first_level(path.rpartition("/")[0])
            if self._lines[folder] >= _MOST_OF_FOLDER or self._lines.total() >= _MOST:
                is_more = True
                continue
            self._lines[folder] += 1
            self._told.add((path, reason))
            _log.warning("ignored", file=path, reason=reason)
        if is_more and not self._has_more:
            self._has_more = True
            _log.warning("ignored", count=ignored.total, reason="more files than are named")
        # Of very many now these are named and now those: each is said once all the same.
        if not is_more or len(self._told) > _REMEMBERED:
            self._told &= now
