"""Which provider a request goes to, and which options it sends."""

from __future__ import annotations

from typing import Any

from imagewatch.config.schema import Options, Provider, family


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
