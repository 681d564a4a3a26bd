"""``imagewatch hold`` and ``imagewatch release``: requests that are left in the control folder of a daemon."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option
from imagewatch.commands.state import control_of, hold_kinds, is_noticed, is_running, load_as_owner
from imagewatch.journal.health import ledger_problem
from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from imagewatch.config.schema import Config
    from imagewatch.journal.control import Control


@click.command()
@click.argument("reason", default="")
@json_option
@config_option
def hold(reason: str, path: str | None, *, as_json: bool) -> None:
    """Send nothing more until "imagewatch release".

    What has been sent is finished; prompts stay in the inbox. A restart changes nothing. REASON is shown to whoever
    asks.
    """
    config = load_as_owner(path)
    control_of(config).hold(reason)
    running = is_running(config)
    noticed = running and is_noticed(lambda: "manual" in hold_kinds(config))
    if as_json:
        _print_asked("hold", running=running, noticed=noticed)
        return
    if not running:
        click.echo("Held. The daemon is not running; when it starts it sends nothing.")
    elif noticed:
        click.echo("Held. What has been sent is finished; the rest waits in the inbox.")
    else:
        click.echo("Asked for a hold; the daemon has not taken notice yet.")
    click.echo("To continue: imagewatch release")


@click.command()
@click.option("--accept-new-ledger", "accept", is_flag=True, help="Use the ledger that is there, or an empty one.")
@json_option
@config_option
def release(path: str | None, *, as_json: bool, accept: bool) -> None:
    """End every hold, also one by hand and the burst guard's.

    What the account refuses is refused again, and held again; that costs nothing. With --accept-new-ledger, a ledger
    that was deleted or is damaged is replaced by an empty one, and one that was put in its place is used: caps then
    count only what is in it, history shows only that, and prompts that a sync tool brings back may be paid for again.
    """
    config = load_as_owner(path)
    control = control_of(config)
    if accept:
        _accept_ledger(config, control)
    control.release()
    running = is_running(config)
    noticed = running and is_noticed(lambda: not control.release_pending())
    if as_json:
        _print_asked("release", running=running, noticed=noticed)
    elif not running:
        click.echo("Released. The daemon is not running; when it starts, only what still fails holds the queue.")
    elif noticed:
        click.echo("Released.")
    else:
        click.echo("Asked for the end of all holds; the daemon has not taken notice yet.")


def _print_asked(what: str, *, running: bool, noticed: bool) -> None:
    click.echo(to_json({"asked": what, "is_running": running, "is_noticed": noticed}))


def _accept_ledger(config: Config, control: Control) -> None:
    error = ledger_problem(config.folders.state)
    if error is None:
        raise UsageError("the ledger is in order; nothing was done")
    if error.code not in {errno.ENOENT, errno.ESTALE, errno.EIO}:
        raise UsageError(f"{printable(str(error))}; an empty ledger would not help", hint=error.hint)
    known = "Caps, history and the recognition of prompts that come again know only what is in the new ledger."
    click.echo(known, err=True)
    control.accept_ledger()
