"""The power fails at every moment while jobs are notified: no event is lost, and repeated ones have the same id.

As in ``test_power``, with a receiver outside of our disks that gets each event as soon as that is possible. With
``IMAGEWATCH_ALL_CUTS=1`` there are two cuts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from support.endpoint import Books
from support.losing import Losing

from faults import test_power
from faults.test_power import ALL_CUTS, SCENES, Audit, Stage, explore
from imagewatch.job import claims, record
from imagewatch.job.record import Record
from imagewatch.journal import events
from imagewatch.journal.events import Events
from imagewatch.journal.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("text only", "refused", "invalid", "dropped", "not JSON", "busy, then completed", "unreachable", "two prompts")


@dataclass
class EventBooks(Books):
    """What is outside of our disks, with what the receiver has.

    Attributes:
        delivered: How often each event came: job, name and id.
        ids: How many ids were made: no two events have the same.
    """

    delivered: dict[str, int] = field(default_factory=dict)
    ids: int = 0

    def freeze(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        return (*super().freeze(), tuple(sorted(self.delivered.items())), (("ids", self.ids),))

    def thaw(self, frozen: tuple[tuple[tuple[str, int], ...], ...]) -> None:
        super().thaw(frozen[:-2])
        self.delivered, self.ids = dict(frozen[-2]), dict(frozen[-1])["ids"]


class NotifyingStage(Stage):
    """The real parts, with a receiver."""

    books: EventBooks

    def __init__(self, root: Path, name: str, patch: pytest.MonkeyPatch) -> None:
        super().__init__(root, SCENES[name])
        self.books = EventBooks()
        self.journal.events.configure(["url"])
        self.begin = self.state(Losing.KILLED)
        patch.setattr(events, "token_hex", self._new_id)
        published = Record.mark_over

        def noted(one: Record) -> None:
            published(one)
            self.deliver()

        patch.setattr(Record, "mark_over", noted)

    def _new_id(self, _: int) -> str:
        self.books.ids += 1
        return f"{self.books.ids:016x}"

    def deliver(self) -> None:
        while (event := self.journal.events.due("url")) is not None:
            self.disk.tick("deliver")
            key = f"{event.job} {event.name} {event.id}"
            self.books.delivered[key] = self.books.delivered.get(key, 0) + 1
            self.disk.tick("delivered")
            self.journal.events.delivered(event)

    def play(self) -> None:
        super().play()
        self.deliver()


class NotifiedAudit(Audit):
    """Checks the events, too."""

    _stage: NotifyingStage

    def check(self) -> None:
        super().check()
        expected = sorted(f"{one['job']} {_name(name, one)}" for name, one in self._result_files.items())
        delivered = [key.rpartition(" ")[0] for key in self._stage.books.delivered]
        assert sorted(delivered) == expected, "an event is missing, or has several ids"
        assert self._stage.journal.events.counts().pending == 0


def _name(file: str, one: dict[str, Any]) -> str:
    if file.endswith(".receipt.toml"):
        return "completed"
    return "unknown" if one["charged"] == "unknown" else "failed"


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (record, claims):
        monkeypatch.setattr(module, "token_hex", lambda _: "0" * 16)
    monkeypatch.setattr(test_power, "Audit", NotifiedAudit)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_power_cut_at_any_step_loses_no_event_and_repeats_it_only_with_its_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = NotifyingStage(tmp_path, name, monkeypatch)
    explore(stage, cuts=2 if ALL_CUTS and name == "text only" else 1)
    stage.close()


def _event_in_a_transaction_of_its_own(patch: pytest.MonkeyPatch) -> None:
    decide, decided = Journal.decide, Events.decided
    patch.setattr(Events, "decided", lambda *_: None)

    def late(self: Journal, claim: Any, decision: Any, row: Any, **more: Any) -> None:
        decide(self, claim, decision, row, **more)
        self._file.change(lambda connection: decided(self.events, connection, claim, decision))

    patch.setattr(Journal, "decide", late)


def test_the_audit_finds_an_event_that_is_written_after_its_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _event_in_a_transaction_of_its_own(monkeypatch)
    stage = NotifyingStage(tmp_path, "text only", monkeypatch)
    with pytest.raises(AssertionError, match="an event is missing, or has several ids"):
        explore(stage, cuts=1)
    stage.close()
