"""``submit --table``: which rows of a table are dropped, what they may cost, and what is printed about all of them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands import row_record, table
from imagewatch.commands.drop import SubmitRequest, folder_of
from imagewatch.commands.expected_cost import Costs, span, total
from imagewatch.commands.results import CHARGED, plain
from imagewatch.commands.row_states import RowStates, State
from imagewatch.commands.table_rows import Row, Rows, source_of
from imagewatch.commands.terminal import print_table, say
from imagewatch.commands.wait import Result
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.system.errors import BadRequest, Problem, SpoolError, UsageError
from imagewatch.system.text import amount, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from imagewatch.commands.drop import Delivery
    from imagewatch.commands.row_record import Entry, RowRecord
    from imagewatch.config.schema import Config
    from imagewatch.journal.prices import Expected

MOST_WITHOUT_YES = 100
"""So many new prompts need no ``--yes`` if the burst limit is off or not known here."""
_GROUP = 50
"""So many rows are staged and recorded together: one sync of the folder and of the record for all of them."""
_SKIPPED = {
    "waiting": "waiting in the inbox",
    "completed": "completed before",
    "recorded": "dropped before, and without a result here: in flight, or its files were moved",
}


@dataclass
class Planned:
    """A row, and what is done with it.

    Attributes:
        row: The row.
        state: What has become of it before.
        cost: What it may cost, if it is new and that is known.
        job: Itself, once it is dropped.
    """

    row: Row
    state: State
    cost: Expected | None = None
    job: Result | None = None


class Batch:
    """The rows of one table.

    Args:
        config: Folders, presets, limits.
        options: The command line's options.
        read: Reads a file that the command line names.
        given: The options that are front matter.

    Raises:
        BadRequest: All problems of the table, the template and the rows.
    """

    def __init__(
        self, config: Config, options: Mapping[str, Any], given: Mapping[str, Any], read: Callable[[str, int], bytes]
    ) -> None:
        self._config = config
        self._blind = options["root"] is not None
        self.folder = folder_of(options["folder"], recursive=config.inbox.recursive)
        path, template = options["table"], options["template"]
        images = tuple(options["images"])
        name = "standard input" if path == "-" else printable(os.path.basename(path), 100)
        found = table.read(read(path, table.MAX_BYTES), name)
        request = None
        if template is not None:
            request = _template(read(template, MAX_BYTES), template, images)
        rows = Rows(
            found,
            request,
            options=given,
            images=images,
            base=os.path.dirname(os.path.abspath(path)),
            folder=self.folder,
            config=config,
            blind=self._blind,
        )
        self.rows = rows.read()
        self.planned: list[Planned] = []

    @property
    def stems(self) -> list[str]:
        """The base names of all rows."""
        return [row.stem for row in self.rows]

    @property
    def new(self) -> list[Planned]:
        """The rows that are not dropped yet, or were dropped by this run."""
        return [one for one in self.planned if one.state.known == "new"]

    @property
    def waiting(self) -> int:
        """How many rows were dropped before and wait in the inbox."""
        return sum(one.state.known == "waiting" for one in self.planned)

    def compare(self, dropped: dict[str, list[Entry]] | None = None) -> None:
        """Find out which rows are new, and what they may cost.

        Args:
            dropped: The rows that are recorded as dropped; None to read the record.
        """
        folders = self._config.folders
        if dropped is None:
            dropped = row_record.read(os.path.join(folders.inbox, self.folder))
        states = RowStates(folders, self.folder, dropped)
        self.planned = [Planned(row, states.of(row)) for row in self.rows]
        costs = Costs(self._config, self.folder, blind=self._blind).of(one.row.fields for one in self.new)
        for one, cost in zip(self.new, costs, strict=True):
            one.cost = cost

    def announce(self) -> None:
        """Print how many prompts are new, what they may cost, and which rows are skipped and why."""
        new = self.new
        images = sum(one.row.fields.get("n", 1) for one in new)
        rows, prompts = _count(len(self.planned), "row"), _count(len(new), "new prompt")
        say(f"{rows}: {prompts} for {_count(images, 'image')}." if new else f"{rows}: no new prompt.")
        if new:
            say(total(one.cost for one in new))
        for known, text in _SKIPPED.items():
            those = [one for one in self.planned if one.state.known == known and not one.state.is_changed]
            if those:
                say(f"Skipped {_count(len(those), 'row')} ({text}): {_lines(one.row.line for one in those)}")
        for one in self.planned:
            if one.state.known != "new" and (one.state.is_changed or one.state.known == "failed"):
                say(f"Skipped line {one.row.line}: {printable(one.row.stem)}: {_reason(one.state)}")

    def require_few(self, *, yes: bool) -> None:
        """Refuse very many new prompts unless the caller has agreed.

        Raises:
            UsageError: They are too many.
        """
        burst, count = self._config.limits.burst, len(self.new)
        most = MOST_WITHOUT_YES if self._blind or not burst else burst
        if count <= most:
            return
        limit = f"limits.burst ({most})" if most == burst and not self._blind else str(most)
        if not yes:
            hint = "nothing was dropped; to drop all of them, add --yes"
            raise UsageError(f"{count} new prompts are more than {limit}", hint=hint)
        if burst and not self._blind:
            say(f"{count} new prompts are more than {limit}. The daemon puts the queue on hold for that.")
            say("  to continue, run: imagewatch release")

    def place(self, delivery: Delivery, record: RowRecord) -> Generator[Result, None, None]:
        """Drop the new rows; yield each one that is in the inbox.

        Each group is staged, then recorded, then renamed. Whatever ends this, the record names no row that was not
        dropped, unless its hidden file is still there.

        Raises:
            BadRequest: A name has been used meanwhile.
            SpoolError: The inbox cannot be written.
        """
        new = self.new
        for start in range(0, len(new), _GROUP):
            group = new[start : start + _GROUP]
            for one in group:
                delivery.stage(one.row.request, one.row.stem)
            delivery.sync()
            staged = delivery.staged
            try:
                record.add([one.row for one in group], staged)
                with contextlib.closing(delivery.place()) as placed:
                    for one, job in zip(group, placed, strict=True):
                        one.job = job
                        yield job
            finally:
                _withdraw(delivery, record, [one.prompt for one in staged])

    def print_plan(self, form: str, queue: dict[str, Any] | None) -> None:
        """Print all rows without dropping one: a table, or JSON; ``queue`` as of ``print_results``."""
        if form == "json":
            self.print_json(queue)
            return
        cells = [
            [str(one.row.line), printable(one.row.stem, 60), _word(one.state), _price(one)] for one in self.planned
        ]
        print_table(("line", "prompt", "state", "credits"), cells)

    def print_json(self, queue: dict[str, Any] | None) -> None:
        """Print one JSON object for each row; ``queue`` as of ``print_results``."""
        click.echo(to_json([self._plain(one, queue) for one in self.planned], indent=1, default=str))

    def _plain(self, one: Planned, queue: dict[str, Any] | None) -> dict[str, Any]:
        job, known = one.job, one.state.known
        if job is None:
            job = Result(source_of(self.folder, one.row.stem), one.row.text)
            job.destination = {"failed": "errors", "completed": "outbox"}.get(known, "")
            if (result := one.state.result) is not None:
                job.result_file, job.facts = result.path, result.facts
        cost = one.cost
        expected = {"low": cost.low, "usual": cost.usual, "high": cost.high} if cost else None
        return {
            "line": one.row.line,
            "state": known if one.job is None else "dropped",
            "is_changed": one.state.is_changed,
            "expected_credits": expected,
            **plain(job, queue),
        }


def _template(raw: bytes, path: str, images: tuple[str, ...]) -> SubmitRequest:
    try:
        return SubmitRequest.of_file(raw, path, {}, images)
    except BadRequest as error:
        found = [Problem(f"template: {one.field}", one.reason, one.hint) for one in error.problems]
        raise BadRequest(found) from None


def _withdraw(delivery: Delivery, record: RowRecord, prompts: Sequence[str]) -> None:
    """Record which rows of a group were not dropped, before their hidden files are removed."""
    left = {one.prompt for one in delivery.staged}
    if not left:
        return
    delivery.remove_images()
    try:
        record.withdraw(name for name in prompts if name in left)
    except SpoolError:
        delivery.keep_staged()  # a hidden file shows that its row was not dropped


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _lines(numbers: Iterable[int]) -> str:
    """Return line numbers with ranges: ``lines 2-5, 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
    return f"line {text}" if len(parts) == 1 and parts[0][0] == parts[0][1] else f"lines {text}"


def _reason(state: State) -> str:
    text = _SKIPPED.get(state.known, "failed before")
    if state.known == "failed" and state.result:
        facts = state.result.facts
        charged = CHARGED.get(str(facts.get("charged")), "charge unknown")
        text = f"failed before, {charged}: {printable(str(facts.get('message', '')), 200)}"
    if state.is_changed:
        return f"{text}; it asked for something else than this row: to request this one, change its name"
    if state.result:
        return f"{text}; what to do: {printable(state.result.path)}"
    return text


def _word(state: State) -> str:
    if state.known == "new":
        return "new"
    return f"skipped: {state.known}" + (", changed" if state.is_changed else "")


def _price(one: Planned) -> str:
    if one.state.known != "new":
        return ""
    if one.cost is None or one.cost.low is None or one.cost.usual is None:
        return "unknown"
    return f"{span(one.cost.low, one.cost.high)}, usually {amount(one.cost.usual)}"
