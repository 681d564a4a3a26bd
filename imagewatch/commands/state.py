"""The daemon's state folder as commands see it: whose it is, whether a daemon runs, and what that says of itself.

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
from imagewatch.daemon import status
from imagewatch.journal.control import Control
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError
from imagewatch.system.locks import locked
from imagewatch.system.text import local, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.load import Config

_PATIENCE = 6.0
"""How long a daemon may take to notice a request, seconds; where there are no change events it looks every five."""


def load_as_owner(path: str | None) -> Config:
    """Return the configuration, as the owner of the state folder: what root made the daemon could not remove.

    Everything that a command needs is imported by then: our own code may be where only root can read.
    """
    config = load_config(path)
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
        hint = "use the daemon's user or root, e.g. sudo imagewatch …"
        raise SpoolError(f"{printable(state)}: this user may not change it", path=state, hint=hint)
    return config


def _groups(owner: os.stat_result) -> list[int]:
    with contextlib.suppress(KeyError):
        return os.getgrouplist(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    return []


def never_ran(state: str) -> SpoolError:
    """Return the error of a command that needs a daemon's state folder where there is none."""
    hint = "start it: imagewatch run; or name its configuration with --config"
    return SpoolError(f"{printable(state)}: no daemon has run with this configuration yet", path=state, hint=hint)


def unreadable(state: str) -> SpoolError:
    """Return the error of a command whose user may not enter the state folder."""
    hint = "use the daemon's user or root, e.g. sudo imagewatch …"
    return SpoolError(f"{printable(state)}: this user may not look into it", path=state, hint=hint)


def control_of(config: Config) -> Control:
    """Return the folder in which commands leave what they ask of a daemon."""
    return Control(config.folders.state, Disk())


def is_running(config: Config) -> bool:
    """Return whether a daemon has the state folder."""
    return locked(os.path.join(config.folders.state, "lock"))


def is_noticed(condition: Callable[[], bool]) -> bool:
    """Wait until the daemon has taken notice; return whether it has."""
    wait, end = threading.Event().wait, time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        wait(0.05)
    return True


def status_page(config: Config) -> dict[str, Any]:
    """Return the daemon's own words, with what is true if it is not running.

    Raises:
        SpoolError: No daemon has run yet, or this user may not know.
    """
    state = config.folders.state
    page = status.read(state)
    if page is None:
        raise unreadable(state) if os.path.lexists(state) and not os.access(state, os.X_OK) else never_ran(state)
    running = is_running(config)
    if running:
        # It has the lock already, and has yet to say something.
        page["state"] = "starting" if page["state"] == "stopped" else page["state"]
    else:
        page["state"] = "stopped" if page["state"] == "stopped" else "died"
        page |= {"in_flight": [], "holds": status.lasting(page, control_of(config))}
    return {**status.as_of(page, time.time()), "is_running": running}


def holds(config: Config) -> list[dict[str, Any]]:
    """Return why nothing is sent at present, or will be at the next start; nothing if this user may not know."""
    with contextlib.suppress(SpoolError):
        found: list[dict[str, Any]] = status_page(config)["holds"]
        return found
    return []


def hold_kinds(config: Config) -> set[str]:
    """Return the kinds of the holds that the daemon last wrote."""
    page = status.read(config.folders.state)
    return {one["kind"] for one in page["holds"]} if page else set()


def local_time(text: str | None) -> str:
    """Return a UTC time, as a status has it, in words for people."""
    return local(status.moment(text).timestamp()) if text else "never"
