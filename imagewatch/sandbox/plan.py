"""What is done with one request, and its response."""

from __future__ import annotations

import binascii
import json
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from imagewatch.sandbox.placeholder import Caption, draw
from imagewatch.sandbox.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox.contract import Asked
    from imagewatch.sandbox.delivery import Deliveries
    from imagewatch.sandbox.image import EncodedImage


@dataclass
class Plan:
    """What is done with a request; tags edit it.

    Attributes:
        asked: The request.
        output_format: Format of the images.
        by_url: Whether images are returned as URLs.
        delivery: The fault of a URL; see `Deliveries`.
        reply: A response without images.
        charged: Whether the request is charged.
        padding: Bytes to add to each PNG.
        edits: Changes to the images after they are drawn.
        break_base64: Whether the last image's base64 is broken.
        billing: Whether the response has ``billing``.
        gzip: Whether the response is compressed.
        sending: Changes to how the response is sent.
    """

    asked: Asked
    output_format: str
    by_url: bool
    delivery: str = ""
    reply: Reply | None = None
    charged: bool = True
    padding: int = 0
    edits: list[Callable[[list[EncodedImage]], list[EncodedImage]]] = field(default_factory=list)
    break_base64: bool = False
    billing: bool = True
    gzip: bool = False
    sending: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Credits that are charged."""
        return self.asked.credits if self.charged else 0

    def carry_out(self, deliveries: Deliveries, seen: dict[str, Any]) -> Reply:
        """Draw the images and return the response.

        Args:
            deliveries: Keeps images that are returned as URLs.
            seen: Entry of this request in the report; the checksums of its images are filled in.

        Returns:
            The response.
        """
        reply = replace(self.reply or self._success(deliveries, seen), **self.sending)
        return reply.compressed() if self.gzip else reply

    def _success(self, deliveries: Deliveries, seen: dict[str, Any]) -> Reply:
        """Draw the requested images and return a response with them."""
        asked, images = self.asked, self._images()
        seen["images"] = [image.sha256 for image in images]
        if self.break_base64:
            seen["images"][-1:] = [None]
        parts: list[bytes | EncodedImage] = [
            json.dumps({"provider": asked.provider, "model": asked.model})[:-1].encode()
        ]
        parts.append(b', "images": [')
        for index, image in enumerate(images):
            parts.append(b", " if index else b"")
            broken = self.break_base64 and image is images[-1]
            parts += [_broken(image)] if broken else self._entry(image, deliveries)
        billing = {"credits_charged": asked.credits, "credits_per_image": asked.credits_per_image}
        parts.append(b"]" + (b', "billing": ' + json.dumps(billing).encode() if self.billing else b"") + b"}")
        return Reply(200, tuple(parts), {"Content-Type": "application/json"})

    def _images(self) -> list[EncodedImage]:
        """Draw the images and edit them."""
        asked = self.asked
        serial = f"no. {secrets.token_hex(4)}" if asked.seed is None else f"seed {asked.seed}"
        small = [item.small for item in asked.inputs]
        images = []
        for index in range(1, asked.n + 1):
            caption = Caption(asked.provider, asked.model, asked.prompt, index, asked.n, serial)
            images.append(replace(draw(caption, asked.size, self.output_format, small), padding=self.padding))
        for edit in self.edits:
            images = edit(images)
        return images

    def _entry(self, image: EncodedImage, deliveries: Deliveries) -> list[bytes | EncodedImage]:
        """Return one entry of ``images``, as a URL or in base64."""
        mime = json.dumps(image.mime)
        if self.by_url:
            url = json.dumps(deliveries.offer(image, self.delivery))
            return [f'{{"url": {url}, "mime_type": {mime}}}'.encode()]
        return [b'{"b64_json": "', image, f'", "mime_type": {mime}}}'.encode()]


def _broken(image: EncodedImage) -> bytes:
    """Return an entry whose base64 has one character too many, so that lenient decoders refuse it, too."""
    text = binascii.b2a_base64(image.data, newline=False).decode()
    value = {"b64_json": text[: len(text) // 8 * 4 + 1] + "*", "mime_type": image.mime}
    return json.dumps(value).encode()
