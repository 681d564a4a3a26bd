"""What the status shows of each first-level folder: how many prompts wait in it, and what of its budget is spent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import FolderBudget
    from imagewatch.journal.budget import Budget
    from imagewatch.journal.journal import Journal

_MOST = 100
"""At most so many folders in which prompts wait are named."""


class ByFolder:
    """Makes that part of the status.

    Args:
        journal: What was spent.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._last: dict[str, tuple[float, float, float]] = {}

    def page(self, waiting: Mapping[str, int], budgets: Mapping[str, FolderBudget]) -> dict[str, Any]:
        """Return further keys of the status; what was spent stays as it was if the ledger cannot be read.

        Args:
            waiting: How many prompts wait in each first-level folder; empty: directly in the inbox.
            budgets: The budgets, by first-level folder.
        """
        most = sorted(waiting.items(), key=lambda one: (-one[1], one[0]))[:_MOST]
        folders = [{"folder": printable(name), "waiting": count} for name, count in most]
        if budgets:
            with contextlib.suppress(SpoolError):
                self._last = _spent(self._journal.budget(), budgets)
        return {"folders": folders, "budgets": [self._budget(name, budget) for name, budget in sorted(budgets.items())]}

    def _budget(self, name: str, budget: FolderBudget) -> dict[str, Any]:
        day, month, reserved = self._last.get(name, (0.0, 0.0, 0.0))
        return {
            "folder": printable(name),
            "today": {"credits": day, "cap": budget.credits_per_day or None},
            "month": {"credits": month, "cap": budget.credits_per_month or None},
            "reserved": reserved,
            "requests_per_minute": budget.requests_per_minute or None,
        }


def _spent(budget: Budget, folders: Mapping[str, FolderBudget]) -> dict[str, tuple[float, float, float]]:
    return {name: budget.spent_in(name) for name in folders}
