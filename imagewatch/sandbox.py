"""A strict local endpoint with the wire format of the real one, which counts what it "charged".

It is a second, independent reading of the published contract: nothing is shared with the client's side, so
that a misunderstanding on either side shows. Pictures are placeholders, and say so. Prices are made up.

A request passes through four stations::

    _Handler   HTTP: framing, the routes, writing an answer well or badly
    _read      the contract: a body becomes an _Asked, or is refused
    TAGS       misbehaviour on request: "[sandbox: 402]" in a prompt edits the _Plan
    _Books     what was asked and charged, before a byte of the answer is written

The real endpoint promises nothing for ``Idempotency-Key``, so a repeated key buys again here, too.
"""

from __future__ import annotations

import base64
import binascii
import collections
import contextlib
import hashlib
import hmac
import http
import itertools
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
import types
import urllib.parse
import zlib
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from imagewatch import __version__
from imagewatch.errors import ConfigError, ImagewatchError, Problem
from imagewatch.placeholder import Caption, Picture, draw, thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from email.message import Message
    from typing import Self

    from PIL import Image

ROUTE: Final = "/v1/images/generations"
BALANCE_ROUTE: Final = "/v1/metadata/balance"
REPORT_ROUTE: Final = "/sandbox/report"
REDIRECTED_ROUTE: Final = "/sandbox/redirected"
DELIVERY: Final = "/delivery/"

DEFAULT_MODELS: Final = {"flux": "flux-2-pro", "gemini": "gemini-3-pro-image", "openai": "gpt-image-2"}
CREDITS_PER_IMAGE: Final = {"flux": 30, "gemini": 134}  # made up; no price list is public
OPENAI_CREDITS: Final = {"low": 11, "medium": 42, "high": 167, "auto": 42}  # made up as well

MAX_BODY_BYTES: Final = 512 << 20
_MAX_DELIVERY_BYTES: Final = 256 << 20  # kept for download; the oldest go first
_MAX_CALLS: Final = 10_000
_MAX_PROMPT: Final = 32_000
_MAX_SIDE: Final = 4096
_MAX_INPUTS: Final = 14
_MAX_FLUX_INPUTS: Final = 8
_DEFAULT_SIZE: Final = (512, 512)  # a larger one takes longer to draw and shows no more
_ENDLESS: Final = 1_000_000.0

_MAGIC: Final = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_TAG_GROUP: Final = re.compile(r"\[\s*sandbox\b([^\]]*)(\]?)", re.IGNORECASE)


class _Cut(ImagewatchError):  # noqa: N818
    """The connection is to be cut without another byte."""


class _Refusal(ImagewatchError):  # noqa: N818
    """The request is refused with this status; it is not charged."""

    def __init__(self, status: int, message: str, **body: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, **body}


# ---------------------------------------------------------------------------------------------------------
# The contract: a body becomes an _Asked, or is refused.


@dataclass(frozen=True)
class _Input:
    """One input image: its checksum, and a small picture of it when it can be read."""

    sha256: str
    small: Image.Image | None


@dataclass(frozen=True)
class _Asked:
    """A request that keeps to the contract, with the defaults filled in."""

    provider: str
    prompt: str
    model: str
    n: int
    size: tuple[int, int]
    quality: str
    output_format: str
    seed: int | None
    inputs: tuple[_Input, ...]

    @property
    def credits_per_image(self) -> int:
        """What one picture costs here."""
        return CREDITS_PER_IMAGE.get(self.provider) or OPENAI_CREDITS[self.quality]

    @property
    def credits(self) -> int:
        """What the request costs here."""
        return self.credits_per_image * self.n


def _one_of(*allowed: str) -> Callable[[object], str]:
    """Return a rule for a fixed set of words."""

    def rule(value: object) -> str:
        return "" if isinstance(value, str) and value in allowed else f"must be one of {', '.join(allowed)}"

    return rule


def _text(longest: int) -> Callable[[object], str]:
    """Return a rule for text that is not empty."""

    def rule(value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            return f"must be a string of 1 to {longest} characters"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "must be valid Unicode, without lone surrogates"
        return ""

    return rule


def _integer(lowest: float, highest: float) -> Callable[[object], str]:
    """Return a rule for a whole number; ``true`` is none, and neither is ``1.0``."""
    span = f" from {lowest} to {highest}" if highest < float("inf") else ""

    def rule(value: object) -> str:
        good = isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest
        return "" if good else f"must be a whole number{span}"

    return rule


def _size(value: object) -> str:
    """Rule for ``size``."""
    if value == "auto":
        return ""
    sides = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", value) if isinstance(value, str) else None
    good = sides and all(1 <= int(side) <= _MAX_SIDE for side in sides.groups())
    return "" if good else f'must be "auto" or like "1024x1024", with sides up to {_MAX_SIDE}'


def _inputs(value: object) -> str:
    """Rule for ``input_images``; what is in them is looked at later, one by one."""
    good = isinstance(value, list) and len(value) <= _MAX_INPUTS and all(isinstance(item, str) for item in value)
    return "" if good else f"must be a list of at most {_MAX_INPUTS} strings"


_RULES: Final[dict[str, Callable[[object], str]]] = {
    "provider": _one_of(*DEFAULT_MODELS),
    "prompt": _text(_MAX_PROMPT),
    "model": _text(200),
    "n": _integer(1, 4),
    "size": _size,
    "quality": _one_of(*OPENAI_CREDITS),
    "output_format": _one_of("png", "jpeg", "webp"),
    "input_images": _inputs,
    "seed": _integer(float("-inf"), float("inf")),
}
_REQUIRED: Final = ("provider", "prompt")


def _read(body: bytearray, seen: dict[str, Any]) -> _Asked:
    """Check a body against the contract.

    Args:
        body: The bytes received; emptied, so that only one form of a large body is kept at a time.
        seen: What the report says of this request; filled in as far as it could be read.

    Returns:
        The request.

    Raises:
        _Refusal: The body breaks the contract.
    """
    value = _parsed(body)
    for name in _REQUIRED:
        text = value.get(name)
        seen[name] = text[:_MAX_PROMPT] if isinstance(text, str) else None
    problems = list(itertools.islice(_problems(value), 20))
    if problems:
        raise _Refusal(400, "; ".join(problems))
    images = value.get("input_images", [])
    inputs = []
    for index in range(len(images)):
        url, images[index] = images[index], ""
        inputs.append(_input(url, index))
        seen["inputs"].append(inputs[-1].sha256)
    return _asked(value, tuple(inputs))


def _parsed(body: bytearray) -> dict[str, Any]:
    """Parse a body as a JSON object in UTF-8, strictly."""
    try:
        text = body.decode("utf-8")
        body.clear()
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Refusal(400, "the body must be a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that has a key twice: which one counts would be anybody's guess."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in an object")
    return value


def _no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is not JSON")


def _problems(value: dict[str, Any]) -> Iterator[str]:
    """Yield everything that is wrong with the fields."""
    for name in _REQUIRED:
        if name not in value:
            yield f"{name} is required"
    for name, found in value.items():
        rule = _RULES.get(name)
        if rule is None:
            yield f"unknown field {name[:40]!a}; the fields are {', '.join(_RULES)}"
        elif complaint := rule(found):
            yield f"{name} {complaint}"
    images = value.get("input_images")
    if value.get("provider") == "flux" and isinstance(images, list) and len(images) > _MAX_FLUX_INPUTS:
        yield f"input_images: flux takes at most {_MAX_FLUX_INPUTS} images"


def _input(url: str, index: int) -> _Input:
    """Decode one data URL and check that it is what it says."""
    head, comma, text = url.partition(",")
    mime = head.removeprefix("data:").removesuffix(";base64")
    if not comma or head != f"data:{mime};base64" or mime not in _MAGIC:
        kinds = ", ".join(_MAGIC)
        raise _Refusal(400, f"input_images[{index}] must be data:<mime>;base64,<data> with mime {kinds}")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _Refusal(400, f"input_images[{index}] is not valid base64: {error}") from None
    if not _MAGIC[mime].match(content):
        raise _Refusal(400, f"input_images[{index}] says {mime}, but its bytes are something else")
    return _Input(hashlib.sha256(content).hexdigest(), thumbnail(content, mime))


def _asked(value: dict[str, Any], inputs: tuple[_Input, ...]) -> _Asked:
    """Fill in the defaults. ``size`` and ``output_format`` are openai's; the others do not heed them."""
    provider = value["provider"]
    own = value if provider == "openai" else {}
    width, _, height = own.get("size", "auto").partition("x")
    return _Asked(
        provider=provider,
        prompt=value["prompt"],
        model=value.get("model", DEFAULT_MODELS[provider]),
        n=value.get("n", 1),
        size=(int(width), int(height)) if height else _DEFAULT_SIZE,
        quality=value.get("quality", "auto"),
        output_format=own.get("output_format", "png") if provider == "openai" else "jpeg",
        seed=value.get("seed"),
        inputs=inputs,
    )


# ---------------------------------------------------------------------------------------------------------
# Answers.

_NO_HEADERS: Final[Mapping[str, str]] = types.MappingProxyType({})

Ending = Literal["whole", "drop", "reset", "drop-headers", "truncate"]


@dataclass(frozen=True)
class _Reply:
    """An answer, and how to spoil its sending.

    Attributes:
        status: The HTTP status.
        parts: The body; pictures in it are written in base64.
        headers: Further headers.
        wait: Seconds before the first byte.
        head_pace: Seconds before each byte of the head.
        body_pace: Seconds before each byte of the body.
        ending: How far the answer gets.
        sized: Whether the length is said; otherwise closing the connection ends the body.
    """

    status: int
    parts: tuple[bytes | Picture, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0
    head_pace: float = 0.0
    body_pace: float = 0.0
    ending: Ending = "whole"
    sized: bool = True

    @property
    def length(self) -> int:
        """Number of bytes of the body."""
        return sum(part.base64_length if isinstance(part, Picture) else len(part) for part in self.parts)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces."""
        for part in self.parts:
            if isinstance(part, Picture):
                yield from part.base64()
            else:
                yield part

    def compressed(self) -> _Reply:
        """Return the same answer in gzip."""
        packer = zlib.compressobj(level=1, wbits=31)
        packed = b"".join([*map(packer.compress, self.chunks()), packer.flush()])
        return replace(self, parts=(packed,), headers={**self.headers, "Content-Encoding": "gzip"})


def _json(status: int, value: object, **headers: str) -> _Reply:
    """Return an answer in JSON."""
    return _Reply(status, (json.dumps(value).encode(),), {"Content-Type": "application/json", **headers})


def _page(title: str) -> str:
    """Return a page such as a proxy in front of the endpoint makes."""
    return f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"


def _canned(status: int, body: object, headers: Mapping[str, str]) -> _Reply:
    """Return an answer with a page (text), JSON (anything else) or nothing (``None``)."""
    if body is None:
        return _Reply(status, (), headers)
    if isinstance(body, str):
        return _Reply(status, (body.encode(),), {"Content-Type": "text/html; charset=UTF-8", **headers})
    return _json(status, body, **headers)


def _not_enough(needed: int, left: float) -> _Refusal:
    """Return the refusal of a request that costs more than is left."""
    message = f"Not enough credits: estimated to cost {needed}, only {left:g} available"
    return _Refusal(402, message, errorCode="not-enough-credits", credits_required=needed)


# ---------------------------------------------------------------------------------------------------------
# Misbehaviour on request.


@dataclass
class _Plan:
    """What will be done with a request; tags edit it.

    Attributes:
        asked: The request.
        reply: An answer instead of pictures.
        charged: Whether it costs.
        output_format: What to draw.
        padding: Bytes to blow each PNG up by.
        by_url: Whether pictures go out as urls.
        delivery: How a url misbehaves, a key of ``_FETCHES`` or ``_ODD_URLS``.
        edits: What is done to the pictures once they are drawn.
        break_base64: Whether the last picture's base64 is broken.
        billing: Whether the answer has it.
        gzip: Whether the answer is compressed.
        sending: What to change in the reply.
    """

    asked: _Asked
    reply: _Reply | None = None
    charged: bool = True
    output_format: str = ""
    padding: int = 0
    by_url: bool = False
    delivery: str = ""
    edits: list[Callable[[list[Picture]], list[Picture]]] = field(default_factory=list)
    break_base64: bool = False
    billing: bool = True
    gzip: bool = False
    sending: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tag:
    """One thing the sandbox does when a prompt asks for it.

    Attributes:
        name: The word in the prompt.
        argument: What follows it: nothing, ``S`` (seconds), ``N`` (megabytes), ``TAG`` or ``K TAG``.
        help: What happens, in half a line.
        apply: Edits the plan; gets the argument.
    """

    name: str
    argument: str
    help: str
    apply: Callable[[_Plan, float], None]


def _answers(
    name: str,
    summary: str,
    body: object,
    *,
    charged: bool = False,
    headers: Mapping[str, str] = _NO_HEADERS,
) -> Tag:
    """Return a tag that answers something else; its name begins with the status, or that is 200."""
    reply = _canned(int(name[:3]) if name[0].isdigit() else 200, body, headers)

    def apply(plan: _Plan, _: float) -> None:
        plan.reply = reply
        plan.charged = charged

    return Tag(name, "", f"{summary}; {'charged' if charged else 'not charged'}", apply)


def _credits(plan: _Plan, _: float) -> None:
    """Apply ``402``."""
    plan.reply = _json(402, _not_enough(plan.asked.credits, 0).body)
    plan.charged = False


def _edge(status: int, title: str) -> Tag:
    """Return a tag that answers as the proxy in front does; the work behind it may have been done."""
    headers = {"Server": "cloudflare", "CF-RAY": "8f0000000000sand-BOX"}
    return _answers(str(status), f"page of the proxy: {title}", _page(title), charged=True, headers=headers)


def _redirect(status: int) -> Tag:
    """Return a tag that points elsewhere; the report counts who follows."""
    headers = {"Location": REDIRECTED_ROUTE}
    return _answers(str(status), 'redirect; following it counts in "redirected"', None, headers=headers)


def _sends(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag about the sending; ``None`` in the changes stands for the argument."""

    def apply(plan: _Plan, value: float) -> None:
        plan.sending.update({key: value if change is None else change for key, change in changes.items()})

    return Tag(name, argument, summary, apply)


def _sets(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag about the plan; ``None`` in the changes stands for the argument in bytes."""

    def apply(plan: _Plan, value: float) -> None:
        for key, change in changes.items():
            setattr(plan, key, int(value * 1_000_000) if change is None else change)

    return Tag(name, argument, summary, apply)


def _spoils(name: str, summary: str, edit: Callable[[list[Picture]], list[Picture]], **changes: object) -> Tag:
    """Return a tag that edits the pictures."""
    setting = _sets(name, "", summary, **changes)

    def apply(plan: _Plan, value: float) -> None:
        setting.apply(plan, value)
        plan.edits.append(edit)

    return replace(setting, apply=apply)


def _last(spoil: Callable[[Picture], Picture]) -> Callable[[list[Picture]], list[Picture]]:
    """Return an edit of the last picture only, so that good ones before it can be told from it."""
    return lambda pictures: [*pictures[:-1], *map(spoil, pictures[-1:])]


def _only_counts(plan: _Plan, value: float) -> None:
    """Do nothing: ``once`` and ``times`` are read before the tag that follows them."""


_HTML: Final = _page("This is no picture").encode()
_SVG: Final = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'
_SOON: Final = {"Retry-After": "1"}
_ZOD: Final = {"name": "ZodError", "issues": [{"path": ["n"], "message": "Number must be at most 4"}]}
_BLOCKED: Final = {
    "message": "Your request was rejected by the safety system",
    "code": "moderation_blocked",
    "type": "image_generation_user_error",
}
_LIMITED: Final = {"error": "Too many requests", "errorCode": "route_rps_rate_limit_exceeded"}
_QUOTA: Final = {
    "error": "Quota exceeded",
    "reasons": ["exceeded-quota"],
    "reason_text": "You have exceeded your quota",
    "timeToQuotaResetMs": 60_000,
}
_SHUTDOWN: Final = {
    "error": "The API is shutting down, try again",
    "errorCode": "cloud_api_shutting_down",
    "admitted": False,
    "retryable": True,
}
_INTERRUPTED: Final = {
    "error": "A deployment interrupted this",
    "errorCode": "cloud_api_deployment_interrupted",
}
_FORBIDDEN: Final = {
    "error": {"type": "forbidden", "message": "Forbidden", "detail": "not for this key"},
    "run_id": "r",
}

_ALL_TAGS: Final = (
    _answers("400", "the prompt is refused by moderation", _BLOCKED),
    _answers("401", "the key is refused", {"message": "Unauthorized"}),
    Tag("402", "", "too few credits, with credits_required; not charged", _credits),
    _answers("403", "forbidden, with a nested error object", _FORBIDDEN),
    _answers("404", "no such route", {"detail": "Not Found"}),
    _answers("408", "the endpoint gave up waiting", {"message": "Request timed out"}, charged=True),
    _answers("409", "conflict", {"error": "Conflict", "errorCode": "conflict"}),
    _answers("413", "too large", {"errorCode": "payload_too_large", "message": "Payload too large"}),
    _answers("422", "validation error without a message of its own", _ZOD),
    _answers("429", "rate limit, Retry-After: 1", _LIMITED, headers=_SOON),
    _answers("429-quota", "the quota is used up, with the time until it resets", _QUOTA),
    _answers("429-plain", "429 without a body or Retry-After", None),
    _answers("500", "error with a message", {"message": "The provider failed"}),
    _answers("500-empty", "500 without a body", None),
    _edge(502, "Bad gateway"),
    _answers("503", "page: service unavailable", _page("Service Unavailable"), charged=True),
    _answers("503-shutdown", "the typed proof of non-admission, Retry-After: 1", _SHUTDOWN, headers=_SOON),
    _answers("503-interrupted", "a deployment interrupted accepted work", _INTERRUPTED, charged=True),
    _edge(504, "Gateway time-out"),
    _edge(520, "Web server returned an unknown error"),
    _edge(521, "Web server is down"),
    _edge(522, "Connection timed out"),
    _edge(523, "Origin is unreachable"),
    _edge(524, "A timeout occurred"),
    *map(_redirect, (302, 307, 308)),
    _sends("drop", "", "the connection is closed without an answer; charged", ending="drop"),
    _sends("reset", "", "the connection is reset without an answer; charged", ending="reset"),
    _sends("drop-headers", "", "closed in the middle of the headers; charged", ending="drop-headers"),
    _sends("truncate", "", "closed in the middle of the body; charged", ending="truncate"),
    _sends("slow", "S", "waits S seconds before answering", wait=None),
    _sends("trickle", "S", "sends one byte of the body every S seconds", body_pace=None),
    _sends("trickle-headers", "S", "sends one byte of the headers every S seconds", head_pace=None),
    _answers("not-json", "200 with a page", _page("Welcome"), charged=True),
    _answers("not-object", "200 with a JSON list", ["no object"], charged=True),
    _spoils("no-images", "no images in the answer; all are charged", lambda _: []),
    _spoils("fewer", "one image less than asked; all are charged", lambda pictures: pictures[:-1]),
    _sets("bad-base64", "", "the last image has broken base64", break_base64=True, by_url=False),
    _spoils(
        "bad-picture",
        "the last image ends half way",
        _last(lambda picture: replace(picture, data=picture.data[: len(picture.data) // 2], padding=0)),
    ),
    _spoils(
        "not-picture",
        "the last image is a page that says image/png",
        _last(lambda _: Picture(_HTML, "image/png")),
    ),
    _spoils(
        "wrong-mime",
        "every image says image/png and is a JPEG",
        lambda pictures: [replace(picture, mime="image/png") for picture in pictures],
        output_format="jpeg",
    ),
    _spoils("svg", "the last image is an SVG", _last(lambda _: Picture(_SVG, "image/svg+xml"))),
    _sets("big", "N", "every image is a valid PNG of N megabytes", padding=None, output_format="png"),
    _sets("url", "", "images as urls, whatever the provider", by_url=True),
    _sets("b64", "", "images as base64, whatever the provider", by_url=False),
    _sets("url-404", "", "urls that answer 404", by_url=True, delivery="404"),
    _sets("url-expired", "", "urls that have expired already", by_url=True, delivery="expired"),
    _sets("url-flaky", "", "urls that answer 503 the first time", by_url=True, delivery="flaky"),
    _sets("url-file", "", "urls like file:///etc/hostname", by_url=True, delivery="file"),
    _sets("url-private", "", "urls on a private address", by_url=True, delivery="private"),
    _sets("url-redirect", "", "urls that redirect to another one", by_url=True, delivery="redirect"),
    _sets(
        "url-huge",
        "N",
        "urls that stream N megabytes without a length",
        by_url=True,
        delivery="huge",
        padding=None,
        output_format="png",
    ),
    _sets("no-billing", "", "the answer has no billing", billing=False),
    _sets("gzip", "", "the answer is compressed", gzip=True),
    Tag("once", "TAG", "TAG for the first request with this Idempotency-Key (or prompt) only", _only_counts),
    Tag("times", "K TAG", "TAG for the first K requests with this Idempotency-Key (or prompt)", _only_counts),
)

TAGS: Final[dict[str, Tag]] = {tag.name: tag for tag in _ALL_TAGS}

_ARGUMENTS: Final = {"S": ("seconds", 3600), "N": ("megabytes", 512)}


def tags_help() -> str:
    """Return one line per tag, for ``imagewatch sandbox --help``."""
    return "\n".join(f"  {f'{tag.name} {tag.argument}':<18} {tag.help}" for tag in TAGS.values())


@dataclass(frozen=True)
class _Use:
    """A tag as a prompt uses it; ``limit`` is how often it applies, ``None`` for always."""

    tag: Tag
    value: float
    limit: int | None


def _uses(prompt: str) -> list[_Use]:
    """Read the tags of a prompt; a mistyped one is refused, as it would silently test nothing."""
    uses = []
    for group in _TAG_GROUP.finditer(prompt):
        rest, closed = group[1].lstrip(), group[2]
        if not closed or not rest.startswith(":"):
            raise _Refusal(400, 'sandbox: write tags like "[sandbox: 402]" or "[sandbox: slow 3, gzip]"')
        uses += [_use(item.lower().split()) for item in rest[1:].split(",")]
    return uses


def _use(words: list[str]) -> _Use:
    """Read one tag."""
    limit = None
    if words[:1] == ["once"]:
        limit, words = 1, words[1:]
    elif words[:1] == ["times"]:
        limit, words = int(_number(words[1:2], "a count", 1000)), words[2:]
    tag = TAGS.get(words[0]) if words else None
    if tag is None or tag.apply is _only_counts:
        name = ascii(words[0][:40]) if words else "nothing"
        raise _Refusal(400, f"sandbox: unknown tag {name}; the tags are {', '.join(TAGS)}")
    if tag.argument:
        return _Use(tag, _number(words[1:], *_ARGUMENTS[tag.argument]), limit)
    if words[1:]:
        raise _Refusal(400, f"sandbox: {tag.name} takes no argument; separate tags by commas")
    return _Use(tag, 0.0, limit)


def _number(words: list[str], unit: str, highest: int) -> float:
    """Read the argument of a tag."""
    if len(words) == 1 and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", words[0]) and float(words[0]) <= highest:
        return float(words[0])
    raise _Refusal(400, f"sandbox: a tag needs one argument: {unit}, at most {highest}")


# ---------------------------------------------------------------------------------------------------------
# Downloads.


@dataclass
class _Parcel:
    """A picture waiting to be fetched."""

    picture: Picture
    kind: str
    fetches: int = 0


class _Deliveries:
    """The image host: signed urls that expire. Thread safe."""

    def __init__(self, base_url: str, lifetime: float, clock: Callable[[], float]) -> None:
        self._base_url = base_url
        self._lifetime = lifetime
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._parcels: dict[str, _Parcel] = {}
        self._held = 0
        self._lock = threading.Lock()

    def offer(self, picture: Picture, kind: str) -> str:
        """Keep a picture for download and return its url."""
        if kind in _ODD_URLS:
            return _ODD_URLS[kind]
        name = secrets.token_hex(12)
        with self._lock:
            self._parcels[name] = _Parcel(picture, kind)
            self._held += len(picture.data)
            while self._held > _MAX_DELIVERY_BYTES:
                self._held -= len(self._parcels.pop(next(iter(self._parcels))).picture.data)
        lifetime = -1.0 if kind == "expired" else self._lifetime
        suffix = "png" if picture.mime == "image/png" else "jpeg"
        return self._signed(f"{DELIVERY}{name}/sample.{suffix}", f"{self._clock() + lifetime:.6f}")

    def fetch(self, target: urllib.parse.SplitResult) -> _Reply:
        """Answer a download."""
        query = urllib.parse.parse_qs(target.query)
        expiry, signature = query.get("se", [""])[0], query.get("sig", [""])[0]
        if not hmac.compare_digest(self._signature(target.path, expiry).encode(), signature.encode("utf-8", "replace")):
            return _json(403, {"message": "the signature is missing or wrong"})
        if self._clock() >= float(expiry):
            return _json(403, {"message": "the url has expired"})
        with self._lock:
            parcel = self._parcels.get(target.path.split("/")[2])
            if parcel is None:
                return _json(404, {"message": "no such picture"})
            parcel.fetches += 1
        return _FETCHES.get(parcel.kind, _delivered)(self, parcel)

    def moved(self, parcel: _Parcel) -> _Reply:
        """Point to the same picture under another url."""
        return _Reply(302, (), {"Location": self.offer(parcel.picture, "")})

    def _signature(self, path: str, expiry: str) -> str:
        """Return the signature of a path and the time it ends."""
        return hmac.new(self._secret, f"{path}\n{expiry}".encode("utf-8", "replace"), "sha256").hexdigest()

    def _signed(self, path: str, expiry: str) -> str:
        """Return a url that can be fetched until then."""
        return f"{self._base_url}{path}?se={expiry}&sig={self._signature(path, expiry)}"


def _delivered(_: _Deliveries, parcel: _Parcel) -> _Reply:
    """Answer a download with the picture."""
    return _Reply(200, tuple(parcel.picture.chunks()), {"Content-Type": parcel.picture.mime})


def _missing(_: _Deliveries, __: _Parcel) -> _Reply:
    """Answer the download of ``url-404``."""
    return _json(404, {"message": "no such picture"})


def _flaky(deliveries: _Deliveries, parcel: _Parcel) -> _Reply:
    """Answer a download of ``url-flaky``: only the first one fails."""
    if parcel.fetches == 1:
        return _canned(503, _page("Try again"), {})
    return _delivered(deliveries, parcel)


def _huge(deliveries: _Deliveries, parcel: _Parcel) -> _Reply:
    """Answer a download of ``url-huge``: the client cannot know beforehand how much is coming."""
    return replace(_delivered(deliveries, parcel), sized=False)


_FETCHES: Final[dict[str, Callable[[_Deliveries, _Parcel], _Reply]]] = {
    "404": _missing,
    "flaky": _flaky,
    "huge": _huge,
    "redirect": _Deliveries.moved,
}
_ODD_URLS: Final = {"file": "file:///etc/hostname", "private": "http://10.0.0.1/x.png"}


# ---------------------------------------------------------------------------------------------------------
# The books.


class _Books:
    """What was asked and charged. Thread safe; an entry is complete once it can be seen."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.balance: float | None = None
        self._clock = clock
        self._changed = threading.Condition()
        self._calls: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MAX_CALLS)
        self._faults: collections.deque[str] = collections.deque(maxlen=100)
        self._used: collections.OrderedDict[tuple[str, str], int] = collections.OrderedDict()
        self._counts = dict.fromkeys(
            ("requests", "charged", "credits", "bearer_at_image_host", "redirected", "delivered"), 0
        )

    def enter(self, seen: dict[str, Any], status: int, cost: int) -> None:
        """Record a request and take its cost, or refuse it when the balance is too low."""
        with self._changed:
            if self.balance is not None and cost:
                if cost > self.balance:
                    raise _not_enough(cost, self.balance)
                self.balance -= cost
            self._calls.append({**seen, "status": status, "credits": cost, "at": self._clock()})
            self._counts["requests"] += 1
            self._counts["charged"] += bool(cost)
            self._counts["credits"] += cost
            self._changed.notify_all()

    def count(self, name: str) -> None:
        """Count something that is not a request."""
        with self._changed:
            self._counts[name] += 1

    def fault(self, text: str) -> None:
        """Keep an error of the sandbox itself: nothing goes to stderr, and nothing is hidden either."""
        with self._changed:
            self._faults.append(text)

    def first(self, limit: int, who: str, what: str) -> bool:
        """Count a use of a limited tag and return whether it still applies."""
        with self._changed:
            used = self._used.pop((who, what), 0) + 1
            self._used[who, what] = used
            while len(self._used) > _MAX_CALLS:
                self._used.popitem(last=False)
            return used <= limit

    def wait_for(self, count: int, timeout: float) -> bool:
        """Wait until that many requests are recorded."""
        with self._changed:
            return self._changed.wait_for(lambda: self._counts["requests"] >= count, timeout)

    def report(self) -> dict[str, Any]:
        """Return everything."""
        with self._changed:
            calls = [{**call, "inputs": [*call["inputs"]], "images": [*call["images"]]} for call in self._calls]
            return {**self._counts, "faults": list(self._faults), "calls": calls}


# ---------------------------------------------------------------------------------------------------------
# The server.


class Sandbox:
    """A strict local endpoint that speaks the wire format of the real one and counts what it charged.

    The address is bound on construction, so ``base_url`` is valid at once. Use as a context manager, or
    with ``start`` and ``stop``, or in the foreground with ``serve_forever``.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes any free one.
        key: The key that must be sent; ``None`` accepts any.
        latency_seconds: Waited before each answer to a request for pictures.
        url_lifetime_seconds: How long a signed url can be fetched.
        clock: Seconds that only grow; decides about urls, and stamps the report.
        on_request: Called with one line per HTTP request, from any thread.

    Attributes:
        base_url: Where it listens, e.g. ``http://127.0.0.1:40123``.
        key: As given.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(  # noqa: PLR0913  all by name, all optional
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str | None = None,
        latency_seconds: float = 0.0,
        url_lifetime_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        on_request: Callable[[str], None] | None = None,
    ) -> None:
        self.key = key
        self._latency = latency_seconds
        self._on_request = on_request
        self._stopping = threading.Event()
        self._gate = threading.Event()
        self._gate.set()
        self._one_body = threading.Lock()
        self._books = _Books(clock)
        self._served = False
        try:
            self._server = _Server((host, port), self)
        except (OSError, OverflowError) as error:
            reason = f"cannot listen on {host}:{port}: {error}"
            raise ConfigError([Problem("sandbox", reason, "choose another host or port")]) from error
        self.base_url = f"http://{host}:{self._server.server_address[1]}"
        self._deliveries = _Deliveries(self.base_url, url_lifetime_seconds, clock)

    @property
    def balance(self) -> float | None:
        """Credits left; ``None`` is endless. A request that costs more is answered 402."""
        return self._books.balance

    @balance.setter
    def balance(self, credits_left: float | None) -> None:
        self._books.balance = credits_left

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve in the background."""
        self._served = True
        threading.Thread(target=self._server.serve_forever, daemon=True, name="sandbox").start()

    def serve_forever(self) -> None:
        """Serve in the foreground until interrupted or stopped from another thread."""
        self._served = True
        try:
            self._server.serve_forever()
        finally:
            self._close()

    def stop(self) -> None:
        """Stop serving. Requests still waiting are cut off without an answer, as when a server dies."""
        self._stopping.set()
        if self._served:
            self._server.wake()
            self._server.shutdown()
        self._close()

    def hold(self) -> None:
        """Make requests wait after they were recorded and charged, before they are answered."""
        self._gate.clear()

    def release(self) -> None:
        """Answer what waits."""
        self._gate.set()

    def wait_for_requests(self, count: int, timeout: float) -> bool:
        """Wait until requests were wholly received and recorded.

        Args:
            count: How many, since construction.
            timeout: Seconds to wait at most.

        Returns:
            Whether so many came.
        """
        return self._books.wait_for(count, timeout)

    def report(self) -> dict[str, Any]:
        """Return what was asked and charged so far; the same as ``GET /sandbox/report``."""
        return self._books.report()

    def _close(self) -> None:
        """Free what waits and close everything."""
        self._stopping.set()
        self._gate.set()
        self._server.server_close()
        self._server.cut_all(timeout=5.0)

    def pause(self, seconds: float) -> None:
        """Wait, unless the sandbox is being stopped: then the connection is cut."""
        if self._stopping.wait(seconds) if seconds else self._stopping.is_set():
            raise _Cut("stopping")

    def fault(self, text: str) -> None:
        """Keep an error of the sandbox itself for the report."""
        self._books.fault(text)

    def say(self, line: str) -> None:
        """Tell whoever listens about a request."""
        if self._on_request is not None:
            self._on_request(line)

    def generate(self, headers: Message, body: bytearray) -> _Reply:
        """Answer a request for pictures; it is recorded before this returns."""
        key = headers.get("Idempotency-Key")
        seen: dict[str, Any] = {
            "prompt": None,
            "provider": None,
            "idempotency_key": key and key[:200],
            "inputs": [],
            "images": [],
        }
        try:
            reply, cost = self._decide(headers, body, seen)
            self._books.enter(seen, reply.status, cost)
        except _Refusal as refusal:
            reply, cost = _json(refusal.status, refusal.body), 0
            self._books.enter({**seen, "images": []}, reply.status, 0)
        self.say(f"POST {ROUTE} {reply.status} {cost} credits {(seen['prompt'] or '')[:60]!a}")
        self.pause(self._latency + reply.wait)
        self._gate.wait()
        self.pause(0)
        return reply

    def fetch(self, headers: Message, target: urllib.parse.SplitResult) -> _Reply:
        """Answer a download; a key has no business there, so it is counted and refused."""
        if "Authorization" in headers:
            self._books.count("bearer_at_image_host")
            return _json(400, {"message": "never send the key to an image host"})
        reply = self._deliveries.fetch(target)
        if reply.status == http.HTTPStatus.OK:
            self._books.count("delivered")
        return reply

    def show_balance(self, headers: Message, _: urllib.parse.SplitResult) -> _Reply:
        """Answer what is left."""
        try:
            self._authorise(headers)
        except _Refusal as refusal:
            return _json(refusal.status, refusal.body)
        left = _ENDLESS if self.balance is None else self.balance
        names = ("total_balance", "monthly_credit_balance", "purchased_credit_balance")
        return _json(200, {**dict(zip(names, (left, 0, left), strict=True)), "billing_tier": "sandbox"})

    def show_report(self, _: Message, __: urllib.parse.SplitResult) -> _Reply:
        """Answer what was asked and charged."""
        return _json(200, self.report())

    def count_redirected(self, _: Message, __: urllib.parse.SplitResult) -> _Reply:
        """Count somebody who followed a redirect of the paid call."""
        self._books.count("redirected")
        return _json(200, {"message": "the redirect was followed"})

    def _decide(self, headers: Message, body: bytearray, seen: dict[str, Any]) -> tuple[_Reply, int]:
        """Return the answer to a request and its cost."""
        self._authorise(headers)
        if headers.get_content_type() != "application/json":
            raise _Refusal(400, "Content-Type must be application/json")
        with self._one_body:  # large bodies are taken apart one at a time, or memory would be theirs
            asked = _read(body, seen)
        plan = _Plan(asked, by_url=asked.provider == "flux", output_format=asked.output_format)
        for use in _uses(asked.prompt):
            who = seen["idempotency_key"] or asked.prompt
            if use.limit is None or self._books.first(use.limit, who, f"{use.tag.name} {use.value}"):
                use.tag.apply(plan, use.value)
        reply = replace(plan.reply or self._pictures(plan, seen), **plan.sending)
        return reply.compressed() if plan.gzip else reply, asked.credits if plan.charged else 0

    def _authorise(self, headers: Message) -> None:
        """Refuse a request without the right key."""
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        right = self.key is None or hmac.compare_digest(key.encode(), self.key.encode())
        if scheme != "Bearer" or not key.strip() or not right:
            raise _Refusal(401, "Unauthorized: send Authorization: Bearer <key>")

    def _pictures(self, plan: _Plan, seen: dict[str, Any]) -> _Reply:
        """Draw what was asked and return the answer with it."""
        asked = plan.asked
        serial = f"no. {secrets.token_hex(4)}" if asked.seed is None else f"seed {asked.seed}"
        small = [item.small for item in asked.inputs]
        pictures = []
        for index in range(1, asked.n + 1):
            caption = Caption(asked.provider, asked.model, asked.prompt, index, asked.n, serial)
            pictures.append(replace(draw(caption, asked.size, plan.output_format, small), padding=plan.padding))
        for edit in plan.edits:
            pictures = edit(pictures)
        seen["images"] = [picture.sha256 for picture in pictures]
        if plan.break_base64:
            seen["images"][-1:] = [None]
        parts: list[bytes | Picture] = [json.dumps({"provider": asked.provider, "model": asked.model})[:-1].encode()]
        parts.append(b', "images": [')
        for index, picture in enumerate(pictures):
            parts.append(b", " if index else b"")
            broken = plan.break_base64 and picture is pictures[-1]
            parts += [_broken(picture)] if broken else self._entry(plan, picture)
        billing = {"credits_charged": asked.credits, "credits_per_image": asked.credits_per_image}
        parts.append(b"]" + (b', "billing": ' + json.dumps(billing).encode() if plan.billing else b"") + b"}")
        return _Reply(200, tuple(parts), {"Content-Type": "application/json"})

    def _entry(self, plan: _Plan, picture: Picture) -> list[bytes | Picture]:
        """Return one entry of ``images``, by url or in base64."""
        mime = json.dumps(picture.mime)
        if plan.by_url:
            url = json.dumps(self._deliveries.offer(picture, plan.delivery))
            return [f'{{"url": {url}, "mime_type": {mime}}}'.encode()]
        return [b'{"b64_json": "', picture, f'", "mime_type": {mime}}}'.encode()]


def _broken(picture: Picture) -> bytes:
    """Return an entry whose base64 even lenient decoders refuse: one character too many."""
    text = binascii.b2a_base64(picture.data, newline=False).decode()
    value = {"b64_json": text[: len(text) // 8 * 4 + 1] + "*", "mime_type": picture.mime}
    return json.dumps(value).encode()


_GETS: Final[dict[str, Callable[[Sandbox, Message, urllib.parse.SplitResult], _Reply]]] = {
    BALANCE_ROUTE: Sandbox.show_balance,
    REPORT_ROUTE: Sandbox.show_report,
    REDIRECTED_ROUTE: Sandbox.count_redirected,
}


class _Server(ThreadingHTTPServer):
    """One daemon thread per connection; knows its open connections, so that it can cut them."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, address: tuple[str, int], sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._open: set[socket.socket] = set()
        self._closed = threading.Condition()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the look-up of the own host name that the standard library does here."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  as inherited
        """Start the thread of a connection."""
        with self._closed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401  as inherited
        """End a connection."""
        super().shutdown_request(request)
        with self._closed:
            self._open.discard(request)
            self._closed.notify_all()

    def wake(self) -> None:
        """Let the accepting thread see at once that it is to end, not at its next look."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def cut_all(self, timeout: float) -> None:
        """Cut all connections and wait for their threads."""
        with self._closed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._closed.wait_for(lambda: not self._open, timeout)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002  as inherited
        """Keep an error for the report, unless it is only a client that hung up."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError | _Cut):
            self.sandbox.fault(repr(error)[:500])


class _Handler(BaseHTTPRequestHandler):
    """HTTP on one connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 600  # an abandoned connection does not keep its thread for ever
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a GET."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the body is not read, so nothing after it could be, either
        target = self._target()
        sandbox = self.server.sandbox
        if target.path.startswith(DELIVERY):
            reply = sandbox.fetch(self.headers, target)
        elif route := _GETS.get(target.path):
            reply = route(sandbox, self.headers, target)
        else:
            reply = self._no_route(target)
        sandbox.say(f"GET {target.path!a} {reply.status}")
        self._send(reply)

    def do_POST(self) -> None:
        """Answer a POST, after its body was read whole."""
        target = self._target()
        body = self._body()
        if body is None:
            return
        if target.path == ROUTE:
            self._send(self.server.sandbox.generate(self.headers, body))
        elif target.path == REDIRECTED_ROUTE:
            self._send(self.server.sandbox.count_redirected(self.headers, target))
        else:
            self._send(self._no_route(target))

    def do_other(self) -> None:
        """Refuse any other method."""
        self.close_connection = True
        self._send(self._no_route(self._target()))

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_other  # noqa: N815  inherited

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as inherited
        """Say nothing on stderr."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer a request that is not even HTTP."""
        self.close_connection = True
        self._send(_json(code, {"message": message or "not a request"}))

    def _target(self) -> urllib.parse.SplitResult:
        """Return the parsed target; nonsense has no route."""
        try:
            return urllib.parse.urlsplit(self.path)
        except ValueError:
            return urllib.parse.urlsplit("/nonsense")

    def _no_route(self, target: urllib.parse.SplitResult) -> _Reply:
        """Return the answer where there is nothing, or nothing for this method."""
        if target.path == ROUTE:
            return _json(405, {"message": "Method not allowed"}, Allow="POST")
        return _json(404, {"message": "Not found"})

    def _body(self) -> bytearray | None:
        """Read the body, or refuse to and return ``None``."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            refused = (411, "send Content-Length, not chunks")
        elif len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            refused = (400, "Content-Length must be one number")
        elif int(lengths[0]) > MAX_BODY_BYTES:
            refused = (413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        else:
            return self._whole(int(lengths[0]))
        self._refuse_unread(*refused)
        return None

    def _whole(self, length: int) -> bytearray:
        """Read that many bytes."""
        body = bytearray()
        while len(body) < length:
            piece = self.rfile.read(min(1 << 20, length - len(body)))
            if not piece:
                raise ConnectionAbortedError("the client left before its body was whole")
            body += piece
        return body

    def _refuse_unread(self, status: int, message: str) -> None:
        """Refuse a request whose body is not read.

        What the client still sends is thrown away for a moment: closing at once would reset the connection,
        and the client would never see the answer.
        """
        self.close_connection = True
        self._send(_json(status, {"message": message}))
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(2.0)
        for _ in range(64):
            if not self.rfile.read(1 << 20):
                break

    def _send(self, reply: _Reply) -> None:
        """Write an answer, as well or as badly as it asks for."""
        if reply.ending == "reset":
            # With linger 0 closing sends RST. The descriptor is closed here, as a shutdown before it (done by
            # the server otherwise) would send a polite FIN first.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if reply.ending != "whole" or not reply.sized:
            self.close_connection = True
        if reply.ending in {"reset", "drop"}:
            self.close_connection = True
            return
        head = self._head(reply)
        if reply.ending == "drop-headers":
            self.wfile.write(head[: len(head) // 2])
            return
        self._write(head, reply.head_pace)
        left = reply.length // 2 if reply.ending == "truncate" else reply.length
        if self.command == "HEAD":
            return
        for chunk in reply.chunks():
            self._write(chunk[:left], reply.body_pace)
            left -= min(left, len(chunk))

    def _head(self, reply: _Reply) -> bytes:
        """Return the status line and the headers."""
        try:
            phrase = http.HTTPStatus(reply.status).phrase
        except ValueError:
            phrase = "Origin Error"
        headers = {
            "Server": f"imagewatch-sandbox/{__version__}",
            "Date": self.date_time_string(),
            "x-request-id": f"req_{secrets.token_hex(12)}",
            **({"Content-Length": str(reply.length)} if reply.sized else {}),
            **({"Connection": "close"} if self.close_connection else {}),
            **reply.headers,
        }
        lines = [
            f"HTTP/1.1 {reply.status} {phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")

    def _write(self, content: bytes, pace: float) -> None:
        """Write bytes, at once or one by one."""
        if not pace:
            self.wfile.write(content)
            return
        for index in range(len(content)):
            self.server.sandbox.pause(pace)
            self.wfile.write(content[index : index + 1])
