"""The lines of ``imagewatch check`` about notifications. Nothing is run or posted."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imagewatch.config.key import key_file_problem
from imagewatch.config.values import is_loopback
from imagewatch.notify.secret import SecretError, read_secret, secret_source
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.config.schema import Notify

_WHAT = "notify"


def receivers(notify: Notify, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield verdict, subject and reason for each receiver of notifications and for the secret."""
    if notify.command:
        yield _command(notify.command[0], environ)
    if notify.url is not None:
        yield from _url(notify, environ)
    elif notify.secret_file is not None:
        yield "warn", _WHAT, "secret_file is not used, because no url is set"


def _command(program: str, environ: Mapping[str, str]) -> tuple[str, str, str]:
    """Return whether the program can be run; its arguments may be secret, so they are not shown."""
    shown = printable(program, 255)
    if shutil.which(program, path=environ.get("PATH")):
        return "ok", _WHAT, f"command {shown}"
    if "/" in program and os.path.isfile(program):
        return "bad", _WHAT, f"the command may not be executed: {shown} (run: chmod a+x {shown})"
    where = "" if "/" in program else " in PATH"
    return "bad", _WHAT, f"the command does not exist{where}: {shown} (correct command in [notify])"


def _url(notify: Notify, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield lines about URL and secret; of the URL only scheme and host, as the rest may be secret."""
    parts = urlsplit(notify.url or "")
    host = parts.hostname or ""
    source = secret_source(notify, environ)
    signed = f"signed with the secret in {printable(source, 255)}" if source else "not signed"
    if not source and "CREDENTIALS_DIRECTORY" not in environ:
        signed += " (a service may have the systemd credential notify_secret)"
    if source and (error := _unreadable(source)):
        hint = "write the secret into it, readable for the daemon"
        yield "bad", _WHAT, f"nothing is posted to the url on {host}: {error}: {printable(source, 255)} ({hint})"
        return
    if parts.scheme == "http" and not is_loopback(host):
        yield "warn", _WHAT, f"url on {host}, {signed}; prompts are sent there unencrypted (use https://)"
    else:
        yield "ok", _WHAT, f"url on {host}, {signed}"
    if source and (warning := key_file_problem(source)):
        yield "warn", _WHAT, printable(warning)


def _unreadable(source: str) -> str:
    """Return why the secret cannot be read, or an empty string."""
    try:
        read_secret(source)
    except SecretError as error:
        return str(error)
    return ""
