"""Change events of the kernel, as hints. The only module that knows ``watchdog``.

It uses watchdog's inotify reader itself and not its ``Observer``: the observer pairs the two halves of a rename and
for that holds every event back for up to half a second once files are moved out of a watched folder, which a
daemon that claims by rename does all the time (``docs/contributing/decisions.md``). The reader's callback also reports
when the kernel's queue overflowed, which no observer does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyFD, Mask
except (ImportError, OSError):  # not Linux: scans alone do the work
    InotifyFD = None  # type: ignore[assignment,misc]

_FEW, _MANY, _MOST = 32, 256, 8192
"""Names of one folder that are returned together; of all folders; how many may wait before each folder keeps few."""
_MOST_OF_FOLDER = 1024
_STORM = 64
"""After more events together it rests for a moment: to read hundreds of thousands a second would take the interpreter
away from all other threads. The kernel keeps the next ones, or reports that it lost some."""
_REST, _LONGEST_PAUSE_SECONDS = 4.0, 0.2
"""For how many times as long as reading the events took; for how long at most."""
_LIMIT = "the limit of watches is reached (fs.inotify.max_user_watches)"


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a name in a folder.

    Attributes:
        folder: The folder, by the name by which it is watched.
        name: The name; empty: the folder itself, or so much that not every name is known.
        renamed: Whether it came by rename.
        is_folder: Whether it is a folder that has come.
    """

    folder: str
    name: str = ""
    renamed: bool = False
    is_folder: bool = False


class Hints:
    """Changes that were not read yet; only the last one of each name, and whether it is a new folder.

    The names of each folder are bounded, so that a storm of changes in one folder hides none in another.

    Args:
        wake: Called in the watcher's thread when there is something, and not again until ``take`` has returned
            everything.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._folders: dict[str, dict[str, Change]] = {}
        self._count = 0
        self._has_woken = False
        self._has_lost = False

    def add(self, change: Change) -> None:
        """Note a change; if there are too many, only that something in the folder changed."""
        with self._lock:
            names = self._folders.setdefault(change.folder, {})
            if change.name not in names:
                if len(names) >= (_MOST_OF_FOLDER if self._count < _MOST else _FEW):
                    change = Change(change.folder)
                self._count += change.name not in names
            elif names[change.name].is_folder:  # which has come, and got a mode or a date then
                change = replace(change, is_folder=True)
            names[change.name] = change
        self._rings()

    def lose(self) -> None:
        """Note that changes were lost."""
        self._has_lost = True
        self._rings()

    def has_lost(self) -> bool:
        """Return whether changes were lost since this was asked before."""
        if not self._has_lost:
            return False  # it is not set here: the watcher's thread may be just about to set it
        self._has_lost = False
        return True

    def _rings(self) -> None:
        with self._lock:
            rings, self._has_woken = not self._has_woken, True
        if rings:
            self._wake()

    def take(self) -> list[Change]:
        """Return some changes, a few of each folder; rings again if there are more."""
        taken: list[Change] = []
        with self._lock:
            for folder in list(self._folders)[:_MANY]:
                names = self._folders.pop(folder)
                some = list(names)[:_FEW]
                taken += [names.pop(name) for name in some]
                if names:
                    self._folders[folder] = names  # behind the others
                if len(taken) >= _MANY:
                    break
            self._count -= len(taken)
            rings = self._has_woken = bool(self._folders) or self._has_lost
        if rings:
            self._wake()
        return taken


class Watcher:
    """Reports changes in a set of folders.

    Args:
        on_change: Called with each change, in the watcher's thread; it must return quickly.
        on_lost: Called when events were lost, or when no more will come: scan everything.
    """

    def __init__(self, on_change: Callable[[Change], None], on_lost: Callable[[], None]) -> None:
        self._on_change = on_change
        self._on_lost = on_lost
        self._reader: Any = None
        self._watched: dict[str, _Folder] = {}

    @property
    def available(self) -> bool:
        """Whether this system has events at all."""
        return InotifyFD is not None

    def start(self) -> None:
        """Begin to listen, for the first time or after the reader died; nothing is watched yet.

        Raises:
            OSError: The kernel has no inotify instance left for this user.
        """
        if self._reader is not None:
            with contextlib.suppress(OSError):
                self._reader.stop()  # a dead one still has its descriptors
        self._watched.clear()
        self._reader = _reader(self._on_lost)
        self._reader.start()

    def alive(self) -> bool:
        """Return whether events can still arrive."""
        return self._reader is not None and self._reader.is_alive()

    @property
    def problem(self) -> str:
        """Of what the reader died, or an empty string."""
        return self._reader.problem if self._reader is not None else ""

    def watch(self, path: str, identity: tuple[int, int], descriptor: int | None = None) -> str:
        """Watch a folder. One that was replaced by another of the same name is watched again.

        Args:
            path: The name by which its changes are reported.
            identity: Its device and inode.
            descriptor: The folder, if it is open; else it is found by its name.

        Returns:
            Why it cannot be watched, or an empty string.
        """
        known = self._watched.get(path)
        if known and known.identity == identity and not known.removed:
            return ""
        self.forget(path)
        open_one = f"/proc/self/fd/{descriptor}"
        try:
            self._add(path, identity, path if descriptor is None or not os.path.lexists(open_one) else open_one)
        except OSError as error:
            return _LIMIT if error.errno == errno.ENOSPC else error.strerror or str(error)
        return ""

    def forget(self, path: str) -> None:
        """Watch a folder no longer."""
        if folder := self._watched.pop(path, None):
            self._forget(folder)

    def forget_others(self, path: str) -> None:
        """Watch no folder but this one."""
        for other in [other for other in self._watched if other != path]:
            self.forget(other)

    def _add(self, path: str, identity: tuple[int, int], at: str) -> None:
        mask = (
            InotifyConstants.IN_ATTRIB
            | InotifyConstants.IN_CLOSE_WRITE
            | InotifyConstants.IN_MOVED_TO
            | InotifyConstants.IN_CREATE
            | InotifyConstants.IN_DELETE
            | InotifyConstants.IN_DELETE_SELF
            | InotifyConstants.IN_MOVE_SELF
            | InotifyConstants.IN_ONLYDIR
        )
        folder = _Folder(path, identity, self._on_change, self._on_lost)
        folder.descriptor = self._reader.add_callback(os.fsencode(at), Mask(mask), folder, CallbackId(id(folder)))
        if folder.descriptor == -1:  # watchdog is silent about a folder that may not be read
            self._forget(folder)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._watched[path] = folder

    def _forget(self, folder: _Folder) -> None:
        with contextlib.suppress(OSError):
            self._reader.remove_callbacks([(folder.descriptor, CallbackId(id(folder)))])

    def stop(self) -> None:
        """End the thread that reads the events, if it runs."""
        if self._reader is not None:
            self._reader.stop()
            self._reader.join(timeout=5)
            self._reader = None


def _reader(on_end: Callable[[], None]) -> Any:  # noqa: ANN401  there is no watchdog's type where there are no events
    class Reader(InotifyFD):
        """The thread that reads the events; its end is always reported."""

        problem = ""
        _pause = False
        _began = 0.0

        def read_events(self, **options: Any) -> list[Any]:  # noqa: ANN401  watchdog's own type is not public
            """Read some events, not more often than leaves the other threads their time."""
            if self._pause:
                took = time.monotonic() - self._began
                self.stopped_event.wait(min(_REST * took, _LONGEST_PAUSE_SECONDS))
            events = super().read_events(**options)
            self._pause, self._began = len(events) > _STORM, time.monotonic()
            return events

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # noqa: BLE001  the daemon lives on, and has to know
                self.problem = f"{type(error).__name__}: {error}"
            finally:
                on_end()

    return Reader()


class _Folder:
    """The callback for one watched folder, in the form that watchdog's reader calls."""

    __slots__ = ("_on_change", "_on_lost", "_path", "descriptor", "identity", "removed")

    def __init__(
        self, path: str, identity: tuple[int, int], on_change: Callable[[Change], None], on_lost: Callable[[], None]
    ) -> None:
        self._path = path
        self._on_change = on_change
        self._on_lost = on_lost
        self.identity = identity
        self.descriptor: Any = None
        self.removed = False

    def on_event(self, event: Any) -> None:  # noqa: ANN401  watchdog's own type is not public
        is_folder = event.is_directory and (event.is_create or event.is_moved_to)
        self._on_change(Change(self._path, os.fsdecode(event.name), event.is_moved_to, is_folder))

    def on_watch_deleted(self, _: Any) -> None:  # noqa: ANN401
        self.removed = True
        self._on_change(Change(self._path))

    def on_queue_overflow(self) -> None:
        self._on_lost()
