"""A paid response into images, in constant memory: from the raw bytes into files, piece by piece.

It was paid for, so everything that can be read is read: nothing here raises for what a response holds. Nothing in it is
trusted.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from imagewatch.endpoint.api import message_of, number, parse
from imagewatch.endpoint.coding import UnreadableError, bounded
from imagewatch.endpoint.frames import Decoded, texts
from imagewatch.endpoint.splitter import LONGEST_URL, MOST_IMAGES, Splitter
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MOST_NUMBER = 10**40
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?")
_DEEPEST = 4
_ENVELOPES = ("images", "data", "output", "image")
"""Where other image APIs have what the contract calls ``images``, in the order in which they are tried."""


@dataclass
class Got:
    """One entry of ``images``.

    Attributes:
        decoded: Number of the file its base64 was decoded into, or None.
        saved: Number of that file among those of the response if it was decoded while that arrived, or None.
        url: Where to fetch it, or an empty string.
        mime: Its type according to the endpoint.
        problem: Why there is no image, or an empty string.
    """

    decoded: int | None = None
    saved: int | None = field(default=None, compare=False)
    url: str = ""
    mime: str = ""
    problem: str = ""


@dataclass
class Reading:
    """What a paid response holds.

    Attributes:
        images: The entries, in order.
        provider: As in the response, or an empty string.
        model: As in the response, or an empty string.
        billing: As received; empty without.
        credits: ``billing.credits_charged``, or None when it is not a number that can be a charge.
        transaction: ``billing.transaction_id`` as text, or an empty string.
        balance: ``billing.new_credit_balance``, credits, or None when it is no number.
        problem: What is wrong with the response as a whole, or an empty string.
        message: The message of a response without images, or an empty string.
        code: The error code beside them, or an empty string.
    """

    images: list[Got] = field(default_factory=list)
    provider: str = ""
    model: str = ""
    billing: dict[str, Any] = field(default_factory=dict)
    credits: float | None = None
    transaction: str = ""
    balance: float | None = None
    problem: str = ""
    message: str = ""
    code: str = ""


def read(
    pieces: Iterable[bytes | Decoded], *, encoding: str, limit: int, create: Callable[[int], IO[bytes]]
) -> Reading:
    """Read a paid response in constant memory; images go into files as they arrive.

    Args:
        pieces: The raw body. An image in a file of its own stays there, unless the body has a content coding.
        encoding: Its ``Content-Encoding``, or an empty string. We ask for none.
        limit: Most bytes a compressed body may grow to.
        create: Called with the number, from 0, of each base64 image that is not in a file yet; returns the file it
            goes to.

    Returns:
        What could be read. This never raises for what a response holds: it is paid for.
    """
    splitter = Splitter(create)
    problem = ""
    try:
        for piece in bounded(texts(pieces), encoding, limit) if encoding else pieces:
            splitter.feed(piece)
    except UnreadableError as error:
        problem = str(error)
    finally:
        splitter.close()
    decoded = known.values(parse(splitter.skeleton()))
    body = decoded if isinstance(decoded, dict) else {}
    images, remark = _images(body, splitter)
    reading = _billed(body.get("billing"))
    reading.images, reading.problem = images, problem or remark
    reading.provider, reading.model = _text(body.get("provider")), _text(body.get("model"))
    if not images:
        reading.message, reading.code = message_of(body)
    return reading


def _billed(billing: object) -> Reading:
    """Return the billing of a response; invalid values are ignored, and keep no image back."""
    billing = billing if isinstance(billing, dict) else {}
    return Reading(
        billing=billing,
        credits=_charge(billing),
        transaction=_transaction(billing.get("transaction_id")),
        balance=_balance(billing.get("new_credit_balance")),
    )


def _images(body: dict[str, Any], splitter: Splitter) -> tuple[list[Got], str]:
    """Return the entries, and what is wrong with the way in which they came."""
    entries = body.get("images")
    if isinstance(entries, list):
        return [_entry(entry, splitter) for entry in entries[:MOST_IMAGES]], ""
    for name in _ENVELOPES:
        found = body.get(name)
        entries = found if isinstance(found, list) else [found]
        images = [_entry(entry, splitter) for entry in entries[:MOST_IMAGES]]
        if any(got.url or got.decoded is not None for got in images):
            return images, f'the response has its images in "{name}" instead of the list "images"'
    return _scattered(splitter), "the response is not a JSON object"


def _scattered(splitter: Splitter) -> list[Got]:
    """Return the images of a response that is cut short or garbled, as far as they are complete."""
    found: list[Got] = []
    skeleton, end = splitter.skeleton(), 0
    for match in splitter.traces().finditer(skeleton):
        if match["url"] is None:
            if splitter.is_whole(number := int(match["mark"])):
                found.append(Got(decoded=number, saved=splitter.files[number].saved))
                end = match.end()
        elif not end or b"}" in skeleton[end : match.start()]:  # else it is another URL of the image before it
            url = parse(match["url"])
            if isinstance(url, str) and b'"images"' in skeleton[: match.start()]:
                found.append(Got(url=url[:LONGEST_URL]))
    return found


def _charge(billing: dict[str, Any]) -> float | None:
    """Return what was charged. A negative charge is ignored: it would make room below a cap."""
    charged = number(billing.get("credits_charged"))
    return None if charged is None or charged < 0 else charged


def _transaction(value: object) -> str:
    """Return the id of a payment as text: it may be a number as well."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_NUMBER
    return str(value) if is_number else _text(value)


def _balance(value: object) -> float | None:
    """Return the balance of an account: a number, or one as text. It may be negative."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    found = number(value)
    return None if found is None else float(found)


def _text(value: object) -> str:
    return value[:200] if isinstance(value, str) else ""


def _entry(entry: object, splitter: Splitter) -> Got:
    """Return what one entry of ``images`` is: an object, or only the image's text or URL."""
    fields = entry if isinstance(entry, dict) else {}
    if isinstance(entry, str) and (splitter.number(entry) is not None or entry.startswith(("https://", "http://"))):
        fields = {"url": entry}
    elif not isinstance(entry, dict):
        return Got(problem="the entry is not an object")
    mime = _text(fields.get("mime_type"))
    url = _address(fields, splitter)
    number = next((number for value in _values(fields) if (number := splitter.number(value)) is not None), None)
    file = splitter.files[number] if number is not None and number < len(splitter.files) else None
    if file and file.is_missing and not url:
        return Got(mime=mime, problem=file.problem)
    if file and (not url or (file.size and not file.problem)):
        return Got(decoded=number, saved=file.saved, mime=mime, problem=file.problem)
    if url:
        return Got(url=url, mime=mime)
    problem = "the entry holds neither b64_json nor url" if number is None else "the response holds too many images"
    message, _ = message_of(fields)
    return Got(mime=mime, problem=f"{problem}: {message[:500]}" if message and isinstance(entry, dict) else problem)


def _address(fields: dict[str, Any], splitter: Splitter) -> str:
    """Return the URL in an entry: ``url``, or ``image_url`` and an object around it, as other APIs have it."""
    for name in ("url", "image_url"):
        value = fields.get(name)
        value = value.get("url") if isinstance(value, dict) else value
        if isinstance(value, str) and value and splitter.number(value) is None:
            return value[:LONGEST_URL]
    return ""


def _values(value: object, depth: int = 0) -> Iterator[object]:
    """Yield what may be an image in an entry: the keys of the contract first, then all others, in order."""
    if isinstance(value, dict) and depth < _DEEPEST:
        first = [value[name] for name in ("b64_json", "url") if name in value]
        for inner in itertools.chain(first, value.values()):
            yield from _values(inner, depth + 1)
    elif isinstance(value, str):
        yield value
