"""What commands ask of a daemon: small files in ``control``, a folder inside the state folder.

Files, because a daemon that is not running must find the request when it starts. Only who may write into the state
folder can ask for anything; the inbox is open to other users and can ask for nothing.

::

    held       a person put the queue on hold, for the reason inside; it stays until ``release``
    release    end all holds except caps; the daemon removes it
    passed     until which time prompts were let through past the burst guard; written by the daemon
    refused    holds that the account or the endpoint caused, as JSON; written by the daemon for its next start
    accept-ledger  use the ledger that is there now, or an empty one; the daemon removes it
    retry.ID   read the paid response of this job again; the daemon removes it
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import TYPE_CHECKING

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.leftovers import remove_old
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.system.disk import Disk

_RETRY = re.compile(r"retry\.([0-9a-f]{16})")
_DAEMONS = {"passed", "refused"}
_TEMPORARY = re.compile(r"([a-z][a-z.0-9-]*)\.tmp")
_MOST_BYTES = 4096
_RENAMED = {"address": "endpoint"}
"""Kinds of hold that an earlier version wrote."""


class Control:
    """The folder for requests to a daemon.

    Args:
        state: The state folder.
        disk: The local disk.
    """

    def __init__(self, state: str, disk: Disk) -> None:
        self.folder = os.path.join(state, "control")
        self._disk = disk

    def prepare(self) -> None:
        """Make the folder."""
        self._disk.make_folder(self.folder)

    def tidy(self) -> None:
        """Remove what was being written when a process was killed; for the daemon, at its start.

        What only the daemon writes is not in use then. What a command writes may be, so it stays for a day.
        """
        for name in self._names():
            if found := _TEMPORARY.fullmatch(name):
                remove_old(self._disk, self._path(name), is_known=found[1] in _DAEMONS)

    def held(self) -> str | None:
        """Return why a person put the queue on hold, or None if it is not."""
        try:
            found = self._read("held")
        except SpoolError as error:
            return str(error)  # it is there, so a hold was asked for
        return None if found is None else printable(found.strip(), 500)

    def hold(self, reason: str) -> None:
        """Put the queue on hold, until ``release``."""
        self._write("held", reason)

    def release(self) -> None:
        """Ask for the end of all holds except caps."""
        self._disk.unlink(self._path("held"))
        self._write("release", "")

    def release_pending(self) -> bool:
        """Return whether ``release`` was called and no daemon has applied it yet."""
        return self._disk.tops.exists(self._path("release"))

    def released(self) -> None:
        """Note that all holds except caps were ended."""
        self._disk.unlink(self._path("release"))

    def accept_ledger(self) -> None:
        """Ask to use the ledger that is there now, or an empty one."""
        self._write("accept-ledger", "")

    def accepts_ledger(self) -> bool:
        """Return whether ``accept_ledger`` was called and no daemon has applied it yet."""
        return self._disk.tops.exists(self._path("accept-ledger"))

    def accepted_ledger(self) -> None:
        """Note that the ledger that is there now is used."""
        self._disk.unlink(self._path("accept-ledger"))

    def passed(self) -> float:
        """Return until which ctime, seconds since the epoch, the burst guard lets prompts through."""
        with contextlib.suppress(SpoolError, ValueError):  # unreadable: the guard asks once more
            return float(self._read("passed") or 0)
        return 0.0

    def let_pass(self, until: float) -> None:
        """Let prompts through that were last changed at this time or before, seconds since the epoch."""
        self._write("passed", repr(until))

    def refused(self) -> dict[str, str]:
        """Return what the account or the endpoint refused when a daemon last ran: messages by kind of hold."""
        with contextlib.suppress(SpoolError, ValueError):  # unreadable: one more prompt shows it
            found = json.loads(self._read("refused") or "{}")
            if isinstance(found, dict):
                return {_RENAMED.get(kind, str(kind)): printable(str(message), 500) for kind, message in found.items()}
        return {}

    def refuse(self, messages: dict[str, str]) -> None:
        """Remember these for the next start."""
        if messages != self.refused():
            self._write("refused", json.dumps(messages))

    def retry(self, job: str) -> None:
        """Ask to read the paid response of a job again."""
        self._write(f"retry.{job}", "")

    def retries(self) -> list[str]:
        """Return the jobs that ``retry`` was called for."""
        return [match[1] for name in self._names() if (match := _RETRY.fullmatch(name))]

    def retried(self, job: str) -> None:
        """Forget a request of ``retry``."""
        self._disk.unlink(self._path(f"retry.{job}"))

    def _names(self) -> list[str]:
        with disk_errors(self.folder, "list the folder"), contextlib.suppress(FileNotFoundError):
            return sorted(self._disk.tops.names(self.folder))
        return []

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _read(self, name: str) -> str | None:
        path = self._path(name)
        try:
            with disk_errors(path, "read"), open(self._disk.tops.open_file(path, os.O_RDONLY), "rb") as file:
                return file.read(_MOST_BYTES).decode("utf-8", "surrogateescape")
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _write(self, name: str, text: str) -> None:
        self.prepare()
        self._disk.write(self._path(name), text.encode("utf-8", "surrogateescape"))
