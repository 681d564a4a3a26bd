"""The text of receipts and error files, as TOML. Pure.

Names and order of the keys are part of the folder protocol (``schema = 1``). Never in them: base64, a key, or the
query of a signed url.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from typing import TYPE_CHECKING, Any

import tomli_w

from imagewatch import __version__
from imagewatch.system.masking import known
from imagewatch.system.text import utc, whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imagewatch.job.running import Attempt
    from imagewatch.protocol.values import Charged, Claim, Input

SCHEMA = 1
_DEEPEST = 16
_MOST_DOTS = 1000
_IDS = ("x-request-id", "cf-ray", "x-vercel-id")


def compose(
    claim: Claim,
    attempt: Attempt,
    finished: float,
    *,
    charged: Charged,
    top: Mapping[str, object],
    images: Sequence[Mapping[str, object]] = (),
    billing: Mapping[str, object] | None = None,
    originals: Sequence[Mapping[str, object]] = (),
) -> tuple[str, dict[str, Any]]:
    """Return the text of a receipt or an error file, and its plain part for the log.

    Args:
        claim: The job.
        attempt: Its newest attempt.
        finished: When this file is written, seconds since the epoch.
        charged: Whether it cost anything.
        top: Keys of the top level that only this kind of file has; they come first.
        images: One table for each image.
        billing: As received.
        originals: One table for each file as dropped, if this file is beside them.
    """
    sent, headers = attempt.sent, attempt.head.headers if attempt.head and attempt.head.status else {}
    values: dict[str, object] = {"schema": SCHEMA, "job": claim.job, "source": claim.source, **top}
    values |= {"owner": claim.owner or None, "charged": charged, "attempts": attempt.made, "version": __version__}
    if sent:
        values |= {"prompt": sent.prompt, "prompt_sha256": sent.prompt_sha256, "endpoint": sent.endpoint}
        values["request"] = sent.fields
    values |= {"billing": billing or None, "times": _times(claim, attempt, finished)}
    values["ids"] = {name: headers[name] for name in _IDS if name in headers} or None
    values["images"] = images or None
    values["inputs"] = [_input(item) for item in sent.inputs] if sent and sent.inputs else None
    values["originals"] = originals or None
    ordered = _ordered(_masked(values))
    return _written(ordered), facts_of(ordered)


def _masked(values: Mapping[str, Any]) -> dict[str, object]:
    """Return the values without API keys, which a server may have repeated. Ours and the sender's stay."""
    masked = {name: value if name in _OWN else known.values(value) for name, value in values.items()}
    if images := values.get("images"):
        masked["images"] = [{**known.values(image), "file": image["file"]} for image in images]
    return masked


def facts_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain part of a result file, to be kept as JSON: TOML takes twenty times as long to read."""
    facts = {name: values[name] for name in _FACTS if name in values}
    facts["answered"] = "answered" in values["times"]
    facts["images"] = [image["file"] for image in values.get("images", [])]
    provider = values.get("provider") or values.get("request", {}).get("provider")
    return {**facts, "provider": provider} if provider else facts


def _written(values: dict[str, Any]) -> str:
    # A multi-line string cannot hold CRLF as it is; nearly always there is none, and lines are easier to read.
    return tomli_w.dumps(values, multiline_strings=r"\r\n" not in json.dumps(values, default=str))


def unvouched(text: str) -> dict[str, Any]:
    """Return the values of a result file that any user may have written.

    Raises:
        ValueError: It is not TOML, or would keep Python's reader busy for hours.
        RecursionError: It is nested too deeply.
    """
    # The reader is quadratic in the depth of dotted keys. Dots in strings are counted, too: only the reader knows
    # what is a string, and any other test can be deceived.
    if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):
        raise ValueError(f"a line of it has more than {_MOST_DOTS} dots")
    return tomllib.loads(text)


def with_files(text: str, moved: Mapping[str, str], before: str, after: str) -> str:
    """Return a result file whose files have other names.

    Args:
        text: The result file.
        moved: New names by old ones.
        before: The argument of ``retry`` in its next step until now.
        after: The argument from now on.
    """
    read = tomllib.loads(text)
    if "next" in read:
        command = re.compile(rf"(?<=retry |again ){re.escape(before)}(?=[ ,])")
        read["next"] = command.sub(lambda _: after, read["next"])
    for table in (*read.get("images", []), *read.get("originals", [])):
        table["file"] = moved.get(table["file"], table["file"])
    return _written(read)


_OWN = {"job", "source", "owner", "next", "prompt", "prompt_sha256", "endpoint", "request", "inputs", "originals"}
_FACTS = ("charged", "credits_charged", "attempts", "status", "message", "problems", "ids")
_ORDER = [
    *("schema", "job", "source", "owner", "message", "status", "code", "credits_required", "problems", "next"),
    *("charged", "credits_charged", "provider", "model", "prompt", "prompt_sha256"),
    *("asked", "got", "attempts", "endpoint", "version"),
]


def _ordered(values: dict[str, object]) -> dict[str, Any]:
    """Put plain values first, in the protocol's order; then tables; TOML needs that."""
    known = {name: values.pop(name) for name in _ORDER if name in values}
    return {name: value for name, value in _tame({**known, **values}, 0).items() if value is not None}


def _times(claim: Claim, attempt: Attempt, finished: float) -> dict[str, object]:
    times: dict[str, object] = {"claimed": utc(claim.at)}
    if attempt.sent:
        times["sent"] = utc(attempt.sent.at)
    if attempt.head and attempt.head.status:
        times["answered"] = utc(attempt.tail.at if attempt.tail and attempt.tail.at else attempt.head.at)
    times["published"] = utc(finished)
    return times


def _input(item: Input) -> dict[str, object]:
    table = {name: getattr(item, name) for name in item.__struct_fields__}
    if item.orientation == 1:
        del table["orientation"]  # the usual case
    return table


def _tame(value: Any, depth: int) -> Any:  # noqa: ANN401, PLR0911  any JSON in, any TOML out
    """Return what TOML can hold of a value: no null, no surrogates, no huge numbers, no endless nesting."""
    if isinstance(value, str):
        return whole(value)
    if depth >= _DEEPEST and isinstance(value, dict | list | tuple):
        return _flat(value)
    if isinstance(value, dict):
        tamed = {whole(str(key)): _tame(inner, depth + 1) for key, inner in value.items()}
        return {key: inner for key, inner in tamed.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [inner for inner in (_tame(item, depth + 1) for item in value) if inner is not None]
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 2**53:
        return int(value)  # 12.0 credits are 12 credits
    return value


def _flat(value: object) -> str:
    try:
        return whole(repr(value)[:2000])
    except RecursionError:
        return "nested too deeply to be shown"
