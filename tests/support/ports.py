"""Ports on 127.0.0.1 that stay free while a server is stopped."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 15_000


def is_free(port: int) -> bool:
    """Whether a server can listen on a port now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A free port that the kernel gives to no client and to no server that lets it choose.

    A server can be stopped and started again on it.
    """
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    first_given = int(text.split()[0])
    ports = range(_LOWEST, first_given) if first_given > _LOWEST + 1000 else range(5_000, _LOWEST)
    return next(port for port in iter(lambda: random.choice(ports), None) if is_free(port))
