"""One row of the ledger, whatever it is stored in."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import msgspec

from imagewatch.journal.prices import kind_of

if TYPE_CHECKING:
    from imagewatch.protocol.values import Charged


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


COLUMNS = Row.__struct_fields__
LOST = "only the ledger has a record of this request; it may have been charged"
"""Message of an attempt of which only its row is left."""


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
