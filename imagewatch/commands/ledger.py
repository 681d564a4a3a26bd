"""The ledger, opened for a command."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from imagewatch.commands.state import unreadable, usable_journal
from imagewatch.config.locate import is_hidden
from imagewatch.journal import opening
from imagewatch.journal.books import NoBooks
from imagewatch.journal.budget import Budget
from imagewatch.journal.files import path_in
from imagewatch.journal.health import ledger_problem
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.journal import Journal
    from imagewatch.journal.ledger import Ledger


def ledger_path(config: Config) -> str:
    """Return the path of the ledger's file."""
    return path_in(config.folders.state)


def has_journal(config: Config) -> bool:
    """Return whether there is a journal: the file, or the shared database."""
    return bool(config.shared.database) or os.path.exists(ledger_path(config))


@contextlib.contextmanager
def open_ledger(config: Config) -> Iterator[Ledger]:
    """Open the journal for the block, to read in the ledger; errors as of ``open_journal``."""
    with open_journal(config) as journal:
        yield journal.ledger


@contextlib.contextmanager
def open_journal(config: Config) -> Iterator[Journal]:
    """Open the journal for the block.

    Raises:
        SpoolError: There is none, or it cannot be read.
    """
    if config.shared.database:
        with usable_journal(config) as journal:
            yield journal
        return
    path = ledger_path(config)
    if is_hidden(path):
        raise unreadable(config.folders.state)
    opening.require_own_store(config)
    if not config.shared.database and not os.path.exists(path):
        if error := ledger_problem(config.folders.state):  # there was one
            raise error
        hint = "no job has ended with this configuration yet; for another configuration use --config"
        raise SpoolError(f"there is no ledger: {printable(path)}", path=path, hint=hint)
    with contextlib.closing(opening.open_journal(config, time.time)) as journal:
        journal.require()
        yield journal


@contextlib.contextmanager
def open_budget(config: Config) -> Iterator[Budget]:
    """Open the ledger for the block and return the budget; without a ledger nothing was spent.

    Args:
        config: State folder, limits.

    Raises:
        SpoolError: There may be a ledger, but it cannot be read.
    """
    state = config.folders.state
    with contextlib.ExitStack() as stack:
        if has_journal(config):
            opening.require_own_store(config)
            journal = stack.enter_context(contextlib.closing(opening.open_journal(config, time.time)))
            journal.require()
            yield journal.budget()
            return
        if os.path.exists(state) and not os.access(state, os.X_OK):
            raise unreadable(state)
        yield Budget(NoBooks(), config.limits, time.time(), config.budgets)
