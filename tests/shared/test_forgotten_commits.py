"""A daemon ends at each commit of a job, and the database loses its last commits: nothing is paid for twice or lost.

That is what an asynchronous standby does that takes over, and a backup that is restored. ``IMAGEWATCH_ALL_SHARED=1``
tries all points; otherwise one for each number of lost commits and each thing that is done then.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs
from support.forgetting import COMMIT, MOST_LOST, Played, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

ALL = os.environ.get("IMAGEWATCH_ALL_SHARED") == "1"
TAGS = {"completed": " [sandbox: b64]", "by URL": " [sandbox: url]", "refused": " [sandbox: 400]"}
AFTERWARDS = {
    False: ("it starts again", "db recover"),
    True: ("it starts again", "db recover", "another daemon takes over"),
}
"""What is done then, in an inbox of its own and in a common one."""
FILES = 2
"""A receipt and an image."""
RESULTS = "SELECT charged, credits FROM imagewatch.attempts WHERE outcome <> 'unsent'"


@dataclass(frozen=True)
class Point:
    """Where a daemon ends, and what happens then.

    Attributes:
        before: The step before which it ends.
        lost: How many commits are lost.
        afterwards: What is done then.
    """

    before: int
    lost: int
    afterwards: str


@pytest.fixture
def world(tmp_path: Path, sandbox: Sandbox, postgres: Server) -> Iterator[Callable[..., World]]:
    """Return a function that makes an inbox with a database of its own; both are removed at the end of the block."""
    numbers = iter(range(1_000_000))

    @contextlib.contextmanager
    def made(kind: str, *, is_common: bool) -> Iterator[World]:
        number, uri = next(numbers), postgres.database()
        text = f"a cat {number}{TAGS[kind]}"
        new = World(tmp_path / f"{number}", postgres, uri, sandbox, is_common=is_common, text=text)
        try:
            yield new
        finally:
            new.close()
            postgres.drop(uri.rpartition("/")[2])

    return made


def ends(world: World) -> dict[str, str]:
    """Return each result file, and its destination; the prompt may have one in each."""
    return {path.name: top.name for top in (world.one.outbox, world.one.errors) for path in top.glob("*.toml")}


def points(played: Played, afterwards: tuple[str, ...]) -> list[Point]:
    """Return each point: right after a commit, and right before the next one, or at the end."""
    commits = [number for number, step in enumerate(played.steps, 1) if step == COMMIT]
    ends = sorted({*(number + 1 for number in commits), *commits[1:], len(played.steps) + 1})
    return [
        Point(before, lost, then)
        for before in ends
        for lost in range(1, MOST_LOST + 1)
        for then in afterwards
        if sum(number < before for number in commits) >= lost
    ]


def some(found: list[Point], kind: str, afterwards: tuple[str, ...]) -> list[Point]:
    """Return a few points, each at another part of the steps.

    All kinds together have one for each number of lost commits and each thing that is done then.
    """
    pairs = [(lost, then) for lost in range(1, MOST_LOST + 1) for then in afterwards]
    chosen = []
    for place, (lost, then) in enumerate(pairs):
        if (lost + afterwards.index(then)) % len(TAGS) == list(TAGS).index(kind):
            group = [point for point in found if (point.lost, point.afterwards) == (lost, then)]
            chosen.append(group[place * len(group) // len(pairs)])
    return chosen


@pytest.mark.parametrize("afterwards", AFTERWARDS.values())
def test_the_selection_has_each_number_of_lost_commits_with_each_thing_that_is_done_then(
    afterwards: tuple[str, ...],
) -> None:
    played = Played([COMMIT, "rename"] * 8)
    chosen = [point for kind in TAGS for point in some(points(played, afterwards), kind, afterwards)]
    assert {(point.lost, point.afterwards) for point in chosen} == {
        (lost, then) for lost in range(1, MOST_LOST + 1) for then in afterwards
    }
    assert len({point.before for point in chosen}) > len(chosen) / 2


def tried(world: World, point: Point) -> str:
    """Let a daemon end at a point, and everything be done that the documentation tells; return what is wrong."""
    with capture_logs() as events:
        played = world.play(point.before, point.lost)
        if point.afterwards == "another daemon takes over":
            two = world.add("two")
            world.begin(two)
            world.go_on(two)
        noticed = world.begin(world.one, always_recover=point.afterwards == "db recover")
        world.go_on(world.one)
    wrong = []
    if stuck := [event for event in events if event["event"] == "stuck"]:
        # A claimed prompt whose job is lost, without a witness: no daemon can know whether another one is about to
        # send it, so that it is continued only while all of them are stopped. This is what the documentation says.
        is_explained = world.is_common and not played.requests and all("db recover" in one["next"] for one in stuck)
        wrong += [] if is_explained else [f"a job is stuck: {stuck}"]
        with capture_logs():
            world.one.restart()
            world.begin(world.one, always_recover=True)
            world.go_on(world.one)
    wrong += faults(world, played)
    if not wrong:
        return ""
    before = [*played.steps, "nothing"][point.before - 1 :][:1]
    return "\n".join(
        [
            f"{point}, after {played.steps[-3:]}, sent {played.requests}, saved {played.is_saved}, noticed {noticed}:",
            *(f"  {one}" for one in wrong),
            f"  jobs and attempts: {world.open()}, {world.peers.outcomes()}; {before}",
            f"  folders: {ends(world)}, {world.one.leftovers()}, {world.one.names('inbox')}",
            *(f"  {one}" for one in dict.fromkeys(world.troubles)),
        ]
    )


def faults(world: World, played: Played) -> Iterator[str]:
    """Yield what is not as it has to be. Nothing needs a person any more."""
    calls, found = world.calls(), ends(world)
    if len(calls) > 1:
        yield f"it was sent {len(calls)} times"
    if len(found) != 1:
        yield f"it has no end, or two: {found}"
        return
    if world.open():
        yield "something is left open"
    if left := world.one.leftovers():
        yield f"files are left: {left}"
    yield from wrong_result(world, played, sum(call["credits"] for call in calls))


def wrong_result(world: World, played: Played, charged: int) -> Iterator[str]:
    """Yield what is wrong with the result file and the ledger of a prompt for which so many credits were charged."""
    one, rows = world.one, world.peers.rows(RESULTS)
    is_published = one.finished() == {"cat": "outbox"}
    is_unknown = not is_published and one.error("cat")["charged"] == "unknown"
    if is_published and len(names := one.names("outbox")) != FILES:
        yield f"its images are published twice, or not: {names}"
    if is_unknown and (played.is_saved or (world.is_common and not world.calls())):
        yield "its charge is unknown, but its response was saved, or it was not sent"
    elif not is_unknown and (is_published != bool(charged) or not world.calls()):
        yield f"{charged} credits were charged, and its end is {one.finished()}"
    wanted = [("unknown", None)] if is_unknown else [("yes", charged)] if charged else [("no", None)]
    if rows != wanted:
        yield f"the ledger has {rows}, not {wanted}"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_common", [False, True], ids=["an inbox of its own", "a common inbox"])
@pytest.mark.parametrize("kind", TAGS)
def test_a_database_that_loses_its_last_commits_at_any_commit_of_a_job_leads_to_no_second_charge_and_no_loss(
    world: Callable[..., contextlib.AbstractContextManager[World]], kind: str, is_common: bool
) -> None:
    with world(kind, is_common=is_common) as undisturbed:
        played = undisturbed.play()
        assert list(faults(undisturbed, played)) == []
    found = points(played, AFTERWARDS[is_common])
    chosen = found if ALL else some(found, kind, AFTERWARDS[is_common])
    wrong = []
    for point in chosen:
        with world(kind, is_common=is_common) as one:
            wrong += [text] if (text := tried(one, point)) else []
    assert not wrong, f"{len(wrong)} of {len(chosen)} points:\n" + "\n".join(wrong)
