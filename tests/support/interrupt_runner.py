"""Run ``submit``; from one step of its disk on, every step sends a signal to the process.

Arguments: the signal's number, how the step's path ends, then those of ``submit``.
"""

from __future__ import annotations

import os
import sys

from imagewatch.commands import drop as sender
from imagewatch.commands import main as cli
from support.losing import SteppingDisk


class InterruptedDisk(SteppingDisk):
    """A real disk for an impatient user.

    Args:
        number: The signal.
        ending: How the path of the first step ends at which it is sent.
    """

    def __init__(self, number: int, ending: str) -> None:
        self._number = number
        self._ending = ending
        self._has_begun = False

    def step(self, _: str, path: str) -> None:
        self._has_begun = self._has_begun or path.endswith(self._ending)
        if self._has_begun:
            os.kill(os.getpid(), self._number)


disk = InterruptedDisk(int(sys.argv.pop(1)), sys.argv.pop(1))
sender.Disk = lambda: disk  # type: ignore[assignment, misc]
cli.main()
