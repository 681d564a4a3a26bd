"""The endpoint's wire format: what responses mean. Only this module and ``decode`` depend on the format of the API.

Facts about the endpoint come from its published contract, the ``image-generation`` skill of letta-ai/letta-code
(request body, response, notes), and from observed responses of its other routes and of the gateway before it. No
disk, no network, no clock: everything is an argument, except the keys that no text may hold. Nothing a response
holds is trusted.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from imagewatch.config.validate import shown
from imagewatch.endpoint.coding import UndecodableError, is_coding, plain
from imagewatch.protocol.reasons import JSON_OBJECT, KINDS, NOT_ADMITTED, QUOTA, RESPONSES, Reaction, Reason
from imagewatch.system.errors import ChargeUnknown
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.protocol.values import Head

T = TypeVar("T")

PATH = "/v1/images/generations"
BALANCE_PATH = "/v1/metadata/balance"
"""Not documented; Letta Code's ``/usage`` asks it, and takes a failure as "not available"."""
_SIZE = re.compile("([0-9]{1,5})x([0-9]{1,5})")
_PIXEL_BYTES = 4
"""Of a PNG that could not be compressed at all."""
_UNSIZED_BYTES = 48 << 20
"""Of an image of which no size is asked for: a PNG of 4096 times 4096 pixels has about 36 MB, and 48 in base64."""
_ENVELOPE_BYTES = 64 * 1024
_DEEPEST_ERROR = 4
_QUOTA_REASONS = re.compile(r"quota|-usage-exceeded|limit-exceeded|not-enough-credits|model-unknown")
_BALANCE = re.compile("[a-z_]{0,40}balance")

# The request


def largest_answer(fields: dict[str, Any]) -> int:
    """Return how many bytes the response to a request may plausibly have.

    Args:
        fields: What is asked for.
    """
    found = _SIZE.fullmatch(str(fields.get("size", "")))
    pixels = int(found[1]) * int(found[2]) if found else 0
    each = pixels * _PIXEL_BYTES * 4 // 3 + _ENVELOPE_BYTES if pixels else _UNSIZED_BYTES
    return int(fields.get("n", 1)) * each + _ENVELOPE_BYTES


# What a response means


@dataclass(frozen=True)
class Verdict:
    """What a response means.

    Attributes:
        reason: Which row of the table of reasons it is, its message, and how long it asks us to wait.
        code: The API's error code, or an empty string.
        credits_required: What it says the request would cost, or None.
    """

    reason: Reason
    code: str = ""
    credits_required: float | None = None

    @property
    def reaction(self) -> Reaction:
        """What happens to the prompt."""
        return self.reason.row.reaction


def classify(head: Head, sample: Callable[[], bytes]) -> Verdict:
    """Return what a response means.

    Args:
        head: Its status and headers.
        sample: Returns the beginning of its body; not called for a success.
    """
    if head.status == 0:
        kind = "broken" if head.counts else "unreachable"
        return Verdict(Reason(kind, head.reason or "the request was not sent completely"))
    if head.status in KINDS["completed"].statuses:
        return Verdict(Reason("completed"))
    beginning = _beginning(head, sample())
    body = known.values(parse(beginning))
    kind = _kind(head.status, body)
    wait = _retry_after(head)
    if head.status == 503 and wait is not None:  # noqa: PLR2004
        wait = min(wait, 30.0)  # Letta Code caps this one at 30 s (its conversation-enqueue)
    if kind == "quota":
        wait = number(_find(body, "timeToQuotaResetMs", object), 0.001) or wait
    message, code = _message(body, beginning, head.status)
    required = number(_find(body, "credits_required", object))
    return Verdict(Reason(kind, message, wait), code, required)


def _beginning(head: Head, sample: bytes) -> bytes:
    """Return the beginning of a refusal without its content coding, which a response saved by an older version has."""
    coding = head.headers.get("content-encoding", "")
    if coding and coding != "identity" and not is_coding(coding):
        return f"HTTP {head.status}, with a message that is encoded as {coding[:40]!r}".encode()
    try:
        return next(plain([sample], coding), b"")
    except UndecodableError:
        return b""


def _kind(status: int, body: object) -> str:
    """Return the first row of the table of reasons that fits a response."""
    fitting = (kind.name for kind in RESPONSES if status in kind.statuses and _CONTAINS[kind.statuses[status]](body))
    return next(fitting, "unknown")


def _names_quota(body: object) -> bool:
    found = [_find(body, name, str) for name in ("reasons", "errorCode", "code")]
    found += _find(body, "reasons", list) or []
    is_named = any(isinstance(word, str) and _QUOTA_REASONS.search(word) for word in found)
    return is_named or _find(body, "timeToQuotaResetMs", object) is not None


_CONTAINS: Final[dict[str, Callable[[object], bool]]] = {
    "": lambda _: True,
    QUOTA: _names_quota,
    NOT_ADMITTED: lambda body: _find(body, "admitted", bool) is False,
    JSON_OBJECT: lambda body: isinstance(body, dict) and bool(body),
}
"""Whether a body contains what a row of the table asks for."""


def parse(raw: bytes) -> object:
    """Return JSON, or what is nearly JSON, as values; None when it is neither."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        pass
    try:
        # Not quite JSON (NaN, a broken character): what was paid for may still be read.
        return json.loads(raw.decode("utf-8", "replace"))
    except (RecursionError, ValueError):
        return None


def _find(body: object, name: str, kind: type[T]) -> T | None:
    """Return a key of the body, or of an ``error`` inside it, that is of the kind looked for."""
    for _ in range(_DEEPEST_ERROR):
        if not isinstance(body, dict):
            break
        if isinstance(value := body.get(name), kind) and value is not None:
            return value
        body = body.get("error")
    return None


def _message(body: object, sample: bytes, status: int) -> tuple[str, str]:
    """Return message and code of a refusal; its raw text where it has no message."""
    message, code = message_of(body)
    if message:
        return message, code
    text = known.text(sample.decode("utf-8", "replace"))[:4000].strip()
    if re.match(r"<(!doctype|html|head|body)", text, re.IGNORECASE):
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        text = " ".join(title[1].split()) if title else "a web page instead of a response"
    return text[:2000] or f"HTTP {status} without a message", code


def message_of(body: object) -> tuple[str, str]:
    """Return message and error code, from any of the shapes that Letta's routes are known to use.

    Args:
        body: A response, as values.

    Returns:
        Both; an empty string for what is not there.
    """
    code = next((found for name in ("errorCode", "code", "type") if (found := _find(body, name, str))), "")
    for name in ("reason_text", "message", "error", "detail"):
        if (said := _find(body, name, str)) and said.strip():
            return said.strip(), code
    issues = _find(body, "issues", list) or []
    return "; ".join(_issue(issue) for issue in issues[:20]).strip(), code


def _issue(issue: object) -> str:
    path, message = (issue.get("path"), issue.get("message")) if isinstance(issue, dict) else (None, issue)
    where = ".".join(str(step) for step in path if isinstance(step, str | int)) if isinstance(path, list) else ""
    said = message if isinstance(message, str) else shown(issue)
    return f"{where}: {said}" if where else said


def number(value: object, scale: float = 1.0) -> float | None:
    """Return a finite number times ``scale``, or None when it is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        scaled = value * scale
    except OverflowError:
        return None
    return scaled if math.isfinite(scaled) else None


def _retry_after(head: Head) -> float | None:
    """Return ``Retry-After`` in seconds; it may be a number or an HTTP date."""
    said = head.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", said):
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - head.at)
    except (ValueError, OverflowError):
        return None


def balance(raw: bytes) -> dict[str, float]:
    """Return the balances of the account, in credits: ``total_balance`` and all others; empty if there is none."""
    body = known.values(parse(raw))
    found = {name: number(value) for name, value in body.items()} if isinstance(body, dict) else {}
    return {name: value for name, value in found.items() if value is not None and _BALANCE.fullmatch(str(name))}


def charge_unknown(message: str) -> ChargeUnknown:
    """Return the error for a request whose charge is unknown."""
    return ChargeUnknown(message, hint="check the balance of the account before you try again")
