"""Typed tables: check a TOML table against a struct and report every problem at once.

``msgspec`` alone stops at the first problem; here each key is converted by itself, so that somebody who
edits a file over a slow share sees all mistakes in one go. Pure.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from imagewatch.system.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Provider = Literal["flux", "gemini", "openai"]
_FAMILIES: tuple[tuple[str, Provider], ...] = (
    ("gpt-image", "openai"),
    ("chatgpt-image", "openai"),
    ("gemini", "gemini"),
    ("nano-banana", "gemini"),
    ("flux", "flux"),
)
"""How the names of the models of each provider begin, as far as they are published."""

S = TypeVar("S", bound=msgspec.Struct)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What may be asked of the endpoint beside the prompt; ``None`` means not set.

    Names, types and bounds are the published request body's (image-generation skill, "Request body");
    ``provider = "auto"`` is ours. ``model`` is not checked: model names change too often.
    """

    provider: Literal["auto", "flux", "gemini", "openai"] | None = None
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=4)] | None = None
    size: Annotated[str, msgspec.Meta(min_length=1, max_length=40)] | None = None
    quality: Literal["low", "medium", "high", "auto"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | None = None

    def over(self, lower: Options) -> Options:
        """Return these options with what is not set here taken from ``lower``."""
        values = {
            name: mine if (mine := getattr(self, name)) is not None else getattr(lower, name)
            for name in self.__struct_fields__
        }
        return Options(**values)


def family(model: str) -> Provider | None:
    """Return whose a model is by its name, or None if no known family has such names."""
    name = model.strip().lower()
    return next((provider for begin, provider in _FAMILIES if name.startswith(begin)), None)


def layered(levels: Sequence[Options]) -> Options:
    """Return the options that count of several levels, the nearest to the prompt first.

    Each option is that of the nearest level that sets it. Provider and model have to belong together, though: of two
    that come from different levels the nearer one was meant. So a nearer ``model`` of a known family decides about the
    provider, and a model that is of another family than a nearer ``provider``, or was set together with another one, is
    left out.
    """
    merged = functools.reduce(lambda upper, lower: upper.over(lower), levels)
    whose = next((level for level in levels if level.model is not None), None)
    chosen = next((level for level in levels if level.provider is not None), None)
    if whose is None or whose.model is None or chosen is None or whose is chosen:
        return merged
    known = family(whose.model)
    if levels.index(whose) < levels.index(chosen):
        return msgspec.structs.replace(merged, provider=known or merged.provider)
    meant = known or (None if whose.provider == "auto" else whose.provider)
    if merged.provider == "auto" or meant in {None, merged.provider}:
        return merged
    return msgspec.structs.replace(merged, model=None)


def nearest(name: str, known: Iterable[str], what: str = "keys") -> str:
    """Return ``did you mean "x"?`` for a mistyped name, or the list of what is known.

    Args:
        name: As it was typed.
        known: The names that there are.
        what: What they name, in the plural.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known {what}: {', '.join(names)}"


def check(table: Mapping[str, Any], struct: type[S], where: str = "") -> tuple[S, list[Problem]]:
    """Convert a table to a struct, key by key.

    Args:
        table: Parsed TOML; values of any type.
        struct: The target; every field must have a default.
        where: Prefix of the field names in problems, e.g. ``limits.``.

    Returns:
        The struct (faulty keys left at their defaults) and everything that was wrong.
    """
    types = _types(struct)
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in table.items():
        if key not in types:
            problems.append(Problem(f"{where}{key}", "unknown key", nearest(key, types)))
            continue
        try:
            values[key] = msgspec.convert(value, types[key], strict=True)
        except msgspec.ValidationError as error:
            problems.append(Problem(f"{where}{key}", _told(error, types[key], value)))
    return struct(**values), problems


@functools.cache
def _types(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the type of each field; kept, as to read annotations takes longer than to check a prompt's options."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def _told(error: msgspec.ValidationError, kind: object, value: object) -> str:
    """Return what msgspec says in words for somebody who never heard of types."""
    words = _words(kind)
    if words:
        return f"must be {'some' if isinstance(value, list) else 'one'} of {', '.join(words)}, not {shown(value)}"
    said = re.match(r"Expected `(\w+)(?: \| null)?`( of length)?(?: ([<>]=?) ([\d.]+))?", str(error))
    if said is None:
        return f"{error}, not {shown(value)}"
    wanted = _KINDS.get(said[1], said[1])
    if said[3]:
        bound = f"{_BOUNDS[said[3]]} {said[4].removesuffix('.0')}"
        wanted += f" of {bound} characters" if said[2] else f" of {bound}"
    within = " in the list" if "`$[" in str(error) else ""
    return f"must be {wanted}{within}, not {shown(value)}"


def _words(kind: object) -> list[str]:
    """Return the words that a type allows, wherever they stand in it."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for inner in get_args(kind) for word in _words(inner)]


def shown(value: object) -> str:
    """Return a value as a person would recognise it in their own file, cut to 60 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested without end; an integer of more digits than Python converts
        return "a value too large to be shown"
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004
