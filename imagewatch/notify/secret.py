"""The secret that signs what is posted: from ``secret_file``, else from the systemd credential ``notify_secret``.

It is read for each event, so that it can be changed at any time. No message of this module holds it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from typing import TYPE_CHECKING, Final

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
    content = b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SecretError("the secret cannot be read: it is not a regular file")
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not a file name"
        raise SecretError(f"the secret cannot be read: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise SecretError(f"the secret cannot be read: it is larger than {_MOST_BYTES} bytes")
    if not (secret := content.strip()):
        raise SecretError("the secret is empty")
    return secret


def signature(secret: bytes, body: bytes) -> str:
    """Return the value of the header."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"
