"""The program: ``imagewatch``, and ``python -m imagewatch``."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import NoReturn

EXIT_INTERNAL = 70


def main() -> NoReturn:
    """Run a command. A program that cannot be loaded must not exit with 1, which means that a job failed."""
    try:
        from imagewatch.commands.main import main as run  # noqa: PLC0415
    except Exception:  # noqa: BLE001  a dependency that is missing, damaged or of another version
        with contextlib.suppress(Exception):  # standard error may be closed
            traceback.print_exc()
            sys.stderr.write("imagewatch: the program cannot be loaded\n  install it again, with its dependencies\n")
        sys.exit(EXIT_INTERNAL)
    run()


if __name__ == "__main__":
    main()
