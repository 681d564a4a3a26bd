"""What commands ask of a daemon: rows of the journal, and a folder by which the daemon is woken.

Rows, because a daemon that is not running must find the request when it starts. Only who may write into the state
folder can ask for anything; the inbox is open to other users and can ask for nothing.

::

    state/control/wake           written after each request: a change event
                  accept-ledger  use the ledger that is there now, or an empty one; a file, because a journal that is
                                 missing has no rows
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import TYPE_CHECKING

from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError
from imagewatch.system.folders import Tops
from imagewatch.system.leftovers import remove_old
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.journal.requests import Requests
    from imagewatch.system.disk import Disk

_WAKE, _ACCEPT = "wake", "accept-ledger"
_TEMPORARY = re.compile(r"([a-z][a-z.0-9-]*)\.tmp")
_MOST_BYTES = 4096
_FOLDER = "control"
_RETRY = re.compile(r"retry\.([0-9a-f]{16})")
_RENAMED = {"address": "endpoint"}
"""Kinds of hold that an earlier version wrote."""


class Control:
    """Requests to a daemon.

    Args:
        state: The state folder.
        disk: The local disk.
        requests: Their rows.
    """

    def __init__(self, state: str, disk: Disk, requests: Requests) -> None:
        self.folder = os.path.join(state, _FOLDER)
        self._disk = disk
        self._requests = requests
        self.held, self.refused, self.refuse = requests.held, requests.refused, requests.refuse
        self.release_pending, self.released = requests.release_pending, requests.released
        self.passed, self.let_pass = requests.passed, requests.let_pass
        self.retries, self.retried = requests.retries, requests.retried

    def prepare(self) -> None:
        """Make the folder."""
        self._disk.make_folder(self.folder)

    def tidy(self) -> None:
        """Remove what was being written when a process was killed; for the daemon, at its start.

        What a command writes may be in use, so it stays for a day.
        """
        for name in self._names():
            if _TEMPORARY.fullmatch(name):
                remove_old(self._disk, self._path(name), is_known=False)

    def hold(self, reason: str) -> None:
        """Put the queue on hold, until ``release``."""
        self._requests.hold(reason)
        self._wake()

    def release(self) -> None:
        """Ask for the end of all holds except caps."""
        self._disk.unlink(self._path("held"))  # of an earlier version, that was not imported yet
        self._requests.release()
        self._wake()

    def wake(self) -> None:
        """Let a running daemon read what commands ask for."""
        self._wake()

    def retry(self, job: str) -> None:
        """Ask to read the paid response of a job again."""
        self._requests.retry(job)
        self._wake()

    def accepts_ledger(self) -> bool:
        """Return whether ``accept_ledger`` was called and no daemon has applied it yet."""
        return self._disk.tops.exists(self._path(_ACCEPT))

    def accepted_ledger(self) -> None:
        """Note that the ledger that is there now is used."""
        self._disk.unlink(self._path(_ACCEPT))

    def _wake(self) -> None:
        self.prepare()
        self._disk.jot(self._path(_WAKE), b"")

    # Files of an earlier version

    def adopt(self) -> None:
        """Make rows of what commands asked an earlier version for, and of the holds that it remembered."""
        for name in self._names():
            if name == "held":
                self._requests.hold(self._read(name))
            elif name == "release":
                self._requests.release_again()
            elif name == "passed":
                with contextlib.suppress(ValueError):
                    self._requests.let_pass(float(self._read(name)))
            elif name == "refused":
                self._requests.refuse(_refused(self._read(name)))
            elif found := _RETRY.fullmatch(name):
                self._requests.retry(found[1])
            else:
                continue
            self._disk.unlink(self._path(name))

    def _names(self) -> list[str]:
        with disk_errors(self.folder, "list the folder"), contextlib.suppress(FileNotFoundError):
            return sorted(self._disk.tops.names(self.folder))
        return []

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _read(self, name: str) -> str:
        path = self._path(name)
        try:
            with disk_errors(path, "read"), open(self._disk.tops.open_file(path, os.O_RDONLY), "rb") as file:
                return file.read(_MOST_BYTES).decode("utf-8", "surrogateescape")
        except SpoolError as error:
            return str(error)  # it is there, so it was asked for


def accept_ledger(state: str, disk: Disk) -> None:
    """Ask a daemon to use the ledger that is there now, or an empty one.

    Args:
        state: The state folder.
        disk: The local disk.
    """
    folder = os.path.join(state, _FOLDER)
    disk.make_folder(folder)
    disk.write(os.path.join(folder, _ACCEPT), b"")


def accepts_ledger(state: str) -> bool:
    """Return whether ``accept_ledger`` was called and no daemon has applied it yet."""
    return Tops().exists(os.path.join(state, _FOLDER, _ACCEPT))


def _refused(text: str) -> dict[str, str]:
    with contextlib.suppress(ValueError):  # unreadable: one more prompt shows it
        found = json.loads(text or "{}")
        if isinstance(found, dict):
            return {_RENAMED.get(kind, str(kind)): printable(str(message), 500) for kind, message in found.items()}
    return {}
