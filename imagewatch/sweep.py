"""Looking at the inbox: the only source of truth about what is there to do.

A *sweep* brings the names of all folders up to date, asks ``settling`` which stems are quiet, and puts the settled ones
into a queue, oldest first. Events of the watcher only make a sweep come sooner. Nothing is changed here.

Of a settled prompt only its name and the newest ctime of its files are kept. What else there is to know is looked up
when its turn comes: whether its files are still the same, whether they can be read, and which images it names. A
rewrite in place that no event told of is found then, and the prompt has to be quiet again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

from imagewatch import prompt as prompts
from imagewatch.errors import BadRequest
from imagewatch.images import inspect
from imagewatch.listing import Folder, Folders, Visitor
from imagewatch.names import SUFFIX, Dropped, locks, spellings
from imagewatch.request import read_prompt
from imagewatch.seen import Candidate, Key, Look, Reasons, Seen, Wait
from imagewatch.settling import Settling
from imagewatch.text import printable
from imagewatch.untrusted import is_private, open_file
from imagewatch.writers import has_writer, is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from imagewatch.config import Inbox
    from imagewatch.folders import Tops

_BUSY_SECONDS = 3600.0
"""Older marks of an editor or a transfer are leftovers of one that died."""
_SKEW_SECONDS = 60.0
"""How far the clock of a file server may be behind ours."""
_LARGE_BYTES = 64 << 20
"""A larger image has to be quiet like others: to read it through here would hold up everybody."""


class Sweep:
    """Looks at an inbox, again and again.

    Args:
        inbox: The folder.
        config: Settling, waits, recursion.
        keeps_times: Tells of a folder whether it is sure to have the same names in it as long as it looks the same.
        is_local: Tells of a folder whether its times are of our own clock.
        window: How many prompts are kept by name, the oldest ones; the names of the others are read again when their
            turn comes. None for all.
        most_named: How many files are named in ``waiting`` and in ``ignored``; None for all.
        explain: Whether a reason is given for each file and folder, also for those that nobody takes for a prompt.
        blocked: Tells of a folder below the inbox why nothing can be put where its results go, or an empty string.
        tops: The folders that were opened, the inbox among them; without, it is opened here.

    Attributes:
        opener: Opens a file of the inbox.
    """

    def __init__(  # noqa: PLR0913  what a daemon, a command and a test ask for
        self,
        inbox: str,
        config: Inbox,
        *,
        keeps_times: Callable[[str], bool] = lambda _: False,
        is_local: Callable[[str], bool] = is_local,
        window: int | None = None,
        most_named: int | None = None,
        explain: bool = False,
        blocked: Callable[[str], str] = lambda _: "",
        tops: Tops | None = None,
    ) -> None:
        self._config = config
        self._blocked = blocked
        self._most_named = most_named
        self._folders = Folders(
            inbox,
            recursive=config.recursive,
            keeps_times=keeps_times,
            is_local=is_local,
            most_named=most_named,
            explain=explain,
            tops=tops,
        )
        self._tops = self._folders.tops
        self.opener = functools.partial(open_file, tops=self._tops)
        self._settling = Settling(config.settle_seconds)
        self._inputs = Settling(config.settle_seconds)
        self._inputs_since: dict[Key, float] = {}
        self._marks: dict[str, float] = {}
        self._arrived: set[Key] = set()
        self._held_back: dict[Key, float] = {}
        self._read: dict[Key, tuple[Look, tuple[str, ...] | None]] = {}
        self._seen, self._wall = Seen(), 0.0
        # The oldest settled prompts, in order: all up to the horizon, none beyond it.
        self._size = window
        self._window: list[tuple[float, Key]] = []
        self._horizon: tuple[float, Key] | None = None
        self._next = 0

    # Events

    def touch(self, key: Key, now: float) -> None:
        """Note that something happened to a stem: it has to be quiet again from now on."""
        self._settling.touch(key, now)
        self._inputs_since.pop(key, None)
        self._arrived.discard(key)
        self._held_back.pop(key, None)
        if folder := self._folders.get(key[0]):
            folder.unsettle(key[1])
        self._folders.changed = True

    def arrived_whole(self, key: Key, now: float) -> None:
        """Note that a prompt came by rename: if it declares its images, it need not settle."""
        self.touch(key, now)
        self._arrived.add(key)

    def taken(self, key: Key) -> None:
        """Note that a prompt is being claimed; it is found again if it is still there when its job is over."""
        self._forget(key)
        self._folders.changed = True

    def owner(self, folder: str, name: str) -> Key | None:
        """Return the stem to which a file belongs that is no prompt, or None."""
        known = self._folders.get(folder)
        stem = known.beside.owner(name) if known else None
        return None if stem is None else (folder, stem)

    def waits_for_inputs(self) -> bool:
        """Tell whether a prompt waits for images it names, or for the end of one."""
        return bool(self._inputs_since)

    def named(self) -> set[str]:
        """Return the paths below the inbox of all images that the prompts it has opened name."""
        return {_join(key[0], name) for key, (_, names) in self._read.items() for name in names or ()}

    # Looking

    def look(self, now: float, wall: float, most: int | None = None, taken: Collection[Key | None] = ()) -> Seen:
        """Look at everything.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.
            most: How many prompts are made ready at once; ``more`` gives the others. None for all.
            taken: Stems of which a job is not over; a prompt of that name waits.

        Returns:
            What was seen; the same as the last time if nothing can be different.

        Raises:
            SpoolError: The inbox itself cannot be listed.
        """
        seen = Seen(Reasons(self._most_named), Reasons(self._most_named))
        self._wall = wall
        if refill := self.runs_low():
            self._window, self._horizon = [], None
        observe = functools.partial(self._observe, seen, now)
        self._folders.look(seen, now, Visitor(observe, self._offer if refill else None, taken))
        self._settling.forget_others(now)
        unsettled = any(folder.unsettled for folder in self._folders)
        arriving = self._arriving(seen)
        if not (self._folders.changed or unsettled or self._held_back or arriving):
            return self._seen
        self._seen, self._folders.changed = seen, False
        self._cut_window()
        self._held_back.clear()
        seen.ready = self.more(now, wall, most)
        self._forget_others()
        return seen

    def more(self, now: float, wall: float, most: int | None = None) -> list[Candidate]:
        """Return the next prompts of the queue that may be claimed, oldest first.

        Args:
            now: Monotonic time, seconds.
            wall: Wall-clock time, seconds since the epoch.
            most: How many at most; None for all.
        """
        self._wall = wall
        ready: list[Candidate] = []
        while self._next < len(self._window) and (most is None or len(ready) < most):
            changed, key = self._window[self._next]
            self._next += 1
            folder = self._folders.get(key[0])
            if folder and folder.settled.get(key[1]) == changed:
                candidate = self._judge(key, folder, now)
                if candidate is not None:
                    ready.append(candidate)
        return ready

    def look_at(self, key: Key, now: float, wall: float) -> Candidate | None:
        """Look at one prompt that came by rename; return it if it declares its images and all are there.

        Its siblings are not listed here, so about a prompt that declares nothing only a sweep can decide.
        """
        self._wall = wall
        (look,), changed = self._stat(key[0], (key[1] + SUFFIX,))
        if look[2] <= 0 or any(self._lies_there(key[0], lock) for lock in locks(key[1] + SUFFIX)):
            return None
        if not self._names_images(key, look):
            self._arrived.discard(key)
            self._read.pop(key, None)
            return None
        folder = self._folders.add(key[0])
        self._settle(folder, key[1], changed)
        return self._judge(key, folder, now)

    def unchanged(self, candidate: Candidate) -> bool:
        """Tell whether the files of a candidate still look as they did, and nobody has begun to write."""
        if not self._folders.is_real(candidate.key[0]) or self._writer(candidate):
            return False
        return self._stat(candidate.key[0], candidate.names)[0] == candidate.looks

    # Counting

    def count(self) -> int:
        """Return how many prompts are settled and wait for nothing else, as far as is known."""
        return max(sum(len(folder.settled) for folder in self._folders) - len(self._held_back), 0)

    def arrived(self) -> dict[str, float]:
        """Return the newest ctime of each prompt in the window, seconds since the epoch, by path below the inbox."""
        return {
            _join(path, stem + SUFFIX): at for at, (path, stem) in self._window if self._settled((path, stem)) == at
        }

    # The window

    def runs_low(self) -> bool:
        """Tell whether a look is needed to learn the names of the next prompts."""
        if self._horizon is None or self._size is None:
            return False
        return len(self._window) - self._next < self._size // 4

    def _offer(self, changed: float, key: Key) -> None:
        """Put a settled prompt into the window, unless there are enough older ones."""
        entry = (changed, key)
        if self._horizon is None or entry < self._horizon:
            self._window.append(entry)
            if self._size is not None and len(self._window) > 2 * (self._size + len(self._held_back)):
                self._cut_window()

    def _cut_window(self) -> None:
        """Put the window in order; take out what is not settled any more, and what is too much."""
        self._window = sorted({(at, key) for at, key in self._window if self._settled(key) == at})
        self._next = 0
        if self._size is not None and len(self._window) > (size := self._size + len(self._held_back)):
            self._horizon = self._window[size]
            del self._window[size:]

    # One stem that is not settled

    def _observe(self, seen: Seen, now: float, folder: Folder, stem: str, descriptor: int) -> bool:
        """Look at a stem that is not settled; tell whether it is now."""
        key, path = (folder.path, stem), _join(folder.path, stem + SUFFIX)
        try:
            status = os.lstat(stem + SUFFIX, dir_fd=descriptor)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode):
            seen.ignored.add(path, "not a plain file")
            return False
        if not status.st_size:
            seen.waiting.add(path, Wait.EMPTY)
            return False
        changed = status.st_ctime
        look = hash((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        if folder.beside.has(stem):
            names = folder.beside.of(stem)
            if busy := self._busy(folder.path, names, seen, now):
                reason = f"{printable(busy, 120)} shows that it is still being written"
                seen.waiting.add(path, Wait.WRITING, reason)
                return False
            looks, changed = self._stat(folder.path, _all_names(names))
            look = hash(looks)
        skewed = changed if folder.is_local else changed + _SKEW_SECONDS
        left = self._settling.observe(key, look, changed_at=skewed, now=now, wall=self._wall)
        if left <= 0 or self._is_whole(key):
            self._settle(folder, stem, changed)
            return True
        seen.wait(path, Wait.SETTLING, f"will be taken after {left:.1f} more quiet seconds", left)
        return False

    def _settle(self, folder: Folder, stem: str, changed: float) -> None:
        folder.settle(stem, changed)
        self._offer(changed, (folder.path, stem))
        self._folders.changed = True

    def _is_whole(self, key: Key) -> bool:
        """Tell whether a prompt came by rename and names its images, so that it need not settle."""
        if key not in self._arrived:
            return False
        (look,), _ = self._stat(key[0], (key[1] + SUFFIX,))
        return self._names_images(key, look)

    def _busy(self, folder: str, names: Dropped, seen: Seen, now: float) -> str:
        """Return a mark that shows that somebody is at work, if it is not a leftover."""
        for name in names.busy:
            path = self._folders.full(_join(folder, name))
            try:
                changed = self._tops.lstat(path).st_ctime
            except OSError:
                # It has just become what it stood for, which the list of names does not show yet.
                seen.comes_due(self._config.settle_seconds)
                return name
            # Both by its date and by our own observation: dates may lie in the future.
            if max(self._wall - changed, now - self._marks.setdefault(path, now)) < _BUSY_SECONDS:
                return name
        return ""

    def _arriving(self, seen: Seen) -> bool:
        """Say what may become a prompt when its transfer gives it its name; tell whether there is anything like it."""
        found = [_join(folder.path, name) for folder in self._folders for name in folder.arriving]
        for path in found:
            with contextlib.suppress(OSError):
                if self._wall - self._tops.lstat(self._folders.full(path)).st_ctime < _BUSY_SECONDS:
                    seen.waiting.add(path, Wait.ARRIVING)
                else:
                    seen.ignored.add(path, "an unfinished transfer: rename it, or send it again")
        return bool(found)

    # One stem that is settled

    def _judge(self, key: Key, folder: Folder, now: float) -> Candidate | None:
        """Look at a settled prompt whose turn has come; tell why if it cannot be taken."""
        names = folder.beside.of(key[1])
        looks, changed = self._stat(key[0], _all_names(names))
        if not looks[0][1] or looks[0][2] < 0:  # gone, or no plain file any more
            self._forget(key)
            return None
        try:
            declared = self._declared(key, looks[0])
        except BadRequest as error:
            self._unread(key, names.prompt, error, now)
            return None
        whole = declared is not None and key in self._arrived
        if not whole and self._is_disturbed(folder, names, changed, now):
            return None
        if declared is not None:
            return self._judge_declared(key, declared, now)
        # A transfer that died left an image unfinished: without it the prompt is refused, not bought without it.
        images, foreign = (*names.images, *names.coming), tuple(names.foreign)
        if self._waits_for(key, _missing(looks), now):
            return None
        for name in names.doubtful:
            reason = f"no image of {names.prompt}, whose images are {names.stem}.png, {names.stem}.1.png, …"
            self._seen.ignored.add(_join(key[0], name), "no image of its prompt", printable(reason, 600))
        return self._take(Candidate(key, images, foreign, looks, changed, declared=False))

    def _unread(self, key: Key, prompt: str, error: BadRequest, now: float) -> None:
        """Let a prompt wait that cannot be read: nobody knows which images it names."""
        self._hold_back(key)
        path, reason = _join(key[0], prompt), printable(str(error), 300)
        left = self._inputs_since.setdefault(key, now) + self._config.input_wait_seconds - now
        if problem := self._unusable(key[0], prompt):
            self._seen.ignored.add(path, problem, f"{problem} it")
        elif left > 0:
            self._seen.wait(path, Wait.UNREADABLE, reason, min(left, self._config.rescan_seconds))
        else:  # whoever looks again sees whether it can be read; nobody waits for that
            self._seen.waiting.add(path, Wait.UNREADABLE, reason)

    def _is_disturbed(self, folder: Folder, names: Dropped, changed: float, now: float) -> bool:
        """Tell whether a prompt is not what it was when it was found to be quiet; then it has to be quiet again."""
        if self._busy(folder.path, names, self._seen, now):
            kind, reason = Wait.WRITING, "is being written again"
        elif changed != folder.settled.get(names.stem) and self._config.settle_seconds:
            kind, reason = Wait.SETTLING, "was changed, so it has to be quiet again"
        else:
            return False
        self._settling.touch((folder.path, names.stem), now)
        folder.unsettle(names.stem)
        self._seen.wait(_join(folder.path, names.prompt), kind, reason, self._config.settle_seconds)
        return True

    def _judge_declared(self, key: Key, declared: tuple[str, ...], now: float) -> Candidate | None:
        """Decide about a prompt that is quiet itself, or whole by its rename, and names its images."""
        path, folder = _join(key[0], key[1] + SUFFIX), self._folders.add(key[0])
        declared = tuple(self._spelled(key[0], name) for name in declared)
        looks, changed = self._stat(key[0], (key[1] + SUFFIX, *declared))
        if missing := _missing(looks):
            if self._waits_for(key, missing, now):
                return None
        elif key not in self._arrived or not self._all_whole(key[0], declared):
            skewed = changed if folder.is_local else changed + _SKEW_SECONDS
            left = self._inputs.observe(key, hash(looks), changed_at=skewed, now=now, wall=self._wall)
            if left > 0:
                self._hold_back(key)
                self._inputs_since.setdefault(key, now)
                self._seen.wait(path, Wait.SETTLING, f"its images are quiet for {left:.1f} more seconds", left)
                return None
        return self._take(Candidate(key, declared, (), looks, changed, declared=True))

    def _spelled(self, folder: str, name: str) -> str:
        """Return a name as the folder has it: two ways to compose an accent look the same to whoever typed it."""
        ways = () if name.isascii() else spellings(name)
        return next((way for way in ways if self._lies_there(folder, way)), name)

    def _waits_for(self, key: Key, missing: list[str], now: float) -> bool:
        """Wait for images that are not there or still empty, but not for ever."""
        if not missing:
            return False
        left = self._inputs_since.setdefault(key, now) + self._config.input_wait_seconds - now
        if left > 0:
            self._hold_back(key)
            due = min(left, self._config.rescan_seconds)
            reason = f"waits for {printable(', '.join(missing), 200)}"
            self._seen.wait(_join(key[0], key[1] + SUFFIX), Wait.IMAGES, reason, due)
        return left > 0

    def _take(self, candidate: Candidate) -> Candidate | None:
        """Return a candidate, unless somebody writes it, or it could be neither sent nor moved elsewhere."""
        for name in ("", *candidate.names):
            if problem := self._unusable(candidate.key[0], name):
                what = "it" if name == candidate.names[0] else printable(name or candidate.key[0], 255)
                self._hold_back(candidate.key)
                self._seen.ignored.add(candidate.source, problem, f"{problem} {what}")
                return None
        if writer := self._writer(candidate):
            self._hold_back(candidate.key)
            self._seen.waiting.add(candidate.source, Wait.OPEN, f"{printable(writer, 120)} is open for writing")
            return None
        folder = self._folders.get(candidate.key[0])
        return replace(candidate, folder_inode=folder.inode) if folder else candidate

    def _unusable(self, folder: str, name: str) -> str:
        """Return why a file cannot be sent, or why none can be taken out of a folder (then there is no name)."""
        full = self._folders.full(_join(folder, name) if name else folder)
        if not name and not folder:
            return ""
        with contextlib.suppress(OSError):
            place = self._tops.at(full)
            if not name:
                usable = os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd)
                return self._blocked(folder) if usable else "the daemon may not take files out of"
            status = place.lstat()
            if stat.S_ISREG(status.st_mode) and not os.access(place.name, os.R_OK, dir_fd=place.dir_fd):
                return "the daemon may not read"
            above = self._tops.folder(os.path.dirname(full)).status()
            if is_private(status, above):
                return "a hard link to a file that not everybody may read who uses this folder:"
            if _is_kept(status, above):
                return "the sticky bit of its folder keeps the daemon from taking"
        return ""

    def _writer(self, candidate: Candidate) -> str:
        """Return a file of a candidate that somebody has open for writing; nobody can hold it for ever."""
        if self._wall - candidate.changed_at >= _BUSY_SECONDS:
            return ""
        folder = self._folders.full(candidate.key[0])
        return next((name for name in candidate.names if has_writer(os.path.join(folder, name), self.opener)), "")

    def _all_whole(self, folder: str, names: tuple[str, ...]) -> bool:
        """Tell whether images are complete by their own structure, so that nobody is still writing them."""
        for name in names:
            try:
                with self.opener(self._folders.full(_join(folder, name))) as file:
                    image = inspect(file) if os.fstat(file.fileno()).st_size <= _LARGE_BYTES else None
            except OSError:
                return False
            if image is None or image.problem:
                return False
        return True

    def _declared(self, key: Key, look: Look) -> tuple[str, ...] | None:
        """Return which images a prompt names, or None; it is read again only if it looks different.

        Raises:
            BadRequest: It cannot be read, which may pass and is not remembered.
        """
        known = self._read.get(key)
        if known is None or known[0] != look:
            names = prompts.declared(read_prompt(self._folders.full(_join(*key) + SUFFIX), self.opener))
            known = self._read[key] = (look, names)
        return known[1]

    def _names_images(self, key: Key, look: Look) -> bool:
        """Tell whether a prompt is known to name its images."""
        with contextlib.suppress(BadRequest):
            return self._declared(key, look) is not None
        return False

    def _hold_back(self, key: Key) -> None:
        """Note that a settled prompt cannot be taken yet: it is judged again at each look."""
        if (changed := self._settled(key)) is not None:
            self._held_back[key] = changed

    # Forgetting

    def _forget(self, key: Key) -> None:
        if folder := self._folders.get(key[0]):
            folder.forget(key[1])
        self._arrived.discard(key)
        self._held_back.pop(key, None)
        self._inputs_since.pop(key, None)
        self._read.pop(key, None)

    def _forget_others(self) -> None:
        """Forget what is remembered of stems that are gone, or do not wait for what they waited for."""
        self._inputs.forget_others()
        kept: dict[str, set[str]] = {}
        for _, (path, stem) in self._window:
            kept.setdefault(path, set()).add(stem)
        for folder in self._folders:
            if folder.unsettled.are_named:
                folder.beside.keep(kept.get(folder.path, set()).union(folder.unsettled))
        self._inputs_since = {key: since for key, since in self._inputs_since.items() if key in self._held_back}
        self._arrived = {key for key in self._arrived if self._knows(key)}
        self._read = {
            key: read for key, read in self._read.items() if key in self._arrived or self._settled(key) is not None
        }
        self._marks = {path: since for path, since in self._marks.items() if self._tops.exists(path)}

    def _knows(self, key: Key) -> bool:
        """Tell whether a stem lies there, settled or not."""
        folder = self._folders.get(key[0])
        return folder is not None and key[1] in folder

    def _settled(self, key: Key) -> float | None:
        """Return the date of a settled stem, or None if it is not settled."""
        folder = self._folders.get(key[0])
        return folder.settled.get(key[1]) if folder else None

    # Files

    def _lies_there(self, folder: str, name: str) -> bool:
        return self._tops.exists(self._folders.full(_join(folder, name)))

    def _stat(self, folder: str, names: tuple[str, ...]) -> tuple[tuple[Look, ...], float]:
        """Return what files look like, and their newest ctime in seconds since the epoch."""
        looks: list[Look] = []
        newest = 0.0
        try:
            above = self._tops.folder(self._folders.full(folder))
        except OSError:
            return tuple((name, 0, 0, 0, 0) for name in names), newest
        for name in names:
            try:
                status = os.stat(name, dir_fd=above.fileno(), follow_symlinks=False)
            except OSError:
                looks.append((name, 0, 0, 0, 0))
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1  # what has no size will not get one either
            looks.append((name, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns))
            newest = max(newest, status.st_ctime)
        return tuple(looks), newest


def _is_kept(status: os.stat_result, folder: os.stat_result) -> bool:
    """Tell whether a file may not be taken out of its folder because it is somebody else's, as in ``/tmp``."""
    user = os.geteuid()
    return bool(folder.st_mode & stat.S_ISVTX) and user not in {0, status.st_uid, folder.st_uid}


def _all_names(names: Dropped) -> tuple[str, ...]:
    """Return everything that must be quiet with a prompt, itself first, and its images next."""
    return (names.prompt, *names.images, *names.coming, *names.foreign)


def _missing(looks: tuple[Look, ...]) -> list[str]:
    """Return the images that are not there, or still empty: browsers and copies make the name first."""
    return [name for name, _, size, *_ in looks[1:] if size == 0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
