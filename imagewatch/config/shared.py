"""What ``[shared]`` means on this host: the names of this daemon and its inbox, and how to connect.

Only ``journal/postgres`` uses psycopg, an extra. Nothing of this module imports it, except for ``require_psycopg``.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
from typing import TYPE_CHECKING, Final

from imagewatch.config.dsn import names_password_file
from imagewatch.config.secret_file import SecretFileError, without_group
from imagewatch.config.values import MOST_NAME_CHARS
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import Config, Shared

_CREDENTIAL: Final = "pgpass"
_DIGITS: Final = 16
_MOST_BYTES: Final = 1 << 16


def instance_of(config: Config) -> str:
    """Return the name of this daemon in the shared database: ``shared.instance``, else host name and inbox.

    It is printable and at most 100 characters long. Where host name and inbox are not, a part of their digest is at
    the end, so that the names of two inboxes differ.
    """
    if config.shared.instance:
        return config.shared.instance
    whole = f"{socket.gethostname()}:{config.folders.inbox}"
    name = printable(whole).strip()
    name = name if name.isprintable() else ascii(name)[1:-1]
    if name == whole and len(name) <= MOST_NAME_CHARS:
        return name
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:_DIGITS]
    return f"{name[: MOST_NAME_CHARS - _DIGITS - 1]}~{digest}"


def conninfo(shared: Shared, environ: Mapping[str, str]) -> dict[str, str]:
    """Return connection parameters besides those in ``shared.database``: the password file that systemd passes.

    Args:
        shared: ``[shared]``; a password file that its connection names is used instead.
        environ: The environment.

    Raises:
        ConfigError: The password file cannot be read.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    path = os.path.join(folder, _CREDENTIAL)
    if not folder or not os.path.lexists(path) or names_password_file(shared.database):
        return {}
    try:
        return {"passfile": without_group(path, _MOST_BYTES)}
    except SecretFileError as error:
        hint = "check LoadCredential= of the service"
        raise ConfigError([Problem(f"credential {_CREDENTIAL}", str(error), hint)]) from None


def require_psycopg() -> None:
    """Check that the library for PostgreSQL can be used.

    Raises:
        ConfigError: It is not installed, or it does not find libpq.
    """
    try:
        importlib.import_module("psycopg")
    except ImportError:
        reason = "is set, but the library for PostgreSQL is not installed"
        hint = "install it: python3 -m pip install 'imagewatch[postgres]'"
        raise ConfigError([Problem("shared.database", reason, hint)]) from None
