"""A daemon of a common inbox that waits a second, and not a minute, after the deadline of another one's request."""

from __future__ import annotations

import sys

from imagewatch.commands.main import main
from imagewatch.job import common_steps

if __name__ == "__main__":
    common_steps._GRACE_SECONDS = 1.0
    sys.argv[1:1] = ["run"]
    main()
