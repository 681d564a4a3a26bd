"""What the prompts in the inbox may cost, from what requests like them have cost here. No network.

The endpoint publishes no prices; the ledger knows what was charged. A request like none before it has no estimate,
and that is said.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from imagewatch.errors import BadRequest, SpoolError
from imagewatch.names import SUFFIX
from imagewatch.places import is_hidden, refusal
from imagewatch.request import Files, build
from imagewatch.sweep import Sweep
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imagewatch.config import Config

_PRICED = ("provider", "model", "size", "quality")
"""Fields that a price is known to depend on, beside the number of images."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one prompt may cost.

    Attributes:
        source: Path of the prompt below the inbox.
        request: What is asked for, in words.
        low: The lowest price of a request like it, credits; None without one.
        usual: The median.
        high: The highest.
        seen: How many there were.
        problem: Why it will not be sent at all, or an empty string.
    """

    source: str
    request: str = ""
    low: float | None = None
    usual: float | None = None
    high: float | None = None
    seen: int = 0
    problem: str = ""


def inbox(config: Config, prices: Sequence[tuple[dict[str, Any], float]]) -> Iterator[Estimate]:
    """Estimate what is in the inbox, settled or not.

    Args:
        config: Inbox, defaults, limits.
        prices: What was asked for and charged, newest first.

    Raises:
        SpoolError: The inbox is not there, or cannot be listed.
    """
    top = config.folders.inbox
    if not os.path.isdir(top):
        hint = "check the path, and that it is mounted; the daemon makes the folders when it first starts"
        if is_hidden(top):
            hint = refusal(top, os.R_OK | os.X_OK)
            raise SpoolError(f"{printable(top)}: permission denied", path=top, hint=hint)
        raise SpoolError(f"{printable(top)}: there is no such inbox", path=top, hint=hint)
    # A prompt that is still being waited for costs as much: so nothing has to settle, and nothing is waited for.
    eager = config.inbox.__class__(settle_seconds=0, input_wait_seconds=0, recursive=config.inbox.recursive)
    sweep = Sweep(config.folders.inbox, eager)
    for candidate in sweep.look(time.monotonic(), time.time()).ready:
        folder, stem = candidate.key
        where = os.path.join(config.folders.inbox, folder)
        try:
            files = Files(where, folder, stem, candidate.images, candidate.foreign, candidate.declared, sweep.opener)
            request = build(files, config)
        except BadRequest as error:
            yield Estimate(candidate.source, problem="; ".join(str(problem) for problem in error.problems))
        else:
            yield price(os.path.join(folder, stem + SUFFIX), request.fields, prices)


def price(source: str, fields: dict[str, Any], prices: Sequence[tuple[dict[str, Any], float]]) -> Estimate:
    """Estimate one request by those like it: same provider, model, size, quality; priced by the image."""
    count = fields.get("n", 1)
    alike = [
        credits_ / known.get("n", 1) * count
        for known, credits_ in prices
        if all(known.get(name) == fields.get(name) for name in _PRICED)
    ]
    told = ", ".join(str(fields[name]) for name in (*_PRICED, "n") if name in fields)
    if not alike:
        return Estimate(source, told)
    return Estimate(source, told, min(alike), median(alike), max(alike), len(alike))
