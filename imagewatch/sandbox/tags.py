"""Faults on request: ``[sandbox: 402]`` in a prompt edits the plan of its response.

Has the table of tags, and reads them from prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from imagewatch.sandbox.contract import REDIRECTED_ROUTE, Refusal, not_enough
from imagewatch.sandbox.image import EncodedImage, with_credentials
from imagewatch.sandbox.replies import canned, json_reply, page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.sandbox.plan import Plan

_TAG_GROUP: Final = re.compile(r"\[\s*sandbox\b([^\]]*)(\]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Tag:
    """One fault that a prompt can ask for.

    Attributes:
        name: The word in the prompt.
        argument: What follows it: nothing, ``S`` (seconds), ``N`` (megabytes), ``TAG`` or ``K TAG``.
        help: What happens, in a few words.
        apply: Edits the plan; gets the argument.
    """

    name: str
    argument: str
    help: str
    apply: Callable[[Plan, float], None]


def _answers(
    name: str,
    summary: str,
    body: object,
    *,
    charged: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Tag:
    """Return a tag for another response. Its status is the number at the beginning of the name, else 200."""
    reply = canned(int(name[:3]) if name[0].isdigit() else 200, body, **(headers or {}))

    def apply(plan: Plan, _: float) -> None:
        plan.reply = reply
        plan.charged = charged

    return Tag(name, "", f"{summary}; {'charged' if charged else 'not charged'}", apply)


def _credits(plan: Plan, _: float) -> None:
    """Apply ``402``."""
    plan.reply = json_reply(402, not_enough(plan.asked.credits, 0).body)
    plan.charged = False


def _edge(status: int, title: str) -> Tag:
    """Return a tag for a page of the proxy before the endpoint; the request may have been charged."""
    headers = {"Server": "cloudflare", "CF-RAY": "8f0000000000sand-BOX"}
    return _answers(str(status), f"page of the proxy: {title}", page(title), charged=True, headers=headers)


def _redirect(status: int) -> Tag:
    """Return a tag for a redirect; the report counts the clients that follow it."""
    headers = {"Location": REDIRECTED_ROUTE}
    return _answers(str(status), "redirect; the report counts clients that follow it", None, headers=headers)


def _sends(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag that changes how the response is sent; ``None`` in the changes stands for the argument."""

    def apply(plan: Plan, value: float) -> None:
        plan.sending.update({key: value if change is None else change for key, change in changes.items()})

    return Tag(name, argument, summary, apply)


def _sets(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag that changes the plan; ``None`` in the changes stands for the argument in bytes."""

    def apply(plan: Plan, value: float) -> None:
        for key, change in changes.items():
            setattr(plan, key, int(value * 1_000_000) if change is None else change)

    return Tag(name, argument, summary, apply)


def _spoils(
    name: str, summary: str, edit: Callable[[list[EncodedImage]], list[EncodedImage]], **changes: object
) -> Tag:
    """Return a tag that edits the images."""
    setting = _sets(name, "", summary, **changes)

    def apply(plan: Plan, value: float) -> None:
        setting.apply(plan, value)
        plan.edits.append(edit)

    return replace(setting, apply=apply)


def _last(spoil: Callable[[EncodedImage], EncodedImage]) -> Callable[[list[EncodedImage]], list[EncodedImage]]:
    """Return an edit of the last image only, so that a response has good and bad ones."""
    return lambda images: [*images[:-1], *map(spoil, images[-1:])]


def _only_counts(plan: Plan, value: float) -> None:
    """Do nothing: ``once`` and ``times`` are read before the tag that follows them."""


_HTML: Final = page("This is not an image").encode()
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
    _answers("400", "moderation refuses the prompt", _BLOCKED),
    _answers("401", "the key is not accepted", {"message": "Unauthorized"}),
    Tag("402", "", "too few credits, with credits_required; not charged", _credits),
    _answers("403", "forbidden, with a nested error object", _FORBIDDEN),
    _answers("404", "no such route", {"detail": "Not Found"}),
    _answers("408", "the endpoint timed out", {"message": "Request timed out"}, charged=True),
    _answers("409", "conflict", {"error": "Conflict", "errorCode": "conflict"}),
    _answers("413", "too large", {"errorCode": "payload_too_large", "message": "Payload too large"}),
    _answers("422", "validation error without a message of its own", _ZOD),
    _answers("429", "rate limit, Retry-After: 1", _LIMITED, headers=_SOON),
    _answers("429-quota", "the quota is used up, with the time until it resets", _QUOTA),
    _answers("429-plain", "429 without a body or Retry-After", None),
    _answers("500", "error with a message", {"message": "The provider failed"}),
    _answers("500-empty", "500 without a body", None),
    _edge(502, "Bad gateway"),
    _answers("503", "page: service unavailable", page("Service Unavailable"), charged=True),
    _answers("503-shutdown", "the request was not admitted, Retry-After: 1", _SHUTDOWN, headers=_SOON),
    _answers("503-interrupted", "a deployment interrupted an admitted request", _INTERRUPTED, charged=True),
    _edge(504, "Gateway time-out"),
    _edge(520, "Web server returned an unknown error"),
    _edge(521, "Web server is down"),
    _edge(522, "Connection timed out"),
    _edge(523, "Origin is unreachable"),
    _edge(524, "A timeout occurred"),
    *map(_redirect, (302, 307, 308)),
    _sends("drop", "", "the connection is closed without a response; charged", ending="drop"),
    _sends("reset", "", "the connection is reset without a response; charged", ending="reset"),
    _sends("drop-headers", "", "the connection is closed in the middle of the headers; charged", ending="drop-headers"),
    _sends("truncate", "", "the connection is closed in the middle of the body; charged", ending="truncate"),
    _sends("slow", "S", "the response is delayed by S seconds", wait=None),
    _sends("trickle", "S", "one byte of the body every S seconds", body_pace=None),
    _sends("trickle-headers", "S", "one byte of the headers every S seconds", head_pace=None),
    _answers("not-json", "200 with a page", page("Welcome"), charged=True),
    _answers("not-object", "200 with a JSON list", ["no object"], charged=True),
    _spoils("no-images", "no images in the response; all are charged", lambda _: []),
    _spoils("fewer", "one image fewer than requested; all are charged", lambda images: images[:-1]),
    _sets("bad-base64", "", "the last image has broken base64", break_base64=True, by_url=False),
    _spoils(
        "bad-picture",
        "the last image is cut off in the middle",
        _last(lambda image: replace(image, data=image.data[: len(image.data) // 2], padding=0)),
    ),
    _spoils(
        "not-picture",
        "the last image is an HTML page, sent as image/png",
        _last(lambda _: EncodedImage(_HTML, "image/png")),
    ),
    _spoils(
        "wrong-mime",
        "every image is a JPEG, sent as image/png",
        lambda images: [replace(image, mime="image/png") for image in images],
        output_format="jpeg",
    ),
    _spoils(
        "credentials",
        "every image is a PNG with content credentials, which are not valid",
        lambda images: [with_credentials(image) for image in images],
        output_format="png",
    ),
    _spoils("svg", "the last image is an SVG", _last(lambda _: EncodedImage(_SVG, "image/svg+xml"))),
    _sets("big", "N", "every image is a valid PNG of N megabytes", padding=None, output_format="png"),
    _sets("url", "", "images as URLs, for every provider", by_url=True),
    _sets("b64", "", "images as base64, for every provider", by_url=False),
    _sets("url-404", "", "URLs that return 404", by_url=True, delivery="404"),
    _sets("url-expired", "", "URLs that have expired", by_url=True, delivery="expired"),
    _sets("url-flaky", "", "URLs that return 503 the first time", by_url=True, delivery="flaky"),
    _sets("url-file", "", "URLs such as file:///etc/hostname", by_url=True, delivery="file"),
    _sets("url-private", "", "URLs with a private address", by_url=True, delivery="private"),
    _sets("url-redirect", "", "URLs that redirect to another one", by_url=True, delivery="redirect"),
    _sets(
        "url-huge",
        "N",
        "URLs that send N megabytes without a length",
        by_url=True,
        delivery="huge",
        padding=None,
        output_format="png",
    ),
    _sets("no-billing", "", "the response has no billing", billing=False),
    _sets("gzip", "", "the response is compressed", gzip=True),
    Tag("once", "TAG", "TAG for the first attempt of a job only; each drop and each probe is a new job", _only_counts),
    Tag("times", "K TAG", "TAG for the first K attempts of a job (by Idempotency-Key, else by prompt)", _only_counts),
)

TAGS: Final[dict[str, Tag]] = {tag.name: tag for tag in _ALL_TAGS}

_ARGUMENTS: Final = {"S": ("seconds", 3600), "N": ("megabytes", 512)}


def tags_help() -> str:
    """Return one line per tag, for ``imagewatch sandbox --tags``."""
    return "\n".join(f"  {f'{tag.name} {tag.argument}':<18} {tag.help}" for tag in TAGS.values())


@dataclass(frozen=True)
class Use:
    """A tag in a prompt; ``limit`` is how often it applies, ``None`` for always."""

    tag: Tag
    value: float
    limit: int | None


def read_tags(prompt: str) -> list[Use]:
    """Read the tags of a prompt. A mistyped one is refused, because it would test nothing."""
    uses = []
    for group in _TAG_GROUP.finditer(prompt):
        rest, closed = group[1].lstrip(), group[2]
        if not closed or not rest.startswith(":"):
            raise Refusal(400, 'sandbox: write tags like "[sandbox: 402]" or "[sandbox: slow 3, gzip]"')
        uses += [_use(item.lower().split()) for item in rest[1:].split(",")]
    return uses


def _use(words: list[str]) -> Use:
    """Read one tag."""
    limit = None
    if words[:1] == ["once"]:
        limit, words = 1, words[1:]
    elif words[:1] == ["times"]:
        limit, words = int(_number(words[1:2], "a count", 1000)), words[2:]
    tag = TAGS.get(words[0]) if words else None
    if tag is None or tag.apply is _only_counts:
        name = ascii(words[0][:40]) if words else "nothing"
        raise Refusal(400, f"sandbox: unknown tag {name}; the tags are {', '.join(TAGS)}")
    if tag.argument:
        return Use(tag, _number(words[1:], *_ARGUMENTS[tag.argument]), limit)
    if words[1:]:
        raise Refusal(400, f"sandbox: {tag.name} takes no argument; separate tags by commas")
    return Use(tag, 0.0, limit)


def _number(words: list[str], unit: str, highest: int) -> float:
    """Read the argument of a tag."""
    if len(words) == 1 and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", words[0]) and float(words[0]) <= highest:
        return float(words[0])
    raise Refusal(400, f"sandbox: a tag needs one argument: {unit}, at most {highest}")
