"""Divides a response, while it arrives, into images to be decoded and what is saved as it is.

An image is decoded as long as it is canonical base64: the standard alphabet, whole groups of four, padding only at its
end and no bits that are not used. Then encoding it again gives the very text that came.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pybase64

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = re.compile(
    rb'"(?P<key>b64_json)"\s{0,64}:\s{0,64}"'
    rb'|"(?P<address>url)"\s{0,64}:\s{0,64}"(?=\s{0,64}(?i:data):)'
    rb'|[:\[,]\s{0,64}"(?=\s{0,64}(?i:data:image)\\?/|iVBORw0KGg|\\?/9j\\?/|UklGR)'
)
"""How a string with an image begins; ``splitter`` says why."""
OVERLAP = 256
"""What is longer than this is no such beginning, bytes."""
MOST_DECODED = 4
"""Images of one response, as many as a request may ask for; each keeps a file open while the response arrives."""
_ALPHABET = re.compile(rb"[A-Za-z0-9+/]*")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an image.

    Attributes:
        number: Of the image, from 0.
        text: Canonical base64, whole groups of four.
        content: The bytes for which it stands.
    """

    number: int
    text: memoryview
    content: bytes


class _In(enum.Enum):
    """Where in the body the next byte is."""

    REST = "outside of the images"
    IMAGE = "in the string of an image, which has been canonical so far"
    RAW = "behind something that is not decoded, such as an image that is not canonical"


class Divider:
    """Finds the images in a body, piece by piece, up to the first string with an image that is not canonical.

    It holds back at most seven bytes: the last group of an image, while it is not clear whether it is its end.
    """

    def __init__(self) -> None:
        self._held = b""  # the end of the body so far, already returned: a key may be cut in two
        self._cut = b""  # the end of an image so far, not yet returned
        self._in = _In.REST
        self._images = 0
        self._is_begun = False  # whether a part of the image at hand was returned

    @property
    def is_decoded(self) -> bool:
        """Whether there are images, all of them are complete, and none was left as it is."""
        return self._in is _In.REST and self._images > 0

    def feed(self, chunk: bytes) -> Iterator[bytes | Part]:
        """Yield a piece of the body, divided: what is to be saved as it is, and parts of images, in order."""
        data = self._held + chunk
        done, place = len(self._held), 0
        self._held = b""
        while place < len(data) and self._in is not _In.RAW:
            if self._in is _In.REST:
                place, is_image = self._outside(data, place)
                if is_image:
                    yield data[done:place]
                    done = place
                continue
            quote = data.find(b'"', place)
            done = len(data) if quote < 0 else quote
            yield from self._inside(data[place:done], is_end=quote >= 0)
            place = done + 1
        if done < len(data):
            yield data[done:]

    def end(self) -> bytes:
        """Return what is held back when no more comes."""
        cut, self._cut = self._cut, b""
        return cut

    def leave(self) -> None:
        """Decode no more: the rest of the body is saved as it is."""
        self._in = _In.RAW

    def _outside(self, data: bytes, place: int) -> tuple[int, bool]:
        """Look for the next string with an image.

        Returns:
            Where it begins, else the end of the data; and whether it is to be decoded.
        """
        match = KEY.search(data, place)
        if match is None:
            self._held = data[max(place, len(data) - OVERLAP) :]
            return len(data), False
        if match["key"] and self._images < MOST_DECODED:
            self._in, self._is_begun = _In.IMAGE, False
            return match.end(), True
        self.leave()
        return match.end(), False

    def _inside(self, text: bytes, *, is_end: bool) -> Iterator[bytes | Part]:
        data, self._cut = self._cut + text, b""
        whole = len(data) - len(data) % 4
        if not is_end and data[:whole].endswith(b"="):  # which is canonical only if nothing follows
            whole -= 4
        view = memoryview(data)
        content, length = _decoded(view[:whole])
        if length:
            self._images += not self._is_begun
            self._is_begun = True
            yield Part(self._images - 1, view[:length], content)
        if length < (len(data) if is_end else whole) or (is_end and not self._is_begun):
            self.leave()
        if self._in is _In.RAW:
            yield data[length:]
            return
        self._cut = data[length:]
        if is_end:
            self._in = _In.REST


def _decoded(text: memoryview) -> tuple[bytes, int]:
    """Return what is in base64, as far as that is canonical, and how many bytes of the text that are."""
    try:
        content = pybase64.b64decode(text, validate=True)
    except ValueError:
        match = _ALPHABET.match(text)
        length = match.end() // 4 * 4 if match else 0
        return pybase64.b64decode(text[:length], validate=True), length
    if pybase64.b64encode(content[-(len(content) % 3 or 3) :]) != text[-4:]:  # it has bits that are not used
        content, text = content[: -(len(content) % 3)], text[:-4]
    return content, len(text)
