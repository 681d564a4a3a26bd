"""Which options count for a request, to which provider it goes, and what is sent. Pure."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from imagewatch.config.schema import Options, Provider

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAMILIES: tuple[tuple[str, Provider], ...] = (
    ("gpt-image", "openai"),
    ("chatgpt-image", "openai"),
    ("gemini", "gemini"),
    ("nano-banana", "gemini"),
    ("flux", "flux"),
)
"""How the names of the models of each provider begin, as far as they are published."""


def family(model: str) -> Provider | None:
    """Return whose a model is by its name, or None if no known family has such names."""
    name = model.strip().lower()
    return next((provider for begin, provider in _FAMILIES if name.startswith(begin)), None)


def layered(levels: Sequence[Options]) -> Options:
    """Return the options that count of several levels, the nearest to the prompt first.

    Each option is that of the nearest level that sets it. If provider and model come from different levels and do not
    fit each other, the nearer one counts. Three examples, the nearer level first:

    - ``model = "gpt-image-2"``, then ``provider = "flux"``: the provider is openai, because the model is of its family.
    - ``provider = "flux"``, then ``model = "gpt-image-2"``: the model is left out.
    - ``provider = "flux"``, then ``model = "new"`` with ``provider = "openai"``: the model is left out.
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


def choose_provider(options: Options, *, has_inputs: bool) -> Provider | None:
    """Return whom to ask.

    Without a provider (``auto``) the family of the model decides; without a model it is as the skill advises: input
    images → gemini; any of size, quality, output_format → openai; else flux.

    Returns:
        None if there is a model of no known family, and no provider.
    """
    if options.provider not in {None, "auto"}:
        return options.provider  # type: ignore[return-value]  # the set above leaves the three
    if options.model is not None:
        return family(options.model)
    if has_inputs:
        return "gemini"
    return "openai" if options.size or options.quality or options.output_format else "flux"


def body_fields(options: Options, provider: Provider) -> dict[str, Any]:
    """Return the JSON body without ``prompt`` and ``input_images``; what is not set is not sent."""
    fields: dict[str, Any] = {"provider": provider}
    for name in Options.__struct_fields__:
        if name != "provider" and (value := getattr(options, name)) is not None:
            fields[name] = value
    return fields
