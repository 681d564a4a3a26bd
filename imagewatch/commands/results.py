"""What ``submit`` prints of prompts that were dropped: results on standard output, costs and failures on the other."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from imagewatch.commands.terminal import say
from imagewatch.system.text import amount, complaint, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.commands.wait import Made
    from imagewatch.config.load import Config

_CHARGED = {"no": "not charged", "yes": "charged", "unknown": "may have been charged"}


def print_results(jobs: Sequence[Made], form: str) -> None:
    """Print what became of prompts, as ``paths``, ``markdown`` or ``json``."""
    if form == "json":
        # A document may have been written by anybody, with dates where text belongs.
        click.echo(to_json([_plain(job) for job in jobs], indent=1, default=str))
        return
    for job in jobs:
        for image in job.images:
            click.echo(_markdown(job, image) if form == "markdown" else printable(image))


def _plain(job: Made) -> dict[str, Any]:
    told = ("provider", "model", "problems", "message", "next", "job")
    return {
        "source": job.source,
        "prompt": job.prompt,
        "door": job.door or None,
        "document": job.document or None,
        "images": job.images,
        "charged": job.facts.get("charged"),
        "credits_charged": _credits(job),
        **{name: job.facts.get(name) for name in told},
    }


def _markdown(job: Made, image: str) -> str:
    """Return an image line with a relative path, as chat windows and agents show it."""
    said = printable(" ".join(job.prompt.split()), 200)
    alt = "".join(f"\\{letter}" if letter in "\\[]*_`<>!&" else letter for letter in said)
    return f"![{alt}]({quote(os.fsencode(os.path.relpath(image)))})"


def report(jobs: Sequence[Made], left: Sequence[Made], config: Config) -> None:
    """Say on the other channel what it cost, and what went wrong."""
    for job in jobs:
        source, charged = printable(job.source), _CHARGED.get(str(job.facts.get("charged")), "")
        if job.door == "errors":
            lines = complaint(str(job.facts.get("message", "")), _problems(job))
            lines[0] = f"{source}: {charged}: {lines[0]}"
            for line in (*lines, f"  {printable(str(job.facts.get('next', '')))}", f"  {printable(job.document)}"):
                click.echo(line, err=True)
        elif problems := _problems(job):
            click.echo(f"{source}: {printable('; '.join(map(str, problems)))}", err=True)
    click.echo(_sum(jobs), err=True)
    if left:
        those, verb, it = ("prompt", "is", "it") if len(left) == 1 else ("prompts", "are", "them")
        where = printable(config.folders.inbox)
        click.echo(f"{len(left)} {those} {verb} not finished. The daemon will process {it}.", err=True)
        click.echo(f"To cancel, remove {it} from {where}.", err=True)
        name_dropped(left, config)


def _problems(job: Made) -> list[object]:
    problems = job.facts.get("problems")
    return problems if isinstance(problems, list) else []  # the folder is shared


def _sum(jobs: Sequence[Made]) -> str:
    """Return what was made and spent; a cost that nobody knows is not zero."""
    pictures = sum(len(job.images) for job in jobs)
    known = [_credits(job) for job in jobs if job.door]
    charged = [job.facts.get("charged") for job in jobs]
    unknown_cost = sum(one == "yes" and _credits(job) is None for one, job in zip(charged, jobs, strict=True))
    told = [
        f"{pictures} {'picture' if pictures == 1 else 'pictures'}",
        f"{amount(sum(one for one in known if one is not None))} credits",
    ]
    if unknown_cost:
        told.append(f"{unknown_cost} charged, amount not reported")
    if unknown := charged.count("unknown"):
        told.append(f"{unknown} may have been charged")
    return ", ".join(told) + "."


def _credits(job: Made) -> float | None:
    """Return what was charged: nothing that cannot be, such as nan, or a number of 400 digits."""
    value = job.facts.get("credits_charged")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return value
    return None


def name_dropped(jobs: Sequence[Made], config: Config) -> None:
    """Name prompts that are dropped: the same command would drop them again."""
    it = "it" if len(jobs) == 1 else "them"
    say(f"The same command would drop {it} again, and the daemon would pay for {it} again:")
    for job in jobs:
        say(f"  {printable(os.path.join(config.folders.inbox, job.source))}")
