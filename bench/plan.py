"""What all measurements share: how much is done, where, and a word about what goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Amount:
    """How much is done.

    Attributes:
        runs: Repetitions of what takes seconds.
        few: Repetitions of what takes minutes.
        starts: Repetitions of a start.
        drops: Prompts dropped one at a time.
        jobs: Prompts dropped at once.
        rounds: Times that all slots are filled.
        waiting: Prompts of a huge inbox.
        flood: Prompts dropped at once while the daemon is stopped.
        rest: Seconds at rest.
        pictures: Jobs in the gallery.
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
    pictures: int


FULL = Amount(4, 3, 7, 20, 300, 10, 100_000, 20_000, 60.0, 5000)
QUICK = Amount(1, 1, 3, 6, 30, 2, 5000, 2000, 5.0, 500)


@dataclass(frozen=True)
class Bench:
    """What a measurement is given: a folder of its own, and how much to do."""

    root: Path
    amount: Amount


def say(text: str) -> None:
    """Tell on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)
