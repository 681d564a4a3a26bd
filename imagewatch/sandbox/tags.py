"""Misbehaviour on request: ``[sandbox: 402]`` in a prompt edits the plan of what is done with it.

Owns the table of tags and the reading of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from imagewatch.sandbox.contract import REDIRECTED_ROUTE, Refusal, not_enough
from imagewatch.sandbox.picture import Picture
from imagewatch.sandbox.replies import canned, json_reply, page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.sandbox.plan import Plan

_TAG_GROUP: Final = re.compile(r"\[\s*sandbox\b([^\]]*)(\]?)", re.IGNORECASE)


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
    apply: Callable[[Plan, float], None]


def _answers(
    name: str,
    summary: str,
    body: object,
    *,
    charged: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Tag:
    """Return a tag that answers something else; its name begins with the status, or that is 200."""
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
    """Return a tag that answers as the proxy in front does; the work behind it may have been done."""
    headers = {"Server": "cloudflare", "CF-RAY": "8f0000000000sand-BOX"}
    return _answers(str(status), f"page of the proxy: {title}", page(title), charged=True, headers=headers)


def _redirect(status: int) -> Tag:
    """Return a tag that points elsewhere; the report counts who follows."""
    headers = {"Location": REDIRECTED_ROUTE}
    return _answers(str(status), 'redirect; following it counts in "redirected"', None, headers=headers)


def _sends(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag about the sending; ``None`` in the changes stands for the argument."""

    def apply(plan: Plan, value: float) -> None:
        plan.sending.update({key: value if change is None else change for key, change in changes.items()})

    return Tag(name, argument, summary, apply)


def _sets(name: str, argument: str, summary: str, **changes: object) -> Tag:
    """Return a tag about the plan; ``None`` in the changes stands for the argument in bytes."""

    def apply(plan: Plan, value: float) -> None:
        for key, change in changes.items():
            setattr(plan, key, int(value * 1_000_000) if change is None else change)

    return Tag(name, argument, summary, apply)


def _spoils(name: str, summary: str, edit: Callable[[list[Picture]], list[Picture]], **changes: object) -> Tag:
    """Return a tag that edits the pictures."""
    setting = _sets(name, "", summary, **changes)

    def apply(plan: Plan, value: float) -> None:
        setting.apply(plan, value)
        plan.edits.append(edit)

    return replace(setting, apply=apply)


def _last(spoil: Callable[[Picture], Picture]) -> Callable[[list[Picture]], list[Picture]]:
    """Return an edit of the last picture only, so that good ones before it can be told from it."""
    return lambda pictures: [*pictures[:-1], *map(spoil, pictures[-1:])]


def _only_counts(plan: Plan, value: float) -> None:
    """Do nothing: ``once`` and ``times`` are read before the tag that follows them."""


_HTML: Final = page("This is no picture").encode()
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
    _answers("503", "page: service unavailable", page("Service Unavailable"), charged=True),
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
    _answers("not-json", "200 with a page", page("Welcome"), charged=True),
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
class Use:
    """A tag as a prompt uses it; ``limit`` is how often it applies, ``None`` for always."""

    tag: Tag
    value: float
    limit: int | None


def read_tags(prompt: str) -> list[Use]:
    """Read the tags of a prompt; a mistyped one is refused, as it would silently test nothing."""
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
