"""The image in containers of Podman, by the commands of ``docs/howto/install-container.md`` as they stand there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from support.daemon import KEY, STARTED, Folders, below, until
from support.podman import IMAGE, ROOT, Podman, Unavailable, unavailable

from imagewatch import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from imagewatch.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PAGE = (ROOT / "docs/howto/install-container.md").read_text()
OWNER = 1000


def block(name: str) -> str:
    """The commands of one block of the page."""
    (found,) = re.findall(rf"^<!-- tested: image_{name} -->\n```sh\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert isinstance(found, str)
    return found


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    if reason := unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("podman")
    try:
        made = Podman(folder)
        made.get_image()
    except Unavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


class Place(Folders):
    """An empty folder of a user, in which the commands of the page are run, and the containers that they start."""

    def __init__(self, podman: Podman, path: Path, sandbox: Sandbox) -> None:
        self.path, self.podman = path, podman
        self.root = path / "pictures"
        settings = {
            "LETTA_BASE_URL": sandbox.base_url,
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0",
            "IMAGEWATCH_LIMITS__MIN_FREE_BYTES": "1000000",
        }
        self.environ = {"RUN_OPTIONS": " ".join(["--network host", *(f"--env {k}={v}" for k, v in settings.items())])}

    def follow(self, name: str, text: str = "", *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one block of the page."""
        return self.commands(block(name), text, check=check)

    def commands(self, script: str, text: str = "", *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.podman.shell(script, text=text, check=check, cwd=self.path, variables=self.environ)

    def prepare(self) -> None:
        self.follow("prepare", f"{KEY}\n")

    def start(self, *edits: tuple[str, str]) -> None:
        """Start the container as the page says, or with changes to the command."""
        script = block("run")
        for old, new in edits:
            assert old in script
            script = script.replace(old, new)
        self.commands(script)
        STARTED["container"] = self.log

    def prompt(self, stem: str, text: str | bytes) -> Path:
        path = super().prompt(stem, text)
        os.chown(path, OWNER, OWNER)
        return path

    def log(self) -> str:
        done = self.podman.run("logs", "imagewatch", check=False)
        return done.stdout + done.stderr

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.podman.run("exec", "imagewatch", *command, check=False)

    def until_watching(self) -> None:
        until(lambda: '"started"' in self.log(), 60, saw=self.log)

    def until_receipt(self, stem: str) -> None:
        until((self.outbox / f"{stem}.receipt.toml").exists, 60, saw=self.log)

    def exit_code(self) -> int:
        return int(self.podman.run("wait", "imagewatch").stdout)


@pytest.fixture
def place(podman: Podman, tmp_path: Path, sandbox: Sandbox) -> Iterator[Place]:
    yield Place(podman, tmp_path, sandbox)
    podman.run("rm", "--all", "--force", "--time", "0")
    podman.run("volume", "rm", "--all", "--force")


@pytest.fixture
def started(place: Place) -> Place:
    place.prepare()
    place.start()
    place.until_watching()
    return place


# The image


def test_the_image_says_what_it_runs_and_how_it_is_stopped_and_checked(podman: Podman) -> None:
    found = podman.inspect(IMAGE)
    config = found["Config"]
    assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("1000:1000", "/", "SIGTERM")
    assert (config["Entrypoint"], config["Cmd"]) == (["imagewatch"], ["run"])
    assert "Volumes" not in config
    assert config["Labels"]["org.opencontainers.image.title"] == "imagewatch"
    assert found["Healthcheck"]["Test"] == ["CMD", "imagewatch", "status"]
    assert found["Size"] < 220_000_000


def test_the_image_has_the_locked_packages_and_neither_pip_nor_a_compiler(podman: Podman) -> None:
    listing = "import importlib.metadata as m; print(*sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
    done = podman.run("run", "--rm", "--entrypoint", "/opt/imagewatch/bin/python", IMAGE, "-c", listing)
    locked = re.findall(
        r"^([a-z0-9.-]+==\S+) (?!; sys_platform)", (ROOT / "requirements/service.txt").read_text(), re.MULTILINE
    )
    needed = {one for one in locked if not one.startswith("typing-extensions")} | {f"imagewatch=={__version__}"}
    assert {one.lower().replace("_", "-") for one in done.stdout.split()} - {"x"} >= needed
    script = (
        "for p in pip pip3 gcc cc make; do command -v $p; done; find / -xdev -name 'pip*' -path '*-packages/*'; id -u"
    )
    assert podman.run("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", script, check=False).stdout.split() == ["1000"]


def test_no_file_of_the_program_is_compiled_again_at_each_start(podman: Podman) -> None:
    script = "import imagewatch.commands.main as m, sys; print(m.__cached__); open(m.__cached__, 'rb').seek(0)"
    cached = podman.run("run", "--rm", "--entrypoint", "/opt/imagewatch/bin/python", IMAGE, "-c", script).stdout.strip()
    flags = f"print(open({cached!r}, 'rb').read()[4:8])"
    done = podman.run("run", "--rm", "--entrypoint", "/opt/imagewatch/bin/python", IMAGE, "-c", flags)
    assert done.stdout.strip() == str(b"\1\0\0\0")  # by a hash that is not checked: the times of files do not matter


def test_the_demo_runs_without_a_network_and_a_writable_system(place: Place) -> None:
    place.environ.clear()
    done = place.follow("demo")
    assert "The endpoint counted 867 for 4 requests" in done.stdout


# A prompt, a hold


def test_a_prompt_in_the_mounted_folder_becomes_an_image_that_belongs_to_the_user(
    started: Place, sandbox: Sandbox
) -> None:
    started.prompt("cat", "[sandbox: b64] A cat")
    started.until_receipt("cat")
    assert started.receipt("cat")["charged"] == "yes"
    assert started.receipt("cat")["owner"] == "1000"
    assert sandbox.report()["charged"] == 1
    until(lambda: (started.names("archive"), started.names("inbox")) == (["cat.prompt.txt"], []), saw=started.log)
    owners = set()
    for path in below(started.root):
        with contextlib.suppress(FileNotFoundError):  # a status file that was replaced
            status = path.stat()
            owners.add((status.st_uid, status.st_gid))
    assert owners == {(OWNER, OWNER)}
    done = started.follow("look")
    assert re.search(r"^ok +key +from .*letta_api_key", done.stdout, re.MULTILINE), done.stdout
    assert KEY not in done.stdout + done.stderr
    assert KEY not in json.dumps(started.podman.inspect("imagewatch"))


def test_the_container_is_healthy_exactly_while_the_queue_is_not_on_hold(started: Place) -> None:
    def is_healthy() -> bool:
        return started.podman.run("healthcheck", "run", "imagewatch", check=False).returncode == 0

    until(is_healthy)
    assert started.inside("imagewatch", "hold", "out of office").returncode == 0
    assert started.inside("imagewatch", "status").returncode == 69
    assert not is_healthy()
    assert started.inside("imagewatch", "release").returncode == 0
    until(is_healthy)


def test_nothing_but_the_mounts_can_be_written(started: Place) -> None:
    done = started.inside(
        "sh", "-c", "for d in / /etc /opt/imagewatch /srv /usr /var/lib; do touch $d/x && echo $d; done"
    )
    assert done.stdout == ""
    assert done.stderr.count("Read-only file system") == 6
    capabilities = started.inside("grep", "-E", "Cap(Eff|Bnd|Amb)|NoNewPrivs", "/proc/self/status").stdout
    assert re.findall(r"\w+$", capabilities, re.MULTILINE) == ["0" * 16, "0" * 16, "0" * 16, "1"]


# Kill, stop, upgrade


def test_a_container_that_is_killed_and_replaced_pays_nothing_twice(started: Place, sandbox: Sandbox) -> None:
    started.prompt("before", "[sandbox: b64] Before")
    started.until_receipt("before")
    sandbox.hold()
    started.prompt("flight", "[sandbox: b64] In flight")
    assert sandbox.wait_for_requests(2, 30)
    started.podman.run("kill", "--signal", "KILL", "imagewatch")
    assert started.exit_code() == 137
    sandbox.release()
    started.podman.run("rm", "imagewatch")
    started.start()
    until((started.errors / "flight.error.toml").exists, 60, saw=started.log)
    assert started.error("flight")["charged"] == "unknown"
    started.prompt("after", "[sandbox: b64] After")
    started.until_receipt("after")
    assert [call["prompt"].split("] ")[1] for call in sandbox.report()["calls"]] == ["Before", "In flight", "After"]


def test_a_container_that_is_stopped_publishes_the_response_in_flight_and_claims_nothing_new(
    started: Place, sandbox: Sandbox
) -> None:
    sandbox.hold()
    started.prompt("flight", "[sandbox: b64] In flight")
    assert sandbox.wait_for_requests(1, 30)
    stopping = threading.Thread(target=started.follow, args=("stop",))
    stopping.start()
    until(lambda: '"shutdown"' in started.log(), saw=started.log)
    started.prompt("late", "[sandbox: b64] Too late")
    stopping.join(3)
    assert stopping.is_alive()  # it waits for the request
    sandbox.release()
    stopping.join(60)
    assert started.exit_code() == 0
    assert started.receipt("flight")["charged"] == "yes"
    assert started.names("inbox") == ["late.prompt.txt"]
    assert started.podman.inspect("imagewatch")["Config"]["StopTimeout"] == 1600
    started.podman.run("start", "imagewatch")
    started.until_receipt("late")
    assert sandbox.report()["charged"] == 2


def test_a_stop_in_the_first_moment_of_a_start_ends_the_container_soon(place: Place) -> None:
    place.prepare()
    for _ in range(3):
        place.start()
        place.commands("timeout 30 podman stop imagewatch")
        assert place.exit_code() in {0, 143}
        place.podman.run("rm", "imagewatch")


def test_an_upgrade_keeps_the_ledger(started: Place, sandbox: Sandbox) -> None:
    started.prompt("cat", "[sandbox: b64] A cat")
    started.until_receipt("cat")
    started.follow("upgrade")
    started.start()
    started.until_watching()
    assert "cat" in started.inside("imagewatch", "history").stdout
    assert sandbox.report()["charged"] == 1


def test_a_ledger_is_copied_while_the_container_runs_and_restored(started: Place, sandbox: Sandbox) -> None:
    started.prompt("cat", "[sandbox: b64] A cat")
    started.until_receipt("cat")
    started.follow("backup")
    (copy,) = started.path.glob("ledger-*.sqlite3")
    assert copy.stat().st_mode & 0o777 == 0o600
    history = started.inside("imagewatch", "history", "--json", "--limit=0").stdout
    assert "cat.prompt.txt" in history
    started.follow("restore")
    started.start()
    started.until_watching()
    assert started.inside("imagewatch", "history", "--json", "--limit=0").stdout == history
    assert not re.search("^bad ", started.inside("imagewatch", "check").stdout, re.MULTILINE)
    assert started.inside("ls", "/var/lib/imagewatch").stdout == "state\n"
    assert sandbox.report()["charged"] == 1


# Users and mounts


def test_another_user_can_use_a_new_state_volume(place: Place) -> None:
    place.prepare()
    for path in (place.root, place.path / "letta_api_key"):
        os.chown(path, 1234, 1234)
    place.start(("--init", "--init --user 1234:1234"))
    place.until_watching()
    place.prompt("cat", "[sandbox: b64] A cat")
    place.until_receipt("cat")
    assert (place.outbox / "cat.receipt.toml").stat().st_uid == 1234


def test_a_group_can_read_and_remove_what_the_daemon_creates(place: Place) -> None:
    place.prepare()
    place.follow("group")
    place.prompt("cat", "[sandbox: b64] A cat")
    until((place.outbox / "cat.receipt.toml").exists, 60)
    for path in place.outbox.iterdir():
        assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (2000, 0o660)
    checked = place.podman.run("exec", "imagewatch-group", "imagewatch", "check", check=False).stdout
    assert not re.search(r"^(bad|warn) +(?!key|balance)", checked, re.MULTILINE), checked


@pytest.mark.skipif(shutil.which("bindfs") is None, reason="needs bindfs")
def test_a_mount_without_change_events_is_scanned(place: Place) -> None:
    place.prepare()
    (place.path / "lower").mkdir()
    os.chown(place.path / "lower", OWNER, OWNER)
    subprocess.run(["bindfs", "-o", "allow_other", place.path / "lower", place.root], check=True)
    try:
        place.start()
        place.until_watching()
        assert "(poll," in place.inside("imagewatch", "status").stdout
        place.root = place.path / "lower"  # from outside, so that no event comes
        place.prompt("cat", "[sandbox: b64] A cat")
        place.until_receipt("cat")
    finally:
        place.podman.run("rm", "--force", "--time", "0", "imagewatch")
        subprocess.run(["umount", place.path / "pictures"], check=True)


WRONG = {
    "no folder": ('--volume "$PWD/pictures:/srv/imagewatch"', "--env A=b", 74, "/srv/imagewatch/inbox"),
    "no state": ("--volume imagewatch-state:/var/lib/imagewatch", "--env A=b", 74, "/var/lib/imagewatch/state"),
    "folder of another user": ("--init", "--init --user 1234:1234", 74, "/srv/imagewatch"),
    "mistake": ("--init", "--init --env IMAGEWATCH_LIMITS__MAX_N=9", 78, "IMAGEWATCH_LIMITS__MAX_N"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_set_up_ends_with_a_message_that_names_what_is_wrong(place: Place, case: str) -> None:
    place.prepare()
    old, new, code, named = WRONG[case]
    place.start((old, new), ("--restart unless-stopped", "--restart no"))
    assert place.exit_code() == code
    assert named in place.log()
    assert "Traceback" not in place.log()


@pytest.mark.parametrize("case", ["missing", "unreadable"])
def test_without_a_key_prompts_wait_and_the_reason_is_shown(place: Place, sandbox: Sandbox, case: str) -> None:
    place.prepare()
    edits = []
    if case == "missing":
        edits = [('--volume "$PWD/letta_api_key:/run/secrets/letta_api_key:ro"', "--env A=b")]
    else:
        os.chown(place.path / "letta_api_key", 0, 0)
    place.start(*edits)
    place.until_watching()
    place.prompt("cat", "[sandbox: b64] A cat")
    until(lambda: place.inside("imagewatch", "status").returncode == 69, 60, saw=place.log)
    shown = place.inside("imagewatch", "status").stdout
    assert "/run/secrets/letta_api_key" in shown, shown
    assert (sandbox.report()["calls"], place.names("inbox")) == ([], ["cat.prompt.txt"])
