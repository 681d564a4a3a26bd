"""One call for several threads that want the same."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class _Turns:
    """The calls of one kind: how many have begun, how many are done, and whether one is under way."""

    def __init__(self) -> None:
        self.begun = self.done = 0
        self.is_running = False


class Shared:
    """Shares calls that have the same effect for all who ask for it. A call serves those who asked before it began."""

    def __init__(self) -> None:
        self._turns: defaultdict[str, _Turns] = defaultdict(_Turns)
        self._changed = threading.Condition()

    def share(self, key: str, call: Callable[[], object]) -> None:
        """Return when a call has succeeded that began after this was called; make it, or wait for another thread's.

        Args:
            key: What the call is about.
            call: Makes it. Its error is that of the thread that made it; the others try it themselves.
        """
        with self._changed:
            turns = self._turns[key]
            mine = turns.begun + 1
            while turns.done < mine and turns.is_running:
                self._changed.wait()
            if turns.done >= mine:
                return
            turns.is_running = True
            turns.begun += 1
            number = turns.begun
        try:
            call()
        except BaseException:
            self._end(turns, turns.done)
            raise
        self._end(turns, number)

    def _end(self, turns: _Turns, done: int) -> None:
        with self._changed:
            turns.is_running, turns.done = False, done
            self._changed.notify_all()
