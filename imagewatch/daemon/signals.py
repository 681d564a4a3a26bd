"""Signals as messages to the main loop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from imagewatch.daemon.mailbox import Signalled, Woken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from imagewatch.daemon.mailbox import Mailbox

_TOGETHER_SECONDS = 0.5
"""So long after one signal to stop the other kind of it is taken for the same."""


@contextlib.contextmanager
def as_messages(mailbox: Mailbox, on_stop: Callable[[], None]) -> Iterator[None]:
    """Put signals into the mailbox during the block; the first SIGTERM or SIGINT drains, a second one kills.

    Both at nearly the same time are one: a program that started this one may pass on a Ctrl-C that both got.

    Args:
        mailbox: Where the messages go.
        on_stop: Called in the signal handler itself before the daemon is asked to stop.
    """
    first: list[float] = []

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            mailbox.put(Signalled(number))
            return
        now, is_first = time.monotonic(), not first
        first.append(now)
        signal.signal(number, signal.SIG_DFL)  # the next of its kind kills, also while this thread waits in the kernel
        if is_first:
            on_stop()
            mailbox.put(Signalled(number))
        elif now >= first[0] + _TOGETHER_SECONDS:
            signal.raise_signal(number)

    before: dict[int, object] = {}
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # not the main thread: the caller has the signals
            stack.enter_context(_waking(mailbox))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def _waking(mailbox: Mailbox) -> Iterator[None]:
    """Let each signal end the wait for a message during the block.

    Handlers run in the main thread. If several signals come together, the kernel may give them all to another thread,
    and the main thread, whose wait they do not interrupt, would notice them only with the next message.

    Raises:
        ValueError: This is not the main thread.
    """
    reading, writing = os.pipe()

    def wake() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while pipe.read(64):
                mailbox.put(Woken())

    with open(writing, "wb", buffering=0):
        os.set_blocking(writing, False)
        try:
            before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        except ValueError:
            os.close(reading)
            raise
        threading.Thread(target=wake, name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
