"""Real daemons and commands in processes of their own, the folders they watch, and waiting for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewatch.config.load import load
from imagewatch.system.text import printable
from support import explaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.config.schema import Config

TESTS = Path(__file__).parents[1]
KEY = "sk-let-test-0123456789"
PATIENCE = 60.0
"""Seconds after which a test gives up waiting; nothing is measured by it, however busy the machine is."""
REMOTE_NAME = "imagewatch-test.invalid"
"""A name that no resolver knows: to find it takes a proxy."""
STARTED: dict[str, Callable[[], str]] = {}
"""What the processes that the current test has started have written: if it fails, that is in the report."""


def below(top: Path) -> list[Path]:
    """Everything below a folder from which a running daemon may remove folders meanwhile; pathlib fails there."""
    return [Path(folder, name) for folder, folders, files in os.walk(top) for name in (*folders, *files)]


class Folders:
    """The folders of one daemon, seen from outside."""

    ledger_path: Path | None = None
    """Where the journal is, if it is not in the state folder."""

    def __init__(self, root: Path, base_url: str, **settings: str) -> None:
        self.root = root / "watched"
        self.environ = {
            "LETTA_BASE_URL": base_url,
            "LETTA_API_KEY": KEY,
            "IMAGEWATCH_FOLDERS__ROOT": str(self.root),
            "IMAGEWATCH_FOLDERS__STATE": str(root / "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0",
            "IMAGEWATCH_INBOX__RESCAN_SECONDS": "3600",  # longer than any wait: else it hides that an event was lost
            "IMAGEWATCH_RETRY__INITIAL_SECONDS": "0.01",
            "IMAGEWATCH_RETRY__MAX_SECONDS": "0.02",
            "IMAGEWATCH_LIMITS__MIN_FREE_BYTES": "1000000",
            **{f"IMAGEWATCH_{name.upper()}": value for name, value in settings.items()},
        }
        self.state = root / "state"
        for name in ("inbox", "outbox", "errors", "archive"):
            (self.root / name).mkdir(parents=True)

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def outbox(self) -> Path:
        return self.root / "outbox"

    @property
    def errors(self) -> Path:
        return self.root / "errors"

    @property
    def archive(self) -> Path:
        return self.root / "archive"

    def config(self) -> Config:
        return load(None, self.environ)

    def drop(self, name: str, content: str | bytes, mode: int | None = None) -> Path:
        """Drop a file as a careful sender does: under another name, then renamed; it has its mode before it comes."""
        path = self.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        if mode is not None:
            temporary.chmod(mode)
        temporary.rename(path)
        return path

    def prompt(self, stem: str, text: str | bytes, mode: int | None = None) -> Path:
        return self.drop(f"{stem}.prompt.txt", text, mode)

    def receipt(self, stem: str) -> dict[str, Any]:
        return tomllib.loads((self.outbox / f"{stem}.receipt.toml").read_text())

    def error(self, stem: str) -> dict[str, Any]:
        return tomllib.loads((self.errors / f"{stem}.error.toml").read_text())

    def names(self, folder: str) -> list[str]:
        """All files below one of the folders, hidden ones too, the lock and the mark of the claims aside."""
        top = self.root / folder
        found = (path.relative_to(top).as_posix() for path in below(top) if path.is_file() or path.is_symlink())
        return sorted(name for name in found if name not in {".imagewatch/lock", ".imagewatch/.imagewatch-claims"})

    def leftovers(self) -> list[str]:
        """What no finished job may leave behind: claims, records, temporary files."""
        states = self.job_states()
        left = [f"job {job}: {state}" for job, state in states.items() if state not in {"kept", "done"}]
        left += [str(path) for path in self.answers() if states.get(path.name[:16]) != "kept"]
        left += [
            str(path)
            for path in (self.inbox / ".imagewatch").glob("*")
            if path.name not in {"lock", ".imagewatch-claims"}
        ]
        left += [str(path) for path in below(self.root) if path.name.startswith(".iw-")]
        return [one for one in left if "/.iw-status." not in one]  # a status file that is being written

    def answers(self) -> list[Path]:
        """The saved responses and images of all jobs, with what is being written."""
        return sorted((self.state / "answers").glob("*"))

    def job_states(self) -> dict[str, str]:
        """The state of each job in the journal, by id, the oldest first."""
        path = self.ledger_path or self.state / "ledger.sqlite3"
        if not path.exists():
            return {}
        with contextlib.closing(sqlite3.connect(path)) as database:
            return dict(database.execute("SELECT id, state FROM jobs ORDER BY opened_at, id").fetchall())

    def finished(self) -> dict[str, str]:
        """Each prompt that has a result file, by stem, and its destination."""
        ends = {".receipt.toml": self.outbox, ".error.toml": self.errors}
        return {
            path.name.removesuffix(end): top.name
            for end, top in ends.items()
            for path in below(top)
            if path.name.endswith(end)
        }

    def remove_inbox(self) -> None:
        """Remove the inbox of a running daemon when none of its jobs uses it any more."""

        def is_removed() -> bool:
            shutil.rmtree(self.inbox, ignore_errors=True)  # the daemon may put something there meanwhile
            return not self.inbox.exists()

        until(lambda: self.leftovers() == [])
        until(is_removed)


class Running:
    """A real daemon process."""

    def __init__(self, folders: Folders, *command: str, script: str | None = None) -> None:
        program = [sys.executable, script] if script else [sys.executable, "-m", "imagewatch"]
        environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), "PYTHONPATH": str(TESTS), **folders.environ}
        self.process = subprocess.Popen(
            [*program, *command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.output = ""
        STARTED[f"daemon {self.process.pid}"] = self.log

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal and wait for the end; return the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 30) -> int:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            self.output = b"".join(part for part in (error.output, error.stderr) if part).decode(errors="replace")
            raise
        self.output = out + err
        return self.process.returncode

    def kill(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.kill()
            self.wait()

    def log(self) -> str:
        """What it has logged so far; for the report of a test that failed, which reads nothing more."""
        if self.output or self.process.stderr is None or self.process.stderr.closed:
            return self.output
        os.set_blocking(self.process.stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.process.stderr.fileno(), 1 << 20):
                self.output += piece.decode(errors="replace")
        return self.output


HURRIED = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.journal.holds import Holds

def configured():
    return load(os.environ.get("IMAGEWATCH_CONFIG"), os.environ)

log.configure("info", "json")
holds = Holds(first_seconds=float(sys.argv[1]))
sys.exit(Daemon(configured(), os.environ, reload=configured, holds=holds).run())
"""
"""A daemon whose first hold lasts as long as a test likes instead of a quarter of a minute; all else is as it is."""


class LoggedDaemon:
    """A running daemon and what it has logged so far."""

    def __init__(self, running: Running) -> None:
        self.process = running.process
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        STARTED[f"daemon {self.process.pid}"] = self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})

    def log(self) -> str:
        """All that it has logged so far."""
        return "\n".join(str(line.get("text", line)).rstrip("\n") for line in list(self.lines))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for an event in the log; fail with the events that are there."""
        __tracebackhide__ = True

        def saw() -> str:
            code = self.process.poll()
            state = "it runs" if code is None else f"it has ended with {code}"
            return f"the daemon: {state}; its events: {dict(Counter(line['event'] for line in list(self.lines)))}"

        what = f"the event {name!r} in the log, {count} times"
        until(lambda: len(self.events(name)) >= count or self.process.poll() is not None, saw=saw, what=what)
        self._reader.join(0 if self.process.poll() is None else 30)
        if len(self.events(name)) < count:
            raise AssertionError(f"waited for {what}\n{saw()}")
        return self.events(name)[count - 1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(30)
        self._reader.join(30)
        return code

    def kill(self) -> None:
        """End it in any case, and read the rest of its log."""
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def stopped(daemon: LoggedDaemon) -> Iterator[None]:
    """Keep a daemon from doing anything."""
    daemon.process.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def report_output(command: list[str], code: object, *output: str | bytes | None) -> None:
    """Put the whole output of a process that has ended into the report, if the test fails."""
    parts = [part.decode(errors="surrogateescape") if isinstance(part, bytes) else part for part in output if part]
    name = printable(f"process {len(STARTED) + 1}, exit code {code}: {' '.join(map(str, command))}", 200)
    text = "\n".join(printable(line, 1_000_000) for line in "".join(parts).split("\n"))
    STARTED[name] = lambda: text


def run_reported(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a process to its end, with its output in the report of a failed test."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=40, check=False, **options)
    except subprocess.TimeoutExpired as error:
        report_output(command, "none, it took too long", error.stdout, error.stderr)
        raise
    report_output(command, done.returncode, done.stdout, done.stderr)
    return done


def command(folders: Folders, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command for these folders to its end."""
    return run_reported(
        [sys.executable, "-m", "imagewatch", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(folders.root), "COLUMNS": "200", **folders.environ, **environ},
        cwd=folders.root,
        text=True,
        errors="surrogateescape",
    )


def until(
    condition: Callable[[], Any], timeout: float = PATIENCE, *, saw: Callable[[], str] = lambda: "", what: str = ""
) -> None:
    """Wait until something outside of this process is so.

    Args:
        condition: What is waited for.
        timeout: For how long, seconds.
        saw: Returns what else a failure is to show.
        what: What is waited for, in words; without, the condition is shown as it is written.

    Raises:
        AssertionError: It took too long; the message has what was waited for, and what there is instead.
    """
    __tracebackhide__ = True
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not condition():
        if time.monotonic() >= deadline:
            values = [f"  {part} = {value}" for part, value in explaining.seen(condition).items()]
            lines = [
                f"waited {timeout:g} s for: {what or explaining.wanted(condition)}",
                "but there is:",
                *values,
                saw(),
            ]
            raise AssertionError("\n".join(line for line in lines if line))
        pause.wait(0.02)


def until_finished(folders: Folders, daemon: LoggedDaemon, count: int, *, emptied: bool = False) -> None:
    """Wait until so many prompts are finished, and none is in the inbox if that is wanted; a hold fails immediately."""
    __tracebackhide__ = True

    def is_so() -> bool:
        left = [name for name in folders.names("inbox") if name[0] != "."] if emptied else []
        return len(folders.finished()) == count and not left

    def saw() -> str:
        status = (folders.state / "status.json").read_text()
        return f"finished: {folders.finished()}\ninbox: {folders.names('inbox')}\nstatus: {status}"

    what = f"{count} finished prompts" + (" and an empty inbox" if emptied else "")
    until(lambda: is_so() or daemon.events("held"), saw=saw, what=what)
    if daemon.events("held"):
        raise AssertionError(f"waited for {what}, but the queue is on hold\n{saw()}")
