"""Three daemons of one inbox while everything around them fails at random.

Daemons are stopped and continued, killed and started again, cut off from the database and from the endpoint, and the
database server is killed once. When all is well again, each prompt must come to its end.

``IMAGEWATCH_ALL_CHAOS=1`` takes 1,000 prompts and up to ten minutes; ``IMAGEWATCH_CHAOS_SEED`` repeats a run.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, below, until
from support.endpoint import unique_png
from support.team import LEASE, SHORT_DEADLINE, SHORT_LEASE, Member, Team

from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.postgres import Server

ALL = os.environ.get("IMAGEWATCH_ALL_CHAOS") == "1"
SEED = int(os.environ.get("IMAGEWATCH_CHAOS_SEED", "19"))
PROMPTS, CHAOS_SECONDS, PATIENCE = (1000, 240.0, 300.0) if ALL else (120, 20.0, 60.0)
CONCURRENCY = 4


class Chaos:
    """Makes things fail at random, each for a time.

    Args:
        team: The daemons.
        random: What decides.

    Attributes:
        in_flight: The jobs that had a request in flight when something failed.
        done: What was made to fail, in order.
    """

    def __init__(self, team: Team, random: random.Random) -> None:
        self._team, self._random = team, random
        self._ends: list[tuple[float, Callable[[], object]]] = []
        self._disturbed: set[str] = set()
        self.in_flight: set[str] = set()
        self.done: list[str] = []

    def step(self) -> None:
        """End what is due, and begin something with a daemon that is not disturbed yet."""
        now = time.monotonic()
        due, self._ends = [one for one in self._ends if one[0] <= now], [one for one in self._ends if one[0] > now]
        for _, end in due:
            end()
        self._restart()
        free = [member for name, member in self._team.members.items() if name not in self._disturbed]
        if free and len(self._disturbed) < len(self._team.members) - (self._random.random() < 0.8):
            self._disturb(self._random.choice(free))

    def _disturb(self, member: Member) -> None:
        """Disturb a daemon; the requests that it has in flight may be lost."""
        act = self._random.choice([self._stop, self._stop, self._kill, self._kill, self._cut, self._cut, self._lose])
        seconds = self._random.choice([0.3, 1.0, 3.0, LEASE + 3.0 if act == self._stop else 6.0])
        self.in_flight |= self._team.in_flight(member.name)
        end = act(member)
        self.in_flight |= self._team.in_flight(member.name)
        self.done.append(f"{act.__name__[1:]} {member.name} {seconds:g}")
        self._disturbed.add(member.name)
        self._ends.append((time.monotonic() + seconds, lambda: (end(), self._disturbed.discard(member.name))))

    @staticmethod
    def _stop(member: Member) -> Callable[[], object]:
        member.signal(signal.SIGSTOP)
        return lambda: member.signal(signal.SIGCONT)

    @staticmethod
    def _kill(member: Member) -> Callable[[], object]:
        member.kill()
        return member.start

    def _cut(self, member: Member) -> Callable[[], object]:
        self._random.choice([member.database.cut, member.database.hang, member.database.swallow_replies])()
        return member.database.restore

    def _lose(self, member: Member) -> Callable[[], object]:
        self._random.choice([member.endpoint.cut, member.endpoint.hang])()
        return member.endpoint.restore

    def end(self) -> None:
        """Let everything work again; as long as this is called, daemons that have ended are started again."""
        for _, end in self._ends:
            end()
        self._ends.clear()
        self._disturbed.clear()
        self._restart()

    def _restart(self) -> None:
        """Start daemons again that could not start, as the service manager does: one cut off ends with code 69."""
        for name, member in self._team.members.items():
            if name not in self._disturbed and not member.is_running:
                member.start()


class Sender:
    """Drops prompts of several kinds.

    Attributes:
        texts: The text of each by stem.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self.texts: dict[str, str] = {}

    def drop(self, count: int) -> None:
        """Drop some until there are so many."""
        for number in range(len(self.texts), count):
            stem, text = f"cat{number}", f"a cat {number}"
            path = f"people/ann/{stem}" if number % 3 == 0 else stem
            if number % 10 == 3:
                text += " [sandbox: once 429-plain]"
            if number % 10 == 5:
                self._team.folders.drop(f"{path}.png", unique_png(stem))
            head = "+++\nn = 2\n+++\n" if number % 10 == 7 else ""
            self.texts[stem] = text
            self._team.folders.prompt(path, head + text)


class Audit:
    """What must be true at the end."""

    def __init__(self, team: Team, texts: dict[str, str], chaos: Chaos) -> None:
        self._team, self._texts, self._chaos = team, texts, chaos
        self._report = team.sandbox.report()
        self._calls: dict[str, list[dict[str, Any]]] = {text: [] for text in texts.values()}
        for call in self._report["calls"]:
            self._calls[call["prompt"]].append(call)
        self._ends = {
            path.name.removesuffix(ending): str(path.relative_to(top)).removesuffix(ending)
            for top, ending in ((team.folders.outbox, ".receipt.toml"), (team.folders.errors, ".error.toml"))
            for path in below(top)
            if path.name.endswith(ending)
        }

    def check(self) -> None:
        assert self._report["faults"] == []
        twice = {text: calls for text, calls in self._calls.items() if sum(bool(call["credits"]) for call in calls) > 1}
        assert twice == {}, "paid twice"
        assert set(self._ends) == set(self._texts), "lost"
        unknown = [self._check(stem, text) for stem, text in self._texts.items()]
        self._check_ledger()
        assert sum(unknown) <= len(self._chaos.in_flight)
        assert self._team.leftovers() == []

    def _check(self, stem: str, text: str) -> bool:
        """Check one prompt; return whether its charge is unknown."""
        paid = [call for call in self._calls[text] if call["credits"]]
        path, folders = self._ends[stem], self._team.folders
        is_completed = (folders.outbox / f"{path}.receipt.toml").exists()
        original = folders.archive if is_completed else folders.errors
        assert (original / f"{path}.prompt.txt").exists(), stem
        if not is_completed:
            assert folders.error(path)["charged"] in {"unknown", "yes"}, folders.error(path)  # or was cut off
            return True
        receipt = self._team.folders.receipt(path)
        folder = (self._team.folders.outbox / path).parent
        found = [hashlib.sha256((folder / image["file"]).read_bytes()).hexdigest() for image in receipt["images"]]
        assert found == [image["sha256"] for image in receipt["images"]] == paid[0]["images"]
        return False

    def _check_ledger(self) -> None:
        rows = self._team.rows("SELECT source, charged, credits, outcome FROM attempts WHERE attempt > 0")
        assert [row for row in rows if row["outcome"] == "sent"] == []
        charged = [row for row in rows if row["charged"] != "no"]
        assert len({row["source"] for row in charged}) == len(charged)
        unknown = {
            row["source"].rpartition("/")[2].removesuffix(".prompt.txt") for row in charged if row["credits"] is None
        }
        paid_unknown = sum(call["credits"] for stem in unknown for call in self._calls[self._texts[stem]])
        assert sum(row["credits"] or 0 for row in charged) + paid_unknown == self._report["credits"]


@pytest.mark.timeout(700 if ALL else 150)
def test_each_prompt_is_paid_at_most_once_and_comes_to_its_end(tmp_path: Path, own_postgres: Server) -> None:
    chance = random.Random(SEED)
    with (
        Sandbox(key=KEY, latency_seconds=0.5) as sandbox,
        Team(
            tmp_path, own_postgres, sandbox, limits__concurrency=str(CONCURRENCY), **SHORT_LEASE, **SHORT_DEADLINE
        ) as team,
    ):
        for name in ("one", "two", "three"):
            team.member(name).start()
        sender, chaos = Sender(team), Chaos(team, chance)
        began = time.monotonic()
        is_killed, pause = False, threading.Event()
        while (passed := time.monotonic() - began) < CHAOS_SECONDS:
            if not is_killed and passed > CHAOS_SECONDS / 2:
                is_killed = True
                own_postgres.stop("immediate")
                pause.wait(1)
                own_postgres.start()
            sender.drop(min(PROMPTS, round(PROMPTS * 1.1 * passed / CHAOS_SECONDS)))
            chaos.step()
            pause.wait(chance.uniform(0.05, 0.4))
        sender.drop(PROMPTS)
        until(
            lambda: chaos.end() or (len(team.folders.finished()) == PROMPTS and team.leftovers() == []),
            PATIENCE,
            saw=lambda: f"{chaos.done}\nleft: {team.leftovers()}",
        )
        Audit(team, sender.texts, chaos).check()
