"""What ``submit`` prints about dropped prompts: images on standard output, costs and failures on standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from imagewatch.commands.terminal import say
from imagewatch.system.text import amount, printable, problem_lines, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.commands.wait import Result
    from imagewatch.config.schema import Config

CHARGED = {"no": "not charged", "yes": "charged", "unknown": "may have been charged"}


def print_results(jobs: Sequence[Result], form: str, queue: dict[str, Any] | None = None) -> None:
    """Print results.

    Args:
        jobs: The prompts.
        form: ``paths``, ``markdown`` or ``json``.
        queue: Why prompts are not processed soon, for those that are not finished; None if they are.
    """
    if form == "json":
        # Others may have written the result file, with dates where text is expected.
        click.echo(to_json([plain(job, queue) for job in jobs], indent=1, default=str))
        return
    for job in jobs:
        for image in job.images:
            click.echo(_markdown(job, image) if form == "markdown" else printable(image))


def plain(job: Result, queue: dict[str, Any] | None) -> dict[str, Any]:
    """Return a dropped prompt and its result as JSON has them; ``queue`` as of ``print_results``."""
    facts = ("provider", "model", "problems", "message", "next", "job")
    return {
        "source": job.source,
        "prompt": job.prompt,
        "destination": job.destination or None,
        "result_file": job.result_file or None,
        "images": job.images,
        "queue": None if job.destination else queue,
        "charged": job.facts.get("charged"),
        "credits_charged": _credits(job),
        **{name: job.facts.get(name) for name in facts},
    }


def _markdown(job: Result, image: str) -> str:
    """Return a Markdown image line with a relative path, as chat windows and agents show it."""
    text = printable(" ".join(job.prompt.split()), 200)
    alt = "".join(f"\\{letter}" if letter in "\\[]*_`<>!&" else letter for letter in text)
    return f"![{alt}]({quote(os.fsencode(os.path.relpath(image)))})"


def report(jobs: Sequence[Result], left: Sequence[Result], config: Config, *, is_running: bool = True) -> None:
    """Print costs, problems, and the prompts that are not finished, on standard error.

    Args:
        jobs: The prompts.
        left: Those that are not finished.
        config: Where the inbox is.
        is_running: Whether a daemon runs, as far as is known.
    """
    for job in jobs:
        source, charged = printable(job.source), CHARGED.get(str(job.facts.get("charged")), "")
        if job.destination == "errors":
            lines = problem_lines(str(job.facts.get("message", "")), _problems(job))
            lines[0] = f"{source}: {charged}: {lines[0]}"
            for line in (*lines, f"  {printable(str(job.facts.get('next', '')))}", f"  {printable(job.result_file)}"):
                click.echo(line, err=True)
        elif problems := _problems(job):
            click.echo(f"{source}: {printable('; '.join(map(str, problems)))}", err=True)
    click.echo(_sum(jobs), err=True)
    if left:
        those, verb, it = ("prompt", "is", "it") if len(left) == 1 else ("prompts", "are", "them")
        where = printable(config.folders.inbox)
        then = f"The daemon will process {it}"
        if not is_running:
            then = f"{'It is' if it == 'it' else 'They are'} processed when the daemon runs again"
        unfinished = f"{len(left)} {those} {verb} not finished. {then}"
        click.echo(f"{unfinished}; to cancel, remove {it} from {where}.", err=True)
        name_dropped(left, config)


def _problems(job: Result) -> list[object]:
    problems = job.facts.get("problems")
    return problems if isinstance(problems, list) else []  # others may write to the folder


def _sum(jobs: Sequence[Result]) -> str:
    """Return the number of images and their cost; an unknown cost is not zero."""
    images = sum(len(job.images) for job in jobs)
    known = [_credits(job) for job in jobs if job.destination]
    charged = [job.facts.get("charged") for job in jobs]
    unknown_cost = sum(one == "yes" and _credits(job) is None for one, job in zip(charged, jobs, strict=True))
    parts = [
        f"{images} {'image' if images == 1 else 'images'}",
        f"{amount(sum(one for one in known if one is not None))} credits",
    ]
    if unknown_cost:
        parts.append(f"{unknown_cost} charged, amount not reported")
    if unknown := charged.count("unknown"):
        parts.append(f"{unknown} may have been charged")
    return ", ".join(parts) + "."


def _credits(job: Result) -> float | None:
    """Return what was charged, or None; a value that cannot be a charge (nan, 400 digits) counts as none."""
    value = job.facts.get("credits_charged")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return value
    return None


def name_dropped(jobs: Sequence[Result], config: Config) -> None:
    """Name prompts that are dropped: the same command would drop them again."""
    these = "this prompt" if len(jobs) == 1 else "these prompts"
    say(f"Do not run the command again: it would drop {these} again, and you would pay twice:")
    for job in jobs:
        say(f"  {printable(os.path.join(config.folders.inbox, job.source))}")
