"""A clock on which no day ends during a test: daemons with a shared database that a test starts have noon.

What a cap counts depends on the day, by UTC. Leases and all else that the database compares itself have its own clock.
"""

from __future__ import annotations

import os
import sys
import time

_NAME = "CLOCK_SHIFT"
_DAY = 86_400.0


def environ() -> dict[str, str]:
    """Return what daemons need in their environment to have the same clock."""
    return {_NAME: str(_DAY / 2 - time.time() % _DAY)}


def day_lasts(seconds: float = 60.0) -> None:
    """Wait until no day ends within some seconds, for a daemon whose clock stays as it is."""
    from support.daemon import PATIENCE, until  # noqa: PLC0415  a daemon that runs this file needs none of it

    until(lambda: time.time() % _DAY < _DAY - seconds, seconds + PATIENCE, what="the next day")


def apply() -> None:
    """Let the journals of this process have the clock that its environment says, if it says one."""
    if _NAME not in os.environ:
        return
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415  psycopg may be missing

    real, seconds = PostgresDatabase.clock, float(os.environ[_NAME])
    PostgresDatabase.clock = lambda self: real(self) + seconds  # type: ignore[method-assign]


if __name__ == "__main__":
    apply()
    from imagewatch.commands.main import main

    sys.argv[1:1] = ["run"]
    main()
