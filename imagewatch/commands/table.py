"""A table of prompts: a CSV file as spreadsheets write it, as columns and rows. Pure.

Excel and others write a byte order mark, semicolons or tabs instead of commas, CRLF, line breaks in quoted cells, a
first line ``sep=;``, and empty rows at the end. Which separator a file has is decided by its header.
"""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.system.errors import BadRequest, Problem
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_BYTES = 32 << 20
_SEPARATORS = (",", ";", "\t")
_HINT_TEXT = 'save it as "CSV UTF-8"'
_HINT_QUOTES = "a cell with a separator, a quotation mark or a line break needs double quotes around it"


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        line: The line of the file in which it begins.
        cells: Its cells by column, without white space at both ends; an empty cell is missing.
    """

    line: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: The file's name, for messages.
        columns: The names of the columns, in their order.
        rows: The rows that are not empty.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]

    def where(self, line: int) -> str:
        """Return how a line is called in messages."""
        return f"{self.name} line {line}"


def read(raw: bytes, name: str) -> Table:
    """Read a table.

    Args:
        raw: The whole file.
        name: What to call it in messages.

    Raises:
        BadRequest: It is no table; all problems, with their lines.
    """
    text = _text(raw, name)
    records = list(_records(text, name))
    if not records:
        raise BadRequest([Problem(name, "the table is empty", "its first line must name the columns")])
    (line, head), *body = records
    columns = [cell.strip() for cell in head]
    problems = _header_problems(columns, body, f"{name} line {line}")
    rows = []
    for at, cells in body:
        if len(cells) < len(columns) or any(cell.strip() for cell in cells[len(columns) :]):
            reason = f"it has {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, and the header has {len(columns)}"
            problems.append(Problem(f"{name} line {at}", reason, _HINT_QUOTES))
        filled = {column: cell.strip() for column, cell in zip(columns, cells, strict=False) if cell.strip()}
        rows.append(TableRow(at, filled))
    if not rows:
        problems.append(Problem(name, "the table has no rows", "each row below the header is one prompt"))
    if problems:
        raise BadRequest(problems)
    return Table(name, tuple(column for column in columns if column), tuple(rows))


def _text(raw: bytes, name: str) -> str:
    if len(raw) > MAX_BYTES:
        raise BadRequest([Problem(name, f"the file is larger than {MAX_BYTES >> 20} MiB", "divide the table")])
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise BadRequest([Problem(name, "it is not whole UTF-16 text", _HINT_TEXT)]) from None
        line, byte = _line_of(raw, error.start), raw[error.start]
        reason = f"byte 0x{byte:02X} is not UTF-8 text"
        if like := bytes([byte]).decode("cp1252", "ignore"):
            reason += f'; the file may be in the Windows code page 1252, in which it is "{printable(like)}"'
        raise BadRequest([Problem(f"{name} line {line}", reason, _HINT_TEXT)]) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise BadRequest([Problem(f"{name} line {line}", "it has a NUL byte, so it is not a table", _HINT_TEXT)])
    return text


def _line_of(raw: bytes, offset: int) -> int:
    before = raw[:offset].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return before.count(b"\n") + 1


def _records(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each record that is not empty."""
    lines = io.StringIO(text, newline="")
    skipped, separator = 0, ""
    first = lines.readline().strip()
    if first.lower().startswith("sep=") and len(first) == len("sep=") + 1:
        skipped, separator = 1, first[-1]
    elif first.lower() == "sep=":
        skipped, separator = 1, "\t"  # a tab at the end of the line was removed above
    else:
        lines.seek(0)
    start = lines.tell()
    reader = csv.reader(lines, delimiter=separator or _separator(lines), strict=True)
    lines.seek(start)
    line = 1
    while True:
        line = reader.line_num + skipped + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadRequest([Problem(f"{name} line {line}", f"not CSV: {error}", _HINT_QUOTES)]) from None
        if any(cell.strip() for cell in cells):
            yield line, cells


def _separator(lines: io.StringIO) -> str:
    """Return the separator that divides the header into the most cells; the comma if none does."""
    start, found = lines.tell(), {}
    for separator in _SEPARATORS:
        lines.seek(start)
        try:
            found[separator] = max((len(cells) for cells in _first(lines, separator)), default=0)
        except csv.Error:
            found[separator] = 0
    return max(_SEPARATORS, key=lambda one: found[one])


def _first(lines: io.StringIO, separator: str) -> Iterator[list[str]]:
    """Yield the first record that is not empty."""
    for cells in csv.reader(lines, delimiter=separator):
        if any(cell.strip() for cell in cells):
            yield cells
            return


def _header_problems(columns: list[str], body: list[tuple[int, list[str]]], where: str) -> list[Problem]:
    problems = []
    for number, column in enumerate(columns, 1):
        shown = printable(column, 60)
        if column and columns.index(column) < number - 1:
            reason = f'two columns have the name "{shown}"'
            problems.append(Problem(where, reason, "rename or remove one of them"))
        if not column and any(len(cells) >= number and cells[number - 1].strip() for _, cells in body):
            problems.append(Problem(where, f"column {number} has no name", "name it, or remove the column"))
    return problems
