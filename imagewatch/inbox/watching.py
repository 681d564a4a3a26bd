"""How the inbox is watched: which folders have change events, and which have to be polled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from imagewatch.inbox.events import Hints, Watcher
from imagewatch.system.file_systems import POLL_SECONDS, eventless
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = structlog.get_logger()


class Watching:
    """The watcher of one inbox.

    Args:
        control: The folder for requests of commands.
        wake: Called in the watcher's thread when there are changes to read.

    Attributes:
        control: The same folder.
        hints: The changes that the watcher has reported.
    """

    def __init__(self, control: str, wake: Callable[[], None]) -> None:
        self._watch = "auto"
        self.control = control
        self.hints = Hints(wake)
        self._watcher = Watcher(self.hints.add, self.hints.lose)
        self._listen_at = 0.0
        self._why_no_events = "there are no change events on this system"
        self._problems: dict[str, str] = {}  # why folders cannot be watched, by whole path
        self._logged: object = None

    def configure(self, watch: str) -> None:
        """Take a configuration.

        Args:
            watch: ``auto``, ``native`` or ``poll``.
        """
        self._watch = watch
        if watch == "poll":
            self._watcher.stop()
            self._problems.clear()

    def stop(self) -> None:
        """End the thread that reads change events; ``listen`` starts it again."""
        self._watcher.stop()

    def listen(self, now: float) -> bool:
        """Begin to listen, also after the reader died; return whether everything has to be scanned for that.

        Args:
            now: Monotonic time, seconds.
        """
        if self._watch == "poll" or not self._watcher.available or self._watcher.alive() or now < self._listen_at:
            return False
        self._listen_at = now + POLL_SECONDS
        if self._watcher.problem:
            self._why_no_events = "the thread that reads change events failed"
            _log.error("watcher_restarted", reason=self._watcher.problem)
        try:
            self._watcher.start()
        except OSError as error:
            self._why_no_events = f"no change events: {error.strerror or error}"
            return False
        self._problems.clear()
        self.watch_control()
        return True

    def watch_control(self) -> None:
        """Watch the folder for requests, also if it is another one now."""
        if self._watcher.alive():
            try:
                status = os.stat(self.control)
            except OSError:
                self._watcher.forget(self.control)
            else:
                self._watcher.watch(self.control, (status.st_dev, status.st_ino))

    def watch(self, path: str, identity: tuple[int, int], descriptor: int) -> None:
        """Watch a folder.

        Args:
            path: Its whole path.
            identity: Its device and inode.
            descriptor: The open folder.
        """
        if self._watcher.alive():
            if problem := self._watcher.watch(path, identity, descriptor):
                self._problems[path] = f"cannot be watched: {problem}"
            else:
                self._problems.pop(path, None)

    def forget(self, path: str) -> None:
        """Watch a folder no longer."""
        self._problems.pop(path, None)
        if self._watcher.alive():
            self._watcher.forget(path)

    def forget_all(self) -> None:
        """Watch no folder but that for requests, until one is named again."""
        self._problems.clear()
        if self._watcher.alive():
            self._watcher.forget_others(self.control)

    # What has to be polled

    def _why_all(self, kind: str) -> str:
        """Return why no folder has reliable change events, or an empty string."""
        if self._watch == "poll":
            return "inbox.watch is poll"
        if not self._watcher.alive():
            return self._why_no_events
        return (
            f"{kind}: changes by other computers may cause no events"
            if self._watch == "auto" and eventless(kind)
            else ""
        )

    def is_polled(self, kind: str) -> bool:
        """Return whether any folder has to be polled.

        Args:
            kind: The file system of the inbox.
        """
        return bool(self._problems or self._why_all(kind))

    def polled(self, kind: str, folders: list[str]) -> Mapping[str, str]:
        """Return the folders without reliable change events, and why.

        Args:
            kind: The file system of the inbox.
            folders: All folders.
        """
        why = self._why_all(kind)
        return dict.fromkeys(folders, why) if why else self._problems

    def mode(self, kind: str, folders: int) -> str:
        """Return ``native``, ``poll``, or ``mixed`` if only some folders have change events.

        Args:
            kind: The file system of the inbox.
            folders: How many there are.
        """
        if self._why_all(kind) or (self._problems and len(self._problems) >= folders):
            return "poll"
        return "mixed" if self._problems else "native"

    def why_polled(self, kind: str, folders: list[str]) -> dict[str, str]:
        """Return for each reason to poll one of the folders, and how many there are."""
        reasons: dict[str, list[str]] = {}
        for path, why in self.polled(kind, folders).items():
            reasons.setdefault(why, []).append(path)
        return {
            printable(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""): why
            for why, paths in reasons.items()
        }

    def log_mode(self, kind: str, folders: list[str]) -> None:
        """Log how the inbox is watched when that changes; at the start the caller logs it."""
        mode = self.mode(kind, len(folders))
        now = (mode, self._why_all(kind), frozenset(self._problems.values()))
        bad = bool(self._problems) or (self._watch != "poll" and not self._watcher.alive())
        if now != self._logged and (self._logged or bad):
            (_log.warning if bad else _log.info)("watch_mode", mode=mode, polled=self.why_polled(kind, folders))
        self._logged = now
