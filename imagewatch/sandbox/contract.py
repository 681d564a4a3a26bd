"""The contract: checks a body and returns an `Asked`, or refuses it.

Has the routes, models, made-up prices and limits, and every rule for a request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from imagewatch.sandbox.placeholder import thumbnail
from imagewatch.system.errors import ImagewatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

ROUTE: Final = "/v1/images/generations"
BALANCE_ROUTE: Final = "/v1/metadata/balance"
REPORT_ROUTE: Final = "/sandbox/report"
REDIRECTED_ROUTE: Final = "/sandbox/redirected"
DELIVERY: Final = "/delivery/"
PROPOSED_KEY: Final = "sk-let-sandbox-takes-any-key-0123456789abcdef"
"""As long as a real key, so that masking it changes nothing else. Not a secret."""

DEFAULT_MODELS: Final = {"flux": "flux-2-pro", "gemini": "gemini-3-pro-image", "openai": "gpt-image-2"}
_MODELS: Final = {
    "flux": re.compile(r"flux", re.IGNORECASE),
    "gemini": re.compile(r"gemini|nano-banana", re.IGNORECASE),
    "openai": re.compile(r"(chat)?gpt-image", re.IGNORECASE),
}
"""How the names of the published models begin."""
CREDITS_PER_IMAGE: Final = {"flux": 30, "gemini": 134}  # made up; no price list is public
OPENAI_CREDITS: Final = {"low": 11, "medium": 42, "high": 167, "auto": 42}  # made up as well

MAX_BODY_BYTES: Final = 512 << 20
_MAX_PROMPT: Final = 32_000
_MAX_SIDE: Final = 4096
_MAX_INPUTS: Final = 14
_MAX_FLUX_INPUTS: Final = 8
_DEFAULT_SIZE: Final = (512, 512)  # a larger one only takes longer to draw

_MAGIC: Final = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


class Refusal(ImagewatchError):  # noqa: N818
    """The request is refused with this status; it is not charged."""

    def __init__(self, status: int, message: str, **body: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, **body}


def not_enough(needed: int, left: float) -> Refusal:
    """Return the refusal of a request that costs more than is left."""
    message = f"Not enough credits: estimated to cost {needed}, only {left:g} available"
    return Refusal(402, message, errorCode="not-enough-credits", credits_required=needed)


@dataclass(frozen=True)
class Input:
    """One input image: its checksum, and a small copy of it if it can be decoded."""

    sha256: str
    small: Image.Image | None


@dataclass(frozen=True)
class Asked:
    """A valid request, with the defaults filled in."""

    provider: str
    prompt: str
    model: str
    n: int
    size: tuple[int, int]
    quality: str
    output_format: str
    seed: int | None
    inputs: tuple[Input, ...]

    @property
    def credits_per_image(self) -> int:
        """What one image costs here."""
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
    """Return a rule for a whole number, which neither ``true`` nor ``1.0`` is."""
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
    """Rule for ``input_images``; the content of each is checked later."""
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


def read_request(body: bytearray, seen: dict[str, Any]) -> Asked:
    """Check a body against the contract.

    Args:
        body: The bytes received; emptied, so that only one form of a large body is kept at a time.
        seen: Entry of this request in the report; filled in as far as the body can be read.

    Returns:
        The request.

    Raises:
        Refusal: The body is not valid.
    """
    value = _parsed(body)
    for name in _REQUIRED:
        text = value.get(name)
        seen[name] = text[:_MAX_PROMPT] if isinstance(text, str) else None
    problems = list(itertools.islice(_problems(value), 20))
    if problems:
        raise Refusal(400, "; ".join(problems))
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
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that has a key twice: it is not defined which one counts."""
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
    yield from _wrong_pair(value.get("provider"), value.get("model"))
    images = value.get("input_images")
    if value.get("provider") == "flux" and isinstance(images, list) and len(images) > _MAX_FLUX_INPUTS:
        yield f"input_images: flux takes at most {_MAX_FLUX_INPUTS} images"


def _wrong_pair(provider: object, model: object) -> Iterator[str]:
    """Yield a problem if a model is known to be another provider's. Unknown names are accepted: they change often."""
    if not isinstance(model, str) or not isinstance(provider, str) or provider not in DEFAULT_MODELS:
        return
    others = [other for other, names in _MODELS.items() if other != provider and names.match(model)]
    if others:
        yield f"model {model[:60]!a} is a model of {others[0]}, not of {provider}"


def _input(url: str, index: int) -> Input:
    """Decode one data URL and check that its content has its type."""
    head, comma, text = url.partition(",")
    mime = head.removeprefix("data:").removesuffix(";base64")
    if not comma or head != f"data:{mime};base64" or mime not in _MAGIC:
        kinds = ", ".join(_MAGIC)
        raise Refusal(400, f"input_images[{index}] must be data:<mime>;base64,<data> with mime {kinds}")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refusal(400, f"input_images[{index}] is not valid base64: {error}") from None
    if not _MAGIC[mime].match(content):
        raise Refusal(400, f"input_images[{index}] is declared as {mime}, but its content is something else")
    return Input(hashlib.sha256(content).hexdigest(), thumbnail(content, mime))


def _asked(value: dict[str, Any], inputs: tuple[Input, ...]) -> Asked:
    """Fill in the defaults. ``size`` and ``output_format`` are openai's; the others ignore them."""
    provider = value["provider"]
    own = value if provider == "openai" else {}
    width, _, height = own.get("size", "auto").partition("x")
    return Asked(
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
