"""How many attempts a daemon has recorded in a shared database, in a file of its state folder.

A database that was restored from a backup, or a standby that took over without the newest commits, has fewer. It would
let requests be sent again that it does not have. The file is written in its place after each commit and is not synced:
it survives a kill of the daemon, but not always a power cut of its host.
"""

from __future__ import annotations

import contextlib
import os

FILE = "recorded"
_DIGITS = 20
_MODE = 0o600


class Counted:
    """The file.

    Args:
        state: The state folder.
    """

    def __init__(self, state: str) -> None:
        self._path = os.path.join(state, FILE)

    def read(self) -> int:
        """Return the number; 0 without a file, or if it cannot be read."""
        with contextlib.suppress(OSError, ValueError), open(self._path, "rb") as file:
            return int(file.read(_DIGITS + 1))
        return 0

    def write(self, count: int) -> None:
        """Write the number; on a full disk it is not needed."""
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self._path, flags, _MODE)
            try:
                os.pwrite(file, b"%020d\n" % count, 0)
            finally:
                os.close(file)
