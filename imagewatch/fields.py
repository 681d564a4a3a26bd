"""Typed tables: check a TOML table against a struct and report every problem at once.

``msgspec`` alone stops at the first problem; here each key is converted by itself, so that somebody who
edits a file over a slow share sees all mistakes in one go. Pure.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from imagewatch.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Provider = Literal["flux", "gemini", "openai"]

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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean "x"?`` for a mistyped name, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known keys: {', '.join(names)}"


def check(table: Mapping[str, Any], struct: type[S], where: str = "") -> tuple[S, list[Problem]]:
    """Convert a table to a struct, key by key.

    Args:
        table: Parsed TOML; values of any type.
        struct: The target; every field must have a default.
        where: Prefix of the field names in problems, e.g. ``limits.``.

    Returns:
        The struct (faulty keys left at their defaults) and everything that was wrong.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(struct)}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in table.items():
        if key not in types:
            problems.append(Problem(f"{where}{key}", "unknown key", nearest(key, types)))
            continue
        try:
            values[key] = msgspec.convert(value, types[key], strict=True)
        except msgspec.ValidationError as error:
            problems.append(Problem(f"{where}{key}", f"{error}, got {shown(value)}"))
    return struct(**values), problems


def shown(value: object) -> str:
    """Return a value as a person would recognise it in their own file, cut to 60 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested without end; an integer of more digits than Python converts
        return "a value too large to be shown"
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004
