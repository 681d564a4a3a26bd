"""What the C library does with memory that is free: settings of glibc. Elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""As in ``malloc.h``; ``mallopt(3)`` explains them."""


@functools.cache
def reuse() -> None:
    """Keep from now on what one piece of an answer leaves for the next one, and make no more places for threads.

    By default half a megabyte is given back at once, and the kernel clears the same pages again for the next piece:
    nine hundred for a picture of 1.5 MB.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2 << 20)
        mallopt(_TRIM_THRESHOLD, 16 << 20)
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Give back all that is free, at the end of what took much of it: nobody else would."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
