"""Whose rights root works with: the user of a service could never replace a file that root has written."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat

from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable


def step_down(folder: str, outbox: str) -> None:
    """Work with the rights of the owner of a folder from now on, if this is root; else change nothing.

    That is the owner of the page's folder or, if that is root, of the outbox: the first one who can write to the page's
    folder and read the outbox. The folder's mode decides who else may read the page, and not root's umask. Only the
    effective ids change, because the program itself may be readable for root only.

    Args:
        folder: The page's folder.
        outbox: The outbox.

    Raises:
        UsageError: The folder belongs to another user, and neither owner can do the work. Root does not write there,
            because the folder's owner could point it to any other place.
    """
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):  # it is missing, or this root may not change its user
        owner = os.stat(folder)
        is_new = not os.path.exists(outbox)  # nothing is completed yet
        for status in [owner] if is_new else [owner, os.stat(outbox)]:
            if status.st_uid and _became(status, folder, "" if is_new else outbox):
                return
        if owner.st_uid:
            message = f"the folder's owner (user number {owner.st_uid}) may not read the outbox: {printable(folder)}"
            raise UsageError(message, hint="choose another place with --output, or let that user read the outbox")


def _became(status: os.stat_result, folder: str, outbox: str) -> bool:
    """Become this owner if they can do the work; else stay root."""
    before = os.getgroups()
    try:
        known = pwd.getpwuid(status.st_uid)
        group, groups = known.pw_gid, os.getgrouplist(known.pw_name, known.pw_gid)
    except KeyError:
        group, groups = status.st_gid, [status.st_gid]
    os.setgroups(groups)
    os.setegid(group)
    os.seteuid(status.st_uid)
    if _may(folder, os.W_OK | os.X_OK) and (not outbox or _may(outbox, os.R_OK | os.X_OK)):
        os.umask(0o022 | ~stat.S_IMODE(os.stat(folder).st_mode) & 0o077)
        return True
    os.seteuid(0)
    os.setegid(0)
    os.setgroups(before)
    return False


def _may(place: str, what: int) -> bool:
    return os.access(place, what, effective_ids=True)
