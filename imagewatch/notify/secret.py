"""The secret that signs what is posted: from ``secret_file``, else from the systemd credential ``notify_secret``.

It is read for each event, so that it can be changed at any time. No message of this module holds it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Final

from imagewatch.config.secret_file import SecretFileError, read_secret_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.config.schema import Notify

HEADER: Final = "X-Imagewatch-Signature"
_CREDENTIAL: Final = "notify_secret"
_MOST_BYTES: Final = 4096


class SecretError(Exception):
    """The secret cannot be read: nothing is posted, as it would not be signed."""


def secret_source(notify: Notify, environ: Mapping[str, str]) -> str:
    """Return the path from which the secret is read, or an empty string if none is set."""
    if notify.secret_file is not None:
        return notify.secret_file
    path = os.path.join(environ.get("CREDENTIALS_DIRECTORY", ""), _CREDENTIAL)
    return path if environ.get("CREDENTIALS_DIRECTORY") and os.path.lexists(path) else ""


def read_secret(path: str) -> bytes:
    """Return the secret in a file, without white space at both ends.

    Raises:
        SecretError: It cannot be read, or is empty.
    """
    try:
        content = read_secret_file(path, _MOST_BYTES)
    except SecretFileError as error:
        raise SecretError(f"the file of the secret {error}") from None
    if not (secret := content.strip()):
        raise SecretError("the secret is empty")
    return secret


def signature(secret: bytes, body: bytes) -> str:
    """Return the value of the header."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"
