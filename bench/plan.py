"""Shared by all measurements: amounts, folders, and messages about the progress."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Amount:
    """The amounts of a run.

    Attributes:
        runs: Repetitions of measurements that take seconds.
        few: Repetitions of measurements that take minutes.
        starts: Repetitions of a start.
        drops: Prompts dropped one at a time.
        jobs: Prompts dropped at the same time.
        rounds: How often all slots are filled.
        waiting: Prompts of a huge inbox.
        flood: Prompts dropped at the same time while the daemon is stopped.
        rest: Seconds at rest.
        gallery: Jobs in the gallery.
    """

    runs: int
    few: int
    starts: int
    drops: int
    jobs: int
    rounds: int
    waiting: int
    flood: int
    rest: float
    gallery: int


FULL = Amount(4, 3, 7, 20, 200, 10, 100_000, 20_000, 60.0, 5000)
QUICK = Amount(1, 1, 3, 6, 30, 2, 5000, 2000, 5.0, 500)


@dataclass(frozen=True)
class Bench:
    """The arguments of a measurement: a folder of its own, and the amounts."""

    root: Path
    amount: Amount


def say(text: str) -> None:
    """Print the progress on standard error."""
    print(text, file=sys.stderr, flush=True)
