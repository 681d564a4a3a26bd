"""A daemon with a user id of its own, what it keeps private, and folders that an attacker may write to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import subprocess
import tomllib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tomli_w
from support.daemon import KEY, Folders, LoggedDaemon, below, until
from support.endpoint import unique_png

from security.people import ATTACKER, DAEMON, HONEST, Interpreter, Person, seen, snapshot, walk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

CLAIMS = ".imagewatch"
_MOST_NAMES = 80
"""How many names the message of a failure shows."""
MARK = "only-the-daemon-may-read-this"
"""Is in every private file, that of the key aside."""
PRIVATE_IMAGE = unique_png("private").decode("latin-1") + MARK
"""A whole image, with a mark behind its end."""


class World(Folders):
    """The folders of a daemon of the user ``DAEMON``, seen by root.

    The attacker may write the inbox, and what ``open_to_all`` names beside it; nothing else. The folder ``home`` with a
    ``.profile`` and an image, the folder of the key and the state folder are private.

    Args:
        root: An empty folder that all users may enter.
        sandbox: The endpoint.
        interpreter: The Python of all users.
        open_to_all: Which of ``outbox``, ``errors`` and ``archive`` all users may write.
        key_folder: An empty folder for the key, if it is to be elsewhere.
        settings: More of the configuration, by section.
    """

    def __init__(
        self,
        root: Path,
        sandbox: Sandbox,
        interpreter: Interpreter,
        *,
        open_to_all: tuple[str, ...] = (),
        key_folder: Path | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(root, sandbox.base_url)
        self.sandbox = sandbox
        self.top = root
        self.home, self.key_folder = root / "home", key_folder or root / "credentials"
        self._interpreter = interpreter
        for folder in (self.home, self.key_folder, self.state):
            folder.mkdir(exist_ok=True)
            give(folder, 0o700)
        for folder in (self.inbox, self.outbox, self.errors, self.archive):
            give(folder, 0o2777 if folder.name in {"inbox", *open_to_all} else 0o2755)
        private = {
            self.key_folder / "letta_api_key": KEY,
            self.home / ".profile": f"# {MARK}\n",
            self.home / "cat.png": PRIVATE_IMAGE,
        }
        for path, text in private.items():
            path.write_bytes(text.encode("latin-1"))
            give(path, 0o600)
        self._configure(settings or {})
        self._before = {folder: snapshot(folder) for folder in (self.home, self.key_folder)}
        self.attacker = Person(interpreter, ATTACKER, str(self.inbox))
        self.honest = Person(interpreter, HONEST, str(self.inbox))
        self.daemons: list[LoggedDaemon] = []

    def _configure(self, settings: dict[str, dict[str, Any]]) -> None:
        fixed: dict[str, dict[str, Any]] = {
            "folders": {"root": str(self.root), "state": str(self.state)},
            "endpoint": {
                "base_url": self.sandbox.base_url,
                "api_key_file": str(self.key_folder / "letta_api_key"),
            },
            "inbox": {"settle_seconds": 0, "rescan_seconds": 0.3, "input_wait_seconds": 0},
            "limits": {"min_free_bytes": 1_000_000},
            "retry": {"initial_seconds": 0.01, "max_seconds": 0.02},
            "log": {"format": "json"},
        }
        merged = {name: {**fixed.get(name, {}), **settings.get(name, {})} for name in {**fixed, **settings}}
        self.configuration = self.top / "config.toml"
        self.configuration.write_text(tomli_w.dumps(merged))

    def leave(self) -> None:
        """End every process."""
        for daemon in self.daemons:
            daemon.kill()
        self.attacker.leave()
        self.honest.leave()

    # The daemon

    def start(self, *arguments: str, uid: int = DAEMON, running: bool = True, **more: Any) -> LoggedDaemon:
        """Start a daemon; wait until it runs."""
        command = ["-m", "imagewatch", *(arguments or ("run",)), "--config", str(self.configuration)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": "/", **more}
        process = self._interpreter.start(uid, command, {"HOME": str(self.home)}, **pipes)
        daemon = LoggedDaemon(SimpleNamespace(process=process))  # type: ignore[arg-type]  # it uses nothing else
        self.daemons.append(daemon)
        if running:
            until(lambda: process.poll() is not None or self._status_of(process.pid).get("state") == "running")
            assert process.poll() is None, daemon.log()
        return daemon

    def command(self, *arguments: str, uid: int = DAEMON, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of a user to its end."""
        command = ["-m", "imagewatch", *arguments, "--config", str(self.configuration)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": str(self.top), **more}
        with self._interpreter.start(uid, command, {"HOME": str(self.home), "COLUMNS": "200"}, **pipes) as one:
            out, err = one.communicate(timeout=40)
        return subprocess.CompletedProcess(command, one.returncode, out, err)

    def release(self) -> None:
        """Do what ``imagewatch release`` does: end every hold; what is wrong still begins another."""
        done = self.command("release")
        assert done.returncode == 0, done.stderr

    def log(self) -> str:
        """Return all that the daemons have logged."""
        return "\n".join(daemon.log() for daemon in self.daemons)

    # What is seen

    def status(self) -> dict[str, Any]:
        """Return the status of the daemon; empty before it wrote one."""
        try:
            return dict(json.loads((self.state / "status.json").read_bytes()))
        except (OSError, ValueError):
            return {}

    def _status_of(self, pid: int) -> dict[str, Any]:
        page = self.status()
        return page if page.get("pid") == pid else {}

    def holds(self) -> str:
        """Return why the queue is on hold, in words; nothing when it is not."""
        return "; ".join(hold["reason"] for hold in self.status().get("holds", []))

    def held_for(self, *words: str) -> None:
        """Wait until the queue is on hold for a reason that has all of these words in it."""
        self.wait(lambda: all(word in self.holds() for word in words), f"a hold with {words}")

    def wait(self, condition: Callable[[], object], what: str = "") -> None:
        """Wait for something; if it does not come, show the status and all names."""
        __tracebackhide__ = True

        def saw() -> str:
            return "\n".join((f"status: {self.status()}", *map(str, [*walk(self.top)][:_MOST_NAMES])))

        until(condition, saw=saw, what=what)

    def destination(self, source: str) -> str:
        """Return where the result file of a prompt is, or an empty string; links are not followed."""
        for destination in ("outbox", "errors"):
            for path in walk(self.root / destination):
                if path.name.endswith((".receipt.toml", ".error.toml")) and not path.is_symlink():
                    try:
                        if tomllib.loads(path.read_text()).get("source") == source:
                            return destination
                    except (OSError, ValueError):  # just renamed by its reader
                        continue
        return ""

    def end(self, source: str) -> str:
        """Wait until nothing more happens to a prompt automatically.

        Returns:
            ``outbox`` or ``errors``: its result file is there, and its job is finished or the queue held.
            ``held``, ``stuck`` or ``waiting``: as in the status.
            ``gone``: neither prompt nor job nor result file is left.
        """
        found: list[str] = []

        def over() -> bool:
            found[:] = [self._end(source)]
            return bool(found[0])

        self.wait(over, f"the end of {source}")
        return found[0]

    def _end(self, source: str) -> str:
        page, destination = self.status(), self.destination(source)
        if page.get("holds"):
            return destination or "held"
        if source in [job["source"] for job in page.get("stuck", [])]:
            return "stuck"
        here = any(path.name == os.path.basename(source) for path in walk(self.inbox))
        if self.open_jobs():
            return ""
        if destination:
            return destination
        folders = [source[:at] for at, letter in enumerate(source) if letter == "/"]
        named = {*page.get("waiting", {}).get("files", ()), *page.get("ignored", {}).get("files", ())}
        if named.intersection((source, *folders)):
            return "waiting"
        return "" if here else self.destination(source) or "gone"

    def requests(self, text: str | None = None) -> int:
        """Return how many requests came, in all or for one prompt."""
        return sum(text in {None, call["prompt"]} for call in self.sandbox.report()["calls"])

    def rows(self, source: str | None = None) -> list[sqlite3.Row]:
        """Return the rows of the ledger for a prompt, or for all."""
        return [row for row in self._ask("SELECT * FROM attempts") if source in {None, row["source"]}]

    def open_jobs(self) -> list[str]:
        """Return the jobs that are not over."""
        return [row["id"] for row in self._ask("SELECT id FROM jobs WHERE state NOT IN ('done', 'kept')")]

    def _ask(self, question: str) -> list[sqlite3.Row]:
        with contextlib.closing(sqlite3.connect(self.state / "ledger.sqlite3")) as database:
            database.row_factory = sqlite3.Row
            return database.execute(question).fetchall()

    def asked(self, count: int = 1) -> bool:
        """Wait until so many requests were sent, or the queue is held; return whether they were sent."""
        self.wait(lambda: self.requests() >= count or self.holds(), f"{count} requests, or a hold")
        return self.requests() >= count

    def is_idle(self) -> None:
        """Wait until no job is left, and no response of one that is over."""
        self.wait(lambda: not self.open_jobs() and not self._responses_of_done(), "the end of all jobs")

    def _responses_of_done(self) -> list[str]:
        """Return what the daemon is about to remove: a job is over before its responses are removed."""
        done = {row["id"] for row in self._ask("SELECT id FROM jobs WHERE state = 'done'")}
        return [path.name for path in (self.state / "answers").glob("*") if path.name.partition(".")[0] in done]

    # What must be true

    def nothing_leaked(self, *, places: tuple[Path, ...] = ()) -> None:
        """The key and what is private are where they were and nowhere else; nothing was put beside them."""
        for folder, before in self._before.items():
            assert snapshot(folder) == before, f"{folder} was changed"
        tops = (self.root, self.state, *places)
        holding = [path for top in tops for path in walk(top) if holds(path, (KEY, MARK))]
        assert holding == [], "what is private is where it does not belong"
        assert self.attacker.readable_with(str(self.top), [KEY, MARK]) == []
        self.nothing_private_was_sent()
        assert KEY not in self.log()
        assert MARK not in self.log()

    def nothing_private_was_sent(self) -> None:
        """The endpoint has received no private text and no private image."""
        hidden = hashlib.sha256(PRIVATE_IMAGE.encode("latin-1")).hexdigest()
        for call in self.sandbox.report()["calls"]:
            assert hidden not in call["inputs"], "a private image was sent"
            assert MARK not in str(call["prompt"]), "a private text was sent"

    def state_is_whole(self, *, jobs: bool = False) -> None:
        """The state folder holds what the daemon put there, and only that; it can be read by the daemon alone.

        Args:
            jobs: Whether jobs may be under way.
        """
        names = {path.name for path in self.state.iterdir()}
        assert {"ledger.sqlite3", "lock", "status.json", "answers", "control"} <= names, (
            f"missing in the state folder; there is {names}"
        )
        strange = [path for path in walk(self.state) if path.name.endswith((".prompt.txt", ".toml", ".answer.json"))]
        strange += [path for path in self.state.glob("*") if path.is_symlink() or path.suffix in {".png", ".jpg"}]
        assert strange == [], "files of a job are in the state folder"
        if not jobs:
            assert self.open_jobs() == []
            assert list((self.state / "answers").iterdir()) == []
        assert [path for path in below(self.state) if (now := seen(path)) and now.st_uid != DAEMON] == []

    def honest_prompt(self, name: str = "honest", text: str = "an honest prompt") -> str:
        """Drop a prompt into the folder of an honest user; return its path below the inbox."""
        folder = self.inbox / "theirs"
        if not folder.exists():
            folder.mkdir()
            give(folder, 0o2775, HONEST, DAEMON)
        self.honest.drop(folder / f"{name}.prompt.txt", text)
        return f"theirs/{name}.prompt.txt"

    def honest_prompt_is_completed(self, name: str = "honest") -> None:
        """Drop a prompt as an honest user, and wait until it was completed, once."""
        text = f"an honest prompt of {name}"
        source = self.honest_prompt(name, text)
        self.wait(lambda: self.destination(source), f"the honest prompt {name}")
        assert self.destination(source) == "outbox"
        assert self.requests(text) == 1
        jobs = {row["job"] for row in self.rows(source)}
        self.wait(lambda: not jobs.intersection(self.open_jobs()), f"the end of the job {name}")  # it is archived


def give(path: Path, mode: int, uid: int = DAEMON, gid: int | None = None) -> None:
    """Give a file or folder to a user, and to the group of the same number if no other is named."""
    os.chown(path, uid, uid if gid is None else gid)
    path.chmod(mode)


def holds(path: Path, secrets: tuple[str, ...]) -> bool:
    """Return whether a plain file has one of these texts in it."""
    if not path.is_file() or path.is_symlink():
        return False
    content = b""
    with contextlib.suppress(FileNotFoundError):  # a running daemon has just replaced or removed it
        content = path.read_bytes()
    return any(secret.encode() in content for secret in secrets)
