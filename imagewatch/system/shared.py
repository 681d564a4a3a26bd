"""One call for several threads: the same call for all of them, or one call with the things of all of them."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
_MOST_TOGETHER = 8
_PATIENCE = 0.1
"""How long others are waited for, seconds."""


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


class _Batch(Generic[T]):
    """What is done together."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self.errors: Mapping[int, Exception] = {}
        self.is_done = False


class Together(Generic[T]):
    """Does together, in one thread, what several threads ask for at about the same time.

    Args:
        act: Does it for several; returns the error of each that failed, by its number.
    """

    def __init__(self, act: Callable[[list[T]], Mapping[int, Exception]]) -> None:
        self._act = act
        self._open: _Batch[T] | None = None
        self._changed = threading.Condition()

    def do(self, item: T, expected: Callable[[], int]) -> None:
        """Return when it is done for an item.

        Args:
            item: The item.
            expected: Returns how many threads will ask for it soon, this one included; they are waited for a moment.

        Raises:
            Exception: That of this item.
        """
        with self._changed:
            is_first = self._open is None
            batch = self._open = self._open or _Batch()
            number = len(batch.items)
            batch.items.append(item)
            self._changed.notify_all()
            if is_first:
                self._changed.wait_for(lambda: len(batch.items) >= min(expected(), _MOST_TOGETHER), _PATIENCE)
                self._open = None
            else:
                self._changed.wait_for(lambda: batch.is_done)
        if is_first:
            self._end(batch)
        if (error := batch.errors.get(number)) is not None:
            raise error

    def _end(self, batch: _Batch[T]) -> None:
        try:
            batch.errors = self._act(batch.items)
        except BaseException as error:
            failed = error if isinstance(error, Exception) else RuntimeError("another thread was ended")
            batch.errors = dict.fromkeys(range(len(batch.items)), failed)
            raise
        finally:
            with self._changed:
                batch.is_done = True
                self._changed.notify_all()
