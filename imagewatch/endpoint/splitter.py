"""Separates the images in a response from the rest of its JSON, in constant memory."""

from __future__ import annotations

import functools
import json
import re
import secrets
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import pybase64

from imagewatch.endpoint.coding import UnreadableError
from imagewatch.endpoint.divider import KEY, OVERLAP
from imagewatch.endpoint.frames import Decoded

if TYPE_CHECKING:
    from collections.abc import Callable

_SKELETON_BYTES = 4 << 20
_BLANKS = (b" ", b"\t", b"\r", b"\n", b"\f")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BASE64_MAGIC = (b"iVBORw0KGg", b"/9j/", b"UklGR")
"""How PNG, JPEG and WebP begin in base64."""
_MAGIC_BYTES = max(map(len, _BASE64_MAGIC))
_LONGEST_PREFIX = 200
"""Bytes of a ``data:`` URL before its comma."""
MOST_IMAGES = 64
LONGEST_URL = 8192


class Splitter:
    """Separates the images in a JSON text from the rest, piece by piece.

    Inside a JSON string a quote is always escaped, so ``"b64_json"`` followed by a colon and a quote can only be
    a key with a string, and a colon, comma or bracket followed by a quote and the first letters of an image in base64
    can only be a string with that image. Everything but those strings is the *skeleton*; in it a mark that no response
    can predict stands for each.
    """

    def __init__(self, create: Callable[[int], IO[bytes]]) -> None:
        self._create = create
        self._mark = f"@{secrets.token_hex(8)}-"
        self._skeleton = bytearray()
        self._held = b""
        self._open: _Base64 | None = None
        self._seen = 0
        self._named: set[int] = set()  # those whose key is one of images
        self.files: list[_Base64] = []

    def number(self, value: object) -> int | None:
        """Return the number of the image for which a value of the skeleton stands, or None."""
        if not isinstance(value, str) or not value.startswith(self._mark):
            return None
        return int(value.removeprefix(self._mark))

    def is_whole(self, number: int) -> bool:
        """Return whether an image is complete and its key is one of images."""
        file = self.files[number] if number < len(self.files) else None
        return file is not None and number in self._named and file.ended and not file.problem

    def traces(self) -> re.Pattern[bytes]:
        """Return what finds images and their URLs in a skeleton that is not JSON."""
        return re.compile(
            rb'"%s(?P<mark>[0-9]{1,9})"|"url"\s{0,64}:\s{0,64}(?P<url>"https?:(?:[^"\\]|\\.){1,%d}")'
            % (self._mark.encode(), LONGEST_URL)
        )

    def feed(self, chunk: bytes | Decoded) -> None:
        """Take the next piece; an image that is in a file already stays there, if it is all of its string."""
        if isinstance(chunk, Decoded):
            if not (self._open and self._open.adopt(chunk)):
                for text in chunk.text():
                    self.feed(text)
            return
        data = self._held + chunk
        self._held = b""
        while data:
            data = self._string(data) if self._open else self._outside(data)

    def skeleton(self) -> bytes:
        """Return the skeleton so far."""
        return bytes(self._skeleton + self._held)

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def _outside(self, data: bytes) -> bytes:
        match = KEY.search(data)
        if not match:
            self._keep(data[:-OVERLAP])
            self._held = data[-OVERLAP:]
            return b""
        self._keep(data[: match.end() - 1] + b'"%s%d"' % (self._mark.encode(), self._seen))
        is_url = match["key"] is None
        if self._seen < MOST_IMAGES:
            self._open = _Base64(functools.partial(self._create, self._seen), is_url=is_url)
            self.files.append(self._open)
        else:
            self._open = _Base64(None)
        if match["key"] or match["address"]:
            self._named.add(self._seen)
        self._seen += 1
        return data[match.end() :]

    def _string(self, data: bytes) -> bytes:
        assert self._open is not None
        inside, quote, rest = data.partition(b'"')
        self._open.feed(inside)
        if quote:
            self._open.end()
            self._open = None
        return rest

    def _keep(self, data: bytes) -> None:
        self._skeleton += data
        if len(self._skeleton) > _SKELETON_BYTES:
            raise UnreadableError(f"the response holds more than {_SKELETON_BYTES >> 20} MiB besides its images")


class _Base64:
    r"""One string with an image, decoded into a file: base64, or a ``data:`` URL.

    It reads what any decoder would read: the standard and the URL-safe alphabet, with and without padding and white
    space, and pieces that were encoded one by one and joined.

    Args:
        create: Makes the file to which the image goes; it goes nowhere without.
        is_url: Whether a ``data:`` URL is base64 only if it names that.

    Attributes:
        problem: What is wrong with it, or an empty string.
        ended: Whether its closing quote arrived.
        size: Bytes decoded.
        saved: Number of the file in which it has been since it arrived, or None.
        is_missing: Whether that file was removed.
    """

    def __init__(self, create: Callable[[], IO[bytes]] | None, *, is_url: bool = False) -> None:
        self._create = create
        self._file: IO[bytes] | None = None
        self._is_url = is_url
        self._rest = b""
        self._begun = False
        self._is_raw = False
        self.problem = ""
        self.ended = False
        self.size = 0
        self._saved: Decoded | None = None

    @property
    def saved(self) -> int | None:
        return self._saved.number if self._saved else None

    @property
    def is_missing(self) -> bool:
        return self._saved is not None and self._saved.found < 0

    def adopt(self, saved: Decoded) -> bool:
        """Take all of it from a file in which it is already; return False if that is not its beginning."""
        if self._create is None or self._is_url or self._saved or self._rest or self._begun:
            return False
        self._saved = saved
        return True

    def feed(self, piece: bytes) -> None:
        if not piece or self.problem or self._create is None:
            return
        if self._saved:  # more follows than what is in that file: it is decoded once more, with that
            saved, self._saved = self._saved, None
            for text in saved.text():
                self.feed(text)
        data = self._unescape(self._rest + piece)
        if not self._begun:
            data = self._without_prefix(data)
        self._rest = (self._decode(data) if self._begun and not self.problem else data) + self._escape

    def end(self) -> None:
        self.ended = True
        if self._saved:
            self.size, self.problem = max(0, self._saved.found), self._saved.problem
        elif self._create is not None and not self.problem:
            data = self._unescape(self._rest, final=True)
            if not self._begun and not self.problem:
                data = self._without_prefix(data, final=True)
            if not self.problem:
                self._decode(data, final=True)
        self.close()

    def close(self) -> None:
        if self._create is not None and not self._saved:
            self._opened(self._create).close()

    def _opened(self, create: Callable[[], IO[bytes]]) -> IO[bytes]:
        self._file = self._file or create()
        return self._file

    _escape = b""

    def _unescape(self, data: bytes, *, final: bool = False) -> bytes:
        r"""Resolve JSON escapes (``\\/``, ``\\n``, ``\\u002b``); one cut in two is held back."""
        self._escape = b""
        if b"\\" in data:
            last = data.rfind(b"\\")
            if len(data) - last < 6 and not final:  # noqa: PLR2004  the longest escape is \uXXXX
                data, self._escape = data[:last], data[last:]
            try:
                data = json.loads(b'"' + data + b'"', strict=False).encode("ascii")
            except (ValueError, UnicodeError):
                self.problem = "the base64 has invalid characters"
                return b""
        # Searching for five bytes is many times faster than copying all others, and hardly any base64 has them.
        return data.translate(None, b"".join(_BLANKS)) if any(blank in data for blank in _BLANKS) else data

    def _without_prefix(self, data: bytes, *, final: bool = False) -> bytes:
        """Drop ``data:image/png;base64,`` if there is one, and find out what follows it."""
        if len(data) < len(b"data:") and not final:
            return data
        if data[:5].lower() != b"data:":
            self._begun = True
            return data
        prefix, comma, rest = data.partition(b",")
        if len(prefix) > _LONGEST_PREFIX or (final and not comma):
            self.problem = "the base64 has invalid characters"
        if not comma or (len(rest) < _MAGIC_BYTES and not final):
            return data
        self._begun = True
        is_base64 = prefix.lower().endswith(b";base64") or not self._is_url or rest.startswith(_BASE64_MAGIC)
        self._is_raw = not is_base64
        return rest

    def _decode(self, data: bytes, *, final: bool = False) -> bytes:
        """Write what is in the text, and return its end if that cannot be read yet."""
        data, cut = _unquoted(data, final=final) if b"%" in data else (data, b"")
        if self._is_raw:
            self._write(data)
            return cut
        # Some servers encode piece by piece and join the results; this must not depend on the size of our pieces.
        *whole, last = data.split(b"=")
        if whole and not whole[0] and not self.size:
            self.problem = "the base64 is broken: it begins with padding"
        for text in whole:
            self._write_base64(text)
        now = len(last) if final else len(last) - len(last) % 4
        self._write_base64(last[:now])
        return last[now:] + cut

    def _write_base64(self, text: bytes) -> None:
        if not text or self.problem:
            return
        if b"-" in text or b"_" in text:
            text = text.translate(_URL_SAFE)
        try:
            self._write(pybase64.b64decode(text + b"=" * (-len(text) % 4), validate=True))
        except ValueError as error:
            self.problem = f"the base64 is broken: {error}"

    def _write(self, content: bytes) -> None:
        assert self._create is not None
        self._opened(self._create).write(content)
        self.size += len(content)


def _unquoted(data: bytes, *, final: bool) -> tuple[bytes, bytes]:
    """Resolve the ``%2B`` of a URL, and return also what may be the beginning of another."""
    last = data.rfind(b"%", -2)
    whole = len(data) if final or last < 0 else last
    return unquote_to_bytes(data[:whole]), data[whole:]
