"""Whether a settled prompt may be claimed, and why not. Nothing is changed here.

Of a settled prompt only its name and a date are known. What else there is to know is looked up when its turn comes:
whether its files are still the same, whether they can be read, and which images it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from imagewatch.inbox.candidate import Candidate, FileState, Found, Wait
from imagewatch.inbox.prompt_files import Moment, PromptFiles, path_of
from imagewatch.protocol.names import MOST_SIMILAR, SUFFIX, Siblings
from imagewatch.system.errors import BadRequest
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.config.schema import Inbox
    from imagewatch.inbox.folder import Folder, Notes
    from imagewatch.inbox.tree import Folders

_SKEW_SECONDS = 60.0
"""How far the clock of a file server may be behind ours."""


class Readiness:
    """Checks settled prompts.

    Args:
        folders: What is known of the inbox.
        config: Settling, waits.
        moment: The present.
        files: The files of prompts.

    Attributes:
        dues: Monotonic time at which prompts of a folder are to be checked again, seconds, since this was emptied.
    """

    def __init__(self, folders: Folders, config: Inbox, moment: Moment, files: PromptFiles) -> None:
        self._folders = folders
        self._config = config
        self._moment = moment
        self._files = files
        self.dues: dict[str, float] = {}

    def check(self, folder: Folder, stem: str) -> Candidate | None:
        """Check a settled prompt whose turn has come.

        Returns:
            What may be claimed; None if it has to wait, or is not there. What it waits for is noted with the folder.
        """
        names = folder.siblings.of(stem)
        states, changed = self._files.states(folder.path, every_name(names))
        if not states[0][1] or states[0][2] < 0:  # removed, or no plain file any more
            folder.forget(stem)
            return None
        try:
            declared = self._files.declared(folder, stem, states[0])
        except BadRequest as error:
            self._unread(folder, names, error)
            return None
        # It came by rename and names its images: it need not settle (``InboxScan.check_arrival``).
        whole = declared is not None and folder.notes is not None and stem in folder.notes.arrived
        if not whole and self._is_disturbed(folder, names, changed):
            return None
        if declared is not None:
            return self._check_declared(folder, stem, declared)
        if self._waits_for(folder, stem, _missing(states)) or (unused := self._unused(folder, names)) is None:
            return None
        # If a transfer ended early, an image is incomplete. The prompt is refused; otherwise it would be paid for
        # without the image.
        images = (*names.images, *names.coming)
        found = Candidate(
            folder=folder.path, stem=stem, images=images, unused=unused, states=states, changed_at=changed
        )
        return self._take(folder, found)

    def is_unchanged(self, candidate: Candidate) -> bool:
        """Return whether the files of a candidate are unchanged, and no program has begun to write."""
        if not self._folders.is_real(candidate.folder) or self._files.writer(candidate):
            return False
        folder = candidate.folder
        if not all(self._files.is_there(folder, name) for name in candidate.unused):
            return False  # it need not be refused any more
        return self._files.states(folder, candidate.names)[0] == candidate.states

    def by_our_clock(self, folder: Folder, changed: float) -> float:
        """Convert a file's ctime to the latest possible time on our clock."""
        return self._moment.since(changed if folder.is_local else changed + _SKEW_SECONDS)

    def _found(self, folder: Folder) -> Found:
        self._folders.changed = True
        if folder.checked is None:
            folder.checked = Found(self._folders.named())
        return folder.checked

    def _wait(self, folder: Folder, name: str, kind: str, reason: str, seconds: float) -> None:
        """Note that a prompt may be ready after some seconds."""
        at = self._moment.now + seconds
        self._found(folder).wait(path_of(folder.path, name), kind, reason, at)
        self.dues[folder.path] = min(at, self.dues.get(folder.path, at))

    def _notes(self, folder: Folder) -> Notes:
        return folder.noted(self._config.settle_seconds)

    def _hold_back(self, folder: Folder, stem: str) -> None:
        """Note that a settled prompt cannot be claimed yet: it is checked again at each scan."""
        if (changed := folder.settled.get(stem)) is not None:
            self._notes(folder).held[stem] = changed

    def _unread(self, folder: Folder, names: Siblings, error: BadRequest) -> None:
        """Let a prompt wait that cannot be read: it is not known which images it names."""
        self._hold_back(folder, names.stem)
        now, found = self._moment.now, self._found(folder)
        path, reason = path_of(folder.path, names.prompt), printable(str(error), 300)
        left = self._notes(folder).since.setdefault(names.stem, now) + self._config.input_wait_seconds - now
        if problem := self._files.unusable(folder.path, names.prompt):
            found.ignored.add(path, problem, f"{problem} it")
        elif left > 0:
            self._wait(folder, names.prompt, Wait.UNREADABLE, reason, min(left, self._config.rescan_seconds))
        else:  # the next scan shows whether it can be read; no time is set for that
            found.waiting.add(path, Wait.UNREADABLE, reason)

    def _is_disturbed(self, folder: Folder, names: Siblings, changed: float) -> bool:
        """Return whether a prompt has changed since it was settled; then it has to settle again."""
        if self._files.busy(folder, names, Found(0)):
            kind, reason = Wait.WRITING, "is being written again"
        elif changed != folder.settled.get(names.stem) and self._config.settle_seconds:
            kind, reason = Wait.SETTLING, "was changed, so it has to settle again"
        else:
            return False
        self._notes(folder).settling.touch(names.stem, self._moment.now)
        folder.unsettle(names.stem)
        self._wait(folder, names.prompt, kind, reason, self._config.settle_seconds)
        return True

    def _check_declared(self, folder: Folder, stem: str, declared: tuple[str, ...]) -> Candidate | None:
        """Check a prompt that names its images, and is settled or complete because it was renamed."""
        now, notes = self._moment.now, self._notes(folder)
        declared = tuple(self._files.spelled(folder.path, name) for name in declared)
        states, changed = self._files.states(folder.path, (stem + SUFFIX, *declared))
        if missing := _missing(states):
            if self._waits_for(folder, stem, missing):
                return None
        elif stem not in notes.arrived or not self._files.all_whole(folder.path, declared):
            since = self.by_our_clock(folder, changed)
            left = notes.inputs.observe(
                stem, hash(states), changed_at=since, now=now, wall=self._moment.wall, seen=self._moment.after_look()
            )
            if left > 0:
                self._hold_back(folder, stem)
                notes.since.setdefault(stem, now)
                reason = f"its images must not change for {left:.1f} more seconds"
                self._wait(folder, stem + SUFFIX, Wait.SETTLING, reason, left)
                return None
        found = Candidate(
            folder=folder.path, stem=stem, images=declared, declared=True, states=states, changed_at=changed
        )
        return self._take(folder, found)

    def _waits_for(self, folder: Folder, stem: str, missing: list[str]) -> bool:
        """Wait for images that are not there or still empty, but not forever."""
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
            None if the prompt has to wait: one of them is empty or still changing. It does not wait forever.
        """
        uncertain = names.uncertain
        if len(uncertain) < MOST_SIMILAR:  # else it would take too long to open them
            uncertain = [name for name in uncertain if self._files.may_be_image(folder.path, name)]
        if uncertain:
            others = self._files.named_by_others(folder, names.stem)
            uncertain = [name for name in uncertain if name not in others]
        if not uncertain:
            return ()
        states, changed = self._files.states(folder.path, uncertain)
        if self._waits_for(folder, names.stem, [name for name, _, size, *_ in states if size == 0]):
            return None
        if self._waits_until_unchanged(folder, names.stem, states, changed):
            return None
        reason = f"may be meant as an image of {names.prompt}, which does not name it and is therefore refused"
        for name in uncertain:
            path = path_of(folder.path, name)
            self._found(folder).ignored.add(path, "may be meant as an image, and is not used", printable(reason, 600))
        return tuple(uncertain)

    def _waits_until_unchanged(self, folder: Folder, stem: str, states: tuple[FileState, ...], changed: float) -> bool:
        """Wait until files that may be meant do not change any more: a rename may still be coming."""
        now, notes = self._moment.now, self._notes(folder)
        since = self.by_our_clock(folder, changed)
        left = notes.inputs.observe(
            stem, hash(states), changed_at=since, now=now, wall=self._moment.wall, seen=self._moment.after_look()
        )
        left = min(left, notes.since.setdefault(stem, now) + self._config.input_wait_seconds - now)
        if left > 0:
            self._hold_back(folder, stem)
            shown = printable(", ".join(name for name, *_ in states), 200)
            reason = f"{shown} may be meant as an image, and must not change for {left:.1f} more seconds"
            self._wait(folder, stem + SUFFIX, Wait.SETTLING, reason, left)
        return left > 0

    def _take(self, folder: Folder, candidate: Candidate) -> Candidate | None:
        """Return a candidate, unless a program writes it, or it could be neither sent nor moved elsewhere."""
        stem = candidate.stem
        for name in ("", *candidate.names):
            if problem := self._files.unusable(folder.path, name):
                what = "it" if name == candidate.names[0] else printable(name or folder.path, 255)
                self._hold_back(folder, stem)
                self._found(folder).ignored.add(candidate.source, problem, f"{problem} {what}")
                return None
        if writer := self._files.writer(candidate):
            self._hold_back(folder, stem)
            reason = f"{printable(writer, 120)} is open for writing"
            self._found(folder).waiting.add(candidate.source, Wait.OPEN, reason)
            return None
        notes = self._notes(folder)
        notes.since.pop(stem, None)
        was_unchanged = not candidate.declared or stem not in notes.arrived
        return replace(candidate, folder_inode=folder.inode, is_local=folder.is_local, was_unchanged=was_unchanged)


def every_name(names: Siblings) -> tuple[str, ...]:
    """Return everything that must be unchanged with a prompt, itself first, and its images next."""
    return (names.prompt, *names.images, *names.coming)


def _missing(states: tuple[FileState, ...]) -> list[str]:
    """Return the images that are not there, or still empty: browsers and copies make the name first."""
    return [name for name, _, size, *_ in states[1:] if size == 0]
