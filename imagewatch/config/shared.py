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
from imagewatch.config.secret_file import SecretFileError, read_secret_file
from imagewatch.config.values import MOST_NAME_CHARS
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.masking import Mask, known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import Config, Shared

_CREDENTIAL: Final = "database_password"
_ALONE: Final = "write the password alone, on one line"
_MOST_BYTES: Final = 4096
_DIGITS: Final = 16


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
    """Return connection parameters besides those in ``shared.database``: the password that systemd passes.

    The credential has the password itself: libpq refuses a password file that its group may read, and systemd makes
    each credential such a file. This process masks the password wherever it writes.

    Args:
        shared: ``[shared]``; a password file that its connection names is used instead.
        environ: The environment.

    Raises:
        ConfigError: The credential cannot be read, or holds something else than a password.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    path = os.path.join(folder, _CREDENTIAL)
    if not folder or not os.path.lexists(path) or names_password_file(shared.database):
        return {}
    try:
        content = read_secret_file(path, _MOST_BYTES)
    except SecretFileError as error:
        raise _unreadable(str(error), "restart the service after you have changed the file") from None
    try:
        password = content.rstrip(b"\r\n").decode()
    except UnicodeDecodeError:
        raise _unreadable("is not UTF-8", _ALONE) from None
    if not password or any(character in password for character in "\0\r\n"):
        raise _unreadable("is not a password", _ALONE)
    known.remember(Mask(password), lasting=True)
    return {"password": password}


def _unreadable(reason: str, hint: str) -> ConfigError:
    return ConfigError([Problem(f"credential {_CREDENTIAL}", reason, hint)])


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
