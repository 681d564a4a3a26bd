"""The folders that an earlier version left behind when it was killed are finished, and nothing is paid for twice.

``tests/data`` has the folders at every kill point of the real process, in many scenarios, and how the version that made
them finished them. ``IMAGEWATCH_ALL_EARLIER=1`` tries all of them. Otherwise each kill point is tried at which the
endpoint has seen more than before, or after which the job ends in another way; and every third of the others.
"""

from __future__ import annotations

import functools
import json
import os
from itertools import groupby
from typing import TYPE_CHECKING

import pytest
from support.earlier import MANIFEST, Archive, State, end_of

if TYPE_CHECKING:
    from pathlib import Path

ALL = os.environ.get("IMAGEWATCH_ALL_EARLIER") == "1"
RECORDED = json.loads(MANIFEST.read_text())


def states() -> dict[str, list[State]]:
    """Return the states of each scenario."""
    seen, ends = RECORDED["seen"], RECORDED["ends"]
    found = [State(name, point, tree, *seen[s], ends[e]) for name, point, tree, s, e in RECORDED["states"]]
    groups = [list(group) for _, group in groupby(found, key=lambda one: (one.scenario, *one[3:]))]
    chosen = [state for group in groups for state in group[:: 1 if ALL else 3]]
    return {name: list(group) for name, group in groupby(chosen, key=lambda one: one.scenario)}


STATES = states()


@functools.cache
def archive() -> Archive:
    return Archive.read()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", STATES)
def test_what_an_earlier_version_left_behind_is_finished_as_it_would_have_finished_it(
    scenario: str, tmp_path: Path
) -> None:
    recorded = RECORDED["scenarios"][scenario.partition(":")[0]]
    most = 2 if "--pay-again" in recorded["then"] else 1
    wrong = []
    for number, state in enumerate(STATES[scenario]):
        end = end_of(archive(), state, tmp_path / str(number), **recorded)
        different = {name: (end.get(name), was) for name, was in (state.end or {}).items() if end.get(name) != was}
        if different or max(end["charged"].values(), default=0) > most:
            wrong.append(f"tree {state.tree}, killed {state.point}; how it ended, and how it should have: {different}")
    assert not wrong, "\n".join(wrong)
