"""Draws the images of the sandbox, which are clearly marked as placeholders."""

from __future__ import annotations

import colorsys
import hashlib
import io
import random
import re
import struct
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, ImageFont, ImageOps, JpegImagePlugin

from imagewatch.sandbox.image import EncodedImage

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_INPUT_PIXELS: Final = 50_000_000  # below Pillow's own limit, above the images of phone cameras
_THUMBNAIL_SIDE: Final = 160
_THUMBNAILS_PER_ROW: Final = 7
_SMALLEST_WITH_TEXT: Final = 96
_EXCERPT_CHARACTERS: Final = 400
_WHITE: Final = (255, 255, 255, 255)
_FAINT: Final = (255, 255, 255, 190)
_HUES: Final = (0.99, 0.04, 0.36, 0.44, 0.50, 0.56, 0.61, 0.67, 0.75, 0.82, 0.90)  # without dark yellows
_PLAIN: Final = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00df", "''\"\"--s")

_ENCODERS: Final[dict[str, dict[str, object]]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 88},
    "webp": {"quality": 85, "method": 0},
}


@dataclass(frozen=True)
class Caption:
    """What a placeholder shows.

    Attributes:
        provider: Name of the provider.
        model: Name of the model.
        prompt: The whole prompt; an excerpt is drawn.
        index: Number of this image, from 1.
        count: Number of images in the request.
        serial: Any text; the same serial and prompt give the same image.
    """

    provider: str
    model: str
    prompt: str
    index: int
    count: int
    serial: str


def draw(
    caption: Caption,
    size: tuple[int, int],
    output_format: str,
    thumbnails: Sequence[Image.Image | None] = (),
) -> EncodedImage:
    """Draw one placeholder.

    Args:
        caption: What to write on it.
        size: Width and height in pixels.
        output_format: ``png``, ``jpeg`` or ``webp``.
        thumbnails: Small copies of the input images; ``None`` for one that could not be decoded.

    Returns:
        The encoded image.
    """
    image = _background(caption, size)
    pen = ImageDraw.Draw(image, "RGBA")
    if min(size) >= _SMALLEST_WITH_TEXT:
        _Sheet(image, pen, min(size) / 512).fill(caption, thumbnails)
    file = io.BytesIO()
    image.save(file, output_format.upper(), **_ENCODERS[output_format])
    return EncodedImage(file.getvalue(), f"image/{output_format}")


def thumbnail(data: bytes, mime: str) -> Image.Image | None:
    """Return a small copy of an input image.

    Args:
        data: The file, with any content.
        mime: ``image/png``, ``image/jpeg`` or ``image/webp``.

    Returns:
        A small square image, or ``None`` if the file is too large or cannot be decoded.
    """
    side = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
    try:
        image = _opened(data, mime)
        if image is None:
            return None
        image.draft("RGB", side)
        return ImageOps.fit(image.convert("RGBA"), side)
    except Exception:  # noqa: BLE001  on hostile files decoders raise any exception
        return None


def _opened(data: bytes, mime: str) -> Image.Image | None:
    """Open an input image unless it is too large; the size is read before anything is decoded."""
    if mime == "image/jpeg":
        # Not with Image.open, which would print a warning about sizes that are refused here.
        jpeg = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        return jpeg if jpeg.width * jpeg.height <= _MAX_INPUT_PIXELS else None
    width, height = struct.unpack_from(">II", data, 16) if mime == "image/png" else _webp_size(data)
    if width * height > _MAX_INPUT_PIXELS:
        return None
    return Image.open(io.BytesIO(data), formats=[mime.removeprefix("image/").upper()])


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return the size in the header of a WebP; Pillow would allocate memory for it when it opens the file."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _background(caption: Caption, size: tuple[int, int]) -> Image.Image:
    """Return a gradient: its hue depends on the prompt, its shades on the serial and the index."""
    hue = _HUES[hashlib.sha256(caption.prompt.encode("utf-8", "replace")).digest()[0] % len(_HUES)]
    chance = random.Random(f"{caption.prompt}|{caption.serial}|{caption.index}")  # noqa: S311  colors
    mesh = Image.new("RGB", (3, 3))
    for place in range(9):
        x, y = place % 3, place // 3
        shade = hue + 0.05 * (x - y) + chance.uniform(-0.03, 0.03)
        light = 0.72 - 0.10 * y + chance.uniform(-0.06, 0.06)
        color = colorsys.hsv_to_rgb(shade % 1, chance.uniform(0.42, 0.58), light)
        mesh.putpixel((x, y), tuple(round(255 * part) for part in color))
    return mesh.resize(size, Image.Resampling.BICUBIC)


def _drawable(text: str) -> str:
    """Return text that the built-in font, which has only ASCII, can draw.

    Accents are removed. Quotes and dashes become ASCII. Other scripts become an ellipsis.
    """
    plain = unicodedata.normalize("NFKD", text).translate(_PLAIN)
    marks = (mark for mark in plain if not unicodedata.combining(mark))
    shown = "".join(mark if mark.isspace() or " " <= mark <= "~" else "\u2026" for mark in marks)
    return re.sub(r"\u2026[\u2026\s]*\u2026", "\u2026", " ".join(shown.split()))


class _Sheet:
    """Draws one placeholder, from the top and from the bottom toward the middle."""

    def __init__(self, image: Image.Image, pen: ImageDraw.ImageDraw, unit: float) -> None:
        self.image = image
        self.pen = pen
        self.unit = unit
        self.left = self.px(36)
        self.right = image.width - self.px(36)
        self.top = self.px(36)
        self.bottom = image.height - self.px(36)

    def px(self, figure: float) -> int:
        """Scale a length of an image with 512 pixels; the result is at least 1."""
        return max(1, round(figure * self.unit))

    def font(self, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Return the built-in font in a size of an image with 512 pixels."""
        return ImageFont.load_default(size=max(6, self.px(size)))

    def fill(self, caption: Caption, thumbnails: Sequence[Image.Image | None]) -> None:
        """Draw everything."""
        inset = self.px(14)
        frame = (inset, inset, self.image.width - inset, self.image.height - inset)
        self.pen.rounded_rectangle(frame, self.px(18), outline=(255, 255, 255, 110), width=self.px(2))
        self.heading(caption)
        self.footer(caption)
        self.inputs(thumbnails)
        self.excerpt(caption.prompt)

    def heading(self, caption: Caption) -> None:
        """Draw the title, and the provider."""
        self.pen.text(
            (self.left, self.top),
            "PLACEHOLDER",
            _WHITE,
            self.font(54),
            stroke_width=self.px(0.8),
            anchor="lt",
        )
        self.top += self.px(58)
        line = _drawable(f"{caption.provider} - {caption.model}")[:60]
        self.pen.text((self.left, self.top), line, _FAINT, self.font(21), anchor="lt")
        self.top += self.px(42)

    def footer(self, caption: Caption) -> None:
        """Draw the serial, and the number of the image."""
        count = f"{caption.index} of {caption.count}"
        font = self.font(22)
        height = self.px(36)
        box = (
            self.right - int(font.getlength(count)) - self.px(28),
            self.bottom - height,
            self.right,
            self.bottom,
        )
        self.pen.rounded_rectangle(box, height // 2, fill=(255, 255, 255, 225))
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        self.pen.text(middle, count, (40, 40, 60, 255), font, anchor="mm")
        note = f"imagewatch sandbox, {_drawable(caption.serial)[:24]}"
        self.pen.text((self.left, middle[1]), note, _FAINT, self.font(17), anchor="lm")
        self.bottom -= height + self.px(18)

    def inputs(self, thumbnails: Sequence[Image.Image | None]) -> None:
        """Draw the input images in rows above the footer."""
        gap = self.px(8)
        side = max(1, min((self.right - self.left + gap) // _THUMBNAILS_PER_ROW - gap, self.px(72)))
        rows = -(-len(thumbnails) // _THUMBNAILS_PER_ROW)
        top = self.bottom - rows * (side + gap) + gap
        for index, small in enumerate(thumbnails):
            row, column = divmod(index, _THUMBNAILS_PER_ROW)
            self.input(small, index + 1, (self.left + column * (side + gap), top + row * (side + gap)), side)
        if rows:
            self.bottom = top - self.px(14)

    def input(self, small: Image.Image | None, number: int, corner: tuple[int, int], side: int) -> None:
        """Draw one input image, or its number when it could not be read."""
        x, y = corner
        box = (x, y, x + side - 1, y + side - 1)
        self.pen.rectangle(box, fill=(255, 255, 255, 60))
        if small is None:
            self.pen.text((x + side // 2, y + side // 2), f"input {number}", _WHITE, self.font(14), anchor="mm")
        else:
            scaled = small.resize((side, side))
            self.image.paste(scaled, corner, scaled)
        self.pen.rectangle(box, outline=(255, 255, 255, 200), width=self.px(1))

    def excerpt(self, prompt: str) -> None:
        """Draw as much of the prompt as fits between what is above and below."""
        font = self.font(26)
        step = self.px(34)
        margin = self.px(18)
        room = (self.bottom - self.top - 2 * margin) // step
        if room < 1:
            return
        text = _drawable(prompt[:_EXCERPT_CHARACTERS]) + ("\u2026" if len(prompt) > _EXCERPT_CHARACTERS else "")
        lines = _wrapped(text, font, self.right - self.left - 2 * margin)
        if len(lines) > room:
            lines = [*lines[: room - 1], lines[room - 1].rstrip(" .,;:") + "\u2026"]
        box = (self.left, self.top, self.right, self.top + len(lines) * step + 2 * margin - self.px(6))
        self.pen.rounded_rectangle(box, self.px(14), fill=(0, 0, 0, 70))
        for index, line in enumerate(lines):
            self.pen.text((self.left + margin, self.top + margin + index * step), line, _WHITE, font)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels; a word too long for a line is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
