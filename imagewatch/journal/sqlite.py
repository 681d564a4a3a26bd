"""The SQLite file of the ledger: opened when it is used, and compared with the file that was used before.

SQLite does not notice that its file was deleted or replaced: what is written afterwards is lost. So the file is
compared with the opened one before each use, and so is the one beside it that has the newest rows. The database has a
random id, and the file ``identity`` beside it has the same. The id shows whether a ledger was deleted or never existed,
and whether a file is another ledger. How much was recorded when the daemon started or ended last is in that file, too:
it shows whether the ledger is an older copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
import stat
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

from imagewatch.journal.files import (
    MARK,
    MARK_BYTES,
    RESTORE,
    SAVED,
    code_of,
    foreign,
    incomplete,
    is_damage,
    is_unnoted,
    missing,
    older,
    read_mark,
    recorded,
    refused,
    require_sound,
    spoilt,
    translated,
    unknown,
    was_there,
)
from imagewatch.journal.schema import prepare
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.journal.database import Connection

_WAL = "-wal"
"""Added to the name of the file: where SQLite keeps the newest rows."""
_BESIDE = (_WAL, "-shm")
_MODE = 0o600
_BUSY_SECONDS = 0.05
"""How long SQLite waits for another program."""
_TRIES, _PAUSE_SECONDS = 10, 0.05
"""How often a row is tried to be written again while another program writes, and the pause before."""
_NAME = "INSERT INTO meta VALUES ('id', ?), ('unnoted', 1)"
_UNNOTE = "INSERT OR REPLACE INTO meta VALUES ('unnoted', 1)"
"""It stays until the id is noted beside the ledger: one that was put here has an id without it."""
_NEWEST = "SELECT job, attempt, outcome FROM attempts ORDER BY claimed_at DESC, job, attempt DESC LIMIT 1"
_ENDED = "SELECT count(*) FROM attempts WHERE outcome <> 'sent'"

T = TypeVar("T")


class _Change:
    """Something that a thread wants to write.

    Attributes:
        act: Writes it.
        synced: Whether it must be durable.
        value: What ``act`` returned.
        error: Why it was not written.
        is_over: Whether it was written, or failed.
    """

    __slots__ = ("act", "error", "is_over", "synced", "value")

    def __init__(self, act: Callable[[Connection], Any], *, synced: bool) -> None:
        self.act = act
        self.synced = synced
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_over = False


class SqliteDatabase:
    """A ledger's file. Safe to use from several threads.

    Args:
        path: The file; created if it is not there. On a local disk: SQLite's locks need one.
        guarded: Whether the file has to be the one that was used before. The daemon's has to; commands only read.
        synchronous: SQLite's setting for what must be durable.
    """

    own_jobs = inbox_jobs = "jobs"
    is_ours = "1 = 1"
    is_shared = is_common = False

    def __init__(self, path: str, *, guarded: bool = False, synchronous: str = "FULL") -> None:
        self.path = path
        self._mark = os.path.join(os.path.dirname(path), MARK)
        self._guarded = guarded
        self._synchronous = synchronous
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None
        self._wal: os.stat_result | None = None
        self._is_damaged = self._is_saved = self._was_busy = False
        self._pause = threading.Event()
        self._waiting: list[_Change] = []
        self._waiting_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._set = ""

    @contextlib.contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection; no other thread has it meanwhile.

        Raises:
            SpoolError: The ledger cannot be used; the message has the cause.
        """
        with self._lock, self._translated():
            self._ensure()
            assert self._connection is not None
            yield self._connection

    def change(self, act: Callable[[Connection], T], *, synced: bool = True, locked: bool = False) -> T:  # noqa: ARG002
        """Write something in a transaction, which it shares with what other threads write at the same moment.

        While another program writes, it waits for a moment, and other threads may read.

        Args:
            act: Writes. It may be called twice: the file may be replaced meanwhile. Its error undoes its changes alone.
            synced: Whether it survives a power cut when this returns. What is not synced becomes durable together with
                the next change that is, never after it.
            locked: No other program writes at the same time anyway.

        Returns:
            What ``act`` returned.

        Raises:
            SpoolError: It was not written; the message has the cause.
        """
        change = _Change(act, synced=synced)
        with self._waiting_lock:
            self._waiting.append(change)
        with self._commit_lock:  # the first that comes commits for all that wait
            if not change.is_over:
                with self._waiting_lock:
                    changes, self._waiting = self._waiting, []
                self._commit_all(changes)
        if change.error is not None:
            raise change.error
        return cast("T", change.value)

    def _commit_all(self, changes: list[_Change]) -> None:
        try:
            self._try_to_commit(changes)
        except BaseException as error:  # noqa: BLE001  else other threads would take theirs for written
            for change in changes:
                change.error = error
        finally:
            for change in changes:
                change.is_over = True

    def _try_to_commit(self, changes: list[_Change]) -> None:
        """Write all changes, as soon as no other program writes."""
        for last in (*[False] * (0 if self._was_busy else _TRIES), True):  # others have waited already
            try:
                with self.using() as connection:
                    self._commit(connection, changes)
                    self._ensure(is_ours=True)  # meanwhile another file may have replaced it
                    if connection is not self._connection:
                        assert self._connection is not None
                        self._commit(self._connection, changes)
            except SpoolError as error:
                self._was_busy = error.code == errno.EBUSY and last
                if error.code != errno.EBUSY or last:
                    raise
                self._pause.wait(_PAUSE_SECONDS)
            else:
                self._was_busy = False
                return

    def _commit(self, connection: sqlite3.Connection, changes: list[_Change]) -> None:
        """Write all changes in one transaction; one that fails is undone alone."""
        synchronous = "FULL" if self._synchronous == "FULL" and any(change.synced for change in changes) else "NORMAL"
        if self._synchronous == "OFF":
            synchronous = "OFF"
        if synchronous != self._set:
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._set = synchronous
        connection.execute("BEGIN IMMEDIATE")
        try:
            prepare(connection)  # a newer version may have been started meanwhile
            if len(changes) == 1:
                changes[0].value = changes[0].act(connection)
            else:
                for change in changes:
                    self._apply(connection, change)
            connection.execute("COMMIT")
            if synchronous == "FULL" and self._guarded:
                self._note_count(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _apply(self, connection: sqlite3.Connection, change: _Change) -> None:
        """Let a change write. Its own error undoes it alone; what is wrong with the file concerns all of them."""
        connection.execute("SAVEPOINT change")
        try:
            try:
                change.value, change.error = change.act(connection), None
            except (OverflowError, sqlite3.IntegrityError) as error:
                raise refused(self.path, error) from error
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001  it is that of the thread that wrote this
            connection.execute("ROLLBACK TO change")
            change.error = error
        connection.execute("RELEASE change")

    def prove(self) -> None:
        """Make sure that rows can be written.

        Raises:
            SpoolError: They cannot; the message has the cause.
        """
        with self.using() as connection:
            if self._is_damaged:
                require_sound(connection)
                self._is_damaged = False
            prepare(connection)
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('proved', ?)", (secrets.token_hex(4),))

    def accept(self) -> None:
        """Use what is there from now on; an empty ledger if there is none or a damaged one, which is kept beside it.

        Raises:
            SpoolError: What is there cannot be used, for a reason that an empty ledger has, too.
        """
        with self._lock, self._translated():
            self._forget()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._mark)
            if os.path.exists(self.path) and self._is_unsound():
                self._rename_damaged()
            self._open(is_new=not os.path.exists(self.path), is_accepted=True)
            self._is_damaged = False

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._guarded:
                self._note(self._connection)
            self._forget()

    # Opening

    def _ensure(self, *, is_ours: bool = False) -> None:
        """Make sure that the connection is one to the file that has the name now.

        Args:
            is_ours: Whether this process has just written into it.
        """
        status = _stat(self.path)
        if self._connection is None:
            self._open(is_new=status is None)
        elif status is None:
            self._save()
            raise missing(self.path)
        elif self._file is None or not os.path.samestat(status, self._file):
            self._replace()
        elif self._guarded and _is_written(status, self._file) and not self._connection.in_transaction:
            if not is_ours:
                self._require_whole(self._connection)
            self._file = status
        elif self._guarded:
            self._ensure_beside(self._connection)
        self._is_saved = False  # there will be more rows than were saved

    def _ensure_beside(self, connection: sqlite3.Connection) -> None:
        """Make sure that the newest rows are still in the file that has them. SQLite makes that no shorter in use."""
        beside, known = _stat(self.path + _WAL), self._wal
        if not _is_same(beside, known):
            self._write_back()
            self._forget()
            self._open(is_new=False)
        elif beside is not None and known is not None and not connection.in_transaction:
            if beside.st_size < known.st_size:
                self._require_whole(connection)
            self._wal = beside

    def _open(self, *, is_new: bool, is_accepted: bool = False) -> None:
        if is_new and self._guarded and not is_accepted and was_there(os.path.dirname(self.path)):
            if not os.path.lexists(self._mark):
                _write(self._mark, "missing")  # the status is written again, without what the ledger knew
            raise missing(self.path)
        if is_new:
            self._remove_beside()
        keep_private(self.path)
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=_BUSY_SECONDS)
        try:
            connection.row_factory = sqlite3.Row
            connection.text_factory = _decoded
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            self._set = self._synchronous
            prepare(connection)
            if self._guarded:
                self._require_same(connection, is_accepted=is_accepted)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._file, self._wal = os.stat(self.path), _stat(self.path + _WAL)

    def _require_same(self, connection: sqlite3.Connection, *, is_accepted: bool) -> None:
        """Make sure that the database is the same as before; if there was none before, write down its id."""
        own, (known, least) = _id_of(connection), read_mark(self._mark)
        if known and own != known:
            raise foreign(self.path)
        if (count := recorded(connection)) < least:
            raise older(self.path)
        if own is None:
            connection.execute(_NAME, (secrets.token_hex(16),))
        elif is_accepted:
            connection.execute(_UNNOTE)
        elif count and not known and not is_unnoted(connection):
            raise unknown(self.path)
        if known:
            self._note(connection)
        else:
            _write(self._mark, f"{_id_of(connection)} {count:020d}")
            connection.execute("DELETE FROM meta WHERE name = 'unnoted'")

    def _note(self, connection: sqlite3.Connection | None) -> None:
        """Write down how much is recorded, so that an older copy is known again; on a full disk it is not needed."""
        with contextlib.suppress(SpoolError, OSError), self._translated():
            if connection is None or (own := _id_of(connection)) is None:
                return
            known, least = read_mark(self._mark)
            if (count := recorded(connection)) > least or not known:  # the state folder may be a new one
                _write(self._mark, f"{own} {count:020d}")

    def _replace(self) -> None:
        """Use the file that has replaced the opened one, if no row is missing in it."""
        if not self._is_complete():
            self._save()  # it may have no name any more
            raise incomplete(self.path)
        self._forget()
        self._open(is_new=False)

    def _is_complete(self) -> bool:
        """Return whether the file that has the name now has the newest row of the opened one, and as many results."""
        newest, ended = None, 0
        with contextlib.suppress(sqlite3.Error):
            assert self._connection is not None
            newest = self._connection.execute(_NEWEST).fetchone()
            ended = self._connection.execute(_ENDED).fetchone()[0]
        if newest is None:
            return True
        # Immutable: what SQLite keeps beside a file belongs to the one that was there.
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{_quoted(self.path)}?immutable=1", uri=True)) as other,
        ):
            question = "SELECT 1 FROM attempts WHERE job = ? AND attempt = ? AND outcome = ?"
            is_there = other.execute(question, tuple(newest)).fetchone() is not None
            return is_there and other.execute(_ENDED).fetchone()[0] >= ended
        return False

    def _note_count(self, connection: sqlite3.Connection) -> None:
        """Write down how much is durable now, so that an older copy is known also after a kill. It is not synced."""
        with contextlib.suppress(OSError, sqlite3.Error):
            file = os.open(self._mark, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(file).st_size == MARK_BYTES:  # else it is written when the ledger is opened
                    os.pwrite(file, b"%020d" % recorded(connection), MARK_BYTES - 21)
            finally:
                os.close(file)

    def _require_whole(self, connection: sqlite3.Connection) -> None:
        """Make sure that what another program has written into the file has left it whole.

        SQLite reads a page once; so what it answers may not be in the file any more.
        """
        known = recorded(connection)
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(self.path)) as other:
            require_sound(other)
            if recorded(other) >= known:
                return
        self._save()
        raise spoilt(self.path)

    def _write_back(self) -> None:
        """Write to the file what only the one beside it has, which was deleted."""
        assert self._connection is not None
        if self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            message = (
                f"the newest part of the ledger was deleted, and another program reads the ledger: {self.path}{_WAL}"
            )
            raise SpoolError(
                message, path=self.path, code=errno.EBUSY, hint="end that program; fuser -v lists it beside the daemon"
            )

    # Saving and renaming

    def _forget(self) -> None:
        """Close the connection; what SQLite keeps beside a file that is no more must not be mixed with the next one."""
        connection, file, wal = self._connection, self._file, self._wal
        self._connection = self._file = self._wal = None
        if connection is None:
            return
        is_gone = not _is_same(_stat(self.path), file)
        if is_gone:  # else it is done when the file is closed
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        if is_gone and wal is not None:
            self._remove_own_beside(wal)

    def _remove_own_beside(self, wal: os.stat_result | None = None) -> None:
        """Remove what belongs to the opened file, which has no name any more: any program would add it to the next."""
        beside, own = _stat(self.path + _WAL), wal or self._wal
        if beside is not None and own is not None and os.path.samestat(beside, own):
            self._remove_beside()

    def _remove_beside(self) -> None:
        for ending in _BESIDE:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + ending)

    def _save(self) -> None:
        """Save a ledger whose file was deleted or replaced, as long as it is open."""
        if self._is_saved:
            return
        self._note(self._connection)
        assert self._connection is not None
        target = _unused(self.path + SAVED)
        with contextlib.suppress(sqlite3.Error, OSError):
            keep_private(target)
            with contextlib.closing(sqlite3.connect(target)) as copy:
                self._connection.backup(copy)
                require_sound(copy)
            self._is_saved = True
            if not _is_same(_stat(self.path), self._file):
                self._remove_own_beside()
        if not self._is_saved:  # it must not be used as if it were complete
            with contextlib.suppress(OSError):
                os.unlink(target)

    def _is_unsound(self) -> bool:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection:
                require_sound(connection)
        except sqlite3.DatabaseError as error:
            return is_damage(error)
        return False

    def _rename_damaged(self) -> None:
        target = _unused(self.path + ".damaged")
        for ending in ("", *_BESIDE):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + ending, target + ending)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OverflowError, sqlite3.IntegrityError) as error:
            raise refused(self.path, error) from error
        except sqlite3.Error as error:
            self._is_damaged = self._is_damaged or is_damage(error)
            if code_of(error) != sqlite3.SQLITE_BUSY:  # opened again, it may work
                self._forget()
            raise translated(self.path, error) from error
        except OSError as error:
            message = f"the ledger cannot be used: {error.strerror}: {self.path}"
            raise SpoolError(message, path=self.path, code=error.errno or errno.EIO, hint=RESTORE) from error


def _id_of(connection: sqlite3.Connection) -> str | None:
    found = connection.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()
    return str(found[0]) if found else None


def _decoded(text: bytes) -> str:
    """Return a text of the file; a damaged one as far as it goes, so that the other rows can be read."""
    return text.decode("utf-8", "replace")


def keep_private(path: str) -> None:
    """Make the file of a ledger if there is none, readable by its owner only: SQLite gives its other files that mode.

    A file that is there is not opened here: to close it again would end the locks that this process has on it. Those
    that were created beside a read-only ledger would keep one that is writable again from being written.
    """
    with contextlib.suppress(OSError):  # SQLite reports why it cannot be used
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    least = 0
    for name in (path, path + "-wal", path + "-shm"):
        with contextlib.suppress(OSError):  # one of another user is as it was created
            mode = os.stat(name, follow_symlinks=False).st_mode
            if mode & 0o777 & ~_MODE or least & ~mode:
                os.chmod(name, _MODE)
            least = mode & stat.S_IWUSR if name == path else least


def _unused(path: str) -> str:
    return next(name for number in range(1, 10_000) if not os.path.lexists(name := f"{path}-{number}"))


def _write(path: str, text: str) -> None:
    temporary = f"{path}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_same(status: os.stat_result | None, other: os.stat_result | None) -> bool:
    """Return whether two files are the same; two missing ones are."""
    return status == other if status is None or other is None else os.path.samestat(status, other)


def _is_written(status: os.stat_result, before: os.stat_result) -> bool:
    return (status.st_size, status.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
