"""Where a configuration is searched, and whose file is used. Nothing of it is read."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from typing import TYPE_CHECKING, Final

from imagewatch.system.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

_HERE: Final = "imagewatch.toml"
_ASK: Final = "ask the administrator to give you access to this folder"


def find(explicit: str | None, environ: Mapping[str, str], cwd: str) -> str | None:
    """Return the configuration file to use.

    Args:
        explicit: What the command line names, or ``None``.
        environ: The environment.
        cwd: Absolute path of the current folder, or an empty string when it was removed.

    Returns:
        A path: the one named (whether it exists or not), else the first of the usual places that is there;
        ``None`` when there is none.

    Raises:
        ConfigError: The one in the current folder may be another user's, or the folder was removed.
    """
    named = explicit if explicit is not None else environ.get("IMAGEWATCH_CONFIG")
    if not cwd and not os.path.isabs(named or ""):
        hint = "go to another folder, or name the configuration by its whole path"
        raise ConfigError([Problem(named or _HERE, "the current folder was removed", hint)])
    if named or explicit is not None:
        return os.path.join(cwd, named or "")
    # lexists: a broken link is a mistake to report, not a reason to use another file.
    here, *others = usual(environ, cwd)
    if os.path.lexists(here):
        # It can name a command to be run for the key, and a folder may be any user's.
        if reason := _why_not_ours(here) or _why_not_ours(os.path.realpath(here)):
            hint = "name it with --config if you trust it"
            raise ConfigError([Problem(_HERE, reason, hint)], source=here)
        return here
    return next((place for place in others if os.path.lexists(place)), None)


def _why_not_ours(path: str) -> str:
    """Return why another user may have written a file, or put it in its place; an empty string if none may."""
    folder = os.path.dirname(path)
    for place, what in ((path, "it"), (folder, f"its folder {folder}")):
        try:
            status = os.lstat(place)
        except OSError:
            continue  # a broken link: reported when it is read
        if status.st_uid not in {0, os.geteuid()}:
            return f"is not used, because {what} belongs to another user (number {status.st_uid})"
        if stat.S_ISLNK(status.st_mode):
            continue
        if who := others_who_write(status):
            return f"is not used, because {what} may be written by {who}"
    return ""


def others_above(path: str) -> str:
    """Return who beside the owner may put something else in the place of a file or folder; an empty string if none may.

    Raises:
        OSError: The folder it is in cannot be read.
    """
    return others_who_write(os.stat(os.path.dirname(path)))


def others_who_write(status: os.stat_result) -> str:
    """Return who beside the owner may change a file, or rename what is in a folder; an empty string if none may.

    In a folder like ``/tmp`` all users may create files, but may not rename those of others.
    """
    mode = status.st_mode
    if stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return ""
    if mode & stat.S_IWOTH:
        return "all users"
    return "its group" if mode & stat.S_IWGRP and not _is_private(status) else ""


def _is_private(status: os.stat_result) -> bool:
    """Return whether a file's group is its owner alone: one of the same name, which distributions give each user.

    With such a group goes the umask 002, so that all of a user's files may be written by it. ``pam_umask`` goes by the
    same rule. Root has none: there are systems where many are in its group.
    """
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    own = user.pw_gid == group.gr_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return own and status.st_uid == user.pw_uid != 0


def is_hidden(path: str) -> bool:
    """Return whether a folder above a path keeps this user from seeing whether anything is there."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def refusal(path: str, needed: int) -> str:
    """Return what a user can do who may not enter or use a folder: join its group, where that would help.

    Args:
        path: The folder that is refused, or one below a folder that is.
        needed: What is needed of it, as in ``os.access``; of the folders above it is only to enter them.

    Returns:
        The next step, as one sentence.
    """
    above = os.path.dirname(path)
    while above != os.path.dirname(above) and not os.access(above, os.X_OK):
        path, needed, above = above, os.X_OK, os.path.dirname(above)
    try:
        status = os.stat(path)
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return _ASK
    if status.st_mode >> 3 & needed != needed or status.st_gid in {0, os.getegid(), *os.getgroups()}:
        return _ASK
    return f"ask the administrator to add you to the group {group}, then log in again"


def usual(environ: Mapping[str, str], cwd: str) -> tuple[str, ...]:
    """Return where a configuration is searched that is not named, in this order."""
    return (
        os.path.join(cwd, _HERE),
        os.path.join(xdg(environ, "XDG_CONFIG_HOME", "~/.config"), "imagewatch", "config.toml"),
        "/etc/imagewatch/config.toml",
    )


def xdg(environ: Mapping[str, str], variable: str, default: str) -> str:
    """Return an XDG base folder; a relative one is ignored, as the XDG specification demands."""
    value = environ.get(variable, "")
    return value if os.path.isabs(value) else expanded_home(default, environ)


def expanded_home(path: str, environ: Mapping[str, str]) -> str:
    """Return a path with ``~`` and ``~user`` replaced, by the given environment first."""
    home = environ.get("HOME", "")
    if home and (path == "~" or path.startswith("~/")):
        return home + path[1:]
    return os.path.expanduser(path)
