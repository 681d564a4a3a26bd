"""For which prompt a file may be meant as an image, although its name is not exactly right. Pure.

People and programs change names a little: a second copy becomes ``cat (1).png``, a camera writes ``cat.MP.jpg``, a file
manager gives ``cat`` the ending of its kind. A prompt that is sent without such a file is paid for and wrong, so it is
refused unless it says which images it means. Only names are compared here; ``request`` reads what is in a file.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_COPY = (
    r"(?:copy|kopie|kopia|kopi|copie|c[o\u00f3]pia|kopya|\u043a\u043e\u043f[\u0438\u0456]\u044f"
    r"|\u30b3\u30d4\u30fc|\u526f\u672c|\u8907\u88fd|\ubcf5\uc0ac\ubcf8)"
)
"""As file managers write it: also in Portuguese, Turkish, Russian, Ukrainian, Japanese, Chinese and Korean."""
_BETWEEN, _MOST_BETWEEN = " \u00a0\u202f\u2013\u2014_~-", 4
"""What is between a name and an addition, and how much of it at most a name may end with itself."""
_ADDED = re.compile(
    rf"(?:[{_BETWEEN}]*[(\[][^()\[\]]*[)\]]"  # cat (1), cat (copy), cat[1], cat (conflicted copy 2026-01-01)
    rf"|[{_BETWEEN}]+[0-9]{{1,3}}|(?<![0-9{_BETWEEN}])[0-9]{{1,3}}"  # cat-2, cat_2, cat 2, cat~2, cat2; not cat-2026
    rf"|[{_BETWEEN}]+{_COPY}"  # cat - Copy
    rf"|[{_BETWEEN}]+)\Z",
    re.IGNORECASE,
)
_BEFORE = re.compile(rf"{_COPY}(?:\s*\([0-9]+\))?\s+(?:(?:of|von|van|de|di|da|av)\s+)?(?=\S)", re.IGNORECASE)
"""Copy of cat, Kopie von cat, Copia de cat, Kopia cat."""
_LAST = frozenset("0123456789)] _~-yeaiYEAI")
"""What an addition ends with, of ASCII."""
_MOST_ADDED = 3
"""So many additions may follow one another: ``cat - Copy (2)`` has two."""
_LONGEST_ADDED = 64
"""Characters at the end of a name among which an addition is searched."""
_MOST_PARTS = 8
"""Additions are searched before so many dots: a name may be nothing but dots."""
_LEFTOVERS = re.compile(
    r"(?:~|:Zone\.Identifier|_original|\.(?:bak|backup|old|orig|save|lock|lck|sw[a-z]|tmp|temp))\Z", re.IGNORECASE
)


def caseless(name: str) -> str:
    """Return what two names have in common that differ only in upper and lower case or in composed accents."""
    if name.isascii():
        lower = name.lower()
        return name if lower == name else lower  # not a second string of each of very many names
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def is_leftover(name: str) -> bool:
    """Return whether a name is that of a backup or lock file, which is never meant as an image."""
    return bool(_LEFTOVERS.search(name))


def is_called_copy(name: str) -> bool:
    """Return whether a name begins like ``Copy of``, so that the name of a prompt may follow."""
    return name[:1] in "cCkK" and _BEFORE.match(name) is not None


def base_names(name: str) -> Iterator[str]:
    """Yield the names of prompts, without ``.prompt.txt``, for which a file may be meant; the likeliest first.

    Of ``cat.prompt (1).jpg`` these are ``cat.prompt (1).jpg`` itself, ``cat.prompt.jpg``, ``cat.prompt (1)``,
    ``cat.prompt`` and ``cat``. Some may come twice.

    Args:
        name: The file's name.
    """
    yield from _with_and_without(name)
    head, dot, ending = name.rpartition(".")
    for shorter in _without(head) if dot else ():
        yield f"{shorter}.{ending}"
    at, parts = len(name), 0
    while (at := name.rfind(".", 1, at)) > 0:
        parts += 1
        if parts <= _MOST_PARTS:
            yield from _with_and_without(name[:at])
        else:
            yield name[:at]


def _with_and_without(text: str) -> Iterator[str]:
    yield text
    yield from _without(text)


def _without(text: str) -> Iterator[str]:
    """Yield a name without what copies add to it."""
    yield from _without_end(text)
    if text[:1] in "cCkK" and (before := _BEFORE.match(text)):
        rest = text[before.end() :]
        yield rest
        yield from _without_end(rest)


def _without_end(text: str) -> Iterator[str]:
    for _ in range(_MOST_ADDED):
        may_be_added = text[-1:] in _LAST or not text[-1:].isascii()
        if not may_be_added or (added := _ADDED.search(text[-_LONGEST_ADDED:])) is None:
            return
        start = len(text) - len(added[0])
        between = len(added[0]) - len(added[0].lstrip(_BETWEEN))
        for end in range(start + between, max(start + between - _MOST_BETWEEN, start), -1):
            yield text[:end]
        if not (text := text[:start]):
            return
        yield text
