"""The journal that a configuration names: the file in the state folder, or the shared database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewatch.journal.files import path_in
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config


def open_journal(config: Config, clock: Callable[[], float], *, guarded: bool = False) -> Journal:
    """Return the journal of a configuration; it is opened when it is used.

    Args:
        config: State folder, shared database, limits.
        clock: Wall clock, seconds since the epoch.
        guarded: Whether the file has to be the one that was used before. The daemon's has to.
    """
    file = SqliteDatabase(path_in(config.folders.state), guarded=guarded)
    return Journal(file, config.limits, clock, budgets=config.budgets)
