"""``imagewatch estimate``: what the prompts in the inbox may cost, from the charges of similar requests.

The endpoint publishes no prices; the ledger has what was charged. Nothing is sent.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.ledger import open_budget
from imagewatch.commands.terminal import print_table, shown
from imagewatch.config.locate import is_hidden, refusal
from imagewatch.inbox.scan import InboxScan
from imagewatch.journal.budget import folder_of
from imagewatch.journal.prices import PRICED, Asked
from imagewatch.protocol.request import build
from imagewatch.system.errors import MISSING, BadRequest, SpoolError
from imagewatch.system.text import amount, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.budget import Budget
    from imagewatch.protocol.request import Request


@click.command()
@json_option
@config_option
def estimate(path: str | None, *, as_json: bool) -> None:
    """Estimate what the prompts in the inbox will cost.

    The endpoint publishes no prices. The estimate uses what similar requests were charged in the last 30 days. Nothing
    is sent.
    """
    config = load_config(path)
    with open_budget(config) as budget:
        found = list(_inbox(config, budget))
    if as_json:
        click.echo(to_json([{name: getattr(one, name) for name in one.__slots__} for one in found], indent=1))
        return
    if not found:
        click.echo("There is no prompt in the inbox.")
        return
    print_table(
        ("prompt", "request", "credits"),
        [[printable(one.source, 60), shown(one.request), _price(one)] for one in found],
    )
    known = [one for one in found if one.usual is not None]
    unknown = sum(one.usual is None and not one.problem for one in found)
    low, high = sum(one.low or 0 for one in known), sum(one.high or 0 for one in known)
    click.echo(f"\nTotal: {_span(low, high)} credits" + (f", and {unknown} of unknown cost." if unknown else "."))


def _price(one: Estimate) -> str:
    if one.problem:
        return f"none: the request will be refused ({printable(one.problem, 100)})"
    if one.usual is None or one.low is None or one.high is None:
        reserved = f"; a cap reserves {amount(one.reserve)}" if one.reserve is not None else ""
        return f"unknown: no similar request was charged in the last 30 days{reserved}"
    return f"{_span(one.low, one.high)}, usually {amount(one.usual)} ({one.seen} completed)"


def _span(low: float, high: float) -> str:
    return amount(low) if low == high else f"{amount(low)} to {amount(high)}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one prompt may cost.

    Attributes:
        source: Path of the prompt below the inbox.
        request: What the prompt asks for, in words.
        low: The lowest cost of a similar request, credits; None without one.
        usual: The median.
        high: The highest.
        seen: How many similar requests there were.
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


def _inbox(config: Config, budget: Budget) -> Iterator[Estimate]:
    """Estimate each prompt in the inbox, settled or not.

    Args:
        config: Inbox, defaults, limits.
        budget: Recent charges, and the caps.

    Raises:
        SpoolError: The inbox does not exist, or cannot be listed.
    """
    top = config.folders.inbox
    if not os.path.isdir(top):
        if is_hidden(top):
            hint = refusal(top, os.R_OK | os.X_OK)
            raise SpoolError(f"permission denied: {printable(top)}", path=top, hint=hint)
        raise SpoolError(f"no such inbox: {printable(top)}", path=top, hint=MISSING)
    # A prompt that has not settled costs as much, so this does not wait for it.
    eager = config.inbox.__class__(settle_seconds=0, input_wait_seconds=0, recursive=config.inbox.recursive)
    scan = InboxScan(config.folders.inbox, eager)
    for candidate in scan.scan_all(time.monotonic(), time.time()).ready:
        where = os.path.join(config.folders.inbox, candidate.folder)
        try:
            request = build(candidate, where, config, scan.opener)
        except BadRequest as error:
            yield Estimate(candidate.source, problem="; ".join(str(problem) for problem in error.problems))
        else:
            yield _estimated(candidate.source, request, budget)


def _estimated(source: str, request: Request, budget: Budget) -> Estimate:
    """Estimate one request by the charges of similar ones, as the caps do."""
    asked = Asked.of(request.fields)
    if problem := budget.never(asked, folder_of(source)):
        return Estimate(source, problem=str(problem))
    cost = budget.cost(asked)
    n = request.fields.get("n")
    parts = [str(request.fields[name]) for name in PRICED if name in request.fields]
    text = ", ".join([*parts, *([f"{n} image{'s' * (n > 1)}"] if n else [])])
    if not cost.seen:
        return Estimate(source, text, reserve=cost.high)
    return Estimate(source, text, cost.low, cost.usual, cost.high, cost.seen, cost.high)
