"""Looking at the inbox: the only source of truth about what is there to do.

A *sweep* lists every folder, groups the names by stem and asks ``settling`` which stems are quiet. Events of the
watcher only make a sweep come sooner. Nothing is changed here, and only the prompts that are quiet are opened.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch import prompt as prompts
from imagewatch.durable import ours
from imagewatch.errors import BadRequest, SpoolError
from imagewatch.images import inspect
from imagewatch.job import Claim
from imagewatch.names import SUFFIX, Dropped, group, near_miss
from imagewatch.request import open_plain, read_prompt
from imagewatch.settling import Settling
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config import Inbox

Key = tuple[str, str]
"""A stem: the folder below the inbox, and the stem's name."""
Look = tuple[str, int, int, int, int]
"""What a file looks like: name, inode, size, mtime and ctime; zeros when it is not there."""

_BUSY_SECONDS = 3600.0
"""Older marks of an editor or a transfer are leftovers of one that died."""
_SKIPPED_FOLDERS = (".", "~", "#", "@eaDir", "__MACOSX", "$RECYCLE.BIN")


@dataclass(frozen=True)
class Candidate:
    """A prompt that may be claimed now.

    Attributes:
        key: Folder and stem.
        images: Its input images, in the order in which they are sent.
        foreign: Siblings of a kind the endpoint does not take.
        looks: What its files looked like, the prompt first.
        changed_at: Newest ctime of its files, seconds since the epoch.
        declared: Whether the prompt names its images itself.
    """

    key: Key
    images: tuple[str, ...]
    foreign: tuple[str, ...]
    looks: tuple[Look, ...]
    changed_at: float
    declared: bool

    @property
    def source(self) -> str:
        """Path of the prompt below the inbox."""
        return os.path.join(self.key[0], self.key[1] + SUFFIX)

    def claim(self, job: str, at: float) -> Claim:
        """Return the claim for it."""
        _, _, size, mtime_ns, _ = self.looks[0]
        return Claim(
            job=job,
            folder=self.key[0],
            stem=self.key[1],
            images=self.images,
            declared=self.declared,
            foreign=self.foreign,
            size=size,
            mtime_ns=mtime_ns,
            at=at,
        )


@dataclass
class Seen:
    """What one sweep saw.

    Attributes:
        ready: What may be claimed, oldest first.
        waiting: What may not yet be, and why, by path below the inbox.
        ignored: What will not be taken, and why, by path below the inbox.
        due: Seconds until something may become ready, or None.
        folders: Every folder looked into, as paths.
    """

    ready: list[Candidate] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    due: float | None = None
    folders: list[str] = field(default_factory=list)

    def comes_due(self, seconds: float) -> None:
        """Note that something may be ready after some seconds."""
        self.due = seconds if self.due is None else min(self.due, seconds)


class Sweep:
    """Looks at an inbox, again and again.

    Args:
        inbox: The folder.
        config: Settling, waits, recursion.
    """

    def __init__(self, inbox: str, config: Inbox) -> None:
        self._inbox = inbox
        self._config = config
        self._settling = Settling(config.settle_seconds)
        self._inputs = Settling(config.settle_seconds)
        self._inputs_since: dict[Key, float] = {}
        self._arrived: set[Key] = set()

    def touch(self, key: Key, now: float) -> None:
        """Note that something happened to a stem: it has to be quiet again from now on."""
        self._settling.touch(key, now)
        self._inputs_since.pop(key, None)
        self._arrived.discard(key)

    def arrived_whole(self, key: Key, now: float) -> None:
        """Note that a prompt came by rename: if it declares its images, it need not settle."""
        self._settling.touch(key, now)
        self._inputs_since.pop(key, None)
        self._arrived.add(key)

    def look(self, now: float, wall: float) -> Seen:
        """Look at everything.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.

        Raises:
            SpoolError: The inbox itself cannot be listed.
        """
        seen = Seen()
        keys: set[Key] = set()
        for folder, names in self._folders(seen):
            for dropped in group(names).values():
                key = (folder, dropped.stem)
                keys.add(key)
                self._judge(key, dropped, seen, now, wall)
            for name in names:
                if near_miss(name):
                    seen.ignored[_join(folder, name)] = f"not a prompt: the name must end in exactly {SUFFIX}"
        self._settling.keep_only(keys, now)
        self._inputs.keep_only(keys)
        self._inputs_since = {key: since for key, since in self._inputs_since.items() if key in keys}
        self._arrived &= keys
        seen.ready.sort(key=lambda candidate: (candidate.changed_at, candidate.key))
        return seen

    def look_at(self, key: Key, now: float, wall: float) -> Candidate | None:
        """Look at one prompt that came by rename; return it if it declares its images and all are there.

        Its siblings are not listed here, so about a prompt that declares nothing only a sweep can decide.
        """
        path = _join(key[0], key[1] + SUFFIX)
        try:
            status = os.lstat(os.path.join(self._inbox, path))
        except OSError:
            return None
        names = None if self._unusable(path, status) else self._declared(path)
        if names is None:
            return None
        seen = Seen()
        self._judge_declared(key, names, seen, now, wall)
        return seen.ready[0] if seen.ready else None

    def waits_for_inputs(self) -> bool:
        """Tell whether a prompt waits for images it names, or for the end of one."""
        return bool(self._inputs_since)

    def unchanged(self, candidate: Candidate) -> bool:
        """Tell whether the files of a candidate still look as they did."""
        names = (candidate.key[1] + SUFFIX, *candidate.images, *candidate.foreign)
        return self._stat(candidate.key[0], names)[0] == candidate.looks

    # One stem

    def _judge(self, key: Key, dropped: Dropped, seen: Seen, now: float, wall: float) -> None:
        path = _join(key[0], dropped.prompt)
        try:
            status = os.lstat(os.path.join(self._inbox, path))
        except OSError:
            return
        if reason := self._unusable(path, status):
            if status.st_size == 0 and stat.S_ISREG(status.st_mode):
                seen.waiting[path] = reason
            else:
                seen.ignored[path] = reason
            return
        if busy := self._busy(key, dropped, wall):
            seen.waiting[path] = f"{printable(busy, 120)} shows that it is still being written"
            return
        looks, changed = self._stat(key[0], dropped.names)
        left = self._settling.observe(key, looks, changed_at=changed, now=now, wall=wall)
        if left > 0 and key not in self._arrived:
            self._wait(seen, path, f"quiet for {left:.1f} more seconds", left)
            return
        declared = self._declared(path)
        if declared is not None:
            self._judge_declared(key, declared, seen, now, wall)
        elif left > 0:
            self._wait(seen, path, f"quiet for {left:.1f} more seconds", left)
        else:
            images, foreign = tuple(dropped.images), tuple(dropped.foreign)
            self._take(seen, Candidate(key, images, foreign, looks, changed, declared=False))

    def _unusable(self, path: str, status: os.stat_result) -> str:
        if not stat.S_ISREG(status.st_mode):
            return "not a plain file"
        if status.st_size == 0:
            return "empty, so not ready yet"
        if not os.access(os.path.join(self._inbox, path), os.R_OK):
            return "the daemon may not read it"
        folder = os.path.dirname(path)
        if folder and not os.access(os.path.join(self._inbox, folder), os.W_OK | os.X_OK):
            return f"the daemon may not take files out of {printable(folder, 255)}"
        return ""

    def _judge_declared(self, key: Key, declared: tuple[str, ...], seen: Seen, now: float, wall: float) -> None:
        """Decide about a prompt that is quiet itself, or whole by its rename, and names its images."""
        path = _join(key[0], key[1] + SUFFIX)
        looks, changed = self._stat(key[0], (key[1] + SUFFIX, *declared))
        missing = [name for name, inode, *_ in looks[1:] if inode == 0]
        if missing:
            left = self._inputs_since.setdefault(key, now) + self._config.input_wait_seconds - now
            if left > 0:
                due = min(left, self._config.rescan_seconds)
                self._wait(seen, path, f"waits for {printable(', '.join(missing), 200)}", due)
                return
        elif key not in self._arrived or not self._all_whole(key[0], declared):
            left = self._inputs.observe(key, looks, changed_at=changed, now=now, wall=wall)
            if left > 0:
                self._inputs_since.setdefault(key, now)
                self._wait(seen, path, f"its images are quiet for {left:.1f} more seconds", left)
                return
        self._take(seen, Candidate(key, declared, (), looks, changed, declared=True))

    def _take(self, seen: Seen, candidate: Candidate) -> None:
        """Note a candidate, unless it has an image that could be neither sent nor moved to another file system."""
        for name in (*candidate.images, *candidate.foreign):
            path = os.path.join(self._inbox, candidate.key[0], name)
            if os.path.isfile(path) and not os.path.islink(path) and not os.access(path, os.R_OK):
                seen.ignored[candidate.source] = f"the daemon may not read {printable(name, 255)}"
                return
        seen.ready.append(candidate)

    def _all_whole(self, folder: str, names: tuple[str, ...]) -> bool:
        """Tell whether images are complete by their own structure, so that nobody is still writing them."""
        for name in names:
            try:
                with open_plain(os.path.join(self._inbox, folder, name), name) as file:
                    image = inspect(file)
            except (BadRequest, OSError):
                return False
            if image is None or image.problem:
                return False
        return True

    def _wait(self, seen: Seen, path: str, reason: str, seconds: float) -> None:
        seen.waiting[path] = reason
        seen.comes_due(seconds)

    def _declared(self, path: str) -> tuple[str, ...] | None:
        try:
            return prompts.declared(read_prompt(os.path.join(self._inbox, path)))
        except BadRequest:
            return None

    def _busy(self, key: Key, dropped: Dropped, wall: float) -> str:
        for name in dropped.busy:
            with contextlib.suppress(OSError):
                if wall - os.lstat(os.path.join(self._inbox, key[0], name)).st_ctime < _BUSY_SECONDS:
                    return name
        return ""

    def _stat(self, folder: str, names: tuple[str, ...]) -> tuple[tuple[Look, ...], float]:
        """Return what files look like, and their newest ctime in seconds since the epoch."""
        looks: list[Look] = []
        newest = 0.0
        for name in names:
            try:
                status = os.lstat(os.path.join(self._inbox, folder, name))
            except OSError:
                looks.append((name, 0, 0, 0, 0))
                continue
            looks.append((name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
            newest = max(newest, status.st_ctime)
        return tuple(looks), newest

    # All folders

    def _folders(self, seen: Seen) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder below the inbox (the inbox itself is ``""``) and the names of its files."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            path = os.path.join(self._inbox, folder) if folder else self._inbox
            names: list[str] = []
            try:
                with ours(path, "list the folder"), os.scandir(path) as entries:
                    for entry in entries:
                        if not entry.is_dir(follow_symlinks=False):
                            names.append(entry.name)
                        elif self._config.recursive and not entry.name.startswith(_SKIPPED_FOLDERS):
                            waiting.append(_join(folder, entry.name))
            except SpoolError as error:
                if not folder:
                    raise
                seen.ignored[folder] = str(error)
                continue
            seen.folders.append(path)
            yield folder, names


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
