"""What is to be notified: the events of the journal, each in the transaction of what it reports.

An event is a row for each receiver (``command``, ``url``) until that has it. So a kill or a power cut loses none, and
an event that is delivered twice has the same id. Without a receiver nothing is written.

The event of a job is due when its result file is published: who is notified can read it. The events of holds come from
the main thread. If the journal cannot be written, which is a hold itself, they are delivered from memory, and written
later.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from imagewatch.system.text import amount, iso, printable, to_json, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from imagewatch.journal.budget import Budget
    from imagewatch.journal.database import Connection, Database, Row
    from imagewatch.protocol.values import Claim, Decision

LONGEST_AGE_SECONDS = 7 * 86_400.0
"""How long an event is tried to be delivered."""
LONGEST_WAIT_SECONDS = 900.0
"""The longest wait between two tries of an event."""
_FIRST_WAIT_SECONDS = 5.0
_FAILED_SECONDS = 30 * 86_400.0
"""How long an event that was given up is counted."""
_INSERT = (
    "INSERT INTO events (id, target, name, job, content, at, tries) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
_IS_DECIDED = "SELECT 1 FROM jobs WHERE id = ? AND state = 'decided'"
_AGAIN = (
    "UPDATE events SET name = ?, content = ? "
    "WHERE id = (SELECT id FROM events WHERE job = ? ORDER BY number DESC LIMIT 1)"
)
_READY = "failed_at IS NULL AND {} = ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE id = events.job AND state = 'decided')"
_NOT_INDEXED = "target || ''"
# No index has the expression: in the order of their numbers the first one is found after a few rows, however many wait.
_DUE = (
    f"SELECT * FROM events WHERE {_READY.format(_NOT_INDEXED)} AND (next_at <= ? OR next_at > ?) "  # noqa: S608
    "ORDER BY number LIMIT 1"
)
_NEXT = f"SELECT next_at FROM events WHERE {_READY.format('target')} AND next_at > ? ORDER BY next_at LIMIT 1"  # noqa: S608  our own text
_PENDING = "SELECT count(*) AS pending, min(at) AS since FROM events WHERE failed_at IS NULL"
_GIVEN_UP = "SELECT count(*) AS failed FROM events WHERE message <> '' AND failed_at >= ?"
_LAST = (
    "SELECT message FROM events WHERE message <> '' AND coalesce(failed_at, ?1) >= ?1 "
    "ORDER BY coalesce(failed_at, next_at) DESC LIMIT 1"
)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event for one receiver.

    Attributes:
        id: The same for all receivers, and however often it is delivered.
        name: ``completed``, ``failed``, ``unknown``, ``held``, ``released`` or ``cap``.
        content: The result file of the job, else JSON.
        at: When it came about, seconds since the epoch.
        target: The receiver: ``command`` or ``url``.
        job: The job whose end it reports.
        subject: The hold that it reports.
        tries: How often it was tried to be delivered.
        next_at: When it is tried next, seconds since the epoch.
        is_over: Whether it was delivered or given up; it is kept only until its subject is written.
    """

    id: str
    name: str
    content: str
    at: float
    target: str = ""
    job: str = ""
    subject: str = ""
    tries: int = 0
    next_at: float = 0.0
    is_over: bool = False


@dataclass(frozen=True)
class Counts:
    """How far the events are.

    Attributes:
        pending: How many wait to be delivered, those included that are delivered now.
        failed: How many were given up in the last 30 days.
        since: Time of the oldest that waits, seconds since the epoch.
        message: Why the last try that failed did.
    """

    pending: int = 0
    failed: int = 0
    since: float | None = None
    message: str = ""


class Events:
    """The events. Safe to use from several threads.

    Args:
        file: The database.
        clock: Wall clock, seconds since the epoch.

    Attributes:
        is_on: Whether there is a receiver; else nothing is written.
    """

    def __init__(self, file: Database, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._targets: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._staged: dict[tuple[str, str], Event] = {}
        self._is_unwritable = False
        self.is_on = False

    def configure(self, targets: Sequence[str]) -> None:
        """Take the receivers: ``command``, ``url``, or both."""
        self._targets = tuple(targets)
        self.is_on = bool(targets)
        with self._lock:
            for (number, target), event in list(self._staged.items()) if targets else ():
                if target not in targets:  # as ``take_over`` does with those that are written
                    del self._staged[number, target]
                    self._staged.setdefault(
                        (number, targets[0]), replace(event, target=targets[0], tries=0, next_at=0.0)
                    )

    def _rows(self, event: Event) -> list[Event]:
        return [replace(event, target=target) for target in self._targets]

    def _new(self, name: str, content: str, *, job: str = "", subject: str = "") -> Event:
        return Event(id=token_hex(8), name=name, content=content, at=self._clock(), job=job, subject=subject)

    # In the transaction of what they report

    def decided(self, connection: Connection, claim: Claim, decision: Decision) -> None:
        """Write the event of a decision, before that is written.

        A decision that replaces one of which nothing was delivered yet has the same event.
        """
        if not self.is_on or decision.destination == "discarded":
            return
        is_unknown = decision.facts.get("charged") == "unknown"
        name = "completed" if decision.destination == "outbox" else "unknown" if is_unknown else "failed"
        content = whole(decision.result_file)
        is_again = connection.execute(_IS_DECIDED, (claim.job,)).fetchone() is not None
        if not (is_again and connection.execute(_AGAIN, (name, content, claim.job)).rowcount):
            for event in self._rows(self._new(name, content, job=claim.job)):
                _insert(connection, event)

    def spent(self, connection: Connection, budget: Budget) -> None:
        """Write an event for each cap that is nearly spent, once for the cap and its period."""
        for near in budget.nearly_spent() if self.is_on else ():
            subject = f"cap:{near.setting}:{amount(near.cap)}:{near.ends:.0f}"
            if not connection.execute(_BEGIN, (subject, near.ends)).rowcount:
                continue
            connection.execute("DELETE FROM announced WHERE subject LIKE 'cap:%' AND at < ?", (self._clock(),))
            page = {"setting": near.setting, "credits": near.cap, "spent": near.spent, "ends": iso(near.ends)}
            for event in self._rows(self._new("cap", to_json(page))):
                _insert(connection, event)

    # Holds

    def stage(self, name: str, subject: str, page: object) -> None:
        """Keep an event of a hold in memory until it is written.

        Args:
            name: ``held`` or ``released``.
            subject: The hold.
            page: What is known of it.
        """
        event = self._new(name, to_json(page), subject=subject)
        with self._lock:
            self._staged |= {(one.id, one.target): one for one in self._rows(event)}

    def stage_reported(self, subject: str, since: float) -> None:
        """Let the journal know of a hold that was reported: it may be another one than the one that knew it."""
        event = replace(self._new("held", "", subject=subject), at=since, is_over=True)
        with self._lock:
            self._staged |= {(one.id, one.target): one for one in self._rows(event)}

    def staged(self) -> list[Event]:
        """Return the events that are not written yet."""
        with self._lock:
            return list(self._staged.values())

    @staticmethod
    def write(connection: Connection, events: Iterable[Event]) -> None:
        """Write events of holds; those of a hold whose begin was, or was not, reported before are left out."""
        new: dict[str, bool] = {}
        for event in events:
            if event.id not in new:
                change = _END if event.name == "released" else _BEGIN
                values = (event.subject,) if event.name == "released" else (event.subject, event.at)
                new[event.id] = bool(connection.execute(change, values).rowcount)
            if new[event.id] and not event.is_over:
                _insert(connection, event)

    def written(self, events: Sequence[Event]) -> None:
        """Forget events that are written now.

        Raises:
            SpoolError: One was delivered from memory meanwhile, and that cannot be written.
        """
        with self._lock:
            self._is_unwritable = False
            known = [self._staged.pop((event.id, event.target), event) for event in events]
        for before, now in zip(events, known, strict=True):
            if now.is_over and not before.is_over:
                self.delivered(now)

    def unwritable(self) -> None:
        """Note that the journal cannot be written: what is in memory is delivered from there."""
        with self._lock:
            self._is_unwritable = True

    def announced(self) -> dict[str, float]:
        """Return the holds that were reported and whose end was not, with the time since when, by subject.

        Raises:
            SpoolError: The journal cannot be read.
        """
        with self._file.using() as connection:
            rows = connection.execute("SELECT subject, at FROM announced WHERE subject LIKE 'hold:%'").fetchall()
        return {row["subject"]: row["at"] for row in rows}

    # Delivery

    def take_over(self) -> None:
        """Give what waits for a receiver that there is no more to the other one, and forget what failed long ago.

        Raises:
            SpoolError: The journal cannot be used.
        """
        old = self._clock() - _FAILED_SECONDS
        with self._file.using() as connection:
            rows = connection.execute("SELECT DISTINCT target FROM events WHERE failed_at IS NULL").fetchall()
            is_old = connection.execute("SELECT 1 FROM events WHERE failed_at < ?", (old,)).fetchone() is not None
        removed = [row["target"] for row in rows if row["target"] not in self._targets]
        if not ((removed and self._targets) or is_old):
            return

        def act(connection: Connection) -> None:
            connection.execute("DELETE FROM events WHERE failed_at < ?", (old,))
            for target in removed:
                connection.execute(_RETARGET, (self._targets[0], target))
                connection.execute("DELETE FROM events WHERE target = ? AND failed_at IS NULL", (target,))

        self._file.change(act, synced=False)

    def due_unwritten(self, target: str) -> Event | None:
        """Return the first event that is to be delivered now, of those that cannot be written, or None."""
        now = self._clock()
        with self._lock:
            staged = self._staged.values() if self._is_unwritable else ()
            due = (one for one in staged if one.target == target and one.next_at <= now and not one.is_over)
            return next(due, None)

    def due(self, target: str) -> Event | None:
        """Return the first event of the journal that is to be delivered to a receiver now, or None.

        Raises:
            SpoolError: The journal cannot be read.
        """
        now = self._clock()
        with self._file.using() as connection:
            # A time far ahead is one of before the clock was set back.
            row = connection.execute(_DUE, (target, now, now + LONGEST_WAIT_SECONDS)).fetchone()
        return None if row is None else _event(row)

    def next_due(self, target: str) -> float | None:
        """Return in how many seconds the next event is to be delivered that is not due yet, or None.

        Raises:
            SpoolError: The journal cannot be read.
        """
        now = self._clock()
        with self._file.using() as connection:
            row = connection.execute(_NEXT, (target, now)).fetchone()
        return None if row is None else max(row["next_at"] - now, 0.0)

    def delivered(self, event: Event) -> None:
        """Note that a receiver has an event.

        Raises:
            SpoolError: The journal cannot be written; then it would be delivered again.
        """
        if not self._note_staged(replace(event, is_over=True)):
            values = event.id, event.target
            delete = "DELETE FROM events WHERE id = ? AND target = ?"
            self._file.change(lambda connection: connection.execute(delete, values), synced=False)

    def failed(self, event: Event, message: str) -> Event:
        """Note that a receiver did not accept an event, and return it as it is from now on.

        Raises:
            SpoolError: The journal cannot be written.
        """
        now = self._clock()
        wait = min(_FIRST_WAIT_SECONDS * 2 ** min(event.tries, 20), LONGEST_WAIT_SECONDS)
        is_over = now - event.at >= LONGEST_AGE_SECONDS
        event = replace(event, tries=event.tries + 1, next_at=now + wait, is_over=is_over)
        if not self._note_staged(event):
            values = (event.tries, event.next_at, whole(printable(message, 500)), now if is_over else None)
            change = "UPDATE events SET tries = ?, next_at = ?, message = ?, failed_at = ? WHERE id = ? AND target = ?"
            lighten = "UPDATE events SET content = '' WHERE id = ? AND target = ? AND failed_at IS NOT NULL"

            def act(connection: Connection) -> None:
                connection.execute(change, (*values, event.id, event.target))
                connection.execute(lighten, (event.id, event.target))

            self._file.change(act, synced=False)
        return event

    def _note_staged(self, event: Event) -> bool:
        """Note how far an event is that is only in memory; return whether it is."""
        with self._lock:
            if (event.id, event.target) not in self._staged:
                return False
            self._staged[event.id, event.target] = event
            return True

    def counts(self) -> Counts:
        """Return how far the events are.

        Raises:
            SpoolError: The journal cannot be read.
        """
        old = self._clock() - _FAILED_SECONDS
        with self._file.using() as connection:
            waiting = connection.execute(_PENDING).fetchone()
            failed = connection.execute(_GIVEN_UP, (old,)).fetchone()["failed"]
            last = connection.execute(_LAST, (old,)).fetchone()
        return Counts(waiting["pending"], failed, waiting["since"], last["message"] if last else "")


_RETARGET = (
    "UPDATE events SET target = ?1, tries = 0, next_at = 0 WHERE target = ?2 "
    "AND NOT EXISTS (SELECT 1 FROM events AS other WHERE other.id = events.id AND other.target = ?1)"
)
_BEGIN = "INSERT INTO announced (subject, at) VALUES (?, ?) ON CONFLICT DO NOTHING"
_END = "DELETE FROM announced WHERE subject = ?"


def _insert(connection: Connection, event: Event) -> None:
    values = (event.id, event.target, event.name, event.job, event.content, event.at, event.tries)
    connection.execute(_INSERT, values)


def _event(row: Row) -> Event:
    known = {name: row[name] for name in ("id", "name", "content", "at", "target", "job", "tries", "next_at")}
    return Event(**known)


def page_of(event: Event) -> dict[str, object]:
    """Return the content of an event that is JSON."""
    found = json.loads(event.content)
    return found if isinstance(found, dict) else {}
