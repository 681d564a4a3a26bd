"""What the C library does with free memory: settings of glibc. With another C library nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""As in ``malloc.h``; ``mallopt(3)`` explains them."""


@functools.cache
def reuse() -> None:
    """Reuse the memory of one piece of a response for the next one, in all threads together.

    By default half a megabyte is given back immediately, and the kernel clears the same pages again for the next piece:
    nine hundred for an image of 1.5 MB.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2 << 20)
        mallopt(_TRIM_THRESHOLD, 16 << 20)
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Give all free memory back to the system, after something that used much of it."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
