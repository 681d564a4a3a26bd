"""``imagewatch db``: creates and checks the tables of the shared database, and restores lost rows."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.state import is_running, load_as_owner
from imagewatch.job.lost_jobs import LostJobs
from imagewatch.job.spool import Spool
from imagewatch.journal.counted import Counted
from imagewatch.journal.lost_rows import LostRows
from imagewatch.journal.opening import open_journal, place_of, require_own_store
from imagewatch.system.disk import Disk
from imagewatch.system.errors import AlreadyRunning, ConfigError, Problem
from imagewatch.system.exits import EXIT_CONFIG, EXIT_FAILED
from imagewatch.system.text import counted, printable, to_json

if TYPE_CHECKING:
    from imagewatch.config.schema import Config
    from imagewatch.journal.postgres.place import Place


@click.group()
def db() -> None:
    """Create, check and restore the tables of a shared database.

    Several daemons with one paid account can share caps, holds and history in PostgreSQL. [shared] in the configuration
    names the database.
    """


@db.command()
@config_option
def init(path: str | None) -> None:
    """Create the tables. If they exist, nothing is changed."""
    place = _place(load_config(path))
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415  an extra

    is_new = initialize(place)
    click.echo("The tables were created." if is_new else "The tables exist; nothing was changed.")


@db.command()
@config_option
def upgrade(path: str | None) -> None:
    """Update the tables to this version.

    Stop all daemons of the database first.
    """
    place = _place(load_config(path))
    from imagewatch.journal.postgres.tables import upgrade as update  # noqa: PLC0415  an extra

    before, now = update(place)
    click.echo(f"The tables are those of version {now}" + ("." if before == now else f"; before: version {before}."))


@db.command()
@json_option
@config_option
def check(path: str | None, *, as_json: bool) -> None:
    """Check the server and its tables.

    The server has to keep what it commits, and the tables have to be those of this version.
    """
    place = _place(load_config(path))
    from imagewatch.journal.postgres.tables import check as find  # noqa: PLC0415  an extra

    problems = find(place)
    if as_json:
        click.echo(to_json({"problems": [{"message": why, "next": hint} for why, hint in problems]}))
    elif problems:
        for why, hint in problems:
            click.echo(printable(f"bad: the shared database {why} ({hint})"))
    else:
        click.echo(f"ok: the account {printable(place.account)}; this daemon is {printable(place.instance)}")
    sys.exit(EXIT_CONFIG if problems else 0)


@db.command()
@click.option(
    "--yes", is_flag=True, help="Restore the rows; without this option, the command only shows what it would do"
)
@config_option
def recover(path: str | None, *, yes: bool) -> None:
    """Restore rows that the database has lost.

    Use it if the database was restored from a backup, or if a standby took over without the newest commits. Stop all
    daemons of the account first, then run the command on each host, with --yes. It reads the receipts and error files,
    the folder of claimed files, and the responses in the state folder of its host. If these show that a request was
    sent, it counts again and is not sent again. In a common inbox, prompts that were claimed and not sent go back into
    the inbox. Afterwards the daemon of this configuration accepts the database. It is safe to run the command again.

    It exits with code 1 without --yes, and if something could not be restored.
    """
    config = load_as_owner(path)
    _place(config)
    with contextlib.closing(open_journal(config, time.time)) as journal:
        rows = LostRows(journal.file)
        _require_stopped(config, rows)
        spool = Spool(config, Disk(), journal)
        spool.lock(is_alone=True)
        try:
            spool.prepare()
            is_left = _recover(LostJobs(spool), is_done=yes)
        finally:
            spool.unlock()
        if yes:
            Counted(config.folders.state).write(rows.recorded())
    if not yes:
        click.echo("Nothing was changed. To do it, run the command again with --yes.")
    sys.exit(EXIT_FAILED if is_left or not yes else 0)


def _require_stopped(config: Config, rows: LostRows) -> None:
    """Make sure that no daemon of the inbox runs: it may still send what would be put back into the inbox.

    Raises:
        AlreadyRunning: One does.
        SpoolError: The state folder belongs to another journal, or the database cannot be used.
    """
    require_own_store(config)
    if is_running(config):
        raise AlreadyRunning("the daemon of this configuration is running", hint="stop it, then run the command again")
    if found := rows.running(config.shared.lease_seconds):
        name, host, seconds = found
        message = f"the daemon {printable(name)} on {printable(host)} was seen {seconds:.0f} seconds ago"
        hint = f"stop it; after a kill, wait until it was not seen for {config.shared.lease_seconds:.0f} seconds"
        raise AlreadyRunning(message, hint=hint)


def _recover(jobs: LostJobs, *, is_done: bool) -> bool:
    """Show what was found, and do it; return whether something of it could not be done."""
    count, left = 0, 0
    for found in jobs.find():
        count += 1
        click.echo(f"{printable(found.source or '(unknown)')} (job {found.job}): {printable(found.what)}")
        if is_done and (why := jobs.carry_out(found)):
            left += 1
            click.echo(f"  not done: {printable(why)}")
    click.echo(
        f"The database lacks {counted(count, 'job')}, or parts of them." if count else "The database lacks no job."
    )
    return bool(left)


def _place(config: Config) -> Place:
    if not config.shared.database:
        hint = 'name the database there, for example database = "service=imagewatch"'
        raise ConfigError([Problem("shared.database", "is not set", hint)], source=config.source)
    return place_of(config, os.environ)
