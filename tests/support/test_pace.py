"""What tests of senders require of a sender itself is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.senders import SETTLE, Pace, pause

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    return tmp_path / "cat.prompt.txt"


def test_a_pause_of_a_sender_is_not_measured_as_shorter_than_it_was(prompt: Path) -> None:
    with Pace(prompt.parent) as pace:
        prompt.write_text("a cat")
        pause(SETTLE)
        prompt.write_text("a cat and a dog")
    assert pace.longest >= SETTLE * 0.99  # the times of files are those of the last tick of the kernel


def test_a_pause_before_the_prompt_and_one_after_the_last_change_do_not_count(prompt: Path) -> None:
    with Pace(prompt.parent) as pace:
        (prompt.parent / "cat.png").write_text("an image")
        (prompt.parent / ".cat.prompt.txt.part").write_text("under another name")
        pause(SETTLE)
        prompt.write_text("a cat")
        pause(SETTLE)
    assert pace.longest < SETTLE
