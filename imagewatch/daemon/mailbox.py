"""The messages of other threads and of signals to the main loop, in one queue."""

from __future__ import annotations

import contextlib
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from imagewatch.job.outcome import Outcome
    from imagewatch.system.errors import SpoolError

_MOST_AT_ONCE = 1000
"""How many messages are processed before anything else is done: a user who renames files all the time sends many."""


@dataclass(frozen=True)
class Hinted:
    """There are change events of the inbox."""


@dataclass(frozen=True)
class Signalled:
    """A signal came."""

    number: int


@dataclass(frozen=True)
class Woken:
    """A signal came, and its handler runs now; there is nothing else to do. See ``signals``."""


@dataclass(frozen=True)
class Saved:
    """The response to a request is on the local disk: its job needs no request any more."""

    job: str


@dataclass(frozen=True)
class Finished:
    """A worker has ended; its outcome or its exception is in the future."""

    job: str
    began: float
    future: Future[Outcome]


@dataclass(frozen=True)
class DiskFailed:
    """The local disk refuses a part of a response, for which a worker waits."""

    error: SpoolError


@dataclass(frozen=True)
class Notified:
    """Notifications were delivered, or failed."""


@dataclass(frozen=True)
class Asked:
    """A command, or another daemon of a shared account, may have asked for something."""


@dataclass(frozen=True)
class Offered:
    """A prompt is offered to the daemons of the inbox."""


Message = Hinted | Asked | Offered | Signalled | Woken | Saved | Finished | DiskFailed | Notified


class Mailbox:
    """The queue. Every thread and every signal handler may put messages into it; only the main loop takes them."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        """Put a message into the queue."""
        self._messages.put(message)

    def hint(self) -> None:
        """Put a message of the watcher into the queue."""
        self._messages.put(Hinted())

    def arrived(self) -> Iterator[Message]:
        """Return the messages that are there now."""
        for _ in range(self._messages.qsize()):
            yield self._messages.get()

    def wait(self, seconds: float) -> Iterator[Message]:
        """Wait for a message; return it and those behind it, up to the next one of the watcher.

        Its events are taken together, and more of them may come meanwhile.
        """
        with contextlib.suppress(queue.Empty):
            yield (message := self._messages.get(timeout=seconds))
            for _ in range(_MOST_AT_ONCE):
                if isinstance(message, Hinted):
                    return
                yield (message := self._messages.get_nowait())
