"""Keeps secrets out of what is written: the API key, in every form in which a response may repeat it.

A response is masked three times, because each place knows something that the others do not:

- where its bytes are saved (``Mask.content``): only then is it known which key was sent;
- where its text is decoded (``known``): what was escaped is plain there;
- where text leaves the process: log, receipts and error files, ledger, status (``known``).
"""

from __future__ import annotations

import base64
import bisect
import json
import re
import threading
from typing import Any, Final

_MASKED: Final = "***"
_MARKS: Final = ("\\", "%", "&")
_RAW_MARKS: Final = (b"\\", b"%", b"&", b"\0")
"""Every escaped character begins with one of these; in UTF-16 every other byte of a key is the last one."""
_ESCAPED: Final = re.compile(
    # JSON and the like, also in a JSON string in a JSON string: \u002d, \u{2d}, \x2d, \-
    r"\\{1,4}(?:[uU](?:0{0,4}([0-9a-fA-F]{2})|\{0{0,4}([0-9a-fA-F]{2})\})|x([0-9a-fA-F]{2})|([!-/:-@\[\]-`{-~]))"
    # URLs, also encoded twice: %2d, %252d
    r"|%(?:25){0,2}([0-9a-fA-F]{2})"
    # HTML: &#45; &#x2d; &amp;#45; &equals;
    r"|&(?:amp;){0,2}(?:#0{0,4}([0-9]{2,3});?|#[xX]0{0,4}([0-9a-fA-F]{2});?|([A-Za-z]{2,8});)"
)
_LONGEST_ESCAPE: Final = 18
_MANY_MARKS: Final = 500
_PIECE: Final = 128 * 1024
_LEAST_BEGINNING: Final = 8
"""So much of a secret, at the least, is recognized where a response was cut off in the middle of it."""
_ORDINARY: Final = 16
"""A shorter secret may be a part of an image by chance."""
_SHORT: Final = 8
"""A shorter secret may be a part of a word."""
_MOST_KNOWN: Final = 8
_DEEPEST: Final = 64


class Mask:
    """Replaces one secret.

    Args:
        secret: Printable ASCII. If it is empty, nothing is replaced.
    """

    __slots__ = ("_other", "_pattern", "_secret", "_spelled")

    def __init__(self, secret: str) -> None:
        self._secret = secret
        spelled = {secret, json.dumps(secret)[1:-1]} - {""}
        self._spelled = _longest_first(spelled) if self.is_told_apart else []
        self._other = _longest_first(_transcribed(secret)) if self.is_ordinary else []
        word = re.escape(secret)
        # A short one is searched as a whole word only: "any" must not be removed from "many".
        self._pattern = word if self.is_told_apart else rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._secret == other._secret

    def __hash__(self) -> int:
        return hash(self._secret)

    @property
    def is_ordinary(self) -> bool:
        """Whether the secret is so long that it is not part of an image by chance."""
        return len(self._secret) >= _ORDINARY

    @property
    def is_told_apart(self) -> bool:
        """Whether the secret is so long that it is not part of a word by chance."""
        return len(self._secret) >= _SHORT

    def text(self, text: str) -> str:
        """Return a text with the secret replaced by ``***``: as it is, escaped, in base64, in hexadecimal digits."""
        if len(text) < len(self._secret):  # no form of it is shorter
            return text
        text = self._rest(text) if self._secret else text
        for form in (*self._spelled, *self._other):
            text = text.replace(form, _MASKED)
        return text

    def content(self, content: bytes) -> bytes:
        """Return bytes with the secret replaced by ``***``: as it is and escaped. Without a copy if it is not there.

        Not in base64: an image has to stay as it is.
        """
        if self._secret and not self._spelled:
            return self._rest(content.decode("latin-1")).encode("latin-1")
        if self._spelled and _has_marks(content):
            content = self._near_marks(content)
        for form in self._spelled:
            content = content.replace(form.encode(), _MASKED.encode())
        return content

    def reach(self, tail: bytes) -> int:
        """Return how many bytes at the end of a piece may be the beginning of the secret."""
        longest = _LONGEST_ESCAPE * len(self._secret)
        return min(longest, len(tail)) if _has_marks(tail[-longest:]) else self._begun(tail)

    def _begun(self, tail: bytes) -> int:
        secret = self._secret.encode()
        near = tail[-(len(secret) - 1) :] if len(secret) > 1 else b""
        place = near.find(secret[:1])
        while place >= 0 and not secret.startswith(near[place:]):
            place = near.find(secret[:1], place + 1)
        return len(near) - place if place >= 0 else 0

    def ending(self, content: bytes) -> bytes:
        """Return the end of a response without the beginning of a secret in the middle of which it was cut off."""
        begun = self._begun(content)
        return content[:-begun] + _MASKED.encode() if begun >= _LEAST_BEGINNING else content

    def _near_marks(self, content: bytes) -> bytes:
        """Mask what is escaped; of a large response only the surroundings of escapes are read."""
        parts, done = [], 0
        for begin, end in _around(content, _LONGEST_ESCAPE * len(self._secret)):
            near = content[begin:end]
            masked = self._rest(near.decode("latin-1")).encode("latin-1")
            if masked != near:
                parts += [content[done:begin], masked]
                done = end
        return b"".join([*parts, content[done:]]) if parts else content

    def _rest(self, text: str) -> str:
        """Mask a secret that is short, or not there letter by letter."""
        if not self.is_told_apart:
            text = re.sub(self._pattern, _MASKED, text)
        if "\0" in text and self._secret in (narrow := text.replace("\0", "")):  # UTF-16
            text = re.sub(self._pattern, _MASKED, narrow)
        return self._unescaped(text) if any(mark in text for mark in _MARKS) else text

    def _unescaped(self, text: str) -> str:
        """Mask what is escaped. Piece by piece: to remember where each of millions of escapes was takes much memory."""
        parts, held = [], ""
        for begin in range(0, len(text), _PIECE):
            held = _Plain(held + text[begin : begin + _PIECE]).without(self._pattern)
            over = max(0, len(held) - _LONGEST_ESCAPE * len(self._secret))
            parts.append(held[:over])
            held = held[over:]
        return "".join([*parts, held])


class _Plain:
    """A text without its escapes, which remembers where everything was."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._places: list[int] = []
        self._spans: list[tuple[int, int]] = []
        parts, done, length = [], 0, 0
        for found in _ESCAPED.finditer(text):
            parts += [text[done : found.start()], _character(found)]
            length += found.start() - done
            self._places.append(length)
            self._spans.append(found.span())
            length, done = length + 1, found.end()
        self._plain = "".join([*parts, text[done:]])

    def without(self, pattern: str) -> str:
        """Return the text as it was, with ``***`` for what matches without the escapes."""
        parts, done = [], 0
        for found in re.finditer(pattern, self._plain):
            parts += [self._text[done : self._span(found.start())[0]], _MASKED]
            done = self._span(found.end() - 1)[1]
        return "".join([*parts, self._text[done:]])

    def _span(self, place: int) -> tuple[int, int]:
        """Return where a character was."""
        nearest = bisect.bisect_right(self._places, place) - 1
        if nearest < 0:
            return place, place + 1
        behind = place - self._places[nearest]
        begin, end = self._spans[nearest]
        return (end + behind - 1, end + behind) if behind else (begin, end)


class Secrets:
    """What must not leave this process: the keys that were read last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._masks: tuple[Mask, ...] = ()
        self._lasting: frozenset[Mask] = frozenset()
        self._lock = threading.Lock()

    def remember(self, mask: Mask, *, lasting: bool = False) -> None:
        """Mask this secret from now on. One that may be an ordinary word is left out.

        Args:
            mask: Replaces it.
            lasting: Whether others that come later do not take its place.
        """
        with self._lock:
            if not mask.is_told_apart:
                return
            self._lasting |= {mask} if lasting else frozenset()
            if mask not in self._masks:
                others = [one for one in self._masks if one not in self._lasting]
                self._masks = (*self._lasting, *(() if lasting else (mask,)), *others[: _MOST_KNOWN - 1])

    def forget(self) -> None:
        """Forget all secrets; nothing is masked any more."""
        self._masks, self._lasting = (), frozenset()

    def text(self, text: str) -> str:
        """Return a text without them."""
        for mask in self._masks:
            text = mask.text(text)
        return text

    def content(self, content: bytes) -> bytes:
        """Return bytes without them, in whatever form; an image in them may be damaged by that."""
        return self.text(content.decode("latin-1")).encode("latin-1") if self._masks else content

    def values(self, value: Any, depth: int = 0) -> Any:  # noqa: ANN401  any JSON
        """Return values as decoded from JSON without them, names included."""
        if not self._masks:
            return value
        if isinstance(value, str):
            return self.text(value)
        if not isinstance(value, dict | list | tuple):
            return value
        if depth > _DEEPEST:
            return "nested too deeply to be shown"
        if isinstance(value, dict):
            return {self.text(str(name)): self.values(inner, depth + 1) for name, inner in value.items()}
        return [self.values(inner, depth + 1) for inner in value]


known: Final = Secrets()
"""Those of this process. What is decoded, written down or logged is far from where a key is read."""


def _longest_first(forms: set[str]) -> list[str]:
    return sorted(forms, key=len, reverse=True)


def _transcribed(secret: str) -> set[str]:
    """Return other writings of a secret: hexadecimal digits, and base64 as it is inside of a longer text."""
    raw = secret.encode()
    forms = {raw.hex(), raw.hex().upper()}
    for before in range(3):  # bytes before it in its group of three
        first, last = (0, 2, 3)[before], (before + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            forms.add(encode(bytes(before) + raw)[first:last].decode())
    return forms


def _character(found: re.Match[str]) -> str:
    """Return the character of an escape."""
    four, braced, two, same, percent, decimal, hexadecimal, name = found.groups()
    if digits := four or braced or two or percent or hexadecimal:
        return chr(int(digits, 16))
    if decimal:
        return chr(int(decimal))
    if same:
        return same
    from html.entities import html5  # noqa: PLC0415  hardly ever needed

    return html5.get(f"{name};", "\0")[0]


def _has_marks(content: bytes) -> bool:
    return any(mark in content for mark in _RAW_MARKS)


def _around(content: bytes, reach: int) -> list[tuple[int, int]]:
    """Return the surroundings of all marks; all of the content if there are many."""
    spots: list[int] = []
    for mark in _RAW_MARKS:
        at = content.find(mark)
        while at >= 0:
            spots.append(at)
            if len(spots) > _MANY_MARKS:
                return [(0, len(content))]
            at = content.find(mark, at + 1)
    found: list[tuple[int, int]] = []
    for at in sorted(spots):
        begin, end = max(0, at - reach), min(len(content), at + reach)
        if found and begin <= found[-1][1]:
            begin = found.pop()[0]
        found.append((begin, end))
    return found
