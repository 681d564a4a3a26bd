"""A receiver, and folders whose daemon notifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders
from support.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


@pytest.fixture
def notified(tmp_path: Path, sandbox: Sandbox, receiver: Receiver) -> Folders:
    return Folders(tmp_path, sandbox.base_url, notify__url=receiver.url)
