"""What commands ask of a daemon, and the holds that last over a restart, as rows of the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.journal.account import SHARED
from imagewatch.journal.events import Events
from imagewatch.system.text import printable, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from imagewatch.journal.database import Connection, Database, Row
    from imagewatch.journal.events import Event

_MANUAL = "manual"
_ME, _INBOX = "current_setting('imagewatch.instance')", "current_setting('imagewatch.inbox')"
_ASK_OTHERS = f"""
    INSERT INTO requests (instance, kind, asked_at)
    SELECT name, 'release', ? FROM instances WHERE inbox = {_INBOX} AND name <> {_ME} AND forgotten_at IS NULL"""  # noqa: S608
_LONGEST = 500


class Requests:
    """Requests of commands, and lasting holds. Safe to use from several threads.

    Args:
        file: The database.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(self, file: Database, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        # ``refuse`` leaves them alone: those of a person, and those of all daemons of a shared account.
        self._others = (_MANUAL, *SHARED) if file.is_shared else (_MANUAL,)

    def _ask(self, question: str, *values: object) -> list[Row]:
        with self._file.using() as connection:
            return connection.execute(question, values).fetchall()

    def _do(self, statement: str, *values: object, synced: bool = True) -> None:
        self._file.change(lambda connection: connection.execute(statement, values), synced=synced)

    # Holds

    def held(self) -> str | None:
        """Return why a person put the queue on hold, or None if it is not."""
        rows = self._ask("SELECT message FROM holds WHERE kind = ?", _MANUAL)
        return printable(rows[0]["message"].strip(), _LONGEST) if rows else None

    def since(self) -> dict[str, float]:
        """Return when each hold began that lasts over a restart, seconds since the epoch, by kind."""
        return {row["kind"]: row["since"] for row in self._ask("SELECT kind, since FROM holds")}

    def hold(self, reason: str) -> None:
        """Put the queue on hold, until ``release``. When this returns, no more attempt is recorded, so none is sent."""
        self._file.change(lambda connection: self._begin(connection, _MANUAL, reason), locked=True)

    def _begin(self, connection: Connection, kind: str, message: str) -> None:
        """Write a hold, or another message of one that lasts."""
        if not connection.execute("UPDATE holds SET message = ? WHERE kind = ?", (whole(message), kind)).rowcount:
            values = kind, whole(message), self._clock()
            connection.execute("INSERT INTO holds (kind, message, since) VALUES (?, ?, ?)", values)

    def refused(self) -> dict[str, str]:
        """Return what the account or the endpoint refused when a daemon last ran: messages by kind of hold."""
        marks = ", ".join("?" * len(self._others))
        rows = self._ask(f"SELECT kind, message FROM holds WHERE kind NOT IN ({marks}) ORDER BY since", *self._others)  # noqa: S608
        return {row["kind"]: printable(row["message"], _LONGEST) for row in rows}

    def refuse(self, messages: Mapping[str, str], events: Sequence[Event] = ()) -> None:
        """Remember these for the next start; not synced: one more prompt would show them.

        Args:
            messages: What the account or the endpoint refused, by kind of hold.
            events: Events of the holds, which are written in the same transaction; then it is synced.
        """
        if messages == self.refused() and not events:
            return

        def act(connection: Connection) -> None:
            kept = *self._others, *messages
            connection.execute(f"DELETE FROM holds WHERE kind NOT IN ({', '.join('?' * len(kept))})", kept)  # noqa: S608
            for kind, message in messages.items():
                self._begin(connection, kind, message)
            Events.write(connection, events)

        self._file.change(act, synced=bool(events), locked=True)

    # Requests

    def release(self) -> None:
        """Ask for the end of all holds except caps; also of the daemons that process the same inbox.

        A manual hold of another daemon stays.
        """

        def act(connection: Connection) -> None:
            connection.execute("DELETE FROM holds WHERE kind = ?", (_MANUAL,))
            connection.execute("INSERT INTO requests (kind, asked_at) VALUES ('release', ?)", (self._clock(),))
            if self._file.is_common:
                connection.execute(_ASK_OTHERS, (self._clock(),))

        self._file.change(act)

    def release_again(self) -> None:
        """Ask for the end of all holds as an earlier version did: a manual hold that came later stays."""
        self._do("INSERT INTO requests (kind, asked_at) VALUES ('release', ?)", self._clock())

    def release_pending(self) -> bool:
        """Return whether ``release`` was called and no daemon has applied it yet."""
        return bool(self._ask("SELECT 1 FROM requests WHERE kind = 'release' LIMIT 1"))

    def released(self, passed: float) -> None:
        """Note that all holds except caps were ended.

        Args:
            passed: As of ``let_pass``.
        """

        def act(connection: Connection) -> None:
            _set_passed(connection, passed)
            connection.execute("DELETE FROM requests WHERE kind = 'release'")

        self._file.change(act)

    def passed(self) -> float:
        """Return until which ctime, seconds since the epoch, the burst guard lets prompts through."""
        rows = self._ask("SELECT value FROM meta WHERE name = 'passed'")
        return float(rows[0]["value"]) if rows else 0.0

    def let_pass(self, until: float) -> None:
        """Let prompts through that were last changed at this time or before, seconds since the epoch."""
        self._file.change(lambda connection: _set_passed(connection, until))

    def retry(self, job: str) -> None:
        """Ask to read the paid response of a job again."""
        self._do("INSERT INTO requests (kind, job, asked_at) VALUES ('retry', ?, ?)", job, self._clock())

    def retries(self) -> list[str]:
        """Return the jobs that ``retry`` was called for, each once."""
        rows = self._ask("SELECT job FROM requests WHERE kind = 'retry' GROUP BY job ORDER BY min(id)")
        return [row["job"] for row in rows]

    def retried(self, job: str) -> None:
        """Forget a request of ``retry``."""
        self._do("DELETE FROM requests WHERE kind = 'retry' AND job = ?", job)


def _set_passed(connection: Connection, until: float) -> None:
    if not connection.execute("UPDATE meta SET value = ? WHERE name = 'passed'", (repr(until),)).rowcount:
        connection.execute("INSERT INTO meta (name, value) VALUES ('passed', ?)", (repr(until),))
