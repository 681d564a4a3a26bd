"""The holds of a shared account, as this daemon applies them: the database has them, whichever daemon began them.

Belongs to the main thread.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from imagewatch.journal.account import PUT_ON_HOLD, SHARED
from imagewatch.journal.holds import Hold
from imagewatch.protocol.reasons import Reason
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.journal.account import Account, AccountHold
    from imagewatch.journal.holds import Holds


class SharedHolds:
    """Keeps the holds of this process equal to those of the account.

    Args:
        account: The holds of the account.
        holds: Those of this process.
        is_at_work: Returns whether a worker has a job now: its request may be a probe.
        monotonic: Monotonic clock, seconds.
    """

    def __init__(
        self, account: Account, holds: Holds, is_at_work: Callable[[str], bool], monotonic: Callable[[], float]
    ) -> None:
        self._account = account
        self._holds = holds
        self._is_at_work = is_at_work
        self._now = monotonic
        holds.shared = frozenset(SHARED if account.is_on else ())
        account.first_seconds = holds.first_seconds
        self.concerns = account.concerns

    def configure(self, deadline_seconds: float) -> None:
        """Take the longest time that a request may take."""
        self._account.probe_seconds = deadline_seconds + self._holds.grace_seconds

    def read(self) -> tuple[list[Hold], list[Hold]]:
        """Take the holds of the account; return those that have begun, and those that have ended.

        Raises:
            SpoolError: The database cannot be used.
        """
        if not self._account.is_on:
            return [], []
        now = self._now()
        return self._holds.set_shared({one.kind: self._hold(one, now) for one in self._account.holds()})

    def _hold(self, one: AccountHold, now: float) -> Hold:
        message = one.message or (PUT_ON_HOLD if one.is_manual else "")
        if one.is_manual:
            return Hold(Reason(one.kind, message, math.inf), now - one.age, now - one.age, math.inf, math.inf)
        own = one.prober if self._is_at_work(one.prober) else ""
        until = now + (one.forbids(own) or one.seconds)
        return Hold(Reason(one.kind, message), now - one.age, until - one.interval, until, one.interval)

    def probe_now(self) -> None:
        """Let the next probe be sent immediately.

        Raises:
            SpoolError: The database cannot be used.
        """
        if any(self._holds.has(kind) for kind in self._holds.shared):
            self._account.probe_now()

    def probe_soon(self) -> None:
        """Let the next probe be sent immediately, if the database can be used."""
        with contextlib.suppress(SpoolError):
            self.probe_now()

    def over(self, job: str, *, is_answered: bool) -> None:
        """Note that a worker has ended with a job; see ``Account.over``."""
        with contextlib.suppress(SpoolError):  # it is written later
            self._account.over(job, is_answered=is_answered)
