"""What the journal needs of a database: SQLite's (``sqlite``) and PostgreSQL's (``postgres``) have it.

Both get the same queries, with ``?`` or ``?1`` where a value goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

T = TypeVar("T")


class Row(Protocol):
    """A row of a result: values by name or position."""

    def __getitem__(self, key: str | int, /) -> Any:  # noqa: ANN401  whatever the column holds
        """Return one value."""

    def __iter__(self) -> Iterator[Any]:
        """Return the values in the order of the columns."""

    def keys(self) -> Any:  # noqa: ANN401
        """Return the names of the columns."""


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """How many rows it has changed."""

    def fetchone(self) -> Any:  # noqa: ANN401  a Row or None
        """Return the first row that was not fetched yet, or None."""

    def fetchall(self) -> list[Any]:
        """Return the rows that were not fetched yet."""


class Connection(Protocol):
    """A connection."""

    def execute(self, question: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""


class Database(Protocol):
    """A database. Safe to use from several threads.

    Attributes:
        path: Its file, or how messages name it.
        own_jobs: Name of the table or view with the jobs that this daemon has.
        inbox_jobs: The same with all jobs of its inbox.
        is_ours: Condition for a row of ``jobs``: this daemon has the job.
        is_shared: Whether other hosts use it, too.
        is_common: Whether other daemons process the same inbox.
    """

    path: str
    own_jobs: str
    inbox_jobs: str
    is_ours: str
    is_shared: bool
    is_common: bool

    def using(self) -> AbstractContextManager[Connection]:
        """Lend a connection to read.

        Raises:
            SpoolError: The database cannot be used; the message has the cause.
        """

    def change(self, act: Callable[[Connection], T], *, synced: bool = True, locked: bool = False) -> T:
        """Write something in a transaction, which it may share with what other threads write at the same moment.

        Args:
            act: Writes. It may be called again. Its error undoes its changes alone.
            synced: Whether it survives a power cut when this returns. What is not synced becomes durable together with
                the next change that is, never after it.
            locked: Whether no other daemon of the account may do so at the same time.

        Returns:
            What ``act`` returned.

        Raises:
            SpoolError: It was not written; the message has the cause.
            UncertainError: It is not known whether it was written.
        """

    def prove(self) -> None:
        """Make sure that rows can be written.

        Raises:
            SpoolError: They cannot; the message has the cause.
        """

    def accept(self) -> None:
        """Use what is there from now on.

        Raises:
            SpoolError: It cannot be used.
        """

    def close(self) -> None:
        """Close it; the next use opens it again."""
