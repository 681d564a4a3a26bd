"""What the tests share: a real loopback endpoint, real folders on a real disk, the real parts or the real process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from imagewatch.config.key import Key
from imagewatch.config.load import Config, load
from imagewatch.endpoint.client import Client
from imagewatch.inbox.scan import Sweep
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.spool import Spool
from imagewatch.job.worker import Run, Worker
from imagewatch.journal.ledger import Ledger
from imagewatch.sandbox import Sandbox
from imagewatch.system.disk import Disk
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.register_assert_rewrite("audit")

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # A shell starts what is in the background with SIGINT ignored, and so does nohup with SIGHUP. What a test starts
    # would inherit that, and a signal that a test sends would end nothing.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

KEY = "sk-let-test-0123456789"
REMOTE_NAME = "imagewatch-test.invalid"
"""A name that no resolver knows: whoever is to find it needs a proxy."""


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A local endpoint that wants the key; at the end it must have met no fault of its own."""
    with Sandbox(key=KEY) as endpoint:
        yield endpoint
        assert endpoint.report()["faults"] == []


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Each test sends keys of its own; no text of another one is masked by them."""
    yield
    known.forget()


class Certificate:
    """A certificate for this machine and for ``REMOTE_NAME``, and who has to trust it.

    Attributes:
        path: The certificate, for ``ca_file``.
        context: For a server.
    """

    def __init__(self, folder: Path) -> None:
        self.path, key = str(folder / "certificate.pem"), str(folder / "key.pem")
        names = f"subjectAltName=IP:127.0.0.1,DNS:{REMOTE_NAME}"
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        subject = ["-subj", "/CN=imagewatch test", "-addext", names, "-addext", "keyUsage=digitalSignature,keyCertSign"]
        command = ["openssl", "req", *kind, *subject, "-keyout", key, "-out", self.path]
        subprocess.run(command, check=True, capture_output=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.path, key)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    return Certificate(tmp_path_factory.mktemp("certificate"))


class Doubting(Worker):
    """A worker that believes no step: where one says what the disk shows now, the disk is asked as well."""

    def _look(self, run: Run) -> None:
        if run.foreseen:
            shown = self._spool.evidence(run.claim, self._spool.record(run.claim.job))
            assert run.seen == shown
        super()._look(run)


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


class Station(Folders):
    """The real parts in this process, without the daemon's loop: one call carries one prompt to its end."""

    def __init__(self, root: Path, base_url: str, disk: Disk | None = None, **settings: str) -> None:
        super().__init__(root, base_url, **settings)
        loaded = self.config()
        self.spool = Spool(loaded, disk or Disk())
        self.spool.prepare()
        self.ledger = Ledger(str(self.state / "ledger.sqlite3"))
        self.client = Client(loaded.endpoint, lambda: Key(KEY))
        self.worker = Doubting(self.spool, self.client, self.ledger, loaded, wait=lambda _: None)
        self.sweep = Sweep(self.spool.inbox, loaded.inbox)

    def close(self) -> None:
        self.client.close()
        self.ledger.close()

    def work(self) -> list[Outcome]:
        """Claim everything that is ready and carry it to its end; waits that a retry asks for are skipped."""
        outcomes = []
        for candidate in self.sweep.look(time.monotonic(), time.time()).ready:
            outcome = self.worker.start(candidate.claim(self.spool.new_job(), time.time()))
            while outcome.end is End.LATER:
                outcome = self.worker.process(outcome.job, resumed=True)
            outcomes.append(outcome)
        return outcomes

    def recover(self) -> list[Outcome]:
        """Do what a start does: carry on every job that left something behind."""
        return [self.worker.process(job, resumed=True) for job in self.spool.unfinished()]


@pytest.fixture
def station(tmp_path: Path, sandbox: Sandbox) -> Iterator[Station]:
    made = Station(tmp_path, sandbox.base_url)
    with contextlib.closing(made):
        yield made


class Running:
    """A real daemon process."""

    def __init__(self, folders: Folders, *command: str, script: str | None = None) -> None:
        program = [sys.executable, script] if script else [sys.executable, "-m", "imagewatch"]
        environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), **folders.environ}
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


@pytest.fixture
def start(tmp_path: Path, sandbox: Sandbox) -> Iterator[Any]:
    """Start real daemons; whatever still runs at the end of the test is killed."""
    running: list[Running] = []

    def starter(folders: Folders, *command: str, script: str | None = None) -> Running:
        running.append(Running(folders, *command, script=script))
        return running[-1]

    yield starter
    for daemon in running:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.communicate()


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


@pytest.fixture
def run(start: Any) -> Iterator[Callable[..., Told]]:
    """Start a daemon and wait until it watches."""
    started = []

    def runner(folders: Folders, *arguments: str, script: str | None = None, watching: bool = True) -> Told:
        running = start(folders, *(arguments if script else ["run", *arguments]), script=script)
        told = Told(running)
        started.append(told)
        if watching:
            told.wait_for("watching")
        return told

    yield runner
    for told in started:
        if told.process.poll() is None:
            told.process.kill()
        told.end()
        for pipe in (told.process.stdout, told.process.stderr):
            pipe.close()


@pytest.fixture
def hurried(run: Callable[..., Told], tmp_path: Path) -> Callable[..., Told]:
    """Start a daemon that does not wait long before it probes a hold."""
    script = tmp_path / "hurried.py"
    script.write_text(HURRIED)
    return lambda folders, first_seconds=0.3: run(folders, str(first_seconds), script=str(script))


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users may enter. pytest closes those it makes, at each start also those of other runs."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def folders(tmp_path: Path, sandbox: Sandbox) -> Folders:
    return Folders(tmp_path, sandbox.base_url)


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


_PROCESSES = {"start", "run", "hurried", "complete"}
"""Fixtures that start imagewatch."""
_STARTING = re.compile(
    r'"-m", "imagewatch"|^from (conftest import .*\b(command|Running)\b|senders|container)\b', re.MULTILINE
)
"""In a module whose tests start imagewatch."""
_SLOW = {"test_answers", "test_bounded", "test_connections", "test_downloads", "test_gallery_browser", "test_intake"}
_SLOW |= {"test_power"}
"""Modules that take long though they start no process of it: most wait for the end of a time."""


def _is_slow(path: Path) -> bool:
    """Whether no test of a module is quick."""
    return path.stem in _SLOW or path.parent.name == "security" or bool(_STARTING.search(path.read_text()))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For ``make quick``, do not even import the modules without a quick test: every worker would."""
    is_module = collection_path.suffix == ".py" and collection_path.is_file()
    return True if is_module and config.option.markexpr == "quick" and _is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests for ``make quick``: those of a few modules and fixtures, and those marked as slow, are not."""
    slow = {path for path in {item.path for item in items} if _is_slow(path)}
    for item in items:
        is_slow = item.path in slow or item.get_closest_marker("slow") is not None
        if not is_slow and _PROCESSES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("quick")
