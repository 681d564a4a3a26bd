"""What ``check`` prints about caps: what is spent, and whether a request fits now. Nothing is changed.

Credits that a running daemon has reserved for requests in flight are not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.commands.ledger import open_budget
from imagewatch.journal.budget import CAPS
from imagewatch.journal.prices import Asked
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import amount, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.budget import Budget
    from imagewatch.protocol.request import Request


def refusal(budget: Budget, request: Request) -> tuple[str, str]:
    """Return ``wait`` or ``refuse``, and why, if a request does not fit the caps now; two empty texts if it fits."""
    asked = Asked.of(request.fields)
    if problem := budget.never(asked):
        return "refuse", printable(str(problem))
    found = budget.over_cap(asked)
    return ("wait", found.message) if found else ("", "")


def caps(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield verdict, setting and text for each cap on credits.

    A cap below ``assumed_credits`` is bad as long as no charge is known: then no request is ever sent.
    """
    limits = config.limits
    set_ = [
        (rule, cap) for rule, cap in zip(CAPS, (limits.credits_per_day, limits.credits_per_month), strict=True) if cap
    ]
    if not set_:
        return
    try:
        with open_budget(config) as budget:
            spent, is_known = budget.spent(), budget.knows_prices()
    except SpoolError as error:
        yield "wait", "caps", printable(f"spent credits are not known: {error}")
        return
    for rule, cap in set_:
        used, end = spent[rule]
        text = f"{amount(cap)} credits; {amount(used)} are spent; the period ends {end}"
        if cap >= limits.assumed_credits:
            yield "ok", rule, text
            continue
        text += f"; it is below limits.assumed_credits ({amount(limits.assumed_credits)})"
        if is_known:
            yield "wait", rule, f"{text}: no request is sent to a provider that was not charged in the last 30 days"
        else:
            yield "bad", rule, f"{text}, so every request is refused; raise it, or set assumed_credits to a likely cost"
