"""The files of prompts on the disk: whether they are there, who writes them, and which images a prompt names."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.inbox.open_files import has_writer
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.images import inspect
from imagewatch.protocol.names import SUFFIX, Siblings, spellings
from imagewatch.protocol.request import may_be_image, read_prompt
from imagewatch.system.errors import BadRequest
from imagewatch.system.folders import is_private
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.config.schema import Inbox
    from imagewatch.inbox.candidate import Candidate, FileState, Found
    from imagewatch.inbox.folder import Folder
    from imagewatch.inbox.tree import Folders

_BUSY_SECONDS = 3600.0
"""Older marks of an editor or a transfer are leftovers of one that died."""
_JUMP_SECONDS = 1.0
"""If the wall clock advances by so much more than the other one, it was set, or the machine was suspended."""
_MOST_JUMPS = 20
_MOST_READ = 200
"""So many other prompts are read to find out whether a file is theirs."""
_LARGE_BYTES = 64 << 20
"""A larger image has to settle like others: reading it here would delay everything else."""


@dataclass(slots=True)
class Moment:
    """The present, as the caller has set it.

    Attributes:
        now: Monotonic time, seconds.
        wall: Wall-clock time, seconds since the epoch.
        clock: Returns the monotonic time; None: it is ``now``.
        jumps: When the wall clock advanced by more than the monotonic one, and by how much, seconds; the newest ones.
    """

    now: float = 0.0
    wall: float = 0.0
    clock: Callable[[], float] | None = None
    jumps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_MOST_JUMPS))

    def set(self, now: float, wall: float) -> None:
        """Set the present.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.
        """
        jump = (wall - self.wall) - (now - self.now)
        if self.now and jump > _JUMP_SECONDS:
            self.jumps.append((wall, jump))
        self.now, self.wall = now, wall

    def after_look(self) -> float:
        """Return the monotonic time after something was looked at: it may have changed meanwhile."""
        return self.now if self.clock is None else self.clock()

    def since(self, changed: float) -> float:
        """Return since when a file is unchanged, as if the wall clock had never been set forward.

        Args:
            changed: Its date, seconds since the epoch.
        """
        return changed + sum(jump for at, jump in self.jumps if changed < at)


class PromptFiles:
    """Reads the files of prompts. Nothing is changed.

    Args:
        folders: What is known of the inbox.
        config: Settling, waits.
        moment: The present.
        blocked: Returns for a folder below the inbox why nothing can be put where its results go, or an empty string.

    Attributes:
        opener: Opens a file of the inbox.
    """

    def __init__(self, folders: Folders, config: Inbox, moment: Moment, blocked: Callable[[str], str]) -> None:
        self._folders = folders
        self._tops = folders.tops
        self._config = config
        self._moment = moment
        self._blocked = blocked
        self.opener = functools.partial(open_file, tops=self._tops)

    def states(self, folder: str, names: Iterable[str]) -> tuple[tuple[FileState, ...], float]:
        """Return the states of files, and their newest ctime in seconds since the epoch."""
        states: list[FileState] = []
        newest = 0.0
        try:
            above = self._tops.folder(self._folders.full(folder))
        except OSError:
            return tuple((name, 0, 0, 0, 0) for name in names), newest
        for name in names:
            try:
                status = os.stat(name, dir_fd=above.fileno(), follow_symlinks=False)
            except OSError:
                states.append((name, 0, 0, 0, 0))
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1  # what has no size will not get one either
            states.append((name, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns))
            newest = max(newest, status.st_ctime)
        return tuple(states), newest

    def is_there(self, folder: str, name: str) -> bool:
        """Return whether anything has a name."""
        return self._tops.exists(self._folders.full(path_of(folder, name)))

    def busy(self, folder: Folder, names: Siblings, found: Found) -> str:
        """Return a mark that shows that a program is at work on a prompt, if it is not a leftover."""
        now, wall = self._moment.now, self._moment.wall
        for name in names.busy:
            try:
                changed = self._tops.lstat(self._folders.full(path_of(folder.path, name))).st_ctime
            except OSError:
                # It has just become what it stood for, which the list of names does not show yet.
                found.comes_due(now + self._config.settle_seconds)
                return name
            # Both by its date and by our own observation: dates may be in the future.
            seen_at = folder.noted(self._config.settle_seconds).marks.setdefault(name, now)
            if max(wall - self._moment.since(changed), now - seen_at) < _BUSY_SECONDS:
                return name
        return ""

    def is_arriving(self, folder: str, name: str) -> bool | None:
        """Return whether a transfer may still give a file its name; None if the file is not there."""
        with contextlib.suppress(OSError):
            changed = self._tops.lstat(self._folders.full(path_of(folder, name))).st_ctime
            return self._moment.wall - self._moment.since(changed) < _BUSY_SECONDS
        return None

    def declared(self, folder: Folder, stem: str, state: FileState) -> tuple[str, ...] | None:
        """Return which images a prompt names, or None; it is read again only if its state differs.

        Raises:
            BadRequest: It cannot be read, which may pass and is not remembered.
        """
        read = folder.noted(self._config.settle_seconds).read
        known = read.get(stem)
        if known is None or known[0] != state:
            path = self._folders.full(path_of(folder.path, stem + SUFFIX))
            known = read[stem] = (state, prompts.declared(read_prompt(path, self.opener)))
        return known[1]

    def names_images(self, folder: Folder, stem: str, state: FileState) -> bool:
        """Return whether a prompt is known to name its images."""
        with contextlib.suppress(BadRequest):
            return self.declared(folder, stem, state) is not None
        return False

    def named_by_others(self, folder: Folder, stem: str) -> set[str]:
        """Return the files that other prompts of the folder name as their images; of very many some are read."""
        read = folder.noted(self._config.settle_seconds).read
        known = itertools.chain((other for _, other in folder.oldest or ()), folder.unsettled)
        for other in [other for other in itertools.islice(known, _MOST_READ) if other not in read]:
            (state,), _ = self.states(folder.path, (other + SUFFIX,))
            if state[2] > 0:
                self.names_images(folder, other, state)
        return {name for other, (_, names) in read.items() if other != stem for name in names or ()}

    def may_be_image(self, folder: str, name: str) -> bool:
        """Return whether a file may be meant as an image. It is opened if its name does not show it."""
        path = self._folders.full(path_of(folder, name))
        try:
            return may_be_image(path, self._tops.lstat(path), self.opener)
        except OSError:
            return False  # removed

    def spelled(self, folder: str, name: str) -> str:
        """Return a name as the folder has it: two ways to compose an accent are the same for the user who typed it."""
        ways = () if name.isascii() else spellings(name)
        return next((way for way in ways if self.is_there(folder, way)), name)

    def unusable(self, folder: str, name: str) -> str:
        """Return why a file cannot be sent, or why none can be taken out of a folder (then there is no name)."""
        full = self._folders.full(path_of(folder, name) if name else folder)
        if not name and not folder:
            return ""
        with contextlib.suppress(OSError):
            place = self._tops.at(full)
            if not name:
                usable = os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd)
                return self._blocked(folder) if usable else "the daemon may not move files out of"
            status = place.lstat()
            if stat.S_ISREG(status.st_mode) and not os.access(place.name, os.R_OK, dir_fd=place.dir_fd):
                return "the daemon may not read"
            above = self._tops.folder(os.path.dirname(full)).status()
            if is_private(status, above):
                return "a hard link to a private file:"
            if _is_kept(status, above):
                return "because of the sticky bit of the folder, the daemon may not move"
        return ""

    def writer(self, candidate: Candidate) -> str:
        """Return a file of a candidate that a program has open for writing; it is not waited for without end."""
        if self._moment.wall - self._moment.since(candidate.changed_at) >= _BUSY_SECONDS:
            return ""
        folder = self._folders.full(candidate.folder)
        return next((name for name in candidate.names if has_writer(os.path.join(folder, name), self.opener)), "")

    def all_whole(self, folder: str, names: tuple[str, ...]) -> bool:
        """Return whether images are complete by their own structure, so that no program is still writing them."""
        for name in names:
            try:
                with self.opener(self._folders.full(path_of(folder, name))) as file:
                    image = inspect(file) if os.fstat(file.fileno()).st_size <= _LARGE_BYTES else None
            except OSError:
                return False
            if image is None or image.problem:
                return False
        return True


def _is_kept(status: os.stat_result, folder: os.stat_result) -> bool:
    """Return whether a file may not be taken out of its folder because it is another user's, as in ``/tmp``."""
    user = os.geteuid()
    return bool(folder.st_mode & stat.S_ISVTX) and user not in {0, status.st_uid, folder.st_uid}


def path_of(folder: str, name: str) -> str:
    """Return the path below the inbox of a name in a folder."""
    return f"{folder}/{name}" if folder else name
