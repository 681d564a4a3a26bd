"""What was requested and charged. It is recorded before a byte of the response is written."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING, Any, Final

from imagewatch.sandbox.contract import not_enough

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_CALLS: Final = 10_000


class Books:
    """What was requested and charged. Safe to use from several threads; only complete entries are visible."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.balance: float | None = None
        self._clock = clock
        self._changed = threading.Condition()
        self._calls: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MAX_CALLS)
        self._faults: collections.deque[str] = collections.deque(maxlen=100)
        self._used: collections.OrderedDict[tuple[str, str], int] = collections.OrderedDict()
        self._counts = dict.fromkeys(
            ("requests", "charged", "credits", "bearer_at_image_host", "redirected", "delivered"), 0
        )

    def enter(self, seen: dict[str, Any], status: int, cost: int) -> None:
        """Record a request and subtract its cost, or refuse it if the balance is too low."""
        with self._changed:
            if self.balance is not None and cost:
                if cost > self.balance:
                    raise not_enough(cost, self.balance)
                self.balance -= cost
            self._calls.append({**seen, "status": status, "credits": cost, "at": self._clock()})
            self._counts["requests"] += 1
            self._counts["charged"] += bool(cost)
            self._counts["credits"] += cost
            self._changed.notify_all()

    def count(self, name: str) -> None:
        """Count something that is not a request."""
        with self._changed:
            self._counts[name] += 1

    def fault(self, text: str) -> None:
        """Record an error of the sandbox itself for the report; nothing is written to stderr."""
        with self._changed:
            self._faults.append(text)

    def first(self, limit: int, who: str, what: str) -> bool:
        """Count a use of a limited tag; return whether it still applies."""
        with self._changed:
            used = self._used.pop((who, what), 0) + 1
            self._used[who, what] = used
            while len(self._used) > _MAX_CALLS:
                self._used.popitem(last=False)
            return used <= limit

    def wait_for(self, count: int, timeout: float) -> bool:
        """Wait until that many requests are recorded."""
        with self._changed:
            return self._changed.wait_for(lambda: self._counts["requests"] >= count, timeout)

    def report(self) -> dict[str, Any]:
        """Return all of it, for the report."""
        with self._changed:
            calls = [{**call, "inputs": [*call["inputs"]], "images": [*call["images"]]} for call in self._calls]
            return {**self._counts, "faults": list(self._faults), "calls": calls}
