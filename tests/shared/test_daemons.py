"""Real daemons that share one account in a real PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, Running, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox


@pytest.fixture
def member(tmp_path: Path, sandbox: Sandbox, database: str) -> Callable[..., Folders]:
    """Return a function that makes the folders of a daemon of the account."""

    def made(name: str, **settings: Any) -> Folders:
        given = {"shared__database": database, "shared__durability": "single", "shared__instance": name, **settings}
        folders = Folders(tmp_path / name, sandbox.base_url, **given)
        command(folders, "db", "init")
        return folders

    return made


def test_a_prompt_is_completed(member: Callable[..., Folders], sandbox: Sandbox) -> None:
    folders = member("one")
    folders.prompt("cat", "a cat")
    daemon = Running(folders, "once")
    assert daemon.wait() == 0, daemon.output
    assert folders.receipt("cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 1
