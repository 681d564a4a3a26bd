"""The scenarios of ``make_earlier``: what is dropped, how the endpoint responds, what is damaged afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import stopping_daemon
from support.daemon import Folders, command
from support.endpoint import unique_png

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.small_endpoint import SmallEndpoint


@dataclass
class Stage:
    """The folders of a scenario, and its endpoint."""

    root: Path
    folders: Folders
    endpoint: SmallEndpoint

    def once(self) -> None:
        command(self.folders, "once")

    def run(self, *arguments: str) -> None:
        done = command(self.folders, *arguments)
        assert done.returncode == 0, done.stderr

    def kill_at(self, point: str, time: int = 1) -> None:
        """Run the daemon and kill it when it comes to a point for the first time, or another time."""
        process = stopping_daemon.start(self.folders, "")
        for found in stopping_daemon.points(process):
            time -= found == point
            if not time:
                process.kill()
                process.wait()


@dataclass
class Scenario:
    """What is dropped, and what happens before the daemon runs until it ends.

    Attributes:
        files: Dropped before, in this order.
        settings: Of the configuration, for this version and for the later one.
        before: What happens before the daemon starts.
        fault: Which fault is put into the daemon.
        together: How many requests the endpoint lets come before it answers.
        runs: Whether the daemon runs; if not, the folders before its start are the only state.
        then: A command that is run after the later version has finished; it is started once more afterwards.
        changes: What is done to copies of states, by name: each gives more states.
        only: Expression of the points that are kept; None: all.
        keeps_unchanged: Whether states are kept without a change, too.
    """

    files: dict[str, str | bytes]
    settings: dict[str, str] = field(default_factory=dict)
    before: Callable[[Stage], None] = lambda _: None
    fault: str = ""
    together: int = 0
    runs: bool = True
    then: tuple[str, ...] = ()
    changes: dict[str, Callable[[Path], bool]] = field(default_factory=dict)
    only: str | None = None
    keeps_unchanged: bool = True


def _one(text: str, *images: str, **more: Any) -> Scenario:
    return Scenario({**{name: unique_png(name) for name in images}, "cat.prompt.txt": text}, **more)


def _after(before: Callable[[Stage], None], text: str, *then: str, **more: Any) -> Scenario:
    """Return a scenario with one state: a prompt, and what happened to it."""
    return _one(text, before=before, runs=False, then=then, **more)


# What happens before


def _again(stage: Stage) -> None:
    """Complete the prompt, then deliver the same file once more."""
    path = stage.folders.inbox / "cat.prompt.txt"
    content, status = path.read_bytes(), path.stat()
    stage.once()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _without_image_host(stage: Stage) -> None:
    stage.endpoint.serves_images = False
    stage.once()


def _retried(stage: Stage) -> None:
    _without_image_host(stage)
    stage.run("retry", "cat")
    stage.endpoint.serves_images = True


def _existing(stage: Stage) -> None:
    (stage.folders.outbox / "cat.png").write_bytes(b"mine")
    (stage.folders.archive / "cat.prompt.txt").write_bytes(b"old")


def _once_then_dog(stage: Stage) -> None:
    stage.once()
    stage.folders.prompt("dog", "[ok] a dog")


def _held(stage: Stage) -> None:
    stage.once()
    stage.run("hold", "a look at the bill")
    stage.folders.prompt("dog", "[ok] a dog")


def _held_while_awaited(stage: Stage) -> None:
    stage.kill_at("response")
    stage.run("hold", "a look at the bill")
    stage.folders.prompt("dog", "[ok] a dog")


def _released(stage: Stage) -> None:
    _held(stage)
    stage.run("release")


def _burst_released(stage: Stage) -> None:
    stage.once()
    stage.run("release")


def _accepted(stage: Stage) -> None:
    stage.once()
    _remove_ledger(stage.root)
    stage.run("release", "--accept-new-ledger")
    stage.folders.prompt("dog", "[ok] a dog")


# Damage, and ledgers of earlier formats: each returns whether there was what it changes


def _damage(pattern: str) -> Callable[[Path], bool]:
    def damage(root: Path) -> bool:
        paths = sorted(root.glob(pattern))
        for path in paths:
            path.write_bytes(path.read_bytes()[:20])
        return bool(paths)

    return damage


def _remove_record(root: Path) -> bool:
    paths = [path for path in root.glob("state/jobs/*") if any(root.glob(f"watched/inbox/.imagewatch/{path.name}/*"))]
    for path in paths:
        shutil.rmtree(path)
    return bool(paths)


def _remove_ledger(root: Path) -> bool:
    paths = list(root.glob("state/ledger.sqlite3*"))
    for path in paths:
        path.unlink()
    return bool(paths)


def _damage_ledger(root: Path) -> bool:
    _ledger(root, "PRAGMA wal_checkpoint")  # all of it is in one file then
    with (root / "state" / "ledger.sqlite3").open("r+b") as file:
        file.write(b"\xff" * 8192)
    return True


def _ledger(root: Path, *statements: str) -> bool:
    with closing(sqlite3.connect(root / "state" / "ledger.sqlite3")) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return True


def _newer(root: Path) -> bool:
    return _ledger(root, "PRAGMA user_version = 99")


def _format_2(root: Path) -> bool:
    """Make the ledger one of format 2: the outcome "made", and no rows of requests without a result."""
    replaced = "replace(replace(sql, '''sent'', ', ''), '''completed''', '''made''')"
    return _ledger(
        root,
        "DELETE FROM attempts WHERE outcome = 'sent'",
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_schema SET sql = {replaced} WHERE name = 'attempts'",
        "PRAGMA writable_schema = RESET",
        "UPDATE attempts SET outcome = 'made' WHERE outcome = 'completed'",
        "PRAGMA user_version = 2",
    )


def _format_1(root: Path) -> bool:
    """Make the ledger one of format 1: as format 2, with fewer columns."""
    later = ("asked_provider", "price_kind", "transaction_id", "new_credit_balance", "owner", "placed_mtime_ns")
    indexes = [f"DROP INDEX attempts_by_{name}" for name in ("price", "balance")]
    columns = [f"ALTER TABLE attempts DROP COLUMN {name}" for name in later]
    return _format_2(root) and _ledger(root, *indexes, *columns, "PRAGMA user_version = 1")


def _drop_newer(root: Path) -> bool:
    """Put a newer prompt of the same name into the inbox while the job is to go back there."""
    is_to_go_back = any(root.glob("state/jobs/*/answer.1")) and any(root.glob("watched/inbox/.imagewatch/*/*.txt"))
    if is_to_go_back:
        (root / "watched" / "inbox" / "cat.prompt.txt").write_text("[ok] a dog")
    return is_to_go_back


DAMAGE = {
    "claim.json is damaged": _damage("state/jobs/*/claim.json"),
    "sent.1 is damaged": _damage("state/jobs/*/sent.1"),
    "answer.1 is damaged": _damage("state/jobs/*/answer.1"),
    "decision.json is damaged": _damage("state/jobs/*/decision.json"),
    "the job record was removed": _remove_record,
    "the ledger was removed": _remove_ledger,
    "the ledger is damaged": _damage_ledger,
    "the ledger is of a newer version": _newer,
}
FORMATS = {"the ledger has format 1": _format_1, "the ledger has format 2": _format_2}
SOME = (
    r"create .*claim\.json|rename .*cat\.prompt|replace .*(sent\.1|answer\.1|decision)|ledger|response|"
    r"create .*receipt|unlink .*claim\.json"
)
ODD = os.fsdecode(b"caf\xe9")
TWO = {"cat.prompt.txt": "[ok] a cat", "dog.prompt.txt": "[400] a dog"}
REFUSED = {"cat.prompt.txt": "[402] a cat", "dog.prompt.txt": "[402] a dog"}
THREE = {f"{name}.prompt.txt": f"[ok] a {name}" for name in ("cat", "dog", "fox")}
PARALLEL = {"limits__concurrency": "2"}
BURST = {"limits__burst": "2"}

SCENARIOS = {
    "one image": _one("[ok] a cat"),
    "an edit with two images": _one("[ok] a cat", "cat.png", "cat.1.png"),
    "two images": _one("+++\nn = 2\n+++\n[ok] a cat"),
    "images by URL": _one("[url] a cat"),
    "refused": _one("[400] a cat"),
    "not valid": _one("+++\ncolour = 1\n+++\n[ok] a cat", "cat.png"),
    "too few credits, two requests in flight": Scenario(REFUSED, PARALLEL, together=2),
    "too few credits, remembered": Scenario(REFUSED, before=Stage.once, runs=False, then=("release",)),
    "busy, then completed": _one("[429 ok] a cat"),
    "busy for too long": _one("[429] a cat", settings={"retry__attempts": "2"}),
    "not admitted, then completed": _one("[503 ok] a cat"),
    "the response is lost": _one("[drop] a cat", "cat.png"),
    "the response is cut short": _one("+++\nn = 2\n+++\n[short] a cat"),
    "charged, unreadable": _one("[html] a cat"),
    "broken while sending": _one("[ok] a cat", "cat.png", fault="broken"),
    "a newer prompt has the name": _one(
        "[ok] a cat",
        fault="broken",
        changes={"": _drop_newer},
        only="ledger|rename|sync .*answer",
        keeps_unchanged=False,
    ),
    "nothing of the response had come, second start": _one(
        "[ok] a cat", before=lambda stage: stage.kill_at("response")
    ),
    "half of the response had come, second start": _one(
        "+++\nn = 2\n+++\n[ok] a cat", before=lambda stage: stage.kill_at("rest of the response", 2)
    ),
    "redelivered": _one("[ok] a cat", before=_again),
    "names that are not UTF-8": Scenario(
        {f"{ODD}/b/{ODD}.png": unique_png("odd"), f"{ODD}/b/{ODD}.prompt.txt": "[ok] a cat"}
    ),
    "all names exist": _one("[ok] a cat", before=_existing),
    "originals are not kept": _one("[ok] a cat", "cat.png", settings={"folders__archive": "delete"}),
    "two requests in flight": Scenario(TWO, PARALLEL, together=2),
    "an unreadable response is read again": _one("[url] a cat", "cat.png", before=_retried),
    "still unreadable when read again": _one("[html] a cat", before=_retried),
    "unreadable, to be read again later": _after(_without_image_host, "[url] a cat", "retry", "cat"),
    "refused, to be sent again later": _after(Stage.once, "[400] a cat", "retry", "cat"),
    "unknown, to be paid again later": _after(Stage.once, "[drop] a cat", "retry", "--pay-again", "cat"),
    "held": _after(_held, "[ok] a cat", "release"),
    "held while a response was awaited": _after(_held_while_awaited, "[ok] a cat", "release"),
    "hold, then release": _one("[ok] a cat", before=_released, only=f".*control|{SOME}"),
    "too many at the same time": Scenario(THREE, BURST, before=Stage.once, runs=False, then=("release",)),
    "too many at the same time, released": Scenario(THREE, BURST, before=_burst_released, only=f".*control|{SOME}"),
    "the ledger was accepted": _after(_accepted, "[ok] a cat"),
    "damaged": _one("[ok] a cat", changes=DAMAGE, only=SOME, keeps_unchanged=False),
    "an earlier ledger": _one("[ok] a cat", before=_once_then_dog, changes=FORMATS, only=SOME, keeps_unchanged=False),
}
