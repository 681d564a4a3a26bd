"""The shared database: one thread commits what all threads of a daemon write.

A COMMIT can wait for long: for the network, or for a standby. Its outcome decides whether a request may be sent, so it
is not canceled. Only who waits for it gives up after a time: then it counts as not known (``UncertainError``).
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg

from imagewatch import __version__
from imagewatch.journal.postgres.checks import pooler, require_usable, unusable
from imagewatch.journal.postgres.faults import (
    AGAIN,
    earlier,
    lacking,
    no_thread,
    not_answering,
    replaced,
    text_of,
    translated,
    uncertain,
)
from imagewatch.journal.postgres.presence import Presence
from imagewatch.journal.postgres.session import ANSWER_SECONDS, Session
from imagewatch.system.errors import AlreadyRunning, SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.journal.database import Connection, Row
    from imagewatch.journal.postgres.place import Place

_PATIENCE = ANSWER_SECONDS + 5.0
"""How long a thread waits until its change is written, seconds."""
_CLOSE_SECONDS = 3.0
"""How long the end of a daemon waits for what is being written, seconds: a database that hangs must not delay it."""
_REST = 2.0
"""After an attempt to reach the database that took some time, none is made for so many times as long."""
_SEEN_SECONDS = 5.0
"""How often a daemon shows at least that it runs, seconds."""
_TRIES = 5
"""How often a transaction is run again that the server has undone because of another one."""
_READ_TIMEOUT = {"statement_timeout": f"{ANSWER_SECONDS}s"}
_LOCK = """
    SELECT i.incarnation, i.recorded, extract(epoch FROM clock_timestamp())::float8 AS at FROM imagewatch.accounts AS a
    LEFT JOIN imagewatch.instances AS i ON i.account = a.name AND i.name = current_setting('imagewatch.instance')
    WHERE a.name = current_setting('imagewatch.account') FOR UPDATE OF a"""
_ACCOUNT = (
    "INSERT INTO imagewatch.accounts (name) VALUES (current_setting('imagewatch.account')) ON CONFLICT DO NOTHING"
)

_SELF = """
    SELECT extract(epoch FROM clock_timestamp())::float8 AS at, pid, extract(epoch FROM backend_start)::float8 AS began
    FROM pg_stat_activity WHERE pid = pg_backend_pid()"""
_IS_THERE = "SELECT 1 FROM pg_stat_activity WHERE pid = ? AND extract(epoch FROM backend_start)::float8 = ?"
_KNOWN = """
    SELECT host, folder, place, recorded, CASE WHEN ended_at IS NULL
        THEN extract(epoch FROM clock_timestamp())::float8 - seen_at ELSE 1e9 END AS seconds
    FROM imagewatch.instances WHERE name = ? AND account = ?"""
_REGISTER = """
    INSERT INTO imagewatch.instances AS i
        (name, inbox, host, folder, place, version, incarnation, started_at, seen_at)
    VALUES (?, ?, ?, ?, ?, ?, 1, extract(epoch FROM clock_timestamp()), extract(epoch FROM clock_timestamp()))
    ON CONFLICT (account, name) DO UPDATE SET inbox = excluded.inbox, host = excluded.host, folder = excluded.folder,
        place = excluded.place, version = excluded.version, incarnation = i.incarnation + 1,
        started_at = excluded.started_at, seen_at = excluded.seen_at, ended_at = NULL, forgotten_at = NULL
    RETURNING incarnation"""
_RECORDED = """
    SELECT recorded FROM imagewatch.instances
    WHERE account = current_setting('imagewatch.account') AND name = current_setting('imagewatch.instance')"""
_ENDED = """
    UPDATE imagewatch.instances SET ended_at = extract(epoch FROM clock_timestamp())
    WHERE account = current_setting('imagewatch.account') AND name = current_setting('imagewatch.instance')
    AND incarnation = ?"""

_SAVE, _RELEASE, _UNDO = "SAVEPOINT change", "RELEASE change", "ROLLBACK TO change"
"""A change that fails is undone alone; the savepoint is still there afterwards."""
T = TypeVar("T")


class _Change:
    """A change that a thread asks for.

    Attributes:
        value: What ``act`` returned.
        error: Why it was not written.
        is_over: Set when it was written, or failed.
    """

    __slots__ = ("act", "error", "is_over", "locked", "synced", "value")

    def __init__(self, act: Callable[[Connection], Any], *, synced: bool, locked: bool) -> None:
        self.act = act
        self.synced = synced
        self.locked = locked
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_over = threading.Event()


class PostgresDatabase:
    """A database that several daemons share. Safe to use from several threads.

    Args:
        place: Which database, account, inbox and instance.
        patience: How long a thread waits until its change is written, seconds.

    Attributes:
        incarnation: Which start of the daemon this is; 0: of a command, which is not compared.
    """

    own_jobs, inbox_jobs = "own_jobs", "inbox_jobs"
    is_ours = "holder = current_setting('imagewatch.instance')"
    is_shared = True

    def __init__(self, place: Place, *, patience: float = _PATIENCE) -> None:
        self.path = ""
        self.is_common = place.is_common
        self.place = place
        self.incarnation = 0
        self._patience = patience
        self._read_lock = threading.RLock()
        self._reader: Session | None = None
        self._writer: Session | None = None
        self._writer_id: tuple[int, float] = (0, 0.0)  # process in the server, and its start
        self._unreachable: tuple[float, psycopg.Error] | None = None  # until when, monotonic time, and why
        self._state = threading.Condition()
        self._waiting: list[_Change] = []
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None
        self._is_closed = False
        self._offset: float | None = None
        self._lease = 60.0
        self._presence: Presence | None = None
        self._replaced = threading.Event()
        self._recorded = 0
        self._note: Callable[[int], object] = lambda _: None

    def clock(self) -> float:
        """Return the time of the database's clock, seconds since the epoch; this host's before it was asked."""
        return time.time() if self._offset is None else time.clock_gettime(time.CLOCK_BOOTTIME) + self._offset

    # Reading

    @contextlib.contextmanager
    def using(self) -> Iterator[Connection]:
        """Lend the connection for questions; no other thread has it meanwhile.

        Raises:
            DatabaseError: The database cannot be used; the message has the cause.
        """
        _require_not_replaced(self._replaced)
        with self._read_lock:
            began = time.monotonic()
            try:
                if self._reader is None:
                    self._reader, _ = self._connect("reader", _READ_TIMEOUT)
                yield self._reader
            except psycopg.Error as error:
                self._close_reader()
                self._note_unreachable(began, error)
                raise translated(error) from error

    def _connect(self, name: str, settings: dict[str, str]) -> tuple[Session, tuple[int, float]]:
        """Return a connection, and the process in the server that serves it with the time of its start."""
        if self._unreachable is not None and time.monotonic() < self._unreachable[0]:
            raise translated(self._unreachable[1])
        began = time.monotonic()
        try:
            session = Session(self.place, name, settings)
        except psycopg.Error as error:
            self._note_unreachable(began, error)
            raise
        try:
            require_usable(session, is_replicated=self.place.is_replicated)
            session.execute(_ACCOUNT)
            own = session.execute(_SELF).fetchone()
            assert own is not None
            self._set_clock(own["at"])
        except BaseException:
            session.close()
            raise
        return session, (own["pid"], own["began"])

    def _note_unreachable(self, began: float, error: psycopg.Error) -> None:
        """Note that the database was out of reach; else each thread and each question would wait for it again.

        Args:
            began: When it was first waited for, monotonic time.
            error: What came of it.
        """
        if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:  # else the server has answered
            now = time.monotonic()
            self._unreachable = now + _REST * (now - began), error

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # Writing

    def change(self, act: Callable[[Connection], T], *, synced: bool = True, locked: bool = False) -> T:
        """Write something; see ``Database.change``."""
        _require_not_replaced(self._replaced)
        change = _Change(act, synced=synced, locked=locked)
        with self._state:
            self._require_answering()
            if self._thread is None:
                self._is_closed = False
                self._thread = _started(self._run)
            self._waiting.append(change)
            self._state.notify_all()
        if not change.is_over.wait(self._patience):
            self._give_up(change)
        if change.error is not None:
            raise change.error
        return cast("T", change.value)

    def _require_answering(self) -> None:
        if self._busy_since is not None and (seconds := time.monotonic() - self._busy_since) > self._patience:
            raise not_answering(seconds)

    def _give_up(self, change: _Change) -> None:
        """Wait no longer for a change.

        Raises:
            UncertainError: It may still be written.
            DatabaseError: It will not be written.
        """
        with self._state:
            if change in self._waiting:
                self._waiting.remove(change)
                raise not_answering(self._patience)
            if not change.is_over.is_set():
                raise uncertain(f"it has not answered for {self._patience:.0f} seconds")

    def _run(self) -> None:
        """Write what threads want to write, until it is closed."""
        while True:
            with self._state:
                self._busy_since = None
                self._state.wait_for(lambda: self._waiting or self._is_closed)
                changes, self._waiting = self._waiting, []
                if not changes:
                    self._close_writer()  # before a change can start another thread, which uses it
                    self._thread = None
                    return
                self._busy_since = time.monotonic()
            try:
                self._write(changes)
            except BaseException as error:  # noqa: BLE001  else threads would take theirs for written
                for change in changes:
                    change.error = error
            for change in changes:
                change.is_over.set()

    def _write(self, changes: list[_Change]) -> None:
        for last in (*[False] * _TRIES, True):
            try:
                self._try_to_write(changes)
            except AGAIN as error:
                if last:
                    raise translated(error) from error
            except psycopg.Error as error:
                self._close_writer()
                raise translated(error) from error
            except BaseException:  # the transaction may be open
                self._close_writer()
                raise
            else:
                return

    def _try_to_write(self, changes: list[_Change]) -> None:
        if self._writer is None or self._writer.raw.closed:
            self._writer, self._writer_id = self._connect("writer", {})
        writer = self._writer
        first = [] if any(change.synced for change in changes) else ["SET LOCAL synchronous_commit = off"]
        first += [_LOCK] if any(change.locked for change in changes) else []
        with writer.transaction(*first, _SAVE, commit=lambda: self._commit(writer)) as found:
            if any(change.locked for change in changes):
                self._require_own(found[0] if found else None)
            for number, change in enumerate(changes):
                if number and changes[number - 1].error is None:
                    writer.run(_RELEASE, _SAVE)
                _apply(writer, change)
            recorded = self._count(writer) if any(change.locked and change.synced for change in changes) else 0
        if recorded > self._recorded:
            self._recorded = recorded
            self._note(recorded)

    def _require_own(self, found: Row | None) -> None:
        """Make sure that this daemon may write, after the account was locked.

        Args:
            found: What the database has of the daemon.

        Raises:
            DatabaseError: This daemon does not have its name any more, or the database lacks what it has recorded.
        """
        if not self.incarnation:
            return
        if found is None or (found["recorded"] or 0) < self._recorded:
            raise lacking()
        if (found["incarnation"] or 0) < self.incarnation:
            raise earlier()
        if found["incarnation"] != self.incarnation:
            raise replaced()
        self._set_clock(found["at"])

    def _count(self, writer: Session) -> int:
        """Return how many attempts of this daemon are recorded, those of the transaction included."""
        found = writer.execute(_RECORDED).fetchone() if self.incarnation else None
        return int(found["recorded"]) if found else 0

    def _set_clock(self, at: float) -> None:
        self._offset = at - time.clock_gettime(time.CLOCK_BOOTTIME)

    def _commit(self, writer: Session) -> None:
        """Commit. It may take as long as the server needs: to wait no longer would not undo it.

        Raises:
            UncertainError: It is not known whether it was committed, or whether it is durable.
            psycopg.Error: It was undone.
        """
        writer.warnings.clear()
        try:
            writer.commit(self._require_committing)
        except (*AGAIN, psycopg.IntegrityError, psycopg.errors.InFailedSqlTransaction):
            raise
        except psycopg.Error as error:
            raise uncertain(text_of(error)) from error
        if writer.warnings:  # a canceled wait for the standby is reported as a success with a warning
            raise uncertain(writer.warnings[-1])

    def _require_committing(self) -> None:
        """Make sure that there is a server that can answer a COMMIT, if one can be reached.

        Another server may have taken the place of one that hangs, whose side of the network is still open.

        Raises:
            psycopg.Error: There is none.
        """
        try:
            with contextlib.closing(Session(self.place, "check", _READ_TIMEOUT)) as session:
                found = session.execute(_IS_THERE, self._writer_id).fetchone()
        except psycopg.Error:
            return  # the database is out of reach
        if found is None:
            raise psycopg.OperationalError("the server that was to commit has been replaced")

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    # The daemon

    def require_direct(self) -> None:
        """Make sure that no pooler gives each transaction another connection.

        Raises:
            DatabaseError: There is one, or the database cannot be used.
        """
        try:
            with (
                contextlib.closing(Session(self.place, "check", is_prepared=False)) as one,
                contextlib.closing(Session(self.place, "check", is_prepared=False)) as other,
            ):
                require_usable(one, is_replicated=self.place.is_replicated)
                for why, hint in pooler(one, other):
                    raise unusable(why, hint)
        except psycopg.Error as error:
            raise translated(error) from error

    def require_own(self, place: str, alive_seconds: float, *, recorded: int = 0) -> None:
        """Make sure that no daemon with another state folder has the name of this one, and that no request is missing.

        Args:
            place: Random, of the state folder of this one.
            alive_seconds: As of ``register``.
            recorded: As of ``register``.

        Raises:
            SpoolError: One has, or the database lacks what the daemon has recorded.
        """
        with self.using() as connection:
            self._require_place(connection, place, alive_seconds, recorded)

    def _require_place(self, connection: Connection, place: str, alive_seconds: float, recorded: int) -> None:
        known = _known(connection, self.place)
        if known is not None and known["place"] != place:
            raise _taken(known, self.place.instance, is_running=known["seconds"] < alive_seconds)
        if recorded > (known["recorded"] if known else 0):
            raise lacking()

    def register(
        self,
        host: str,
        folder: str,
        place: str,
        alive_seconds: float,
        *,
        replaces: bool = False,
        recorded: int = 0,
        note: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Note that a daemon starts; from now on an earlier one with this name sends nothing any more.

        Args:
            host: Name of its host.
            folder: Its inbox on that host.
            place: Random, of its state folder.
            alive_seconds: How long after it was seen last another daemon counts as running.
            replaces: Whether its state folder takes the place of a lost one.
            recorded: How many attempts it has recorded at least.
            note: Called with that number after each commit that has changed it.

        Raises:
            AlreadyRunning: A daemon with another state folder has this name.
            DatabaseError: The database cannot be used, or lacks what the daemon has recorded.
        """

        def act(connection: Connection) -> int:
            known = _known(connection, self.place)
            is_running = known is not None and known["place"] != place and known["seconds"] < alive_seconds
            if is_running or not replaces:
                self._require_place(connection, place, alive_seconds, recorded)
            given = self.place.instance, self.place.inbox, host, folder, place, __version__
            return int(connection.execute(_REGISTER, given).fetchone()["incarnation"])

        self.incarnation = 0
        self.incarnation = self.change(act, locked=True)
        self._lease, self._recorded, self._note = alive_seconds, recorded, note

    def watch(
        self,
        page: Callable[[], tuple[str, int]],
        tick: Callable[[], object],
        on_change: Callable[[], object],
        on_offer: Callable[[], object] = lambda: None,
    ) -> None:
        """Let others see that the daemon runs, and report when something of the account may have changed.

        Args:
            page: Returns what others may know of its state, as JSON, and how many requests it sends at the same time.
            tick: Called regularly in another thread.
            on_change: Called in another thread.
            on_offer: Called in another thread when a prompt of the inbox is offered.
        """
        interval, on_replaced = min(self._lease / 4, _SEEN_SECONDS), self._replaced.set
        if not self.is_common:  # its jobs stay its own: a response that arrives now is still recorded and published
            on_replaced = _nothing
        self._presence = Presence(self.place, self.incarnation, interval, page, tick, on_change, on_offer, on_replaced)

    def unregister(self) -> None:
        """Note that the daemon ends."""
        if self._presence is not None:
            self._presence.close()
            self._presence = None
        if self.incarnation:
            with contextlib.suppress(SpoolError):
                self.change(lambda connection: connection.execute(_ENDED, (self.incarnation,)), synced=False)

    def prove(self) -> None:
        """Make sure that rows can be written.

        Raises:
            DatabaseError: They cannot; the message has the cause.
        """
        self.change(_prove, locked=True)

    def accept(self) -> None:
        """Use what is there: an empty one cannot take the place of a shared database.

        Raises:
            DatabaseError: It cannot be used.
        """
        self._recorded = 0  # it may be an older copy
        self._note(0)
        self.prove()

    def close(self) -> None:
        """Close the connections; what waits to be written is written first."""
        if self._presence is not None:
            self._presence.close()
        with self._state:
            self._is_closed = True
            thread = self._thread
            self._state.notify_all()
        if thread is not None:
            thread.join(_CLOSE_SECONDS)
        with self._read_lock:
            self._close_reader()


def _started(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, name="database", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(error) from error
    return thread


def _nothing() -> None:
    pass


def _prove(connection: Connection) -> None:
    change = "UPDATE meta SET value = ? WHERE name = 'proved'"
    if not connection.execute(change, (f"{time.time():.0f}",)).rowcount:
        connection.execute("INSERT INTO meta (name, value) VALUES ('proved', '')")


def _apply(writer: Session, change: _Change) -> None:
    """Let a change write. Its own error undoes it alone; what is wrong with the database concerns all of them."""
    try:
        change.value, change.error = change.act(writer), None
    except (*AGAIN, psycopg.OperationalError):
        raise
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        change.error = SpoolError(text_of(error), hint="please report it")
    except Exception as error:  # noqa: BLE001  it is that of the thread that wrote this
        change.error = translated(error) if isinstance(error, psycopg.Error) else error
    if change.error is not None:
        writer.run(_UNDO)


def _require_not_replaced(is_replaced: threading.Event) -> None:
    if is_replaced.is_set():
        raise replaced()


def _known(connection: Connection, place: Place) -> Row | None:
    found: Row | None = connection.execute(_KNOWN, (place.instance, place.account)).fetchone()
    return found


def _taken(known: Row, name: str, *, is_running: bool) -> SpoolError:
    """Return the error for a name that a daemon with another state folder has."""
    whose = f"the daemon on {printable(known['host'])} for {printable(known['folder'])}"
    if is_running:
        hint = "set shared.instance, different for each daemon of the account"
        return AlreadyRunning(f"{whose} is running with the instance name {printable(name)}", hint=hint)
    hint = (
        "set another shared.instance; or, if this is that daemon and its state folder is lost, accept that what it had "
        "in flight may have been charged: imagewatch release --accept-new-ledger"
    )
    message = f"the instance name {printable(name)} belongs to {whose}, with another state folder"
    return SpoolError(message, code=errno.ESTALE, hint=hint)
