"""What the journal holds of a job, whatever it is stored in."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import TYPE_CHECKING, Literal

import msgspec

from imagewatch.journal.prices import kind_of
from imagewatch.protocol.values import Claim, Decision, Sent, dump

if TYPE_CHECKING:
    from imagewatch.protocol.values import Charged

JobState = Literal["open", "returning", "decided", "published", "kept", "reopened", "done"]
"""``returning``: it waits until its name in the inbox is free; ``kept``: paid, without a readable image."""
FREE = ("busy", "unsent")
"""Results after which a request may be sent again."""
OVER_SECONDS = 7 * 86_400.0
"""How long a job is known after it is over, seconds: files of it may turn up again after a power cut."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt; ``schema`` explains the columns."""

    job: str
    attempt: int
    source: str
    outcome: str
    charged: Charged
    claimed_at: float
    source_size: int = 0
    source_mtime_ns: int = 0
    contents: str = ""
    prompt_sha256: str = ""
    credits: float | None = None
    provider: str = ""
    model: str = ""
    fields: str = ""
    asked: int = 0
    got: int = 0
    status: int = 0
    code: str = ""
    message: str = ""
    request_id: str = ""
    endpoint: str = ""
    version: str = ""
    sent_at: float | None = None
    answered_at: float | None = None
    asked_provider: str = ""
    price_kind: str = ""
    transaction_id: str = ""
    new_credit_balance: float | None = None
    owner: str = ""
    placed_mtime_ns: int = 0
    nonce: str = ""
    reserved: float = 0.0
    request: str = ""
    counted_at: float | None = None


def sent_row(claim: Claim, attempt: int, sent: Sent) -> Row:
    """Return the row of an attempt that may have been sent, and of which no result is known.

    Args:
        claim: What was claimed.
        attempt: Its number.
        sent: What was sent.
    """
    return Row(
        job=claim.job,
        attempt=attempt,
        source=claim.source,
        source_size=claim.size,
        source_mtime_ns=claim.mtime_ns,
        outcome="sent",
        charged="unknown",
        owner=claim.owner,
        claimed_at=claim.at,
        sent_at=sent.at,
        asked=sent.asked,
        endpoint=sent.endpoint,
        request=dump(sent).decode(),
    )


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a job has to know of one of its attempts.

    Attributes:
        number: From 1.
        outcome: Its result, or ``sent`` while that is not known.
        nonce: Of the process that may send it.
        sent: What was sent; None if the record of that is damaged.
    """

    number: int
    outcome: str
    nonce: str
    sent: Sent | None


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal holds of a job that is not over.

    Attributes:
        claim: What was claimed.
        state: Where it is.
        decision: How it ends; None while that is open, or while it is read again.
        withdrawn: The decision that was withdrawn, while its files are still at its destination.
        attempts: Those of which the first byte left or may have left, in order.
        highest: Number of the newest attempt, also of one that was not sent; 0 without.
    """

    claim: Claim
    state: JobState
    decision: Decision | None = None
    withdrawn: Decision | None = None
    attempts: tuple[AttemptRow, ...] = ()
    highest: int = 0


LOST = "only the ledger has a record of this request; it may have been charged"
"""Message of an attempt of which only its row is left."""


@functools.lru_cache(maxsize=128)
def price_of(fields: str, provider: str) -> tuple[str, str]:
    """Return the provider that a request asked, and the kind of its price.

    Args:
        fields: Its JSON body; empty where it is not known.
        provider: The provider of the response, used if the body names none.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(fields)
        if isinstance(found, dict) and isinstance(found.get("provider"), str):
            return found["provider"], kind_of(found)
    return provider, ""
