"""What concerns all daemons of a shared account: its holds, and the daemons themselves.

A hold of the account (``Kind.is_shared``) is one row for all daemons. The transaction that records an attempt asks for
it, with the account's row locked. So there is one probe at a time over all hosts: the row names the job that may be
sent, and until when no other one may. The times are those of the database's clock.

Each change concerns a single row. A daemon never replaces the holds by those that it has read before.

Without a shared database there is nothing here: ``is_on`` is false, and the holds are those of the one daemon.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.journal.holds import FIRST_SECONDS, LONGEST_ASKED_SECONDS, LONGEST_SECONDS
from imagewatch.protocol.reasons import KINDS, Others, Reason
from imagewatch.system.masking import known
from imagewatch.system.text import printable, whole

if TYPE_CHECKING:
    from imagewatch.journal.database import Connection, Database

MANUAL = "manual_account"
SHARED = tuple(kind.name for kind in KINDS.values() if kind.is_shared)
"""The kinds of hold that concern all daemons of a shared account."""
PUT_ON_HOLD = "put on hold manually, with all daemons of the account"
_PROBED = tuple(kind for kind in SHARED if KINDS[kind].others is Others.PROBE)
_LONGEST = 500
_PROBE_SECONDS = 960.0
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_ARE_PROBED = f"scope = '' AND kind IN ({', '.join(repr(kind) for kind in _PROBED)})"
_HOLDS = f"""
    SELECT kind, message, {_NOW} - since AS age, next_at - {_NOW} AS seconds, seconds AS interval, prober,
           CASE WHEN prober = '' THEN 0 ELSE probe_ends_at - {_NOW} END AS probe_seconds
    FROM holds WHERE scope = '' ORDER BY since, kind"""  # noqa: S608  our own names
_BEGIN = f"""
    INSERT INTO holds (kind, message, since, seconds, next_at) VALUES (?1, ?2, {_NOW}, ?3, {_NOW} + ?3)
    ON CONFLICT DO NOTHING"""  # noqa: S608
_CONTINUE = f"""
    UPDATE holds SET message = ?1, prober = '', probe_ends_at = 0,
        seconds = coalesce(?2, least(seconds * 2, ?3)), next_at = {_NOW} + coalesce(?2, least(seconds * 2, ?3))
    WHERE scope = '' AND kind = ?4 AND next_at <= {_NOW}
    AND (prober IN ('', ?5) OR probe_ends_at <= {_NOW})"""  # noqa: S608
_PROLONG = f"UPDATE holds SET next_at = greatest(next_at, {_NOW} + ?) WHERE scope = '' AND kind = ?"  # noqa: S608
_PROBE = f"UPDATE holds SET prober = ?, probe_ends_at = {_NOW} + ? WHERE {_ARE_PROBED}"  # noqa: S608
_ANSWERED = f"DELETE FROM holds WHERE {_ARE_PROBED} AND prober = ?"  # noqa: S608
_OVER = f"UPDATE holds SET prober = '', probe_ends_at = 0 WHERE {_ARE_PROBED} AND prober = ?"  # noqa: S608
_PROBE_NOW = f"UPDATE holds SET next_at = {_NOW} WHERE {_ARE_PROBED} AND next_at > {_NOW}"  # noqa: S608
_HOLD = f"""
    INSERT INTO holds AS h (kind, message, since) VALUES ('{MANUAL}', ?, {_NOW})
    ON CONFLICT (account, scope, kind) DO UPDATE SET message = excluded.message"""  # noqa: S608
_ASK_ALL = f"""
    INSERT INTO requests (inbox, instance, kind, asked_at)
    SELECT inbox, name, 'release', {_NOW} FROM instances"""  # noqa: S608
_MEMBERS = f"""
    SELECT name, host, folder, version, started_at, seen_at, ended_at, status, {_NOW} - seen_at AS unseen_seconds
    FROM instances WHERE forgotten_at IS NULL ORDER BY name"""  # noqa: S608


@dataclass(frozen=True)
class AccountHold:
    """A hold of the account; times are seconds from now.

    Attributes:
        kind: Its kind.
        message: Why.
        age: How long ago it began.
        seconds: After how many seconds the next request may be sent as a probe; negative if that is so already.
        interval: Seconds between the last refusal and the next probe.
        prober: The job that is sent as a probe; empty: none.
        probe_seconds: After how many seconds another one may be sent though that one has no result.
    """

    kind: str
    message: str
    age: float
    seconds: float
    interval: float
    prober: str
    probe_seconds: float

    @property
    def is_manual(self) -> bool:
        """Whether a person has begun it, and only a person ends it."""
        return self.kind == MANUAL

    def forbids(self, job: str) -> float:
        """Return for how many seconds a job may not be sent; 0: it may, as a probe."""
        others = self.probe_seconds if self.prober not in {"", job} else 0.0
        return max(self.seconds, others, 0.0)


@dataclass(frozen=True)
class Member:
    """A daemon of the account; times are seconds since the epoch.

    Attributes:
        name: Its ``shared.instance``.
        host: The host on which it was started last.
        folder: Its inbox there.
        version: Of imagewatch.
        started_at: When it was started.
        seen_at: When it last reported that it runs.
        ended_at: When it was stopped; None while it runs, and after a kill.
        status: What it reported then, as JSON.
        unseen_seconds: How long ago that was.
    """

    name: str
    host: str
    folder: str
    version: str
    started_at: float
    seen_at: float
    ended_at: float | None
    status: str
    unseen_seconds: float


class Account:
    """The holds of a shared account. Safe to use from several threads.

    Args:
        file: The database.

    Attributes:
        is_on: Whether there is a shared database.
        first_seconds: How long a hold lasts before its first probe, if its reason does not say.
        probe_seconds: How long a probe may be without a result before another one may be sent.
    """

    def __init__(self, file: Database) -> None:
        self._file = file
        self.is_on = file.is_shared
        self.first_seconds = FIRST_SECONDS
        self.probe_seconds = _PROBE_SECONDS
        self._lock = threading.Lock()
        self._probing: set[str] = set()
        self._left: dict[str, bool] = {}  # probes that are over, and whether they were answered: not written yet
        self._unreported: set[str] = set()

    def concerns(self, kind: str) -> bool:
        """Return whether a hold of this kind is one of the account, which the database has."""
        return self.is_on and kind in SHARED

    def holds(self) -> list[AccountHold]:
        """Return the holds of the account, the oldest first.

        Raises:
            SpoolError: The database cannot be used.
        """
        if not self.is_on:
            return []
        self._write_left()
        with self._file.using() as connection:
            return _holds(connection)

    # In the transaction that records an attempt

    def refusal(self, connection: Connection, job: str, *, probes: bool) -> Reason | None:
        """Return why a job may not be sent, or None.

        Args:
            connection: That of the transaction.
            job: The job.
            probes: Whether it is sent now; then it is the probe of the holds that there are.
        """
        holds = _holds(connection)
        for hold in holds:
            if hold.is_manual:
                return Reason(MANUAL, hold.message or PUT_ON_HOLD)
            if (seconds := hold.forbids(job)) > 0:
                return Reason(hold.kind, hold.message, seconds)
        if holds and probes:
            connection.execute(_PROBE, (job, self.probe_seconds))
            with self._lock:
                self._probing.add(job)
        return None

    # What follows from a response; workers call ``refused`` and ``not_reported``

    def refused(self, reason: Reason, job: str) -> bool:
        """Begin or prolong a hold; return whether the job that was refused has begun it: it reports that.

        Raises:
            SpoolError: The database cannot be used.
        """
        message = printable(known.text(whole(reason.message)), _LONGEST)
        asked = min(reason.seconds, LONGEST_ASKED_SECONDS) if reason.seconds and reason.seconds > 0 else None
        first = self.first_seconds if asked is None else asked

        def act(connection: Connection) -> bool:
            if connection.execute(_BEGIN, (reason.kind, message, first)).rowcount:
                return True
            values = message, asked, LONGEST_SECONDS, reason.kind, job
            if not connection.execute(_CONTINUE, values).rowcount and asked is not None:
                connection.execute(_PROLONG, (asked, reason.kind))
            return False

        return self._file.change(act, locked=True)

    def not_reported(self, kind: str) -> None:
        """Let the next job report a refusal of this kind: the first one could not write its error file."""
        with self._lock:
            self._unreported.add(kind)

    def over(self, job: str, *, is_answered: bool) -> None:
        """Note that a job has ended or waits: if it was a probe, another may be sent, or its holds end.

        Raises:
            SpoolError: The database cannot be used; it is written later.
        """
        with self._lock:
            if job not in self._probing:
                return
            self._probing.discard(job)
            self._left[job] = is_answered
        self._write_left()

    def _write_left(self) -> None:
        """Write what could not be written before."""
        with self._lock:
            over, unreported = dict(self._left), set(self._unreported)
        if not over and not unreported:
            return

        def act(connection: Connection) -> None:
            for job, is_answered in over.items():
                connection.execute(_ANSWERED if is_answered else _OVER, (job,))
            for kind in unreported:
                connection.execute("DELETE FROM holds WHERE scope = '' AND kind = ?", (kind,))

        self._file.change(act, synced=False, locked=True)
        with self._lock:
            self._left = {job: is_answered for job, is_answered in self._left.items() if job not in over}
            self._unreported -= unreported

    # What a person asks for

    def probe_now(self) -> None:
        """Let the next probe be sent immediately.

        Raises:
            SpoolError: The database cannot be used.
        """
        if self.is_on:
            self._file.change(lambda connection: connection.execute(_PROBE_NOW), synced=False, locked=True)

    def hold(self, reason: str) -> None:
        """Put all daemons on hold, until ``release``. When this returns, none of them records an attempt any more.

        Raises:
            SpoolError: The database cannot be used.
        """
        message = printable(whole(reason).strip(), _LONGEST)
        self._file.change(lambda connection: connection.execute(_HOLD, (message,)), locked=True)

    def release(self) -> None:
        """End the holds of the account, and ask each daemon for the end of its own ones.

        A manual hold of a single daemon stays.

        Raises:
            SpoolError: The database cannot be used.
        """

        def act(connection: Connection) -> None:
            connection.execute("DELETE FROM holds WHERE scope = ''")
            connection.execute(_ASK_ALL)

        self._file.change(act, locked=True)

    def members(self) -> list[Member]:
        """Return the daemons of the account.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            rows = connection.execute(_MEMBERS).fetchall()
        return [Member(*row) for row in rows]


def _holds(connection: Connection) -> list[AccountHold]:
    return [AccountHold(**{name: row[name] for name in row.keys()}) for row in connection.execute(_HOLDS).fetchall()]  # noqa: SIM118
