"""The units under a real systemd, in a container that is booted once; nothing is simulated but the endpoint.

It is installed by the commands of the documentation, as they stand there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gallery.test_gallery import page_data
from gallery.test_gallery_hostile import scans
from prometheus_client.parser import text_string_to_metric_families
from support.container import ROOT, Container, Unavailable, unavailable
from support.daemon import KEY, STARTED, until
from support.pages import marked, page, pages, table

from imagewatch import __version__
from imagewatch.protocol.reasons import HOLDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.timeout(120)
UNITS = ROOT / "systemd"
ALL = "".join(path.read_text() for path in pages())
BLOCKS = {name: text for name, text in marked("sh").items() if not name.startswith(("deb_", "image_"))}
"""Of all pages; another test runs those of other kinds."""
EXPOSURE = {"imagewatch": 12, "imagewatch-gallery": 2}  # tenths
WATCHDOG_SECONDS = 4
"""For a daemon that must not be killed: half of it is left to a busy machine."""
DROP_IN = "[Service]\nRestartSec=100ms\n[Unit]\nStartLimitBurst=1000\n"
HANGING = "/opt/hanging"
HANG = """\
import signal, threading

def hang(number, frame):
    threading.Event().wait()

signal.signal(signal.SIGUSR1, hang)
"""
"""Lets the main thread wait for ever in the midst of what it does."""
HELD = "/run/endpoint-held"
ENDPOINT = f"""\
import os, sys, threading
from imagewatch.sandbox import Sandbox

def hold(line):
    while line.startswith("POST") and os.path.exists("{HELD}"):
        threading.Event().wait(0.02)

Sandbox(port=8283, key=sys.argv[1], on_request=hold).serve_forever()
"""
"""An endpoint that delays its responses as long as a test likes."""
REPORT = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8283/sandbox/report').read().decode())"


def follow(container: Container, name: str, text: str = "", **settings: Any) -> str:
    """Run the commands of one block of the documentation, as they stand there; return what they print."""
    done = container.run("bash", "-euc", BLOCKS[name], text=text, **{"cwd": "/root/imagewatch", **settings})
    return done.stdout


class Service:
    """One of the units in the container, its folders and its journal."""

    def __init__(self, container: Container, unit: str = "imagewatch", name: str = "imagewatch") -> None:
        self.container = container
        self.unit = unit
        self.root = f"/srv/{name}"
        self.config = "/etc/imagewatch/config.toml"
        self._drop_ins = f"/etc/systemd/system/{unit}.service.d"

    # As an administrator

    def systemctl(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.container.run("systemctl", *command, self.unit, check=check)

    def drop_in(self, text: str) -> None:
        """Change the unit for this test."""
        self.container.put(f"{self._drop_ins}/test.conf", f"[Service]\n{text}\n")
        self.container.run("systemctl", "daemon-reload")

    def reset(self) -> None:
        """Let nothing be left of an earlier test."""
        self.systemctl("stop", check=False)
        for folder in ("inbox", "outbox", "errors", "archive"):
            for path in self.path(folder).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.container.run("sh", "-c", f"rm -f {self._drop_ins}/test.conf && systemctl daemon-reload")
        self.systemctl("reset-failed", check=False)
        self._cursor = self.container.run("journalctl", "--lines=0", "--show-cursor").stdout.split("cursor: ")[-1]
        STARTED[f"service {self.unit}"] = self.log

    @property
    def pid(self) -> int:
        """Its process, by the number that it has inside."""
        return int(self.container.show(self.unit, "MainPID"))

    @property
    def restarts(self) -> int:
        return int(self.container.show(self.unit, "NRestarts"))

    @property
    def last_sign(self) -> float:
        """When it last reset the watchdog: monotonic time, seconds."""
        return int(self.container.show(self.unit, "WatchdogTimestampMonotonic")) / 1e6

    def kill(self, signal: str) -> None:
        self.systemctl("kill", "--kill-whom=main", f"--signal={signal}")

    def journal(self) -> list[dict[str, Any]]:
        return self.container.journal(self.unit, self._cursor.strip())

    def log(self) -> str:
        """The texts of the journal."""
        return "\n".join(str(entry["MESSAGE"]) for entry in self.journal())

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.journal() if entry.get("IMAGEWATCH_EVENT") == name]

    # As a user

    def path(self, path: str) -> Path:
        return self.container.path(f"{self.root}/{path}")

    def prompt(self, name: str, text: str, user: str = "colleague") -> None:
        """Drop a prompt as a colleague does, whole."""
        script = 'mkdir -p "${1%/*}" && cat >"$1.part" && mv "$1.part" "$1.prompt.txt"'
        self.container.run("sh", "-c", script, "sh", f"{self.root}/inbox/{name}", user=user, text=text)

    def receipt(self, name: str) -> dict[str, Any]:
        until(self.path(f"outbox/{name}.receipt.toml").exists)
        return tomllib.loads(self.path(f"outbox/{name}.receipt.toml").read_text())

    def error(self, name: str) -> dict[str, Any]:
        until(self.path(f"errors/{name}.error.toml").exists)
        return tomllib.loads(self.path(f"errors/{name}.error.toml").read_text())


class Endpoint:
    """The sandbox, as a unit of its own in the container."""

    def __init__(self, container: Container) -> None:
        self._container = container
        command = ["/opt/imagewatch/bin/python", "-c", ENDPOINT, KEY]
        container.run("systemd-run", "--quiet", "--unit=endpoint", *command)
        until(lambda: self._report(check=False).returncode == 0)

    def _report(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._container.run("/opt/imagewatch/bin/python", "-c", REPORT, check=check)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Accept and charge requests, but answer none before the end."""
        self._container.put(HELD, "")
        try:
            yield
        finally:
            self._container.path(HELD).unlink()

    def prompts(self) -> list[str]:
        """The prompts of all calls so far."""
        report = json.loads(self._report().stdout)
        assert report["faults"] == []
        return [call["prompt"] for call in report["calls"]]

    def calls(self, prompt: str) -> int:
        return self.prompts().count(prompt)


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> Iterator[Container]:
    if reason := unavailable():
        pytest.skip(reason)
    try:
        booted = Container(tmp_path_factory.mktemp("container"))
    except Unavailable as error:
        pytest.skip(str(error))
    yield booted
    booted.stop()


def quicken(container: Container, config: str) -> None:
    """Let a configuration lead to the endpoint of the tests, and wait for nothing."""
    script = "s|^# base_url = .*|base_url = 'http://127.0.0.1:8283'|; s|^# settle_seconds = .*|settle_seconds = 0|"
    container.run("sed", "-i", f"{script}; s|^# min_free_bytes = .*|min_free_bytes = 1|", config)


@pytest.fixture(scope="module")
def machine(container) -> Container:
    """The container with imagewatch installed by the page."""
    for name in ("systemd", "man"):
        shutil.copytree(ROOT / name, container.path(f"/root/imagewatch/{name}"))
    follow(container, "install")
    follow(container, "configure", f"{KEY}\n")
    for name in ("colleague", "stranger"):
        container.run("useradd", "--create-home", name)
    container.run("usermod", "--append", "--groups", "imagewatch", "colleague")
    quicken(container, "/etc/imagewatch/config.toml")
    for unit in ("imagewatch", "imagewatch@"):
        container.put(f"/etc/systemd/system/{unit}.service.d/quick.conf", DROP_IN)
    container.run("systemctl", "daemon-reload")
    return container


@pytest.fixture(scope="module")
def endpoint(machine) -> Endpoint:
    return Endpoint(machine)


@pytest.fixture
def service(machine, endpoint) -> Service:
    made = Service(machine)
    made.reset()
    return made


@pytest.fixture
def started(service) -> Service:
    service.systemctl("start")
    return service


# What can be tested without a machine


def directives(name: str) -> list[str]:
    return [line for line in (UNITS / name).read_text().split("\n") if line and not line.startswith("#")]


@pytest.mark.parametrize("template", ["", "@"])
@pytest.mark.parametrize("unit", EXPOSURE)
def test_the_exposure_of_the_unit_is_at_most_what_it_states(unit, template):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    path = str(UNITS / f"{unit}{template}.service")
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE[unit]}", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"says {EXPOSURE[unit] / 10} in all" in (UNITS / f"{unit}.service").read_text()


NAMES = {"generation (%i)": "generation", "gallery (%i)": "gallery", "imagewatch-%i": "imagewatch"}
NAMES |= {
    "/etc/imagewatch/%i.toml": "/etc/imagewatch/config.toml",
    "/etc/imagewatch/%i.letta_api_key": "/etc/imagewatch/letta_api_key",
}


@pytest.mark.parametrize("unit", ["imagewatch@.service", "imagewatch-gallery@.service", "imagewatch-gallery@.timer"])
def test_the_unit_for_several_inboxes_differs_in_names_only(unit):
    several = "\n".join(directives(unit))
    for template, plain in NAMES.items():
        several = several.replace(template, plain)
    assert several.split("\n") == directives(unit.replace("@", ""))


def test_the_time_to_stop_and_that_of_the_watchdog_are_longer_than_the_longest_request():
    def number(pattern: str, text: str) -> float:
        found = re.search(pattern, text, re.MULTILINE)
        assert found, pattern
        return float(found[1])

    deadline = number(r"^# deadline_seconds = (.+)$", (ROOT / "config.example.toml").read_text())
    for unit in ("imagewatch.service", "user/imagewatch.service"):
        text = (UNITS / unit).read_text()
        stop = number(r"^TimeoutStopSec=(\d+)$", text)
        assert stop >= deadline + 600
        assert number(r"^WatchdogSec=(\d+)$", text) >= stop


# The system's own opinion


def test_systemd_finds_nothing_wrong_with_the_units(machine, gallery):
    for unit in ("imagewatch", "imagewatch@cats", "imagewatch-gallery", "imagewatch-gallery@cats"):
        done = machine.run("systemd-analyze", "verify", "--man=no", f"{unit}.service", check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


# Starting


def test_systemctl_status_shows_what_the_service_does_and_why_it_waits(started, endpoint):
    def shows(words: str) -> bool:
        return words in started.container.show("imagewatch", "StatusText")

    with endpoint.holding():
        started.prompt("slow", "[sandbox: b64] LoggedDaemon to the manager")
        until(lambda: shows("0 waiting; 1 in flight; today "))
    until(lambda: shows("0 waiting; 0 in flight; today "))
    started.container.run("imagewatch", "hold", "out of office")
    started.prompt("held", "[sandbox: b64] Not before Monday")
    until(lambda: shows("1 waiting; 0 in flight; today ") and shows("on hold (manual): out of office"))
    started.container.run("imagewatch", "release")


def test_the_service_is_ready_only_after_its_first_scan(started):
    assert started.container.show("imagewatch", "ActiveState") == "active"
    messages = [entry["MESSAGE"] for entry in started.journal()]
    watching = next(number for number, text in enumerate(messages) if text.startswith("started"))
    ready = next(number for number, text in enumerate(messages) if text.startswith("Started"))
    assert watching < ready


def test_a_colleague_drops_and_collects_and_a_stranger_does_not(started, endpoint):
    started.prompt("cats/cat", "A cat on a mat")  # a folder of her own, by her umask
    assert started.receipt("cats/cat")["charged"] == "yes"
    assert started.receipt("cats/cat")["owner"] == "colleague"
    assert endpoint.calls("A cat on a mat") == 1
    image = next(started.path("outbox/cats").glob("cat.*g")).name
    inside = f"{started.root}/outbox/cats/{image}"
    for user, expected in (("stranger", 1), ("colleague", 0)):
        assert started.container.run("cp", inside, f"/home/{user}/", user=user, check=False).returncode == expected
    started.container.run("rm", inside, user="colleague")
    assert not started.path(f"outbox/cats/{image}").exists()


def test_the_key_comes_from_the_manager_and_cannot_be_read_by_others(started, endpoint):
    started.prompt("key", "[sandbox: b64] A key")
    assert started.receipt("key")["charged"] == "yes"  # the endpoint accepts no other key
    for path in ("/etc/imagewatch/letta_api_key", "/run/credentials/imagewatch.service/letta_api_key"):
        assert KEY in started.container.path(path).read_text()
        assert started.container.run("cat", path, user="colleague", check=False).returncode != 0
    assert started.container.run("cat", "/etc/imagewatch/letta_api_key", user="imagewatch", check=False).returncode != 0


def test_a_key_that_is_encrypted_on_the_disk_works_as_well(service, endpoint):
    follow(service.container, "encrypt")
    try:
        encrypted = service.container.path("/etc/imagewatch/letta_api_key.cred").read_text()
        assert KEY not in encrypted
        assert not service.container.path("/etc/imagewatch/letta_api_key").exists()
        service.systemctl("start")
        service.prompt("secret", "[sandbox: b64] A secret")
        assert service.receipt("secret")["charged"] == "yes"
    finally:
        service.container.put("/etc/imagewatch/letta_api_key", KEY, 0o600)
        service.container.run("rm", "-f", "/etc/systemd/system/imagewatch.service.d/key.conf")
        service.container.run("systemctl", "daemon-reload")


# What it may do


PROBE = """\
import ctypes, errno, json, mmap, os, sqlite3, ssl, subprocess, sys
from imagewatch.system.disk import Disk

def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def write(path):
    with open(path, "wb"):
        pass
    os.unlink(path)

def run(folder):
    path = folder + "/program"
    with open("/bin/true", "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    os.chmod(path, 0o755)
    try:
        subprocess.run([path], check=True)
    finally:
        os.unlink(path)

def rename(folder):  # by renameat2, through ctypes
    write_to = folder + "/one"
    open(write_to, "wb").close()
    Disk().rename(write_to, folder + "/two")
    os.unlink(folder + "/two")

def database(folder):
    connection = sqlite3.connect(folder + "/probe.sqlite3")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (a)")
    connection.close()
    os.unlink(folder + "/probe.sqlite3")

def tls():
    ssl.create_default_context()

def code():  # memory that can be written and run
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)

def namespace():
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")

own, state = "/srv/imagewatch/inbox", "/var/lib/imagewatch"
def chown():
    path = state + "/mine"
    open(path, "wb").close()
    try:
        os.chown(path, -1, os.getgid())
    finally:
        os.unlink(path)

print(json.dumps({
    "read": {path: outcome(read, path) for path in sys.argv[1:]},
    "write": {folder: outcome(write, folder + "/probe") for folder in ("/etc", "/usr", "/opt", "/var", own, state)},
    "run": {folder: outcome(run, folder) for folder in (own, state, "/tmp", "/dev/shm")},
    "own": [outcome(rename, own), outcome(rename, state), outcome(database, state), outcome(tls)],
    "code": outcome(code),
    "chown": outcome(chown),
    "setgid": outcome(os.chmod, own, 0o2770),
    "namespace": outcome(namespace),  # the last: it changes who one is
}))
"""
STRANGE = {
    "a home": "/home/colleague/notes.txt",
    "another service's state": "/var/lib/other/state",
    "another share": "/srv/other/file",
    "another disk": "/mnt/other/file",
    "a stick": "/media/other/file",
    "a log": "/var/log/other.log",
    "the key itself": "/etc/imagewatch/letta_api_key",
}


@pytest.fixture(scope="module")
def probed(machine) -> dict[str, dict[str, Any]]:
    """What a program may do that runs as the service does, and one that merely runs as its user."""
    for path in list(STRANGE.values())[:-1]:
        machine.put(path, "not yours\n", 0o644)
    machine.path("/home/colleague").chmod(0o755)
    machine.put("/opt/probe.py", PROBE)
    command = f"/opt/imagewatch/bin/python /opt/probe.py {' '.join(STRANGE.values())}"
    unit = (UNITS / "imagewatch.service").read_text()
    unit = re.sub(r"^(Watchdog|Restart)\w*=.*\n", "", unit, flags=re.MULTILINE)
    unit = unit.replace("Type=notify\n", "Type=oneshot\nStandardOutput=file:/run/probed\n")
    machine.put("/run/systemd/system/probe.service", re.sub(r"ExecStart=.*", f"ExecStart={command}", unit))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "stop", "imagewatch")
    machine.run("systemctl", "start", "probe")
    free = machine.run("sh", "-c", command, user="imagewatch").stdout
    return {"service": json.loads(machine.path("/run/probed").read_text()), "user": json.loads(free)}


@pytest.mark.parametrize("what", STRANGE)
def test_the_service_cannot_read(probed, what):
    path = STRANGE[what]
    assert probed["service"]["read"][path] in {"ENOENT", "EACCES"}
    assert what == "the key itself" or probed["user"]["read"][path] == "done"  # by its rights alone it could


def test_the_service_writes_only_into_its_own_folders_and_runs_nothing_from_there(probed):
    own, state = "/srv/imagewatch/inbox", "/var/lib/imagewatch"
    written = probed["service"]["write"]
    assert (written.pop(own), written.pop(state)) == ("done", "done")
    assert set(written.values()) == {"EROFS"}
    assert set(probed["service"]["run"].values()) == {"EACCES"}
    assert set(probed["user"]["run"].values()) == {"done"}


def test_what_python_needs_works_and_what_an_intruder_needs_does_not(probed):
    assert probed["service"]["own"] == ["done"] * 4
    refused = [probed["service"][name] for name in ("code", "chown", "setgid", "namespace")]
    assert refused[0] in {"EPERM", "EACCES"}
    assert refused[1:] == ["EPERM"] * 3
    assert [probed["user"][name] for name in ("code", "chown", "setgid")] == ["done"] * 3


# Falling and getting up


def wait_for_call(endpoint: Endpoint, prompt: str) -> None:
    until(lambda: endpoint.calls(prompt) == 1)


def test_a_killed_service_is_restarted_and_pays_for_nothing_twice(started, endpoint):
    slow, quick = "[sandbox: slow 30] Killed", "[sandbox: b64] After the kill"
    started.prompt("slow", slow)
    wait_for_call(endpoint, slow)
    before = started.pid
    started.kill("KILL")
    error = started.error("slow")
    assert (error["charged"], error["attempts"]) == ("unknown", 1)
    started.prompt("quick", quick)
    assert started.receipt("quick")["charged"] == "yes"
    assert (started.restarts, started.pid != before) == (1, True)
    assert (endpoint.calls(slow), endpoint.calls(quick)) == (1, 1)


def with_the_real_watchdog(service: Service) -> None:
    """Continue with the unit as it is: on a busy machine a second without a sign of life proves nothing."""
    service.drop_in("")
    service.systemctl("restart")


def test_a_hung_service_is_killed_by_the_watchdog_and_restarted(service, endpoint):
    # Not SIGSTOP: before it aborts, systemd continues a stopped process, and nothing hangs any more.
    service.container.put(f"{HANGING}/sitecustomize.py", HANG)
    service.drop_in(f"WatchdogSec=1\nEnvironment=PYTHONPATH={HANGING}")
    service.systemctl("start")
    slow, quick = "[sandbox: slow 30] Hung", "[sandbox: b64] After the watchdog"
    service.prompt("slow", slow)
    wait_for_call(endpoint, slow)
    service.kill("USR1")
    assert service.error("slow")["charged"] == "unknown"  # reported by the restarted one
    assert service.restarts >= 1
    assert "Watchdog timeout" in service.log()
    until(lambda: " in hang" in service.log() and " in _loop" in service.log())  # where it hung
    with_the_real_watchdog(service)
    service.prompt("quick", quick)
    assert service.receipt("quick")["charged"] == "yes"
    assert (endpoint.calls(slow), endpoint.calls(quick)) == (1, 1)


def test_a_service_that_cannot_see_its_inbox_is_restarted_by_the_watchdog(service, endpoint):
    service.drop_in("WatchdogSec=1")
    service.systemctl("start")
    service.container.run("mv", f"{service.root}/inbox", f"{service.root}/gone")
    until(lambda: service.restarts >= 1)
    assert "Watchdog timeout" in service.log()
    service.container.run("sh", "-c", f"rm -rf {service.root}/gone; systemd-tmpfiles --create imagewatch.conf")
    until(lambda: service.container.show("imagewatch", "ActiveState") == "active")
    with_the_real_watchdog(service)
    service.prompt("seen", "[sandbox: b64] Seen again")
    assert service.receipt("seen")["charged"] == "yes"


def test_the_watchdog_does_not_end_a_service_that_waits_for_a_response(service, endpoint):
    service.drop_in(f"WatchdogSec={WATCHDOG_SECONDS}")
    service.systemctl("start")
    with endpoint.holding():
        service.prompt("slow", "[sandbox: b64] Patience")
        wait_for_call(endpoint, "[sandbox: b64] Patience")
        before = service.last_sign
        until(lambda: service.last_sign > before + WATCHDOG_SECONDS)
    assert service.receipt("slow")["charged"] == "yes"
    assert service.restarts == 0


# Stopping


def test_a_stop_finishes_what_was_sent_and_claims_nothing(service, endpoint):
    service.drop_in(f"WatchdogSec={WATCHDOG_SECONDS}\nEnvironment=IMAGEWATCH_LIMITS__CONCURRENCY=1")
    service.systemctl("start")
    sent, waiting = "[sandbox: b64] On its way", "[sandbox: b64] In the queue"
    with endpoint.holding():
        service.prompt("sent", sent)
        wait_for_call(endpoint, sent)
        service.prompt("waiting", waiting)
        last = service.last_sign
        service.systemctl("stop", "--no-block")
        until(lambda: service.events("shutdown"))
        until(lambda: time.monotonic() > last + WATCHDOG_SECONDS + 1)  # the watchdog must wait, too
        assert service.container.show("imagewatch", "ActiveState") == "deactivating"
    until(lambda: service.container.show("imagewatch", "ActiveState") != "deactivating")
    assert service.path("outbox/sent.receipt.toml").exists()
    assert service.path("inbox/waiting.prompt.txt").exists()
    assert service.container.show("imagewatch", "Result") == "success"
    assert service.restarts == 0
    assert (endpoint.calls(sent), endpoint.calls(waiting)) == (1, 0)


# Configuration


def edit(service: Service, script: str) -> None:
    service.container.run("sed", "-i", script, service.config)


@pytest.fixture
def restored(machine) -> Iterator[None]:
    before = machine.path("/etc/imagewatch/config.toml").read_text()
    yield
    machine.put("/etc/imagewatch/config.toml", before)


def test_a_reload_uses_a_good_configuration_and_keeps_the_old_one_if_it_is_bad(started, endpoint, restored):
    pid = started.pid
    edit(started, "s/^# provider = .*/provider = 'openai'/")
    started.systemctl("reload")
    until(lambda: started.events("reloaded"))
    edit(started, "s/^provider = .*/provder = 'gemini'/")
    started.systemctl("reload")
    until(lambda: started.events("reload_failed"))
    entry = started.events("reload_failed")[0]
    assert (entry["PRIORITY"], "defaults.provder" in entry["IMAGEWATCH_REASON"]) == ("3", True)
    started.prompt("old", "[sandbox: b64] By the old one")
    assert started.receipt("old")["provider"] == "openai"
    assert (started.pid, started.restarts) == (pid, 0)


def test_a_bad_configuration_is_refused_once_and_logged_as_an_error(service, restored):
    edit(service, "s/^# concurrency = .*/concurrency = 1000/")
    assert service.systemctl("start", check=False).returncode != 0
    assert service.container.show("imagewatch", "ActiveState") == "failed"
    assert (service.container.show("imagewatch", "ExecMainStatus"), service.restarts) == ("78", 0)
    until(lambda: "limits.concurrency" in service.log())
    entries = [entry for entry in service.journal() if "limits.concurrency" in str(entry["MESSAGE"])]
    assert [entry["PRIORITY"] for entry in entries] == ["3"]


def test_a_missing_key_file_is_refused_once_and_named(service):
    service.container.run("mv", "/etc/imagewatch/letta_api_key", "/etc/imagewatch/away")
    try:
        assert service.systemctl("start", check=False).returncode != 0
    finally:
        service.container.run("mv", "/etc/imagewatch/away", "/etc/imagewatch/letta_api_key")
    assert (service.container.show("imagewatch", "ActiveState"), service.restarts) == ("failed", 0)
    assert "status=243/CREDENTIALS" in service.log()


# The journal


def test_the_journal_has_levels_and_fields(started, endpoint):
    started.prompt("good", "[sandbox: b64] A good one")
    started.prompt("bad", "[sandbox: 400] A bad one")
    job = started.receipt("good")["job"]
    started.error("bad")
    until(lambda: started.events("completed") and started.events("failed"))
    made, refused = started.events("completed")[0], started.events("failed")[0]
    assert (made["PRIORITY"], refused["PRIORITY"]) == ("6", "4")
    assert (made["IMAGEWATCH_JOB"], made["IMAGEWATCH_SOURCE"]) == (job, "good.prompt.txt")
    assert (made["SYSLOG_IDENTIFIER"], made["_SYSTEMD_UNIT"]) == ("imagewatch", "imagewatch.service")
    found = started.container.run("journalctl", "--output=cat", f"IMAGEWATCH_JOB={job}").stdout
    assert found.startswith("completed ")
    warnings = started.container.run("journalctl", "--output=cat", "--unit=imagewatch", "--priority=warning").stdout
    assert "bad.prompt.txt" in warnings
    assert "good.prompt.txt" not in warnings


def test_lines_of_json_keep_their_level_in_the_journal(service, endpoint):
    service.drop_in("Environment=IMAGEWATCH_LOG__FORMAT=json")
    service.systemctl("start")
    service.prompt("bad", "[sandbox: 400] A bad one")
    service.error("bad")

    def failures() -> list[dict[str, Any]]:
        return [entry for entry in service.journal() if '"failed"' in str(entry["MESSAGE"])]

    until(failures)
    assert failures()[0]["PRIORITY"] == "4"
    assert json.loads(failures()[0]["MESSAGE"])["source"] == "bad.prompt.txt"


# Several


@pytest.fixture
def cats(machine, endpoint) -> Iterator[Service]:
    """A second inbox, created as the page describes."""
    made = Service(machine, "imagewatch@cats", "imagewatch-cats")
    if not machine.path("/etc/imagewatch/cats.toml").exists():
        assert "is running" in follow(machine, "several", f"{KEY}\n")
        quicken(machine, "/etc/imagewatch/cats.toml")
    made.reset()
    yield made
    made.systemctl("stop")


def test_several_inboxes_do_not_see_each_other(started, cats, endpoint):
    cats.systemctl("start")
    cats.prompt("tom", "[sandbox: b64] Tom")
    started.prompt("rex", "[sandbox: b64] Rex")
    assert (cats.receipt("tom")["charged"], started.receipt("rex")["charged"]) == ("yes", "yes")
    for own in (cats, started):
        script = "ls /srv; ls /var/lib; ls /run/credentials"
        seen = own.container.run("nsenter", f"--target={own.pid}", "--mount", "sh", "-c", script).stdout.split()
        name = own.root.removeprefix("/srv/")
        assert seen == [name, name, f"{own.unit}.service"]


def test_the_steps_for_a_second_inbox_can_be_repeated(cats, endpoint):
    machine = cats.container
    paths = [machine.path(f"/etc/{name}") for name in ("imagewatch/cats.toml", "tmpfiles.d/imagewatch-cats.conf")]
    before = [path.read_text() for path in paths]
    assert 'state = "/var/lib/imagewatch-cats"\n' in before[0]
    machine.run("bash", "-uc", BLOCKS["several"], text=f"{KEY}\n")  # without -e, as in a terminal
    assert [path.read_text() for path in paths] == before


def test_each_of_several_inboxes_has_a_gallery_of_its_own(started, cats, endpoint, gallery):
    cats.systemctl("start")
    follow(cats.container, "gallery_several")
    cats.prompt("tom", "[sandbox: b64] Tom on a page")
    started.prompt("rex", "[sandbox: b64] Rex on a page")
    for own, name in ((cats, "tom"), (started, "rex")):
        own.receipt(name)
    second = Gallery(cats.container, "imagewatch-gallery@cats", cats.root)
    second.run()
    gallery.run()
    assert [bool(second.job(name)) for name in ("tom", "rex")] == [True, False]
    assert [bool(gallery.job(name)) for name in ("tom", "rex")] == [False, True]


def test_a_team_of_its_own_shares_an_inbox_of_its_own(cats, endpoint, gallery):
    cats.systemctl("start")
    follow(cats.container, "team")
    cats.container.run("useradd", "--create-home", "--groups=cats", "carol")
    cats.prompt("deep/purr", "[sandbox: b64] Purr", user="carol")
    cats.receipt("deep/purr")
    inside = f"{cats.root}/outbox/deep"
    assert cats.container.run("ls", inside, user="colleague", check=False).returncode != 0
    follow(cats.container, "gallery_several")
    follow(cats.container, "gallery_team")
    second = Gallery(cats.container, "imagewatch-gallery@cats", cats.root)
    second.run()
    assert second.job("purr")["images"][0]["thumb"]
    for user, expected in (("carol", 0), ("colleague", 2)):
        page = f"{second.folder}/gallery.html"
        assert cats.container.run("cmp", page, page, user=user, check=False).returncode == expected
    cats.container.run("sh", "-c", f"rm {inside}/*", user="carol")


# The gallery


class Gallery:
    """The gallery's unit, and what it writes."""

    def __init__(self, container: Container, unit: str = "imagewatch-gallery", root: str = "/srv/imagewatch") -> None:
        self.container = container
        self.unit = unit
        self.folder = f"{root}/gallery"

    def run(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run it to its end; a run that the timer began before may have missed what a test has created."""
        return self.container.run("systemctl", "restart", self.unit, check=check)

    @property
    def page(self) -> Path:
        return self.container.path(f"{self.folder}/gallery.html")

    def job(self, name: str) -> dict[str, Any]:
        """Return what the page shows of a job, with nothing if that is not shown."""
        jobs = page_data(self.page)["shown"]["jobs"] if self.page.exists() else []
        return next((job for job in jobs if job["name"] == name), {})


@pytest.fixture(scope="module")
def gallery(machine) -> Gallery:
    """The gallery, installed by the page."""
    follow(machine, "gallery")
    machine.put("/etc/systemd/system/imagewatch-gallery.service.d/test.conf", "[Unit]\nStartLimitBurst=1000\n")
    machine.run("systemctl", "daemon-reload")
    return Gallery(machine)


def test_the_gallery_is_written_by_a_timer(started, endpoint, gallery):
    assert started.container.show("imagewatch-gallery.timer", "ActiveState") == "active"
    assert started.container.show("imagewatch-gallery.timer", "UnitFileState") == "enabled"
    quick = "[Timer]\nOnUnitInactiveSec=1s\nAccuracySec=100ms\n"
    drop_in = "/etc/systemd/system/imagewatch-gallery.timer.d/test.conf"
    started.container.put(drop_in, quick)
    started.container.run("systemctl", "daemon-reload")
    started.container.run("systemctl", "restart", "imagewatch-gallery.timer")
    try:
        started.prompt("timed", "[sandbox: b64] On the page soon")
        started.receipt("timed")
        until(lambda: gallery.job("timed"))
    finally:
        started.container.path(drop_in).unlink()
        started.container.run("systemctl", "daemon-reload")
        started.container.run("systemctl", "restart", "imagewatch-gallery.timer")


def test_the_gallery_is_for_the_group_and_of_its_own_user(started, endpoint, gallery):
    started.prompt("cats/cat", "[sandbox: b64] A cat to be seen")
    started.receipt("cats/cat")
    started.prompt("dog", "[sandbox: 400] A dog")
    started.error("dog")
    gallery.run()
    [image] = gallery.job("cat")["images"]
    assert image["href"].startswith("../outbox/cats/cat.")
    assert gallery.job("dog")["completed"] is False
    thumb = f"{gallery.folder}/gallery_files/{image['thumb']}"
    for user, expected in (("colleague", 0), ("stranger", 2)):
        for path in (f"{gallery.folder}/gallery.html", thumb, f"{gallery.folder}/{image['href']}"):
            assert started.container.run("cmp", path, path, user=user, check=False).returncode == expected
    owners = started.container.run("stat", "--format=%U:%G", f"{gallery.folder}/gallery.html", thumb).stdout.split()
    assert set(owners) == {"imagewatch-gallery:imagewatch"}
    assert started.container.show("imagewatch-gallery", "Result") == "success"


def test_the_gallery_shows_a_hold_and_its_end(started, endpoint, gallery):
    def holds() -> list[str]:
        gallery.run()
        status = page_data(gallery.page)["shown"]["status"]
        return [hold["message"] for hold in status["holds"]] if status and "holds" in status else []

    started.container.run("imagewatch", "hold", "a hold for the page")
    try:
        until(lambda: any("a hold for the page" in message for message in holds()))
    finally:
        started.container.run("imagewatch", "release")
    until(lambda: holds() == [])


GALLERY_PROBE = """\
import errno, json, os, socket, subprocess, sys

def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def write(folder):
    with open(folder + "/probe", "wb"):
        pass
    os.unlink(folder + "/probe")

def run(folder):
    path = folder + "/program"
    with open("/bin/true", "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    os.chmod(path, 0o755)
    try:
        subprocess.run([path], check=True)
    finally:
        os.unlink(path)

def connect():
    with socket.create_connection(("127.0.0.1", 8283), 5):
        pass

root = "/srv/imagewatch"
folders = [root, *(f"{root}/{name}" for name in ("outbox", "errors", "archive", "gallery")), "/etc", "/opt", "/var"]
print(json.dumps({
    "read": {path: outcome(read, path) for path in sys.argv[1:]},
    "list": {name: outcome(os.listdir, name) for name in (root + "/inbox", "/var/lib/imagewatch", "/srv/other")},
    "write": {folder: outcome(write, folder) for folder in folders},
    "run": {folder: outcome(run, folder) for folder in (root + "/gallery", "/tmp", "/dev/shm")},
    "connect": outcome(connect),
}))
"""
SECRETS = {
    "the ledger": "/var/lib/imagewatch/ledger.sqlite3",
    "the key of the service": "/run/credentials/imagewatch.service/letta_api_key",
    "what is in the inbox": "/srv/imagewatch/inbox/notes.txt",
    **STRANGE,
}


@pytest.fixture(scope="module")
def gallery_probed(machine, endpoint, gallery, probed) -> dict[str, dict[str, Any]]:
    """What a program may do that runs as the gallery does, and one that merely runs as the daemon's user."""
    machine.run("systemctl", "start", "imagewatch")
    machine.put("/srv/imagewatch/inbox/notes.txt", "not yours\n", 0o644)
    machine.put("/opt/gallery_probe.py", GALLERY_PROBE)
    command = f"/opt/imagewatch/bin/python /opt/gallery_probe.py {' '.join(SECRETS.values())}"
    unit = (UNITS / "imagewatch-gallery.service").read_text()
    unit = unit.replace("StandardOutput=null", "StandardOutput=file:/run/gallery_probed")
    machine.put("/run/systemd/system/gallery_probe.service", re.sub(r"ExecStart=.*", f"ExecStart={command}", unit))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "gallery_probe")
    free = machine.run("sh", "-c", command, user="imagewatch").stdout
    return {"service": json.loads(machine.path("/run/gallery_probed").read_text()), "user": json.loads(free)}


@pytest.mark.parametrize("what", SECRETS)
def test_the_gallery_cannot_read(gallery_probed, what):
    path = SECRETS[what]
    assert gallery_probed["service"]["read"][path] in {"ENOENT", "EACCES"}
    assert what == "the key itself" or gallery_probed["user"]["read"][path] == "done"  # as the daemon's user it could


def test_the_gallery_sees_no_inbox_and_no_state_writes_in_its_own_folder_only_and_has_no_network(gallery_probed):
    found, free = gallery_probed["service"], gallery_probed["user"]
    assert set(found["list"].values()) == {"ENOENT"}
    assert found["write"].pop("/srv/imagewatch/gallery") == "done"
    assert set(found["write"].values()) == {"EROFS"}
    assert set(found["run"].values()) == {"EACCES"}
    assert (found["connect"] != "done", free["connect"]) == (True, "done")


def test_the_gallery_has_limits(gallery):
    limits = {"MemoryMax": str(1 << 30), "TasksMax": "64", "CPUQuotaPerSecUSec": "1s", "TimeoutStartUSec": "15min"}
    assert {name: gallery.container.show(gallery.unit, name) for name in limits} == limits


def test_a_forged_file_in_the_outbox_does_not_harm_the_rest_of_the_gallery(started, endpoint, gallery):
    started.prompt("honest", "[sandbox: b64] An honest one")
    started.receipt("honest")
    content = scans(4000, 3000, 20_000)
    names = {"bomb.jpg": content, "ledger.png": b"", "page.html": b"<script>"}
    started.container.put("/home/colleague/bomb.jpg", "")
    started.container.path("/home/colleague/bomb.jpg").write_bytes(content)
    entries = "".join(f'[[images]]\nfile = "{name}"\nbytes = {len(data)}\n' for name, data in names.items())
    document = f'source = "forged"\ncharged = "yes"\n{entries}'
    link = "ln -s /var/lib/imagewatch/ledger.sqlite3 ledger.png"
    script = f"cp ~colleague/bomb.jpg . && printf '<script>' > page.html && {link} && cat > forged.receipt.toml"
    started.container.run("sh", "-c", script, user="colleague", cwd=f"{started.root}/outbox", text=document)
    gallery.run()
    assert gallery.job("honest")["images"][0]["thumb"]
    bomb, ledger, page = gallery.job("forged")["images"]
    assert "more than 100 scans" in bomb["problem"]
    assert not {"href", "thumb"} & (ledger.keys() | page.keys())


def test_files_that_root_wrote_do_not_stop_the_gallery(started, endpoint, gallery):
    page = f"{gallery.folder}/gallery.html"
    shutil.rmtree(started.container.path(f"{gallery.folder}/gallery_files"), ignore_errors=True)
    gallery.page.unlink(missing_ok=True)
    started.prompt("before", "[sandbox: b64] Before")
    started.receipt("before")
    result = started.container.run(
        "sh", "-c", f"umask 077; imagewatch gallery --output {page}; imagewatch gallery"
    ).stdout
    assert result.count("Wrote ") == 2
    started.prompt("after", "[sandbox: b64] After")
    started.receipt("after")
    gallery.run()
    assert gallery.job("before")
    assert gallery.job("after")
    thumbs = [
        f"{gallery.folder}/gallery_files/{gallery.job(name)['images'][0]['thumb']}" for name in ("before", "after")
    ]
    started.container.run("sh", "-c", f"cat {page} {' '.join(thumbs)} > /dev/null", user="colleague")
    beside = started.container.run("stat", "--format=%U", f"{started.root}/gallery.html").stdout
    assert beside == "imagewatch\n"


def test_a_failure_of_the_gallery_is_in_the_journal_with_its_reason_and_a_run_is_not(gallery):
    def log() -> str:
        """What the journal has about the last run."""
        last = gallery.container.show(gallery.unit, "InvocationID")
        gallery.container.run("journalctl", "--sync")
        about = [f"_SYSTEMD_INVOCATION_ID={last}", "+", f"INVOCATION_ID={last}"]
        return gallery.container.run("journalctl", "--output=cat", *about).stdout

    gallery.run()
    assert log() == ""
    page = gallery.page.read_text()
    gallery.page.write_text("a page that another program wrote")
    try:
        assert gallery.run(check=False).returncode != 0
        until(lambda: "the file already exists and is not a gallery" in log() and "status=64" in log())
    finally:
        gallery.page.write_text(page)


# The rest of the page


def test_the_tests_follow_every_marked_block_of_the_documentation():
    followed = re.findall(r'follow\(.+?, "(\w+)"', Path(__file__).read_text())
    assert set(BLOCKS) == set(followed)


def test_the_page_names_the_next_step_for_each_kind_of_hold():
    kinds = [row[0] for row in table(page("reference/holds"), "# ")]
    named = [kind for text in kinds for kind in re.findall(r"`(\w+)`", text)]
    assert sorted(named) == sorted(HOLDS)


def test_the_first_start_of_the_page(service):
    result = follow(service.container, "start")
    assert "active (running)" in result
    assert "from systemd credential letta_api_key" in result
    assert "bad " not in result


def test_a_check_by_root_does_not_call_the_key_of_a_healthy_service_bad(started):
    result = started.container.run("imagewatch", "check").stdout
    assert "bad " not in result
    (key,) = (line for line in result.splitlines() if line.split()[1] == "key")
    assert key.startswith("warn")
    command = key.partition("to check it, run as root: ")[2].rstrip(")")
    assert "from systemd credential letta_api_key" in started.container.run("sh", "-c", command).stdout


def test_status_hold_and_reload(started, endpoint):
    started.prompt("cat", "[sandbox: b64] A cat to look for")
    started.receipt("cat")
    until(lambda: started.events("completed"))
    assert "is running" in follow(started.container, "look_at_exit_code")
    result = follow(started.container, "look")
    assert "is running" in result
    assert "Total: " in result
    assert "completed attempts=1" in result
    assert "Released." in follow(started.container, "pause")
    assert [entry["IMAGEWATCH_KIND"] for entry in started.events("held")] == ["manual"]
    until(lambda: started.events("reloaded"))


def test_the_key_is_checked_as_the_how_to_pages_say(started, endpoint):
    for result in (follow(started.container, "check_as_service"), follow(started.container, "check_balance")):
        assert "from systemd credential letta_api_key" in result
        assert not re.search("^bad ", result, re.MULTILINE)
    assert re.search("^ok +total balance ", result, re.MULTILINE)


def test_a_changed_configuration_is_checked_and_applied_as_the_pages_say(started, endpoint):
    assert "ok      configuration" in follow(started.container, "apply_presets")
    until(lambda: len(started.events("reloaded")) == 1)
    assert "ok      configuration" in follow(started.container, "apply_budgets")
    until(lambda: len(started.events("reloaded")) == 2)


def test_a_service_that_systemd_gave_up_is_started_again_as_troubleshooting_says(service, endpoint):
    service.drop_in("ExecStart=\nExecStart=/bin/false\n[Unit]\nStartLimitBurst=2")
    assert service.systemctl("start", check=False).returncode != 0
    until(lambda: service.container.show(service.unit, "ActiveState") == "failed")
    service.drop_in("")
    follow(service.container, "start_again")
    until(lambda: service.events("started"))


def test_old_copies_of_the_ledger_are_removed_as_the_page_says(machine):
    place = machine.path("/var/backups/imagewatch")
    made = {days: place / f"ledger-{days}.sqlite3" for days in (1, 40)}
    place.mkdir(parents=True, exist_ok=True)
    for days, path in made.items():
        path.write_bytes(b"")
        os.utime(path, (time.time() - days * 86_400,) * 2)
    follow(machine, "prune_backups")
    assert [days for days, path in made.items() if path.exists()] == [1]
    made[1].unlink()


def test_a_timer_writes_what_prometheus_reads_also_while_it_is_held_or_down(started, endpoint):
    machine, file = started.container, "/var/lib/prometheus/node-exporter/imagewatch.prom"

    def written() -> tuple[float, float]:
        machine.run("systemctl", "start", "imagewatch-metrics.service")
        text = machine.run("cat", file, user="stranger").stdout  # as node_exporter's user
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        held = {sample.labels["reason"]: sample.value for sample in samples if sample.name == "imagewatch_held"}
        return next(sample.value for sample in samples if sample.name == "imagewatch_up"), held["manual"]

    machine.path(file).parent.mkdir(parents=True, exist_ok=True)
    follow(machine, "metrics")
    try:
        assert machine.show("imagewatch-metrics.timer", "ActiveState") == "active"
        machine.run("imagewatch", "hold")
        assert written() == (1, 1)
        machine.run("imagewatch", "release")
        until(
            lambda: machine.run("imagewatch", "status", check=False).returncode == 0
        )  # it sends one line a second at most
        assert written() == (1, 0)
        started.systemctl("stop")
        assert written() == (0, 0)
    finally:
        machine.run("systemctl", "disable", "--now", "imagewatch-metrics.timer")


def test_a_new_key_continues_where_the_old_one_was_refused(started, endpoint):
    follow(started.container, "rotate", "sk-let-revoked-0123456789\n")
    started.prompt("first", "[sandbox: b64] Refused at first")
    assert started.error("first")["status"] == 401
    started.prompt("second", "[sandbox: b64] Waits for the key")
    follow(started.container, "rotate", f"{KEY}\n")
    assert started.receipt("second")["charged"] == "yes"
    started.container.run("imagewatch", "retry", "--all")
    assert started.receipt("first")["charged"] == "yes"


def test_a_backup_is_made_while_the_service_runs_and_restored(started, endpoint):
    started.prompt("kept", "[sandbox: b64] Kept in the ledger")
    started.receipt("kept")
    until(lambda: started.events("completed"))
    before = started.container.run("imagewatch", "history", "--json", "--limit=0").stdout
    follow(started.container, "backup")
    assert follow(started.container, "read_backup") == "ok\n"
    follow(started.container, "restore")
    assert json.loads(started.container.run("imagewatch", "history", "--json", "--limit=0").stdout) == json.loads(
        before
    )
    started.prompt("after", "[sandbox: b64] After the backup")
    assert started.receipt("after")["charged"] == "yes"


def test_a_backup_is_restored_on_a_machine_without_a_state_folder(started, endpoint):
    """A new machine: nothing of the old one is there but what was copied."""
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync")
    machine, state = started.container, "/var/lib/imagewatch"
    machine.run("sh", "-c", "rm -rf /mnt/backup /root/inbox-of-the-backup; mkdir -p /mnt/backup")
    started.prompt("paid", "[sandbox: b64] Paid on the old machine")
    started.receipt("paid")
    until(lambda: started.events("completed"))
    history = machine.run("imagewatch", "history", "--json", "--limit=0").stdout
    follow(machine, "backup")
    started.systemctl("stop")
    started.prompt("unsent", "[sandbox: b64] In the inbox of the backup")
    follow(machine, "copy_folders")
    machine.run("rm", "-rf", state, "/etc/imagewatch", "/var/backups/imagewatch", f"{started.root}/outbox")
    machine.run("sh", "-c", f"rm -f {started.root}/inbox/*.prompt.txt")
    follow(machine, "copy_folders_back")
    follow(machine, "restore")
    assert started.path("outbox/paid.receipt.toml").exists()
    assert machine.path("/root/inbox-of-the-backup/unsent.prompt.txt").exists()
    assert not started.path("inbox/unsent.prompt.txt").exists()
    assert machine.run("stat", "--format=%U:%G %a", state).stdout == "imagewatch:imagewatch 700\n"
    assert machine.run("imagewatch", "history", "--json", "--limit=0").stdout == history
    until(lambda: machine.run("imagewatch", "status", check=False).returncode == 69)
    machine.run("imagewatch", "release", "--accept-new-ledger")
    started.prompt("after", "[sandbox: b64] After the move")
    assert started.receipt("after")["charged"] == "yes"


def test_a_restore_that_fails_leaves_the_ledger_and_does_not_start_the_daemon(service, endpoint):
    service.systemctl("start")  # so that there is a ledger
    service.systemctl("stop")
    machine, ledger = service.container, service.container.path("/var/lib/imagewatch/ledger.sqlite3")
    before = ledger.read_bytes()
    machine.run("sh", "-c", "rm -f /var/backups/imagewatch/ledger-*.sqlite3")
    assert machine.run("bash", "-uc", BLOCKS["restore"], check=False).returncode != 0  # without -e, as in a terminal
    assert ledger.read_bytes() == before
    assert machine.show(service.unit, "ActiveState") == "inactive"


def test_an_upgrade_continues_with_the_prompts_that_are_there(service, endpoint):
    service.prompt("early", "[sandbox: b64] Dropped while it was down")
    follow(service.container, "copy_state")
    (copy,) = service.container.path("/var/lib").glob("imagewatch.before-*")
    assert (copy / "ledger.sqlite3").exists()
    shutil.rmtree(copy)
    follow(service.container, "upgrade")
    assert service.receipt("early")["charged"] == "yes"
    result = follow(service.container, "after_upgrade")
    assert result.startswith(f"active\nimagewatch {__version__}\n")
    assert "is running" in result
    assert not re.search("^bad ", result, re.MULTILINE)


def test_files_of_a_sync_program_in_the_folders_are_not_touched(started, endpoint):
    follow(started.container, "syncthing")
    started.prompt("synced", "[sandbox: b64] Synced", user="syncthing")
    started.receipt("synced")
    assert started.path("inbox/.stignore").read_text() == ".imagewatch\n"
    started.container.run("sh", "-c", f"cat {started.root}/outbox/synced.*g > /dev/null", user="syncthing")


@pytest.fixture
def samba(machine) -> Iterator[Callable[[str, str, str], subprocess.CompletedProcess[str]]]:
    """The share of the page: run a client's commands in one of its folders as a user."""
    if missing := [name for name in ("smbd", "smbclient", "smbpasswd") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)} (apt install samba smbclient)")
    (share,) = re.findall(r"^```ini\n(\[pictures\]\n.+?)^```$", ALL, re.MULTILINE | re.DOTALL)
    machine.put("/etc/samba/smb.conf", f"[global]\ndisable netbios = yes\nload printers = no\n{share}")
    for user in ("colleague", "stranger"):
        machine.run("smbpasswd", "-a", "-s", user, text="secret\nsecret\n")

    def client(user: str, folder: str, commands: str) -> subprocess.CompletedProcess[str]:
        place = ["//127.0.0.1/pictures", "--directory", folder, "--user", f"{user}%secret"]
        return machine.run("smbclient", *place, "--command", commands, check=False, cwd=f"/home/{user}")

    machine.run("systemd-run", "--quiet", "--unit=share", "smbd", "--foreground", "--no-process-group")
    until(lambda: client("colleague", "inbox", "pwd").returncode == 0)
    yield client
    machine.run("systemctl", "stop", "share")


def test_the_share_of_the_page_takes_prompts_and_gives_images_to_the_group_only(started, endpoint, samba):
    started.container.put("/home/colleague/words.txt", "[sandbox: b64] By Samba")
    dropped = samba("colleague", "inbox", "mkdir cats; cd cats; put words.txt tom.prompt.txt; cd ..; ls")
    assert dropped.returncode == 0, dropped.stdout + dropped.stderr
    assert ".imagewatch" not in dropped.stdout
    assert started.receipt("cats/tom")["charged"] == "yes"
    taken = samba("colleague", "outbox/cats", "prompt; mget *; del *; cd ..; rmdir cats")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert not started.path("outbox/cats").exists()
    assert tomllib.loads(started.container.path("/home/colleague/tom.receipt.toml").read_text())["got"] == 1
    assert samba("stranger", "inbox", "ls").returncode != 0


def test_a_folder_closed_to_the_service_delays_no_other_folder(started, endpoint):
    closed = f"{started.root}/inbox/closed"
    started.container.run("sh", "-c", f"mkdir -m 755 {closed} && chmod 755 {closed}", user="colleague")
    started.prompt("closed/mine", "[sandbox: b64] In a closed folder")
    started.prompt("other", "[sandbox: b64] In an open one")
    assert started.receipt("other")["charged"] == "yes"
    until(lambda: started.events("ignored"))
    assert started.events("ignored")[0]["IMAGEWATCH_FILE"] == "closed/mine.prompt.txt"
    assert not started.events("held")
    started.container.run("chmod", "g+rwX", closed, user="colleague")
    started.systemctl("reload")  # scans immediately
    assert started.receipt("closed/mine")["charged"] == "yes"


def test_a_folder_in_a_home_is_opened_by_one_line_and_nothing_else_of_that_home(service, endpoint, restored, gallery):
    home = service.container.path("/home/colleague")
    home.chmod(0o755)
    service.container.put("/home/colleague/private.txt", "not yours\n")
    try:
        follow(service.container, "elsewhere")
        service.root = "/home/colleague/pictures"
        service.prompt("home", "[sandbox: b64] At home")
        assert service.receipt("home")["charged"] == "yes"
        seen = service.container.run("nsenter", f"--target={service.pid}", "--mount", "ls", "/home", "/home/colleague")
        assert seen.stdout.split() == ["/home:", "colleague", "/home/colleague:", "pictures"]
        follow(service.container, "gallery_elsewhere")
        elsewhere = Gallery(service.container, root=service.root)
        assert elsewhere.job("home")["images"][0]["href"].startswith("../outbox/home.")
    finally:
        drop_ins = [f"/etc/systemd/system/{unit}.service.d/folders.conf" for unit in ("imagewatch", gallery.unit)]
        service.container.run("rm", "-f", *drop_ins)
        service.container.run("systemctl", "daemon-reload")


# Notifications


COMMAND = """\
#!/bin/sh
cat >> /srv/imagewatch/events.jsonl
env > /srv/imagewatch/environment
cat /home/colleague/private.txt > /srv/imagewatch/stolen 2> /dev/null
exit 0
"""


def test_a_command_of_the_service_gets_events_and_no_way_to_the_key(service, endpoint, restored):
    machine, events = service.container, service.path("events.jsonl")
    machine.put("/usr/local/bin/notify", COMMAND, 0o755)
    machine.put("/home/colleague/private.txt", "not yours\n")
    add(machine, '[notify]\ncommand = ["/usr/local/bin/notify"]')
    service.systemctl("start")
    service.prompt("poor", "[sandbox: times 1 402] Poor")
    until(lambda: events.exists() and '"held"' in events.read_text())
    service.prompt("rich", "[sandbox: b64] Rich")
    machine.run("imagewatch", "release")
    until(lambda: '"released"' in events.read_text() and '"completed"' in events.read_text())
    held = next(one for one in map(json.loads, events.read_text().splitlines()) if one["event"] == "held")
    assert held["text"].startswith("on hold (credits): Not enough credits")
    environment = service.path("environment").read_text()
    assert "CREDENTIALS_DIRECTORY" not in environment
    assert KEY not in environment
    assert service.path("stolen").read_text() == ""


def test_the_secret_of_notifications_comes_from_the_manager(service, endpoint, restored):
    machine = service.container
    machine.put("/opt/receiver.py", (ROOT / "examples/notify_receiver.py").read_text())
    add(machine, '[notify]\nurl = "http://127.0.0.1:8484/hook"')
    try:
        follow(machine, "credential")
        secret = "/etc/imagewatch/notify_secret"
        assert machine.run("stat", "--format=%U %a", secret).stdout == "root 600\n"
        machine.run(
            "systemd-run",
            "--quiet",
            "--unit=receiver",
            "/opt/imagewatch/bin/python",
            "/opt/receiver.py",
            secret,
            "8484",
        )
        service.prompt("signed", "[sandbox: b64] Signed")
        service.receipt("signed")
        until(lambda: "completed signed.prompt.txt: 1 image" in machine.run("journalctl", "--unit=receiver").stdout)
        result = machine.run(
            "imagewatch",
            "check",
            user="imagewatch",
            variables={"CREDENTIALS_DIRECTORY": "/run/credentials/imagewatch.service"},
        )
        assert "signed with the secret in /run/credentials/imagewatch.service/notify_secret" in result.stdout
    finally:
        machine.run("systemctl", "stop", "receiver", check=False)
        machine.run("rm", "-f", "/etc/systemd/system/imagewatch.service.d/notify.conf")
        machine.run("systemctl", "daemon-reload")


def add(machine: Container, text: str) -> None:
    """Add a table to the configuration in the place of an empty one of its name."""
    path = machine.path("/etc/imagewatch/config.toml")
    name = text.partition("\n")[0]
    path.write_text(path.read_text().replace(f"\n{name}\n", f"\n{text}\n"))


# A desktop


@pytest.fixture
def desktop(machine, endpoint) -> Iterator[dict[str, Any]]:
    """What is needed to run a command as a user with a systemd of their own."""
    runtime = "/run/user/imagewatch-test"
    machine.run("install", "--directory", "--owner=colleague", "--mode=700", runtime)
    properties = [
        "--property=Delegate=yes",
        "--property=Type=notify",
        f"--property=Environment=XDG_RUNTIME_DIR={runtime}",
    ]
    manager = "/lib/systemd/systemd"
    machine.run("systemd-run", "--quiet", "--unit=desktop", "--uid=colleague", *properties, manager, "--user")
    yield {"user": "colleague", "variables": {"HOME": "/home/colleague", "XDG_RUNTIME_DIR": runtime}}
    machine.run("systemctl", "stop", "desktop")


def test_the_unit_of_a_desktop_works_for_one_person(desktop, machine, endpoint):
    def run(*command: str, text: str = "") -> str:
        return machine.run(*command, text=text, **desktop).stdout

    program, units = "/home/colleague/.local/bin", "/home/colleague/.config/systemd/user"
    run("mkdir", "-p", program, units)
    run("ln", "-s", "/opt/imagewatch/bin/imagewatch", program)  # as pipx does
    machine.run("install", "-m", "644", "-t", units, "/root/imagewatch/systemd/user/imagewatch.service")
    follow(machine, "desktop", f"{KEY}\n", cwd="/", **desktop)
    quicken(machine, "/home/colleague/.config/imagewatch/config.toml")
    run("systemctl", "--user", "restart", "imagewatch")
    inbox = "/home/colleague/Pictures/imagewatch/inbox"
    run("sh", "-c", f"cat > {inbox}/me.part; mv {inbox}/me.part {inbox}/me.prompt.txt", text="[sandbox: b64] Me")
    until(machine.path("/home/colleague/Pictures/imagewatch/outbox/me.receipt.toml").exists)
    assert run("systemctl", "--user", "is-active", "imagewatch") == "active\n"
    assert "Total: 1 completed" in run("imagewatch", "history")


# The command that writes the units


def test_service_install_writes_units_that_work_and_finds_those_of_the_page_unchanged(service, endpoint):
    machine = service.container
    assert machine.run("imagewatch", "service", "install").stdout.count("unchanged: /etc/") == 4
    machine.run("rm", "/etc/systemd/system/imagewatch.service")
    done = machine.run("imagewatch", "service", "install").stdout
    assert "wrote: /etc/systemd/system/imagewatch.service\n" in done
    assert "  systemctl daemon-reload\n" in done
    machine.run("systemctl", "daemon-reload")
    service.systemctl("start")
    service.prompt("written", "[sandbox: b64] By the command")
    service.receipt("written")


# The end


def test_an_uninstall_leaves_the_images_and_what_was_paid_for(started, endpoint):
    """The last one: nothing of imagewatch works afterwards."""
    machine = started.container
    started.prompt("kept", "[sandbox: b64] Kept after all")
    started.receipt("kept")
    machine.run("systemctl", "stop", "endpoint")
    machine.run("umount", "--lazy", machine.packages)  # what the tests have put into /opt is not there to be written
    follow(machine, "uninstall")
    script = "find /etc /opt /usr/local -name 'imagewatch*' ! -path '*.wants/*'"  # other tests' instances were enabled
    assert "imagewatch" not in machine.run("sh", "-c", script, check=False).stdout
    assert started.path("outbox/kept.receipt.toml").exists()
    assert machine.path("/var/lib/imagewatch/ledger.sqlite3").exists()
