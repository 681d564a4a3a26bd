"""One inbox that several daemons process together: who scans it, and who has which job.

One daemon of the inbox, the leader, scans it and writes a row for each prompt that may be claimed. Every daemon, the
leader too, takes rows. A row is held for a time (the lease) that its daemon prolongs. When the lease of a job has
ended, another daemon takes the job over, with the next epoch: the number in the name of its claim folder, so that an
earlier holder that continues later finds no folder.

None of that decides whether a request is sent: ``Journal.spend`` does, and an attempt without a result is never sent by
another daemon, whatever the clocks say. Leases decide only when another daemon takes a job over.

Without a common inbox there is nothing here: ``is_on`` is false.
"""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

import msgspec

from imagewatch.journal.row import OVER_SECONDS
from imagewatch.protocol.values import Claim, dump, load
from imagewatch.system.errors import LostJobError, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from imagewatch.journal.database import Connection, Database, Row

_NOW = "extract(epoch FROM clock_timestamp())::float8"
_ME = "current_setting('imagewatch.instance')"
_INBOX = "current_setting('imagewatch.inbox')"
_LEAD = f"""
    INSERT INTO leaders AS l (lease_ends_at) VALUES ({_NOW} + ?)
    ON CONFLICT (account, inbox) DO UPDATE SET holder = excluded.holder, lease_ends_at = excluded.lease_ends_at
    WHERE l.holder = excluded.holder OR l.lease_ends_at < {_NOW}"""  # noqa: S608  our own names
_RESIGN = f"""
    UPDATE leaders SET lease_ends_at = 0 WHERE holder = {_ME}"""  # noqa: S608
_OFFER = "UPDATE jobs SET holder = '' WHERE id = ? AND epoch = 0"
_OFFER_ALL = """
    INSERT INTO jobs (id, folder, stem, claim, state, opened_at, holder) VALUES {} ON CONFLICT DO NOTHING"""
_KNOWN = "SELECT id FROM jobs WHERE id = ANY(?)"
_NOTIFY = """
    SELECT pg_notify('imagewatch_offers',
        current_setting('imagewatch.account') || chr(10) || current_setting('imagewatch.inbox'))"""
_TAKE = f"""
    UPDATE jobs SET holder = {_ME}, epoch = epoch + 1, lease_ends_at = {_NOW} + ?
    WHERE id = ANY(ARRAY(
        SELECT id FROM inbox_jobs WHERE holder = '' AND state = 'open' ORDER BY opened_at, id LIMIT ?
        FOR UPDATE SKIP LOCKED
    )) RETURNING id, claim, epoch, opened_at"""  # noqa: S608  with IN, the server may ask more than once, and take more
_TAKE_OVER = f"""
    UPDATE jobs SET holder = {_ME}, epoch = epoch + 1, lease_ends_at = {_NOW} + ?
    WHERE id = ANY(ARRAY(
        SELECT id FROM inbox_jobs WHERE holder <> '' AND lease_ends_at < {_NOW} AND state NOT IN ('done', 'kept')
        AND NOT (holder = {_ME} AND id = ANY(?)) AND NOT id = ANY(?)
        ORDER BY opened_at, id LIMIT ? FOR UPDATE SKIP LOCKED
    )) RETURNING id, claim, epoch, opened_at"""  # noqa: S608
_ANY = "SELECT 1 FROM inbox_jobs WHERE holder = '' AND state = 'open' LIMIT 1"
_ANY_OLD = f"""
    SELECT 1 FROM inbox_jobs WHERE holder <> '' AND lease_ends_at < {_NOW} AND state NOT IN ('done', 'kept')
    LIMIT 1"""  # noqa: S608
_RENEW = f"UPDATE own_jobs SET lease_ends_at = {_NOW} + ? WHERE state <> 'done' AND id = ANY(?) RETURNING id, epoch"  # noqa: S608
_LET_GO = "UPDATE own_jobs SET lease_ends_at = 0 WHERE state <> 'done'"
_HELD = f"SELECT holder = {_ME} AND epoch = ? AS is_held FROM jobs WHERE id = ?"  # noqa: S608
_WHERE = "SELECT holder, epoch, state FROM jobs WHERE id = ?"
_NAMES = "SELECT folder, stem, holder FROM inbox_jobs WHERE state IN ('open', 'decided', 'published')"
_EPOCHS = "SELECT id, epoch FROM own_jobs WHERE state NOT IN ('done', 'kept')"
_SLOTS = f"""
    SELECT coalesce(sum(slots), 0) AS slots FROM instances
    WHERE inbox = {_INBOX} AND ended_at IS NULL AND seen_at > {_NOW} - ?"""  # noqa: S608
_SENT_BY = """
    SELECT a.instance, a.answer_on, a.sent_at, i.forgotten_at IS NOT NULL AS is_forgotten FROM attempts AS a
    LEFT JOIN instances AS i ON i.name = a.answer_on
    WHERE a.job = ? AND a.attempt = ?"""
_ANSWER_ON = f"UPDATE attempts SET answer_on = {_ME} WHERE job = ? AND attempt = ?"  # noqa: S608
_ANSWER_IS_THERE = "UPDATE attempts SET answer_on = '' WHERE job = ? AND answer_on <> ''"
_REOPEN = f"""
    UPDATE jobs SET state = 'reopened', holder = {_ME}, epoch = epoch + 1, lease_ends_at = {_NOW} + ?
    WHERE id = ? AND state = 'done' AND decision <> ''
    AND (EXISTS (
            SELECT 1 FROM attempts WHERE job = jobs.id AND attempt = ANY(?)
            AND (outcome = 'completed' OR (outcome = 'unknown' AND status = 0))
        )
        OR (EXISTS (SELECT 1 FROM attempts WHERE job = jobs.id)
            AND NOT EXISTS (SELECT 1 FROM attempts WHERE job = jobs.id AND outcome NOT IN ('unsent', 'busy'))))
    RETURNING epoch"""  # noqa: S608
_REOPEN_KEPT = f"""
    UPDATE jobs SET state = 'reopened', holder = {_ME}, epoch = epoch + 1, lease_ends_at = {_NOW} + ?
    WHERE id = ? AND state = 'kept' RETURNING epoch"""  # noqa: S608
_MEMBER = f"""
    SELECT forgotten_at IS NOT NULL AS is_removed, ended_at IS NULL AND seen_at > {_NOW} - ? AS is_running
    FROM instances WHERE name = ?"""  # noqa: S608
_UNSENT = """
    UPDATE attempts SET outcome = 'unsent', charged = 'no', reserved = 0, message = ''
    WHERE job = ? AND attempt = ? AND nonce = ? AND outcome IN ('sent', 'unknown')"""
_ENDED = """
    SELECT attempt FROM attempts
    WHERE job = ? AND (outcome NOT IN ('sent', 'unknown') OR (outcome = 'unknown' AND status <> 0))"""
_ANY_RECENT = f"""
    SELECT 1 FROM attempts WHERE job = ? AND greatest(claimed_at, sent_at, answered_at) >= {_NOW} - ?
    LIMIT 1"""  # noqa: S608
_NEXT_EPOCH = "UPDATE own_jobs SET epoch = ? WHERE id = ? AND epoch = ? AND state <> 'done'"
_PLACE = "SELECT folder, state FROM inbox_jobs WHERE id = ?"
_MARGIN = 0.8
"""Of a lease: after so much of it without a sign of the database a job is not sent any more."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """A job that this daemon has now.

    Attributes:
        job: Its id.
        epoch: How often it was taken.
        claim: What was claimed, or is to be; None: its record is damaged.
    """

    job: str
    epoch: int
    claim: Claim | None


class SentBy(msgspec.Struct, frozen=True, kw_only=True):
    """Who has sent an attempt.

    Attributes:
        instance: The daemon.
        answer_on: The daemon that alone has the response; empty: none, or it is in the claim folder.
        sent_at: When, seconds since the epoch.
        is_forgotten: Whether ``answer_on`` was removed from the account.
    """

    instance: str
    answer_on: str
    sent_at: float
    is_forgotten: bool


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job is from.

    Attributes:
        folder: Below the inbox.
        state: Of its row.
    """

    folder: str
    state: str


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Common:
    """Who has which job of a common inbox. Safe to use from several threads.

    Args:
        file: The database.
        boottime: Seconds since this host was started, its sleep included.

    Attributes:
        is_on: Whether other daemons process the same inbox.
        lease_seconds: How long a job is held after a sign of its daemon.
        instance: The name of this daemon.
        names_of_inbox: The account, and the name of the common inbox; empty without one.
    """

    def __init__(self, file: Database, boottime: Callable[[], float] = _boottime) -> None:
        self._file = file
        self._now = boottime
        self._epochs: dict[str, int] = {}
        self._renewed: dict[str, float] = {}
        self._leads_until = 0.0
        self.is_on = file.is_common
        self.lease_seconds = 60.0
        self.instance = file.place.instance if file.is_common else ""  # type: ignore[attr-defined]
        place = file.place if file.is_common else None  # type: ignore[attr-defined]
        self.names_of_inbox = (place.account, place.inbox) if place else ("", "")

    # The leader

    def lead(self) -> bool:
        """Become or stay the leader if no other daemon is; return whether this one is.

        Raises:
            SpoolError: The database cannot be used.
        """
        began, values = self._now(), (self.lease_seconds,)
        leads = self._file.change(lambda one: bool(one.execute(_LEAD, values).rowcount), synced=False)
        self._leads_until = began + _MARGIN * self.lease_seconds if leads else 0.0
        return leads

    @property
    def leads(self) -> bool:
        """Whether this daemon scans the inbox."""
        return not self.is_on or self._now() < self._leads_until

    def resign(self) -> None:
        """Let another daemon scan the inbox.

        Raises:
            SpoolError: The database cannot be used.
        """
        self._leads_until = 0.0
        self._file.change(lambda one: one.execute(_RESIGN), synced=False)

    def offer(self, connection: Connection, job: str) -> None:
        """Let any daemon of the inbox take a job that is noted in this transaction."""
        connection.execute(_OFFER, (job,))
        connection.execute(_NOTIFY)

    def offer_all(self, claims: Sequence[Claim]) -> set[str]:
        """Let any daemon of the inbox take prompts; return the ids of the jobs that are noted.

        It need not be synced: the files are in the inbox. A job of the same name that is not over keeps the name.

        Raises:
            SpoolError: The database cannot be used.
        """
        rows = ", ".join(["(?, ?, ?, ?, 'open', ?, '')"] * len(claims))
        values: list[object] = []
        for claim in claims:
            names = os.fsencode(claim.folder), os.fsencode(claim.stem)
            values += [claim.job, *names, dump(claim).decode(), claim.at]

        def act(connection: Connection) -> set[str]:
            connection.execute(_OFFER_ALL.format(rows), values)
            connection.execute(_NOTIFY)
            known = connection.execute(_KNOWN, ([claim.job for claim in claims],)).fetchall()
            return {row["id"] for row in known}

        return self._file.change(act, synced=False)

    def names(self) -> tuple[set[tuple[str, str]], int]:
        """Return folder and stem of each job that is not over, and how many jobs no daemon has taken yet.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            rows = connection.execute(_NAMES).fetchall()
        names = {(os.fsdecode(row["folder"]), os.fsdecode(row["stem"])) for row in rows}
        return names, sum(not row["holder"] for row in rows)

    def slots(self) -> int:
        """Return how many requests the daemons of the inbox send at the same time.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            return int(connection.execute(_SLOTS, (self.lease_seconds,)).fetchone()["slots"])

    # Taking

    def take(self, most: int) -> list[Taken]:
        """Take jobs that are offered, the oldest first. It survives a power cut when this returns.

        Raises:
            SpoolError: The database cannot be used.
        """
        return self._taken(_TAKE, _ANY, (self.lease_seconds, most))

    def take_over(self, most: int, at_work: Collection[str] = ()) -> list[Taken]:
        """Take jobs of daemons that do not show any more that they run, and own ones that this process does not have.

        Args:
            most: So many at most.
            at_work: Jobs that a worker of this process has: their epoch must not change meanwhile.

        Raises:
            SpoolError: The database cannot be used.
        """
        return self._taken(_TAKE_OVER, _ANY_OLD, (self.lease_seconds, list(self._epochs), list(at_work), most))

    def _taken(self, statement: str, question: str, values: tuple[object, ...]) -> list[Taken]:
        began = self._now()
        with self._file.using() as connection:  # nearly always there is nothing
            if not connection.execute(question).fetchone():
                return []
        rows = self._file.change(lambda one: one.execute(statement, values).fetchall())
        rows.sort(key=lambda row: (row["opened_at"], row["id"]))
        for row in rows:
            self._epochs[row["id"]], self._renewed[row["id"]] = row["epoch"], began
        return [Taken(job=row["id"], epoch=row["epoch"], claim=_claim(row["claim"])) for row in rows]

    def own(self) -> dict[str, int]:
        """Return the jobs that an earlier process of this daemon had, with the epoch of each.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            found = {row["id"]: row["epoch"] for row in connection.execute(_EPOCHS).fetchall()}
        for job, epoch in found.items():
            self._epochs.setdefault(job, epoch)  # a worker may have it, with the epoch that it knows
        held = self.renew()
        return {job: epoch for job, epoch in found.items() if job in held}

    def epoch(self, job: str) -> int:
        """Return the epoch of a job as this process has it; 0: it does not have it."""
        return self._epochs.get(job, 0)

    def set_epoch(self, job: str, epoch: int, *, is_held: bool = True) -> None:
        """Note the epoch of a job that this process has now, or to which it hands over a response."""
        self._epochs[job] = epoch
        if is_held:
            self._renewed[job] = self._now()
        else:
            self._renewed.pop(job, None)

    def forget(self, job: str) -> None:
        """Forget a job that is over, or that another daemon has."""
        self._epochs.pop(job, None)
        self._renewed.pop(job, None)

    def pass_epoch(self, job: str, epoch: int) -> None:
        """Give a job of this daemon a later epoch than one that the database has lost.

        Raises:
            LostJobError: Another daemon has the job.
            SpoolError: The database cannot be used.
        """
        values = epoch + 1, job, self.epoch(job)
        if not self._file.change(lambda one: one.execute(_NEXT_EPOCH, values).rowcount):
            raise lost(job)
        self._epochs[job] = epoch + 1

    # Holding

    def renew(self) -> Collection[str]:
        """Prolong the lease of every job that this process has; return them.

        One that was taken once more, without this process knowing that for certain, does not count as held here.

        Raises:
            SpoolError: The database cannot be used.
        """
        began, values = self._now(), (self.lease_seconds, list(self._epochs))
        if not values[1]:
            return ()
        rows = self._file.change(lambda one: one.execute(_RENEW, values).fetchall(), synced=False)
        held = {row["id"]: row["epoch"] for row in rows}
        for job in values[1]:
            if job not in held:
                if self._renewed.get(job, math.inf) <= began:  # else it was taken again meanwhile
                    self._renewed.pop(job, None)
            elif self._epochs.get(job) == held[job]:
                self._renewed[job] = began
        return held.keys()

    def let_go(self) -> None:
        """Let other daemons take over what this one has, as it ends.

        Raises:
            SpoolError: The database cannot be used.
        """
        self._file.change(lambda one: one.execute(_LET_GO), synced=False)

    def require_held(self, connection: Connection, job: str) -> None:
        """Make sure, in the transaction that records an attempt, that this daemon has the job.

        Raises:
            LostJobError: Another one has it.
        """
        if not self.is_on:
            return
        found = connection.execute(_HELD, (self.epoch(job), job)).fetchone()
        if found is None or not found["is_held"]:
            raise lost(job)

    def is_sure(self, job: str) -> bool:
        """Return whether no other daemon can have taken a job over yet, by this host's own clock."""
        return self._now() - self._renewed.get(job, -math.inf) <= _MARGIN * self.lease_seconds

    def require_lease(self, job: str) -> None:
        """Make sure, right before the first byte of a request, that no other daemon may have the job yet.

        Raises:
            Withdrawn: One may.
        """
        if self.is_on and not self.is_sure(job):
            raise Withdrawn("the time for which this daemon has the job ended before the request was sent")

    def place(self, job: str) -> Place | None:
        """Return where a job of this inbox is from; None if it is not known.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_PLACE, (job,)).fetchone()
        if row is None:
            return None
        return Place(folder=os.fsdecode(row["folder"]), state=row["state"])

    def where(self, job: str) -> tuple[str, int, str] | None:
        """Return who has a job, its epoch and its state; None if it is not known.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_WHERE, (job,)).fetchone()
        return None if row is None else (row["holder"], row["epoch"], row["state"])

    def keeps(self, job: str) -> bool:
        """Return whether this daemon keeps a job for ``imagewatch retry``.

        Raises:
            SpoolError: The database cannot be used.
        """
        found = self.where(job)
        return found is not None and found[0] == self.instance and found[2] == "kept"

    # Responses

    def sent_by(self, job: str, attempt: int) -> SentBy | None:
        """Return who has sent an attempt.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_SENT_BY, (job, attempt)).fetchone()
        if row is None:
            return None
        return SentBy(
            instance=row["instance"],
            answer_on=row["answer_on"],
            sent_at=row["sent_at"] or 0.0,
            is_forgotten=row["is_forgotten"],
        )

    def open_attempts(self, job: str, attempts: list[int]) -> list[int]:
        """Return those of some attempts that have no result, or are not known at all.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            rows = connection.execute(_ENDED, (job,)).fetchall()
        return sorted(set(attempts).difference(row["attempt"] for row in rows))

    def was_deleted(self, job: str, attempts: list[int]) -> bool:
        """Return whether a job without a row was over for so long that its row was deleted; else that is lost.

        Args:
            job: Its id.
            attempts: Those that the folders show.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            if connection.execute(_ANY_RECENT, (job, OVER_SECONDS)).fetchone():
                return False
        return not self.open_attempts(job, attempts)

    def answer_is_here(self, job: str, attempt: int) -> None:
        """Note that only this daemon has the response: it could not be copied into the claim folder.

        Raises:
            SpoolError: The database cannot be used.
        """
        self._file.change(lambda one: one.execute(_ANSWER_ON, (job, attempt)))

    def answer_is_there(self, job: str) -> None:
        """Note that the response is in the claim folder after all.

        Raises:
            SpoolError: The database cannot be used.
        """
        self._file.change(lambda one: one.execute(_ANSWER_IS_THERE, (job,)), synced=False)

    def unsent(self, job: str, attempt: int, nonce: str) -> bool:
        """Note that the first byte of an attempt did not leave, also if another daemon has declared its charge unknown.

        Returns:
            Whether its job was over because of that; then this daemon has it again.

        Raises:
            SpoolError: The database cannot be used.
        """

        def act(one: Connection) -> Row | None:
            one.execute(_UNSENT, (job, attempt, nonce))
            reopened: Row | None = one.execute(_REOPEN, (self.lease_seconds, job, [])).fetchone()
            return reopened

        return self._taken_again(job, act)

    def reopen_kept(self, job: str) -> bool:
        """Take a job that was kept, so that its response is read again; return whether no other daemon has done it.

        Raises:
            SpoolError: The database cannot be used.
        """
        values = self.lease_seconds, job
        return self._taken_again(job, lambda one: one.execute(_REOPEN_KEPT, values).fetchone())

    def member(self, instance: str) -> tuple[bool, bool]:
        """Return whether a daemon runs, and whether it was removed from the account.

        Raises:
            SpoolError: The database cannot be used.
        """
        with self._file.using() as connection:
            row = connection.execute(_MEMBER, (self.lease_seconds, instance)).fetchone()
        return (False, True) if row is None else (row["is_running"], row["is_removed"])

    def reopen(self, job: str, attempts: list[int]) -> bool:
        """Take a job that ended as an unknown charge, as its result is known now; return whether it was one.

        Args:
            job: Its id.
            attempts: Those of which this daemon has a response; none: it can only be that nothing was sent.

        Raises:
            SpoolError: The database cannot be used.
        """
        values = self.lease_seconds, job, attempts
        return self._taken_again(job, lambda one: one.execute(_REOPEN, values).fetchone())

    def _taken_again(self, job: str, act: Callable[[Connection], Row | None]) -> bool:
        """Take a job; return whether that could be done. Its lease has begun before the commit."""
        began, row = self._now(), self._file.change(act)
        if row is not None:
            self._epochs[job], self._renewed[job] = row["epoch"], began
        return row is not None


def lost(job: str) -> LostJobError:
    """Return the error for a job that another daemon has."""
    return LostJobError(f"job {job}: another daemon of the inbox has it now")


def _claim(text: str) -> Claim | None:
    try:
        return load(text.encode(), Claim)
    except ValueError:  # damaged
        return None
