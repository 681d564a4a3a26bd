"""Which ignored files the log names: each once, with the reason; of very many not all, so that no user can fill it."""

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
"""How many lines the log has in an hour: for the files of one first-level folder, and in all."""
_REMEMBERED = 10_000
_NOT_LOGGED = {HIDDEN, SYSTEM}
"""Such folders belong there, and some systems create one in every folder. ``check`` and ``status`` name them."""
_log = structlog.get_logger()


class Ignored:
    """Names ignored files in the log.

    Args:
        monotonic: Monotonic clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._now = monotonic
        self._named: set[tuple[str, str]] = set()
        self._lines: Counter[str] = Counter()
        self._since = monotonic()
        self._has_more = False

    def log(self, ignored: Reasons) -> None:
        """Name each ignored file that was not named before."""
        if self._now() - self._since >= _HOUR:
            self._lines.clear()
            self._since, self._has_more = self._now(), False
        now = {(path, reason) for path, reason in ignored.items() if reason not in _NOT_LOGGED}
        is_more = ignored.total > len(ignored)
        for path, reason in sorted(now - self._named):
            folder = first_level(path.rpartition("/")[0])
            if self._lines[folder] >= _MOST_OF_FOLDER or self._lines.total() >= _MOST:
                is_more = True
                continue
            self._lines[folder] += 1
            self._named.add((path, reason))
            _log.warning("ignored", file=path, reason=reason)
        if is_more and not self._has_more:
            self._has_more = True
            _log.warning("ignored", count=ignored.total, reason="more files than are named")
        # Of very many, each scan may show others: each is named once all the same.
        if not is_more or len(self._named) > _REMEMBERED:
            self._named &= now
