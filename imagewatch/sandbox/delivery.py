"""The image host: signed URLs that expire, and what they return."""

from __future__ import annotations

import hmac
import secrets
import threading
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from imagewatch.sandbox.contract import DELIVERY
from imagewatch.sandbox.replies import Reply, canned, json_reply, page

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox.image import EncodedImage

_MAX_HELD_BYTES: Final = 256 << 20  # kept for download; the oldest are removed first
_ODD_URLS: Final = {"file": "file:///etc/hostname", "private": "http://10.0.0.1/x.png"}


@dataclass
class _Parcel:
    """An image that can be downloaded."""

    image: EncodedImage
    kind: str
    fetches: int = 0


class Deliveries:
    """The image host. Safe to use from several threads.

    A URL can have one of these faults: ``404``, ``expired``, ``flaky`` (the first download fails), ``redirect``
    (to the same image), ``huge`` (sent without a length), ``file`` or ``private`` (points to what must not be
    downloaded). An empty text means no fault.

    Args:
        base_url: What URLs begin with.
        lifetime: How long a URL is valid, seconds.
        clock: Monotonic clock, seconds.
    """

    def __init__(self, base_url: str, lifetime: float, clock: Callable[[], float]) -> None:
        self._base_url = base_url
        self._lifetime = lifetime
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._parcels: dict[str, _Parcel] = {}
        self._held = 0
        self._lock = threading.Lock()

    def offer(self, image: EncodedImage, kind: str) -> str:
        """Keep an image for download and return its URL."""
        if kind in _ODD_URLS:
            return _ODD_URLS[kind]
        name = secrets.token_hex(12)
        with self._lock:
            self._parcels[name] = _Parcel(image, kind)
            self._held += len(image.data)
            while self._held > _MAX_HELD_BYTES:
                self._held -= len(self._parcels.pop(next(iter(self._parcels))).image.data)
        lifetime = -1.0 if kind == "expired" else self._lifetime
        suffix = "png" if image.mime == "image/png" else "jpeg"
        return self._signed(f"{DELIVERY}{name}/sample.{suffix}", f"{self._clock() + lifetime:.6f}")

    def fetch(self, target: urllib.parse.SplitResult) -> Reply:
        """Answer a download."""
        query = urllib.parse.parse_qs(target.query)
        expiry, signature = query.get("se", [""])[0], query.get("sig", [""])[0]
        if not hmac.compare_digest(self._signature(target.path, expiry).encode(), signature.encode("utf-8", "replace")):
            return json_reply(403, {"message": "the signature is missing or wrong"})
        if self._clock() >= float(expiry):
            return json_reply(403, {"message": "the URL has expired"})
        with self._lock:
            parcel = self._parcels.get(target.path.split("/")[2])
            if parcel is None:
                return json_reply(404, {"message": "no such image"})
            parcel.fetches += 1
        return self._delivered(parcel)

    def _delivered(self, parcel: _Parcel) -> Reply:
        """Return the response to a download with a valid signature."""
        if parcel.kind == "404":
            return json_reply(404, {"message": "no such image"})
        if parcel.kind == "flaky" and parcel.fetches == 1:
            return canned(503, page("Try again"))
        if parcel.kind == "redirect":
            return Reply(302, (), {"Location": self.offer(parcel.image, "")})
        headers = {"Content-Type": parcel.image.mime}
        return Reply(200, tuple(parcel.image.chunks()), headers, sized=parcel.kind != "huge")

    def _signature(self, path: str, expiry: str) -> str:
        """Return the signature of a path and the time at which it expires."""
        return hmac.new(self._secret, f"{path}\n{expiry}".encode("utf-8", "replace"), "sha256").hexdigest()

    def _signed(self, path: str, expiry: str) -> str:
        """Return a URL that is valid until then."""
        return f"{self._base_url}{path}?se={expiry}&sig={self._signature(path, expiry)}"
