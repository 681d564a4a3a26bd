# ruff: noqa: E402  the imports of helpers come after their registration
"""What the tests share: a real loopback endpoint, real folders on a real disk, the real parts or the real process."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before the first import of them: their asserts are shown with values, as those in tests are.
pytest.register_assert_rewrite("support", "security.people", "security.world")
from support.daemon import HURRIED, KEY, REMOTE_NAME, STARTED, Folders, LoggedDaemon, Running
from support.postgres import Server
from support.postgres import missing as missing_postgres
from support.proxy import Proxy
from support.station import Station

from imagewatch.sandbox import Sandbox
from imagewatch.system.masking import known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # A shell starts what is in the background with SIGINT ignored, and so does nohup with SIGHUP. What a test starts
    # would inherit that, and a signal that a test sends would end nothing.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A local endpoint that requires the key; at the end it must have had no fault of its own."""
    with Sandbox(key=KEY) as endpoint:
        yield endpoint
        assert endpoint.report()["faults"] == []


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Each test sends keys of its own; no text of another one is masked by them."""
    yield
    known.forget()


class Certificate:
    """A certificate for this machine and for ``REMOTE_NAME``, and how to trust it.

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


@pytest.fixture
def station(tmp_path: Path, sandbox: Sandbox) -> Iterator[Station]:
    made = Station(tmp_path, sandbox.base_url)
    with contextlib.closing(made):
        yield made


@pytest.fixture
def start(tmp_path: Path, sandbox: Sandbox) -> Iterator[Any]:
    """Start real daemons; whatever still runs at the end of the test is killed."""
    running: list[Running] = []

    def starter(folders: Folders, *command: str, script: str | None = None) -> Running:
        running.append(Running(folders, *command, script=script))
        return running[-1]

    yield starter
    for daemon in running:
        daemon.kill()


@pytest.fixture
def run(start: Any) -> Iterator[Callable[..., LoggedDaemon]]:
    """Start a daemon and wait until it watches."""
    started: list[LoggedDaemon] = []

    def runner(folders: Folders, *arguments: str, script: str | None = None, watching: bool = True) -> LoggedDaemon:
        __tracebackhide__ = True
        running = start(folders, *(arguments if script else ["run", *arguments]), script=script)
        started.append(LoggedDaemon(running))
        if watching:
            started[-1].wait_for("started")
        return started[-1]

    yield runner
    for daemon in started:
        daemon.kill()


@pytest.fixture
def hurried(run: Callable[..., LoggedDaemon], tmp_path: Path) -> Callable[..., LoggedDaemon]:
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


def _new_postgres() -> Server:
    if reason := missing_postgres():
        pytest.skip(reason)
    return Server()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL for all tests of a worker. None of them stops it or changes its settings."""
    with _new_postgres() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Server]:
    """A PostgreSQL for one test, which may stop it, kill it, change its settings and add standbys."""
    with _new_postgres() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> Iterator[str]:
    """How to connect to an empty database."""
    uri = postgres.database()
    yield uri
    postgres.drop(uri.rpartition("/")[2])


@pytest.fixture
def proxy(postgres: Server) -> Iterator[Proxy]:
    """Between clients and ``postgres``: what a test makes fail concerns only the connections through it."""
    with Proxy(postgres.port) as made:
        yield made


@pytest.fixture
def folders(tmp_path: Path, sandbox: Sandbox) -> Folders:
    return Folders(tmp_path, sandbox.base_url)


_PROCESSES = {"start", "run", "hurried", "complete", "postgres", "own_postgres"}
"""Fixtures that start imagewatch or PostgreSQL."""
_STARTING = re.compile(
    r'"-m", "imagewatch"|^from support\.(daemon import .*\b(command|Running)\b|senders|container)\b', re.MULTILINE
)
"""In a module whose tests start imagewatch."""
_SLOW = {"test_responses", "test_bounded", "test_connections", "test_downloads", "test_gallery_browser", "test_intake"}
_SLOW |= {"test_power", "test_event_power"}
"""Modules that take long though they start no process of it: most wait for the end of a time."""


def _is_slow(path: Path) -> bool:
    """Whether no test of a module is quick."""
    return path.stem in _SLOW or path.parent.name == "security" or bool(_STARTING.search(path.read_text()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget the processes of the test before."""
    STARTED.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Show what all processes that a test has started have written if it fails."""
    report = yield
    if report.failed:
        logs = ((f"output of {name}", log()) for name, log in STARTED.items())
        report.sections += [section for section in logs if section not in report.sections]
    return report


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For ``make quick``, do not even import the modules without a quick test: every worker would."""
    is_module = collection_path.suffix == ".py" and collection_path.is_file()
    return True if is_module and config.option.markexpr == "quick" and _is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests for ``make quick``: those of a few modules and fixtures, and those marked as slow, are not.

    The slow modules come first: at the end of a run all processes should have something to do.
    """
    slow = {path for path in {item.path for item in items} if _is_slow(path)}
    for item in items:
        is_slow = item.path in slow or item.get_closest_marker("slow") is not None
        if not is_slow and _PROCESSES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("quick")
    items.sort(key=lambda item: item.path not in slow)
