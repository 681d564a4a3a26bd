"""The sandbox for its callers: binds an address, serves it and stops."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from imagewatch.sandbox.books import Books
from imagewatch.sandbox.delivery import Deliveries
from imagewatch.sandbox.server import Server
from imagewatch.sandbox.service import Service
from imagewatch.system.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self


class Sandbox:
    """A strict local endpoint that speaks the wire format of the real one and counts what it charged.

    The address is bound on construction, so ``base_url`` is valid immediately. Use it as a context manager, with
    ``start`` and ``stop``, or in the foreground with ``serve_forever``.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes any free one.
        key: The key that must be sent; ``None`` accepts any.
        latency_seconds: Delay before each response to a request for images.
        url_lifetime_seconds: How long a signed URL is valid.
        clock: Monotonic clock, seconds; for the expiry of URLs and the times in the report.
        on_request: Called with one line per HTTP request, from any thread.

    Attributes:
        base_url: Where it listens, e.g. ``http://127.0.0.1:40123``.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str | None = None,
        latency_seconds: float = 0.0,
        url_lifetime_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        on_request: Callable[[str], None] | None = None,
    ) -> None:
        self._served = False
        try:
            self._server = Server((host, port))
        except (OSError, OverflowError) as error:
            reason = f"cannot listen on {host}:{port}: {error}"
            raise ConfigError([Problem("sandbox", reason, "choose another host or port")]) from error
        self.base_url = f"http://{host}:{self._server.server_address[1]}"
        self._books = Books(clock)
        self._service = Service(
            self._books,
            Deliveries(self.base_url, url_lifetime_seconds, clock),
            key=key,
            latency_seconds=latency_seconds,
            on_request=on_request,
        )
        self._server.service = self._service

    @property
    def key(self) -> str | None:
        """The key that must be sent; ``None`` accepts any."""
        return self._service.key

    @key.setter
    def key(self, key: str | None) -> None:
        self._service.key = key

    @property
    def balance(self) -> float | None:
        """Credits left; ``None`` is unlimited. A request that costs more gets a 402."""
        return self._books.balance

    @balance.setter
    def balance(self, credits_left: float | None) -> None:
        self._books.balance = credits_left

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve in the background."""
        self._served = True
        threading.Thread(target=self._server.serve_forever, daemon=True, name="sandbox").start()

    def serve_forever(self) -> None:
        """Serve in the foreground until interrupted or stopped from another thread."""
        self._served = True
        try:
            self._server.serve_forever()
        finally:
            self._close()

    def stop(self) -> None:
        """Stop serving. Requests that wait are cut off without a response, as if the server crashed."""
        self._service.stopping.set()
        if self._served:
            self._server.wake()
            self._server.shutdown()
        self._close()

    def hold(self) -> None:
        """Delay the response of each request after it was recorded and charged, until ``release``."""
        self._service.gate.clear()

    def release(self) -> None:
        """Send the responses that wait."""
        self._service.gate.set()

    def wait_for_requests(self, count: int, timeout: float) -> bool:
        """Wait until requests were received completely and recorded.

        Args:
            count: How many, since construction.
            timeout: Seconds to wait at most.

        Returns:
            Whether there were so many in time.
        """
        return self._books.wait_for(count, timeout)

    def report(self) -> dict[str, Any]:
        """Return what was requested and charged so far; the same as ``GET /sandbox/report``."""
        return self._books.report()

    def _close(self) -> None:
        """End what waits and close everything."""
        self._service.stopping.set()
        self._service.gate.set()
        self._server.server_close()
        self._server.cut_all(timeout=5.0)
