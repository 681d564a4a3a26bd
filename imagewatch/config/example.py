"""The text of a new configuration: ``config.example.toml``, which the package contains."""

from __future__ import annotations

import importlib.resources
import json
import os
from typing import Final

from imagewatch.config.load import read_text
from imagewatch.system.errors import ConfigError, Problem

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
    packaged = importlib.resources.files("imagewatch").joinpath(_EXAMPLE)
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    text, problem = read_text(os.path.join(os.path.dirname(str(importlib.resources.files("imagewatch"))), _EXAMPLE))
    if problem is not None:
        raise ConfigError([Problem(_EXAMPLE, "is missing from the installation", "install imagewatch again")])
    return text
