"""What prompts may cost before they are dropped: from the ledger, or without one from receipts in the outbox.

A sender who has only the folders has no ledger. The receipts have the same charges; any user may have written them, so
they are only shown.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import sys
from typing import TYPE_CHECKING, Any

from imagewatch.commands.ledger import open_budget
from imagewatch.commands.row_states import read_result
from imagewatch.journal.prices import Asked, Expected, expected, for_an_image, kind_of
from imagewatch.protocol.names import RECEIPT
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import amount

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from imagewatch.config.schema import Config

_MOST_RECEIPTS = 300
"""So many of the newest are read."""
_MOST_BYTES = 200_000
"""Of one of them: the text of a prompt may be as long as that."""


class Costs:
    """Estimates requests.

    Args:
        config: The state folder, and the outbox.
        folder: The folder below the outbox whose receipts are read, beside those of the outbox itself.
        blind: Only the folders are known: the state folder is not that of the daemon.
    """

    def __init__(self, config: Config, folder: str, *, blind: bool) -> None:
        self._config = config
        self._folder = folder
        self._blind = blind
        self._charges: dict[str, dict[str, list[float]]] = {}

    def of(self, requests: Iterable[Mapping[str, Any]]) -> list[Expected | None]:
        """Return what each request may cost; None if no similar one was charged.

        Args:
            requests: The body of each, without text and images; empty if it is not known.
        """
        asked = [Asked.of(fields) if fields else None for fields in requests]
        found: list[Expected | None] = [None] * len(asked)
        if not self._blind:
            with contextlib.suppress(SpoolError), open_budget(self._config) as budget:
                known: dict[Asked, Expected] = {}
                for at, one in enumerate(asked):
                    if one:
                        found[at] = known.setdefault(one, budget.cost(one)) if one not in known else known[one]
        if not any(one and one.seen for one in found):
            self._charges = self._charges or _from_receipts(self._config.folders.outbox, self._folder)
            found = [expected(one, self._charges.get(one.provider, {}), 0.0) if one else None for one in asked]
        return [one if one and one.seen else None for one in found]


def _from_receipts(outbox: str, folder: str) -> dict[str, dict[str, list[float]]]:
    """Return what was charged for an image, by provider and kind of request."""
    charges: dict[str, dict[str, list[float]]] = {}
    for path in _newest({outbox, os.path.join(outbox, folder)}):
        facts = read_result(path, _MOST_BYTES)
        credits_, fields = charge(facts), facts.get("request")
        if credits_ and isinstance(fields, dict):
            asked = Asked.of(fields)
            of_provider = charges.setdefault(asked.provider, {})
            of_provider.setdefault(kind_of(fields), []).append(for_an_image(credits_, asked.n))
    return charges


def charge(facts: Mapping[str, Any]) -> float | None:
    """Return what a receipt says was charged; a value that cannot be a charge counts as none."""
    value = facts.get("credits_charged")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    return None


def _newest(folders: Iterable[str]) -> list[str]:
    found = []
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(RECEIPT):
                    with contextlib.suppress(OSError):
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
    return [path for _, path in heapq.nlargest(_MOST_RECEIPTS, found)]


def total(costs: Iterable[Expected | None]) -> str:
    """Return the expected cost of several requests as a sentence."""
    costs = list(costs)
    known = [one for one in costs if one is not None]
    unknown = len(costs) - len(known)
    if not known:
        return "The cost is not known: no similar request was charged lately."
    low, high = (sum(getattr(one, name) or 0.0 for one in known) for name in ("low", "high"))
    rest = f", and {unknown} of unknown cost" if unknown else ""
    return f"Expected cost: {span(low, high)} credits{rest}."


def span(low: float, high: float) -> str:
    """Return a range of credits."""
    return amount(low) if low == high else f"{amount(low)} to {amount(high)}"
