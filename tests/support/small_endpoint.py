"""A loopback endpoint with tiny images. The prompt says how it responds: ``[429 ok] a cat`` is busy once, then pays.

The sandbox draws images of many kilobytes, and its URLs end with its process. Here an image is less than a hundred
bytes, and its URL holds it: another endpoint can serve a URL that is in a saved response.
"""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from collections import Counter
from typing import TYPE_CHECKING

from support.endpoint import served

if TYPE_CHECKING:
    from typing import Self

CREDITS = 5.0
_REFUSED = {
    "400": {"message": "no cats"},
    "402": {"message": "pay"},
    "429": {"message": "slow down"},
    "503": {"message": "not now", "admitted": False},
}
_CHARGED = {"ok", "url", "short", "drop", "html"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallEndpoint

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.server.serves_images:
            self._respond(200, base64.urlsafe_b64decode(self.path.rpartition("/")[2]), "image/png")
        else:
            self._respond(404, b"{}", "application/json")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        word = self.server.enter(asked["prompt"])
        if word in _REFUSED:
            self._respond(int(word), json.dumps(_REFUSED[word]).encode(), "application/json")
        elif word == "drop":
            self.close_connection = True
        elif word == "html":
            self._respond(200, b"<html>thank you", "text/html")
        else:
            body = self._images(asked["prompt"], int(asked.get("n", 1)), by_url=word == "url")
            self._respond(200, body, "application/json", cut=40 if word == "short" else 0)

    def _images(self, prompt: str, count: int, *, by_url: bool) -> bytes:
        images = served(prompt, count)
        if by_url:
            urls = (base64.urlsafe_b64encode(image).decode() for image in images)
            entries = [{"url": f"{self.server.base_url}/image/{url}"} for url in urls]
        else:
            entries = [{"b64_json": base64.b64encode(image).decode(), "mime_type": "image/png"} for image in images]
        billing = {"credits_charged": CREDITS}
        return json.dumps({"images": entries, "provider": "flux", "model": "flux-pro", "billing": billing}).encode()

    def _respond(self, status: int, body: bytes, mime: str, cut: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-type", mime)
        self.send_header("content-length", str(len(body)))
        if status in {429, 503}:
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = self.close_connection or bool(cut)


class SmallEndpoint(http.server.ThreadingHTTPServer):
    """The endpoint; it listens while its context lasts.

    Attributes:
        base_url: Where it listens.
        together: How many requests must have come before one is answered.
        serves_images: Whether images can be downloaded.
        requests: How often each prompt was received whole.
        charged: How often each prompt was charged.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}"
        self.together = 0
        self.serves_images = True
        self.requests: Counter[str] = Counter()
        self.charged: Counter[str] = Counter()
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def seen(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return how often each prompt was received, and charged."""
        with self._changed:
            return dict(self.requests), dict(+self.charged)

    def enter(self, prompt: str) -> str:
        """Count a request; return the word of its prompt that says what happens."""
        match = re.match(r"\[([^\]]*)\]", prompt)
        words = match[1].split() if match else ["ok"]
        with self._changed:
            word = words[min(self.requests[prompt], len(words) - 1)]
            self.requests[prompt] += 1
            self.charged[prompt] += word in _CHARGED
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.requests.total() >= self.together, 20)
        return word
