"""Reports that a daemon runs, and receives notifications about its account.

A thread of its own, with a connection of its own. What it misses while that is lost is asked for when it is back, and
regularly. Nothing depends on it except for how soon something is noticed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import psycopg
import structlog

from imagewatch.journal.postgres.schema import CHANNEL, OFFERS
from imagewatch.journal.postgres.session import Session
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.journal.postgres.place import Place

_log = structlog.get_logger()
_RETRY_SECONDS = 5.0
_STEP_SECONDS = 1.0
"""How often the thread checks whether it is to end, seconds."""
_SEEN = """
    UPDATE imagewatch.instances SET seen_at = extract(epoch FROM clock_timestamp()), status = ?, slots = ?,
        ended_at = NULL, forgotten_at = NULL
    WHERE account = current_setting('imagewatch.account') AND name = current_setting('imagewatch.instance')
    AND incarnation = ?"""

_NEWER = """
    SELECT 1 FROM imagewatch.instances WHERE account = current_setting('imagewatch.account')
    AND name = current_setting('imagewatch.instance') AND incarnation > ?"""


class Presence:
    """Lets others see that the daemon runs.

    Args:
        place: Which account and instance.
        incarnation: Which start of the daemon this is.
        interval: How often it is to be seen, seconds.
        page: Returns what others may know of its state, as JSON, and how many requests it sends at the same time.
        tick: Called each time.
        on_change: Called when something of the account may have changed.
        on_offer: Called when a prompt of the inbox is offered.
        on_replaced: Called when another daemon was started with the same name.
    """

    def __init__(
        self,
        place: Place,
        incarnation: int,
        interval: float,
        page: Callable[[], tuple[str, int]],
        tick: Callable[[], object],
        on_change: Callable[[], object],
        on_offer: Callable[[], object],
        on_replaced: Callable[[], object],
    ) -> None:
        self._place = place
        self._incarnation = incarnation
        self._interval = interval
        self._page = page
        self._tick = tick
        self._on_change = on_change
        self._on_replaced = on_replaced
        self._calls = {(CHANNEL, place.account): on_change, (OFFERS, f"{place.account}\n{place.inbox}"): on_offer}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(_STEP_SECONDS * 3)

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                session = Session(self._place, "presence", {"statement_timeout": "10s"})
                with contextlib.closing(session):
                    self._stay(session)
            except (psycopg.Error, SpoolError):
                pass  # what uses the database reports it
            except Exception:  # noqa: BLE001  the next time may not hit it
                _log.exception("internal_error", next="report this as a bug")
            self._on_change()
            self._end.wait(_RETRY_SECONDS)

    def _stay(self, session: Session) -> None:
        """Be seen, and listen, until the connection is lost."""
        for channel in (CHANNEL, OFFERS) if self._place.is_common else (CHANNEL,):
            session.execute(f"LISTEN {channel}")
        self._on_change()
        while not self._end.is_set():
            self._tick()
            if not session.execute(_SEEN, (*self._page(), self._incarnation)).rowcount:
                newer = session.execute(_NEWER, (self._incarnation,)).fetchone()
                if newer is not None:
                    self._on_replaced()
            self._on_change()
            until = time.monotonic() + self._interval
            while (left := until - time.monotonic()) > 0 and not self._end.is_set():
                for notice in session.raw.notifies(timeout=min(left, _STEP_SECONDS), stop_after=1):
                    if call := self._calls.get((notice.channel, notice.payload)):
                        call()
