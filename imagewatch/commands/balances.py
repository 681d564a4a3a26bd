"""The account's balance before and after a request that may have been charged: a clue for a person, no proof.

Only balances that responses have reported are known. Other users of the account also change the balance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imagewatch.system.text import amount, local

if TYPE_CHECKING:
    from imagewatch.journal.ledger import Balances, Ledger


def with_balances(job: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Return a job with ``balance_before`` and ``balance_after``, credits, and ``balances``, a sentence about them.

    Unless the job's charge is unknown, they are None, and the sentence is empty.

    Args:
        job: As the ledger returns it.
        ledger: The ledger.
    """
    if job["charged"] != "unknown" or job["sent_at"] is None:
        return {**job, "balance_before": None, "balance_after": None, "balances": ""}
    found = ledger.balances(job["job"], job["sent_at"])
    return {**job, "balance_before": found.before, "balance_after": found.after, "balances": in_words(found)}


def in_words(found: Balances) -> str:
    """Return a sentence about the balances before and after a request, and the cost of other requests in between."""
    if found.before is None or found.before_at is None:
        return "the balance before the request is not known"
    before = f"balance before it: {amount(found.before)} ({local(found.before_at)})"
    if found.after is None or found.after_at is None:
        return f"{before}; the balance after it is not known yet"
    text = f"{before}, after it: {amount(found.after)} ({local(found.after_at)})"
    text += f"; other requests in between: {found.others}, charged {amount(found.credits)}"
    if found.unknown_cost:
        text += f", {found.unknown_cost} of unknown cost"
    return f"{text}; unexplained difference: {amount(found.before - found.after - found.credits)}"
