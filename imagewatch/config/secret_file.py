"""Reads a small file that has a secret: the administrator has named it, so links in its path are followed."""

from __future__ import annotations

import os
import stat


class SecretFileError(Exception):
    """The file cannot be used; the text follows its name."""


def read_secret_file(path: str, most_bytes: int) -> bytes:
    """Return the content of a small regular file.

    Args:
        path: The file.
        most_bytes: A larger file is refused.

    Raises:
        SecretFileError: It is missing, cannot be read, is not a regular file, or is too large.
    """
    try:
        # Non-blocking: opening a FIFO must not stop the daemon before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SecretFileError("is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(most_bytes + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else None
        raise SecretFileError(f"cannot be read: {cause or 'not a file name'}") from None
    if len(content) > most_bytes:
        raise SecretFileError(f"is larger than {most_bytes >> 10} KiB")
    return content
