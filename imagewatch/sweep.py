"""Looking at the inbox: the only source of truth about what is there to do.

A *sweep* lists every folder, groups the names by stem and asks ``settling`` which stems are quiet. Events of the
watcher only make a sweep come sooner. Nothing is changed here, and only files that are quiet are opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch import prompt as prompts
from imagewatch.durable import ours
from imagewatch.errors import BadRequest, SpoolError
from imagewatch.images import inspect
from imagewatch.job import Claim
from imagewatch.names import SKIPPED_FOLDERS, SUFFIX, Dropped, group, in_flight, locks, near_miss, spellings
from imagewatch.request import open_plain, read_prompt
from imagewatch.settling import Settling
from imagewatch.text import printable
from imagewatch.writers import has_writer, is_local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config import Inbox

Key = tuple[str, str]
"""A stem: the folder below the inbox, and the stem's name."""
Look = tuple[str, int, int, int, int]
"""What a file looks like: name, inode, size, mtime and ctime; zeros when it is not there."""

_BUSY_SECONDS = 3600.0
"""Older marks of an editor or a transfer are leftovers of one that died."""
_SKEW_SECONDS = 60.0
"""How far the clock of a file server may be behind ours."""


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

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its files, the prompt first."""
        return (self.key[1] + SUFFIX, *self.images, *self.foreign)

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
        self._wall = 0.0
        self._skew = 0.0 if is_local(inbox) else _SKEW_SECONDS

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
        self._wall = wall
        keys: set[Key] = set()
        for folder, names in self._folders(seen):
            for dropped in group(names).values():
                key = (folder, dropped.stem)
                keys.add(key)
                self._judge(key, dropped, seen, now, wall)
            for name in filter(near_miss, names):
                self._refuse(folder, name, seen)
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
        self._wall = wall
        beside = os.path.join(self._inbox, key[0])
        if any(os.path.lexists(os.path.join(beside, lock)) for lock in locks(key[1] + SUFFIX)):
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
        """Tell whether the files of a candidate still look as they did, and nobody has begun to write."""
        return self._stat(candidate.key[0], candidate.names)[0] == candidate.looks and not self._writer(candidate)

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
        if busy := self._busy(key, dropped, seen, wall):
            seen.waiting[path] = f"{printable(busy, 120)} shows that it is still being written"
            return
        # A transfer that died left an image unfinished: without it the prompt is refused, not bought without it.
        images, foreign = (*dropped.images, *dropped.coming), tuple(dropped.foreign)
        looks, changed = self._stat(key[0], (dropped.prompt, *images, *foreign))
        left = self._settling.observe(key, looks, changed_at=changed + self._skew, now=now, wall=wall)
        if left > 0 and key not in self._arrived:
            self._wait(seen, path, f"quiet for {left:.1f} more seconds", left)
            return
        declared = self._declared(path)
        if declared is not None:
            self._judge_declared(key, declared, seen, now, wall)
        elif left > 0:
            self._wait(seen, path, f"quiet for {left:.1f} more seconds", left)
        elif not self._waits_for(key, _missing(looks), seen, now):
            for name in dropped.doubtful:
                reason = f"no image of {dropped.prompt}, whose images are {dropped.stem}.png, {dropped.stem}.1.png, …"
                seen.ignored[_join(key[0], name)] = printable(reason, 600)
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
        declared = tuple(self._spelled(key[0], name) for name in declared)
        looks, changed = self._stat(key[0], (key[1] + SUFFIX, *declared))
        if missing := _missing(looks):
            if self._waits_for(key, missing, seen, now):
                return
        elif key not in self._arrived or not self._all_whole(key[0], declared):
            left = self._inputs.observe(key, looks, changed_at=changed + self._skew, now=now, wall=wall)
            if left > 0:
                self._inputs_since.setdefault(key, now)
                self._wait(seen, path, f"its images are quiet for {left:.1f} more seconds", left)
                return
        self._take(seen, Candidate(key, declared, (), looks, changed, declared=True))

    def _spelled(self, folder: str, name: str) -> str:
        """Return a name as the folder has it: two ways to compose an accent look the same to whoever typed it."""
        for spelled in () if name.isascii() else spellings(name):
            if os.path.lexists(os.path.join(self._inbox, folder, spelled)):
                return spelled
        return name

    def _waits_for(self, key: Key, missing: list[str], seen: Seen, now: float) -> bool:
        """Wait for images that are not there or still empty, but not for ever."""
        if not missing:
            return False
        left = self._inputs_since.setdefault(key, now) + self._config.input_wait_seconds - now
        if left > 0:
            due = min(left, self._config.rescan_seconds)
            self._wait(seen, _join(key[0], key[1] + SUFFIX), f"waits for {printable(', '.join(missing), 200)}", due)
        return left > 0

    def _take(self, seen: Seen, candidate: Candidate) -> None:
        """Note a candidate, unless somebody writes it or an image could be neither sent nor moved elsewhere."""
        for name in (*candidate.images, *candidate.foreign):
            path = os.path.join(self._inbox, candidate.key[0], name)
            if os.path.isfile(path) and not os.path.islink(path) and not os.access(path, os.R_OK):
                seen.ignored[candidate.source] = f"the daemon may not read {printable(name, 255)}"
                return
        if writer := self._writer(candidate):
            seen.waiting[candidate.source] = f"{printable(writer, 120)} is open for writing"
        else:
            seen.ready.append(candidate)

    def _writer(self, candidate: Candidate) -> str:
        """Return a file of a candidate that somebody has open for writing; nobody can hold it for ever."""
        if self._wall - candidate.changed_at >= _BUSY_SECONDS:
            return ""
        folder = os.path.join(self._inbox, candidate.key[0])
        return next((name for name in candidate.names if has_writer(os.path.join(folder, name))), "")

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

    def _busy(self, key: Key, dropped: Dropped, seen: Seen, wall: float) -> str:
        for name in dropped.busy:
            try:
                changed = os.lstat(os.path.join(self._inbox, key[0], name)).st_ctime
            except OSError:
                # It has just become what it stood for, which the list of names does not show yet.
                seen.comes_due(self._config.settle_seconds)
                return name
            if wall - changed < _BUSY_SECONDS:
                return name
        return ""

    def _refuse(self, folder: str, name: str, seen: Seen) -> None:
        """Say why something is not taken that may have been meant to be."""
        path = _join(folder, name)
        if in_flight(name) is None:
            rule = f"must end in exactly {SUFFIX}" if not name.endswith(SUFFIX) else "must not begin with ., ~ or #"
            seen.ignored[path] = f"not a prompt: the name {rule}"
            return
        try:
            changed = os.lstat(os.path.join(self._inbox, path)).st_ctime
        except OSError:
            return
        if self._wall - changed < _BUSY_SECONDS:
            seen.waiting[path] = "is on its way: a transfer has not given it its name yet"
        else:
            seen.ignored[path] = "an unfinished transfer: rename it, or send it again"

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
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1  # what has no size will not get one either
            looks.append((name, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns))
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
                        inner = _join(folder, entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            if self._enters(inner, entry.name, seen):
                                waiting.append(inner)
                            continue
                        names.append(entry.name)
                        if entry.is_symlink() and not entry.name.startswith("."):
                            seen.ignored[inner] = "a link, which is not followed"
            except SpoolError as error:
                if not folder:
                    raise
                seen.ignored[folder] = str(error)
                continue
            seen.folders.append(path)
            yield folder, names

    def _enters(self, path: str, name: str, seen: Seen) -> bool:
        if name.startswith(SKIPPED_FOLDERS):
            return False
        if not self._config.recursive:
            seen.ignored[path] = "a folder, and inbox.recursive is off"
        elif name.startswith(("~", "#")):
            seen.ignored[path] = "a folder whose name begins with ~ or #"
        else:
            return True
        return False


def _missing(looks: tuple[Look, ...]) -> list[str]:
    """Return the images that are not there, or still empty: browsers and copies make the name first."""
    return [name for name, _, size, *_ in looks[1:] if size == 0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
