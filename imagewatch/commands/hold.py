"""``imagewatch hold`` and ``imagewatch release``: requests that are left in the control folder of a daemon."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option
from imagewatch.commands.state import control_of, hold_kinds, is_applied, is_running, load_as_owner
from imagewatch.journal import opening
from imagewatch.journal.control import accept_ledger, accepts_ledger
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from imagewatch.config.schema import Config


@click.command()
@click.argument("reason", default="")
@json_option
@config_option
def hold(reason: str, path: str | None, *, as_json: bool) -> None:
    """Put the queue on hold: nothing more is sent.

    Requests in flight are finished; prompts stay in the inbox. The hold lasts until "imagewatch release", also over a
    restart. REASON is shown by "imagewatch status".
    """
    config = load_as_owner(path)
    with control_of(config) as control:
        control.hold(reason)
    running = is_running(config)
    applied = running and is_applied(lambda: "manual" in hold_kinds(config))
    if as_json:
        _print_json("hold", running=running, applied=applied)
        return
    if not running:
        click.echo("On hold. The daemon is not running. When it starts, it sends nothing.")
    elif applied:
        click.echo("On hold. Requests in flight are finished; prompts wait in the inbox.")
    else:
        click.echo("Hold requested; the daemon has not applied it yet.")
    click.echo("To resume, run: imagewatch release")


@click.command()
@click.option("--accept-new-ledger", "accept", is_flag=True, help="Use the ledger that is there, or an empty one")
@json_option
@config_option
def release(path: str | None, *, as_json: bool, accept: bool) -> None:
    """End all holds except those of caps.

    This includes manual holds and those of the burst guard. A cap is only checked again. If the cause of a hold
    remains, the next request is refused again and the queue is on hold again. This costs nothing.

    With --accept-new-ledger: if the ledger was deleted or is damaged, the daemon starts an empty one. If another one
    was put in its place, the daemon uses that. Caps and history then count only what is in it. A prompt that a sync
    tool delivers again may be charged again.
    """
    config = load_as_owner(path)
    running = is_running(config)
    applied = _accepted(config, running=running) if accept else _released(config, running=running)
    if as_json:
        _print_json("release", running=running, applied=applied)
    elif not running:
        click.echo("Released. The daemon is not running. When it starts, it sends prompts again.")
    elif applied:
        click.echo("Released.")
    else:
        click.echo("Release requested; the daemon has not applied it yet.")


def _print_json(action: str, *, running: bool, applied: bool) -> None:
    click.echo(to_json({"action": action, "is_running": running, "is_applied": applied}))


def _released(config: Config, *, running: bool) -> bool:
    """Ask for the end of all holds; return whether the daemon has applied that."""
    with control_of(config) as control:
        control.release()
        return running and is_applied(lambda: not control.release_pending())


def _accepted(config: Config, *, running: bool) -> bool:
    """Ask to use another ledger, and then for the end of all holds; return whether the daemon has applied both.

    What is asked for is in the ledger, too, so that has to be there first: the daemon releases when it accepts.
    """
    _accept_ledger(config)
    return running and is_applied(lambda: not accepts_ledger(config.folders.state))


def _accept_ledger(config: Config) -> None:
    error = opening.problem(config)
    if config.shared.database:
        _require_replaceable(error)
        click.echo("When the daemon starts, what was in flight counts as charged, amount unknown.", err=True)
        accept_ledger(config.folders.state, Disk())
        return
    if error is None:
        raise UsageError("the ledger has no problem; nothing was changed")
    if error.code not in {errno.ENOENT, errno.ESTALE, errno.EIO}:
        raise UsageError(f"{printable(str(error))}; an empty ledger would not help", hint=error.hint)
    click.echo("Caps, history and the check for redelivered prompts now use only the new ledger.", err=True)
    accept_ledger(config.folders.state, Disk())


def _require_replaceable(error: SpoolError | None) -> None:
    """Make sure that this state folder can take the place of a lost one in the shared database."""
    if error is None:
        raise UsageError(
            "no other state folder has the name of this daemon in the shared database; nothing was changed"
        )
    if error.code != errno.ESTALE:
        raise error
