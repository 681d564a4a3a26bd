"""Libraries that are loaded into a contender before its own: they replace or record its syncs."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NO_SYNC = "int fsync(int d) { return 0; }\nint fdatasync(int d) { return 0; }\n"
NO_SYNC_PYTHON = "import os\nos.fsync = os.fdatasync = lambda descriptor: None\n"
STAMP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int stamped(const char *name, int descriptor) {
    int (*call)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = call(descriptor);
    struct timespec now;
    struct stat synced, folder;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (result == 0 && fstat(descriptor, &synced) == 0 && stat(getenv("BENCH_FOLDER"), &folder) == 0 &&
        synced.st_ino == folder.st_ino && synced.st_dev == folder.st_dev) {
        int log = open(getenv("BENCH_STAMPS"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        dprintf(log, "%lld\n", now.tv_sec * 1000000000LL + now.tv_nsec);
        close(log);
    }
    return result;
}

int fsync(int descriptor) { return stamped("fsync", descriptor); }
int fdatasync(int descriptor) { return stamped("fdatasync", descriptor); }
"""


def without_syncs(folder: Path) -> tuple[dict[str, str], str]:
    """Return an environment in which no sync waits for the disk, and the means used."""
    if library := _compiled(folder / "no_sync", NO_SYNC):
        return {"LD_PRELOAD": library}, "a preloaded library, including SQLite"
    (folder / "sitecustomize.py").write_text(NO_SYNC_PYTHON)
    return {"PYTHONPATH": str(folder)}, "a sitecustomize.py: no compiler here, so SQLite still syncs"


class FolderSyncs:
    """Records when each sync of a folder returned.

    Attributes:
        environ: The environment in which a program does so; empty if there is no compiler here.

    Args:
        root: Where the library and the records are.
        folder: The folder.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._stamps = root / "stamps"
        self._stamps.touch()
        library = _compiled(root / "stamp", STAMP)
        where = {"BENCH_FOLDER": str(folder), "BENCH_STAMPS": str(self._stamps)}
        self.environ = {"LD_PRELOAD": library, **where} if library else {}

    def times(self) -> list[int]:
        """Return the times so far, ``CLOCK_MONOTONIC`` in nanoseconds."""
        return [int(line) for line in self._stamps.read_text().splitlines()]


def _compiled(path: Path, source: str) -> str:
    """Return the path of a compiled library; empty if there is no compiler here."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return ""
    code, library = path.with_suffix(".c"), path.with_suffix(".so")
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(code), "-ldl"], check=True)
    return str(library)
