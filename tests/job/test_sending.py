"""The last moment before a request is sent, and its response if the local disk or the connection fails.

The daemon is the real one; its disk, its limits and its connections are made to fail from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import HURRIED, Folders, LoggedDaemon, command, until
from support.scripted import Exchange, Scripted, heavy, paid, response, returned, small_image
from support.station import Station
from support.tracing import reason_not_to_trace

from imagewatch.daemon.admission import Admission
from imagewatch.job.outcome import End
from imagewatch.journal.control import Control
from imagewatch.journal.holds import Holds
from imagewatch.protocol.reasons import KINDS, Reason
from imagewatch.system.errors import SpoolError, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

LARGE_BYTES = 12_000_000  # more than the buffers of both ends hold


def delivered(folders: Folders, sandbox: Sandbox) -> dict[str, Any]:
    """Check that the prompt was completed and paid once; return its receipt."""
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: folders.leftovers() == [])
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (1, 1)
    assert [name for name in folders.names("outbox") if name.startswith("cat.") and not name.endswith(".toml")]
    return folders.receipt("cat")


def part(folders: Folders) -> Path:
    """The file for the expected response."""
    (path,) = folders.state.glob("answers/*.answer.1.part")
    return path


@pytest.fixture
def asked(folders: Folders, run: Callable[..., LoggedDaemon], sandbox: Sandbox) -> LoggedDaemon:
    """A daemon whose only request has arrived; its response comes after the endpoint is released."""
    sandbox.hold()
    folders.prompt("cat", "a cat [sandbox: b64]")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    return daemon


# The response and the local disk


@contextlib.contextmanager
def failing(daemon: LoggedDaemon, path: Path, fault: str) -> Iterator[None]:
    """During the block, let system calls of a daemon fail that use the file of a response."""
    if reason := reason_not_to_trace():
        pytest.skip(reason)
    names = [str(path), path.name, "/".join(path.parts[-2:]), str(path.parent), path.parent.name]
    call = fault.partition(":")[0]
    options = [option for name in names for option in ("-P", name)]
    strace = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.process.pid), *options, "-e", f"trace={call}", "-e", f"inject={fault}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert strace.stderr is not None
    assert "attached" in strace.stderr.readline()
    try:
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        event = strace.communicate(timeout=20)[1]
    assert "(INJECTED)" in event


@pytest.mark.parametrize(
    "fault",
    [
        *("write:error=EIO", "write:error=EROFS", "write:error=EACCES", "write:error=ENOSPC", "write:error=ESTALE"),
        *("fsync:error=EIO", "renameat:error=EROFS", "renameat:error=ENOENT", "openat:error=EMFILE"),
    ],
)
def test_any_disk_error_while_a_response_arrives_is_retried_and_puts_the_queue_on_hold(
    asked: LoggedDaemon, folders: Folders, sandbox: Sandbox, fault: str
) -> None:
    with failing(asked, part(folders), fault):
        sandbox.release()
        event = asked.wait_for("held")
        folders.prompt("later", "not while our disk fails")
    assert (event["kind"], "/answers" in event["reason"]) == ("disk", True)
    until(lambda: folders.finished() == {"cat": "outbox", "later": "outbox"})
    assert "problems" not in folders.receipt("cat")
    assert sandbox.report()["charged"] == 2
    assert asked.stop() == 0


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """During the block, no process can write the file, even if it has the file open."""
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("this file system, or this user, has no immutable files")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


def test_a_response_waits_while_its_file_may_not_be_written(
    asked: LoggedDaemon, folders: Folders, sandbox: Sandbox
) -> None:
    with immutable(part(folders)):
        sandbox.release()
        assert "Operation not permitted" in asked.wait_for("held")["reason"]
        assert folders.finished() == {}
    delivered(folders, sandbox)
    assert asked.stop() == 0


@pytest.mark.parametrize(("tag", "charged", "text"), [("b64", "yes", "was charged"), ("504", "unknown", "may have")])
def test_after_the_deadline_the_error_file_says_what_is_known_and_names_the_local_disk(
    tmp_path: Path, run: Callable[..., LoggedDaemon], sandbox: Sandbox, tag: str, charged: str, text: str
) -> None:
    settings = {"endpoint__deadline_seconds": "3", "endpoint__connect_timeout_seconds": "2"}
    folders = Folders(tmp_path, sandbox.base_url, **settings)
    sandbox.hold()
    folders.prompt("cat", f"a cat [sandbox: {tag}]")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    with immutable(part(folders)):
        sandbox.release()
        daemon.wait_for("stuck")
    until(lambda: folders.finished() == {"cat": "errors"})
    error = folders.error("cat")
    assert (error["charged"], text in error["message"]) == (charged, True)
    assert re.search(r"cannot save the response: Operation not permitted: /\S+\.answer\.1\b", error["message"])
    assert "imagewatch ended" not in error["message"]
    assert ("the response is lost" in error["next"]) == (charged == "yes")
    lost = KINDS["lost"].cause if charged == "yes" else None
    assert daemon.wait_for("failed" if lost else "unknown").get("reason") == lost
    until(lambda: folders.leftovers() == [])
    assert "kept" not in folders.job_states().values()
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 1


def test_the_images_before_the_deadline_are_published_and_the_rest_is_reported_as_lost_by_the_local_disk(
    tmp_path: Path, run: Callable[..., LoggedDaemon]
) -> None:
    body, going_on = paid(small_image(), small_image()), threading.Event()
    first = body[: body.rindex(b"b64_json")]

    def script(exchange: Exchange) -> None:
        exchange.request()
        exchange.send(response(body)[: -len(body)] + first)
        going_on.wait(20)
        exchange.send(body[len(first) :])
        exchange.drain()

    settings = {"endpoint__deadline_seconds": "4", "endpoint__connect_timeout_seconds": "2"}
    with Scripted(script) as server:
        folders = Folders(tmp_path, server.base_url, **settings)
        folders.prompt("cat", "+++\nn = 2\n+++\na cat")
        daemon = run(folders)
        until(lambda: any(first[-20:] in path.read_bytes() for path in folders.state.glob("answers/*.answer.1.part")))
        with immutable(part(folders)):
            going_on.set()
            daemon.wait_for("stuck")
        until(lambda: folders.finished() == {"cat": "outbox"})
        receipt = folders.receipt("cat")
        assert (receipt["got"], receipt["asked"]) == (1, 2)
        assert "Operation not permitted" in " ".join(receipt["problems"])
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    "change", ["its file removed", "all responses removed", "the state folder replaced", "the state folder deleted"]
)
def test_a_response_is_delivered_although_the_state_folder_loses_its_file_while_it_arrives(
    asked: LoggedDaemon, folders: Folders, sandbox: Sandbox, change: str
) -> None:
    if change == "its file removed":
        part(folders).unlink()
    elif change == "all responses removed":
        shutil.rmtree(folders.state / "answers")
    else:
        folders.state.rename(folders.state.with_name("aside"))
        folders.state.mkdir()
        if change == "the state folder deleted":
            shutil.rmtree(folders.state.with_name("aside"))
    sandbox.release()
    if change == "the state folder deleted":
        until(lambda: "the ledger is missing" in str(asked.events("held")))
        until(lambda: list(folders.state.glob("*.saved-1")))
        (folders.state / "ledger.sqlite3.saved-1").rename(folders.state / "ledger.sqlite3")
    if change == "the state folder replaced":
        until(lambda: "the state folder was replaced" in str(asked.events("held")))
        shutil.rmtree(folders.state)
        folders.state.with_name("aside").rename(folders.state)
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert "problems" not in folders.receipt("cat")
    until(lambda: folders.leftovers() == [])
    assert asked.stop() == 0
    assert sandbox.report()["requests"] == 1


def test_a_response_is_saved_in_the_state_folder_that_is_created_again_after_the_stop(
    asked: LoggedDaemon, folders: Folders, run: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    while folders.state.exists():  # the daemon may write into it while it is removed
        shutil.rmtree(folders.state, ignore_errors=True)
    sandbox.release()
    until(lambda: asked.events("held"))
    asked.process.send_signal(signal.SIGTERM)
    asked.wait_for("shutdown")
    folders.state.mkdir(0o700)
    assert asked.end() == 0
    (folders.state / "ledger.sqlite3.saved-1").rename(folders.state / "ledger.sqlite3")
    daemon = run(folders)
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 1


def test_a_request_that_is_lost_with_its_file_is_not_sent_again(
    tmp_path: Path, run: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    sandbox.hold()
    folders.prompt("cat", "a cat [sandbox: drop]")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, 20)
    shutil.rmtree(folders.state / "answers")
    sandbox.release()
    until(lambda: folders.finished() == {"cat": "errors"})
    error = folders.error("cat")
    assert (error["charged"], "no response came" in error["message"]) == ("unknown", True)
    assert error["times"]["claimed"] <= error["times"]["sent"] <= error["times"]["published"]
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 1


def test_too_little_space_for_a_response_is_found_before_the_request_is_sent(tmp_path: Path, sandbox: Sandbox) -> None:
    (tmp_path / "state").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path / "state")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        with contextlib.closing(Station(tmp_path, sandbox.base_url, limits__min_free_bytes="9000000")) as station:
            station.prompt("cat", "a cat")
            (outcome,) = station.work()
            assert (outcome.end, outcome.reason and outcome.reason.kind) == (End.RETURNED, "disk")
            assert "cannot reserve 9,000,000 bytes: No space left on device" in str(outcome.reason)
            returned(station, {"cat.prompt.txt": "a cat"})
            assert sandbox.report()["requests"] == 0
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "state")], check=True)


def test_two_requests_are_sent_one_after_the_other_if_there_is_no_space_for_both_responses(
    tmp_path: Path, hurried: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    (tmp_path / "state").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(tmp_path / "state")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        folders = Folders(tmp_path, sandbox.base_url, limits__min_free_bytes="5000000")
        sandbox.hold()
        for name in ("cat", "dog"):
            folders.prompt(name, f"a {name}")
        daemon = hurried(folders)
        assert sandbox.wait_for_requests(1, 20)
        assert daemon.wait_for("held")["kind"] == "disk"
        until(lambda: len(folders.names("inbox")) == 2)  # one that waits, and the original of the other
        assert sandbox.report()["requests"] == 1
        sandbox.release()
        until(lambda: folders.finished() == {"cat": "outbox", "dog": "outbox"})
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "state")], check=True)


# Open files


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n" + HURRIED


def test_sixty_four_requests_under_a_limit_of_sixty_files_lose_nothing(
    tmp_path: Path, run: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="64")
    for number in range(64):
        folders.prompt(f"p{number}", f"Number {number}")
    script = tmp_path / "few.py"
    script.write_text(FEW_FILES)
    daemon = run(folders, "0.3", script=str(script))
    until(lambda: len(folders.finished()) == 64, 60)
    assert set(folders.finished().values()) == {"outbox"}
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (64, 64)
    assert daemon.events("held") == []
    (event,) = daemon.events("limited")
    assert "only 60 open files are allowed: limits.concurrency is 64, and 4 is used" in event["reason"]
    assert "LimitNOFILE=" in event["next"]
    assert daemon.stop() == 0


def test_responses_that_arrive_when_no_more_files_can_be_opened_are_waited_for(
    tmp_path: Path, run: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    sandbox.hold()
    for number in range(4):
        folders.prompt(f"p{number}", f"Number {number} [sandbox: b64]")
    daemon = run(folders)
    assert sandbox.wait_for_requests(4, 20)
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (5, before[1]))
    sandbox.release()
    event = daemon.wait_for("held")
    assert (event["kind"], "Too many open files" in event["reason"]) == ("disk", True)
    assert "LimitNOFILE=" in event["next"]
    assert folders.finished() == {}
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)
    until(lambda: folders.finished() == {f"p{number}": "outbox" for number in range(4)})
    assert daemon.stop() == 0
    assert (sandbox.report()["requests"], sandbox.report()["charged"]) == (4, 4)


CONNECT_WITHOUT_FILES = """
import os, resource
from imagewatch.endpoint.client import Client
from imagewatch.config.load import load
from imagewatch.system.errors import SpoolError
from imagewatch.config.key import Key

client = Client(load(None, os.environ).endpoint, lambda: Key(os.environ["LETTA_API_KEY"]))
client.prepare()
limit = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    client.balance()
except SpoolError as error:
    print(error, error.hint)
"""


def test_a_connection_for_which_no_file_can_be_opened_is_a_local_error_and_not_one_of_the_network(
    folders: Folders, sandbox: Sandbox
) -> None:
    environ = {"PATH": os.environ["PATH"], **folders.environ}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT_WITHOUT_FILES], env=environ, capture_output=True, text=True, check=True
    )
    assert "cannot open a connection: Too many open files" in done.stdout
    assert "LimitNOFILE=" in done.stdout


# Uploads that are cut off


def gateway(exchange: Exchange) -> None:
    """A server that accepts no request over a megabyte and refuses it by closing the connection."""
    head = exchange.head()
    if int(head.lower().partition(b"content-length:")[2].split()[0]) > 1_000_000:
        exchange.body(head, most=200_000)
        exchange.reset()
        return
    exchange.body(head)
    exchange.send(response(paid(small_image())))


@pytest.fixture(scope="module")
def photograph() -> bytes:
    return heavy(LARGE_BYTES)


def test_a_prompt_whose_upload_is_cut_off_fails_and_other_prompts_continue(
    tmp_path: Path, run: Callable[..., LoggedDaemon], photograph: bytes
) -> None:
    with Scripted(*[gateway] * 30) as server:
        folders = Folders(tmp_path, server.base_url, limits__concurrency="2")
        folders.drop("anna/large.png", photograph)
        folders.prompt("anna/large", "too large for the way")
        daemon = run(folders)
        for number in range(6):
            folders.prompt(f"ben/p{number}", f"Number {number}")
        until(lambda: len(folders.finished()) == 7)
        assert daemon.stop() == 0
    error = folders.error("anna/large")
    assert (error["charged"], error["attempts"]) == ("no", 4)
    assert "tried 4 times; nothing was charged" in error["message"]
    assert {"anna/large.png", "anna/large.prompt.txt"} <= set(folders.names("errors"))
    assert list(folders.finished().values()).count("outbox") == 6
    assert daemon.events("held") == []


def test_when_the_uploads_of_several_prompts_are_cut_off_the_queue_waits_for_the_network(
    tmp_path: Path, hurried: Callable[..., LoggedDaemon], photograph: bytes
) -> None:
    with Scripted(*[gateway] * 12) as server:
        folders = Folders(tmp_path, server.base_url, retry__attempts="2")
        for name in "abc":
            folders.drop(f"{name}.png", photograph)
            folders.prompt(name, "too large for the way")
        daemon = hurried(folders)
        event = daemon.wait_for("held")
        assert (event["kind"], "while the request was sent" in event["reason"]) == ("unreachable", True)
        until(lambda: folders.finished() == dict.fromkeys("abc", "errors"))
        assert daemon.stop() == 0
        assert server.connections == 6


def test_the_attempts_of_an_upload_that_is_cut_off_are_counted_across_a_restart(
    tmp_path: Path, run: Callable[..., LoggedDaemon], photograph: bytes
) -> None:
    with Scripted(*[gateway] * 6) as server:
        settings = {"retry__attempts": "3", "retry__initial_seconds": "3600", "retry__max_seconds": "3600"}
        folders = Folders(tmp_path, server.base_url, **settings)
        folders.drop("a.png", photograph)
        folders.prompt("a", "too large for the way")
        for attempt in (1, 2):
            daemon = run(folders)
            until(lambda attempt=attempt: list(folders.state.glob(f"answers/*.answer.{attempt}")))
            assert daemon.stop() == 0
        daemon = run(folders)
        until(lambda: folders.finished() == {"a": "errors"})
        assert daemon.stop() == 0
        assert (folders.error("a")["attempts"], server.connections) == (3, 3)


# The last moment


SLOW = (
    """
import os
from imagewatch.journal.journal import Journal

_spend = Journal.spend

def slow(self, *values, **named):
    refusal = _spend(self, *values, **named)
    if os.path.exists(os.environ["GATE"]):
        open(os.environ["GATE"]).close()  # a pipe: waits until its other end is opened
    return refusal

Journal.spend = slow
"""
    + HURRIED
)


@pytest.fixture
def slow(folders: Folders, run: Callable[..., LoggedDaemon], tmp_path: Path) -> Iterator[Callable[[], LoggedDaemon]]:
    """Start a daemon whose journal, until the file is removed, is slow when it records that a request is sent."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    folders.environ["GATE"] = str(gate)
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    return lambda: run(folders, "0.3", script=str(script))


def go_on(gate: Path) -> None:
    """Let the disk continue when a thread waits for it."""
    with open(gate, "wb"):
        gate.unlink()


def is_writing(folders: Folders) -> bool:
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        return bool(database.execute("SELECT 1 FROM attempts WHERE outcome = 'sent'").fetchall())


def test_after_hold_reports_that_it_is_applied_nothing_is_sent_however_slow_the_disk_is(
    folders: Folders, slow: Callable[[], LoggedDaemon], sandbox: Sandbox, tmp_path: Path
) -> None:
    folders.prompt("cat", "a cat")
    daemon = slow()
    until(lambda: is_writing(folders))
    held = command(folders, "hold")
    assert (held.returncode, held.stdout.partition(".")[0]) == (0, "On hold")
    go_on(tmp_path / "gate")
    until(lambda: folders.names("inbox") == ["cat.prompt.txt"] and folders.leftovers() == [])
    assert (sandbox.report()["requests"], folders.finished()) == (0, {})
    assert command(folders, "release").returncode == 0
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 1


def test_after_sigterm_nothing_is_sent_however_slow_the_disk_is(
    folders: Folders, slow: Callable[[], LoggedDaemon], sandbox: Sandbox, tmp_path: Path
) -> None:
    folders.prompt("cat", "a cat")
    daemon = slow()
    until(lambda: is_writing(folders))
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("shutdown")
    go_on(tmp_path / "gate")
    assert daemon.end() == 0
    assert (folders.names("inbox"), folders.leftovers()) == (["cat.prompt.txt"], [])
    assert (sandbox.report()["requests"], folders.finished()) == (0, {})
    assert command(folders, "once").returncode == 0
    assert sandbox.report()["requests"] == 1


def test_a_hold_is_not_reported_as_applied_while_the_first_bytes_of_a_request_are_sent(tmp_path: Path) -> None:
    with contextlib.closing(Station(tmp_path, "http://127.0.0.1:9")) as station:
        holds, order = Holds(), []
        control = Control(str(station.state), station.spool.disk, station.journal.requests)
        gate = Admission(station.spool, station.journal, control, holds, lambda **_: None, lambda: 0.0, lambda: 0.0)
        gate.configure(station.config().limits, 0.0, lambda: None, str)

        def hold() -> None:
            gate.failed(SpoolError("full"))
            order.append("held")

        holding = threading.Thread(target=hold)
        with gate.leaving():
            holding.start()
            until(lambda: holds.has("disk"))
            order.append("left")
        holding.join()
        assert order == ["left", "held"]
        with pytest.raises(Withdrawn, match="full"), gate.leaving():
            pass


def test_a_hold_for_a_cap_or_a_rate_does_not_stop_a_request_that_was_admitted(tmp_path: Path) -> None:
    with contextlib.closing(Station(tmp_path, "http://127.0.0.1:9")) as station:
        holds = Holds()
        control = Control(str(station.state), station.spool.disk, station.journal.requests)
        gate = Admission(station.spool, station.journal, control, holds, lambda **_: None, lambda: 0.0, lambda: 0.0)
        for kind in ("cap", "rate"):
            holds.add(Reason(kind, "its own reservation counts", 10.0), 0.0)
        with gate.leaving():
            pass
        gate.drain()
        with pytest.raises(Withdrawn, match="daemon stopped"), gate.leaving():
            pass


# Beside a request in flight


REFUSING = (
    """
import os
from imagewatch.journal.journal import Journal
from imagewatch.system.errors import SpoolError

_claim = Journal.claim

def refuse_once(self, claim):
    if os.path.exists(os.environ["GATE"]):
        os.unlink(os.environ["GATE"])
        raise SpoolError("the ledger cannot be written: full", path="ledger", code=28)
    return _claim(self, claim)

Journal.claim = refuse_once
"""
    + HURRIED
)


def test_a_claim_that_could_not_be_recorded_leaves_the_file_of_a_request_in_flight_alone(
    tmp_path: Path, folders: Folders, run: Callable[..., LoggedDaemon], sandbox: Sandbox
) -> None:
    gate, script = tmp_path / "gate", tmp_path / "refusing.py"
    folders.environ["GATE"] = str(gate)
    script.write_text(REFUSING)
    sandbox.hold()
    folders.prompt("cat", "a cat")
    daemon = run(folders, "0.3", script=str(script))
    assert sandbox.wait_for_requests(1, 20)
    gate.touch()
    folders.drop("dog.png", small_image())
    folders.prompt("dog", "a dog")
    until(lambda: not gate.exists())
    assert sandbox.wait_for_requests(2, 20)
    assert len(list(folders.state.glob("answers/*.answer.1.part"))) == 2
    sandbox.release()
    until(lambda: folders.finished() == {"cat": "outbox", "dog": "outbox"})
    until(lambda: folders.leftovers() == [])
    assert daemon.stop() == 0
    assert sandbox.report()["requests"] == 2
