"""The power fails at every moment, and again during the start after it: nothing is paid twice or lost.

The real parts play each *scene* on a ``LosingDisk``. Before each change of the disk, at each moment of a request and
before each commit of the journal, the test notes every state that a power cut there could leave (``Losing``): of the
journal, what was synced, with any number of the commits after that. From each noted state the parts start again, as
after a restart, and the states that they could leave are noted, too: two cuts at any two moments, in any two ways. A
state includes what the API was paid.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sqlite3
import tomllib
from collections import deque
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
import structlog
from support.daemon import Folders
from support.endpoint import AT, Books, PaidEndpoint, Reply, served, unique_png
from support.losing import LONG_AGO_NS, Image, Losing, LosingDisk, PowerCut, SteppingDisk
from support.station import Distrustful

from imagewatch.endpoint import pictures
from imagewatch.endpoint.frames import Frames
from imagewatch.inbox.scan import InboxScan
from imagewatch.job import claims, record
from imagewatch.job.completion import Completion
from imagewatch.job.originals import Originals
from imagewatch.job.outcome import End
from imagewatch.job.record import Record
from imagewatch.job.sending import Sending
from imagewatch.job.spool import Spool
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.system.errors import SpoolError, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from imagewatch.inbox.candidate import Candidate

T = TypeVar("T")
_PROBING = ".iw-probe"
"""The tests with real cuts cover cuts while a start probes the folders, because no job takes part in that."""
CUT_OFF = Reply(end="cut off", paid=False)
BUSY = Reply(429, b'{"message": "slow down"}', (("retry-after", "0"),), paid=False)


@dataclass(frozen=True)
class Scene:
    """One case of prompts and what happens to them.

    Attributes:
        files: The dropped files, by path below the inbox.
        replies: The behavior of the API, by prompt.
        ends: How each prompt ends without a fault: by stem with its folder, the prompt's text, the destination and
            ``charged``.
        count: Images returned for a prompt.
        settings: Of the configuration.
        mounts: Folders below the root that are file systems of their own.
        there: Files that are already in the folders, by path.
        missing: Folders that the daemon has to make, by path.
        may_report: Whether an account-level refusal may be shown.
        withdrawn: Whether each request is forbidden after it is recorded and before its first byte is sent.
    """

    files: dict[str, str | bytes]
    replies: dict[str, list[Reply]]
    ends: dict[str, tuple[str, str, str]]
    count: int = 1
    settings: dict[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    there: dict[str, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    may_report: bool = True
    withdrawn: bool = False


def _one(reply: Reply | list[Reply], destination: str, charged: str, *, front: str = "", **more: Any) -> Scene:
    """Return a scene of one prompt, ``cat``, with the given images."""
    images = {name: unique_png(name) for name in more.pop("images", ())}
    text = f"+++\n{front}\n+++\na cat" if front else "a cat"
    replies = {"a cat": reply if isinstance(reply, list) else [reply]}
    return Scene({"cat.prompt.txt": text, **images}, replies, {"cat": ("a cat", destination, charged)}, **more)


TWO = ("cat.png", "cat.1.png")
PLACES = ("watched/inbox", "watched/outbox", "watched/errors", "watched/archive", "state")
SKIP = {"inbox__redelivery": "skip"}
REFUSED = Reply(400, b'{"message": "no cats"}', paid=False)

SCENES = {
    "text only": _one(Reply(), "outbox", "yes"),
    "the daemon makes the outbox": _one(Reply(), "outbox", "yes", missing=("watched/outbox",)),
    "an edit with two images": _one(Reply(), "outbox", "yes", images=TWO),
    "three images": _one(Reply(), "outbox", "yes", front="n = 3", count=3),
    "images by url": _one(Reply(by_url=True), "outbox", "yes", front="n = 2", count=2),
    "busy, then completed": _one([BUSY, Reply()], "outbox", "yes"),
    "busy for too long": _one(BUSY, "errors", "no", settings={"retry__attempts": "2"}),
    "refused": _one(REFUSED, "errors", "no"),
    "refused with images": _one(REFUSED, "errors", "no", images=TWO),
    "no credits": _one(Reply(402, b'{"message": "pay"}', paid=False), "errors", "no"),
    "no credits, as another has shown": _one(
        Reply(402, b'{"message": "pay"}', paid=False), "inbox", "no", images=TWO, may_report=False
    ),
    "invalid": _one(Reply(), "errors", "no", front="colour = 1", images=("cat.png",)),
    "not JSON": _one(Reply(body=b"<html>thank you"), "errors", "yes"),
    "wrapped base64": _one(Reply(wrapped=True), "outbox", "yes"),
    "cut short": _one(Reply(end="short"), "outbox", "yes", front="n = 3", count=3),
    "dropped": _one(Reply(end="dropped"), "errors", "unknown", images=("cat.png",)),
    "unreachable": _one(Reply(end="unreachable", paid=False), "inbox", "no", images=TWO),
    "broken while sending": _one(Reply(end="broken", paid=False), "inbox", "no", images=TWO),
    "cut off, then completed": _one([CUT_OFF, Reply()], "outbox", "yes", images=TWO),
    "cut off each time": _one(CUT_OFF, "errors", "no", images=TWO, settings={"retry__attempts": "2"}),
    "withdrawn": _one(Reply(), "inbox", "no", images=TWO, withdrawn=True),
    "in a sub-folder": Scene(
        {"a/b/cat.prompt.txt": "a cat", "a/b/cat.png": unique_png("in")},
        {"a cat": [Reply()]},
        {"a/b/cat": ("a cat", "outbox", "yes")},
    ),
    "every folder a mount, completed": _one(Reply(), "outbox", "yes", images=("cat.png",), mounts=PLACES),
    "every folder a mount, refused": _one(REFUSED, "errors", "no", images=("cat.png",), mounts=PLACES),
    "every folder a mount, not JSON": _one(
        Reply(body=b"<html>thank you"), "errors", "yes", images=("cat.png",), mounts=PLACES
    ),
    "originals are not kept": _one(
        Reply(), "outbox", "yes", images=("cat.png",), settings={"folders__archive": "delete"}
    ),
    "all names exist": _one(
        Reply(),
        "outbox",
        "yes",
        images=("cat.png",),
        there={"outbox/cat.png": b"mine", "archive/cat.prompt.txt": b"old"},
    ),
    "redeliveries are recognized, completed": _one(Reply(), "outbox", "yes", images=("cat.png",), settings=SKIP),
    "redeliveries are recognized, invalid": _one(Reply(), "errors", "no", front="colour = 1", settings=SKIP),
    "two prompts": Scene(
        {"cat.prompt.txt": "a cat", "dog.prompt.txt": "a dog"},
        {"a cat": [Reply()], "a dog": [REFUSED]},
        {"cat": ("a cat", "outbox", "yes"), "dog": ("a dog", "errors", "no")},
    ),
}

CUT_TWICE = {"text only", "an edit with two images", "busy, then completed", "refused"}
"""Scenes in which each pair of cuts is tried; in the others too with ``IMAGEWATCH_ALL_CUTS=1`` (some minutes)."""
FAIL_TOO = {
    "images by url",
    "not JSON",
    "broken while sending",
    "cut off each time",
    "withdrawn",
    "every folder a mount, completed",
}
"""More scenes in which a step fails; the others too with ``IMAGEWATCH_ALL_CUTS=1``."""
ALL_CUTS = os.environ.get("IMAGEWATCH_ALL_CUTS") == "1"


TABLES = ("meta", "jobs", "attempts", "redeliveries", "holds", "requests", "events", "announced", "sums", "prices")
Content = tuple[tuple[tuple[object, ...], ...], ...]
"""The rows of each table of the journal."""


@dataclass(frozen=True)
class State:
    """Everything that survives the end of the process.

    Attributes:
        disk: The folders.
        books: What the endpoint knows.
        journal: The journal when it was last synced, then after each commit since; the last one is what is read.
    """

    disk: Image
    books: tuple[tuple[tuple[str, int], ...], ...]
    journal: tuple[Content, ...]

    def visible(self) -> State:
        """Return the same as if all of it were durable."""
        return replace(self, disk=self.disk.visible(), journal=self.journal[-1:])


class NotingJournal(Journal):
    """A journal that reports each commit before it is made, and what it is after it."""

    def __init__(self, path: str, stage: Stage) -> None:
        file = SqliteDatabase(path, synchronous="OFF")
        super().__init__(file, stage.config.limits, lambda: AT)
        commit = file._commit

        def noted(connection: Any, changes: Any) -> None:
            stage.disk.tick("journal")
            commit(connection, changes)
            stage.committed(synced=any(change.synced for change in changes))

        file._commit = noted  # type: ignore[method-assign]


class Stage:
    """The real parts, on a disk that loses power, with an API that counts."""

    def __init__(self, root: Path, scene: Scene, disk: type[LosingDisk] = LosingDisk) -> None:
        self.scene = scene
        self._disk_type = disk
        self.root = root / "disk"
        # Without recognition of redeliveries, which would hide a prompt that returns because of a bug.
        self.folders = Folders(self.root, "https://endpoint.test", **{"inbox__redelivery": "run", **scene.settings})
        self.config = self.folders.config()
        for name, content in scene.files.items():
            self.folders.drop(name, content)
        for name, there in scene.there.items():
            (self.folders.root / name).write_bytes(there)
        for name in scene.missing:
            (self.root / name).rmdir()
        self.books = Books()
        self.disk = self.new_disk()
        self.journal = NotingJournal(str(root / "ledger.sqlite3"), self)
        self.ledger, self.folders.ledger_path = self.journal.ledger, root / "ledger.sqlite3"
        self.journal.require()
        self._beside = sqlite3.connect(root / "ledger.sqlite3", isolation_level=None)
        self._beside.execute("PRAGMA synchronous = OFF")
        self._journals = [self._content()]
        self.runs = self.moments = 0
        self.begin = self.state(Losing.KILLED)

    def close(self) -> None:
        self.journal.close()
        self._beside.close()

    def new_disk(self, **cut: Any) -> LosingDisk:
        mounts = tuple(str(self.root / name) for name in self.scene.mounts)
        return self._disk_type(str(self.root), mounts=mounts, **cut)

    def committed(self, *, synced: bool) -> None:
        """Note that the journal was changed."""
        if synced:
            self._journals.clear()
            self.books.settled.update(dict.fromkeys(self.books.arrived, True))
        self._journals.append(self._content())

    def _content(self) -> Content:
        return tuple(tuple(self._beside.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall()) for name in TABLES)

    def state(self, losing: Losing) -> State:
        """Return the state that would remain after a cut now; of the journal only what is durable."""
        return self.states((losing,))[0][1]

    def states(self, losings: Iterable[Losing] = Losing) -> list[tuple[Losing, State]]:
        """Return the states that would remain after a cut now, for each of some kinds of loss."""
        books, found = self.books.freeze(), []
        for losing, image in zip(losings, self.disk.images(losings), strict=True):
            if losing is Losing.KILLED:
                found.append((losing, State(image, books, tuple(self._journals))))
            else:
                found += [(losing, State(image, books, (content,))) for content in self._journals]
        return found

    def restore(self, state: State) -> None:
        self.disk.restore(state.disk)
        self.books.thaw(state.books)
        self._use(state.journal)

    def lose_unsynced(self) -> None:
        """Let the journal lose what is not durable."""
        self.books.arrived.clear()
        self._use(self._journals[:1])

    def _use(self, journals: Iterable[Content]) -> None:
        self._journals = list(journals)
        self._beside.execute("BEGIN")
        for name, rows in zip(TABLES, self._journals[-1], strict=True):  # sums after attempts, whose trigger fills them
            self._beside.execute(f"DELETE FROM {name}")
            for row in rows:
                self._beside.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)
        self._beside.execute("COMMIT")

    def play(self) -> None:
        """Start, then process until nothing more can be done."""
        self.runs += 1
        spool = Spool(self.config, self.disk, self.journal)
        spool.new_job = self._new_job  # type: ignore[method-assign]
        _again(spool.prepare)
        unfinished = _again(spool.take_over)
        endpoint = PaidEndpoint(self.scene.replies, self.books, self.disk.tick)
        worker = Distrustful(
            spool,
            endpoint,  # type: ignore[arg-type]
            self.journal,
            self.config,
            may_report=lambda _: self.scene.may_report,
            clock=lambda: AT,
            wait=lambda _: None,
            leaving=self._leaving if self.scene.withdrawn else contextlib.nullcontext,
        )
        for job in unfinished:
            self._carry(worker, job)
        scan = InboxScan(spool.inbox, self.config.inbox)
        while ready := scan.scan_all(AT, AT).ready:
            if {self._start(worker, spool.new_job(), candidate) for candidate in ready} == {End.RETURNED}:
                break

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        if self._beside.execute("SELECT 1 FROM attempts WHERE outcome = 'sent'").fetchone():
            raise Withdrawn("held")
        yield

    def _start(self, worker: Distrustful, job: str, candidate: Candidate) -> End:
        try:
            claim = candidate.claim(job, AT)
            outcome = worker.start(msgspec.structs.replace(claim, files={}, folder_inode=0))  # the model has no inodes
        except SpoolError:
            return self._carry(worker, job)
        return self._carry(worker, job) if outcome.end is End.DEFERRED else outcome.end

    def _carry(self, worker: Distrustful, job: str) -> End:
        while (outcome := _again(lambda: worker.process(job, is_resumed=True))).end is End.DEFERRED:
            pass
        return outcome.end

    def _new_job(self) -> str:
        """Return the next unused id: the same each time this state is played."""
        known = {row[0] for row in self._beside.execute("SELECT job FROM attempts UNION SELECT id FROM jobs")}
        known |= {path.name for path in (self.folders.inbox / ".imagewatch").iterdir()}
        ids = (hashlib.sha256(str(number).encode()).hexdigest()[:16] for number in range(1000))
        return next(job for job in ids if job not in known)


def _again(work: Callable[[], T]) -> T:
    """Do something, and repeat it once if the disk fails, as the daemon does."""
    try:
        return work()
    except SpoolError:
        return work()


class Audit:
    """Checks the folders from outside, after all jobs are finished."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._scene, self._folders = stage, stage.scene, stage.folders
        self._files = {
            path.relative_to(self._folders.root).as_posix(): path.read_bytes()
            for path in self._folders.root.rglob("*")
            if path.is_file() and path.name != ".imagewatch-claims"
        }
        self._result_files = {
            name: tomllib.loads(content.decode())
            for name, content in self._files.items()
            if name.endswith((".receipt.toml", ".error.toml"))
        }

    def check(self) -> None:
        for prompt, times in self._stage.books.paid.items():
            assert times <= 1, f"{prompt} was paid twice"
        assert self._folders.leftovers() == []
        for name, content in self._scene.there.items():
            assert self._files.pop(name) == content, f"{name} belongs to another prompt"
        self._check_originals()
        for stem, (prompt, destination, charged) in self._scene.ends.items():
            self._check_prompt(stem, prompt, destination, charged)
        self._check_ledger()
        unexpected = set(self._files) - set(self._result_files) - self._accounted
        assert not unexpected, f"unexpected files: {unexpected}"

    def result_files_of(self, stem: str) -> dict[str, dict[str, Any]]:
        """Return the receipts and error files of a prompt."""
        return {name: d for name, d in self._result_files.items() if d["source"] == f"{stem}.prompt.txt"}

    def _check_originals(self) -> None:
        """Each dropped file is in exactly one place."""
        self._accounted = set()
        for name, content in self._scene.files.items():
            raw = content.encode() if isinstance(content, str) else content
            places = [place for place, found in self._files.items() if found == raw]
            kept = self._stage.config.folders.archive != "delete"
            assert len(places) == 1 or (not kept and not places), f"{name} is in {places}"
            self._accounted |= set(places)

    def _check_prompt(self, stem: str, prompt: str, destination: str, charged: str) -> None:
        books = self._stage.books
        paid = books.paid.get(prompt, 0)
        mine = self.result_files_of(stem)
        assert len(mine) <= 1, f"over more than once: {list(mine)}"
        if not mine:
            dropped = [n for n in self._scene.files if n.startswith((f"{stem}.", f"{stem}/"))]
            assert {f"inbox/{n}" for n in dropped} <= set(self._files), "it is nowhere"
            assert not paid
            assert destination == "inbox"
            return
        ((name, result_file),) = mine.items()
        assert f"inbox/{stem}.prompt.txt" not in self._files
        found = (name.partition("/")[0], result_file["charged"])
        if books.settled.get(prompt, True):
            assert found == (destination, charged), "its response was saved"
        elif paid:
            assert found in {(destination, charged), ("outbox", "yes"), ("errors", "yes"), ("errors", "unknown")}
        else:
            assert found in {(destination, charged), ("errors", "unknown")}
        if found[0] == "outbox":
            self._check_images(name, result_file, prompt)
        else:
            self._check_refused(stem, name, result_file)

    def _check_images(self, name: str, result_file: dict[str, Any], prompt: str) -> None:
        """A receipt names existing images with their hashes, and they are the served ones."""
        folder = name.rpartition("/")[0]
        images = served(prompt, self._scene.count)
        whole = self._stage.books.settled[prompt] and not any(r.end == "short" for r in self._scene.replies[prompt])
        found = []
        for image in result_file["images"]:
            assert f"{folder}/{image['file']}" in self._files, "an image is missing"
            content = self._files[f"{folder}/{image['file']}"]
            assert hashlib.sha256(content).hexdigest() == image["sha256"], "it is not what its receipt says"
            self._accounted.add(f"{folder}/{image['file']}")
            found.append(content)
        if whole:
            assert found == images
            assert "problems" not in result_file
        else:
            assert found
            # What was arriving when the process died, and was not durable when the power went, may be damaged.
            is_reported = not self._stage.books.settled[prompt] and "ended while the response arrived" in str(
                result_file
            )
            assert found[0] == images[0] or is_reported

    def _check_refused(self, stem: str, name: str, result_file: dict[str, Any]) -> None:
        """The originals are beside the error file, and so is a charged response."""
        folder = name.rpartition("/")[0]
        for dropped, content in self._scene.files.items():
            if dropped.startswith((f"{stem}.", f"{stem}/")):
                raw = content.encode() if isinstance(content, str) else content
                assert raw in [there for place, there in self._files.items() if place.startswith(folder)]
        if result_file["charged"] == "yes":
            raws = [n for n in self._files if n.startswith(name.removesuffix("error.toml") + "answer.")]
            assert len(raws) == 1
            self._accounted |= set(raws)

    def _check_ledger(self) -> None:
        books, rows = self._stage.books, self._stage.ledger.rows()
        calls = [row for row in rows if row["attempt"]]
        assert len(calls) >= sum(books.begun.values()), "an attempt has no row"
        charged = [row for row in calls if row["charged"] != "no"]
        assert len(charged) >= sum(books.paid.values()), "a payment has no row"
        for result_file in self._result_files.values():
            attempts = [row["attempt"] for row in rows if row["job"] == result_file["job"]]
            assert len(attempts) == (result_file["attempts"] or 1)  # one that was not sent has a number, too
            row = next(row for row in rows if (row["job"], row["attempt"]) == (result_file["job"], attempts[-1]))
            assert row["charged"] == result_file["charged"]


@pytest.fixture(autouse=True)
def _same_nonces(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is random is as it was when the scene was played before, so that states can be compared."""
    for module in (record, claims):
        monkeypatch.setattr(module, "token_hex", lambda _: "0" * 16)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path, SCENES[request.param])) as made:
        yield made


def explore(stage: Stage, cuts: int) -> dict[State, tuple[str, ...]]:
    """Play from every state that up to this number of cuts can produce, and check the results.

    Returns:
        The states, and how each was reached.
    """
    paths: dict[State, tuple[str, ...]] = {stage.begin: ()}
    waiting = deque([stage.begin])
    while waiting:
        state = waiting.popleft()
        path = paths[state]

        def note(what: str, path: tuple[str, ...] = path) -> None:
            if len(path) == cuts or _PROBING in what:
                return
            stage.moments += 1
            for losing, state_left in stage.states():
                if len(path) + 1 == cuts:
                    # No change can be undone any more: only visible content matters.
                    state_left = state_left.visible()  # noqa: PLW2901
                if state_left not in paths:
                    paths[state_left] = (*path, f"{losing.name} before {what}")
                    waiting.append(state_left)

        stage.restore(state)
        stage.disk.watch = note
        try:
            stage.play()
            note("the end")
            Audit(stage).check()
        except Exception as error:
            error.add_note("the power went: " + ("; then: ".join(path) or "never"))
            error.add_note("there is: " + ", ".join(stage.folders.names(".")))
            raise
    return paths


@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_without_faults_each_scene_ends_as_it_describes(stage: Stage) -> None:
    stage.play()
    audit = Audit(stage)
    audit.check()
    for stem, (_, destination, charged) in stage.scene.ends.items():
        ends = [(n.partition("/")[0], d["charged"]) for n, d in audit.result_files_of(stem).items()]
        assert ends == ([] if destination == "inbox" else [(destination, charged)])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", SCENES, indirect=True)
def test_a_power_cut_at_any_step_pays_nothing_twice_and_loses_nothing(
    stage: Stage, request: pytest.FixtureRequest
) -> None:
    twice = ALL_CUTS or request.node.callspec.params["stage"] in CUT_TWICE
    explore(stage, cuts=2 if twice else 1)


def test_after_a_cut_the_noted_steps_are_known(tmp_path: Path) -> None:
    """Noting continues where a real cut ends everything with exceptions and their consequences."""
    scene = SCENES["an edit with two images"]
    with contextlib.closing(Stage(tmp_path, scene)) as stage:
        noted: list[list[tuple[Losing, State]]] = []
        stage.restore(stage.begin)
        stage.disk.watch = lambda _: noted.append(stage.states())
        stage.play()
        for number, states in enumerate(noted, 1):
            losing = list(Losing)[number % len(Losing)]
            expected = next(state for lost, state in states if lost is losing)
            stage.disk = stage.new_disk(cut=number, losing=losing)
            stage.restore(stage.begin)
            with pytest.raises(PowerCut):
                stage.play()
            stage.disk.come_back()
            if losing is not Losing.KILLED:
                stage.lose_unsynced()
            assert stage.state(Losing.KILLED) == expected
            stage.play()
            Audit(stage).check()


@pytest.mark.parametrize("losing", Losing)
def test_a_power_cut_right_after_a_step_pays_nothing_twice_and_loses_nothing(tmp_path: Path, losing: Losing) -> None:
    with contextlib.closing(Stage(tmp_path, SCENES["text only"])) as stage:
        stage.play()
        for number in range(1, len(stage.disk.steps) + 1):
            stage.disk = stage.new_disk(cut=number, after=True, losing=losing)
            stage.restore(stage.begin)
            with pytest.raises(PowerCut):
                stage.play()
            stage.disk.come_back()
            if losing is not Losing.KILLED:
                stage.lose_unsynced()
            stage.play()
            Audit(stage).check()


@pytest.mark.parametrize(
    "name", ["redeliveries are recognized, completed", "redeliveries are recognized, invalid", "cut short", "dropped"]
)
def test_a_power_cut_after_a_redelivery_pays_nothing_twice_and_loses_nothing(tmp_path: Path, name: str) -> None:
    scene = replace(SCENES[name], settings=SKIP)
    with contextlib.closing(Stage(tmp_path, scene)) as stage:
        stage.restore(stage.begin)  # sets the old times of all files
        stage.play()
        for file, content in scene.files.items():
            os.utime(stage.folders.drop(file, content), ns=(LONG_AGO_NS, LONG_AGO_NS))
        begin_again(stage)
        explore(stage, cuts=1)
        assert stage.ledger.redelivered()


@pytest.mark.parametrize("name", ["not JSON", "every folder a mount, not JSON"])
def test_a_power_cut_while_a_charged_response_is_read_again_pays_nothing_twice_and_loses_nothing(
    tmp_path: Path, name: str
) -> None:
    scene = SCENES[name]
    with contextlib.closing(Stage(tmp_path, scene)) as stage:
        stage.play()
        (job,) = {row["job"] for row in stage.ledger.rows()}
        begin_again(stage)
        assert stage.journal.reopen(job)
        begin_again(stage)
        explore(stage, cuts=1)


def begin_again(stage: Stage) -> None:
    """Use the present state of the disk, made durable, as the beginning."""
    stage.disk = stage.new_disk()
    stage.committed(synced=True)
    stage.begin = stage.state(Losing.KILLED)


class FailingDisk(LosingDisk):
    """A disk on which one step fails, as on a full disk, and later steps work.

    Attributes:
        failing: Number of the step, from 1.
    """

    failing = 0

    def step(self, what: str, path: str) -> None:
        super().step(what, path)
        if len(self.steps) == self.failing and what in DISK_STEPS:
            raise SpoolError(f"{what} {path}: full", path=path, code=errno.ENOSPC)


DISK_STEPS = {name for name in vars(SteppingDisk) if not name.startswith("_") and name != "step"}


@pytest.mark.parametrize("name", sorted(SCENES if ALL_CUTS else CUT_TWICE | FAIL_TOO))
def test_a_disk_that_fails_once_at_any_step_pays_nothing_twice_and_loses_nothing(tmp_path: Path, name: str) -> None:
    """The same process tries again, as the daemon does when there is space. Nothing was undone, and nothing is new."""
    with contextlib.closing(Stage(tmp_path, SCENES[name], FailingDisk)) as stage:
        stage.restore(stage.begin)
        stage.play()
        for number in range(1, len(stage.disk.steps) + 1):
            stage.disk = stage.new_disk()
            stage.disk.failing = number  # type: ignore[attr-defined]
            stage.restore(stage.begin)
            stage.play()
            stage.play()  # prompts that went back to the inbox because nothing could be written are claimed again
            Audit(stage).check()


# The audit can fail: each of these removes one precaution.


class WithoutFileSync(LosingDisk):
    def sync(self, file: IO[bytes], path: str) -> None:
        file.flush()
        self.tick(f"no sync {path}")


class WithoutFolderSync(LosingDisk):
    def sync_folder(self, path: str) -> None:
        self.tick(f"no sync_folder {path}")


def _without(where: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(where, name, lambda *_: None)


def _unsynced(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Let what a method of the journal writes be not synced."""
    change = SqliteDatabase.change

    def careless(self: SqliteDatabase, act: Any, *, synced: bool = True, locked: bool = False) -> Any:
        return change(self, act, synced=synced and f".{name}." not in act.__qualname__)

    return lambda patch: patch.setattr(SqliteDatabase, "change", careless)


def _spent_after_the_first_byte(patch: pytest.MonkeyPatch) -> None:
    begin = Sending._begin

    @contextlib.contextmanager
    def late(*values: Any) -> Iterator[None]:
        yield
        with begin(*values):
            pass

    patch.setattr(Sending, "_begin", late)


def _images_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pictures._Ours, "close", lambda self: self._file.close())


PRECAUTIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], int, str]] = {
    "the attempt is synced before the first byte": ("text only", _unsynced("spend"), 1, "paid twice|has no row"),
    "the attempt is recorded before the first byte": (
        "text only",
        _spent_after_the_first_byte,
        1,
        "paid twice|has no row",
    ),
    "a claim with images is synced before the rename": (
        "an edit with two images",
        _unsynced("claim"),
        1,
        "the ledger does not know this job",
    ),
    "the decision is synced": ("text only", _unsynced("decide"), 1, "its response was saved|unexpected files"),
    "originals are not in the inbox any more before they are archived": (
        "text only",
        _without(Originals, "leave"),
        1,
        "paid twice",
    ),
    "originals that came back into the inbox are taken again": (
        "text only",
        _without(Originals, "take_again"),
        1,
        "paid twice|over more than once",
    ),
    "old names of claimed files are removed": (
        "text only",
        _without(Originals, "drop_twins"),
        2,
        r"paid twice|is in \[",
    ),
    "what was killed is settled": ("text only", _without(Spool, "make_durable"), 2, "paid twice|is nowhere"),
    "images are synced before the decision": (
        "text only",
        _without(Frames, "sync"),
        1,
        "its receipt says|an image is missing",
    ),
    "images that are decoded afterwards are synced before the decision": (
        "wrapped base64",
        _images_are_not_synced,
        1,
        "its receipt says|an image is missing",
    ),
    "their names are synced before the decision": (
        "wrapped base64",
        _without(Record, "sync_names"),
        1,
        "an image is missing",
    ),
    "what a request cost nothing is known by is kept until that is durable": (
        "no credits, as another has shown",
        _unsynced("finish"),
        1,
        "its response was saved",
    ),
    "our own folders are synced": (
        "the daemon makes the outbox",
        _without(Spool, "_sync_above"),
        1,
        "is nowhere|an image is missing",
    ),
    "attempts have results before the next": ("busy, then completed", _without(Completion, "busy"), 1, "must not be"),
}


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_the_audit_finds_each_missing_precaution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precaution: str
) -> None:
    scene, careless, cuts, text = PRECAUTIONS[precaution]
    careless(monkeypatch)
    with (
        contextlib.closing(Stage(tmp_path, SCENES[scene])) as stage,
        pytest.raises((AssertionError, SpoolError), match=text),
    ):
        explore(stage, cuts)


@pytest.mark.parametrize("disk", [WithoutFileSync, WithoutFolderSync])
def test_the_audit_fails_if_nothing_is_synced(tmp_path: Path, disk: type[LosingDisk]) -> None:
    with (
        contextlib.closing(Stage(tmp_path, SCENES["text only"], disk)) as stage,
        pytest.raises((AssertionError, SpoolError)),
    ):
        explore(stage, 1)
