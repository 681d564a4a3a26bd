#!/usr/bin/env python3
"""Receive notifications of imagewatch, verify the signature, and print each event once. Standard library only.

Usage: notify_receiver.py SECRET_FILE [PORT]
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

SECRET = Path(sys.argv[1]).read_bytes().strip()
PORT = int((sys.argv[2:] or ["8080"])[0])
MOST_BYTES = 10_000_000
seen: set[str] = set()  # keep these in a database if your receiver may be restarted


class Handler(BaseHTTPRequestHandler):
    """Answers each POST."""

    timeout = 30

    def do_POST(self) -> None:
        """Take a notification: 204 if it is genuine, 403 if not."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MOST_BYTES))
        expected = "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest()
        is_genuine = hmac.compare_digest(self.headers.get("X-Imagewatch-Signature", "").encode(), expected.encode())
        if is_genuine:
            event = json.loads(body)
            if event["event_id"] not in seen:  # it may come more than once
                print(event["event"], event["text"], flush=True)
                seen.add(event["event_id"])
        self.send_response(204 if is_genuine else 403)  # only now: any other response makes it come again
        self.end_headers()


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
