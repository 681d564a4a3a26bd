"""What the status file in the folders has about the queue, for the sender of a prompt.

The sender may have only the folders: no state folder, no log, no shell on the daemon's machine. The file is from a
folder that others may write, so it is information only: what was dropped stays dropped.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003  msgspec needs the type
from typing import TYPE_CHECKING

import msgspec

from imagewatch.protocol import notice
from imagewatch.system.text import local, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from imagewatch.config.schema import Config, Inbox
    from imagewatch.protocol.notice import HoldNotice, Notice

_NOT_RUNNING = "ask the administrator to start it"
SILENT = "the daemon is probably not running: it has not written its status since the prompt was dropped"
_SILENT_SECONDS = 30.0
"""A daemon finds a prompt after ``settle_seconds`` and ``rescan_seconds`` at most, and then has this long to write."""


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """Why a prompt is not processed soon; for programs, the key ``queue`` of a result.

    Attributes:
        state: ``on_hold`` or ``not_running``.
        message: Why.
        next: What to do.
        since: Since when, if that is known.
        next_try_at: When the daemon tries again automatically, if it does.
    """

    state: str
    message: str
    next: str
    since: datetime | None = None
    next_try_at: datetime | None = None


def silent_seconds(inbox: Inbox) -> float:
    """Return how many seconds after a prompt was dropped a daemon that runs has certainly written its status again."""
    return inbox.settle_seconds + inbox.rescan_seconds + _SILENT_SECONDS


class QueueReport:
    """Reports once that the queue is on hold or that the daemon is not running, and again if that changes.

    It is created before prompts are dropped: a daemon that runs writes its status again soon after it.

    Args:
        config: Where the status is.
        folder: The folder below the inbox into which prompts are dropped.
        provider: The provider that they name, if they name one.
        clock: Wall clock, seconds since the epoch.
        print_line: Prints a line for people.
    """

    def __init__(
        self,
        config: Config,
        folder: str,
        provider: str | None,
        clock: Callable[[], float],
        print_line: Callable[[str], None],
    ) -> None:
        self._place = config.folders.notice
        self._folder = folder.partition("/")[0]
        self._provider = None if provider == "auto" else provider
        self._clock = clock
        self._print = print_line
        self._reported: tuple[str, str] | None = None
        self._silent_seconds = silent_seconds(config.inbox)
        page = self._page()
        self._written_before = page.written_at if page else None
        self._dropped_at: float | None = None
        self._count = 0

    def read(self) -> QueueState | None:
        """Return why prompts are not processed soon; None if they are, or if that is not known."""
        page = self._page()
        return self._state(page) if page else None

    def _page(self) -> Notice | None:
        return notice.read(self._place) if self._place else None

    def _state(self, page: Notice) -> QueueState | None:
        if not page.is_running(self._clock()):
            return _not_running(page)
        if self._is_silent(page):
            return QueueState(state="not_running", message=SILENT, next=_NOT_RUNNING)
        holds = [hold for hold in page.holds if self._concerns(hold)]
        return _on_hold(holds[0]) if holds else None

    def _is_silent(self, page: Notice) -> bool:
        """Return whether prompts are in the inbox for so long that a daemon would have written its status again."""
        if self._dropped_at is None or not self._count or page.written_at != self._written_before:
            return False
        return self._clock() - self._dropped_at >= self._silent_seconds

    def _concerns(self, hold: HoldNotice) -> bool:
        if hold.folder is not None and hold.folder != self._folder:
            return False
        return hold.provider is None or self._provider in {None, hold.provider}

    def report(self, count: int) -> None:
        """Print it, if that differs from what was printed last.

        Args:
            count: How many prompts are in the inbox; first called when they were dropped.
        """
        self._count = count
        if self._dropped_at is None:
            self._dropped_at = self._clock()
        if not count:
            return
        page = self._page()
        if page is None:  # nothing is known, so nothing has ended
            return
        state = self._state(page)
        before, self._reported = self._reported, (state.state, state.message) if state else None
        if self._reported == before:
            return
        if state is None:
            was_on_hold = before is not None and before[0] == "on_hold"
            self._print("The queue is not on hold any more." if was_on_hold else "The daemon is running.")
            return
        next_try = f"; next try at {local(state.next_try_at.timestamp())}" if state.next_try_at else ""
        since = f" (since {local(state.since.timestamp())})" if state.since else ""
        it = "The prompt stays" if count == 1 else f"The {count:,} prompts stay"
        self._print(f"imagewatch: {printable(state.message)}{since}{next_try}")
        self._print(f"  {it} in the inbox. What to do: {printable(state.next)}")

    def as_json(self) -> dict[str, Any] | None:
        """Return the same for programs."""
        state = self.read()
        return msgspec.to_builtins(state) if state else None


def _not_running(page: Notice) -> QueueState:
    if page.state == "stopped":
        since = page.stopped_at or page.written_at
        message = "the daemon is not running: it was stopped"
    else:
        since = page.next_writing_at or page.written_at
        message = "the daemon is not running: its status is overdue"
    return QueueState(state="not_running", message=message, next=_NOT_RUNNING, since=since)


def _on_hold(hold: HoldNotice) -> QueueState:
    whose = ""
    if hold.folder is not None:
        whose = f" for the folder {hold.folder or 'inbox'}"
    elif hold.provider is not None:
        whose = f" for {hold.provider}"
    return QueueState(
        state="on_hold",
        message=f"the queue is on hold{whose} ({hold.kind}): {hold.message}",
        next=hold.next,
        since=hold.since,
        next_try_at=hold.next_try_at,
    )
