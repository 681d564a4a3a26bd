"""What of the inbox may be taken next, and when it has to be looked at again.

Puts together the watcher, which tells when something happened, and the sweep, which finds out what. Belongs to the main
thread. Only the head of the queue is looked at closely: the other prompts are names and dates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from imagewatch import memory
from imagewatch.mounts import POLL_SECONDS, Kinds, eventless, keeps_times
from imagewatch.names import stem_of
from imagewatch.seen import Seen
from imagewatch.spool import blocked
from imagewatch.sweep import Sweep
from imagewatch.text import printable
from imagewatch.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from imagewatch.config import Folders, Inbox
    from imagewatch.folders import Tops
    from imagewatch.seen import Candidate, Key

_REST = 10.0
"""A sweep that took a second is followed by ten seconds without one: looking costs a tenth of a core at most."""
_LONG_SECONDS = 0.05
"""A look that took longer went through very many names, and took memory for them."""
_WINDOW = 1024
"""How many prompts are known by name."""
_AHEAD = 128
"""How many prompts are opened ahead: more than there are workers."""
_MOST_NAMED = 1000
"""How many files that are not taken are remembered by name."""
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Changed:
    """Something happened to a name in a folder; to the folder itself, or to one in it, if the name is empty."""

    folder: str
    name: str
    renamed: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """Events may have been missed: look at everything."""


class Intake:
    """The inbox as the main loop sees it.

    Args:
        folders: The inbox, and where its results go.
        control: The folder for requests of commands; it is watched, too.
        post: Puts a message into the mailbox of the main loop; called in the watcher's thread.
        clock: Wall clock, seconds since the epoch.
        monotonic: Monotonic clock, seconds.
        tops: The folders that were opened.

    Attributes:
        seen: What the last look saw.
        mode: ``native``: the kernel tells of changes; ``poll``: it does not; ``mixed``: it does of some folders.
        polled: Folders of which the kernel tells nothing, or not everything, and why.
        most_seconds: Longest interval between two looks that whoever supervises the process allows, or None.
        shut: Folders below the inbox of which a job is stuck: what else is in them may be paid for and get stuck, too.
    """

    def __init__(
        self,
        folders: Folders,
        control: str,
        post: Callable[[Changed | Lost], None],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        tops: Tops,
    ) -> None:
        self._tops = tops
        self._inbox = folders.inbox
        self._control = control
        self._folders = folders
        self._clock = clock
        self._now = monotonic
        self._watcher = Watcher(
            lambda folder, name, renamed: post(Changed(folder, name, renamed)), lambda: post(Lost())
        )
        self._kinds = Kinds()
        self._kind = ""
        self._ready: dict[Key, Candidate] = {}  # the head of the queue, in the order in which it is taken
        self._more = False
        self._due = self._rested = self._listen_at = 0.0
        self._told: object = None
        self._deaf = "there are no change events on this system"
        self.seen = Seen()
        self.mode = ""
        self.polled: dict[str, str] = {}
        self.most_seconds: float | None = None
        self.shut: frozenset[str] = frozenset()

    def configure(self, config: Inbox, burst: int) -> None:
        """Take a configuration; everything is looked at anew.

        Args:
            config: How the inbox is watched.
            burst: How many prompts at once are too many; more than that have to be known by name.
        """
        self._config = config
        window, most_named = max(_WINDOW, burst + 1), max(_MOST_NAMED, burst + 1)
        timed = lambda _: keeps_times(self._kind)  # noqa: E731  no other file system is looked into
        self._sweep = Sweep(
            self._inbox,
            config,
            keeps_times=timed,
            window=window,
            most_named=most_named,
            blocked=self._blocked,
            tops=self._tops,
        )
        self._ready, self._more, self._due = {}, False, 0.0
        if config.watch == "poll":
            self._watcher.stop()

    def _blocked(self, folder: str) -> str:
        """Return why nothing is to be taken out of a folder below the inbox, or an empty string."""
        if folder in self.shut:
            return "until a job that is stuck goes on (the log says why), nothing is taken out of"
        return blocked(self._folders, folder, self._tops)

    def stop(self) -> None:
        """Stop listening."""
        self._watcher.stop()

    # When

    @property
    def due(self) -> float:
        """Monotonic time of the next look."""
        return max(self._due, self._rested)

    @property
    def pending(self) -> bool:
        """Whether anything in the inbox may be taken later by itself."""
        return self.seen.due is not None or self._now() >= self._due

    def soon(self, seconds: float = 0.0) -> None:
        """See to it that a look comes after some seconds, if not before."""
        self._due = min(self._due, self._now() + seconds)

    def late(self, seconds: float) -> None:
        """See to it that no look comes before some seconds."""
        self._due = self._now() + seconds

    # Looking

    def look(self, taken: Collection[Key | None]) -> None:
        """Look at the inbox.

        Args:
            taken: Stems of which a job is not over: the same files again are not another job yet.

        Raises:
            SpoolError: It cannot be listed.
        """
        began = self._now()
        self._kinds.refresh()
        self._kind = self._kinds.of(self._inbox)
        self._listen(began)
        seen = self._sweep.look(began, self._clock(), _AHEAD, taken)
        if seen is not self.seen:
            self.seen = seen
            self._ready = {candidate.key: candidate for candidate in seen.ready}
            self._more = len(seen.ready) >= _AHEAD
        added = self._watch()
        now = self._now()
        if now - began > _LONG_SECONDS:
            memory.give_back()
        interval = self._config.rescan_seconds
        if self.polled:
            interval = min(interval, POLL_SECONDS)
        intervals = [interval, self.most_seconds, seen.due]
        self._due = now + min(seconds for seconds in intervals if seconds is not None)
        rest = _REST * (now - began)
        self._rested = now + (rest if self.most_seconds is None else min(rest, self.most_seconds))
        if added or self._sweep.runs_low():
            self._due = now  # what was dropped before the watch began was seen by nobody; or names are to be read

    def _listen(self, now: float) -> None:
        """Begin to listen, or begin again if what listens died."""
        if (
            self._config.watch == "poll"
            or not self._watcher.available
            or self._watcher.alive()
            or now < self._listen_at
        ):
            return
        self._listen_at = now + POLL_SECONDS
        if self._watcher.problem:
            self._deaf = "the reader of change events died"
            _log.error("the reader of change events died; it is started again", reason=self._watcher.problem)
        try:
            self._watcher.start()
        except OSError as error:
            self._deaf = f"no change events: {error.strerror or error}"
        else:
            self._watcher.watch([self._inbox, self._control])  # first this, then the look

    def _watch(self) -> bool:
        """Watch the folders that were seen; tell whether one of them is new."""
        added, problems = False, dict[str, str]()
        if self._watcher.alive():
            added, problems = self._watcher.watch([*self.seen.folders, self._control])
            polled = {path: f"cannot be watched: {why}" for path, why in problems.items()}
            if self._config.watch == "auto" and eventless(self._kind):
                polled |= dict.fromkeys(self.seen.folders, f"{self._kind}: others may change it unnoticed")
            whole = len(polled.keys() & set(self.seen.folders)) == len(self.seen.folders)
            self.mode = "native" if not polled else "poll" if whole else "mixed"
        else:
            why = "inbox.watch is poll" if self._config.watch == "poll" else self._deaf
            polled = dict.fromkeys(self.seen.folders, why)
            self.mode = "poll"
        self.polled = polled
        deaf = not self._watcher.alive() and self._config.watch != "poll"
        self._tell_mode(bad=deaf or bool(problems))
        return added

    def why_polled(self) -> dict[str, str]:
        """Return for each reason to look at folders one of them, and how many there are."""
        reasons: dict[str, list[str]] = {}
        for path, why in self.polled.items():
            reasons.setdefault(why, []).append(path)
        return {
            printable(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""): why
            for why, paths in reasons.items()
        }

    def _tell_mode(self, *, bad: bool) -> None:
        """Say how the inbox is watched when that is different; at the start whoever begins says it."""
        now = (self.mode, set(self.polled.values()))
        if now != self._told and (self._told or bad):
            (_log.warning if bad else _log.info)("watch mode", mode=self.mode, polled=self.why_polled())
        self._told = now

    def changed(self, change: Changed, taken: Collection[Key | None]) -> bool:
        """Take note of an event; tell whether a prompt became ready by it."""
        now = self._now()
        folder = change.folder[len(self._inbox) :].lstrip("/")
        if not change.name:
            self.soon()
            return False
        stem = stem_of(change.name)
        key = (folder, stem) if stem is not None else self._sweep.owner(folder, change.name)
        if key is not None:
            self._ready.pop(key, None)
        if stem is not None and key is not None and change.renamed:
            self._sweep.arrived_whole(key, now)
            candidate = None if key in taken else self._sweep.look_at(key, now, self._clock())
            if candidate is not None:
                self._ready[key] = candidate
                return True
        elif key is not None:
            self._sweep.touch(key, now)
        hurry = stem is None and self._sweep.waits_for_inputs()
        self.soon(0.0 if hurry else self._config.settle_seconds)
        return False

    # Taking

    def any(self) -> bool:
        """Tell whether there is something to be taken, as far as is known."""
        return bool(self._ready) or self._more

    def count(self) -> int:
        """Return how many prompts wait for nothing but a worker."""
        return self._sweep.count()

    def arrived(self) -> dict[str, float]:
        """Return when the oldest of these were changed, by path below the inbox, in seconds since the epoch."""
        return self._sweep.arrived()

    def next(self, taken: Collection[Key | None]) -> Candidate | None:
        """Return the oldest prompt that may be claimed; it will not be returned again.

        Args:
            taken: Stems of which a job is not over.
        """
        while True:
            if not self._ready and self._more:
                self._refill()
            if not self._ready:
                return None
            candidate = self._ready.pop(next(iter(self._ready)))
            if candidate.key in taken:
                self.seen.passed.add(candidate.key)
            elif candidate.key[0] in self.shut or not self._sweep.unchanged(candidate):
                self._sweep.touch(candidate.key, self._now())
                self.soon(self._config.settle_seconds)
            else:
                self._sweep.taken(candidate.key)
                return candidate

    def _refill(self) -> None:
        more = self._sweep.more(self._now(), self._clock(), _AHEAD)
        self._more = len(more) >= _AHEAD
        self._ready = {candidate.key: candidate for candidate in more}
        if self.seen.due is not None:
            self.soon(self.seen.due)
        if self._sweep.runs_low():
            self.soon()

    def over(self, key: Key | None) -> None:
        """Take note that no job of this stem is at work any more."""
        if key in self.seen.passed:
            self.soon()  # a file of the same name was dropped meanwhile
