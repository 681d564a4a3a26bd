"""The progress bar of ``once`` and ``demo``, and the summary after it."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from imagewatch.system.text import amount, printable, problem_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.job.outcome import Outcome


class Progress:
    """Counts jobs, and shows them as a bar whose length grows when more prompts are found."""

    def __init__(self, bar: click._termui_impl.ProgressBar[int] | None) -> None:
        self._bar = bar
        self._done = 0
        self._credits = 0.0
        self._failed: list[Outcome] = []

    def found(self, waiting: int) -> None:
        """Make the bar long enough for the prompts that wait."""
        if self._bar is not None:
            self._bar.length = max(self._done + waiting, 1)
            self._bar.update(0)

    def finished(self, outcome: Outcome) -> None:
        """Count a job that has ended."""
        self._done += 1
        self._credits += outcome.credits or 0.0
        if outcome.destination == "errors":
            self._failed.append(outcome)
        if self._bar is not None:
            self._bar.length = max(self._bar.length or 1, self._done)
            self._bar.label = printable(outcome.source, 40)
            self._bar.update(1)

    def summary(self, *, held: bool) -> Iterator[str]:
        """Yield the summary for people: how many jobs were completed, what they cost, and each failure."""
        completed = self._done - len(self._failed)
        if self._done:
            yield f"{completed} completed for {amount(self._credits)} credits, {len(self._failed)} failed."
        elif not held:
            yield "No prompt in the inbox was ready. To see why, run: imagewatch check"
        for outcome in self._failed:
            first, *others = problem_lines(outcome.message, outcome.problems)
            yield f"  {printable(outcome.source, 100)}: {first}"
            yield from (f"  {line}" for line in others)
            yield f"    {printable(outcome.result_file)}"


@contextlib.contextmanager
def progress(*, shown: bool) -> Iterator[Progress]:
    """Show a bar on standard error during the block, or only count."""
    if not shown:
        yield Progress(None)
        return
    with click.progressbar(length=1, label="scanning", file=sys.stderr, show_pos=True) as bar:
        yield Progress(bar)
