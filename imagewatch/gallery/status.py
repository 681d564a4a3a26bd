"""What the daemon reports in ``imagewatch-status.json``, as far as the page shows it at its top.

Other people may write the folder of that file. ``protocol.notice`` bounds its size and checks its types; here its texts
and lists are cut. The page decides nothing by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.gallery.values import Hold, Listed, NamedProblem, Status

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from imagewatch.protocol.notice import Notice

_MOST_HOLDS = 20
_MOST_FILES = 50
"""Of each kind that are named on the page; all are counted."""
_MOST_CHARACTERS = 500
"""Of a text."""


def status_of(notice: Notice | None, now: float) -> Status | None:
    """Return what the page shows of the daemon's status; None if there is nothing to report.

    Args:
        notice: What was read.
        now: Wall-clock time, seconds since the epoch.
    """
    if notice is None:
        return None
    waiting = notice.waiting
    is_overdue = notice.is_overdue(now)
    status = Status(
        state="overdue" if is_overdue else notice.state,
        # Times that change with each writing are left out while all is well: the page would be written each time.
        reported_at=_milliseconds(notice.written_at) if is_overdue else 0,
        due_at=_milliseconds(notice.next_writing_at) if is_overdue else 0,
        stopped_at=_milliseconds(notice.stopped_at),
        holds=[
            Hold(
                kind=_cut(hold.kind),
                provider=_cut(hold.provider or ""),
                folder=_cut(hold.folder or ""),
                message=_cut(hold.message),
                since=_milliseconds(hold.since),
                next_try_at=_milliseconds(hold.next_try_at),
                next=_cut(hold.next),
            )
            for hold in notice.holds[:_MOST_HOLDS]
        ],
        waiting=_listed(waiting.count, ((file.name, file.message, file.next) for file in waiting.files)),
        oldest_since=_milliseconds(waiting.oldest_since),
        in_flight=0 if is_overdue else notice.in_flight.count,
        ignored=_listed(notice.ignored.count, ((file.name, file.message, file.next) for file in notice.ignored.files)),
        stuck=_listed(notice.stuck.count, ((file.name, file.message, "") for file in notice.stuck.files)),
    )
    return None if status == Status(state="running") else status


def _listed(count: int, files: Iterable[tuple[str, str, str]]) -> Listed:
    named = [
        NamedProblem(_cut(name), _cut(message), _cut(next_step))
        for _, (name, message, next_step) in zip(range(_MOST_FILES), files, strict=False)
    ]
    return Listed(max(count, len(named)), named)


def _milliseconds(moment: datetime | None) -> int:
    """Return a time as browsers count it; 0 if it is not known."""
    return int(moment.timestamp() * 1000) if moment else 0


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
