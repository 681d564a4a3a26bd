"""What caps and the rate ask of the journal: what was spent, what is reserved, what requests cost.

If a first-level folder is named, only what was requested in it and below it counts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from imagewatch.journal.prices import for_an_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from imagewatch.journal.database import Row


@dataclass(frozen=True)
class Counted:
    """What counts towards a cap, all of it at the same moment.

    Attributes:
        known: Credits that are known to have been charged.
        unknown: For requests that were or may have been charged an amount that is not known: provider, kind of price,
            and how many images they asked for in all.
        reserved: Credits that other jobs have reserved.
        stuck: The same of jobs that are stuck: each with its time, seconds since the epoch.
    """

    known: float = 0.0
    unknown: Sequence[tuple[str, str, int]] = ()
    reserved: float = 0.0
    stuck: Sequence[tuple[float, float]] = ()


class Books(Protocol):
    """What is asked of a journal."""

    def counted(self, since: float, job: str = "", folder: str = "") -> Counted:
        """Return what counts since the beginning of the day of a time.

        Args:
            since: Seconds since the epoch.
            job: What this job has reserved does not count.
            folder: Only what was requested in this first-level folder counts; empty: all.
        """

    def highest(self, provider: str, since: float) -> Mapping[str, Sequence[float]]:
        """Return the highest charge for an image since a time, by the kind of the price."""

    def charges(self, provider: str, since: float) -> Mapping[str, Sequence[float]]:
        """Return all charges for an image since a time, by the kind of the price. A charge of 0 is left out."""

    def newest(self, since: float, most: int, folder: str = "") -> list[float]:
        """Return when the newest attempts after a time count, seconds since the epoch, the newest first."""


class NoBooks:
    """The journal of a daemon that has never run."""

    def counted(self, since: float, job: str = "", folder: str = "") -> Counted:  # noqa: ARG002
        """Return that nothing counts."""
        return Counted()

    def highest(self, provider: str, since: float) -> dict[str, list[float]]:  # noqa: ARG002
        """Return that nothing was charged."""
        return {}

    def charges(self, provider: str, since: float) -> dict[str, list[float]]:  # noqa: ARG002
        """Return that nothing was charged."""
        return {}

    def newest(self, since: float, most: int, folder: str = "") -> list[float]:  # noqa: ARG002
        """Return that nothing was sent."""
        return []


_COUNTED_PARTS = """
    SELECT 1 AS is_sum, provider, price_kind, sum(credits) AS credits, sum(unknown) AS unknown, 0.0 AS at, 0 AS is_stuck
    FROM {sums} WHERE day >= ?1 {of_sums} GROUP BY provider, price_kind
    UNION ALL
    SELECT 0, '', '', a.reserved, 0, a.sent_at, coalesce(j.is_stuck, 1) FROM attempts AS a
    LEFT JOIN jobs AS j ON j.id = a.job WHERE a.outcome = 'sent' AND a.job <> ?2 {of_attempts}
    UNION ALL
    SELECT 0, '', '', reserved, 0, opened_at, is_stuck FROM jobs
    WHERE state <> 'done' AND reserved > 0 AND id <> ?2 {of_jobs}"""
_COUNTED = _COUNTED_PARTS.format(sums="sums", of_sums="", of_attempts="", of_jobs="")
_COUNTED_IN_FOLDER = _COUNTED_PARTS.format(
    sums="folder_sums",
    of_sums="AND folder = ?3",
    of_attempts="AND substr(a.source, 1, length(?4)) = ?4",
    of_jobs="AND (folder = ?5 OR substr(folder, 1, length(?6)) = ?6)",
)


class SqlBooks:
    """The same of a journal in SQLite, in the middle of a transaction or outside of any.

    Args:
        ask: Returns the rows that answer a question.
    """

    def __init__(self, ask: Callable[..., list[Row]]) -> None:
        self._ask = ask

    def counted(self, since: float, job: str = "", folder: str = "") -> Counted:
        """Return what counts; see ``Books``.

        It is one question: several would each see what was committed before them, and a request whose result another
        daemon records meanwhile would count twice, or not at all.
        """
        day = datetime.fromtimestamp(since, tz=UTC).date().isoformat()
        if folder:
            name = os.fsencode(folder)
            rows = self._ask(_COUNTED_IN_FOLDER, day, job, folder, folder + "/", name, name + b"/")
        else:
            rows = self._ask(_COUNTED, day, job)
        sums = [row for row in rows if row["is_sum"]]
        others = [row for row in rows if not row["is_sum"]]
        return Counted(
            known=sum(row["credits"] for row in sums),
            unknown=[(row["provider"], row["price_kind"], row["unknown"]) for row in sums if row["unknown"] > 0],
            reserved=sum(row["credits"] for row in others if not row["is_stuck"]),
            stuck=[(row["at"], row["credits"]) for row in others if row["is_stuck"]],
        )

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
