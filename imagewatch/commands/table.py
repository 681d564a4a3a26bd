"""Tables for people: columns that are aligned on a terminal, whatever script a name is written in. Pure."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_GAP = "  "


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: two for most of East Asia, none for an accent."""
    return sum(_cell(letter) for letter in text)


def _cell(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in {"W", "F"} else 1


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Return a text of at least so many cells: with blanks after it, or before it."""
    blanks = " " * (width - cells(text))
    return blanks + text if right else text + blanks


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, the head first; numbers stand to the right.

    Args:
        head: What each column is called.
        rows: Text for each of them.
    """
    table = [head, *rows]
    numbers = [len(table) > 1 and all(_is_number(row[at]) for row in table[1:]) for at in range(len(head))]
    widths = [max(cells(row[at]) for row in table) for at in range(len(head))]
    for row in table:
        parts = zip(row, widths, numbers, strict=True)
        yield _GAP.join(padded(text, width, right=number) for text, width, number in parts).rstrip()


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace("e+", "", 1).isdigit()
