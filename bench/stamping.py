"""A fast endpoint in a process of its own, which records when each request came.

    python bench/stamping.py

It prints its port and serves until its standard input ends. Responses are prepared bytes; of each body only the name
of the job is kept. ``GET /take?seconds=S&size=B`` returns the records since the last one. After it, each response of
one image of B bytes comes after S seconds. All times are those of ``CLOCK_MONOTONIC`` in nanoseconds, which all
processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from endpoint import Endpoint

SIZE = 1_500_000
"""Bytes of the image of an ordinary response."""
_JOB = re.compile(rb"job-[0-9]+")


@dataclass
class _State:
    """State shared by the connections."""

    seconds: float = 0.0
    response: bytes = b""
    stamps: list[tuple[str, int, int]] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0

    def respond_with(self, size: int) -> None:
        self.response = Endpoint.response(1, size).replace(b"Connection: close\r\n", b"")

    def take(self, path: bytes) -> bytes:
        """Set delay and size; return the records, and start new ones."""
        seconds, size = re.findall(rb"[0-9.]+", path)
        self.seconds = float(seconds)
        self.respond_with(int(size))
        page = json.dumps({"stamps": self.stamps, "most": self.most}).encode()
        self.stamps, self.most = [], self.in_flight
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page


class _Connection(asyncio.Protocol):
    """One connection: any number of requests, one after the other."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._data = b""
        self._began = 0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        state = self._state
        if not self._data:
            self._began = time.monotonic_ns()
            state.in_flight += 1
            state.most = max(state.most, state.in_flight)
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *([0-9]+)", head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        self._data = b""
        if head.startswith(b"GET /take"):
            state.in_flight -= 1
            self._transport.write(state.take(head.split()[1]))
            return
        job = _JOB.search(body)
        name = job[0].decode() if job else ""
        if state.seconds:
            asyncio.get_running_loop().call_later(state.seconds, self._reply, name, self._began)
        else:
            self._reply(name, self._began)

    def _reply(self, name: str, began: int) -> None:
        self._state.in_flight -= 1  # before the client can read the response and send another request
        self._state.stamps.append((name, began, time.monotonic_ns()))
        self._transport.write(self._state.response)


class Stamping:
    """The endpoint in its process; ``with`` starts and ends it."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.base_url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def take(self, seconds: float = 0.0, size: int = 2000) -> dict[str, Any]:
        """Return ``stamps`` (job, first byte, response) and ``most`` (in flight at the same time) since the last call.

        Args:
            seconds: How long each response takes from now on.
            size: Bytes of its image.
        """
        with urllib.request.urlopen(f"{self.base_url}/take?seconds={seconds}&size={size}", timeout=30) as response:
            return json.load(response)


async def _serve() -> None:
    state = _State()
    state.respond_with(2000)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(state), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve())
