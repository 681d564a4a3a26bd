"""The results, as text and in ``docs/contributing/performance.md``."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from figures import Row

PAGE = Path(__file__).parent.parent / "docs/contributing/performance.md"
_BEGIN, _END = "<!-- {}: written by the bench -->\n", "<!-- end of {} -->\n"


def text(rows: list[Row]) -> str:
    """Return rows for a terminal."""
    lines = []
    for row in rows:
        lines += ["", row.metric, *(f"    {line}" for line in row.note.splitlines())]
        lines += [f"    {figure.name:<44}{figure}" for figure in row.figures]
        lines += [f"  {check.verdict:>11}: {check.what} {check.asked}: {check.figure}" for check in row.checks]
    return "\n".join(lines)


def put(name: str, machine: dict[str, str], rows: list[Row]) -> None:
    """Replace a section of the page, between its marks; the others do not change.

    Args:
        name: The measurement, which is the section's name in the marks.
        machine: The machine of the measurement.
        rows: The results.
    """
    begin, end = _BEGIN.format(name), _END.format(name)
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE} has no section for {name}: it needs the lines {begin!r} and {end!r}")
    on = "; ".join(f"{what}: {value}" for what, value in machine.items())
    head = f"`python bench --only {name}`, {dt.datetime.now(tz=dt.UTC).date()}. {on}."
    PAGE.write_text(f"{before}{begin}\n{head}\n\n{_table(rows)}\n{end}{after}", encoding="utf-8")


def _table(rows: list[Row]) -> str:
    lines = ["| metric | median (lowest-highest) | bound | value | |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [f"{figure.name}: {figure}" for figure in row.figures] + row.note.splitlines()
        verdicts = [check.verdict if check.reached else f"**{check.verdict}**" for check in row.checks]
        asked = [f"{check.what} {check.asked}" for check in row.checks]
        cells = [figures, asked, [str(check.figure) for check in row.checks], verdicts]
        lines.append(f"| {row.metric} | " + " | ".join("<br>".join(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
