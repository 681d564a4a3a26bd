"""Creates the tables in a database, and updates those of an earlier version."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psycopg

from imagewatch.journal.postgres.checks import pooler, problems, unusable
from imagewatch.journal.postgres.faults import translated
from imagewatch.journal.postgres.schema import VERSION, install, version_of
from imagewatch.journal.postgres.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.journal.postgres.place import Place

_LOCK = "SELECT pg_advisory_xact_lock(7302041955123)"
"""So that two do not create the tables at the same time; the number is arbitrary."""


@contextlib.contextmanager
def _session(place: Place) -> Iterator[Session]:
    try:
        session = Session(place, "db", is_prepared=False)
        with contextlib.closing(session):
            yield session
    except psycopg.Error as error:
        raise translated(error) from error


def initialize(place: Place) -> bool:
    """Create the tables.

    Returns:
        Whether they were created; else they are there already.

    Raises:
        DatabaseError: The server cannot be used, or its tables are of another version.
    """
    with _session(place) as session:
        _require(problems(session, is_replicated=False, with_tables=False))
        with session.transaction():
            session.execute(_LOCK)
            version = version_of(session)
            if not version:
                install(session)
        if version:
            _require(problems(session, is_replicated=False))
        return not version


def upgrade(place: Place) -> tuple[int, int]:
    """Update the tables to this version.

    Returns:
        The version before, and the one now.

    Raises:
        DatabaseError: The server cannot be used, has no tables, or those of a newer version.
    """
    with _session(place) as session, session.transaction():
        session.execute(_LOCK)
        version = version_of(session)
        if not version or version > VERSION:
            _require(problems(session, is_replicated=False))
        return version, VERSION


def check(place: Place) -> list[tuple[str, str]]:
    """Return what is wrong with the server or its tables, each with what to do.

    Raises:
        DatabaseError: The server cannot be reached.
    """
    with _session(place) as session, _session(place) as other:
        return problems(session, is_replicated=place.is_replicated) + pooler(session, other)


def _require(found: list[tuple[str, str]]) -> None:
    for why, hint in found:
        raise unusable(why, hint)
