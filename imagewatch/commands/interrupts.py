"""Signals that ask a command to stop, obeyed only where the command can report what it has done.

Python turns Ctrl-C into an exception between any two steps, and SIGTERM and SIGHUP (a closed terminal) end the process
without one. A command whose work will be charged must not end like that.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked this command to stop.

    Attributes:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """While this block lasts, the first of SIGINT, SIGTERM and SIGHUP raises ``Interrupted``; later ones are ignored.

    A signal that this process was started to ignore (``nohup``) is still ignored. Only for the main thread.
    """

    def __init__(self) -> None:
        self._number = 0
        self._is_kept = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError):  # a handler that was not set from Python
                signal.signal(number, handler)

    def keep(self) -> None:
        """From now on only note a signal, because the next steps belong together. ``obey`` ends this."""
        self._is_kept = True

    def check(self) -> None:
        """Raise the signal that was noted.

        Raises:
            Interrupted: There was a signal.
        """
        if self._number:
            raise Interrupted(self._number)

    def obey(self) -> None:
        """Raise the signal that was noted, and from now on each one immediately.

        Raises:
            Interrupted: There was a signal.
        """
        self._is_kept = False
        self.check()

    def _note(self, number: int, _frame: object) -> None:
        if self._number:
            return  # the command is stopping already, and must finish its report
        self._number = number
        if not self._is_kept:
            raise Interrupted(number)
