"""``imagewatch hosts``: the daemons that share an account, and the removal of one that does not come back."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, load_config
from imagewatch.commands.status_all import account_page
from imagewatch.commands.terminal import print_table, shown
from imagewatch.journal.forgetting import forget as forget_now
from imagewatch.journal.forgetting import left_of
from imagewatch.journal.opening import open_journal
from imagewatch.system.errors import UsageError
from imagewatch.system.exits import EXIT_FAILED
from imagewatch.system.text import amount, counted, printable

if TYPE_CHECKING:
    from imagewatch.config.schema import Config
    from imagewatch.journal.forgetting import Left

_MOST_NAMES = 20


@click.group(invoke_without_command=True)
@config_option
@click.pass_context
def hosts(context: click.Context, path: str | None) -> None:
    """List the daemons that share an account, or remove one.

    "imagewatch status --all" shows more of each.
    """
    if context.invoked_subcommand is not None:
        return
    page = account_page(load_config(path))
    names = ("instance", "state", "seen", "host", "inbox", "version")
    print_table(names, [[shown(one[name]) for name in names] for one in page["instances"]])


@hosts.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Remove it; without this option, the command only shows what would happen")
@config_option
def forget(name: str, path: str | None, *, yes: bool) -> None:
    """Remove a daemon that does not come back.

    NAME is its instance in "imagewatch hosts". With --yes, each of its requests without a result counts as an unknown
    charge and is not sent again. Prompts that it has claimed are in its own folders; in a common inbox, other daemons
    take them over, and responses that only it has become unknown charges. If it comes back after all, it continues its
    jobs, and publishes the responses that it has.

    Without --yes, nothing is changed, and the exit code is 1.
    """
    config = load_config(path)
    _require_shared(config)
    alive = config.shared.lease_seconds
    with contextlib.closing(open_journal(config, time.time)) as journal:
        left = forget_now(journal.file, name, alive) if yes else left_of(journal.file, name, alive)
    _show(left, name, is_done=yes, is_common=bool(config.shared.inbox))
    if not yes:
        click.echo("Nothing was changed. To do it, run the command again with --yes.")
        click.get_current_context().exit(EXIT_FAILED)


def _require_shared(config: Config) -> None:
    if not config.shared.database:
        hint = "the command is for daemons that share an account in a database"
        raise UsageError("[shared] database is not set", hint=hint)


def _show(left: Left, name: str, *, is_done: bool, is_common: bool) -> None:
    verb = "count" if is_done else "would count"
    click.echo(f"{printable(name)}: {counted(len(left.sent), 'request')} without a result {verb} as unknown charges.")
    for job, source, reserved in left.sent[:_MOST_NAMES]:
        click.echo(f"  {printable(source)} (job {job}, at most {amount(reserved)} credits)")
    if len(left.sent) > _MOST_NAMES:
        click.echo(f"  and {len(left.sent) - _MOST_NAMES} more")
    if left.alone:
        ends = "end" if is_done else "would end"
        click.echo(
            f"Only in its state folder: {counted(len(left.alone), 'response')}. These prompts {ends} in the "
            "errors folder, as unknown charges unless the ledger has the charge. If it comes back, it publishes them."
        )
        for job, source in left.alone[:_MOST_NAMES]:
            click.echo(f"  {printable(source)} (job {job})")
    if left.waiting:
        where = "the other daemons of the inbox take them over" if is_common else "they stay in its own folders"
        click.echo(f"Claimed and not sent: {counted(left.waiting, 'prompt')}; {where}.")
