"""A daemon of a common inbox that is killed at a step of its next job: before it spends, decides or archives."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from imagewatch.commands.main import main
from imagewatch.job.delivery import Delivery
from imagewatch.journal.journal import Journal

STEPS = {"spend": Journal, "decide": Journal, "keep": Delivery}


def kill_itself(*_arguments: object, **_options: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit


if __name__ == "__main__":
    step = sys.argv[1]
    setattr(STEPS[step], step, kill_itself)
    sys.argv[1:] = ["run"]
    main()
