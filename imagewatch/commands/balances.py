"""What the account had before and after a request that may have been charged: evidence for a person, no proof.

Only what answers have reported is known. Whatever else spends from the account shows as a difference, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imagewatch.system.text import amount, local

if TYPE_CHECKING:
    from imagewatch.journal.ledger import Balances, Ledger


def with_balances(job: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Return a job with ``balance_before`` and ``balance_after``, credits, and in words ``balances``.

    They are None, and the words empty, unless its charge is unknown.

    Args:
        job: As the ledger returns it.
        ledger: The ledger.
    """
    if job["charged"] != "unknown" or job["sent_at"] is None:
        return {**job, "balance_before": None, "balance_after": None, "balances": ""}
    found = ledger.balances(job["job"], job["sent_at"])
    return {**job, "balance_before": found.before, "balance_after": found.after, "balances": in_words(found)}


def in_words(found: Balances) -> str:
    """Return what the account had before and after a request, and what other requests cost between the two."""
    if found.before is None or found.before_at is None:
        return "no balance is known from before it was sent"
    before = f"balance {amount(found.before)} before it ({local(found.before_at)})"
    if found.after is None or found.after_at is None:
        return f"{before}, none is known from after it yet"
    told = f"{before}, {amount(found.after)} after it ({local(found.after_at)})"
    told += f"; other requests in between: {found.others}, charged {amount(found.credits)}"
    if found.unknown_cost:
        told += f" and {found.unknown_cost} times an unknown amount"
    return f"{told}; difference not explained by them: {amount(found.before - found.after - found.credits)}"
