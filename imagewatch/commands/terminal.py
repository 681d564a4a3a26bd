"""What a command shares with the shell that started it: its streams, its current folder, and tables that line up.

Columns are aligned by the cells that a terminal needs for a text, whatever script a name is written in.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

import click

from imagewatch.system.text import amount, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_GAP = "  "


def current_folder() -> str:
    """Return the current folder, or an empty string if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def silence(stream: TextIO | None) -> None:
    """Point a stream at /dev/null, or Python would write again at exit what could not be written."""
    if stream is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """Print a line on standard error. If that fails, the exit code still says it."""
    try:
        click.echo(line, err=True)
    except OSError:
        silence(sys.stderr)


def shown(value: object) -> str:
    """Return a value as a cell of a table; None is empty."""
    if value is None:
        return ""
    return amount(value) if isinstance(value, float) else printable(str(value), 100)


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    colors: Sequence[str | None] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        head: What each column is called.
        rows: Text for each of them.
        colors: One for each row, or none.
        notes: A line below each row, unless it is empty.
    """
    first, *others = lines(head, rows)
    click.echo(click.style(first, bold=True))
    for at, line in enumerate(others):
        color = colors[at] if colors else None
        for part in (line, f"    {notes[at]}" if notes and notes[at] else ""):
            if part:
                click.echo(click.style(part, fg=color) if color else part)


def cells(text: str) -> int:
    """Return how many cells a text takes on a terminal: two for most East Asian letters, none for an accent."""
    return sum(_cell(letter) for letter in text)


def _cell(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in {"W", "F"} else 1


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Return a text of at least so many cells, with blanks after it or before it."""
    blanks = " " * (width - cells(text))
    return blanks + text if right else text + blanks


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, the head first; numbers are aligned to the right.

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
