#!/usr/bin/env python3
"""Pass a notification of imagewatch to Apprise's command line; its exit code is that of apprise.

Usage, as the command below [notify]: notify_apprise.py URL… (in the form of Apprise)
"""

from __future__ import annotations

import json
import subprocess
import sys

TYPES = {"completed": "success", "failed": "warning", "unknown": "failure", "held": "failure", "cap": "warning"}

event = json.load(sys.stdin)
kind = TYPES.get(event["event"], "info")
command = ["apprise", f"--title={event['title']}", f"--notification-type={kind}", *sys.argv[1:]]
sys.exit(subprocess.run(command, input=event["text"], text=True, check=False).returncode)  # noqa: S603  no shell
