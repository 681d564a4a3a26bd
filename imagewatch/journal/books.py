"""What caps and the rate ask of the journal: what was spent, what is reserved, what requests cost.

If a first-level folder is named, only what was requested in it and below it counts.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from imagewatch.journal.prices import for_an_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from imagewatch.journal.database import Row


class Books(Protocol):
    """What is asked of a journal."""

    def spending(self, since: float, folder: str = "") -> tuple[float, list[tuple[str, str, int]]]:
        """Return what was spent since the beginning of the day of a time, seconds since the epoch.

        Returns:
            Credits that are known to have been charged; and for requests that were or may have been charged an amount
            that is not known: provider, kind of price, and how many images they asked for in all.
        """

    def reserved(self, job: str, folder: str = "") -> tuple[float, list[tuple[float, float]]]:
        """Return what other jobs have reserved, credits; of those that are stuck each with its time."""

    def highest(self, provider: str, since: float) -> Mapping[str, Sequence[float]]:
        """Return the highest charge for an image since a time, by the kind of the price."""

    def charges(self, provider: str, since: float) -> Mapping[str, Sequence[float]]:
        """Return all charges for an image since a time, by the kind of the price. A charge of 0 is left out."""

    def newest(self, since: float, most: int, folder: str = "") -> list[float]:
        """Return when the newest attempts after a time count, seconds since the epoch, the newest first."""


class NoBooks:
    """The journal of a daemon that has never run."""

    def spending(self, since: float, folder: str = "") -> tuple[float, list[tuple[str, str, int]]]:  # noqa: ARG002
        """Return that nothing was spent."""
        return 0.0, []

    def reserved(self, job: str, folder: str = "") -> tuple[float, list[tuple[float, float]]]:  # noqa: ARG002
        """Return that nothing is reserved."""
        return 0.0, []

    def highest(self, provider: str, since: float) -> dict[str, list[float]]:  # noqa: ARG002
        """Return that nothing was charged."""
        return {}

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:  # noqa: ARG002
        """Return that nothing was charged."""
        return {}

    def newest(self, since: float, most: int, folder: str = "") -> list[float]:  # noqa: ARG002
        """Return that nothing was sent."""
        return []


class SqlBooks:
    """The same of a journal in SQLite, in the middle of a transaction or outside of any.

    Args:
        ask: Returns the rows that answer a question.
    """

    def __init__(self, ask: Callable[..., list[Row]]) -> None:
        self._ask = ask

    def spending(self, since: float, folder: str = "") -> tuple[float, list[tuple[str, str, int]]]:
        """Return what was spent; see ``Books``."""
        day = datetime.fromtimestamp(since, tz=UTC).date().isoformat()
        question = "SELECT provider, price_kind, sum(credits) AS credits, sum(unknown) AS unknown FROM "
        if folder:
            question += "folder_sums WHERE day >= ? AND folder = ? GROUP BY provider, price_kind"
            rows = self._ask(question, day, folder)
        else:
            rows = self._ask(question + "sums WHERE day >= ? GROUP BY provider, price_kind", day)
        unknown = [(row["provider"], row["price_kind"], row["unknown"]) for row in rows if row["unknown"] > 0]
        return sum(row["credits"] for row in rows), unknown

    def reserved(self, job: str, folder: str = "") -> tuple[float, list[tuple[float, float]]]:
        """Return what is reserved; see ``Books``."""
        sent = (
            "SELECT a.reserved AS credits, a.sent_at AS at, coalesce(j.is_stuck, 1) AS is_stuck FROM attempts AS a "
            "LEFT JOIN jobs AS j ON j.id = a.job WHERE a.outcome = 'sent' AND a.job <> ?1 "
        )
        claimed = "SELECT reserved, opened_at, is_stuck FROM jobs WHERE state <> 'done' AND reserved > 0 AND id <> ?1 "
        if folder:
            below, name = folder + "/", os.fsencode(folder)
            sent += f"AND substr(a.source, 1, {len(below)}) = ?2 "
            claimed += f"AND (folder = ?3 OR substr(folder, 1, {len(name) + 1}) = ?4) "
            rows = self._ask(f"{sent}UNION ALL {claimed}", job, below, name, name + b"/")
        else:
            rows = self._ask(f"{sent}UNION ALL {claimed}", job)
        stuck = [(row["at"], row["credits"]) for row in rows if row["is_stuck"]]
        return sum(row["credits"] for row in rows if not row["is_stuck"]), stuck

    def highest(self, provider: str, since: float) -> dict[str, list[float]]:
        """Return the highest charges; see ``Books``."""
        rows = self._ask(
            "SELECT price_kind, max(price) AS price FROM prices "
            "WHERE provider = ? AND last_at >= ? GROUP BY price_kind",
            provider,
            since,
        )
        return {row["price_kind"]: [row["price"]] for row in rows}

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:
        """Return all charges; see ``Books``."""
        rows = self._ask(
            "SELECT price_kind, credits, asked FROM attempts WHERE asked_provider = ? AND sent_at >= ? AND credits > 0",
            provider,
            since,
        )
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(row["price_kind"], []).append(for_an_image(row["credits"], row["asked"]))
        return found

    def newest(self, since: float, most: int, folder: str = "") -> list[float]:
        """Return when the newest attempts count; see ``Books``."""
        question = "SELECT counted_at FROM attempts WHERE counted_at > ?1 AND outcome <> 'unsent' "
        below = [folder + "/"] if folder else []
        if folder:
            question += f"AND substr(source, 1, {len(folder) + 1}) = ?3 "
        rows = self._ask(question + "ORDER BY counted_at DESC LIMIT ?2", since, most, *below)
        return [row["counted_at"] for row in rows]
