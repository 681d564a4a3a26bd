"""What the bench found, as a text and as ``docs/performance.md``."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from figures import Row

DOCUMENT = Path(__file__).parent.parent / "docs/performance.md"
_BEGIN, _END = "<!-- {}: written by the bench -->\n", "<!-- end of {} -->\n"


@dataclass
class Found:
    """Everything that was measured.

    Attributes:
        machine: On what.
        extent: ``full`` or ``quick``.
        rows: The table.
        syncs: What one job waits for, in order.
        phases: Parts of one job: name, milliseconds, how often.
    """

    machine: dict[str, str]
    extent: str
    rows: list[Row] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)


def text(found: Found) -> str:
    """Return it for a terminal."""
    lines = [", ".join(f"{name} {value}" for name, value in found.machine.items())]
    for row in found.rows:
        lines += ["", row.metric + (f" ({row.note})" if row.note else "")]
        lines += [f"    {figure.name:<24}{figure}" for figure in row.figures]
        lines += [f"  {check.verdict:>11}: {check.what} {check.asked}: {check.figure}" for check in row.checks]
    if found.syncs:
        lines += ["", f"one job waits for the disk {len(found.syncs)} times:", *(f"    {path}" for path in found.syncs)]
    if found.phases:
        whole = sum(spent for _, spent, _ in found.phases)
        lines += ["", f"one job, {whole:.1f} ms:"]
        lines += [f"    {part:<44}{spent:6.2f} ms{calls:6.1f} times" for part, spent, calls in found.phases]
    return "\n".join(lines)


def write(found: Found, command: str) -> None:
    """Put what was measured into its place in the document; what was not measured stays as it is."""
    today = dt.datetime.now(tz=dt.UTC).date()
    on = "; ".join(f"{name}: {value}" for name, value in found.machine.items())
    head = f"`{command}`, {today}. {on}.\n\n"
    if found.rows:
        put("speed", head + _table(found.rows))
    if found.syncs:
        put("syncs", "".join(f"{number}. `{path}`\n" for number, path in enumerate(found.syncs, 1)))
    if found.phases:
        whole = sum(spent for _, spent, _ in found.phases)
        lines = ["| part | ms | of all | times entered |", "|---|--:|--:|--:|"]
        lines += [
            f"| {part} | {spent:.2f} | {spent / whole:.0%} | {calls:.1f} |" for part, spent, calls in found.phases
        ]
        put("profile", head + "\n".join([*lines, f"| all | {whole:.1f} | | |"]) + "\n")


def _table(rows: list[Row]) -> str:
    lines = ["| metric | median (lowest-highest) | held to | today | |", "|---|---|---|---|---|"]
    for row in rows:
        figures = "<br>".join(f"{figure.name}: {figure}" for figure in row.figures) + (
            f"<br>{row.note}" if row.note else ""
        )
        asked = "<br>".join(f"{check.what} {check.asked}" for check in row.checks)
        today = "<br>".join(str(check.figure) for check in row.checks)
        verdicts = "<br>".join(check.verdict if check.reached else f"**{check.verdict}**" for check in row.checks)
        lines.append(f"| {row.metric} | {figures} | {asked} | {today} | {verdicts} |")
    return "\n".join(lines) + "\n"


def put(section: str, content: str) -> None:
    """Replace a section of the document, between its marks.

    Args:
        section: Its name in the marks.
        content: Markdown.
    """
    begin, end = _BEGIN.format(section), _END.format(section)
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(before + begin + "\n" + content + "\n" + end + after, encoding="utf-8")
