"""Run ``submit``; its disk kills the process before the change with the number given. 0: never, and count."""

from __future__ import annotations

import sys

from imagewatch.commands import drop as sender
from imagewatch.commands import main as cli
from support.kill_runner import KillingDisk

disk = KillingDisk(int(sys.argv.pop(1)))
sender.Disk = lambda: disk  # type: ignore[assignment, misc]
try:
    cli.main()
finally:
    sys.stderr.write(f"{disk.steps}\n")
