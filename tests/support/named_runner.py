"""Create images by name as ``imagewatch mcp`` does, in a process of its own.

``kill NUMBER LATER NAME``: its disk kills the process before the change with this number (0: never); its clock is LATER
seconds ahead. ``race NAME…``: all of them, after a line on standard input. Both print the state of each name.
"""

from __future__ import annotations

import os
import sys
import time

from imagewatch.commands import drop, name_notes
from imagewatch.commands.allowed_images import AllowedImages
from imagewatch.commands.named_jobs import NamedJobs
from imagewatch.config.load import load
from imagewatch.system.errors import BadRequest
from support.kill_runner import KillingDisk

root, kind, *arguments = sys.argv[1:]
later, disk = 0.0, None
if kind == "kill":
    disk = KillingDisk(int(arguments.pop(0)))
    later = float(arguments.pop(0))
    drop.Disk = name_notes.Disk = lambda: disk  # type: ignore[assignment, misc, return-value]
config = load(None, {"HOME": "/nonexistent", "IMAGEWATCH_FOLDERS__ROOT": root})
jobs = NamedJobs(config, "", AllowedImages([root], 1 << 20), blind=True, clock=lambda: time.time() + later)
images = ["cat.png"] if os.path.exists(os.path.join(root, "cat.png")) else []
if kind == "race":
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
for name in arguments:
    try:
        state: str = jobs.create(name, "A cat", {}, images).state
    except BadRequest as error:
        state = str(error)
    sys.stdout.write(f"{name}: {state}\n")
if disk is not None:
    sys.stdout.write(f"{disk.steps}\n")
