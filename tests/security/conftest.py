"""Fixtures of the attacks."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from security.people import Interpreter
from security.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.sandbox import Sandbox


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """This Python, for other users."""
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    made = Interpreter()
    if problem := made.problem():
        pytest.skip(f"another user cannot run this Python here: {problem}")
    yield made
    made.close()


@pytest.fixture
def new_world(open_path: Path, sandbox: Sandbox, interpreter: Interpreter) -> Iterator[Callable[..., World]]:
    """Make worlds, each below a folder of its own."""
    worlds: list[World] = []

    def maker(**settings: object) -> World:
        top = open_path / f"world-{len(worlds)}"
        top.mkdir()
        worlds.append(World(top, sandbox, interpreter, **settings))  # type: ignore[arg-type]
        return worlds[-1]

    yield maker
    for world in worlds:
        world.leave()


@pytest.fixture
def world(new_world: Callable[..., World]) -> World:
    return new_world()


@pytest.fixture
def elsewhere(open_path: Path) -> Iterator[Path]:
    """An empty folder on another file system that all users may enter."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == open_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=shm))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
