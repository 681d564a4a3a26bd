"""One connection to PostgreSQL: its settings, the queries of the journal in its spelling, and its rows."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.adapt import Loader
from psycopg.types.numeric import FloatLoader

from imagewatch.journal.postgres.schema import VIEWS
from imagewatch.system.text import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from psycopg.abc import Buffer, PQGen, QueryNoTemplate

    from imagewatch.journal.postgres.place import Place

T = TypeVar("T")

CONNECT_SECONDS = 5
"""How long a connection may take to be made."""
ANSWER_SECONDS = 10
"""How long the server may leave what was sent to it without an answer, before the connection counts as lost."""
_SILENT_SECONDS = ANSWER_SECONDS + 2.0
"""How long a statement may take, seconds. Where the server's time limits do not help, as it hangs, this one does."""
_LOCK_SECONDS = 5
MOST = 1e300
"""What is larger is stored as this: a sum beyond the largest number would be an error."""
_SETTINGS = {
    "search_path": VIEWS,
    "lock_timeout": f"{_LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": "30s",
    "client_min_messages": "warning",  # a warning during COMMIT counts as failure
    "bytea_output": "hex",
}
_PARAMETERS = {
    "connect_timeout": str(CONNECT_SECONDS),
    "tcp_user_timeout": str(ANSWER_SECONDS * 1000),
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "target_session_attrs": "read-write",
    "client_encoding": "UTF8",
}


class _NumberLoader(Loader):
    """Loads a sum of integers, which PostgreSQL makes a decimal number, as a number of ours."""

    def load(self, data: Buffer) -> int | float:
        text = bytes(data).decode()
        return int(text) if text.lstrip("-").isdigit() else float(text)


class Found(tuple[Any, ...]):
    """A row: values by name or position."""

    __slots__ = ()
    names: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401  whatever the column holds
        return tuple.__getitem__(self, self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return self.names


@functools.lru_cache(maxsize=256)
def _row_type(names: tuple[str, ...]) -> type[Found]:
    return type("Found", (Found,), {"names": names, "__slots__": ()})


def _rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], Found]:
    return _row_type(tuple(column.name for column in cursor.description or ()))


@functools.lru_cache(maxsize=512)
def spelt(question: str) -> tuple[str, tuple[int, ...] | None]:
    """Return a query with ``$1`` for ``?`` or ``?1``, and which value goes where; None: each in its turn."""
    if re.search(r"\?\d", question):
        order = sorted({int(number) for number in re.findall(r"\?(\d+)", question)})
        places = {number: place for place, number in enumerate(order, 1)}
        text = re.sub(r"\?(\d+)", lambda match: f"${places[int(match[1])]}", question)
        return text, tuple(number - 1 for number in order)
    numbers = iter(range(1, 1000))
    return re.sub(r"\?", lambda _: f"${next(numbers)}", question), None


def _storable(value: object) -> object:
    """Return a value that PostgreSQL accepts and can sum up: no NUL, no bytes that were never text, no huge number."""
    if isinstance(value, str):
        return whole(value).replace("\0", "\ufffd")
    if isinstance(value, float) and not -MOST < value < MOST:
        return None if math.isnan(value) else math.copysign(MOST, value)
    return value


class _Connection(psycopg.Connection[Found]):
    """A connection on which no statement waits without a limit.

    A server that hangs still has its side of the network open.

    Attributes:
        on_silence: Called after each ``_SILENT_SECONDS`` without an answer; it raises an error to wait no longer.
    """

    on_silence: Callable[[], object] | None = None

    def wait(self, gen: PQGen[T], *given: Any, **options: Any) -> T:  # noqa: ANN401  they differ between versions
        """Run what psycopg does with the network; see there."""
        return super().wait(self._limited(gen), *given, **options)

    def _limited(self, gen: PQGen[T]) -> PQGen[T]:
        due = time.monotonic() + _SILENT_SECONDS
        ready: Any = None
        while True:
            try:
                state = gen.send(ready)
            except StopIteration as end:
                value: T = end.value
                return value
            ready = yield state
            if not ready and time.monotonic() >= due:
                self._silent()
                due = time.monotonic() + _SILENT_SECONDS

    def _silent(self) -> None:
        if self.on_silence is not None:
            self.on_silence()
            return
        self.pgconn.finish()  # it may answer later, and would answer something else
        raise psycopg.OperationalError(f"the server has not answered for {_SILENT_SECONDS:.0f} seconds")


class Session:
    """One connection.

    Args:
        place: Which database, account, inbox and instance.
        name: Name of the connection for the server's administrator.
        settings: More settings of the session.
        is_prepared: Whether statements that come often are prepared; a pooler may not support that.

    Attributes:
        warnings: Codes of the warnings that came since they were last emptied.
    """

    def __init__(self, place: Place, name: str, settings: Mapping[str, str] = {}, *, is_prepared: bool = True) -> None:
        self.warnings: list[str] = []
        given = conninfo.conninfo_to_dict(place.database)
        parameters = {**_PARAMETERS, **{key: value for key, value in given.items() if value is not None}}
        parameters |= {**place.parameters, "target_session_attrs": "read-write"}
        parameters["application_name"] = f"imagewatch {name} {place.instance}"[:63]
        text = conninfo.make_conninfo("", **parameters)
        self._connection = _Connection.connect(
            text, autocommit=True, cursor_factory=psycopg.RawCursor, row_factory=_rows, prepare_threshold=None
        )
        self._connection.add_notice_handler(self._note)
        self._connection.adapters.register_loader("numeric", _NumberLoader)
        self._connection.adapters.register_loader("float8", FloatLoader)
        try:
            own = {"account": place.account, "inbox": place.inbox, "instance": place.instance}
            values = {**_SETTINGS, **settings, **{f"imagewatch.{key}": value for key, value in own.items()}}
            calls = ", ".join(["set_config(?, ?, false)"] * len(values))
            self.execute(f"SELECT {calls}", [one for pair in values.items() for one in pair])
        except BaseException:
            self._connection.close()
            raise
        self._connection.prepare_threshold = 5 if is_prepared else None

    def _note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        if (diagnostic.sqlstate or "").startswith("01"):
            self.warnings.append(f"{diagnostic.sqlstate} {diagnostic.message_primary or ''}")

    def execute(self, question: str, values: Iterable[Any] = ()) -> psycopg.Cursor[Found]:
        """Run one statement."""
        text, order = spelt(question)
        given = tuple(_storable(value) for value in values)
        if order is not None:
            given = tuple(given[place] for place in order)
        statement: QueryNoTemplate = text.encode()
        return self._connection.execute(statement, given or None)

    def run(self, *statements: str) -> list[Found]:
        """Run statements without values, with one wait for the server; return the rows of all."""
        cursor = self._connection.execute("; ".join(statements).encode(), prepare=False)
        found = []
        while True:
            found += cursor.fetchall() if cursor.description else []
            if not cursor.nextset():
                return found

    @contextlib.contextmanager
    def transaction(self, *first: str, commit: Callable[[], object] | None = None) -> Iterator[list[Found]]:
        """Run the block in a transaction.

        Args:
            first: Statements at its beginning; their rows are given to the block.
            commit: Called in the place of COMMIT.
        """
        try:
            yield self.run("BEGIN", *first)
        except BaseException:
            if not self._connection.closed:
                with contextlib.suppress(psycopg.Error):
                    self.execute("ROLLBACK")
            raise
        (commit or self.commit)()

    def commit(self, on_silence: Callable[[], object] | None = None) -> None:
        """End the transaction.

        Args:
            on_silence: Called from time to time while the server does not answer; it raises an error to wait no
                longer. Without, it is as for other statements.

        Raises:
            psycopg.Error: It was undone, or it is not known whether it was.
        """
        before = self._connection.on_silence
        self._connection.on_silence = on_silence or before
        try:
            status = self.execute("COMMIT").statusmessage
        finally:
            self._connection.on_silence = before
        if status != "COMMIT":
            raise psycopg.errors.InFailedSqlTransaction(f"the server undid the transaction ({status})")

    @property
    def raw(self) -> _Connection:
        """The connection of psycopg."""
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(psycopg.Error):
            self._connection.close()
