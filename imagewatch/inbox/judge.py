"""Whether a settled prompt may be claimed, and why not. Nothing is changed here.

Of a settled prompt only its name and a date are known. What else there is to know is looked up when its turn comes:
whether its files are still the same, whether they can be read, and which images it names.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from imagewatch.inbox.candidate import Candidate, Found, Look, Wait
from imagewatch.inbox.open_files import has_writer
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.images import inspect
from imagewatch.protocol.names import MOST_MEANT, SUFFIX, Siblings, spellings
from imagewatch.protocol.request import may_be_image, read_prompt
from imagewatch.system.errors import BadRequest
from imagewatch.system.folders import is_private
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.config.load import Inbox
    from imagewatch.inbox.tree import Folder, Folders, Notes

_BUSY_SECONDS = 3600.0
"""Older marks of an editor or a transfer are leftovers of one that died."""
_SKEW_SECONDS = 60.0
"""How far the clock of a file server may be behind ours."""
_MOST_READ = 200
"""So many other prompts are read to find out whether a file is theirs."""
_LARGE_BYTES = 64 << 20
"""A larger image has to be quiet like others: to read it through here would hold up everybody."""


@dataclass(slots=True)
class Moment:
    """The present, as the caller has said it.

    Attributes:
        now: Monotonic time, seconds.
        wall: Wall-clock time, seconds since the epoch.
    """

    now: float = 0.0
    wall: float = 0.0


class Judge:
    """Looks at the files of prompts.

    Args:
        folders: What is known of the inbox.
        config: Settling, waits.
        moment: The present.
        blocked: Tells of a folder below the inbox why nothing can be put where its results go, or an empty string.

    Attributes:
        opener: Opens a file of the inbox.
        dues: Monotonic time at which prompts of a folder are to be judged again, seconds, since this was emptied.
    """

    def __init__(self, folders: Folders, config: Inbox, moment: Moment, blocked: Callable[[str], str]) -> None:
        self._folders = folders
        self._tops = folders.tops
        self._config = config
        self._moment = moment
        self._blocked = blocked
        self.opener = functools.partial(open_file, tops=self._tops)
        self.dues: dict[str, float] = {}

    def judge(self, folder: Folder, stem: str) -> Candidate | None:
        """Look at a settled prompt whose turn has come.

        Returns:
            What may be claimed; None if it has to wait, or is not there. What it waits for is noted with the folder.
        """
        names = folder.beside.of(stem)
        looks, changed = self.looks(folder.path, every_name(names))
        if not looks[0][1] or looks[0][2] < 0:  # gone, or no plain file any more
            folder.forget(stem)
            return None
        try:
            declared = self.declared(folder, stem, looks[0])
        except BadRequest as error:
            self._unread(folder, names, error)
            return None
        whole = declared is not None and folder.notes is not None and stem in folder.notes.arrived
        if not whole and self._is_disturbed(folder, names, changed):
            return None
        if declared is not None:
            return self._judge_declared(folder, stem, declared)
        if self._waits_for(folder, stem, _missing(looks)) or (unused := self._unused(folder, names)) is None:
            return None
        # A transfer that died left an image unfinished: without it the prompt is refused, not bought without it.
        images = (*names.images, *names.coming)
        found = Candidate(folder=folder.path, stem=stem, images=images, unused=unused, looks=looks, changed_at=changed)
        return self._take(folder, found)

    def is_unchanged(self, candidate: Candidate) -> bool:
        """Tell whether the files of a candidate still look as they did, and no program has begun to write."""
        if not self._folders.is_real(candidate.folder) or self._writer(candidate):
            return False
        folder = candidate.folder
        if not all(self.is_there(folder, name) for name in candidate.unused):
            return False  # it need not be refused any more
        return self.looks(folder, candidate.names)[0] == candidate.looks

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
            # Both by its date and by our own observation: dates may lie in the future.
            if max(wall - changed, now - self._notes(folder).marks.setdefault(name, now)) < _BUSY_SECONDS:
                return name
        return ""

    def is_arriving(self, folder: str, name: str) -> bool | None:
        """Tell whether a transfer may still give a file its name; None if the file is not there."""
        with contextlib.suppress(OSError):
            changed = self._tops.lstat(self._folders.full(path_of(folder, name))).st_ctime
            return self._moment.wall - changed < _BUSY_SECONDS
        return None

    def declared(self, folder: Folder, stem: str, look: Look) -> tuple[str, ...] | None:
        """Return which images a prompt names, or None; it is read again only if it looks different.

        Raises:
            BadRequest: It cannot be read, which may pass and is not remembered.
        """
        read = self._notes(folder).read
        known = read.get(stem)
        if known is None or known[0] != look:
            path = self._folders.full(path_of(folder.path, stem + SUFFIX))
            known = read[stem] = (look, prompts.declared(read_prompt(path, self.opener)))
        return known[1]

    def names_images(self, folder: Folder, stem: str, look: Look) -> bool:
        """Tell whether a prompt is known to name its images."""
        with contextlib.suppress(BadRequest):
            return self.declared(folder, stem, look) is not None
        return False

    def looks(self, folder: str, names: Iterable[str]) -> tuple[tuple[Look, ...], float]:
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

    def is_there(self, folder: str, name: str) -> bool:
        """Tell whether anything has a name."""
        return self._tops.exists(self._folders.full(path_of(folder, name)))

    def by_our_clock(self, folder: Folder, changed: float) -> float:
        """Return a date that a file shows as the latest that it can be by our clock."""
        return changed if folder.is_local else changed + _SKEW_SECONDS

    # What a prompt waits for

    def _found(self, folder: Folder) -> Found:
        self._folders.changed = True
        if folder.judged is None:
            folder.judged = Found(self._folders.named())
        return folder.judged

    def _wait(self, folder: Folder, name: str, kind: str, reason: str, seconds: float) -> None:
        """Note that a prompt may be ready after some seconds."""
        at = self._moment.now + seconds
        self._found(folder).wait(path_of(folder.path, name), kind, reason, at)
        self.dues[folder.path] = min(at, self.dues.get(folder.path, at))

    def _notes(self, folder: Folder) -> Notes:
        return folder.noted(self._config.settle_seconds)

    def _hold_back(self, folder: Folder, stem: str) -> None:
        """Note that a settled prompt cannot be claimed yet: it is judged again at each scan."""
        if (changed := folder.settled.get(stem)) is not None:
            self._notes(folder).held[stem] = changed

    def _unread(self, folder: Folder, names: Siblings, error: BadRequest) -> None:
        """Let a prompt wait that cannot be read: it is not known which images it names."""
        self._hold_back(folder, names.stem)
        now, found = self._moment.now, self._found(folder)
        path, reason = path_of(folder.path, names.prompt), printable(str(error), 300)
        left = self._notes(folder).since.setdefault(names.stem, now) + self._config.input_wait_seconds - now
        if problem := self._unusable(folder.path, names.prompt):
            found.ignored.add(path, problem, f"{problem} it")
        elif left > 0:
            self._wait(folder, names.prompt, Wait.UNREADABLE, reason, min(left, self._config.rescan_seconds))
        else:  # the next look sees whether it can be read; no time is set for that
            found.waiting.add(path, Wait.UNREADABLE, reason)

    def _is_disturbed(self, folder: Folder, names: Siblings, changed: float) -> bool:
        """Tell whether a prompt is not what it was when it was found to be quiet; then it has to be quiet again."""
        if self.busy(folder, names, Found(0)):
            kind, reason = Wait.WRITING, "is being written again"
        elif changed != folder.settled.get(names.stem) and self._config.settle_seconds:
            kind, reason = Wait.SETTLING, "was changed, so it has to be quiet again"
        else:
            return False
        self._notes(folder).settling.touch(names.stem, self._moment.now)
        folder.unsettle(names.stem)
        self._wait(folder, names.prompt, kind, reason, self._config.settle_seconds)
        return True

    def _judge_declared(self, folder: Folder, stem: str, declared: tuple[str, ...]) -> Candidate | None:
        """Decide about a prompt that is quiet itself, or whole by its rename, and names its images."""
        now, notes = self._moment.now, self._notes(folder)
        declared = tuple(self._spelled(folder.path, name) for name in declared)
        looks, changed = self.looks(folder.path, (stem + SUFFIX, *declared))
        if missing := _missing(looks):
            if self._waits_for(folder, stem, missing):
                return None
        elif stem not in notes.arrived or not self._all_whole(folder.path, declared):
            since = self.by_our_clock(folder, changed)
            left = notes.inputs.observe(stem, hash(looks), changed_at=since, now=now, wall=self._moment.wall)
            if left > 0:
                self._hold_back(folder, stem)
                notes.since.setdefault(stem, now)
                reason = f"its images are quiet for {left:.1f} more seconds"
                self._wait(folder, stem + SUFFIX, Wait.SETTLING, reason, left)
                return None
        found = Candidate(
            folder=folder.path, stem=stem, images=declared, declared=True, looks=looks, changed_at=changed
        )
        return self._take(folder, found)

    def _spelled(self, folder: str, name: str) -> str:
        """Return a name as the folder has it: two ways to compose an accent look the same to the user who typed it."""
        ways = () if name.isascii() else spellings(name)
        return next((way for way in ways if self.is_there(folder, way)), name)

    def _waits_for(self, folder: Folder, stem: str, missing: list[str]) -> bool:
        """Wait for images that are not there or still empty, but not for ever."""
        if not missing:
            return False
        now = self._moment.now
        left = self._notes(folder).since.setdefault(stem, now) + self._config.input_wait_seconds - now
        if left > 0:
            self._hold_back(folder, stem)
            reason = f"waits for {printable(', '.join(missing), 200)}"
            self._wait(folder, stem + SUFFIX, Wait.IMAGES, reason, min(left, self._config.rescan_seconds))
        return left > 0

    def _unused(self, folder: Folder, names: Siblings) -> tuple[str, ...] | None:
        """Return the files for which a prompt that names no images is refused: they may be meant, and are not used.

        Returns:
            None if the prompt has to wait: one of them is empty or still changing. It does not wait for ever.
        """
        doubtful = names.doubtful
        if len(doubtful) < MOST_MEANT:  # else it would take too long to open them
            doubtful = [name for name in doubtful if self._may_be_image(folder.path, name)]
        if doubtful:
            others = self._named_by_others(folder, names.stem)
            doubtful = [name for name in doubtful if name not in others]
        if not doubtful:
            return ()
        looks, changed = self.looks(folder.path, doubtful)
        if self._waits_for(folder, names.stem, [name for name, _, size, *_ in looks if size == 0]):
            return None
        if self._waits_until_quiet(folder, names.stem, looks, changed):
            return None
        reason = f"may be meant as an image of {names.prompt}, which does not use it and is refused for it"
        for name in doubtful:
            path = path_of(folder.path, name)
            self._found(folder).ignored.add(path, "may be meant as an image, and is not used", printable(reason, 600))
        return tuple(doubtful)

    def _named_by_others(self, folder: Folder, stem: str) -> set[str]:
        """Return the files that other prompts of the folder name as their images; of very many some are read."""
        read = self._notes(folder).read
        known = itertools.chain((other for _, other in folder.window or ()), folder.unsettled)
        for other in [other for other in itertools.islice(known, _MOST_READ) if other not in read]:
            (look,), _ = self.looks(folder.path, (other + SUFFIX,))
            if look[2] > 0:
                self.names_images(folder, other, look)
        return {name for other, (_, names) in read.items() if other != stem for name in names or ()}

    def _may_be_image(self, folder: str, name: str) -> bool:
        """Tell whether a file may be meant as an image. It is opened if its name does not say so."""
        path = self._folders.full(path_of(folder, name))
        try:
            return may_be_image(path, self._tops.lstat(path), self.opener)
        except OSError:
            return False  # gone

    def _waits_until_quiet(self, folder: Folder, stem: str, looks: tuple[Look, ...], changed: float) -> bool:
        """Wait until files that may be meant do not change any more: the last change may give one its right name."""
        now, notes = self._moment.now, self._notes(folder)
        since = self.by_our_clock(folder, changed)
        left = notes.inputs.observe(stem, hash(looks), changed_at=since, now=now, wall=self._moment.wall)
        left = min(left, notes.since.setdefault(stem, now) + self._config.input_wait_seconds - now)
        if left > 0:
            self._hold_back(folder, stem)
            shown = printable(", ".join(name for name, *_ in looks), 200)
            reason = f"{shown} may be meant as an image, and must not change for {left:.1f} more seconds"
            self._wait(folder, stem + SUFFIX, Wait.SETTLING, reason, left)
        return left > 0

    def _take(self, folder: Folder, candidate: Candidate) -> Candidate | None:
        """Return a candidate, unless a program writes it, or it could be neither sent nor moved elsewhere."""
        stem = candidate.stem
        for name in ("", *candidate.names):
            if problem := self._unusable(folder.path, name):
                what = "it" if name == candidate.names[0] else printable(name or folder.path, 255)
                self._hold_back(folder, stem)
                self._found(folder).ignored.add(candidate.source, problem, f"{problem} {what}")
                return None
        if writer := self._writer(candidate):
            self._hold_back(folder, stem)
            reason = f"{printable(writer, 120)} is open for writing"
            self._found(folder).waiting.add(candidate.source, Wait.OPEN, reason)
            return None
        notes = self._notes(folder)
        notes.since.pop(stem, None)
        was_quiet = not candidate.declared or stem not in notes.arrived
        return replace(candidate, folder_inode=folder.inode, is_local=folder.is_local, was_quiet=was_quiet)

    def _unusable(self, folder: str, name: str) -> str:
        """Return why a file cannot be sent, or why none can be taken out of a folder (then there is no name)."""
        full = self._folders.full(path_of(folder, name) if name else folder)
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
                return "a hard link to a private file:"
            if _is_kept(status, above):
                return "the sticky bit of its folder keeps the daemon from taking"
        return ""

    def _writer(self, candidate: Candidate) -> str:
        """Return a file of a candidate that a program has open for writing; it is not waited for without end."""
        if self._moment.wall - candidate.changed_at >= _BUSY_SECONDS:
            return ""
        folder = self._folders.full(candidate.folder)
        return next((name for name in candidate.names if has_writer(os.path.join(folder, name), self.opener)), "")

    def _all_whole(self, folder: str, names: tuple[str, ...]) -> bool:
        """Tell whether images are complete by their own structure, so that no program is still writing them."""
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
    """Tell whether a file may not be taken out of its folder because it is another user's, as in ``/tmp``."""
    user = os.geteuid()
    return bool(folder.st_mode & stat.S_ISVTX) and user not in {0, status.st_uid, folder.st_uid}


def every_name(names: Siblings) -> tuple[str, ...]:
    """Return everything that must be quiet with a prompt, itself first, and its images next."""
    return (names.prompt, *names.images, *names.coming)


def _missing(looks: tuple[Look, ...]) -> list[str]:
    """Return the images that are not there, or still empty: browsers and copies make the name first."""
    return [name for name, _, size, *_ in looks[1:] if size == 0]


def path_of(folder: str, name: str) -> str:
    """Return the path below the inbox of a name in a folder."""
    return f"{folder}/{name}" if folder else name
