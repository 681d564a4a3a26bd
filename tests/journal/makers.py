"""Makes journals for the tests that every store has to pass."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from imagewatch.config.schema import Limits
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STORES = ("sqlite", "postgres")
NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Maker:
    """Makes a journal, and another one to the same database, as another process would."""

    def __init__(self, new: Callable[[], Any], clock: Callable[[], float]) -> None:
        self._new = new
        self._clock = clock
        self._made: list[Journal] = []

    def __call__(self, limits: Limits | None = None, **budgets: Any) -> Journal:
        limits = limits or Limits(assumed_credits=30)
        self._made.append(Journal(self._new(), limits, self._clock, budgets=budgets))
        return self._made[-1]

    def close(self) -> None:
        for journal in self._made:
            journal.close()


def sqlite(folder: Path, **settings: Any) -> Callable[[], Any]:
    folder.mkdir(exist_ok=True)
    return lambda: SqliteDatabase(str(folder / "ledger.sqlite3"), **settings)


def postgres(uri: str, **names: str) -> Callable[[], Any]:
    """Return what makes connections of a daemon to a database, which gets tables if it has none."""
    from imagewatch.journal.postgres.database import PostgresDatabase  # noqa: PLC0415  psycopg may be missing
    from imagewatch.journal.postgres.place import Place  # noqa: PLC0415  psycopg may be missing
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415  psycopg may be missing

    given = {"account": "main", "inbox": "one", "instance": "one", **names}
    place = Place(uri, **given, is_replicated=False)
    initialize(place)
    return lambda: PostgresDatabase(place)


def emptied(uri: str, **names: str) -> Callable[[], Any]:
    """The same for a database that another test or example has used."""
    from imagewatch.journal.postgres.schema import SCHEMA, TABLES  # noqa: PLC0415  psycopg may be missing

    new = postgres(uri, **names)
    tables = [name for name in re.findall(r"CREATE TABLE (\w+)", TABLES) if name != "about"]
    with contextlib.closing(new()) as database, database.using() as connection:
        connection.execute(f"ALTER TABLE {SCHEMA}.attempts DISABLE TRIGGER never_deleted")
        connection.execute(f"TRUNCATE {', '.join(f'{SCHEMA}.{name}' for name in tables)}")
        connection.execute(f"ALTER TABLE {SCHEMA}.attempts ENABLE TRIGGER never_deleted")
    return new
