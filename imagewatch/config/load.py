"""Reads a configuration: one file, the environment over it, and everything that is wrong reported together.

A value under an unknown key may be the API key and is never printed.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from imagewatch.config.draft import Draft
from imagewatch.config.locate import usual
from imagewatch.config.tables import parse
from imagewatch.system.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import Config

_MAX_FILE_BYTES: Final = 1 << 20


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read a configuration file and the environment over it.

    Args:
        path: The file, or ``None`` when the environment has everything.
        environ: The environment: ``IMAGEWATCH_SECTION__KEY`` and the variables that defaults come from.

    Returns:
        The configuration, complete and checked.

    Raises:
        ConfigError: With all problems together.
    """
    source = "" if path is None else os.path.abspath(path)
    table: dict[str, Any] = {}
    if path is not None:
        text, problem = read_text(source)
        if problem is None:
            table, problem = parse(text, os.path.basename(source))
        if problem is not None:
            raise ConfigError([problem], source=source)
    draft = Draft(table, os.path.dirname(source), environ)
    if path is None:
        with contextlib.suppress(FileNotFoundError):  # the current folder was removed; it may not be needed
            draft.searched = usual(environ, os.getcwd())
    config = draft.config(source or "environment")
    if draft.problems:
        raise ConfigError(draft.named(), source=source)
    return config


def read_text(path: str) -> tuple[str, Problem | None]:
    """Return the text of a file, or what keeps it from being read."""
    name = os.path.basename(path) or path
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or "is not a file name"
        return "", Problem(name, f"cannot be read: {reason}", "check the path and the permissions")
    if len(content) > _MAX_FILE_BYTES:
        return "", Problem(name, "is larger than 1 MiB", "check that it is the right file")
    try:
        return content.decode("utf-8-sig"), None  # some editors write a BOM
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return "", Problem(name, f"is not UTF-8 (line {line})", "save it as UTF-8")
