"""System calls that Python does not have: a rename that never replaces, and the reservation of room for a file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagewatch.system.folders import Place

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_FALLOC_FL_KEEP_SIZE = 1


def rename_new(source: Place, target: Place) -> None:
    """Rename without replacing, by the best means this file system has."""
    function = _renameat2()
    if function is not None:
        here, there = (_AT_FDCWD if place.dir_fd is None else place.dir_fd for place in (source, target))
        done = function(here, os.fsencode(source.name), there, os.fsencode(target.name), _RENAME_NOREPLACE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOSYS}:
            raise OSError(code, os.strerror(code), target.name)
    folders = {"src_dir_fd": source.dir_fd, "dst_dir_fd": target.dir_fd}
    try:
        os.link(source.name, target.name, **folders, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}:
            raise
        # Neither call exists here (FAT, some FUSE): the gap between the check and the rename stays.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target.name) from None
        os.rename(source.name, target.name, **folders)
    else:
        os.unlink(source.name, dir_fd=source.dir_fd)


@functools.cache
def _renameat2() -> Any | None:  # noqa: ANN401  a foreign function
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def reserve(descriptor: int, size: int) -> None:
    """Reserve room for a file, where its file system can; its length stays.

    Not ``posix_fallocate``: where the file system cannot, that writes zeros into the file, all of them.

    Args:
        descriptor: The file.
        size: Bytes from its beginning.

    Raises:
        OSError: There is no room.
    """
    function = _fallocate()
    while function is not None and function(descriptor, _FALLOC_FL_KEEP_SIZE, 0, size):
        code = ctypes.get_errno()
        if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@functools.cache
def _fallocate() -> Any | None:  # noqa: ANN401  a foreign function
    """Return the C library's ``fallocate`` for lengths of 64 bits: by which name it has that depends on the library."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(None, use_errno=True)
        for name in ("fallocate64", "fallocate"):
            if function := getattr(library, name, None):
                function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
                return function
    return None
