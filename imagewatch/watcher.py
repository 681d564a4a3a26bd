"""Change events of the kernel, as hints. The only module that knows ``watchdog``.

It uses watchdog's inotify reader itself and not its ``Observer``: the observer pairs the two halves of a rename and
for that holds every event back for up to half a second once files are moved out of a watched folder, which a
daemon that claims by rename does all the time (``docs/decisions.md``). The reader's callback also tells when the
kernel's queue overflowed, which no observer does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

try:
    from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyFD, Mask
except (ImportError, OSError):  # not Linux: sweeps alone do the work
    InotifyFD = None  # type: ignore[assignment,misc]

_LIMIT = "the limit of watches is reached (fs.inotify.max_user_watches)"


class Watcher:
    """Tells of changes in a set of folders.

    Args:
        on_change: Called with the folder, the file name (empty: the folder itself, or a folder in it) and whether it
            came by rename, in the watcher's thread; it must only post a message.
        on_lost: Called when events were lost, or when no more will come: look at everything.
    """

    def __init__(self, on_change: Callable[[str, str, bool], None], on_lost: Callable[[], None]) -> None:
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
        """Tell whether events can still arrive."""
        return self._reader is not None and self._reader.is_alive()

    @property
    def problem(self) -> str:
        """Of what the reader died, or an empty string."""
        return self._reader.problem if self._reader is not None else ""

    def watch(self, folders: Iterable[str]) -> tuple[bool, dict[str, str]]:
        """Watch exactly these folders.

        A folder that was replaced by another of the same name is watched anew.

        Returns:
            Whether a folder was added; and which could not be, and why.
        """
        wanted = {}
        for path in folders:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                wanted[path] = (status.st_dev, status.st_ino)
        for path, folder in list(self._watched.items()):
            if wanted.get(path) != folder.identity or folder.gone:
                self._drop(path)
        problems, added = {}, False
        for path, identity in wanted.items():
            if path not in self._watched:
                try:
                    self._add(path, identity)
                    added = True
                except OSError as error:
                    problems[path] = _LIMIT if error.errno == errno.ENOSPC else error.strerror or str(error)
        return added, problems

    def _add(self, path: str, identity: tuple[int, int]) -> None:
        mask = (
            InotifyConstants.IN_CLOSE_WRITE
            | InotifyConstants.IN_MOVED_TO
            | InotifyConstants.IN_CREATE
            | InotifyConstants.IN_DELETE
            | InotifyConstants.IN_DELETE_SELF
            | InotifyConstants.IN_MOVE_SELF
            | InotifyConstants.IN_ONLYDIR
        )
        folder = _Folder(path, identity, self._on_change, self._on_lost)
        folder.descriptor = self._reader.add_callback(os.fsencode(path), Mask(mask), folder, CallbackId(id(folder)))
        if folder.descriptor == -1:  # watchdog is silent about a folder that may not be read
            self._forget(folder)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._watched[path] = folder

    def _drop(self, path: str) -> None:
        self._forget(self._watched.pop(path))

    def _forget(self, folder: _Folder) -> None:
        with contextlib.suppress(OSError):
            self._reader.remove_callbacks([(folder.descriptor, CallbackId(id(folder)))])

    def stop(self) -> None:
        """Stop listening."""
        if self._reader is not None:
            self._reader.stop()
            self._reader.join(timeout=5)
            self._reader = None


def _reader(on_end: Callable[[], None]) -> Any:  # noqa: ANN401  there is no watchdog's type where there are no events
    class Reader(InotifyFD):
        """The thread that reads the events; whatever ends it is told at once."""

        problem = ""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # noqa: BLE001  the daemon lives on, and has to know
                self.problem = f"{type(error).__name__}: {error}"
            finally:
                on_end()

    return Reader()


class _Folder:
    """The callback for one watched folder, as watchdog's reader wants it."""

    def __init__(
        self,
        path: str,
        identity: tuple[int, int],
        on_change: Callable[[str, str, bool], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._path = path
        self._on_change = on_change
        self._on_lost = on_lost
        self.identity = identity
        self.descriptor: Any = None
        self.gone = False

    def on_event(self, event: Any) -> None:  # noqa: ANN401  watchdog's own type is not public
        if not event.name or (event.is_directory and (event.is_create or event.is_moved_to)):
            self._look_soon()
        else:
            self._on_change(self._path, os.fsdecode(event.name), event.is_moved_to)

    def on_watch_deleted(self, _: Any) -> None:  # noqa: ANN401
        self.gone = True
        self._look_soon()

    def _look_soon(self) -> None:
        self._on_change(self._path, "", False)  # noqa: FBT003  the signature is ours

    def on_queue_overflow(self) -> None:
        self._on_lost()
