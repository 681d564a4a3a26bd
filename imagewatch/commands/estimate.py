"""What the prompts in the inbox may cost, from what requests like them have cost here. No network.

The endpoint publishes no prices; the ledger knows what was charged. A request like none before it has no estimate,
and that is said.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.config.locate import is_hidden, refusal
from imagewatch.inbox.scan import Sweep
from imagewatch.journal.prices import PRICED, Asked
from imagewatch.protocol.names import SUFFIX
from imagewatch.protocol.request import Files, build
from imagewatch.system.errors import BadRequest, SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.load import Config
    from imagewatch.journal.budget import Budget
    from imagewatch.protocol.request import Request


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
        reserve: What the caps reserve for it, credits.
        problem: Why it will not be sent at all, or an empty string.
    """

    source: str
    request: str = ""
    low: float | None = None
    usual: float | None = None
    high: float | None = None
    seen: int = 0
    reserve: float | None = None
    problem: str = ""


def inbox(config: Config, budget: Budget) -> Iterator[Estimate]:
    """Estimate what is in the inbox, settled or not.

    Args:
        config: Inbox, defaults, limits.
        budget: What was charged lately, and what may be spent.

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
            files = Files(where, folder, stem, candidate.images, candidate.unused, candidate.declared, sweep.opener)
            request = build(files, config)
        except BadRequest as error:
            yield Estimate(candidate.source, problem="; ".join(str(problem) for problem in error.problems))
        else:
            yield _price(os.path.join(folder, stem + SUFFIX), request, budget)


def _price(source: str, request: Request, budget: Budget) -> Estimate:
    """Estimate one request by the charges of those like it, as the caps do."""
    asked = Asked.of(request.fields)
    if problem := budget.never(asked):
        return Estimate(source, problem=str(problem))
    cost = budget.cost(asked)
    told = ", ".join(str(request.fields[name]) for name in (*PRICED, "n") if name in request.fields)
    if not cost.seen:
        return Estimate(source, told, reserve=cost.high)
    return Estimate(source, told, cost.low, cost.usual, cost.high, cost.seen, cost.high)
