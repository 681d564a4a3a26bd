"""``imagewatch check``: what the daemon would do with each file of the inbox, and why.

Reads only; nothing is claimed, sent or created, except for the test files of ``--shared``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

import click

from imagewatch.commands import afford
from imagewatch.commands.check_settings import Line, account, settings
from imagewatch.commands.check_shared import shared_lines
from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.ledger import open_budget
from imagewatch.commands.state import holds
from imagewatch.commands.terminal import padded
from imagewatch.daemon import status
from imagewatch.inbox.scan import InboxScan
from imagewatch.job.delivery import blocked
from imagewatch.journal.budget import folder_of
from imagewatch.protocol.request import Request, build
from imagewatch.system.errors import BadRequest, SpoolError
from imagewatch.system.exits import EXIT_CONFIG, EXIT_FAILED
from imagewatch.system.folders import Tops
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.inbox.candidate import Candidate
    from imagewatch.journal.budget import Budget
    from imagewatch.protocol.request import Opener

_COLORS = {
    "ok": "green",
    "take": "green",
    "bad": "red",
    "refuse": "red",
    "wait": "yellow",
    "warn": "yellow",
    "ignore": "yellow",
}


@click.command()
@click.option("--balance", is_flag=True, help="Also ask the endpoint for the account's balance (free of charge)")
@click.option(
    "--shared", is_flag=True, help="Test only the file system of a common inbox; run it on two hosts at the same time"
)
@json_option
@config_option
def check(path: str | None, *, balance: bool, shared: bool, as_json: bool) -> None:
    """List what the daemon would do with each file, and every problem.

    Checks the configuration, the folders, the key (never shown), holds, and every file in the inbox. Nothing is
    claimed, sent or created.

    With --shared, the command tests only whether the file system of the inbox is good enough for several daemons that
    process the inbox together. Run it on two hosts at the same time, as the user of the daemons. It creates test files
    in the inbox and removes them. It exits with code 1 if something is bad. --balance cannot be used with it.
    """
    if shared and balance:
        raise click.UsageError("--shared and --balance cannot be used together")
    if shared:
        _check_shared(load_config(path), as_json=as_json)
    found: dict[str, list[Line]] = {"settings": [], "files": []}
    for part, line in _checked(load_config(path), balance=balance):
        found[part].append(line)
        if not as_json:
            _row(line)
    if as_json:
        click.echo(to_json({part: [asdict(line) for line in lines] for part, lines in found.items()}, indent=1))
    elif not found["files"]:
        click.echo("There is no prompt in the inbox.")
    sys.exit(EXIT_CONFIG if any(line.verdict == "bad" for line in found["settings"]) else 0)


def _check_shared(config: Config, *, as_json: bool) -> NoReturn:
    lines = []
    for line in shared_lines(config):
        lines.append(line)
        if not as_json:
            _row(line)
    if as_json:
        click.echo(to_json({"settings": [asdict(line) for line in lines]}, indent=1))
    sys.exit(EXIT_FAILED if any(line.verdict == "bad" for line in lines) else 0)


def _checked(config: Config, *, balance: bool) -> Iterator[tuple[str, Line]]:
    """Yield the lines as they are found: the endpoint may be slow."""
    for line in settings(config, os.environ):
        yield "settings", line
    for line in account(config, os.environ) if balance else ():
        yield "settings", line
    for hold in holds(config):
        yield "settings", Line("wait", "queue", f"on hold ({status.kind(hold)}): {hold['reason']}; {hold['next']}")
    for job, source in stuck(config).items():
        why = f"{source} is stuck, and no prompt of its name is sent; the log has the reason and the next step"
        yield "settings", Line("warn", f"job {job}", why)
    for line in files(config):
        yield "files", line


def _row(line: Line) -> None:
    verdict = click.style(f"{line.verdict:<7}", fg=_COLORS[line.verdict])
    click.echo(f"{verdict} {padded(printable(line.what), 32)} {printable(line.why)}")


def stuck(config: Config) -> dict[str, str]:
    """Return the prompt of each job that is stuck, by job id, as the daemon last wrote."""
    page = status.read(config.folders.state) or {}
    return {job["job"]: printable(job["source"] or job["job"]) for job in page.get("stuck", ())}


def files(config: Config) -> Iterator[Line]:
    """Yield a line for every file in the inbox, and for its sub-folders.

    Raises:
        SpoolError: The inbox cannot be listed.
    """
    if not os.path.isdir(config.folders.inbox):
        return
    tops = Tops.of(config.folders.inbox, config.folders.outbox, config.folders.errors, config.folders.archive)
    hindered = functools.partial(blocked, config.folders, tops=tops)
    scan = InboxScan(config.folders.inbox, config.inbox, explain=True, blocked=hindered, tops=tops)
    result = scan.scan_all(time.monotonic(), time.time())
    names = {source: job for job, source in stuck(config).items()}
    with contextlib.ExitStack() as stack:
        budget = None
        with contextlib.suppress(SpoolError):  # the line about the caps reports it
            budget = stack.enter_context(open_budget(config))
        for candidate in result.ready:
            path = printable(candidate.source)
            if job := names.get(path) or names.get(f"*/{os.path.basename(path)}"):
                yield Line("wait", path, f"an earlier prompt of this name is stuck (job {job}); the log has the reason")
            else:
                yield _ready(candidate, config, scan.opener, budget)
    for path, reason in sorted(result.waiting.items()):
        yield Line("wait", printable(path), reason)
    named = scan.named()
    for path, reason in sorted(result.ignored.items()):
        if path in named:
            yield Line("wait", printable(path), "an image that a prompt names")
        else:
            yield Line("ignore", printable(path), reason)


def _ready(candidate: Candidate, config: Config, opener: Opener, budget: Budget | None) -> Line:
    where = os.path.join(config.folders.inbox, candidate.folder)
    path = printable(candidate.source)
    try:
        request = build(candidate, where, config, opener)
    except BadRequest as error:
        return Line("refuse", path, printable("; ".join(str(problem) for problem in error.problems)))
    verdict, why = afford.refusal(budget, request, folder_of(candidate.source)) if budget else ("", "")
    return Line(verdict or "take", path, why or _summary(request))


def _summary(request: Request) -> str:
    fields = ", ".join(f"{name} {value}" for name, value in request.fields.items() if name != "provider")
    images = f", with {', '.join(item.file for item in request.inputs)}" if request.inputs else ""
    turned = [f"{item.file} ({item.orientation})" for item in request.inputs if item.orientation != 1]
    if turned:
        images += f"; sent as stored, without applying the EXIF orientation: {', '.join(turned)}"
    return printable(f"{request.fields['provider']}{', ' + fields if fields else ''}{images}")
