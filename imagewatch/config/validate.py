"""Checks a TOML table against a struct and reports all problems together. Pure.

``msgspec`` alone stops at the first problem. Here each key is converted separately, so that a person who edits a file
over a slow share sees all mistakes in one go.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from imagewatch.system.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

S = TypeVar("S", bound=msgspec.Struct)


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
            problems.append(Problem(f"{where}{key}", _message(error, types[key], value)))
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


def _message(error: msgspec.ValidationError, kind: object, value: object) -> str:
    """Return the message of msgspec for a person who does not know types."""
    words = _words(kind)
    if words:
        return f"must be {'some' if isinstance(value, list) else 'one'} of {', '.join(words)}, not {shown(value)}"
    match = re.match(r"Expected `(\w+)(?: \| null)?`( of length)?(?: ([<>]=?) ([\d.]+))?", str(error))
    if match is None:
        return f"{error}, not {shown(value)}"
    wanted = _KINDS.get(match[1], match[1])
    if match[3]:
        bound = f"{_BOUNDS[match[3]]} {match[4].removesuffix('.0')}"
        wanted += f" of {bound} characters" if match[2] else f" of {bound}"
    within = " in the list" if "`$[" in str(error) else ""
    return f"must be {wanted}{within}, not {shown(value)}"


def _words(kind: object) -> list[str]:
    """Return the words that a type allows, at any depth."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for inner in get_args(kind) for word in _words(inner)]


def shown(value: object) -> str:
    """Return a value as a person would recognize it in their own file, cut to 60 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested without end; an integer of more digits than Python converts
        return "a value too large to be shown"
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004
