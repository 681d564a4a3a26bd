"""Reading a paid answer in constant memory: pictures go from the raw bytes into files, piece by piece.

It was paid for, so whatever can be read is read: nothing here raises for what an answer holds. Nothing it holds is
trusted either.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import pybase64

from imagewatch.endpoint.api import UndecodableError, is_coding, is_packed, number, parse, plain, words
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SKELETON_BYTES = 4 << 20
_CHUNK_BYTES = 512 * 1024
_MOST_IMAGES = 64
_LONGEST_SECRET = 64 * 1024
"""Bytes; how much is held back of what may be shown, as a key may be cut in two."""
_MOST_NUMBER = 10**40
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?")
_BLANKS = (b" ", b"\t", b"\r", b"\n", b"\f")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BASE64_MAGIC = (b"iVBORw0KGg", b"/9j/", b"UklGR")
"""How PNG, JPEG and WebP begin in base64."""
_MAGIC_BYTES = max(map(len, _BASE64_MAGIC))
_LONGEST_PREFIX = 200
"""Bytes of a ``data:`` URL before its comma."""
_LONGEST_URL = 8192
_DEEPEST = 4
_ENVELOPES = ("images", "data", "output", "image")
"""Where other image APIs have what the contract calls ``images``, in the order in which they are looked through."""


@dataclass
class Got:
    """One entry of ``images``.

    Attributes:
        decoded: Number of the file its base64 was decoded into, or None.
        url: Where to fetch it, or an empty string.
        mime: What the endpoint says it is.
        problem: Why there is no picture, or an empty string.
    """

    decoded: int | None = None
    url: str = ""
    mime: str = ""
    problem: str = ""


@dataclass
class Reading:
    """What a paid answer holds.

    Attributes:
        images: The entries, in order.
        provider: As answered, or an empty string.
        model: As answered, or an empty string.
        billing: As received; empty without.
        credits: ``billing.credits_charged``, or None when it is not a number that can be a charge.
        transaction: ``billing.transaction_id`` as text, or an empty string.
        balance: ``billing.new_credit_balance``, credits, or None when it is no number.
        problem: What is wrong with the answer as a whole, or an empty string.
        message: The endpoint's own words in an answer without pictures, or an empty string.
        code: The error code beside them, or an empty string.
    """

    images: list[Got] = field(default_factory=list)
    provider: str = ""
    model: str = ""
    billing: dict[str, Any] = field(default_factory=dict)
    credits: float | None = None
    transaction: str = ""
    balance: float | None = None
    problem: str = ""
    message: str = ""
    code: str = ""


def read(chunks: Iterable[bytes], *, encoding: str, limit: int, create: Callable[[int], IO[bytes]]) -> Reading:
    """Read a paid answer in constant memory; pictures go into files as they come.

    Args:
        chunks: The raw body.
        encoding: Its ``Content-Encoding``, or an empty string. We ask for none.
        limit: Most bytes a compressed body may grow to.
        create: Called with 0, 1, … for each base64 picture; returns the file it goes to.

    Returns:
        What could be read. This never raises for what an answer holds: it is paid for.
    """
    splitter = _Splitter(create)
    problem = ""
    try:
        for chunk in _plain(chunks, encoding, limit):
            splitter.feed(chunk)
    except _UnreadableError as error:
        problem = str(error)
    finally:
        splitter.close()
    decoded = known.values(parse(splitter.skeleton()))
    body = decoded if isinstance(decoded, dict) else {}
    images, remark = _images(body, splitter)
    reading = _billed(body.get("billing"))
    reading.images, reading.problem = images, problem or remark
    reading.provider, reading.model = _text(body.get("provider")), _text(body.get("model"))
    if not images:
        reading.message, reading.code = words(body)
    return reading


def _billed(billing: object) -> Reading:
    """Return what an answer says of its payment; of odd values none is believed, and none keeps a picture back."""
    billing = billing if isinstance(billing, dict) else {}
    return Reading(
        billing=billing,
        credits=_charge(billing),
        transaction=_transaction(billing.get("transaction_id")),
        balance=_balance(billing.get("new_credit_balance")),
    )


def _images(body: dict[str, Any], splitter: _Splitter) -> tuple[list[Got], str]:
    """Return the entries, and what is wrong with the way in which they came."""
    entries = body.get("images")
    if isinstance(entries, list):
        return [_entry(entry, splitter) for entry in entries[:_MOST_IMAGES]], ""
    for name in _ENVELOPES:
        found = body.get(name)
        entries = found if isinstance(found, list) else [found]
        images = [_entry(entry, splitter) for entry in entries[:_MOST_IMAGES]]
        if any(got.url or got.decoded is not None for got in images):
            return images, f'the answer has its pictures under "{name}", and not as the list "images"'
    return _scattered(splitter), "the answer is not the JSON object it should be"


def _scattered(splitter: _Splitter) -> list[Got]:
    """Return the pictures of an answer that is cut short or garbled: those that came whole are worth their price."""
    found: list[Got] = []
    skeleton, end = splitter.skeleton(), 0
    for match in splitter.traces().finditer(skeleton):
        if match["url"] is None:
            if splitter.is_whole(int(match["mark"])):
                found.append(Got(decoded=int(match["mark"])))
                end = match.end()
        elif not end or b"}" in skeleton[end : match.start()]:  # else it is another address of the picture before it
            url = parse(match["url"])
            if isinstance(url, str) and b'"images"' in skeleton[: match.start()]:
                found.append(Got(url=url[:_LONGEST_URL]))
    return found


def _charge(billing: dict[str, Any]) -> float | None:
    """Return what was charged. Less than nothing is not believed: it would make room under a cap."""
    charged = number(billing.get("credits_charged"))
    return None if charged is None or charged < 0 else charged


def _transaction(value: object) -> str:
    """Return the id of a payment as text: it may be a number as well."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_NUMBER
    return str(value) if is_number else _text(value)


def _balance(value: object) -> float | None:
    """Return what an account has left: a number, or one as text. It may be less than nothing."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    found = number(value)
    return None if found is None else float(found)


def _text(value: object) -> str:
    return value[:200] if isinstance(value, str) else ""


def _entry(entry: object, splitter: _Splitter) -> Got:
    """Return what one entry of ``images`` is: an object, or only the picture's text or address."""
    fields = entry if isinstance(entry, dict) else {}
    if isinstance(entry, str) and (splitter.number(entry) is not None or entry.startswith(("https://", "http://"))):
        fields = {"url": entry}
    elif not isinstance(entry, dict):
        return Got(problem="the entry is not an object")
    mime = _text(fields.get("mime_type"))
    url = _address(fields, splitter)
    number = next((number for value in _values(fields) if (number := splitter.number(value)) is not None), None)
    file = splitter.files[number] if number is not None and number < len(splitter.files) else None
    if file and (not url or (file.size and not file.problem)):
        return Got(decoded=number, mime=mime, problem=file.problem)
    if url:
        return Got(url=url, mime=mime)
    problem = "the entry holds neither b64_json nor url" if number is None else "the answer holds too many pictures"
    said, _ = words(fields)
    return Got(mime=mime, problem=f"{problem}: {said[:500]}" if said and isinstance(entry, dict) else problem)


def _address(fields: dict[str, Any], splitter: _Splitter) -> str:
    """Return the address in an entry: ``url``, or ``image_url`` and an object around it, as others have it."""
    for name in ("url", "image_url"):
        value = fields.get(name)
        value = value.get("url") if isinstance(value, dict) else value
        if isinstance(value, str) and value and splitter.number(value) is None:
            return value[:_LONGEST_URL]
    return ""


def _values(value: object, depth: int = 0) -> Iterator[object]:
    """Yield what may be a picture in an entry: the keys of the contract first, then all others, in order."""
    if isinstance(value, dict) and depth < _DEEPEST:
        first = [value[name] for name in ("b64_json", "url") if name in value]
        for inner in itertools.chain(first, value.values()):
            yield from _values(inner, depth + 1)
    elif isinstance(value, str):
        yield value


class _UnreadableError(Exception):
    """The answer cannot be read on; its words say why."""


def _plain(chunks: Iterable[bytes], encoding: str, limit: int) -> Iterator[bytes]:
    """Yield the body without its content coding, at most ``limit`` bytes of it if it has one."""
    coding = encoding.strip().lower()
    if coding in {"", "identity"}:
        yield from chunks
        return
    if not is_coding(coding):
        begun = iter(chunks)
        first = next(begun, b"")
        if first.lstrip()[:1] not in {b"{", b"["}:
            raise _UnreadableError(f"the answer is encoded as {coding[:40]!r}, which nobody asked for")
        yield first  # it only says so
        yield from begun
        return
    total = 0
    try:
        for piece in plain(chunks, coding):
            total += len(piece)
            if total > limit:
                raise _UnreadableError(f"the compressed answer grows beyond {limit:,} bytes")
            yield piece
    except UndecodableError as error:
        raise _UnreadableError(str(error)) from None


def _unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what is not a compressed file: what is in one cannot be looked through for the key."""
    for place, piece in enumerate(pieces):
        if place == 0 and is_packed(piece):
            raise _UnreadableError("the answer is a compressed file")
        yield piece


def shown(chunks: Iterable[bytes], *, encoding: str, limit: int) -> Iterator[bytes]:
    """Yield what others may see of a paid answer: without the key in any form, even if that damages a picture.

    Args:
        chunks: The raw body.
        encoding: Its ``Content-Encoding``, or an empty string.
        limit: Most bytes a compressed body may grow to.
    """
    try:
        yield from _masked(_unpacked(_plain(chunks, encoding, limit)))
    except _UnreadableError as error:
        yield f"\n[{error}; the whole answer is kept in the state folder]\n".encode()


def _masked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield chunks without the key in any form."""
    held = b""
    try:
        for chunk in chunks:
            held = known.content(held + chunk)
            yield held[:-_LONGEST_SECRET]
            held = held[-_LONGEST_SECRET:]
    except _UnreadableError:
        yield held
        raise
    yield held


def holds_key(file: IO[bytes]) -> bool:
    """Tell whether there is a key in a file, in any form."""
    held = b""
    while chunk := file.read(_CHUNK_BYTES):
        held += chunk
        if known.content(held) != held:
            return True
        held = held[-_LONGEST_SECRET:]
    return False


class _Splitter:
    """Separates the pictures in a JSON text from the rest, piece by piece.

    Inside a JSON string a quote is always escaped, so ``"b64_json"`` followed by a colon and a quote can only be
    a key with a string, and a colon, comma or bracket followed by a quote and the first letters of a picture in base64
    can only be a string with that picture. Everything but those strings is the *skeleton*; in it a mark stands for
    each, which no answer can know.
    """

    _KEY = re.compile(
        rb'"(?P<key>b64_json)"\s{0,64}:\s{0,64}"'
        rb'|"(?P<address>url)"\s{0,64}:\s{0,64}"(?=\s{0,64}(?i:data):)'
        rb'|[:\[,]\s{0,64}"(?=\s{0,64}(?i:data:image)\\?/|iVBORw0KGg|\\?/9j\\?/|UklGR)'
    )
    _OVERLAP = 256

    def __init__(self, create: Callable[[int], IO[bytes]]) -> None:
        self._create = create
        self._mark = f"@{secrets.token_hex(8)}-"
        self._skeleton = bytearray()
        self._held = b""
        self._open: _Base64 | None = None
        self._seen = 0
        self._named: set[int] = set()  # those whose key says that they are pictures
        self.files: list[_Base64] = []

    def number(self, value: object) -> int | None:
        """Return the number of the picture for which a value of the skeleton stands, or None."""
        if not isinstance(value, str) or not value.startswith(self._mark):
            return None
        return int(value.removeprefix(self._mark))

    def is_whole(self, number: int) -> bool:
        """Tell whether a picture came to its end under a key that is one for pictures."""
        file = self.files[number] if number < len(self.files) else None
        return file is not None and number in self._named and file.ended and not file.problem

    def traces(self) -> re.Pattern[bytes]:
        """Return what finds pictures and their addresses in a skeleton that is no JSON."""
        return re.compile(
            rb'"%s(?P<mark>[0-9]{1,9})"|"url"\s{0,64}:\s{0,64}(?P<url>"https?:(?:[^"\\]|\\.){1,%d}")'
            % (self._mark.encode(), _LONGEST_URL)
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next piece."""
        data = self._held + chunk
        self._held = b""
        while data:
            data = self._string(data) if self._open else self._outside(data)

    def skeleton(self) -> bytes:
        """Return what there is of the skeleton."""
        return bytes(self._skeleton + self._held)

    def close(self) -> None:
        """Let go of all files."""
        for file in self.files:
            file.close()

    def _outside(self, data: bytes) -> bytes:
        match = self._KEY.search(data)
        if not match:
            self._keep(data[: -self._OVERLAP])
            self._held = data[-self._OVERLAP :]
            return b""
        self._keep(data[: match.end() - 1] + b'"%s%d"' % (self._mark.encode(), self._seen))
        is_url = match["key"] is None
        if self._seen < _MOST_IMAGES:
            self._open = _Base64(self._create(self._seen), is_url=is_url)
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
            raise _UnreadableError(f"the answer holds more than {_SKELETON_BYTES >> 20} MiB beside its pictures")


class _Base64:
    r"""One string with a picture in it, on its way into a file: base64, or a ``data:`` URL.

    Read is what any decoder would read: the standard and the URL-safe alphabet, with and without padding and white
    space, and pieces that were encoded one by one and joined.

    Args:
        file: Where the picture goes; nowhere without.
        is_url: Whether a ``data:`` URL that does not say that it is base64 is none.

    Attributes:
        problem: What is wrong with it, or an empty string.
        ended: Whether its closing quote came.
        size: Bytes decoded.
    """

    def __init__(self, file: IO[bytes] | None, *, is_url: bool = False) -> None:
        self._file = file
        self._is_url = is_url
        self._rest = b""
        self._begun = False
        self._is_raw = False
        self.problem = ""
        self.ended = False
        self.size = 0

    def feed(self, piece: bytes) -> None:
        if self.problem or self._file is None:
            return
        data = self._unescape(self._rest + piece)
        if not self._begun:
            data = self._without_prefix(data)
        self._rest = (self._decode(data) if self._begun and not self.problem else data) + self._escape

    def end(self) -> None:
        self.ended = True
        if self._file is not None and not self.problem:
            data = self._unescape(self._rest, final=True)
            if not self._begun and not self.problem:
                data = self._without_prefix(data, final=True)
            if not self.problem:
                self._decode(data, final=True)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

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
                self.problem = "the base64 holds something else"
                return b""
        # To look for five bytes is many times faster than to copy all others, and hardly any base64 has them.
        return data.translate(None, b"".join(_BLANKS)) if any(blank in data for blank in _BLANKS) else data

    def _without_prefix(self, data: bytes, *, final: bool = False) -> bytes:
        """Drop ``data:image/png;base64,`` where there is one, and find out what follows it."""
        if len(data) < len(b"data:") and not final:
            return data
        if data[:5].lower() != b"data:":
            self._begun = True
            return data
        prefix, comma, rest = data.partition(b",")
        if len(prefix) > _LONGEST_PREFIX or (final and not comma):
            self.problem = "the base64 holds something else"
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
        # Some encode piece by piece and join the results; whether that is read must not depend on our own pieces.
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
        assert self._file is not None
        self._file.write(content)
        self.size += len(content)


def _unquoted(data: bytes, *, final: bool) -> tuple[bytes, bytes]:
    """Resolve the ``%2B`` of a URL, and return also what may be the beginning of another."""
    last = data.rfind(b"%", -2)
    whole = len(data) if final or last < 0 else last
    return unquote_to_bytes(data[:whole]), data[whole:]
