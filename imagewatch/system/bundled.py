"""The files that come with imagewatch beside its code: units, schemas, examples, completions, the manual page.

A wheel has them in the package, a checkout has them beside it.
"""

from __future__ import annotations

import os
from typing import Final

from imagewatch.system.errors import SpoolError

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_FILES: Final = ("config.example.toml", "man/imagewatch.1")
_FOLDERS: Final = ("completions", "examples", "schemas", "skills", "systemd")
_FLAT: Final = frozenset({"completions", "examples", "schemas"})
"""A folder in one of these is not ours: in a checkout the commands of the examples put keys and images there."""


def names() -> list[str]:
    """Return the names of all files: their paths with ``/``."""
    found = [name for name in _FILES if os.path.isfile(_path(name))]
    for folder in _FOLDERS:
        top = _path(folder)
        for here, inner, files in os.walk(top):
            inner[:] = [] if folder in _FLAT else [one for one in inner if not one.startswith(("_", "."))]
            below = os.path.relpath(here, top)
            found += [os.path.normpath(os.path.join(folder, below, one)) for one in files if not one.startswith(".")]
    return sorted(found)


def read(name: str) -> str:
    """Return the text of a file.

    Args:
        name: One of ``names``.

    Raises:
        SpoolError: The installation lost the file, or it cannot be read.
    """
    try:
        with open(_path(name), encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        why = f"a file of the installation cannot be read: {error.strerror}: {name}"
        raise SpoolError(why, hint="install imagewatch again") from None


def _path(name: str) -> str:
    inside = os.path.join(_PACKAGE, name)
    return inside if os.path.exists(inside) else os.path.join(os.path.dirname(_PACKAGE), name)
