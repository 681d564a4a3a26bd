"""Signals as messages to the main loop."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from imagewatch.daemon.mailbox import Mailbox, Signalled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


@contextlib.contextmanager
def as_messages(mailbox: Mailbox, on_stop: Callable[[], None]) -> Iterator[None]:
    """Put signals into the mailbox during the block; the first SIGTERM or SIGINT drains, the second one kills.

    Args:
        mailbox: Where the messages go.
        on_stop: Called in the signal handler itself before the daemon is asked to stop.
    """

    def handle(number: int, _: FrameType | None) -> None:
        if number != signal.SIGHUP:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            on_stop()
        mailbox.put(Signalled(number))

    before: dict[int, object] = {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller has the signals
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for taken, handler in before.items():
            signal.signal(taken, handler)  # type: ignore[arg-type]
