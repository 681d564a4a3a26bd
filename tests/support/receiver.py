"""A receiver of notifications on the loopback interface."""

from __future__ import annotations

import json
import threading
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from support.daemon import until

if TYPE_CHECKING:
    from collections.abc import Callable


def as_json(text: str) -> Any:
    """A result file as it is in a notification."""
    return json.loads(json.dumps(tomllib.loads(text), default=lambda time: time.isoformat().replace("+00:00", "Z")))


@dataclass(frozen=True)
class Post:
    """What was posted.

    Attributes:
        path: With its query.
        headers: Lower-case names.
        body: The bytes.
    """

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def page(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Receiver:
    """Takes whatever is posted.

    Attributes:
        posts: What came, in order, also what was not accepted.
        statuses: The statuses of the next responses; then 200.
        answer: Called with each post before the response; returns its status instead, if it is not None.
    """

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.accepted: list[Post] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.answer: Callable[[Post], int | None] = lambda _: None
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(length)
                if len(body) < length:  # the daemon was killed in the middle of it
                    self.close_connection = True
                    return
                post = Post(self.path, headers, body)
                status = receiver._take(post)
                self.send_response(status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def _take(self, post: Post) -> int:
        self.posts.append(post)
        status = self.answer(post)
        if status is None:
            status = self.statuses.pop(0) if self.statuses else 200
        if 200 <= status < 300:
            self.accepted.append(post)
        return status

    def __enter__(self) -> Receiver:  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pages(self) -> list[dict[str, Any]]:
        """What was accepted."""
        return [post.page for post in list(self.accepted)]

    def names(self) -> list[str]:
        """The names of the events that were accepted."""
        return [page["event"] for page in self.pages()]

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        """Wait until so many were accepted."""
        __tracebackhide__ = True
        until(lambda: len(self.accepted) >= count, saw=lambda: str(self.names()), what=f"{count} notifications")
        return self.pages()

    def ids(self) -> dict[str, set[str]]:
        """The ids that were accepted of each event of a job, by the job's prompt and the name of the event."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for page in self.pages():
            content = page.get("receipt") or page.get("error")
            if content:
                found[f"{content['source']} {page['event']}"].add(page["event_id"])
        return dict(found)
