"""``imagewatch hold`` and ``imagewatch release``: requests that are left in the control folder of a daemon.

With ``--account`` they are left in the shared database, for all daemons of the account.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option
from imagewatch.commands.state import (
    control_of,
    hold_kinds,
    is_applied,
    is_free,
    is_running,
    load_as_owner,
    usable_journal,
)
from imagewatch.journal import opening
from imagewatch.journal.account import MANUAL, PUT_ON_HOLD
from imagewatch.journal.control import Control, accept_ledger, accepts_ledger
from imagewatch.system.disk import Disk
from imagewatch.system.errors import ConfigError, DatabaseError, SpoolError, UsageError
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.journal import Journal


_account_option = click.option(
    "--account", "for_all", is_flag=True, help="For all daemons of the account, on all hosts; needs [shared]"
)


@click.command()
@click.argument("reason", default="")
@_account_option
@json_option
@config_option
def hold(reason: str, path: str | None, *, as_json: bool, for_all: bool) -> None:
    """Put the queue on hold: this daemon sends nothing more.

    Requests in flight are finished; prompts stay in the inbox. The hold lasts until "imagewatch release", also over a
    restart. REASON is shown by "imagewatch status".

    If several daemons process this inbox together, the other daemons continue.

    With --account, this concerns all daemons that share the account in a database, also those that start later. When
    the command returns, none of them records another request. The hold lasts until "imagewatch release --account".
    """
    try:
        config = load_as_owner(path)
    except ConfigError as error:  # the state folder of the daemon is not known
        error.hint = "to stop sending without it, stop the daemon: systemctl stop imagewatch, or Ctrl-C in its terminal"
        raise
    if for_all:
        _hold_account(config, reason, as_json=as_json)
        return
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


def _hold_account(config: Config, reason: str, *, as_json: bool) -> None:
    with _account_of(config) as journal:
        journal.account.hold(reason)
    running = is_running(config)
    applied = running and is_applied(lambda: MANUAL in hold_kinds(config))
    if as_json:
        _print_json("hold", running=running, applied=applied)
        return
    click.echo(
        f"On hold: all daemons of the account {printable(config.shared.account)}. Requests in flight are finished."
    )
    click.echo("To resume, run: imagewatch release --account")


@contextlib.contextmanager
def _account_of(config: Config) -> Iterator[Journal]:
    """Open the shared database for the block.

    Raises:
        UsageError: There is none.
        SpoolError: It cannot be used.
    """
    if not config.shared.database:
        raise UsageError(
            "--account concerns the daemons that share a database, and [shared] database is not set",
            hint="without --account, the command concerns the daemon of this configuration",
        )
    with usable_journal(config) as journal:
        yield journal


@click.command()
@click.option("--accept-new-ledger", "accept", is_flag=True, help="Use the ledger that is there, or an empty one")
@_account_option
@json_option
@config_option
def release(path: str | None, *, as_json: bool, accept: bool, for_all: bool) -> None:
    """End all holds except those of caps.

    This includes manual holds and those of the burst guard. A cap is only checked again. If the cause of a hold
    remains, the next request is refused again and the queue is on hold again. This costs nothing.

    With --accept-new-ledger: if the ledger was deleted or is damaged, the daemon starts an empty one. If another one
    was put in its place, the daemon uses that. Caps and history then count only what is in it. A prompt that a sync
    tool delivers again may be charged again. With a shared database: this state folder takes the place of a lost one
    of the same instance, or the daemon uses a database that lacks its newest requests.

    If daemons share an account in a database, a hold of the account (credits, quota) concerns all of them. Without
    --account it does not end; its next probe is sent immediately. With --account, all holds of the account end, and
    each daemon is asked for a release. If several daemons process this inbox together, each of them is asked in any
    case. A hold by "imagewatch hold" on another host stays until "imagewatch release" there.
    """
    if accept and for_all:
        raise click.UsageError("--accept-new-ledger and --account cannot be used together")
    config = load_as_owner(path)
    running = is_running(config)
    was_free = running and is_free(config)
    if for_all:
        applied = _released_account(config, running=running)
    else:
        applied = _accepted(config, running=running) if accept else _released(config, running=running)
    if as_json:
        _print_json("release", running=running, applied=applied)
    elif for_all:
        click.echo(f"Released: all daemons of the account {printable(config.shared.account)}.")
        if running and not applied:
            click.echo("The daemon of this configuration has not applied it yet.")
    elif not accept and (reason := _held_with_account(config)) is not None:
        click.echo(f"Released; but the account is on hold: {reason}")
        click.echo("To resume all daemons of the account, run: imagewatch release --account")
    elif not running:
        click.echo("Released. The daemon is not running. When it starts, it sends prompts again.")
    elif applied:
        click.echo("Nothing was on hold." if was_free and not accept else "Released.")
    else:
        click.echo("Release requested; the daemon has not applied it yet.")


def _print_json(action: str, *, running: bool, applied: bool) -> None:
    click.echo(to_json({"action": action, "is_running": running, "is_applied": applied}))


def _released(config: Config, *, running: bool) -> bool:
    """Ask for the end of all holds; return whether the daemon has applied that."""
    with control_of(config) as control:
        control.release()
        return running and is_applied(lambda: not control.release_pending())


def _released_account(config: Config, *, running: bool) -> bool:
    """Ask all daemons of the account for the end of all holds; return whether the one here has applied that."""
    with _account_of(config) as journal:
        journal.account.release()
        journal.requests.release()  # also if this daemon has never been started with the database
        control = Control(config.folders.state, Disk(), journal.requests)
        control.wake()
        return running and is_applied(lambda: not control.release_pending())


def _held_with_account(config: Config) -> str | None:
    """Return why a person has put all daemons of the account on hold, or None."""
    if not config.shared.database:
        return None
    with usable_journal(config) as journal:
        return next((printable(one.message or PUT_ON_HOLD) for one in journal.account.holds() if one.is_manual), None)


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
        if isinstance(error, DatabaseError):
            click.echo("Caps, history and the check for redelivered prompts now use what is in the database.", err=True)
        else:
            click.echo("What the lost state folder had in flight counts as charged, amount unknown.", err=True)
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
