"""The text of a new configuration: ``config.example.toml``, which comes with the package."""

from __future__ import annotations

import json
from typing import Final

from imagewatch.system.bundled import read
from imagewatch.system.errors import ConfigError, Problem, SpoolError

_EXAMPLE: Final = "config.example.toml"
_EXAMPLE_ROOT: Final = "/srv/imagewatch"


def initial(root: str | None) -> str:
    """Return the text of a new configuration: ``config.example.toml`` for a folder to watch.

    Args:
        root: The folder; without one ``root`` is a comment, so that nothing starts with a folder that was not chosen.

    Raises:
        ConfigError: If the installation lost the file.
    """
    line = f'root = "{_EXAMPLE_ROOT}"\n'
    if root is None:
        return example().replace(f"\n{line}", f"\n## {line}")
    quoted = json.dumps(root, ensure_ascii=False)[1:-1]  # of printable text TOML has the same form
    return example().replace(f'"{_EXAMPLE_ROOT}', f'"{quoted}')


def example() -> str:
    """Return the text of ``config.example.toml``.

    Raises:
        ConfigError: If the installation lost the file.
    """
    try:
        return read(_EXAMPLE)
    except SpoolError:
        problem = Problem(_EXAMPLE, "is missing from the installation", "install imagewatch again")
        raise ConfigError([problem]) from None
