"""The content of the status files, taken from the parts of the daemon, for people who only have the folders.

All who may read the folders may read them. So they have no text of a prompt, no credits and no key; file names and
messages may be from other users and are made printable.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Literal

from imagewatch import __version__
from imagewatch.inbox.advice import READY, for_ignored, for_waiting, why_ignored
from imagewatch.inbox.candidate import Wait, shared
from imagewatch.inbox.system_folders import HIDDEN, SYSTEM
from imagewatch.protocol import notice
from imagewatch.protocol.notice import Notice
from imagewatch.system.errors import SpoolError
from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from imagewatch.daemon.parts import Parts
    from imagewatch.inbox.candidate import Reasons
    from imagewatch.journal.holds import Hold

_LONGEST_NAME, _LONGEST_TEXT = 1000, 500
_LONG_PAUSE = 60.0
"""A pause that the API asks for, or our own rate, is shown if it is longer than this, seconds."""
_MOST_REDELIVERED = 20
_State = Literal["running", "on_hold", "stopped"]
_NOT_SHOWN = (HIDDEN, SYSTEM)
"""Such folders belong there."""
_FOR_ALL = {
    "credits": "the account has too few credits",
    "quota": "the quota of the account is used up",
    "cap": "the cap on credits for this day or month is reached",
    "database": "the shared database cannot be used",
}
"""The messages of these holds name amounts, or hosts and users of a database."""
_READY_IN = {"on_hold": "waits for the end of the hold", "stopped": "waits until imagewatch is started"}
"""Why a prompt waits that is ready, by state."""
_FIXED = {Wait.EMPTY, Wait.SETTLING, Wait.ARRIVING, Wait.CAP}
"""Here the reason has nothing more for people, or changes with each scan."""


class Content:
    """Makes the content of the status files.

    Args:
        parts: The daemon's parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._walls: dict[tuple[str, float], datetime] = {}
        self._changed: dict[str, datetime | None] = {}
        self._redelivered = notice.Redelivered()

    def make(self, state: str, in_flight: Mapping[str, str], stuck: Mapping[str, str]) -> Notice:
        """Return the content; the times of writing are set by the caller.

        Args:
            state: ``stopped``, or anything else while the daemon runs.
            in_flight: Path of the prompt of each job at work, by job id.
            stuck: The same of each job that cannot finish for a reason of its own.
        """
        holds = self._holds()
        is_held = any(one.provider is None and one.folder is None for one in holds)
        shown: _State = "stopped" if state == "stopped" else "on_hold" if is_held else "running"
        return Notice(
            version=__version__,
            state=shown,
            written_at=notice.at(0),
            holds=holds,
            waiting=self._waiting(shown),
            in_flight=_in_flight(in_flight),
            ignored=self._ignored(),
            redelivered=self._redeliveries(),
            stuck=self._stuck(stuck),
            folders=self._folders(),
        )

    # Holds

    def _holds(self) -> tuple[notice.HoldNotice, ...]:
        now = self._parts.now()
        shown = [hold for hold in self._parts.admission.holds() if not hold.brief or _is_long(hold, now)]
        before, self._walls = self._walls, {}
        for hold in shown:
            # Computed once: the two clocks do not run exactly alike.
            key = hold.kind, hold.began
            self._walls[key] = before.get(key) or self._wall(hold)
        return tuple(map(self._hold, shown))

    def _wall(self, hold: Hold) -> datetime:
        """Return when a hold began, maybe before the start of this process."""
        with contextlib.suppress(SpoolError):
            since = self._parts.journal.requests.since()
            if hold.kind in since:
                return notice.at(since[hold.kind])
        return notice.at(self._parts.clock() + hold.began - self._parts.now())

    def _hold(self, hold: Hold) -> notice.HoldNotice:
        end = self._parts.admission.end(hold)
        return notice.HoldNotice(
            kind=hold.kind,
            provider=hold.provider or None,
            folder=_name(hold.folder) if hold.folder else None,
            message=_text(_for_all(hold)),
            since=self._walls[hold.kind, hold.began],
            next_try_at=None if end is None else notice.at(end),
            next=_text(hold.reason.next),
        )

    # Files

    def _waiting(self, state: str) -> notice.Waiting:
        intake, caps = self._parts.intake, self._parts.caps
        result, dates = intake.result.waiting, intake.in_turn()
        kinds: dict[str, str] = {**result.kind_of, **dict.fromkeys(caps.reasons(), Wait.CAP)}
        named = [*kinds.items(), *((path, READY) for path in sorted(dates, key=dates.__getitem__) if path not in kinds)]
        count = max(intake.count() - len(caps), 0) + result.total + len(caps)
        chosen = shared(named, notice.MOST_FILES)
        since = self._since([path for path, _ in chosen], dates)
        files = [
            notice.WaitingFile(
                name=_name(path),
                since=since[path],
                why=kind,
                message=_text(_message(path, kind, result, state)),
                next=for_waiting(kind),
            )
            for path, kind in sorted(chosen, key=lambda one: (_stamp(since[one[0]]), one[0]))
        ]
        known_dates = [moment for moment in since.values() if moment is not None]
        if dates:
            known_dates.append(notice.at(min(dates.values())))
        return notice.Waiting(count=count, oldest_since=min(known_dates, default=None), files=tuple(files))

    def _since(self, paths: list[str], dates: Mapping[str, float]) -> dict[str, datetime | None]:
        """Return since when these prompts are unchanged; what is not known by a scan is asked for once."""
        before, self._changed = self._changed, {}
        for path in paths:
            if path in dates:
                self._changed[path] = notice.at(dates[path])
            else:
                self._changed[path] = before[path] if path in before else self._last_change(path)
        return self._changed

    def _last_change(self, path: str) -> datetime | None:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            spool = self._parts.spool
            return notice.at(spool.tops.lstat(os.path.join(spool.inbox, path)).st_ctime)
        return None

    def _ignored(self) -> notice.Ignored:
        found = self._parts.intake.result.ignored
        count = found.total - sum(found.kinds.get(kind, 0) for kind in _NOT_SHOWN)
        named = sorted((path, kind) for path, kind in found.kind_of.items() if kind not in _NOT_SHOWN)
        return notice.Ignored(
            count=count,
            files=tuple(
                notice.IgnoredFile(
                    name=_name(path),
                    message=_text(why_ignored(path, found[path])),
                    next=_text(for_ignored(path, kind)),
                )
                for path, kind in sorted(shared(named, notice.MOST_FILES))
            ),
        )

    def _redeliveries(self) -> notice.Redelivered:
        count = self._parts.status.redelivered
        if count != self._redelivered.count:
            with contextlib.suppress(SpoolError):  # a hold shows it
                found = self._parts.ledger.last_redelivered(_MOST_REDELIVERED)
                files = tuple(notice.RedeliveredFile(name=_name(path), at=notice.at(when)) for path, when in found)
                self._redelivered = notice.Redelivered(count=count, files=files)
        return self._redelivered

    def _stuck(self, stuck: Mapping[str, str]) -> notice.Stuck:
        problems = self._parts.jobs.problems
        files = tuple(
            notice.StuckFile(
                name=_name(source or f"job {job}"), message=_text(problems.get(job) or "the log has the reason")
            )
            for job, source in list(stuck.items())[: notice.MOST_FILES]
        )
        return notice.Stuck(count=len(stuck), files=files)

    def _folders(self) -> tuple[notice.FolderNotice, ...]:
        counts = self._parts.intake.counts()
        most = sorted(counts, key=lambda name: (-counts[name], name))[: notice.MOST_FILES]
        return tuple(notice.FolderNotice(folder=_name(name), waiting=counts[name]) for name in sorted(most))


def _message(path: str, kind: str, reasons: Reasons, state: str) -> str:
    """Return why a prompt waits, for people."""
    if kind == READY:
        return _READY_IN.get(state, "waits for its turn")
    return Wait(kind).text if kind in _FIXED else reasons[path]


def _for_all(hold: Hold) -> str:
    if hold.kind == "cap" and hold.folder:
        return "the budget of the folder for this day or month is used up"
    return _FOR_ALL.get(hold.kind, hold.reason.message)


def _is_long(hold: Hold, now: float) -> bool:
    return now < hold.until and hold.interval > _LONG_PAUSE


def _in_flight(sources: Mapping[str, str]) -> notice.InFlight:
    names = sorted(_name(source) for source in sources.values() if source)[: notice.MOST_FILES]
    return notice.InFlight(count=len(sources), files=tuple(notice.FileInFlight(name=name) for name in names))


def _stamp(moment: datetime | None) -> float:
    return math.inf if moment is None else moment.timestamp()


def _name(path: str) -> str:
    return printable(printable(known.text(path)), _LONGEST_NAME)


def _text(text: str) -> str:
    return printable(printable(known.text(text)), _LONGEST_TEXT)
