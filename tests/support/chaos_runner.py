"""A daemon of a common inbox that waits seconds, not minutes: after another one's deadline, and before a probe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.job import common_steps
from imagewatch.journal.holds import Holds
from imagewatch.system import log
from support import noon

if TYPE_CHECKING:
    from imagewatch.config.schema import Config


def _config() -> Config:
    return load(os.environ.get("IMAGEWATCH_CONFIG"), os.environ)


if __name__ == "__main__":
    common_steps._GRACE_SECONDS = 1.0
    noon.apply()
    log.configure("info", "json")
    sys.exit(Daemon(_config(), os.environ, reload=_config, holds=Holds(first_seconds=0.5)).run())
