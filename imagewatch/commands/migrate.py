"""``imagewatch migrate``: moves the journal of a stopped daemon into a shared database, or out of it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option
from imagewatch.commands.foreground import naming_source
from imagewatch.commands.state import load_as_owner
from imagewatch.job.spool import Spool
from imagewatch.journal import moving
from imagewatch.journal.opening import open_journal
from imagewatch.system.disk import Disk
from imagewatch.system.errors import ConfigError, Problem, SpoolError, UsageError
from imagewatch.system.text import amount, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.postgres.copying import Copied


@click.command()
@click.option(
    "--to", "target", type=click.Choice([moving.POSTGRESQL, moving.SQLITE]), required=True, help="Where to move it"
)
@json_option
@config_option
def migrate(path: str | None, target: str, *, as_json: bool) -> None:
    """Move the journal into a shared database, or out of it.

    Stop the daemon before, and configure [shared] in both cases. Nothing is lost or sent twice: the daemon finishes its
    jobs afterwards. If the command is killed, or cannot find out whether the database has committed, nothing is sent
    until you run it again. After any other error of --to postgresql, the old ledger is used as before.

    With --to postgresql the old ledger is kept as ledger.sqlite3.moved-N. With --to sqlite the daemon leaves the
    account: it takes along its jobs, the account's finished requests and its holds. Requests that the
    other daemons send later do not count for it. Remove [shared] from the configuration before you start it again.
    """
    config = load_as_owner(path)
    if not config.shared.database:
        hint = 'name the database there, for example database = "service=imagewatch"'
        raise ConfigError([Problem("shared.database", "is not set", hint)], source=config.source)
    if config.shared.inbox:
        hint = "finish all jobs, then remove shared.inbox and run this again"
        raise UsageError("shared.inbox is set: other daemons have jobs of this inbox", hint=hint)
    kept = ""
    with naming_source(config), _locked(config):
        if target == moving.POSTGRESQL:
            copied, kept = moving.to_postgresql(config, Disk(), os.environ)
        else:
            copied = moving.to_sqlite(config, Disk(), os.environ)
    if as_json:
        click.echo(to_json(_result(target, copied, kept)))
        return
    _report(target, copied, kept)


@contextlib.contextmanager
def _locked(config: Config) -> Iterator[None]:
    """Keep the daemon from being started during the block.

    Raises:
        AlreadyRunning: It is running.
    """
    with contextlib.closing(open_journal(config, time.time)) as journal:
        spool = Spool(config, Disk(), journal)
        spool.lock()
        try:
            yield
        finally:
            with contextlib.suppress(SpoolError):
                spool.unlock()


def _result(target: str, copied: Copied | None, kept: str) -> dict[str, object]:
    found: dict[str, object] = {"to": target, "is_finished_only": copied is None, "old_ledger": kept or None}
    if copied is not None:
        found |= {"rows": copied.rows, "known_attempts": copied.known, "replaced_values": copied.replaced}
        found["credits"] = copied.credits
    return found


def _report(target: str, copied: Copied | None, kept: str) -> None:
    where = "into the shared database" if target == moving.POSTGRESQL else "out of the shared database"
    if copied is None:
        click.echo(f"The journal had been moved {where}; now that is finished.")
    else:
        counts = ", ".join(f"{name} {count}" for name, count in copied.rows.items() if count) or "nothing"
        click.echo(f"The journal was moved {where}: {counts}; {amount(copied.credits)} credits.")
        if copied.known:
            click.echo(f"Attempts that were there already: {copied.known}.")
        if copied.replaced:
            click.echo(
                f"Values that were replaced, because the database cannot hold them as they are: {copied.replaced}."
            )
    if kept:
        click.echo(f"The old ledger is kept, and not used any more: {printable(kept)}")
    if target == moving.SQLITE:
        click.echo("Next: remove [shared] from the configuration, then start the daemon.")
    else:
        click.echo("Next: start the daemon.")
