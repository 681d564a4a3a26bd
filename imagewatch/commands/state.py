"""The daemon's state folder as commands see it: its owner, whether a daemon runs, and its status.

The daemon may run meanwhile or not. Nothing here needs the key or the network.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import threading
import time
from typing import TYPE_CHECKING, Any

from imagewatch.commands.common import load_config
from imagewatch.config.shared import require_psycopg
from imagewatch.daemon import status
from imagewatch.journal import opening
from imagewatch.journal.control import Control
from imagewatch.system.disk import Disk
from imagewatch.system.errors import ConfigError, SpoolError
from imagewatch.system.locks import locked
from imagewatch.system.text import local, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.journal import Journal

_PATIENCE = 6.0
"""How long a daemon may take to apply a request, seconds; without change events it checks every five."""

_AS_DAEMON = "run the command as the daemon's user or as root: sudo imagewatch …"


def load_as_owner(path: str | None) -> Config:
    """Load the configuration, and become the owner of the state folder if this is root.

    The daemon could not remove a file that root has created. Everything that a command needs must be imported before:
    the program's own code may be readable for root only.
    """
    config = load_config(path)
    if config.shared.database:
        with contextlib.suppress(ConfigError):  # what uses the database reports it
            require_psycopg()
            from imagewatch.journal.postgres import copying, database, place  # noqa: F401, PLC0415  an extra
    state = config.folders.state
    try:
        owner = os.stat(state)
    except FileNotFoundError:
        raise never_ran(state) from None
    except OSError:
        raise unreadable(state) from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups(_groups(owner))
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    if not os.access(state, os.W_OK | os.X_OK):
        raise SpoolError(f"permission denied: {printable(state)}", path=state, hint=_AS_DAEMON)
    return config


def _groups(owner: os.stat_result) -> list[int]:
    with contextlib.suppress(KeyError):
        return os.getgrouplist(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    return []


def never_ran(state: str) -> SpoolError:
    """Return the error of a command that needs the state folder if there is none."""
    inbox = state.removeprefix("/var/lib/imagewatch-")  # of imagewatch@.service
    unit = f"imagewatch@{inbox}" if inbox != state and "/" not in inbox else "imagewatch"
    start = f"systemctl start {unit}, or imagewatch run"
    hint = printable(f"start the daemon ({start}), or name another configuration with --config")
    return SpoolError(f"no daemon has run with this configuration yet: {printable(state)}", path=state, hint=hint)


def unreadable(state: str) -> SpoolError:
    """Return the error of a command whose user may not enter the state folder."""
    return SpoolError(f"permission denied: {printable(state)}", path=state, hint=_AS_DAEMON)


@contextlib.contextmanager
def control_of(config: Config) -> Iterator[Control]:
    """Open the journal for the block, to ask the daemon for something.

    Raises:
        SpoolError: The journal cannot be used.
    """
    with usable_journal(config) as journal:
        yield Control(config.folders.state, Disk(), journal.requests)


@contextlib.contextmanager
def usable_journal(config: Config) -> Iterator[Journal]:
    """Open the journal for the block.

    Raises:
        SpoolError: The journal cannot be used.
    """
    if error := opening.problem(config):
        raise error
    with contextlib.closing(opening.open_journal(config, time.time)) as journal:
        yield journal


def is_running(config: Config) -> bool:
    """Return whether a daemon uses the state folder."""
    return locked(os.path.join(config.folders.state, "lock"))


def is_applied(condition: Callable[[], bool]) -> bool:
    """Wait until the daemon has applied a request; return whether it has."""
    wait, end = threading.Event().wait, time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        wait(0.05)
    return True


def status_page(config: Config) -> dict[str, Any]:
    """Return the daemon's status, corrected if it is not running.

    Raises:
        SpoolError: No daemon has run yet, or this user may not read the state folder.
    """
    state = config.folders.state
    page = status.read(state)
    if page is None:
        raise unreadable(state) if os.path.lexists(state) and not os.access(state, os.X_OK) else never_ran(state)
    running = is_running(config)
    if running:
        # It has the lock already, and has not written its status yet.
        page["state"] = "starting" if page["state"] == "stopped" else page["state"]
    else:
        page["state"] = "stopped" if page["state"] == "stopped" else "died"
        page |= {"in_flight": [], "holds": _lasting(config, page)}
    return {**status.as_of(page, time.time()), "is_running": running}


def _lasting(config: Config, page: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the holds of the next start; those that a daemon wrote last if the journal cannot be read."""
    with contextlib.suppress(SpoolError), usable_journal(config) as journal:
        control = Control(config.folders.state, Disk(), journal.requests)
        own = [one for one in status.lasting(page, control) if not journal.account.concerns(one["kind"])]
        return [*own, *status.shared_holds(journal.account.holds(), time.time())]
    found: list[dict[str, Any]] = page["holds"]
    return found


def holds(config: Config) -> list[dict[str, Any]]:
    """Return the holds, also those of the next start; none if this user may not read them."""
    with contextlib.suppress(SpoolError):
        found: list[dict[str, Any]] = status_page(config)["holds"]
        return found
    return []


def is_free(config: Config) -> bool:
    """Return whether a running daemon has no hold, as it last wrote, and is not asked for one."""
    with contextlib.suppress(SpoolError), control_of(config) as control:
        return not status_page(config)["holds"] and control.held() is None
    return False


def hold_kinds(config: Config) -> set[str]:
    """Return the kinds of the holds that the daemon last wrote."""
    page = status.read(config.folders.state)
    return {one["kind"] for one in page["holds"]} if page else set()


def local_time(text: str | None) -> str:
    """Return a UTC time of the status as local time for people."""
    return local(status.moment(text).timestamp()) if text else "never"
