"""The stores that have to pass the same tests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from journal.makers import STORES, Clock, Maker, postgres, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.journal.journal import Journal


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """What opens a store; each call opens it once more, as another process would."""
    return sqlite(tmp_path) if request.param == "sqlite" else postgres(request.getfixturevalue("database"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(store: Callable[[], Any], clock: Clock) -> Iterator[Callable[..., Journal]]:
    """What opens the journal of a store; each call opens it once more, as another process would."""
    with contextlib.closing(Maker(store, clock)) as made:
        yield made
