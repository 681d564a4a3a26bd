"""The endpoint's wire format: a request in, an answer out. The only module that knows the API.

Facts about the endpoint come from its published contract, the ``image-generation`` skill of letta-ai/letta-code
(request body, response, notes), and from what its other routes and the gateway before it are seen to answer. No
disk, no network, no clock: everything comes as arguments. Nothing an answer holds is trusted.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import msgspec
import pybase64

from imagewatch.errors import InDoubt, JobError
from imagewatch.fields import Options, Provider, shown
from imagewatch.job import Head, Reaction

T = TypeVar("T")

PATH = "/v1/images/generations"
_READ_BYTES = 48 * 1024
"""Bytes of an image per piece of the request: a multiple of three, so that base64 needs no padding inside."""
_SKELETON_BYTES = 4 << 20
_MOST_IMAGES = 64
_DEEPEST_ERROR = 4
_QUOTA_REASONS = re.compile(r"quota|-usage-exceeded|limit-exceeded|not-enough-credits|model-unknown")

# The request


def choose_provider(options: Options, *, has_inputs: bool) -> Provider:
    """Return the provider for ``auto``, as the skill advises.

    Input images → gemini; any of size, quality, output_format → openai; else flux.
    """
    if options.provider not in {None, "auto"}:
        return options.provider  # type: ignore[return-value]  # the set above leaves the three
    if has_inputs:
        return "gemini"
    return "openai" if options.size or options.quality or options.output_format else "flux"


def body_fields(options: Options, provider: Provider) -> dict[str, Any]:
    """Return the JSON body without ``prompt`` and ``input_images``; what is not set is not sent."""
    fields: dict[str, Any] = {"provider": provider}
    for name in Options.__struct_fields__:
        if name != "provider" and (value := getattr(options, name)) is not None:
            fields[name] = value
    return fields


@dataclass(frozen=True)
class Part:
    """One input image of a request, still on disk.

    Attributes:
        open: Opens the file for reading.
        mime: Its type, by content.
        size: Bytes.
        sha256: Of what was validated; what is sent must be the same.
    """

    open: Callable[[], IO[bytes]]
    mime: str
    size: int
    sha256: str


class Body:
    """The request's JSON body, made piece by piece: never a whole image in memory.

    Attributes:
        length: Size in bytes, known before the first piece.
    """

    def __init__(self, prompt: str, fields: dict[str, Any], parts: Iterable[Part]) -> None:
        self._head = json.dumps({**fields, "prompt": prompt}, ensure_ascii=False).encode()
        self._parts = tuple(parts)
        self.length = sum(len(piece) if isinstance(piece, bytes) else _encoded(piece) for piece in self._plan())

    def _plan(self) -> Iterator[bytes | Part]:
        if not self._parts:
            yield self._head
            return
        yield self._head[:-1] + b', "input_images": ['
        for number, part in enumerate(self._parts):
            yield (b', "' if number else b'"') + f"data:{part.mime};base64,".encode()
            yield part
            yield b'"'
        yield b"]}"

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body.

        Raises:
            JobError: An image is not the one that was validated. The request is then incomplete by its
                Content-Length, so that the endpoint cannot have run it.
        """
        for piece in self._plan():
            if isinstance(piece, bytes):
                yield piece
            else:
                yield from _in_base64(piece)


def _encoded(part: Part) -> int:
    return (part.size + 2) // 3 * 4


def _in_base64(part: Part) -> Iterator[bytes]:
    digest, left = hashlib.sha256(), part.size
    with part.open() as file:
        while left > 0:
            chunk = file.read(min(_READ_BYTES, left))
            left -= len(chunk)
            digest.update(chunk)
            if not chunk or (left <= 0 and digest.hexdigest() != part.sha256):
                raise JobError("an input image was changed while it was sent", hint="drop the files again")
            yield pybase64.b64encode(chunk)


# What an answer means


@dataclass(frozen=True)
class Verdict:
    """What an answer means, and the endpoint's own words.

    Attributes:
        reaction: What to do.
        message: The endpoint's words, or ours where it has none.
        code: Its error code, or an empty string.
        credits_required: What it said a request would cost, or None.
        retry_after: Seconds it asked us to wait, or None.
        account: For ``Reaction.ACCOUNT``, what is wrong: ``key``, ``credits``, ``quota`` or ``address``.
    """

    reaction: Reaction
    message: str = ""
    code: str = ""
    credits_required: float | None = None
    retry_after: float | None = None
    account: str = ""


def classify(head: Head, sample: bytes) -> Verdict:
    """Tell what an answer means (product page, "Money").

    Args:
        head: Its status and headers.
        sample: The beginning of its body.
    """
    if head.status == 0:
        return Verdict(Reaction.UNREACHED, "the request never left whole")
    if 200 <= head.status < 300:  # noqa: PLR2004
        return Verdict(Reaction.SUCCESS)
    body = _json(sample)
    reaction, account = _reaction(head.status, body)
    wait = _retry_after(head)
    if head.status == 503 and wait is not None:  # noqa: PLR2004
        wait = min(wait, 30.0)  # Letta Code caps this one at 30 s (its conversation-enqueue)
    if account == "quota":
        wait = _number(_find(body, "timeToQuotaResetMs", object), 0.001) or wait
    message, code = _words(body, sample, head.status)
    required = _number(_find(body, "credits_required", object))
    return Verdict(reaction, message, code, required, wait, account)


_ACCOUNT = {401: "key", 403: "key", 402: "credits", 404: "address", 405: "address"}


def _reaction(status: int, body: object) -> tuple[Reaction, str]:
    if status in _ACCOUNT:
        return Reaction.ACCOUNT, _ACCOUNT[status]
    if 300 <= status < 400:  # noqa: PLR2004
        return Reaction.ACCOUNT, "address"
    if status == 429:  # noqa: PLR2004
        said = [_find(body, name, str) for name in ("reasons", "errorCode", "code")]
        said += _find(body, "reasons", list) or []
        quota = any(isinstance(word, str) and _QUOTA_REASONS.search(word) for word in said)
        quota = quota or _find(body, "timeToQuotaResetMs", object) is not None
        return (Reaction.ACCOUNT, "quota") if quota else (Reaction.BUSY, "")
    if status == 503 and _find(body, "admitted", bool) is False:  # noqa: PLR2004
        return Reaction.BUSY, ""
    if status == 500:  # noqa: PLR2004
        return (Reaction.REFUSED if isinstance(body, dict) and body else Reaction.UNKNOWN), ""
    if 400 <= status < 500 and status != 408:  # noqa: PLR2004
        return Reaction.REFUSED, ""
    return Reaction.UNKNOWN, ""


def _json(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        pass
    try:
        # Not quite JSON (NaN, a broken character): what was paid for may still be read.
        return json.loads(raw.decode("utf-8", "replace"))
    except (RecursionError, ValueError):
        return None


def _find(body: object, name: str, kind: type[T]) -> T | None:
    """Return a key of the body, or of an ``error`` inside it, that is of the kind looked for."""
    for _ in range(_DEEPEST_ERROR):
        if not isinstance(body, dict):
            break
        if isinstance(value := body.get(name), kind) and value is not None:
            return value
        body = body.get("error")
    return None


def _words(body: object, sample: bytes, status: int) -> tuple[str, str]:
    """Return message and code, from any of the shapes that Letta's routes are known to use."""
    code = next((found for name in ("errorCode", "code", "type") if (found := _find(body, name, str))), "")
    for name in ("reason_text", "message", "error", "detail"):
        if (said := _find(body, name, str)) and said.strip():
            return said.strip(), code
    issues = _find(body, "issues", list) or []
    if said := "; ".join(_issue(issue) for issue in issues[:20]).strip():
        return said, code
    text = sample[:4000].decode("utf-8", "replace").strip()
    if re.match(r"<(!doctype|html|head|body)", text, re.IGNORECASE):
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        text = " ".join(title[1].split()) if title else "a web page instead of an answer"
    return text[:2000] or f"HTTP {status} without any words", code


def _issue(issue: object) -> str:
    path, message = (issue.get("path"), issue.get("message")) if isinstance(issue, dict) else (None, issue)
    where = ".".join(str(step) for step in path if isinstance(step, str | int)) if isinstance(path, list) else ""
    said = message if isinstance(message, str) else shown(issue)
    return f"{where}: {said}" if where else said


def _number(value: object, scale: float = 1.0) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        scaled = value * scale
    except OverflowError:
        return None
    return scaled if math.isfinite(scaled) else None


def _retry_after(head: Head) -> float | None:
    """Return ``Retry-After`` in seconds; it may be a number or an HTTP date."""
    said = head.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", said):
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - head.at)
    except (ValueError, OverflowError):
        return None


# Reading a paid answer


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
        credits: ``billing.credits_charged``, or None when it is not a number.
        problem: What is wrong with the answer as a whole, or an empty string.
    """

    images: list[Got] = field(default_factory=list)
    provider: str = ""
    model: str = ""
    billing: dict[str, Any] = field(default_factory=dict)
    credits: float | None = None
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
    decoded = _json(splitter.skeleton())
    body = decoded if isinstance(decoded, dict) else {}
    entries = body.get("images")
    if isinstance(entries, list):
        images = [_entry(entry, splitter.files) for entry in entries[:_MOST_IMAGES]]
    else:
        # Cut short or garbled: the pictures that came whole are still worth their price.
        images = [Got(decoded=k) for k, file in enumerate(splitter.files) if file.ended and not file.problem]
        problem = problem or "the answer is not the JSON object it should be"
    billing = body.get("billing")
    billing = billing if isinstance(billing, dict) else {}
    return Reading(
        images=images,
        provider=_text(body.get("provider")),
        model=_text(body.get("model")),
        billing=billing,
        credits=_number(billing.get("credits_charged")),
        problem=problem,
    )


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
    """Yield the body without its content coding, at most ``limit`` bytes of it."""
    coding = encoding.strip().lower()
    if coding in {"", "identity"}:
        yield from chunks
        return
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise _UnreadableError(f"the answer is encoded as {coding[:40]!r}, which nobody asked for")
    inflate, total = zlib.decompressobj(47), 0
    try:
        for chunk in chunks:
            data = chunk
            while data and not inflate.eof:
                plain = inflate.decompress(data, _READ_BYTES)
                total += len(plain)
                if total > limit:
                    raise _UnreadableError(f"the compressed answer grows beyond {limit:,} bytes")
                yield plain
                data = inflate.unconsumed_tail
    except zlib.error as error:
        raise _UnreadableError(f"the compressed answer is damaged: {error}") from None


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
        """Resolve JSON escapes (``\\/``, ``\\n``, ``\\u002b``); one cut in two is held back."""
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
        return data.translate(None, b" \t\r\n")

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


def doubt(message: str) -> InDoubt:
    """Return the error for a request whose outcome nobody knows."""
    return InDoubt(message, hint="check the balance of the account before you try again")
