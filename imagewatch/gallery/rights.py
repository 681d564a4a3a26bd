"""Whose rights root works with: what root writes, the user of a service could never replace."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat

from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable


def step_down(folder: str, outbox: str) -> None:
    """Work with the rights of the owner of a folder from now on, if this is root; else change nothing.

    That is the owner of the page's folder or, if it is root's, of the outbox: the first of them who may write the one
    and read the other. The folder's mode decides who else may read what is written, as root's umask says nothing about
    that. Only the effective ids change, as the program itself may lie where none but root may read.

    Args:
        folder: Where the page is to be.
        outbox: What it is about.

    Raises:
        UsageError: The folder is another user's, and none of them can do the work. Root does not write there, as the
            owner could lead it anywhere.
    """
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):  # it is not there, or this root may not become anybody
        owner = os.stat(folder)
        is_new = not os.path.exists(outbox)  # nothing was made yet
        for status in [owner] if is_new else [owner, os.stat(outbox)]:
            if status.st_uid and _became(status, folder, "" if is_new else outbox):
                return
        if owner.st_uid:
            told = f"{printable(folder)}: belongs to another user (number {owner.st_uid}), who may not read the outbox"
            raise UsageError(told, hint="name another place by --output, or let that user read the outbox")


def _became(status: os.stat_result, folder: str, outbox: str) -> bool:
    """Become an owner who can do the work; else stay root."""
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
