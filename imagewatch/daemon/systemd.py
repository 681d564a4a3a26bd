"""The state of the daemon for systemd: the notification protocol in a few lines, without a dependency.

Format: ``sd_notify(3)``. Without ``$NOTIFY_SOCKET`` every call does nothing.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_PATIENCE = 5.0
"""How long a message waits while the queue of the service manager is full, seconds: READY=1 is sent only once."""


class Notify:
    """The connection to the service manager.

    Args:
        environ: Environment with ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``, if systemd set them.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = environ.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(microseconds) / 1e6 if microseconds.isdigit() else None

    @property
    def is_connected(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def send(self, **fields: str) -> None:
        """Send fields such as ``READY="1"`` or ``STATUS="…"``; it is no error if the manager does not receive them."""
        if not self._address:
            return
        text = "\n".join(f"{name}={printable(value)}" for name, value in fields.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_PATIENCE)
            channel.sendto(text.encode(), self._address)
