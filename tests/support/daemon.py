"""Real daemons and commands in processes of their own, the folders they watch, and waiting for what they do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewatch.config.load import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config

TESTS = Path(__file__).parents[1]
KEY = "sk-let-test-0123456789"
REMOTE_NAME = "imagewatch-test.invalid"
"""A name that no resolver knows: whoever is to find it needs a proxy."""


def below(top: Path) -> list[Path]:
    """Everything below a folder from which a running daemon may remove folders meanwhile; pathlib fails there."""
    return [Path(folder, name) for folder, folders, files in os.walk(top) for name in (*folders, *files)]


class Folders:
    """The folders of one daemon, seen from outside."""

    def __init__(self, root: Path, base_url: str, **settings: str) -> None:
        self.root = root / "watched"
        self.environ = {
            "LETTA_BASE_URL": base_url,
            "LETTA_API_KEY": KEY,
            "IMAGEWATCH_FOLDERS__ROOT": str(self.root),
            "IMAGEWATCH_FOLDERS__STATE": str(root / "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0",
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

    def drop(self, name: str, content: str | bytes) -> Path:
        """Drop a file as a careful sender does: under another name, then renamed."""
        path = self.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.rename(path)
        return path

    def prompt(self, stem: str, text: str | bytes) -> Path:
        return self.drop(f"{stem}.prompt.txt", text)

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
        left = [str(path) for path in (self.state / "jobs").glob("*")]
        left += [
            str(path)
            for path in (self.inbox / ".imagewatch").glob("*")
            if path.name not in {"lock", ".imagewatch-claims"}
        ]
        left += [str(path) for path in below(self.root) if path.name.startswith(".iw-")]
        return left

    def documents(self) -> dict[str, str]:
        """Each prompt that is over, by stem, and its door."""
        ends = {".receipt.toml": self.outbox, ".error.toml": self.errors}
        return {
            path.name.removesuffix(end): top.name
            for end, top in ends.items()
            for path in below(top)
            if path.name.endswith(end)
        }

    def remove_inbox(self) -> None:
        """Remove the inbox of a running daemon when none of its jobs uses it any more."""
        until(lambda: self.leftovers() == [])
        shutil.rmtree(self.inbox)


class Running:
    """A real daemon process."""

    def __init__(self, folders: Folders, *command: str, script: str | None = None) -> None:
        program = [sys.executable, script] if script else [sys.executable, "-m", "imagewatch"]
        environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), "PYTHONPATH": str(TESTS), **folders.environ}
        self.process = subprocess.Popen(
            [*program, *command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.output = ""

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal and wait for the end; return the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 30) -> int:
        out, err = self.process.communicate(timeout=timeout)
        self.output = out + err
        return self.process.returncode


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


class Told:
    """A running daemon and what it has logged so far."""

    def __init__(self, running: Running) -> None:
        self.process = running.process
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        until(lambda: len(self.events(name)) >= count or self.process.poll() is not None)
        assert len(self.events(name)) >= count, "".join(str(line.get("text", line)) for line in self.lines)
        return self.events(name)[count - 1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(30)
        self._reader.join(30)
        return code


def command(folders: Folders, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command for these folders to its end."""
    return subprocess.run(
        [sys.executable, "-m", "imagewatch", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(folders.root), "COLUMNS": "200", **folders.environ, **environ},
        cwd=folders.root,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=40,
        check=False,
    )


def until(condition: Any, timeout: float = 20.0, saw: Callable[[], str] = lambda: "") -> None:
    """Wait until something outside of this process is so; fail with what is seen when it takes too long."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time\n{saw()}"
        pause.wait(0.02)


def until_made(folders: Folders, daemon: Told, count: int, *, emptied: bool = False) -> None:
    """Wait until so many prompts are over, and none lies in the inbox if that is wanted; a hold fails at once."""

    def is_so() -> bool:
        left = [name for name in folders.names("inbox") if name[0] != "."] if emptied else []
        return len(folders.documents()) == count and not left

    def saw() -> str:
        wanted = f"{count} documents" + (" and an empty inbox" if emptied else "")
        status = (folders.state / "status.json").read_text()
        log = "\n".join(map(str, daemon.lines))
        there = f"documents: {folders.documents()}\ninbox: {folders.names('inbox')}"
        return f"wanted: {wanted}\n{there}\nstatus: {status}\nlog:\n{log}"

    until(lambda: is_so() or daemon.events("held"), saw=saw)
    assert daemon.events("held") == [], saw()
