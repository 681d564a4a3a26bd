"""Reading a paid answer in constant memory: pictures go from the raw bytes into files, piece by piece.

It was paid for, so whatever can be read is read: nothing here raises for what an answer holds. Nothing it holds is
trusted either.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import pybase64

from imagewatch.masking import known
from imagewatch.wire import UndecodableError, is_coding, is_packed, number, parse, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SKELETON_BYTES = 4 << 20
_CHUNK_BYTES = 512 * 1024
_MOST_IMAGES = 64
_LONGEST_SECRET = 64 * 1024
"""Bytes; how much is held back of what may be shown, as a key may be cut in two."""
_MOST_NUMBER = 10**40
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?")
_BLANKS = (b" ", b"\t", b"\r", b"\n")


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
    """

    images: list[Got] = field(default_factory=list)
    provider: str = ""
    model: str = ""
    billing: dict[str, Any] = field(default_factory=dict)
    credits: float | None = None
    transaction: str = ""
    balance: float | None = None
    problem: str = ""


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
    entries = body.get("images")
    if isinstance(entries, list):
        images = [_entry(entry, splitter.files) for entry in entries[:_MOST_IMAGES]]
    else:
        # Cut short or garbled: the pictures that came whole are still worth their price.
        images = [Got(decoded=k) for k, file in enumerate(splitter.files) if file.ended and not file.problem]
        problem = problem or "the answer is not the JSON object it should be"
    reading = _billed(body.get("billing"))
    reading.images, reading.problem = images, problem
    reading.provider, reading.model = _text(body.get("provider")), _text(body.get("model"))
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


def _entry(entry: object, files: list[_Base64]) -> Got:
    if not isinstance(entry, dict):
        return Got(problem="the entry is not an object")
    mime = _text(entry.get("mime_type"))
    url, held = entry.get("url"), entry.get("b64_json")
    url = url[:8192] if isinstance(url, str) else ""
    # Not every "@…" is ours: a key written with an escape passes the splitter by.
    number = int(held[1:]) if isinstance(held, str) and re.fullmatch("@[0-9]{1,9}", held) else None
    file = files[number] if number is not None and number < len(files) else None
    if file and (not url or (file.size and not file.problem)):
        return Got(decoded=number, mime=mime, problem=file.problem)
    if url:
        return Got(url=url, mime=mime)
    neither = "the entry holds neither b64_json nor url"
    return Got(mime=mime, problem=neither if number is None else "the answer holds too many pictures")


class _UnreadableError(Exception):
    """The answer cannot be read on; its words say why."""


def _plain(chunks: Iterable[bytes], encoding: str, limit: int) -> Iterator[bytes]:
    """Yield the body without its content coding, at most ``limit`` bytes of it if it has one."""
    coding = encoding.strip().lower()
    if coding in {"", "identity"}:
        yield from chunks
        return
    if not is_coding(coding):
        raise _UnreadableError(f"the answer is encoded as {coding[:40]!r}, which nobody asked for")
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
    """Separates the base64 strings of a JSON text from the rest, piece by piece.

    Inside a JSON string a quote is always escaped, so ``"b64_json"`` followed by a colon and a quote can only be
    a key with a string. Everything but those strings, in which ``"@K"`` stands for file K, is the *skeleton*.
    """

    _KEY = re.compile(rb'"b64_json"\s{0,64}:\s{0,64}"')
    _OVERLAP = 192

    def __init__(self, create: Callable[[int], IO[bytes]]) -> None:
        self._create = create
        self._skeleton = bytearray()
        self._held = b""
        self._open: _Base64 | None = None
        self._seen = 0
        self.files: list[_Base64] = []

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
        self._keep(data[: match.end() - 1] + b'"@%d"' % self._seen)
        if self._seen < _MOST_IMAGES:
            self._open = _Base64(self._create(self._seen))
            self.files.append(self._open)
        else:
            self._open = _Base64(None)
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
    """One base64 string on its way into a file.

    Attributes:
        problem: What is wrong with it, or an empty string.
        ended: Whether its closing quote came.
        size: Bytes decoded.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._rest = b""
        self._begun = False
        self.problem = ""
        self.ended = False
        self.size = 0

    def feed(self, piece: bytes) -> None:
        if self.problem or self._file is None:
            return
        data = self._unescape(self._rest + piece)
        if not self._begun:
            data = self._without_prefix(data)
        if self._begun:
            whole = len(data) - len(data) % 4
            self._decode(data[:whole])
            self._rest = data[whole:] + self._escape
        else:
            self._rest = data + self._escape

    def end(self) -> None:
        self.ended = True
        if self._file is not None and not self.problem:
            data = self._unescape(self._rest, final=True)
            if not self._begun:
                data = self._without_prefix(data)
            if not self.problem:
                self._decode(data + b"=" * (-len(data) % 4))
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
        # To look for four bytes is many times faster than to copy all others, and hardly any base64 has them.
        return data.translate(None, b"".join(_BLANKS)) if any(blank in data for blank in _BLANKS) else data

    def _without_prefix(self, data: bytes) -> bytes:
        """Drop ``data:image/png;base64,`` where a provider's data URL was passed through."""
        if len(data) < 5:  # noqa: PLR2004  len("data:")
            return data
        if not data.startswith(b"data:"):
            self._begun = True
            return data
        prefix, comma, rest = data.partition(b",")
        self._begun = bool(comma)
        if len(prefix) > 200:  # noqa: PLR2004
            self.problem = "the base64 holds something else"
        return rest if comma else data

    def _decode(self, data: bytes) -> None:
        assert self._file is not None
        # Some encode piece by piece and join the results; whether that is read must not depend on our own pieces.
        pieces = re.findall(rb"[^=]+={0,2}|=", data) if b"=" in data else [data]
        try:
            decoded = b"".join(pybase64.b64decode(piece, validate=True) for piece in pieces)
        except ValueError as error:
            self.problem = f"the base64 is broken: {error}"
            return
        self._file.write(decoded)
        self.size += len(decoded)
