"""The response of each route. No sockets: requests are already read, responses are values."""

from __future__ import annotations

import hmac
import http
import threading
from typing import TYPE_CHECKING, Any, Final

from imagewatch.sandbox.contract import ROUTE, Refusal, read_request
from imagewatch.sandbox.plan import Plan
from imagewatch.sandbox.replies import Reply, json_reply
from imagewatch.sandbox.tags import read_tags

if TYPE_CHECKING:
    import urllib.parse
    from collections.abc import Callable
    from email.message import Message

    from imagewatch.sandbox.books import Books
    from imagewatch.sandbox.delivery import Deliveries

_ENDLESS: Final = 1_000_000.0


class Service:
    """Answers requests, from any thread.

    Args:
        books: Where requests are recorded.
        deliveries: The image host.
        key: The key that must be sent; ``None`` accepts any.
        latency_seconds: Delay before each response to a request for images.
        on_request: Called with one line per HTTP request.

    Attributes:
        books: As given.
        key: As given.
        gate: While it is cleared, requests are recorded but not answered.
        stopping: Set when the sandbox is being stopped.
    """

    def __init__(
        self,
        books: Books,
        deliveries: Deliveries,
        *,
        key: str | None,
        latency_seconds: float,
        on_request: Callable[[str], None] | None,
    ) -> None:
        self.books = books
        self.key = key
        self.gate = threading.Event()
        self.gate.set()
        self.stopping = threading.Event()
        self._deliveries = deliveries
        self._latency = latency_seconds
        self._on_request = on_request
        self._one_body = threading.Lock()

    def pause(self, seconds: float) -> None:
        """Wait, unless the sandbox is being stopped: then the connection is cut."""
        if self.stopping.wait(seconds) if seconds else self.stopping.is_set():
            raise ConnectionAbortedError("the sandbox is being stopped")

    def say(self, line: str) -> None:
        """Report a request to ``on_request``."""
        if self._on_request is not None:
            self._on_request(line)

    def generate(self, headers: Message, body: bytearray) -> Reply:
        """Return the response to a request for images, which is recorded before."""
        key = headers.get("Idempotency-Key")
        seen: dict[str, Any] = {
            "prompt": None,
            "provider": None,
            "idempotency_key": key and key[:200],
            "inputs": [],
            "images": [],
        }
        try:
            reply, cost = self._decide(headers, body, seen)
            self.books.enter(seen, reply.status, cost)
        except Refusal as refusal:
            reply, cost = json_reply(refusal.status, refusal.body), 0
            self.books.enter({**seen, "images": []}, reply.status, 0)
        self.say(f"POST {ROUTE} {reply.status} {cost} credits {(seen['prompt'] or '')[:60]!a}")
        self.pause(self._latency + reply.wait)
        self.gate.wait()
        self.pause(0)
        return reply

    def fetch(self, headers: Message, target: urllib.parse.SplitResult) -> Reply:
        """Return the response to a download. One with an API key is counted and refused."""
        if "Authorization" in headers:
            self.books.count("bearer_at_image_host")
            return json_reply(400, {"message": "never send the key to an image host"})
        reply = self._deliveries.fetch(target)
        if reply.status == http.HTTPStatus.OK:
            self.books.count("delivered")
        return reply

    def show_balance(self, headers: Message) -> Reply:
        """Return the balance as the real API does, to a client with the right key."""
        try:
            self._authorize(headers)
        except Refusal as refusal:
            return json_reply(refusal.status, refusal.body)
        left = _ENDLESS if self.books.balance is None else self.books.balance
        shown = {"total_balance": left, "monthly_credit_balance": 0, "purchased_credit_balance": left}
        return json_reply(200, {**shown, "billing_tier": "sandbox"})

    def show_report(self) -> Reply:
        """Return what was requested and charged."""
        return json_reply(200, self.books.report())

    def count_redirected(self) -> Reply:
        """Count a client that followed a redirect of the paid call."""
        self.books.count("redirected")
        return json_reply(200, {"message": "the redirect was followed"})

    def _decide(self, headers: Message, body: bytearray, seen: dict[str, Any]) -> tuple[Reply, int]:
        """Return the response to a request and its cost."""
        self._authorize(headers)
        if headers.get_content_type() != "application/json":
            raise Refusal(400, "Content-Type must be application/json")
        with self._one_body:  # large bodies are decoded one at a time, to save memory
            asked = read_request(body, seen)
        plan = Plan(asked, asked.output_format, by_url=asked.provider == "flux")
        who = seen["idempotency_key"] or asked.prompt
        for use in read_tags(asked.prompt):
            if use.limit is None or self.books.first(use.limit, who, f"{use.tag.name} {use.value}"):
                use.tag.apply(plan, use.value)
        return plan.carry_out(self._deliveries, seen), plan.cost

    def _authorize(self, headers: Message) -> None:
        """Refuse a request without the right key."""
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        right = self.key is None or hmac.compare_digest(key.encode(), self.key.encode())
        if scheme != "Bearer" or not key.strip() or not right:
            raise Refusal(401, "Unauthorized: send Authorization: Bearer <key>")
