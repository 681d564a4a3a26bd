"""The Debian package: built, then installed, used, upgraded, removed and purged in a booted system.

The commands are those of ``docs/howto/install-deb.md``, as they stand there. The tests in the machine follow each
other: each one continues with what the one before has left.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from service.test_systemd import Endpoint, Service, quicken
from support.container import ROOT, Container, Unavailable, unavailable
from support.daemon import KEY, until

from imagewatch import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
PAGE = (ROOT / "docs/howto/install-deb.md").read_text()
TOOLS = ("dpkg-buildpackage", "dh", "git", "make")
INSIDE = "/usr/lib/imagewatch"
NEWER = "99.0"
"""The version of a second package, which differs from the first one in its version only."""


def build(folder: Path) -> Path:
    """Build the package in a folder, with nothing of this environment; return its file."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HOME"))}
    command = ["make", "deb", f"DEB={folder}/build", f"DIST={folder}/dist"]
    environ = {**own, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (package,) = (folder / "dist").iterdir()
    return package


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The package of IMAGEWATCH_DEB, as one that is to be published, or one that is built from these files."""
    if built := os.environ.get("IMAGEWATCH_DEB"):
        return Path(built)
    if missing := [name for name in TOOLS if shutil.which(name, path="/usr/bin") is None]:
        pytest.skip(f"needs {', '.join(missing)} (apt install debhelper dpkg-dev git make)")
    if subprocess.run(["/usr/bin/python3", "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs Debian's python3-pip")
    return build(tmp_path_factory.mktemp("deb"))


def field(package: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True).stdout.strip()


# The package itself


def test_the_package_is_named_for_its_release_of_debian_and_depends_on_its_python(package):
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.MULTILINE))
    version = field(package, "Version")
    assert version == f"{__version__}-1~deb{release['VERSION_ID']}"
    assert package.name == f"imagewatch_{version}_{field(package, 'Architecture')}.deb"
    major, minor = re.findall(r"python3 \(>= 3\.(\d+)\), python3 \(<< 3\.(\d+)\)", field(package, "Depends"))[0]
    assert int(minor) == int(major) + 1
    assert "libc6 (>= " in field(package, "Depends")


def test_the_copyright_file_names_every_library_of_the_package(package):
    listing = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    found = {name.replace("_", "-") for name in re.findall(r"/site-packages/(\w+)-[^/]+\.dist-info/\n", listing)}
    named = set(re.findall(r"^Comment: ([a-z0-9-]+)$", (ROOT / "debian/copyright").read_text(), re.MULTILINE))
    assert found == named | {"imagewatch"}


def test_lintian_finds_nothing_that_is_not_explained(package):
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian")
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif("IMAGEWATCH_ALL_DEB" not in os.environ, reason="takes a second build; set IMAGEWATCH_ALL_DEB=1")
def test_another_folder_gives_the_same_file(package, tmp_path):
    again = build(tmp_path)
    assert again.name == package.name
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(package.read_bytes()).hexdigest()


# In a machine


def follow(machine: Container, name: str, text: str = "") -> str:
    """Run the commands of one block of the page; return what they print."""
    (block,) = re.findall(rf"^<!-- tested: deb_{name} -->\n```sh\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = machine.run("bash", "-euc", block.replace("_amd64", "_*"), text=text, cwd="/root/package")
    return done.stdout + done.stderr


def later(package: Path, folder: Path) -> Path:
    """Return the same package with a higher version."""
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control, (code,) = tree / "DEBIAN/control", tree.glob(f"{INSIDE[1:]}/lib/*/site-packages/imagewatch/__init__.py")
    control.write_text(control.read_text().replace(f"\nVersion: {__version__}", f"\nVersion: {NEWER}"))
    code.write_text(code.read_text().replace(__version__, NEWER))
    made = folder / package.name.replace(__version__, NEWER)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, made], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def machine(package, tmp_path_factory) -> Iterator[Container]:
    """A system with the package in a folder, not installed."""
    if reason := unavailable():
        pytest.skip(reason)
    try:
        booted = Container(tmp_path_factory.mktemp("machine"))
    except Unavailable as error:
        pytest.skip(str(error))
    booted.run("rm", "-f", "/usr/sbin/policy-rc.d")  # a container image may have it, to start no service
    booted.run("rm", "-f", "/var/lib/man-db/auto-update")  # else each change builds the index of all manual pages
    put(booted, package)
    for name in ("colleague", "stranger"):
        booted.run("useradd", "--create-home", name)
    yield booted
    booted.stop()


def put(machine: Container, package: Path) -> None:
    """Let the folder of the page have one package."""
    machine.run("sh", "-c", "rm -rf /root/package && mkdir -p /root/package")
    shutil.copy(package, machine.path(f"/root/package/{package.name}"))


@pytest.fixture(scope="module")
def installed(machine) -> str:
    """What the installation prints."""
    return follow(machine, "install")


@pytest.fixture(scope="module")
def used(installed, machine, endpoint) -> Service:
    """The service with a key and an endpoint, started."""
    machine.run("usermod", "--append", "--groups", "imagewatch", "colleague")
    quicken(machine, "/etc/imagewatch/config.toml")
    service = Service(machine)
    service.reset()
    follow(machine, "start", f"{KEY}\n")
    return service


@pytest.fixture(scope="module")
def endpoint(machine) -> Endpoint:
    return Endpoint(machine)


@pytest.fixture(scope="module")
def cats(used, machine) -> Service:
    """A second inbox."""
    follow(machine, "several", f"{KEY}\n")
    quicken(machine, "/etc/imagewatch/cats.toml")
    service = Service(machine, "imagewatch@cats", "imagewatch-cats")
    service.systemctl("restart")
    return service


def state(machine: Container, unit: str) -> tuple[str, str]:
    return machine.show(unit, "ActiveState"), machine.show(unit, "UnitFileState")


def test_after_the_installation_the_service_waits_for_its_key_and_has_not_failed(installed, machine):
    assert "no API key yet" in installed
    assert "systemctl start imagewatch" in installed
    assert state(machine, "imagewatch") == ("inactive", "enabled")
    machine.run("systemctl", "start", "imagewatch")  # as the next boot does
    assert state(machine, "imagewatch") == ("inactive", "enabled")
    assert machine.show("imagewatch", "ConditionResult") == "no"
    assert machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "imagewatch*").stdout == ""
    assert state(machine, "imagewatch-gallery.timer") == ("inactive", "disabled")


def test_the_package_brings_user_folders_page_and_completions(installed, machine):
    modes = machine.run("stat", "--format=%U:%G %a", "/srv/imagewatch", "/srv/imagewatch/inbox", "/etc/imagewatch")
    assert modes.stdout.split("\n")[:3] == ["imagewatch:imagewatch 2750", "imagewatch:imagewatch 3770", "root:root 755"]
    assert machine.run("imagewatch", "--version", user="colleague").stdout.split()[-1] == __version__
    assert "imagewatch" in machine.run("man", "--where", "imagewatch").stdout
    shells = ("bash-completion/completions/imagewatch", "zsh/vendor-completions/_imagewatch")
    for path in (*shells, "fish/vendor_completions.d/imagewatch.fish"):
        assert "_IMAGEWATCH_COMPLETE" in machine.path(f"/usr/share/{path}").read_text()
    for name in ("README.Debian", "changelog.gz", "changelog.Debian.gz", "copyright", "examples/config.example.toml"):
        assert machine.path(f"/usr/share/doc/imagewatch/{name}").exists(), name


def test_systemd_finds_nothing_wrong_with_the_units_of_the_package(installed, machine):
    for unit in ("imagewatch", "imagewatch@cats", "imagewatch-gallery", "imagewatch-gallery@cats"):
        done = machine.run("systemd-analyze", "verify", "--man=no", f"{unit}.service", check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_with_a_key_a_prompt_becomes_an_image(used, endpoint):
    used.prompt("cat", "[sandbox: b64] A cat from a package")
    assert used.receipt("cat")["charged"] == "yes"
    result = follow(used.container, "check")
    assert "active (running)" in result
    assert "from systemd credential letta_api_key" in result
    assert "bad " not in result


def test_the_gallery_of_the_package_shows_the_image(used, endpoint):
    follow(used.container, "gallery")
    try:
        used.container.run("systemctl", "start", "imagewatch-gallery")
        assert "A cat from a package" in used.path("gallery/gallery.html").read_text()
    finally:
        used.container.run("systemctl", "disable", "--now", "imagewatch-gallery.timer")


def test_an_upgrade_waits_for_requests_in_flight_and_starts_what_ran_before(
    used, cats, endpoint, package, tmp_path_factory
):
    machine = used.container
    put(machine, later(package, tmp_path_factory.mktemp("later")))
    settings = machine.path("/etc/imagewatch/config.toml").read_text()
    with ThreadPoolExecutor(1) as pool:
        with endpoint.holding():
            used.prompt("slow", "[sandbox: b64] Slow")
            until(lambda: "1 in flight" in machine.show("imagewatch", "StatusText"))
            upgrade = pool.submit(follow, machine, "upgrade")
            until(lambda: machine.show("imagewatch", "ActiveState") == "deactivating")
            used.prompt("next", "[sandbox: b64] Dropped later")
            assert machine.run("imagewatch", "--version").stdout.split()[-1] == __version__
            assert not upgrade.done()
        upgrade.result()
    assert "waiting for requests in flight" in upgrade.result()
    assert used.receipt("slow")["version"] == __version__
    assert used.receipt("next")["version"] == NEWER
    assert sorted(endpoint.prompts())[-2:] == [f"[sandbox: b64] {text}" for text in ("Dropped later", "Slow")]
    assert state(machine, "imagewatch") == state(machine, "imagewatch@cats") == ("active", "enabled")
    assert machine.path("/etc/imagewatch/config.toml").read_text() == settings
    assert KEY in machine.path("/etc/imagewatch/letta_api_key").read_text()


def test_an_upgrade_does_not_start_what_was_stopped_nor_create_a_configuration_again(used, cats, endpoint):
    machine = used.container
    used.systemctl("stop")
    machine.run("systemctl", "disable", "imagewatch")
    machine.run("mv", "/etc/imagewatch/config.toml", "/root/config.toml")
    machine.run("dpkg", "--install", *machine_packages(machine))
    assert not machine.path("/etc/imagewatch/config.toml").exists()
    assert state(machine, "imagewatch") == ("inactive", "disabled")
    assert state(machine, "imagewatch@cats") == ("active", "enabled")
    machine.run("mv", "/root/config.toml", "/etc/imagewatch/config.toml")
    machine.run("systemctl", "enable", "--now", "imagewatch")


@pytest.mark.parametrize(("asked", "afterwards"), [("stop", "inactive"), ("restart", "active")])
def test_an_upgrade_waits_for_a_service_that_is_being_stopped_already(used, cats, endpoint, asked, afterwards):
    machine = used.container
    log = machine.path("/root/upgrade.log")
    log.unlink(missing_ok=True)
    machine.run("systemctl", "stop", "imagewatch@cats")
    install = f"dpkg --install {' '.join(machine_packages(machine))} >/root/upgrade.log 2>&1"
    with ThreadPoolExecutor(1) as pool:
        with endpoint.holding():
            used.prompt(asked, f"[sandbox: b64] Before a {asked}")
            until(lambda: "1 in flight" in machine.show("imagewatch", "StatusText"))
            machine.run("systemctl", asked, "--no-block", "imagewatch")
            until(lambda: machine.show("imagewatch", "ActiveState") == "deactivating")
            upgrade = pool.submit(machine.run, "sh", "-c", install)
            until(lambda: log.exists() and ("waiting for requests in flight" in log.read_text() or upgrade.done()))
            assert not upgrade.done()
            assert machine.show("imagewatch", "ActiveState") == "deactivating"
        upgrade.result()
    assert used.receipt(asked)["charged"] == "yes"
    assert machine.show("imagewatch", "ActiveState") == afterwards
    machine.run("systemctl", "start", "imagewatch", "imagewatch@cats")


def test_an_upgrade_starts_nothing_that_policy_rc_d_forbids(used, cats):
    machine = used.container
    policy = machine.path("/usr/sbin/policy-rc.d")
    policy.write_text('#!/bin/sh\n[ "$1 $2" != "imagewatch.service start" ] || exit 101\n')
    policy.chmod(0o755)
    try:
        machine.run("dpkg", "--install", *machine_packages(machine))
        assert machine.show("imagewatch", "ActiveState") == "inactive"
        assert machine.show("imagewatch@cats", "ActiveState") == "active"
    finally:
        policy.unlink()
        used.systemctl("start")


def machine_packages(machine: Container) -> list[str]:
    """The paths of the packages in the folder of the page."""
    return [f"/root/package/{path.name}" for path in machine.path("/root/package").iterdir()]


def test_a_removed_package_leaves_all_data_and_a_later_one_continues(used, cats, endpoint):
    machine = used.container
    before = machine.run("imagewatch", "history", "--json", "--limit=0").stdout
    follow(machine, "remove", "y\n")
    assert not machine.path(INSIDE).exists()
    assert machine.show("imagewatch", "ActiveState") == "inactive"
    assert machine.show("imagewatch@cats", "ActiveState") == "inactive"
    assert KEY in machine.path("/etc/imagewatch/letta_api_key").read_text()
    follow(machine, "install")
    assert state(machine, "imagewatch") == state(machine, "imagewatch@cats") == ("active", "enabled")
    assert machine.run("imagewatch", "history", "--json", "--limit=0").stdout == before


def test_purging_removes_settings_and_keys_and_keeps_what_was_paid_for(used, cats, endpoint):
    machine = used.container
    unused = "/srv/imagewatch-unused"
    folders = machine.run("sed", f"s|/srv/imagewatch|{unused}|", "/usr/lib/tmpfiles.d/imagewatch.conf").stdout
    machine.run("systemd-tmpfiles", "--create", "-", text=folders)
    assert machine.path(f"{unused}/inbox").exists()
    printed = follow(machine, "purge", "y\n")
    assert not machine.path("/etc/imagewatch").exists()
    assert not machine.path(INSIDE).exists()
    assert [path.name for path in machine.path("/etc/systemd/system").glob("*.wants/imagewatch*")] == []
    for name in ("cat", "slow", "next"):
        assert used.path(f"outbox/{name}.receipt.toml").exists()
        assert list(used.path("outbox").glob(f"{name}.*g"))
    assert machine.path("/var/lib/imagewatch/ledger.sqlite3").exists()
    kept = [f"{top}/{name}" for top in ("/srv", "/var/lib") for name in ("imagewatch", "imagewatch-cats")]
    assert re.findall(r"kept (\S+):", printed) == kept
    assert not machine.path(unused).exists()
