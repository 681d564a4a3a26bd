"""The status file for people: what ``imagewatch-status.json`` says, as plain text. Pure.

The reader has only the folders. What needs a person comes before what needs only time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime, tzinfo

    from imagewatch.protocol.notice import HoldNotice, Notice, WaitingFile

NO_ACTION = "no action needed"
_MOST = 20
"""How many files of each kind are named; the other file names more."""
_READY, _AT_A_LIMIT = "ready", "cap"
_WIDTH = 255


def as_text(page: Notice, zone: tzinfo | None = None) -> str:
    """Return a status as text.

    Args:
        page: The status.
        zone: The time zone of its times; None for that of this machine.
    """
    return "\n".join(_Text(page, zone).lines()) + "\n"


class _Text:
    """One text.

    Args:
        page: The status.
        zone: The time zone of its times.
    """

    def __init__(self, page: Notice, zone: tzinfo | None) -> None:
        self._page = page
        self._zone = zone

    def lines(self) -> Iterator[str]:
        yield from self._state()
        for part in (
            *map(self._hold, self._page.holds),
            self._ignored(),
            self._blocked(),
            self._stuck(),
            self._in_turn(),
            self._in_flight(),
            self._redelivered(),
        ):
            if found := list(part):
                yield from ("", *found)
        yield ""
        yield "imagewatch writes this file again and again: a note that you add here is lost."

    # Times

    def _at(self, moment: datetime) -> str:
        return moment.astimezone(self._zone).strftime("%Y-%m-%d %H:%M:%S")

    def _offset(self) -> str:
        offset = self._page.written_at.astimezone(self._zone).strftime("%z")
        return f"UTC{offset[:3]}:{offset[3:5]}"

    # The state

    def _state(self) -> Iterator[str]:
        page = self._page
        if page.state == "stopped":
            yield f"imagewatch is STOPPED since {self._at(page.stopped_at or page.written_at)} ({self._offset()})."
            yield "Prompts stay in the inbox and are processed when it runs again."
            yield "What to do: ask the administrator to start it."
            return
        if page.state == "on_hold":
            yield "imagewatch is ON HOLD: at the moment it sends no prompts. They stay in the inbox."
        else:
            yield "imagewatch is running."
        yield f"As of {self._at(page.written_at)} ({self._offset()})."
        if page.next_writing_at is not None:
            yield f"This file is written again by {self._at(page.next_writing_at)}. If it is later than that now,"
            yield "imagewatch is NOT running: ask the administrator to start it."

    def _hold(self, hold: HoldNotice) -> Iterator[str]:
        since = f" since {self._at(hold.since)}" if hold.since else ""
        whose = ""
        if hold.folder is not None:
            whose = f", only prompts in the folder {_name(hold.folder)}"
        elif hold.provider is not None:
            whose = f", only prompts for {printable(hold.provider)}"
        yield f"On hold{since} ({printable(hold.kind)}{whose}):"
        yield f"  {printable(hold.message)}"
        if hold.next_try_at is None:
            yield "  It lasts until the administrator ends it."
        elif self._page.state != "stopped":
            yield f"  Next try at {self._at(hold.next_try_at)}."
        yield f"  For the administrator: {printable(hold.next)}"

    # What needs a person

    def _ignored(self) -> Iterator[str]:
        ignored = self._page.ignored
        if not ignored.count:
            return
        yield f"Ignored: {_count(ignored.count, 'file or folder', 'files or folders')} in the inbox."
        for one in ignored.files[:_MOST]:
            yield from _entry(one.name, one.message, one.next)
        yield from _more(ignored.count, len(ignored.files[:_MOST]))

    def _blocked(self) -> Iterator[str]:
        files = [one for one in self._page.waiting.files if one.why not in {_READY, _AT_A_LIMIT}]
        if not files:
            return
        yield "Not ready yet:"
        for one in files[:_MOST]:
            since = f" (since {self._at(one.since)})" if one.since else ""
            yield from _entry(one.name, one.message + since, one.next)
        yield from self._others(files)

    def _stuck(self) -> Iterator[str]:
        stuck = self._page.stuck
        if not stuck.count:
            return
        yield f"Cannot finish: {_count(stuck.count, 'job', 'jobs')}. Ask the administrator."
        for one in stuck.files[:_MOST]:
            yield from _entry(one.name, one.message, "")
        yield from _more(stuck.count, len(stuck.files[:_MOST]))

    # What needs only time

    def _in_turn(self) -> Iterator[str]:
        waiting = self._page.waiting
        if not waiting.count:
            yield "Waiting: no prompts."
            return
        since = f", the oldest since {self._at(waiting.oldest_since)}" if waiting.oldest_since else ""
        yield f"Waiting: {_count(waiting.count, 'prompt', 'prompts')}{since}."
        folders = self._page.folders
        if len(folders) > 1:
            yield "The folders take turns:"
            yield from (f"  {_name(one.folder) or 'directly in the inbox'}: {one.waiting:,}" for one in folders[:_MOST])
            yield from _more(len(folders), len(folders[:_MOST]))
        if ready := [one for one in waiting.files if one.why == _READY]:
            yield f"Ready ({ready[0].message}):" if len(ready) == 1 else f"Ready, the oldest first ({_waits(ready)}):"
            yield from self._names(ready)
        if limited := [one for one in waiting.files if one.why == _AT_A_LIMIT]:
            yield "At a limit, the oldest first (sent when the limit allows it):"
            yield from self._names(limited)

    def _names(self, files: Sequence[WaitingFile]) -> Iterator[str]:
        yield from (f"  {_name(one.name)}" for one in files[:_MOST])
        yield from self._others(files)

    def _others(self, files: Sequence[WaitingFile]) -> Iterator[str]:
        """Of very many prompts only some are in the status, so how many there are of one kind is not known."""
        waiting = self._page.waiting
        if waiting.count <= len(waiting.files):
            yield from _more(len(files), len(files[:_MOST]))
        elif len(files) > _MOST:
            yield "  … and more"

    def _in_flight(self) -> Iterator[str]:
        in_flight = self._page.in_flight
        if not in_flight.count:
            return
        yield f"Being processed: {_count(in_flight.count, 'prompt', 'prompts')}."
        yield from (f"  {_name(one.name)}" for one in in_flight.files[:_MOST])
        yield from _more(in_flight.count, len(in_flight.files[:_MOST]))

    def _redelivered(self) -> Iterator[str]:
        files = self._page.redelivered.files[:_MOST]
        if not files:
            return
        yield "Delivered again and therefore not sent (the prompt was processed before):"
        for one in files:
            yield f"  {_name(one.name)}" + (f" (at {self._at(one.at)})" if one.at else "")
        yield "  What to do: nothing. If you want another image, open the prompt, save it again and drop it again."


def _waits(files: Sequence[WaitingFile]) -> str:
    return files[0].message.replace("waits", "they wait").replace(" its ", " their ")


def _entry(name: str, message: str, step: str) -> Iterator[str]:
    yield f"  {_name(name)}"
    yield f"    {printable(message)}"
    if step and not step.startswith(NO_ACTION):
        yield f"    What to do: {printable(step)}"


def _more(count: int, shown: int) -> Iterator[str]:
    if count > shown:
        yield f"  … and {count - shown:,} more"


def _count(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _name(name: str) -> str:
    return printable(name, _WIDTH)
