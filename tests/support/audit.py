"""What must be true of a daemon that was disturbed and started again, checked from outside.

Outside means the folders, the ledger's file, and what the endpoint received and charged.
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.endpoint import unique_png

if TYPE_CHECKING:
    from pathlib import Path

    from support.daemon import Folders


@dataclass(frozen=True)
class Order:
    """A prompt, and how it ends when nothing disturbs it.

    Attributes:
        content: Of the prompt file.
        images: Names of the images beside it.
        destination: Where it ends.
        charged: The charge in its result file.
    """

    content: str
    images: tuple[str, ...] = ()
    destination: str = "outbox"
    charged: str = "yes"

    @property
    def text(self) -> str:
        """What is sent of it."""
        return self.content.rpartition("+++\n")[2]


ORDERS = {
    "text": Order("a lighthouse at dusk"),
    "edit": Order("make it blue", ("edit.png", "edit.1.png")),
    "two": Order("+++\nn = 2\n+++\ntwo boats [sandbox: b64]"),
    "wrong": Order("+++\ncolour = 1\n+++\nnever sent", destination="errors", charged="no"),
    "bad": Order("nothing nice [sandbox: 400]", destination="errors", charged="no"),
    "busy": Order("a busy day [sandbox: once 429-plain]"),
}
"""Responses by url and with the image inside, one image and two, inputs, mistakes on both sides, a second attempt."""


def drop(folders: Folders, orders: dict[str, Order]) -> Folders:
    """Drop prompts with their images."""
    for stem, order in orders.items():
        for name in order.images:
            folders.drop(name, unique_png(name))
        folders.prompt(stem, order.content)
    return folders


class Audit:
    """Checks everything after the end.

    Args:
        folders: Of the daemon.
        report: The endpoint's.
        orders: What was dropped.
        disturbed: How many jobs at most may have been disturbed: as many as were under way at the same time.
        refused: Whether prompts may have been refused unpaid, as they could not be read.
    """

    def __init__(
        self,
        folders: Folders,
        report: dict[str, Any],
        orders: dict[str, Order],
        disturbed: int,
        *,
        refused: bool = False,
    ) -> None:
        self.folders = folders
        self.orders = orders
        self._report = report
        self._most_disturbed = disturbed
        self._may_be_refused = refused
        self._calls = {stem: [c for c in report["calls"] if c["prompt"] == o.text] for stem, o in orders.items()}
        self.destinations = folders.finished()

    def check(self) -> None:
        assert self._report["faults"] == []
        assert sum(map(len, self._calls.values())) == self._report["requests"]
        for stem in self.orders:
            assert len(self._paid(stem)) <= 1, f"{stem} was paid twice"
        assert self.folders.leftovers() == []
        assert set(self.destinations) == set(self.orders)
        assert [name for name in self.folders.names("inbox") if not name.startswith(".")] == []
        assert sum(self._check(stem) for stem in self.orders) <= self._most_disturbed
        self._check_originals()
        self._check_ledger()

    def _paid(self, stem: str) -> list[int]:
        return [call["credits"] for call in self._calls[stem] if call["credits"]]

    def _result_file(self, stem: str) -> dict[str, Any]:
        return self.folders.receipt(stem) if self.destinations[stem] == "outbox" else self.folders.error(stem)

    def _check(self, stem: str) -> bool:
        """Check one prompt; return whether its request was disturbed."""
        result_file = self._result_file(stem)
        if self.destinations[stem] == "outbox":
            self._check_images(stem, result_file)
        elif self._paid(stem):
            assert result_file["charged"] in {"yes", "unknown"}
        order = self.orders[stem]
        disturbed = (self.destinations[stem], result_file["charged"]) != (order.destination, order.charged)
        if disturbed and self._may_be_refused and result_file["charged"] == "no" and not self._paid(stem):
            assert "cannot be read" in str(result_file["problems"])
            return False
        assert not disturbed or (stem != "wrong" and result_file["charged"] in {"yes", "unknown"})
        return disturbed

    def _check_images(self, stem: str, receipt: dict[str, Any]) -> None:
        served = [call["images"] for call in self._calls[stem] if call["images"]]
        assert len(served) == 1
        found = [_sha256(self.folders.outbox / image["file"]) for image in receipt["images"]]
        assert found == [image["sha256"] for image in receipt["images"]]
        assert found == served[0] or (receipt.get("problems") and found == served[0][: len(found)])

    def _check_originals(self) -> None:
        """Everything that was dropped is kept once; everything in the outbox is named by a receipt."""
        contents = {f"{stem}.prompt.txt": order.content.encode() for stem, order in self.orders.items()}
        contents |= {name: unique_png(name) for order in self.orders.values() for name in order.images}
        for name, content in contents.items():
            destination = "archive" if self.destinations[name.split(".")[0]] == "outbox" else "errors"
            assert (self.folders.root / destination / name).read_bytes() == content
        assert len(self.folders.names("archive")) + len(self.folders.names("errors")) == len(contents) + sum(
            1 + bool(list(self.folders.errors.glob(f"{stem}.answer.*")))
            for stem, destination in self.destinations.items()
            if destination == "errors"
        )
        completed = [stem for stem, destination in self.destinations.items() if destination == "outbox"]
        images = [image["file"] for stem in completed for image in self.folders.receipt(stem)["images"]]
        assert sorted([*images, *(f"{stem}.receipt.toml" for stem in completed)]) == self.folders.names("outbox")

    def _check_ledger(self) -> None:
        """The ledger has what the endpoint counted: each request, and each credit of a response."""
        rows = self._rows()
        assert {row["source"] for row in rows} == {f"{stem}.prompt.txt" for stem in self.orders}
        counted = 0.0
        for stem in self.orders:
            mine = [row for row in rows if row["source"] == f"{stem}.prompt.txt"]
            counted += self._check_rows(stem, mine)
        assert sum(row["credits"] or 0 for row in rows) + counted == self._report["credits"]

    def _check_rows(self, stem: str, rows: list[sqlite3.Row]) -> float:
        """Check the rows of one prompt; return what the endpoint charged for it and could not report."""
        result_file, paid = self._result_file(stem), self._paid(stem)
        attempts = [row for row in rows if row["attempt"]]
        unanswered = [row for row in rows if row["attempt"] and not row["status"]]
        assert len(self._calls[stem]) <= len(attempts) <= len(self._calls[stem]) + len(unanswered), stem
        charged = [row for row in rows if row["charged"] != "no"]
        assert [row["charged"] for row in charged] == [result_file["charged"]] * (result_file["charged"] != "no"), stem
        charges = [row["credits"] for row in charged if row["credits"] is not None]
        if not paid:
            assert not charges, f"{stem}: the ledger has {charges}, the endpoint charged nothing"
            return 0.0
        assert charged, f"{stem} was paid for, and the ledger has no charge"
        if charges:
            assert charges == paid, f"{stem}: the ledger has {charges}, the endpoint {paid}"
            return 0.0
        # Only a response that was cut short can be charged for without a price.
        assert (
            result_file["charged"] == "unknown" or result_file.get("problems") or self.destinations[stem] == "errors"
        ), stem
        return float(paid[0])

    def _rows(self) -> list[sqlite3.Row]:
        database = sqlite3.connect(self.folders.state / "ledger.sqlite3")
        database.row_factory = sqlite3.Row
        try:
            return database.execute("SELECT source, attempt, charged, credits, status FROM attempts").fetchall()
        finally:
            database.close()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
