"""Which program a unit starts, and whether a service can and may run it."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from typing import TYPE_CHECKING, Final

import click

import imagewatch
from imagewatch.config.locate import others_who_write
from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME: Final = "imagewatch"
_MOST_LINKS: Final = 40
HIDDEN: Final = {
    "ProtectHome=yes": ("/home", "/root", "/run/user"),
    "TemporaryFileSystem=": ("/media", "/mnt", "/srv", "/var"),
    "PrivateTmp=yes": ("/tmp",),  # noqa: S108  no file is written there
}
"""Settings of the system units, and the folders that each hides from the service."""


def this_program() -> str:
    """Return the path of this installation's program, without links.

    Raises:
        UsageError: It is not where programs of an installation are.
    """
    beside = os.path.join(os.path.dirname(sys.executable), _NAME)
    for path in (sys.argv[0], beside, shutil.which(_NAME) or ""):
        if os.path.basename(path) == _NAME and os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.realpath(path)
    raise UsageError("the program of this installation was not found", hint="name it with --program PATH")


def quoted(program: str) -> str:
    """Return the path of a program as it is written into a unit.

    Raises:
        UsageError: A unit cannot name it.
    """
    if not os.path.isabs(program) or printable(program) != program or set(program) & set("$\"'\\"):
        hint = "name an absolute path without quotation marks, backslashes, $ and control characters"
        raise UsageError(f"a unit cannot start this program: {printable(program)}", hint=hint)
    text = program.replace("%", "%%")
    return f'"{text}"' if " " in program else text


def require_usable(program: str, *, is_user: bool) -> None:
    """Require that the service can run a program, and that no other user can change it.

    Args:
        program: What the unit starts.
        is_user: Whether it is the unit of one person.

    Raises:
        UsageError: Why not, and how to install imagewatch for a service.
    """
    if not os.path.isfile(program):
        raise UsageError(f"there is no such program: {printable(program)}", hint="name it with --program PATH")
    for path in _needed(program):
        for step, status in _steps(path):
            if not is_user:
                _require_visible(program, path, step)
            _require_safe(step, status, is_user=is_user)
            if not is_user:
                _require_readable(step, status)


def _needed(program: str) -> list[str]:
    """Return files that the program needs: itself and, if it is this one, its interpreter and its libraries."""
    own = os.path.dirname(program) == os.path.dirname(sys.executable)
    libraries = [sys.executable, os.__file__, str(imagewatch.__file__), str(click.__file__)]
    return [program, *libraries] if own else [program]


def _steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each folder and link on the way to a file, and the file.

    Raises:
        UsageError: A step is missing.
    """
    here, rest, links = "/", path.split("/"), 0
    while rest:
        part = rest.pop(0)
        here = os.path.normpath(os.path.join(here, part))
        try:
            status = os.lstat(here)
            if stat.S_ISLNK(status.st_mode) and links < _MOST_LINKS:
                target = os.readlink(here)
                rest = target.split("/") + rest
                links += 1
        except OSError as error:
            raise UsageError(f"{error.strerror}: {printable(here)}", hint="install imagewatch again") from None
        yield here, status
        if stat.S_ISLNK(status.st_mode):
            here = "/" if target.startswith("/") else os.path.dirname(here)


def _require_visible(program: str, path: str, step: str) -> None:
    for setting, folders in HIDDEN.items():
        for folder in folders:
            if step != folder and not step.startswith(f"{folder}/"):
                continue
            why = f"the service cannot read {printable(path)}: its unit hides {folder} ({setting})"
            raise UsageError(why, hint=_elsewhere(program, folder))


def _elsewhere(program: str, hidden: str) -> str:
    """Return how to install imagewatch where a service can read it, in the way in which it was installed."""
    if "/uv/" in program:
        how = "UV_TOOL_DIR=/opt/uv UV_TOOL_BIN_DIR=/usr/local/bin uv tool install --python /usr/bin/python3 imagewatch"
    elif "/pipx/" in program:
        how = "PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx install --python /usr/bin/python3 imagewatch"
    else:
        how = "/usr/bin/python3 -m venv /opt/imagewatch && /opt/imagewatch/bin/pip install imagewatch"
    own = "; for a service of your own, add --user" if os.geteuid() else ""
    return f"install imagewatch and its Python outside of {hidden}, then repeat this command; as root: {how}{own}"


def _require_safe(step: str, status: os.stat_result, *, is_user: bool) -> None:
    owners = {0, os.geteuid()} if is_user else {0}
    shown = printable(step)
    if status.st_uid not in owners:
        hint = f"run: chown root {shown}; or install imagewatch as root"
        raise UsageError(f"user number {status.st_uid} owns {shown}, so they may change the program", hint=hint)
    if not stat.S_ISLNK(status.st_mode) and (who := others_who_write(status)):
        raise UsageError(f"{who} may write {shown}, and so change the program", hint=f"run: chmod go-w {shown}")


def _require_readable(step: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    if not status.st_mode & (stat.S_IXOTH if is_folder else stat.S_IROTH):
        what = f"mode {stat.S_IMODE(status.st_mode):04o}"
        hint = f"run: chmod o+{'x' if is_folder else 'r'} {printable(step)}"
        raise UsageError(f"the user imagewatch cannot read the program: {printable(step)} has {what}", hint=hint)
