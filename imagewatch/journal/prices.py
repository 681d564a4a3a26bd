"""What a request may cost, from what was charged for requests like it. Pure.

The endpoint publishes no prices. A price is known to depend on provider, model, size and quality, and on the number of
images. ``expected`` is the only place where a cost is guessed: the caps reserve its ``high``, ``imagewatch estimate``
shows all of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECONDS = 30 * 86_400.0
"""How long a charge predicts the next one, seconds."""
PRICED = ("provider", "model", "size", "quality")
"""The fields of a request that its price depends on, beside the number of images."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, as far as its price depends on it.

    Attributes:
        provider: Whom it asks.
        kind: Equal for requests that cost the same for an image.
        n: Images asked for, at least 1.
    """

    provider: str
    kind: str
    n: int = 1

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Asked:
        """Return what the JSON body of a request asks for; what cannot be a number of images counts as one."""
        n = fields.get("n", 1)
        is_count = isinstance(n, int) and not isinstance(n, bool) and n > 0
        return cls(str(fields.get("provider", "")), kind_of(fields), n if is_count else 1)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request may cost, credits for all its images.

    Attributes:
        high: The most that was charged for a similar request; this is reserved for it.
        why: Where ``high`` comes from, as the end of a sentence.
        low: The least; None if nothing like it was charged.
        usual: The median.
        seen: How many like it were charged.
    """

    high: float
    why: str
    low: float | None = None
    usual: float | None = None
    seen: int = 0


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return a text that is equal for requests of the same provider, model, size and quality."""
    return json.dumps([fields.get(name) for name in PRICED], separators=(",", ":"))


def expected(asked: Asked, charges: Mapping[str, Sequence[float]], assumed: float) -> Expected:
    """Return what a request may cost.

    Args:
        asked: The request.
        charges: What requests to its provider were charged lately, for an image; charges of 0 are not among them.
        assumed: What an image costs if nothing was charged for any of that provider, credits.
    """
    if of_kind := charges.get(asked.kind):
        low, usual, high = (_times(one, asked.n) for one in (min(of_kind), median(of_kind), max(of_kind)))
        return Expected(high, "the highest charge of the last 30 days for a similar request", low, usual, len(of_kind))
    if others := [max(some) for some in charges.values() if some]:
        return Expected(_times(max(others), asked.n), f"the highest charge of the last 30 days of {asked.provider}")
    return Expected(_times(assumed, asked.n), f"limits.assumed_credits, because no charge of {asked.provider} is known")


def for_an_image(credits_: float, asked: int) -> float:
    """Return what was charged for an image: of those asked for, however many came."""
    return credits_ / max(asked, 1)


def _times(price: float, n: int) -> float:
    """Return a price times a number of images, which may be too large for a float."""
    return min(price * n, math.nextafter(math.inf, 0.0))
